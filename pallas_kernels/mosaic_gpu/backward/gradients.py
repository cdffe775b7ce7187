"""The gradients of `add_lora` in three launches: dv; dx; and those of A and B."""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.backward.narrow import NarrowPart, narrow_kernel
from pallas_kernels.mosaic_gpu.backward.outer import OuterSum, outer_kernel
from pallas_kernels.mosaic_gpu.backward.squares import SIDE
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.backward.wide import WidePart, wide_kernel
from pallas_kernels.routing import Segments, SlotRange


class GradientPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      v: `[>= T, >= R]` in B's dtype, scaled, as the forward multiplied it by B.
      lora_a, lora_b: the stacks.
      scales: `[L]`, float32.
      slots: the ids of its adapters.
      y_offset: the first column of dy that is its own.
    """

    v: Float[Array, "rows K"]
    lora_a: Float[Array, "L R H"]
    lora_b: Float[Array, "L N R"]
    scales: Float[Array, " L"]
    slots: SlotRange
    y_offset: int


class PartGradient(NamedTuple):
    """The gradients in a part's A and B; and what its scales' follows from: dv of each row of the
    tiles, float32, before it is scaled."""

    lora_a: Array
    lora_b: Array
    dv: Float[Array, "rows R"]
    slots: SlotRange
    tiles: Tiles

    def of_scales(self, v: Float[Array, "T R"]) -> Float[Array, " L"]:
        """The gradient in the scales; `v` is that of the forward before it was scaled."""
        terms = jnp.sum(self.dv * v[self.tiles.tokens()], axis=1)
        of_tiles = jnp.where(self.tiles.is_token(), terms, 0.0).reshape(-1, SIDE).sum(axis=1)
        mine = self.tiles.table[:, 0] == jnp.arange(self.slots.first, self.slots.stop)[:, None]
        return jnp.sum(jnp.where(mine, of_tiles, 0.0), axis=1)


def gradients(
    dy: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[GradientPart, ...],
    segments: Segments,
) -> tuple[Float[Array, "T H"], list[PartGradient]]:
    """dx, zero in rows of -1; and each part's gradients. `segments` has global ids."""
    tiles = Tiles.of(segments)
    narrow = tuple(NarrowPart(part.lora_b, part.slots, part.y_offset) for part in parts)
    dvs = [functools.reduce(jnp.add, list(shares)) for shares in narrow_kernel(dy, narrow, tiles)]
    wide, sums = [], []
    tokens, is_token = tiles.tokens(), tiles.is_token()
    slot_tiles = tiles.slot_tiles(segments.num_adapters)
    for part, dv in zip(parts, dvs):
        rank, features = part.lora_a.shape[1:]
        mine = (is_token & part.slots.holds(tiles.adapters()))[:, None]
        scale = part.scales[jnp.maximum(part.slots.local(tiles.adapters()), 0)][:, None]
        dv = dv[:, :rank]
        du = jnp.where(mine, dv * scale, 0.0).astype(x.dtype)
        v = jnp.where(mine, part.v[tokens], 0)
        wide.append(WidePart(du, part.lora_a, part.slots))
        own = lax.slice_in_dim(slot_tiles, part.slots.first, part.slots.stop)
        width = part.lora_b.shape[1]
        sums.append(OuterSum(x, du, own, 0, features, rank, True))
        sums.append(OuterSum(dy, v, own, part.y_offset, width, rank, False))
    dx = wide_kernel(tuple(wide), tiles, x.shape[0], x.dtype)
    pairs = itertools.batched(outer_kernel(tuple(sums), tiles), 2)
    found = [
        PartGradient(da, db, dv[:, : part.lora_a.shape[1]], part.slots, tiles)
        for part, dv, (da, db) in zip(parts, dvs, pairs)
    ]
    return dx, found
