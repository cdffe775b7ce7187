"""dx[t] = dv[t] @ A[i], summed over a range's parts: a block takes a tile and a few columns of dx.

The life of a block:

    tile       which tokens, of which adapter     registers
    ring       dv of the tile, A of the adapter   shared memory, 64 ranks a stage, part after part
    products   dv square by A squares             registers, float32
    dx         rounded once                       shared memory, then by TMA to the tokens' rows

A block of tokens without an adapter stores zeros.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.mosaic_gpu.backward.config import WideCut, wide_cut
from pallas_kernels.mosaic_gpu.backward.squares import (
    SIDE,
    Squares,
    accumulators,
    squares,
    squares_of,
    take_steps,
)
from pallas_kernels.mosaic_gpu.backward.tiles import Tile, Tiles, put_tile
from pallas_kernels.mosaic_gpu.layouts import Ref, grid_of, place_of
from pallas_kernels.routing import SlotRange


class WidePart(NamedTuple):
    """One stack of adapters.

    Attributes:
      dv: in the order of the tiles: number `nth` of these arrays.
      lora_a: `[M, R, H]`; `place`: where that of the first slot would stand if none shared any.
      slots: that it holds.
      shared: how many slots share one A.
    """

    dv: Float[Array, "_ rows R"]
    nth: int
    lora_a: Float[Array, "M R H"]
    place: Int[Array, " 1"]
    slots: SlotRange
    shared: int = 1


class _Refs(NamedTuple):
    """A part's operands in device memory; `shared` as in `WidePart`."""

    dv: Ref
    a: Ref
    place: Ref
    shared: int


class _Block(NamedTuple):
    """What one block has: the cut, its tile and columns, dx, the sorted tokens, and the ring's
    barriers."""

    cut: WideCut
    tile: Tile
    column: Array
    dx: Ref
    rows: Ref
    loaded: Ref


def by_range(parts: tuple[WidePart, ...]) -> dict[SlotRange, list[int]]:
    """The numbers of the parts of each range."""
    ranges: dict[SlotRange, list[int]] = {}
    for i, part in enumerate(parts):
        ranges.setdefault(part.slots, []).append(i)
    return ranges


def wide_kernel(
    parts: tuple[WidePart, ...], tiles: Tiles, num_tokens: int, dtype: DTypeLike
) -> Float[Array, "T H"]:
    """dx of all tokens, zero in rows of -1."""
    features = parts[0].lora_a.shape[2]
    ranges = by_range(parts)
    squares_in = [squares_of(part.lora_a.shape[1]) for part in parts]
    cut = wide_cut(features, max(sum(squares_in[i] for i in mine) for mine in ranges.values()))
    ranks = "_".join(f"r{part.lora_a.shape[1]}" for part in parts)

    def body(table: Ref, rows: Ref, *refs: Ref) -> None:
        operands, (dx, loaded) = refs[:-2], refs[-2:]
        pairs = [
            _Refs(dv.at[part.nth], a, place, part.shared)
            for part, (dv, a, place) in zip(parts, itertools.batched(operands, 3))
        ]
        tile = Tile.read(table, lax.axis_index("tile"))
        column = lax.axis_index("columns") * (cut.columns * SIDE)
        block = _Block(cut, tile, column, dx, rows, loaded)
        has_adapter = jnp.bool_(False)
        for slots, mine in ranges.items():
            run = functools.partial(_run, block, slots, [pairs[i] for i in mine])
            pl.when(slots.holds(tile.adapter))(run)
            has_adapter |= slots.holds(tile.adapter)
        pl.when((tile.count > 0) & ~has_adapter)(functools.partial(_run, block, None, []))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_tokens, features), dtype),
        scratch_types=[plgpu.Barrier(num_barriers=cut.stages, num_arrivals=1 + cut.columns)],
        **grid_of(tile=tiles.count, columns=-(-squares_of(features) // cut.columns)),
        kernel_name=f"lora_wide_{ranks}",
    )
    operands = (array for part in parts for array in (part.dv, part.lora_a, part.place))
    dx: Array = kernel(tiles.table, tiles.rows, *operands)
    return dx


def _run(block: _Block, slots: SlotRange | None, parts: list[_Refs]) -> None:
    """One block, of a range's parts: sums, rounds, and stores."""
    dtype, columns = block.dx.dtype, block.cut.columns

    def put(values: list[Array], memory: Ref) -> None:
        out = Squares.of(memory)
        plgpu.commit_smem()  # all warps have read the ring, in whose memory this lies
        for j, value in enumerate(values):
            out.tiles[j] = value.astype(dtype)
        plgpu.commit_smem()
        for j in range(columns):
            column = block.column + j * SIDE
            put_tile(out.rows.at[j], block.dx, block.rows, block.tile, column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def sums(slots: SlotRange, dv: Ref, a: Ref) -> list[Array]:
        products = functools.partial(_products, block, slots, parts, Squares.of(dv), Squares.of(a))
        values: list[Array] = pl.run_scoped(products, accumulators(columns))
        return values

    if slots is None:
        zeros = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), jnp.float32), plgpu.Layout.WGMMA)
        values = [zeros] * columns
    else:
        stages = block.cut.stages
        ring = squares(stages, dtype=dtype), squares(stages, columns, dtype=dtype)
        values = pl.run_scoped(functools.partial(sums, slots), *ring)
    pl.run_scoped(functools.partial(put, values), squares(columns, dtype=dtype))


def _products(
    block: _Block, slots: SlotRange, parts: list[_Refs], dv: Squares, a: Squares,
    sums: list[Ref],
) -> list[Array]:  # fmt: skip
    """The sum over parts and their ranks, square by square of the columns, in registers."""
    nth, tile_start = block.tile.adapter - slots.first, lax.axis_index("tile") * SIDE
    counts = [squares_of(part.a.shape[1]) for part in parts]
    firsts = [sum(counts[:i]) for i in range(len(counts))]

    def fetch(k: Array, slot: Array) -> None:
        for part, first, count in zip(parts, firsts, counts):
            mine = (k >= first) & (k < first + count)
            pl.when(mine)(functools.partial(copy, part, (k - first) * SIDE, slot))

    def copy(part: _Refs, rank: Array, slot: Array) -> None:
        ranks, loaded = pl.ds(rank, SIDE), block.loaded.at[slot]
        rows = pl.ds(tile_start, SIDE)
        plgpu.copy_gmem_to_smem(part.dv.at[rows, ranks], dv.rows.at[slot], loaded)
        adapter = place_of(nth + part.place[0], part.shared)
        for j in range(block.cut.columns):
            columns = pl.ds(block.column + j * SIDE, SIDE)
            plgpu.copy_gmem_to_smem(part.a.at[adapter, ranks, columns], a.rows.at[slot, j], loaded)

    def multiply(_: Array, slot: Array) -> None:
        plgpu.barrier_wait(block.loaded.at[slot])
        for j, acc in enumerate(sums):
            plgpu.wgmma(acc, dv.tiles.at[slot], a.tiles.at[slot, j])

    take_steps(sum(counts), block.cut.stages, block.cut.columns, fetch, multiply)
    return [acc[...] for acc in sums]
