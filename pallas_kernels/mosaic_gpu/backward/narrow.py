"""dv[t] = dy[t] @ B[i]: a block takes a tile of tokens, and a share of the columns of dy.

The life of a block:

    tile       which tokens, of which adapter      registers
    ring       dy of the tokens, B of the adapter  shared memory, 64 columns a stage
    products   dy square by B squares              registers, float32
    dv         this block's share of the sum       registers, then device memory

XLA adds the shares up, in order, when it scales and rounds dv for the kernels that read it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

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
from pallas_kernels.mosaic_gpu.layouts import Ref
from pallas_kernels.routing import SlotRange


class NarrowPart(NamedTuple):
    """One stack of adapters: B, the slots that it holds, and its first column of dy."""

    lora_b: Float[Array, "L N R"]
    slots: SlotRange
    y_offset: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """A part's blocks: `groups` of them along the axis "job", from `first_group` on, deal the ranks
    among themselves, `width` squares each. Each takes `steps` squares of a share of N."""

    part: NarrowPart
    first_group: int
    steps: int

    @property
    def rank(self) -> int:
        return self.part.lora_b.shape[2]

    @property
    def width(self) -> int:
        return min(RANK_SQUARES, squares_of(self.rank))

    @property
    def groups(self) -> int:
        return -(-squares_of(self.rank) // self.width)

    @property
    def out_columns(self) -> int:
        """Columns of dv: whole squares, if there are several."""
        return self.rank if self.rank <= SIDE else self.groups * self.width * SIDE


class _Refs(NamedTuple):
    """What a block reads in device memory, and its barriers."""

    dy: Ref
    rows: Ref
    loaded: Loaded
    b_loaded: Ref


def narrow_kernel(
    dy: Float[Array, "T Ny"], parts: tuple[NarrowPart, ...], tiles: Tiles
) -> list[Float[Array, "split rows K"]]:
    """dv of each part, in the order of the tiles, in shares that are to be added up. Columns behind
    R, and tiles of another range, are undefined; rows behind a tile's last are of no use."""
    cut = narrow_cut(tiles.count, max(part.lora_b.shape[1] for part in parts))
    jobs = _jobs(parts, cut.split)
    ranks = "_".join(f"r{part.lora_b.shape[2]}" for part in parts)

    def body(table: Ref, rows: Ref, dy_ref: Ref, *refs: Ref) -> None:
        weights, outs = refs[: len(parts)], refs[len(parts) : 2 * len(parts)]
        box, by_row, b_loaded = refs[2 * len(parts) :]
        of = _Refs(dy_ref, rows, Loaded(box, by_row), b_loaded)
        tile = Tile.read(table, lax.axis_index("tile"))
        for job, lora_b, out in zip(jobs, weights, outs):
            group = lax.axis_index("job") - job.first_group
            mine = (group >= 0) & (group < job.groups) & job.part.slots.holds(tile.adapter)
            pl.when(mine)(functools.partial(_run, job, cut.stages, of, tile, lora_b, out))

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((cut.split, tiles.count * SIDE, job.out_columns), jnp.float32)
            for job in jobs
        ],
        scratch_types=[
            *loaded_barriers(cut.stages, 1),
            plgpu.Barrier(num_barriers=cut.stages, num_arrivals=RANK_SQUARES),
        ],
        grid=(jobs[-1].first_group + jobs[-1].groups, tiles.count, cut.split),
        grid_names=("job", "tile", "share"),
        kernel_name=f"lora_narrow_{ranks}",
    )
    out: list[Array] = kernel(tiles.table, tiles.rows, dy, *(part.lora_b for part in parts))
    return out


def _jobs(parts: tuple[NarrowPart, ...], split: int) -> list[_Job]:
    jobs: list[_Job] = []
    for part in parts:
        before = jobs[-1].first_group + jobs[-1].groups if jobs else 0
        jobs.append(_Job(part, before, -(-squares_of(part.lora_b.shape[1]) // split)))
    return jobs


def _run(job: _Job, stages: int, of: _Refs, tile: Tile, lora_b: Ref, dv: Ref) -> None:
    """One block: gives it its ring, and puts out what it has summed."""
    dtype, share = lora_b.dtype, lax.axis_index("share")
    rows = pl.ds(lax.axis_index("tile") * SIDE, SIDE)
    first_rank = (lax.axis_index("job") - job.first_group) * (job.width * SIDE)

    def run(dy: Ref, b: Ref) -> None:
        ring = _Ring(Gathered(of.dy, of.rows, Squares.of(dy), of.loaded), lora_b, Squares.of(b))
        products = functools.partial(_products, job, stages, of, tile, first_rank, ring)
        for j, value in enumerate(pl.run_scoped(products, accumulators(job.width))):
            ranks = min(SIDE, job.rank)
            dv[share, rows, pl.ds(first_rank + j * SIDE, ranks)] = value[:, :ranks]

    pl.run_scoped(run, squares(stages, 1, dtype=dtype), squares(stages, job.width, dtype=dtype))


class _Ring(NamedTuple):
    """dy and B on their way: from device memory to squares in shared memory."""

    dy: Gathered
    lora_b: Ref
    b: Squares


def _products(
    job: _Job, stages: int, of: _Refs, tile: Tile, first_rank: Array, ring: _Ring, sums: list[Ref]
) -> list[Array]:
    """The block's share of dy B, square by square of the ranks, in registers."""
    adapter = tile.adapter - job.part.slots.first
    first = lax.axis_index("share") * (job.steps * SIDE)

    def fetch(k: Array, slot: Array | int) -> None:
        column = first + k * SIDE
        ring.dy.fetch(tile, job.part.y_offset + column, slot)
        for j in range(job.width):
            ranks = pl.ds(first_rank + j * SIDE, SIDE)
            plgpu.copy_gmem_to_smem(
                ring.lora_b.at[adapter, pl.ds(column, SIDE), ranks],
                ring.b.rows.at[slot, j],
                of.b_loaded.at[slot],
            )
        for _ in range(job.width, RANK_SQUARES):
            plgpu.barrier_arrive(of.b_loaded.at[slot])

    def multiply(_: Array, slot: Array) -> None:
        ring.dy.wait(tile, slot)
        plgpu.barrier_wait(of.b_loaded.at[slot])
        for j, acc in enumerate(sums):
            plgpu.wgmma(acc, ring.dy.memory.tiles.at[slot, 0], ring.b.tiles.at[slot, j])

    take_steps(job.steps, stages, job.width, fetch, multiply, close_fetched)
    return [acc[...] for acc in sums]
