"""The gradients of A and B: for each slot the sum of its tokens' outer products.

    dA[i] = sum of dv[t]^T x[t]       dB[i] = sum of dy[t]^T v[t]       over the tokens t of slot i

A block takes a slot, a few columns of x or dy, and some ranks, and goes through the slot's tiles in
order. So the order of each sum follows from the slot's own tokens, and there are no atomics. A slot
without tokens has no tile: its block stores the zeros that its sums start at. The life of a step:

    tile       which tokens                          registers
    ring       x or dy of the tokens, dv or v        shared memory, a tile a stage
    products   squares, transposed, by squares       registers, float32
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.backward.config import RANK_SQUARES, OuterCut, outer_cut
from pallas_kernels.mosaic_gpu.backward.rows import close_fetched
from pallas_kernels.mosaic_gpu.backward.squares import (
    SIDE,
    Squares,
    accumulators,
    squares,
    squares_of,
    take_steps,
)
from pallas_kernels.mosaic_gpu.backward.tiles import (
    Gathered,
    Loaded,
    Tile,
    Tiles,
    loaded_barriers,
)
from pallas_kernels.mosaic_gpu.layouts import Ref


class OuterSum(NamedTuple):
    """One stack of gradients.

    Attributes:
      wide: x or dy, in the order of the tokens.
      narrow: dv or v, in the order of the tiles, zero in rows that are no token: number `nth` of
        these arrays.
      wanted: the slots; zeros for -1.
      first: the first column of `wide`.
      columns: how many of them.
      rank: R.
      ranks_first: whether the gradient is `[slots, R, columns]`, as A is, or `[slots, columns, R]`.
      shared: how many slots, from each of those wanted on, are summed together.
    """

    wide: Float[Array, "T C"]
    narrow: Float[Array, "_ rows K"]
    nth: int
    wanted: Int[Array, " slots"]
    first: int
    columns: int
    rank: int
    ranks_first: bool
    shared: int = 1

    @property
    def slots(self) -> int:
        return self.wanted.shape[0]

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        sides = (self.rank, self.columns) if self.ranks_first else (self.columns, self.rank)
        return jax.ShapeDtypeStruct((self.slots, *sides), self.wide.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one sum is cut: its blocks are those from `first_block` on. `width` squares of ranks and
    `cut.columns` squares of columns are a block's."""

    sum: OuterSum
    cut: OuterCut
    width: int
    first_block: int

    @property
    def column_blocks(self) -> int:
        return -(-squares_of(self.sum.columns) // self.cut.columns)

    @property
    def rank_blocks(self) -> int:
        return -(-squares_of(self.sum.rank) // self.width)

    @property
    def blocks(self) -> int:
        return self.sum.slots * self.column_blocks * self.rank_blocks


class _Refs(NamedTuple):
    """A sum's arrays in device memory."""

    wide: Ref
    narrow: Ref
    slot_tiles: Ref
    out: Ref


class _Block(NamedTuple):
    """What one block has: its sum, its slot, its first column and rank, the tiles, and barriers."""

    plan: _Plan
    refs: _Refs
    slot: Array
    column: Array
    rank: Array
    table: Ref
    rows: Ref
    loaded: Loaded
    narrow_loaded: Ref


def outer_kernel(sums: tuple[OuterSum, ...], tiles: Tiles) -> list[Array]:
    """The gradients, one stack for each sum, in the dtype of what is summed."""
    plans: list[_Plan] = []
    for one in sums:
        before = plans[-1].first_block + plans[-1].blocks if plans else 0
        cut = outer_cut(tiles.count, one.slots, one.columns)
        plans.append(_Plan(one, cut, min(RANK_SQUARES, squares_of(one.rank)), before))
    stages = max(plan.cut.stages for plan in plans)
    most_columns = max(plan.cut.columns for plan in plans)
    ranks = "_".join(dict.fromkeys(f"r{one.rank}" for one in sums))

    def body(table: Ref, rows: Ref, *refs: Ref) -> None:
        inputs, rest = refs[: 3 * len(sums)], refs[3 * len(sums) :]
        outs, barriers = rest[: len(sums)], rest[len(sums) :]
        loaded = [Loaded(*barriers[2 * i : 2 * i + 2]) for i in range(most_columns)]
        block = lax.axis_index("block")
        for i, plan in enumerate(plans):
            wide, narrow, slot_tiles = inputs[3 * i : 3 * i + 3]
            of = _Refs(wide, narrow.at[plan.sum.nth], slot_tiles, outs[i])
            nth = block - plan.first_block
            run = functools.partial(
                _run, plan, of, nth, table, rows, loaded[plan.cut.columns - 1], barriers[-1]
            )
            pl.when((nth >= 0) & (nth < plan.blocks))(run)

    kernel = plgpu.kernel(
        body,
        out_type=[one.out for one in sums],
        scratch_types=[
            *(b for n in range(most_columns) for b in loaded_barriers(stages, n + 1)),
            plgpu.Barrier(num_barriers=stages, num_arrivals=RANK_SQUARES),
        ],
        grid=(plans[-1].first_block + plans[-1].blocks,),
        grid_names=("block",),
        kernel_name=f"lora_outer_{ranks}",
    )
    operands = (
        array
        for one in sums
        for array in (one.wide, one.narrow, tiles.slot_tiles(one.wanted, one.shared))
    )
    out: list[Array] = kernel(tiles.table, tiles.rows, *operands)
    return out


def _run(
    plan: _Plan, of: _Refs, nth: Array, table: Ref, rows: Ref, loaded: Loaded, narrow_loaded: Ref
) -> None:
    """Block number `nth` of a sum: finds its place, sums, and stores."""
    per_slot = plan.column_blocks * plan.rank_blocks
    slot, place = lax.div(nth, jnp.int32(per_slot)), lax.rem(nth, jnp.int32(per_slot))
    rank_blocks = jnp.int32(plan.rank_blocks)
    column = lax.div(place, rank_blocks) * (plan.cut.columns * SIDE)
    rank = lax.rem(place, rank_blocks) * (plan.width * SIDE)
    block = _Block(plan, of, slot, column, rank, table, rows, loaded, narrow_loaded)
    stages, columns, width, dtype = plan.cut.stages, plan.cut.columns, plan.width, of.wide.dtype

    def sums(wide: Ref, narrow: Ref) -> list[Array]:
        gathered = Gathered(of.wide, rows, Squares.of(wide), loaded)
        products = functools.partial(_products, block, gathered, Squares.of(narrow))
        values: list[Array] = pl.run_scoped(products, accumulators(columns * width))
        return values

    ring = squares(stages, columns, dtype=dtype), squares(stages, width, dtype=dtype)
    values = pl.run_scoped(sums, *ring)
    pl.run_scoped(functools.partial(_put, block, values), squares(columns * width, dtype=dtype))


def _products(block: _Block, gathered: Gathered, narrow: Squares, sums: list[Ref]) -> list[Array]:
    """The sums over the slot's tiles, in registers: of each square of columns all of the ranks."""
    plan, of = block.plan, block.refs
    first, count = of.slot_tiles[block.slot, 0], of.slot_tiles[block.slot, 1]

    def fetch(k: Array, slot: Array) -> None:
        tile = Tile.read(block.table, first + k)
        gathered.fetch(tile, plan.sum.first + block.column, slot)
        rows = pl.ds((first + k) * SIDE, SIDE)
        for j in range(plan.width):
            ranks = pl.ds(block.rank + j * SIDE, SIDE)
            plgpu.copy_gmem_to_smem(
                of.narrow.at[rows, ranks], narrow.rows.at[slot, j], block.narrow_loaded.at[slot]
            )
        for _ in range(plan.width, RANK_SQUARES):
            plgpu.barrier_arrive(block.narrow_loaded.at[slot])

    def multiply(k: Array, slot: Array) -> None:
        gathered.wait(Tile.read(block.table, first + k), slot)
        plgpu.barrier_wait(block.narrow_loaded.at[slot])
        for i, acc in enumerate(sums):
            wide = gathered.memory.tiles.at[slot, i // plan.width]
            ranks = narrow.tiles.at[slot, i % plan.width]
            left, right = (ranks, wide) if plan.sum.ranks_first else (wide, ranks)
            plgpu.wgmma(acc, left.T, right)

    take_steps(count, plan.cut.stages, len(sums), fetch, multiply, close_fetched)
    return [acc[...] for acc in sums]


def _put(block: _Block, values: list[Array], memory: Ref) -> None:
    """Rounds the sums and stores them; TMA leaves out what is behind the stack's last column."""
    plan, of, out = block.plan, block.refs, Squares.of(memory)
    plgpu.commit_smem()  # all warps have read the ring, in whose memory this lies
    for i, value in enumerate(values):
        out.tiles[i] = value.astype(of.out.dtype)
    plgpu.commit_smem()
    for i in range(len(values)):
        columns = pl.ds(block.column + i // plan.width * SIDE, SIDE)
        ranks = pl.ds(block.rank + i % plan.width * SIDE, SIDE)
        places = (ranks, columns) if plan.sum.ranks_first else (columns, ranks)
        plgpu.copy_smem_to_gmem(out.rows.at[i], of.out.at[block.slot, *places])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
