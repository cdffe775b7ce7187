"""The gradients of `add_lora` in three launches: u and dv; dx; and those of A and B."""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.backward.narrow import NarrowSum, narrow_kernel
from pallas_kernels.mosaic_gpu.backward.outer import OuterSum, outer_kernel
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.backward.wide import WidePart, wide_kernel
from pallas_kernels.routing import Segments, SlotRange


class GradientPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      lora_a, lora_b: the stacks.
      scales: `[L]`, float32.
      slots: the ids of its adapters.
      y_offset: the first column of dy that is its own.
      wanted: those of its slots, counted from the first, whose gradients are wanted; zeros for -1.
    """

    lora_a: Float[Array, "L R H"]
    lora_b: Float[Array, "L N R"]
    scales: Float[Array, " L"]
    slots: SlotRange
    y_offset: int
    wanted: Int[Array, " S"]


class PartGradient(NamedTuple):
    """The gradients in a part's A, B and scales, of the wanted slots."""

    lora_a: Float[Array, "S R H"]
    lora_b: Float[Array, "S N R"]
    scales: Float[Array, " S"]


class _Narrow(NamedTuple):
    """What a part has in the order of the tiles, zero in rows that are none of its tokens: u = x
    A^T and dv = dy B, float32; v = scale u and du = scale dv, rounded."""

    u: Float[Array, "rows R"]
    dv: Float[Array, "rows R"]
    v: Float[Array, "rows R"]
    du: Float[Array, "rows R"]


def gradients(
    dy: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[GradientPart, ...],
    segments: Segments,
) -> tuple[Float[Array, "T H"], list[PartGradient]]:
    """dx, zero in rows of -1; and each part's gradients. `segments` has global ids.

    u is computed again: its launch is that of dv. To save v instead would save one of the eight
    times that tokens' rows pass through memory.
    """
    tiles = Tiles.of(segments)
    narrows = _narrow(dy, x, parts, tiles)
    wide = tuple(WidePart(n.du, part.lora_a, part.slots) for part, n in zip(parts, narrows))
    dx = wide_kernel(wide, tiles, x.shape[0], x.dtype)
    slot_tiles = tiles.slot_tiles(segments.num_adapters)
    sums = []
    for part, narrow in zip(parts, narrows):
        rank, features = part.lora_a.shape[1:]
        width = part.lora_b.shape[1]
        own = jnp.where(part.wanted[:, None] >= 0, slot_tiles[part.slots.first + part.wanted], 0)
        sums.append(OuterSum(x, narrow.du, own, 0, features, rank, True))
        sums.append(OuterSum(dy, narrow.v, own, part.y_offset, width, rank, False))
    stacks = itertools.batched(outer_kernel(tuple(sums), tiles), 2)
    return dx, [
        PartGradient(
            da, db, _of_scales(narrow.u * narrow.dv, part.slots.first + part.wanted, tiles)
        )
        for part, narrow, (da, db) in zip(parts, narrows, stacks)
    ]


def shrink_gradients(
    dv: Float[Array, "T R"],
    x: Float[Array, "T H"],
    lora_a: Float[Array, "L R H"],
    scales: Float[Array, " L"],
    segments: Segments,
) -> tuple[Float[Array, "T H"], Float[Array, "L R H"], Float[Array, " L"]]:
    """Gradients of a shrink in x, A and scales; ids are the stack's own."""
    tiles, (slots, rank, features) = Tiles.of(segments), lora_a.shape
    every = SlotRange(0, slots)
    [share] = narrow_kernel((NarrowSum(x, lora_a, True, every, 0),), tiles)
    mine = (tiles.is_token() & every.holds(tiles.adapters()))[:, None]
    u = jnp.where(mine, functools.reduce(jnp.add, list(share))[:, :rank], 0.0)
    dv = jnp.where(mine, dv[tiles.tokens()], 0.0)
    du = (dv * scales[jnp.maximum(tiles.adapters(), 0)][:, None]).astype(x.dtype)
    dx = wide_kernel((WidePart(du, lora_a, every),), tiles, x.shape[0], x.dtype)
    slot_tiles = tiles.slot_tiles(slots)
    [da] = outer_kernel((OuterSum(x, du, slot_tiles, 0, features, rank, True),), tiles)
    return dx, da, _of_scales(u * dv, jnp.arange(slots), tiles)


def expand_gradients(
    dy: Float[Array, "T Ny"],
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    segments: Segments,
    y_offset: int,
) -> tuple[Float[Array, "T R"], Float[Array, "L N R"]]:
    """Gradients of an expand in v, float32, and B; ids are the stack's own."""
    tiles, (slots, width, rank) = Tiles.of(segments), lora_b.shape
    every = SlotRange(0, slots)
    [share] = narrow_kernel((NarrowSum(dy, lora_b, False, every, y_offset),), tiles)
    mine, tokens = tiles.is_token() & every.holds(tiles.adapters()), tiles.tokens()
    of_tiles = functools.reduce(jnp.add, list(share))[:, :rank]
    dv = jnp.zeros((v.shape[0], rank), jnp.float32)
    dv = dv.at[jnp.where(mine, tokens, v.shape[0])].set(of_tiles, mode="drop")
    operand = jnp.where(mine[:, None], v[tokens], 0)
    one = OuterSum(dy, operand, tiles.slot_tiles(slots), y_offset, width, rank, False)
    [db] = outer_kernel((one,), tiles)
    return dv, db


def _narrow(
    dy: Float[Array, "T Ny"], x: Float[Array, "T H"], parts: tuple[GradientPart, ...], tiles: Tiles
) -> list[_Narrow]:
    sums = []
    for part in parts:
        sums.append(NarrowSum(x, part.lora_a, True, part.slots, 0))
        sums.append(NarrowSum(dy, part.lora_b, False, part.slots, part.y_offset))
    adapters, is_token = tiles.adapters(), tiles.is_token()
    found = []
    for part, shares in zip(parts, itertools.batched(narrow_kernel(tuple(sums), tiles), 2)):
        rank = part.lora_a.shape[1]
        mine = (is_token & part.slots.holds(adapters))[:, None]
        u, dv = (
            jnp.where(mine, functools.reduce(jnp.add, list(share))[:, :rank], 0.0)
            for share in shares
        )
        scale = part.scales[jnp.maximum(part.slots.local(adapters), 0)][:, None]
        found.append(_Narrow(u, dv, (u * scale).astype(x.dtype), (dv * scale).astype(x.dtype)))
    return found


def _of_scales(
    terms: Float[Array, "rows R"], slots: Int[Array, " S"], tiles: Tiles
) -> Float[Array, " S"]:
    """The sum of the terms of each slot's rows."""
    of_tiles = jnp.sum(terms.reshape(tiles.count, -1), axis=1)
    mine = tiles.table[:, 0] == slots[:, None]
    return jnp.sum(jnp.where(mine, of_tiles, 0.0), axis=1)
