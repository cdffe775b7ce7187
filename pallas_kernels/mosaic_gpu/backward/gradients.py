"""The gradients of `add_lora` in three launches: u and dv; dx; and those of A and B."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.mosaic_gpu.backward.config import by_lanes
from pallas_kernels.mosaic_gpu.backward.narrow import NarrowSum, narrow_kernel
from pallas_kernels.mosaic_gpu.backward.narrow_few import narrow_few_kernel
from pallas_kernels.mosaic_gpu.backward.outer import OuterSum, outer_kernel
from pallas_kernels.mosaic_gpu.backward.outer_few import outer_few_kernel
from pallas_kernels.mosaic_gpu.backward.squares import squares_of
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.backward.wide import WidePart, by_range, wide_kernel
from pallas_kernels.mosaic_gpu.backward.wide_few import wide_few_kernel
from pallas_kernels.routing import Segments, SlotRange
from pallas_kernels.stacks import Sharing

# A kernel's code has pieces for each part, and lowering takes more than in proportion: 15 parts
# (five rank buckets of three slices) 29 s in one launch each, 8 s in three (2 CPU cores, busy).
_MOST_PARTS = 6


class GradientPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      lora_a, lora_b: the stacks, or those of several layers one behind the other.
      place: where its first slot stands among them, if no slots share A or B.
      scales: `[L]`, float32.
      slots: the ids of its adapters.
      y_offset: the first column of dy that is its own.
      wanted: those of its slots, counted from the first, whose gradients are wanted; zeros for -1.
        All of them, in order, if some share A or B.
      sharing: how many of its slots share one A, and one B.
    """

    lora_a: Float[Array, "M R H"]
    lora_b: Float[Array, "M N R"]
    place: Int[Array, " 1"]
    scales: Float[Array, " L"]
    slots: SlotRange
    y_offset: int
    wanted: Int[Array, " S"]
    sharing: Sharing = Sharing()

    def wanted_ids(self, shared: int) -> Int[Array, " _"]:
        """The first id of each A, or B, that is wanted, or -1; `shared` slots have one."""
        wanted = self.wanted[::shared]
        return jnp.where(wanted >= 0, self.slots.first + wanted, -1)


class PartGradient(NamedTuple):
    """The gradients in a part's A, B and scales, of the wanted slots."""

    lora_a: Float[Array, "_ R H"]
    lora_b: Float[Array, "_ N R"]
    scales: Float[Array, " S"]


class _Narrow(NamedTuple):
    """What a part has in the order of the tiles, zero in rows that are none of its tokens.

    Attributes:
      plain: x A^T and dy B, float32.
      scaled: v and du, which are those scaled, times the rows' weights, and rounded.
    """

    plain: Float[Array, "2 rows R"]
    scaled: Float[Array, "2 rows R"]


def gradients(
    dy: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[GradientPart, ...],
    segments: Segments,
    weights: Float[Array, " KT"] | None = None,
) -> tuple[Float[Array, "T H"], list[PartGradient], Float[Array, " KT"] | None]:
    """dx, zero in rows of -1; each part's gradients; and those in `weights`. `segments` has global
    ids: K times those of T tokens, one time after the other, with weights.

    u is computed again: its launch is that of dv. To save v instead would save one of the eight
    times that tokens' rows pass through memory.
    """
    tiles = Tiles.of(segments)
    reading = tiles.reading(x.shape[0])
    factors = None if weights is None else jnp.where(tiles.is_token(), weights[tiles.tokens()], 0.0)
    narrows = _narrow(dy, x, parts, reading, factors)
    wide = tuple(
        WidePart(n.scaled, 1, p.lora_a, p.place, p.slots, p.sharing.lora_a)
        for p, n in zip(parts, narrows)
    )
    dx = _wide(wide, tiles, segments.num_tokens, x.dtype)
    if weights is not None:
        dx = jnp.sum(dx.reshape(-1, *x.shape).astype(jnp.float32), axis=0).astype(x.dtype)
    sums = []
    for part, narrow in zip(parts, narrows):
        rank, features = part.lora_a.shape[1:]
        width = part.lora_b.shape[1]
        a, b = part.sharing
        sums.append(OuterSum(x, narrow.scaled, 1, part.wanted_ids(a), 0, features, rank, True, a))
        sums.append(
            OuterSum(dy, narrow.scaled, 0, part.wanted_ids(b), part.y_offset, width, rank, False, b)
        )
    stacks = _in_launches(_outer, sums, 2 * _MOST_PARTS, reading)
    found = []
    for part, narrow, (da, db) in zip(parts, narrows, itertools.batched(stacks, 2)):
        terms, slots = narrow.plain[0] * narrow.plain[1], part.slots.first + part.wanted
        if factors is not None:
            terms = terms * factors[:, None]
        found.append(PartGradient(da, db, _of_scales(terms, slots, tiles)))
    return dx, found, None if weights is None else _of_weights(parts, narrows, tiles)


def _of_weights(
    parts: Sequence[GradientPart], narrows: Sequence[_Narrow], tiles: Tiles
) -> Float[Array, " KT"]:
    """What each token's adapter would add with a weight of 1, times dy."""
    adapters = tiles.adapters()
    terms = [
        jnp.sum(narrow.plain[0] * narrow.plain[1], axis=1) * _scales_of(part, adapters)
        for part, narrow in zip(parts, narrows)
    ]
    count = tiles.rows.shape[0]
    tokens = jnp.where(tiles.is_token(), tiles.tokens(), count)
    return jnp.zeros(count).at[tokens].set(functools.reduce(jnp.add, terms), mode="drop")


def _scales_of(part: GradientPart, adapters: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """The scale of each row's adapter, where it is the part's."""
    return part.scales[jnp.maximum(part.slots.local(adapters), 0)]


def _narrow_sums(
    alike: tuple[tuple[NarrowSum, ...], ...], tiles: Tiles
) -> list[Float[Array, "sums split rows K"]]:
    """u and dv in shares, by the kernel for such shapes."""
    sums = [one for some in alike for one in some]
    squares = tiles.count * sum(squares_of(one.columns) for one in sums)
    few = by_lanes(*tiles.sizes, max(one.rank for one in sums), squares)
    return (narrow_few_kernel if few else narrow_kernel)(alike, tiles)


def _wide(
    parts: tuple[WidePart, ...], tiles: Tiles, num_tokens: int, dtype: DTypeLike
) -> Float[Array, "T H"]:
    """dx, by the kernel for such shapes."""
    ranks = [sum(parts[i].lora_a.shape[1] for i in mine) for mine in by_range(parts).values()]
    squares = tiles.count * squares_of(parts[0].lora_a.shape[2])
    few = by_lanes(*tiles.sizes, max(ranks), squares)
    return (wide_few_kernel if few else wide_kernel)(parts, tiles, num_tokens, dtype)


def _outer(sums: tuple[OuterSum, ...], tiles: Tiles) -> list[Array]:
    """The gradients of A and B, by the kernel for such shapes."""
    squares = sum(one.slots * squares_of(one.columns) for one in sums)
    few = by_lanes(*tiles.sizes, max(one.rank for one in sums), squares)
    few = few and all(one.shared == 1 for one in sums)
    return (outer_few_kernel if few else outer_kernel)(sums, tiles)


def _in_launches[T](
    kernel: Callable[[tuple[T, ...], Tiles], list[Array]], given: Sequence[T], most: int,
    tiles: Tiles,
) -> list[Array]:  # fmt: skip
    """What `kernel` makes of all that is given, up to `most` of them in a launch."""
    launches = itertools.batched(given, most)
    return [array for some in launches for array in kernel(some, tiles)]


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
    [shares] = _narrow_sums(
        ((NarrowSum(x, lora_a, jnp.zeros(1, jnp.int32), True, every, 0),),), tiles
    )
    mine = (tiles.is_token() & every.holds(tiles.adapters()))[:, None]
    u = jnp.where(mine, _added_up(shares, rank)[0], 0.0)
    dv = jnp.where(mine, dv[tiles.tokens()], 0.0)
    du = (dv * scales[jnp.maximum(tiles.adapters(), 0)][:, None]).astype(x.dtype)
    dx = _wide(
        (WidePart(du[None], 0, lora_a, jnp.zeros(1, jnp.int32), every),), tiles, x.shape[0], x.dtype
    )
    ids = jnp.arange(slots, dtype=jnp.int32)
    [da] = _outer((OuterSum(x, du[None], 0, ids, 0, features, rank, True),), tiles)
    return dx, da, _of_scales(u * dv, ids, tiles)


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
    [shares] = _narrow_sums(
        ((NarrowSum(dy, lora_b, jnp.zeros(1, jnp.int32), False, every, y_offset),),), tiles
    )
    mine, tokens = tiles.is_token() & every.holds(tiles.adapters()), tiles.tokens()
    of_tiles = _added_up(shares, rank)[0]
    dv = jnp.zeros((v.shape[0], rank), jnp.float32)
    dv = dv.at[jnp.where(mine, tokens, v.shape[0])].set(of_tiles, mode="drop")
    operand = jnp.where(mine[:, None], v[tokens], 0)
    ids = jnp.arange(slots, dtype=jnp.int32)
    [db] = _outer((OuterSum(dy, operand[None], 0, ids, y_offset, width, rank, False),), tiles)
    return dv, db


def _narrow(
    dy: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[GradientPart, ...],
    tiles: Tiles,
    factors: Float[Array, " rows"] | None,
) -> list[_Narrow]:
    alike = []
    for part in parts:
        of_a, of_b = part.sharing
        u = NarrowSum(x, part.lora_a, part.place, True, part.slots, 0, of_a)
        dv = NarrowSum(dy, part.lora_b, part.place, False, part.slots, part.y_offset, of_b)
        alike.append((u, dv))
    adapters, is_token = tiles.adapters(), tiles.is_token()
    found = []
    for part, shares in zip(parts, _in_launches(_narrow_sums, alike, _MOST_PARTS, tiles)):
        mine = (is_token & part.slots.holds(adapters))[None, :, None]
        plain = jnp.where(mine, _added_up(shares, part.lora_a.shape[1]), 0.0)
        scale = _scales_of(part, adapters)[None, :, None]
        if factors is not None:
            scale = scale * factors[None, :, None]
        found.append(_Narrow(plain, (plain * scale).astype(x.dtype)))
    return found


def _added_up(shares: Float[Array, "sums split rows K"], rank: int) -> Float[Array, "sums rows R"]:
    """The sums of what the blocks have, in their order."""
    return functools.reduce(jnp.add, [shares[:, n, :, :rank] for n in range(shares.shape[1])])


def _of_scales(
    terms: Float[Array, "rows R"], slots: Int[Array, " S"], tiles: Tiles
) -> Float[Array, " S"]:
    """The sum of the terms of each slot's rows."""
    of_tiles = jnp.sum(terms.reshape(tiles.count, -1), axis=1)
    mine = tiles.table[None, :, 0] == slots[:, None]
    return jnp.sum(jnp.where(mine, of_tiles[None], 0.0), axis=1)
