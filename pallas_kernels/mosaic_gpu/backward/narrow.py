"""u[t] = x[t] @ A[i]^T and dv[t] = dy[t] @ B[i]: a block takes a tile, and a share of the columns.

The life of a block:

    tile       which tokens, of which adapter          registers
    ring       x or dy of the tokens, the weights      shared memory, 64 columns a stage
    products   a square of tokens by weights' squares  registers, float32
    out        this block's share of the sum           registers, then device memory

XLA adds the shares up, in order, when it scales and rounds the sums for the kernels that read them.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.backward.config import RANK_SQUARES, narrow_cut
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
from pallas_kernels.mosaic_gpu.layouts import Ref, grid_of, place_of
from pallas_kernels.routing import SlotRange


class NarrowSum(NamedTuple):
    """One stack of weights, and what it is multiplied with.

    Attributes:
      wide: x or dy.
      weights: A `[M, R, columns]` or B `[M, columns, R]`.
      place: where the weights of the first slot stand among them, if none shared any.
      ranks_first: whether they are like A.
      slots: that they hold.
      first: of the columns of `wide`.
      shared: how many slots share one matrix of the weights.
    """

    wide: Float[Array, "T C"]
    weights: Float[Array, "M _ _"]
    place: Int[Array, " 1"]
    ranks_first: bool
    slots: SlotRange
    first: int
    shared: int = 1

    @property
    def rank(self) -> int:
        return self.weights.shape[1 if self.ranks_first else 2]

    @property
    def columns(self) -> int:
        return self.weights.shape[2 if self.ranks_first else 1]


@dataclasses.dataclass(frozen=True)
class _Job:
    """A sum's blocks: `groups` of them along the axis "job", from `first_group` on, deal the ranks
    among themselves, `width` squares each. Each takes `steps` squares of a share of the columns.
    What they sum is number `nth` of array `out`."""

    sum: NarrowSum
    out: int
    nth: int
    first_group: int
    steps: int

    @property
    def width(self) -> int:
        return min(RANK_SQUARES, squares_of(self.sum.rank))

    @property
    def groups(self) -> int:
        return -(-squares_of(self.sum.rank) // self.width)

    @property
    def out_columns(self) -> int:
        """Columns of the sum: whole squares, if there are several."""
        return self.sum.rank if self.sum.rank <= SIDE else self.groups * self.width * SIDE


class _Refs(NamedTuple):
    """A sum's arrays in device memory."""

    wide: Ref
    weights: Ref
    place: Ref
    out: Ref


class _Launched(NamedTuple):
    """What all blocks share: stages of the ring, its barriers, and the sorted tokens."""

    stages: int
    rows: Ref
    loaded: Loaded
    weights_loaded: Ref


def narrow_kernel(
    alike: tuple[tuple[NarrowSum, ...], ...], tiles: Tiles
) -> list[Float[Array, "sums split rows K"]]:
    """For each tuple, of sums of one rank, an array of them.

    They are in the order of the tiles, in shares that are to be added up. Columns behind R, and
    tiles of another range, are undefined; rows behind a tile's last are of no use.
    """
    sums = [one for some in alike for one in some]
    [(_, per_tile)] = collections.Counter(one.slots for one in sums).most_common(1)
    columns, rank = max(one.columns for one in sums), max(one.rank for one in sums)
    cut = narrow_cut(per_tile * tiles.count, columns, rank, sparse=tiles.sparse)
    jobs = _jobs(alike, cut.split)
    ranks = "_".join(dict.fromkeys(f"r{one.rank}" for one in sums))

    def body(table: Ref, rows: Ref, *refs: Ref) -> None:
        inputs, outs = refs[: 3 * len(jobs)], refs[3 * len(jobs) : -3]
        box, by_row, weights_loaded = refs[-3:]
        launched = _Launched(cut.stages, rows, Loaded(box, by_row), weights_loaded)
        tile = Tile.read(table, lax.axis_index("tile"))
        for i, job in enumerate(jobs):
            wide, weights, place = inputs[3 * i : 3 * i + 3]
            group = lax.axis_index("job") - job.first_group
            mine = (group >= 0) & (group < job.groups) & job.sum.slots.holds(tile.adapter)
            of = _Refs(wide, weights, place, outs[job.out].at[job.nth])
            pl.when(mine)(functools.partial(_run, launched, job, of, tile, group))

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(
                (len(alike[job.out]), cut.split, tiles.count * SIDE, job.out_columns), jnp.float32
            )
            for job in jobs
            if job.nth == 0
        ],
        scratch_types=[
            *loaded_barriers(cut.stages, 1),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=RANK_SQUARES),
        ],
        **grid_of(job=jobs[-1].first_group + jobs[-1].groups, tile=tiles.count, share=cut.split),
        kernel_name=f"lora_narrow_{ranks}",
    )
    operands = (array for one in sums for array in (one.wide, one.weights, one.place))
    out: list[Array] = kernel(tiles.table, tiles.rows, *operands)
    return out


def _jobs(alike: tuple[tuple[NarrowSum, ...], ...], split: int) -> list[_Job]:
    jobs: list[_Job] = []
    for i, some in enumerate(alike):
        for nth, one in enumerate(some):
            before = jobs[-1].first_group + jobs[-1].groups if jobs else 0
            jobs.append(_Job(one, i, nth, before, -(-squares_of(one.columns) // split)))
    return jobs


def _run(launched: _Launched, job: _Job, of: _Refs, tile: Tile, group: Array) -> None:
    """One block: gives it its ring, and puts out what it has summed."""
    stages, dtype, ranks = launched.stages, of.weights.dtype, min(SIDE, job.sum.rank)
    rows = pl.ds(lax.axis_index("tile") * SIDE, SIDE)
    first_rank = group * (job.width * SIDE)

    def run(wide: Ref, weights: Ref) -> None:
        gathered = Gathered(of.wide, launched.rows, Squares.of(wide), launched.loaded)
        ring = _Ring(tile, gathered, of.weights, Squares.of(weights), launched.weights_loaded)
        adapter = place_of(tile.adapter - job.sum.slots.first + of.place[0], job.sum.shared)
        products = functools.partial(_products, job, adapter, first_rank, ring)
        for j, value in enumerate(pl.run_scoped(products, accumulators(job.width))):
            columns = pl.ds(first_rank + j * SIDE, ranks)
            of.out[lax.axis_index("share"), rows, columns] = value[:, :ranks]

    pl.run_scoped(run, squares(stages, 1, dtype=dtype), squares(stages, job.width, dtype=dtype))


class _Ring(NamedTuple):
    """A tile's rows and an adapter's weights on their way from device memory to squares."""

    tile: Tile
    wide: Gathered
    weights: Ref
    memory: Squares
    loaded: Ref


def _products(
    job: _Job, adapter: Array, first_rank: Array, ring: _Ring, sums: list[Ref]
) -> list[Array]:
    """The block's share of the sum, square by square of the ranks, in registers."""
    one, tile = job.sum, ring.tile
    first = lax.axis_index("share") * (job.steps * SIDE)

    def fetch(k: Array, slot: Array) -> None:
        column = first + k * SIDE
        ring.wide.fetch(tile, one.first + column, slot)
        for j in range(job.width):
            ranks, columns = pl.ds(first_rank + j * SIDE, SIDE), pl.ds(column, SIDE)
            place = (ranks, columns) if one.ranks_first else (columns, ranks)
            plgpu.copy_gmem_to_smem(
                ring.weights.at[adapter, *place], ring.memory.rows.at[slot, j], ring.loaded.at[slot]
            )
        for _ in range(job.width, RANK_SQUARES):
            plgpu.barrier_arrive(ring.loaded.at[slot])

    def multiply(_: Array, slot: Array) -> None:
        ring.wide.wait(tile, slot)
        plgpu.barrier_wait(ring.loaded.at[slot])
        for j, acc in enumerate(sums):
            weights = ring.memory.tiles.at[slot, j]
            right = weights.T if one.ranks_first else weights
            plgpu.wgmma(acc, ring.wide.memory.tiles.at[slot, 0], right)

    stages = ring.memory.tiles.shape[0]
    take_steps(job.steps, stages, job.width, fetch, multiply, close_fetched)
    return [acc[...] for acc in sums]
