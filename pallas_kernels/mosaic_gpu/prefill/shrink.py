"""v = scale * x @ A[i].T: a cluster of blocks takes 64 or 128 tokens and splits H among its blocks.

A block works in rounds, each for a few of its tokens' adapters. The life of a round:

    route      which adapters                         shared memory, copied once per part
    pipeline   x and A, some columns of H at a time   shared memory, by TMA
    products   all rows with all of them              registers, float32
    v          each row's product with its adapter    registers, this block's share of H
    exchange   the sum over the cluster's shares      peers' shared memory, then registers
    out        v in its dtype                         shared memory, then by TMA to device memory

The functions stand in that order, behind the plan of a launch.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from pallas_kernels.mosaic_gpu import chip
from pallas_kernels.mosaic_gpu.chip import MAX_COLUMNS, MULTIPROCESSORS, TILE
from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.mosaic_gpu.layouts import (
    Band,
    Memory,
    Ref,
    accumulator,
    bands,
    cluster_barrier,
    interpreted,
    operand_layout,
    operand_rows,
    plain_layout,
    shared_bytes,
    store_rows,
)
from pallas_kernels.mosaic_gpu.prefill.config import SPLIT_UNIT, rank_width
from pallas_kernels.mosaic_gpu.prefill.route import (
    Route,
    route_copies,
    route_memory,
    routes,
    row_mask,
)
from pallas_kernels.routing import Segments

# What the pipeline and the output may fill of shared memory, and what they may with the routes.
_PIPELINE_BYTES = 208 * 1024
_SHARED_BYTES = chip.ARRAY_BYTES
# Columns of H, of all planes, that the tensor cores add up. They round towards zero, so their error
# grows with the number of additions: 1.8e-5 of v after 16384 columns. Such spans are then added in
# float32, which rounds to nearest.
_SPAN = 2048


class ShrinkPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      lora_a: `[L, R, H]`, H a multiple of 16.
      scales: `[1]`, or `[S]` in which the part's L scales start at `first_scale`.
      segments: the tokens' adapters, -1 or in `[0, L)`.
      dtype: of v.
      config: how to cut the work.
      first_scale: where the part's scales start (static).
      first: where its adapters start in `lora_a` and, behind `first_scale`, in `scales`, if these
        are those of several layers.
    """

    lora_a: Float[Array, "L R H"]
    scales: Float[Array, " S"]
    segments: Segments
    dtype: DTypeLike
    config: Config
    first_scale: int = 0
    first: Int[Array, ""] | None = None


def shrink_kernel(
    x: Float[Array, "P T H"], parts: tuple[ShrinkPart, ...], num_tokens: int, *, zero_rows: bool
) -> list[Array]:
    """v of each part, summed over the planes of x. T is `num_tokens` or padded.

    Returns one array per part: `[num_tokens, R]` in float32; in half precision, as the expand takes
    it, `[operand_rows, max(R, 16)]`; in interpret mode `[split, num_tokens, R]`, float32 partial
    sums. Rows of -1 are zero if `zero_rows` (not in interpret mode), else undefined.
    """
    launch = _plan_launch(x, parts, num_tokens, zero_rows)
    plans = _plan_parts(launch, parts)
    grid = {"tile": launch.blocks_of_tokens, "block": max(p.first_block + p.blocks for p in plans)}
    cluster = {"split": launch.split}
    if launch.interpreted:  # an axis of the grid takes the place of the cluster
        grid, cluster = grid | cluster, {}
    ranks = "_".join(f"r{plan.rank}" for plan in plans)
    kernel = plgpu.kernel(
        functools.partial(_block_body, launch, plans),
        out_type=[plan.out for plan in plans],
        scratch_types=[
            plgpu.Barrier(
                num_barriers=max(launch.stages(plan.width) for plan in plans),
                num_arrivals=launch.arrivals,
            ),
            [
                (
                    route_memory(p.segments, launch.rows),
                    plgpu.Barrier(num_arrivals=route_copies(p.segments, launch.rows)),
                )
                for p in parts
            ],
        ],
        kernel_name=f"lora_shrink_{ranks}",
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
    )
    return kernel(
        x,
        *(
            array
            for p in parts
            for array in (p.lora_a, p.scales, routes(p.segments, launch.rows, p.first))
        ),
    )


# ------------------------------------------------------------------------ the plan, from shapes


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How a launch cuts tokens and H, the same for all of its parts.

    Attributes:
      num_tokens: T.
      planes: arrays that x is the sum of.
      dtype: of x and A.
      layout: of x and A in shared memory.
      rows: tokens of a block, one tile or two.
      split: blocks of a cluster.
      share: columns of H of each of them.
      block_k: columns of H in a stage of the pipeline.
      room: bytes of shared memory for the pipeline.
      most_stages: of the pipeline.
      most_adapters: adapters of a round, of all parts.
      zero_rows: whether rows without an adapter become zero.
      interpreted: whether this is for Pallas's interpreter. It has no peers' shared memory, so
        blocks put their partial sums out.
    """

    num_tokens: int
    planes: int
    dtype: DTypeLike
    layout: tuple[plgpu.Transform, ...]
    rows: int
    split: int
    share: int
    block_k: int
    room: int
    most_stages: int
    most_adapters: int
    zero_rows: bool
    interpreted: bool

    @property
    def blocks_of_tokens(self) -> int:
        return -(-self.num_tokens // self.rows)

    @property
    def alone(self) -> bool:
        """Whether a block exchanges nothing, and so puts out all of its rows."""
        return self.interpreted or self.split == 1

    @property
    def out_rows(self) -> int:
        """Rows in shared memory on their way out: all, or the tile in which the block's own are."""
        return self.rows if self.alone else TILE

    @property
    def own_rows(self) -> int:
        """Rows of v that a block stores."""
        return self.rows if self.interpreted else self.rows // self.split

    @property
    def steps(self) -> int:
        """Stages that a block's share of H takes."""
        return self.share // self.block_k

    @property
    def span_steps(self) -> int:
        return _SPAN // (self.planes * self.block_k)

    @property
    def arrivals(self) -> int:
        """What a stage's barrier waits for: each plane of x, and A of each adapter."""
        return self.planes + self.most_adapters

    def stages(self, ranks: int) -> int:
        """Stages of the pipeline with so many rows of A."""
        fitting = _columns_in(self.room, self.planes * self.rows + ranks, self.dtype)
        return min(self.most_stages, fitting // self.block_k, self.steps)


@dataclasses.dataclass(frozen=True)
class _PartPlan:
    """How a launch cuts one part.

    Attributes:
      rank: R.
      width: ranks of a block.
      stack: adapters that a block multiplies at once.
      chunks: blocks that deal the rounds of a tile among themselves.
      first_block: where the part's blocks start along the grid's axis "block".
      first_scale: where its scales start.
      out: shape and dtype of v.
    """

    rank: int
    width: int
    stack: int
    chunks: int
    first_block: int
    first_scale: int
    out: jax.ShapeDtypeStruct

    @property
    def rank_blocks(self) -> int:
        """Blocks that deal the ranks among themselves."""
        return self.rank // self.width

    @property
    def blocks(self) -> int:
        return self.chunks * self.rank_blocks

    @property
    def row_width(self) -> int:
        """Columns of a row of v that a block stores. In half precision rank 8 has 16, the K of the
        expand's wgmma."""
        return self.width if self.rank_blocks > 1 else self.out.shape[-1]

    @property
    def bands(self) -> list[Band]:
        return bands(self.row_width, self.out.dtype.itemsize)


def _columns_in(room: int, rows: int, dtype: DTypeLike) -> int:
    """Columns of so many rows that fit into `room` bytes."""
    return room // (rows * jnp.dtype(dtype).itemsize)


def _widths(parts: tuple[ShrinkPart, ...]) -> list[int]:
    """Ranks of a block, part by part."""
    return [rank_width(p.lora_a.shape[1], p.config.rank_block) for p in parts]


def _stacks(parts: tuple[ShrinkPart, ...], rows: int) -> list[int]:
    """Adapters of each part that a block multiplies at once: their ranks stay below wgmma's N."""
    most = MAX_COLUMNS * TILE // rows
    return [min(p.config.stack, most // width) for p, width in zip(parts, _widths(parts))]


def _plan_launch(
    x: Float[Array, "P T H"], parts: tuple[ShrinkPart, ...], num_tokens: int, zero_rows: bool
) -> _Launch:
    """The launch of `shrink_kernel`."""
    planes, _, features = x.shape
    widths = _widths(parts)
    split = min(part.config.split for part in parts)
    row_tiles = min(min(p.config.row_tiles for p in parts), MAX_COLUMNS // max(widths))
    rows = row_tiles * TILE
    stacks = _stacks(parts, rows)
    launch = _Launch(
        num_tokens=num_tokens,
        planes=planes,
        dtype=x.dtype,
        layout=operand_layout(x.dtype, math.gcd(features, 64)),
        rows=rows,
        split=split,
        share=-(-features // (SPLIT_UNIT * split)) * SPLIT_UNIT,
        block_k=64,
        room=0,
        most_stages=max(p.config.stages for p in parts),
        most_adapters=max(stacks),
        zero_rows=zero_rows,
        interpreted=interpreted(),
    )
    room = _room(launch, parts)
    wide = max(stack * width for stack, width in zip(stacks, widths))
    # A step adds plane after plane. So with several planes block_k is part of the order of the sum,
    # and must not follow from how much fits.
    two_fit = _columns_in(room, planes * rows + wide, x.dtype) >= 2 * 128
    return dataclasses.replace(launch, block_k=128 if planes == 1 and two_fit else 64, room=room)


def _room(launch: _Launch, parts: tuple[ShrinkPart, ...]) -> int:
    """Bytes of shared memory that the output and the routes leave for the pipeline."""
    out_bytes = 0
    for part, width in zip(parts, _widths(parts)):
        dtype = jnp.float32 if launch.interpreted else part.dtype
        memory = _out_memory(launch.out_rows, max(16, width), dtype)
        arrays = (ref for of_band in memory for ref in of_band if ref is not None)
        out_bytes = max(out_bytes, shared_bytes(arrays))
    routes_bytes = shared_bytes(route_memory(p.segments, launch.rows) for p in parts)
    return min(_PIPELINE_BYTES, _SHARED_BYTES - routes_bytes) - out_bytes


def _plan_parts(launch: _Launch, parts: tuple[ShrinkPart, ...]) -> tuple[_PartPlan, ...]:
    """The parts of `shrink_kernel`, in order."""
    # Where tiles alone keep most multiprocessors busy, the same blocks take all parts, one after
    # the other. Blocks for each part would mostly find none of its adapters in their tile, and end.
    in_turn = launch.blocks_of_tokens * launch.split > MULTIPROCESSORS * 3 // 4
    plans: list[_PartPlan] = []
    for part, width, stack in zip(parts, _widths(parts), _stacks(parts, launch.rows)):
        before = 0 if in_turn or not plans else plans[-1].first_block + plans[-1].blocks
        plans.append(
            _PartPlan(
                rank=part.lora_a.shape[1],
                width=width,
                stack=stack,
                chunks=part.config.chunks,
                first_block=before,
                first_scale=part.first_scale,
                out=_out_type(launch, part),
            )
        )
    return tuple(plans)


def _out_type(launch: _Launch, part: ShrinkPart) -> jax.ShapeDtypeStruct:
    """What `shrink_kernel` returns for a part."""
    num_tokens, rank = launch.num_tokens, part.lora_a.shape[1]
    if launch.interpreted:
        return jax.ShapeDtypeStruct((launch.split, num_tokens, rank), jnp.float32)
    if part.dtype == jnp.float32:
        return jax.ShapeDtypeStruct((num_tokens, rank), jnp.float32)
    return jax.ShapeDtypeStruct((operand_rows(num_tokens), max(rank, 16)), part.dtype)


# ----------------------------------------------------------------------------- a block's part


class _Refs(NamedTuple):
    """What a block reads and writes for one part: x, A, scales, the table of routes and v in device
    memory; its route in shared memory; the barriers of the route's copies and of each stage."""

    x: Ref
    a: Ref
    scales: Ref
    table: Ref
    v: Ref
    route: Route
    route_loaded: Ref
    loaded: Ref


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one block does for one part, as numbers in registers that all of its threads share.

    Attributes:
      launch, plan, refs: what it works by.
      me: its place in the cluster.
      chunk: the first round that it takes; then every `plan.chunks`-th.
      rank_start: first of its ranks.
      row_start: first of its tokens.
      k_start: first of its columns of H.
      out_start: first row, among its tokens, of those on their way out.
    """

    launch: _Launch
    plan: _PartPlan
    refs: _Refs
    me: Int[Array, ""]
    chunk: Int[Array, ""]
    rank_start: Int[Array, ""]
    row_start: Int[Array, ""]
    k_start: Int[Array, ""]
    out_start: Int[Array, ""] | int


class _Kept(NamedTuple):
    """What a block keeps for all rounds of a part.

    Attributes:
      ids: each row's adapter, in registers.
      whole: whether one round has all adapters of the tile. Then rows without an adapter in this
        round have none at all, and whole tiles of v may be stored.
      out: v on its way out, in shared memory.
    """

    ids: Int[Array, " rows"]
    whole: Bool[Array, ""]
    out: list["_OutMemory"]


def _block_body(launch: _Launch, plans: tuple[_PartPlan, ...], x_ref: Ref, *refs: Ref) -> None:
    """What every block runs: the parts that have blocks here, one after the other."""
    inputs = itertools.batched(refs[: 3 * len(plans)], 3)
    *out_refs, loaded, scratch = refs[3 * len(plans) :]
    all_refs = [
        _Refs(x_ref, a, scales, table, v_ref, Route(words, launch.rows), route_loaded, loaded)
        for (a, scales, table), v_ref, (words, route_loaded) in zip(inputs, out_refs, scratch)
    ]
    tile, block = lax.axis_index("tile"), lax.axis_index("block")
    runs = [
        (block >= plan.first_block) & (block < plan.first_block + plan.blocks) for plan in plans
    ]
    # All routes are on their way before the first is waited for.
    for run, of in zip(runs, all_refs):
        pl.when(run)(functools.partial(of.route.fetch, of.table, tile, of.route_loaded))
    for run, plan, of in zip(runs, plans, all_refs):
        nth = block - plan.first_block
        pl.when(run)(functools.partial(_run_part, launch, plan, of, nth))


def _run_part(launch: _Launch, plan: _PartPlan, refs: _Refs, nth: Array) -> None:
    """Block number `nth` of a part: finds its place, and takes its rounds."""
    tile, me = lax.axis_index("tile"), lax.axis_index("split")
    per_chunk = jnp.int32(plan.rank_blocks)
    chunk, rank_start = lax.div(nth, per_chunk), lax.rem(nth, per_chunk) * plan.width
    row_start, k_start = tile * launch.rows, me * launch.share
    out_start: Array | int = 0
    if launch.out_rows < launch.rows:
        out_start = lax.div(me * launch.own_rows, jnp.int32(TILE)) * TILE
    block = _Block(launch, plan, refs, me, chunk, rank_start, row_start, k_start, out_start)
    pl.run_scoped(
        functools.partial(_take_rounds, block),
        _out_memory(launch.out_rows, plan.row_width, plan.out.dtype),
    )


def _take_rounds(block: _Block, out: list["_OutMemory"]) -> None:
    """The rounds chunk, chunk + chunks, ... of a tile, once its route is here."""
    launch, plan, route = block.launch, block.plan, block.refs.route
    plgpu.barrier_wait(block.refs.route_loaded)
    ids = route.ids()
    whole = (route.count() <= plan.stack) & (plan.out.shape[-2] > 1)
    kept = _Kept(ids, whole, out)
    rounds = route.rounds(plan.stack)
    if launch.zero_rows:
        rounds = jnp.maximum(rounds, 1)
    mine = lax.div(rounds - block.chunk + (plan.chunks - 1), jnp.int32(plan.chunks))

    def take(n: Array) -> None:
        if launch.stages(plan.width) == launch.stages(plan.stack * plan.width):
            return _round(block, kept, plan.stack, n)
        # Room for more adapters costs stages, and most tiles have one adapter.
        is_one = route.count() - n * plan.stack <= 1
        pl.when(is_one)(functools.partial(_round, block, kept, 1, n))
        pl.when(~is_one)(functools.partial(_round, block, kept, plan.stack, n))

    lax.fori_loop(0, mine, lambda n, _: take(block.chunk + n * plan.chunks), None)


def _round(block: _Block, kept: _Kept, count: int, n: Array) -> None:
    """Round n of a tile, which has up to `count` adapters: from x to v in device memory."""
    launch, plan, refs = block.launch, block.plan, block.refs
    adapters = [refs.route.adapter(n * plan.stack, j) for j in range(count)]
    wide = count * plan.width
    stages = launch.stages(wide)
    v = pl.run_scoped(
        lambda x_smem, a_smem: _share_of_v(block, kept, adapters, _Pipeline(x_smem, a_smem)),
        plgpu.SMEM(
            (stages, launch.planes, launch.rows, launch.block_k),
            launch.dtype,
            transforms=launch.layout,
        ),
        plgpu.SMEM((stages, wide, launch.block_k), launch.dtype, transforms=launch.layout),
    )
    if launch.alone:
        _put_out(block, kept, v)
    else:
        layout = operand_layout(jnp.float32, plan.width)
        share = plgpu.SMEM((TILE, plan.width), jnp.float32, transforms=layout)
        pl.run_scoped(functools.partial(_exchange, block, kept, v), [share] * (launch.rows // TILE))
    plgpu.commit_smem()
    _store(block, kept, adapters, n)
    plgpu.wait_smem_to_gmem(0)


# ------------------------------------------------------------- the pipeline, and the products


class _Pipeline(NamedTuple):
    """A ring in shared memory: x `[stages, planes, rows, block_k]`, and A of a round's adapters one
    below the other, `[stages, wide, block_k]`. A barrier per stage says that both are here."""

    x: Ref
    a: Ref


def _share_of_v(
    block: _Block, kept: _Kept, adapters: list[Array], ring: _Pipeline
) -> Float[Array, "rows width"]:
    """Each row's sum with its own adapter over the block's share of H, scaled; zero without one.
    In registers."""
    plan, scales = block.plan, block.refs.scales
    products = _products(block, adapters, ring)
    v = jnp.zeros((block.launch.rows, plan.width), jnp.float32)
    for j, adapter in enumerate(adapters):
        slot = jnp.maximum(adapter, 0) if scales.shape[0] > 1 else 0
        scale = scales[plan.first_scale + slot]
        mine = products[:, j * plan.width : (j + 1) * plan.width] * scale
        v = jnp.where(row_mask(kept.ids, adapter, plan.width), mine, v)
    return v


def _products(block: _Block, adapters: list[Array], ring: _Pipeline) -> Float[Array, "rows wide"]:
    """All rows with all adapters of a round over the block's share of H, in registers."""
    launch = block.launch
    rows, wide, steps, span_steps = launch.rows, ring.a.shape[1], launch.steps, launch.span_steps

    def span(n: Array | int, total: Array) -> Array:
        """`total` and the next `span_steps` steps, which the tensor cores add up."""

        def product(acc: Ref) -> Array:
            start = n * span_steps
            stop = jnp.minimum(start + span_steps, steps)
            step = functools.partial(_step, block, adapters, ring, acc)
            lax.fori_loop(start, stop, lambda k, _: step(k), None)
            return acc[...]

        return total + pl.run_scoped(product, accumulator(rows, wide))

    for k in range(ring.x.shape[0]):
        _fetch(block, adapters, ring, k, k)
    zeros = jnp.zeros((rows, wide), jnp.float32)
    if steps <= span_steps:
        return span(0, zeros)
    return lax.fori_loop(0, -(-steps // span_steps), span, zeros)


def _step(block: _Block, adapters: list[Array], ring: _Pipeline, acc: Ref, k: Array) -> None:
    """Adds the products of step k to `acc`, once they are here, and asks for a later step's."""
    planes, steps, stages = block.launch.planes, block.launch.steps, ring.x.shape[0]
    slot = lax.rem(jnp.int32(k), jnp.int32(stages))
    plgpu.barrier_wait(block.refs.loaded.at[slot])
    for p in range(planes):
        plgpu.wgmma(acc, ring.x.at[slot, p], ring.a.at[slot].T)
    if steps > stages:
        # This step still reads its slot, so the next copy goes to the slot of the step before. With
        # one stage that is the same slot, and this step must end first.
        running = min(1, stages - 1)
        plgpu.wgmma_wait(planes * running)
        ahead = k + (stages - running)
        pl.when((k >= running) & (ahead < steps))(
            lambda: _fetch(
                block, adapters, ring, ahead, lax.rem(jnp.int32(ahead), jnp.int32(stages))
            )
        )


def _fetch(
    block: _Block, adapters: list[Array], ring: _Pipeline, k: Array | int, slot: Array | int
) -> None:
    """Starts the copies of step k: x, and A of the round's adapters. What is not copied arrives."""
    launch, plan, refs = block.launch, block.plan, block.refs
    barrier = refs.loaded.at[slot]
    columns = pl.ds(block.k_start + k * launch.block_k, launch.block_k)
    for p in range(launch.planes):
        plgpu.copy_gmem_to_smem(
            refs.x.at[p, pl.ds(block.row_start, launch.rows), columns], ring.x.at[slot, p], barrier
        )

    def copy_a(j: int, adapter: Array) -> None:
        plgpu.copy_gmem_to_smem(
            refs.a.at[adapter, pl.ds(block.rank_start, plan.width), columns],
            ring.a.at[slot, pl.ds(j * plan.width, plan.width)],
            barrier,
        )

    for j, adapter in enumerate(adapters):
        pl.when(adapter >= 0)(functools.partial(copy_a, j, adapter))
        pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(barrier))
    for _ in range(launch.planes + len(adapters), launch.arrivals):
        plgpu.barrier_arrive(barrier)


# ----------------------------------------------------------------------- from registers to v


class _OutMemory(NamedTuple):
    """A band of v's columns on its way out, in shared memory.

    Attributes:
      by_row: `[rows, 128 bytes]`. TMA wants rows that it copies one by one 128 bytes apart.
      tile: `[rows, size]`, rows side by side as TMA wants those of a tile. None where `size` is 128
        bytes: `by_row` then serves for both.
    """

    by_row: Ref
    tile: Ref | None = None


def _out_memory(rows: int, columns: int, dtype: DTypeLike) -> list[_OutMemory]:
    """The shared memory to ask for, band by band of the columns."""
    itemsize, memory = jnp.dtype(dtype).itemsize, []
    for _, size in bands(columns, itemsize):
        nbytes = size * itemsize
        tile: Memory = plgpu.SMEM((rows, size), dtype, transforms=plain_layout(nbytes))
        if nbytes == 128:
            memory.append(_OutMemory(tile))
        else:
            memory.append(_OutMemory(plgpu.SMEM((rows, 128 // itemsize), dtype), tile))
    return memory


def _exchange(block: _Block, kept: _Kept, v: Array, share: list[Ref]) -> None:
    """Sums what the cluster's blocks have, in their order, for the tile with this block's own rows.

    `share` is the block's share of v in shared memory, tile by tile: JAX 0.11 cannot slice a peer's
    memory.
    """
    starts = range(0, block.launch.rows, TILE)
    for start, of_tile in zip(starts, share):
        of_tile[...] = v[start : start + TILE]
    cluster_barrier()

    def add_up(of_tile: Ref) -> None:
        peers = [plgpu.cluster_ref(of_tile, {"split": s}) for s in range(block.launch.split)]
        loads = [plgpu.load(peer, layout=plgpu.Layout.WGMMA) for peer in peers]
        _put_out(block, kept, functools.reduce(jnp.add, loads))

    for start, of_tile in zip(starts, share):
        pl.when(block.out_start == start)(functools.partial(add_up, of_tile))
    cluster_barrier()  # peers read `share` until here


def _put_out(block: _Block, kept: _Kept, v: Array) -> None:
    """Rounds v to its dtype, and writes it to shared memory in the form that `_store` takes."""
    plan = block.plan
    v = v.astype(plan.out.dtype)
    if plan.row_width > plan.width:
        v = jnp.concatenate([v, jnp.zeros_like(v)], axis=1)
    for (first, size), memory in zip(plan.bands, kept.out):
        columns = v[:, first : first + size]
        by_row = functools.partial(store_rows, memory.by_row.at[:, pl.ds(0, size)], columns)
        if memory.tile is None:
            by_row()
        else:
            pl.when(kept.whole)(functools.partial(store_rows, memory.tile, columns))
            pl.when(jnp.logical_not(kept.whole))(by_row)


def _store(block: _Block, kept: _Kept, adapters: list[Array], n: Array) -> None:
    """Copies the block's own rows of round n to device memory: all at once if no other round has
    any of them, else those with one of the round's adapters, one by one."""
    launch, plan, refs = block.launch, block.plan, block.refs
    own, out_start = launch.own_rows, block.out_start
    target = refs.v.at[block.me] if launch.interpreted else refs.v
    first_row = 0 if launch.interpreted else block.me * own

    def store_tile() -> None:
        for (first, size), memory in zip(plan.bands, kept.out):
            tile = memory.by_row if memory.tile is None else memory.tile
            plgpu.copy_smem_to_gmem(
                tile.at[pl.ds(first_row - out_start, own)],
                target.at[
                    pl.ds(block.row_start + first_row, own), pl.ds(block.rank_start + first, size)
                ],
            )

    def copy_row(row: Array) -> None:
        for (first, size), memory in zip(plan.bands, kept.out):
            plgpu.copy_smem_to_gmem(
                memory.by_row.at[pl.ds(row - out_start, 1), pl.ds(0, size)],
                target.at[pl.ds(block.row_start + row, 1), pl.ds(block.rank_start + first, size)],
            )

    def store_row(r: Array, _: None) -> None:
        row = first_row + r
        adapter = refs.route.id_of(row)
        mine = [(adapter == a) & (a >= 0) for a in adapters]
        if launch.zero_rows:
            mine.append((adapter < 0) & (n == 0))
        is_mine = functools.reduce(jnp.logical_or, mine)
        # TMA clips rows behind the last one, but not where there is one row in all.
        is_token = block.row_start + row < launch.num_tokens
        pl.when(is_mine & is_token)(functools.partial(copy_row, row))

    pl.when(kept.whole)(store_tile)
    pl.when(jnp.logical_not(kept.whole))(lambda: lax.fori_loop(0, own, store_row, None))
