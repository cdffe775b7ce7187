"""v = scale * x @ A[i].T: a cluster of blocks takes 64 or 128 tokens and splits H among its blocks.

It works in rounds, each for a few of the tokens' adapters. The rounds of all tiles and parts are
dealt to the clusters in turn. The life of a round:

    route      which tokens and adapters              shared memory
    pipeline   x and A, some columns of H at a time   shared memory, by TMA; A of 8 bits widened
    products   all rows with all of them              registers, float32
    v          each row's product with its adapter    registers, this block's share of H
    exchange   the sum over the cluster's shares      peers' shared memory, then registers
    out        v in its dtype                         from there to device memory

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
    COLUMNS,
    Memory,
    Ref,
    accumulator,
    body_of,
    cluster_barrier,
    eight_bit_layout,
    end_group,
    interpreted,
    operand_layout,
    operand_rows,
    place_of,
    shared_bytes,
    wait_for_groups,
)
from pallas_kernels.mosaic_gpu.prefill import rows as lanes
from pallas_kernels.mosaic_gpu.prefill.config import SPLIT_UNIT, rank_width
from pallas_kernels.mosaic_gpu.prefill.route import (
    PartRounds,
    Rounds,
    Route,
    RouteSize,
    moved,
    row_mask,
)
from pallas_kernels.mosaic_gpu.prefill.widening import widen_rows
from pallas_kernels.routing import Segments, SlotRange
from pallas_kernels.stacks import is_eight_bits

# What the pipeline and the output may fill of shared memory, and what they may with the routes.
_PIPELINE_BYTES = 208 * 1024
_SHARED_BYTES = chip.ARRAY_BYTES
# Columns of H, of all planes, that the tensor cores add up. They round towards zero, so their error
# grows with the number of additions: 1.8e-5 of v after 16384 columns. Such spans are then added in
# float32, which rounds to nearest.
_SPAN = 2048
# Places for A as widened from 8 bits: one is written to while products read the other.
_WIDENED = 2


class ShrinkPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      lora_a: `[L, R, H]`, H a multiple of 16; in x's dtype, or in 8 bits beside bfloat16.
      scales: `[1]`, or `[S]` in which the part's L scales start at `first_scale`; in 8 bits L * R
        of them, one for each rank.
      slots: those of its adapters: a token of id i has adapter `i - slots.first`.
      dtype: of v.
      config: how to cut the work.
      first_scale: where the part's scales start (static).
      first: where its adapters start in `lora_a` and, behind `first_scale`, in `scales`, if these
        are those of several layers. It counts adapters, of which several may share one A.
      shared: how many adapters share one A (static).
    """

    lora_a: Float[Array, "L R H"]
    scales: Float[Array, " S"]
    slots: SlotRange
    dtype: DTypeLike
    config: Config
    first_scale: int = 0
    first: Int[Array, ""] | None = None
    shared: int = 1


def shrink_kernel(
    x: Float[Array, "P T H"],
    parts: tuple[ShrinkPart, ...],
    segments: Segments,
    *,
    zero_rows: bool,
    sorts: bool = False,
) -> list[Array]:
    """v of each part, summed over the planes of x, for the tokens of `segments`. x has a row for
    each, and may be padded.

    Returns one array per part: `[T, R]` in float32; in half precision, as the expand takes it,
    `[operand_rows, max(R, 16)]`; in interpret mode `[split, T, R]`, float32 partial sums. Rows are
    in `Order` if `sorts`, else in that of x. Rows of -1 are zero if `zero_rows`, else undefined.
    """
    launch = _plan_launch(x, parts, segments, zero_rows, sorts)
    plans = _plan_parts(launch, parts)
    sizes = [plan.rounds.size(launch.rows) for plan in plans]
    grid = {"block": _clusters(launch, plans)}
    cluster = {"split": launch.split}
    if launch.interpreted:  # an axis of the grid takes the place of the cluster
        grid, cluster = grid | cluster, {}
    ranks = "_".join(f"r{plan.rank}" for plan in plans)
    kernel = plgpu.kernel(
        body_of(functools.partial(_block_body, launch, plans)),
        out_type=[plan.out for plan in plans],
        scratch_types=[
            plgpu.Barrier(
                num_barriers=max(launch.stages(plan.width) for plan in plans),
                num_arrivals=launch.arrivals,
            ),
            [(size.memory, plgpu.Barrier(num_arrivals=size.copies)) for size in sizes],
        ],
        kernel_name=f"lora_shrink_{ranks}",
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
    )
    wanted = Rounds(tuple(plan.rounds for plan in plans), launch.rows, sorts, zero_rows)
    operands = (
        (part.lora_a, part.scales, moved(table, launch.rows, part.first))
        for part, table in zip(parts, segments.table(wanted))
    )
    return kernel(x, *itertools.chain(*operands))


# ------------------------------------------------------------------------ the plan, from shapes


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How a launch cuts tokens and H, the same for all of its parts.

    Attributes:
      num_tokens: T.
      x_shape: rows and columns of a plane of x.
      planes: arrays that x is the sum of.
      dtype: of x, and of A in products.
      weights: of A in device memory: `dtype`, or 8 bits.
      line: columns of a tile of x and A in shared memory.
      rows: tokens of a block, one tile or two.
      split: blocks of a cluster.
      share: columns of H of each of them.
      block_k: columns of H in a stage of the pipeline.
      room: bytes of shared memory for the pipeline.
      most_stages: of the pipeline.
      most_adapters: adapters of a round, of all parts.
      zero_rows: whether rows without an adapter become zero.
      sorts: whether tokens may be sorted, so that rows of x are copied one by one.
      adapters: slots of all tokens' ids.
      interpreted: whether this is for Pallas's interpreter. It has no peers' shared memory, so
        blocks put their partial sums out.
    """

    num_tokens: int
    x_shape: tuple[int, int]
    planes: int
    dtype: DTypeLike
    weights: DTypeLike
    line: int
    rows: int
    split: int
    share: int
    block_k: int
    room: int
    most_stages: int
    most_adapters: int
    zero_rows: bool
    sorts: bool
    adapters: int
    interpreted: bool

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

    @property
    def layout(self) -> tuple[plgpu.Transform, ...]:
        """The layout of x and A in shared memory, as products take them."""
        return operand_layout(self.dtype, self.line)

    @property
    def widens(self) -> bool:
        """Whether A comes in 8 bits."""
        return is_eight_bits(self.weights)

    def nbytes(self, ranks: int, stages: int) -> int:
        """Shared memory of so many stages with so many rows of A."""
        size = jnp.dtype(self.dtype).itemsize
        of_stage = self.planes * self.rows * size + ranks * jnp.dtype(self.weights).itemsize
        widened = _WIDENED * ranks * size if self.widens else 0
        return (stages * of_stage + widened) * self.block_k

    def stages(self, ranks: int) -> int:
        """Stages of the pipeline with so many rows of A."""
        most = min(self.most_stages, self.steps)
        return next((n for n in range(most, 1, -1) if self.nbytes(ranks, n) <= self.room), 1)

    def pipeline(self, ranks: int) -> tuple[Memory, ...]:
        """The shared memory to ask for, of `_Pipeline`."""
        stages, x_rows = self.stages(ranks), (self.planes, self.rows)
        a_shape = ranks, self.block_k
        layout = eight_bit_layout(self.line) if self.widens else self.layout
        x = plgpu.SMEM((stages, *x_rows, self.block_k), self.dtype, transforms=self.layout)
        a = plgpu.SMEM((stages, *a_shape), self.weights, transforms=layout)
        if not self.widens:
            return x, a
        return x, a, plgpu.SMEM((_WIDENED, *a_shape), self.dtype, transforms=self.layout)


@dataclasses.dataclass(frozen=True)
class _PartPlan:
    """How a launch cuts one part.

    Attributes:
      rank: R.
      width: ranks of a block.
      rounds: how many adapters a block multiplies at once, and how many blocks deal the ranks among
        themselves.
      first_scale: where its scales start.
      shared: how many adapters share one A.
      out: shape and dtype of v.
    """

    rank: int
    width: int
    rounds: PartRounds
    first_scale: int
    shared: int
    out: jax.ShapeDtypeStruct

    @property
    def stack(self) -> int:
        return self.rounds.stack

    @property
    def row_width(self) -> int:
        """Columns of a row of v that a block stores. In half precision rank 8 has 16, the K of the
        expand's wgmma."""
        return self.width if self.rounds.blocks > 1 else self.out.shape[-1]


def _widths(parts: tuple[ShrinkPart, ...]) -> list[int]:
    """Ranks of a block, part by part."""
    return [rank_width(p.lora_a.shape[1], p.config.rank_block) for p in parts]


def _stacks(parts: tuple[ShrinkPart, ...], rows: int) -> list[int]:
    """Adapters of each part that a block multiplies at once: their ranks stay below wgmma's N."""
    most = MAX_COLUMNS * TILE // rows
    return [min(p.config.stack, most // width) for p, width in zip(parts, _widths(parts))]


def _plan_launch(
    x: Float[Array, "P T H"],
    parts: tuple[ShrinkPart, ...],
    segments: Segments,
    zero_rows: bool,
    sorts: bool,
) -> _Launch:
    """The launch of `shrink_kernel`."""
    planes, height, features = x.shape
    widths = _widths(parts)
    split = min(part.config.split for part in parts)
    row_tiles = min(min(p.config.row_tiles for p in parts), MAX_COLUMNS // max(widths))
    rows = row_tiles * TILE
    stacks = _stacks(parts, rows)
    launch = _Launch(
        num_tokens=segments.num_tokens,
        x_shape=(height, features),
        planes=planes,
        dtype=x.dtype,
        weights=parts[0].lora_a.dtype,
        line=math.gcd(features, 64),
        rows=rows,
        split=split,
        share=-(-features // (SPLIT_UNIT * split)) * SPLIT_UNIT,
        block_k=128,
        room=0,
        most_stages=max(p.config.stages for p in parts),
        most_adapters=max(stacks),
        zero_rows=zero_rows,
        sorts=sorts,
        adapters=segments.num_adapters,
        interpreted=interpreted(),
    )
    room = _room(launch, parts)
    wide = max(stack * width for stack, width in zip(stacks, widths))
    # A step adds plane after plane. So with several planes block_k is part of the order of the sum,
    # and must not follow from how much fits.
    two_fit = launch.nbytes(wide, stages=2) <= room
    return dataclasses.replace(launch, block_k=128 if planes == 1 and two_fit else 64, room=room)


def _room(launch: _Launch, parts: tuple[ShrinkPart, ...]) -> int:
    """Bytes of shared memory that the routes leave for the pipeline."""
    memory = (RouteSize(launch.rows, MAX_COLUMNS).memory for _ in parts)
    return min(_PIPELINE_BYTES, _SHARED_BYTES - shared_bytes(memory))


def _plan_parts(launch: _Launch, parts: tuple[ShrinkPart, ...]) -> tuple[_PartPlan, ...]:
    """The parts of `shrink_kernel`, in order."""
    return tuple(
        _PartPlan(
            rank=part.lora_a.shape[1],
            width=width,
            rounds=PartRounds(part.slots, stack, part.lora_a.shape[1] // width),
            first_scale=part.first_scale,
            shared=part.shared,
            out=_out_type(launch, part),
        )
        for part, width, stack in zip(parts, _widths(parts), _stacks(parts, launch.rows))
    )


def _clusters(launch: _Launch, plans: tuple[_PartPlan, ...]) -> int:
    """Clusters of the launch: as many as are there at once and can have work. Where tiles fill the
    chip, there are as many as tiles, which mostly have one round."""
    most = (launch.num_tokens, launch.rows, launch.adapters if launch.sorts else None)
    items = sum(plan.rounds.most(*most) * plan.rounds.blocks for plan in plans)
    tiles = -(-launch.num_tokens // launch.rows) * max(plan.rounds.blocks for plan in plans)
    if tiles * launch.split > MULTIPROCESSORS * 3 // 4:
        return min(items, tiles)
    nbytes = max(
        launch.nbytes(ranks, launch.stages(ranks))
        for plan in plans
        for ranks in (plan.width, plan.stack * plan.width)
    )
    at_once = 2 if nbytes <= chip.SHARED_BYTES // 2 - 8 * 1024 else 1
    return min(items, -(-at_once * MULTIPROCESSORS // launch.split))


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
    """What one block does in a round, as numbers in registers that all of its threads share.

    Attributes:
      launch, plan, refs: what it works by.
      me: its place in the cluster.
      rank_start: first of its ranks.
      row_start: first of its tokens.
      k_start: first of its columns of H.
      ids: each row's adapter.
      is_scattered: whether rows of x are copied one by one.
    """

    launch: _Launch
    plan: _PartPlan
    refs: _Refs
    me: Int[Array, ""]
    rank_start: Int[Array, ""]
    row_start: Int[Array, ""]
    k_start: Int[Array, ""]
    ids: Int[Array, " rows"]
    is_scattered: Bool[Array, ""]


def _block_body(launch: _Launch, plans: tuple[_PartPlan, ...], x_ref: Ref, *refs: Ref) -> None:
    """What every block runs: the parts that have blocks here, one after the other."""
    inputs = itertools.batched(refs[: 3 * len(plans)], 3)
    *out_refs, loaded, scratch = refs[3 * len(plans) :]
    all_refs = [
        _Refs(x_ref, a, scales, table, v_ref, Route(words, launch.rows), route_loaded, loaded)
        for (a, scales, table), v_ref, (words, route_loaded) in zip(inputs, out_refs, scratch)
    ]
    block = lax.axis_index("block")
    # All routes are on their way before the first is waited for.
    for plan, of in zip(plans, all_refs):
        of.route.fetch(of.table, _first_guess(plan, of, block), of.route_loaded)
    for plan, of in zip(plans, all_refs):
        _run_part(launch, plan, of, block)


def _first_guess(plan: _PartPlan, refs: _Refs, block: Array) -> Array:
    """The round that a block takes first if no part comes before."""
    first = lax.div(block, jnp.int32(plan.rounds.blocks))
    return jnp.minimum(first, refs.table.shape[0] - 1)


def _run_part(launch: _Launch, plan: _PartPlan, refs: _Refs, block: Array) -> None:
    """The block's items of a part: all clusters take items in turn, through all parts."""
    route, per_round = refs.route, jnp.int32(plan.rounds.blocks)
    clusters = jnp.int32(lax.axis_size("block"))
    here = _first_guess(plan, refs, block)
    plgpu.barrier_wait(refs.route_loaded)
    nth = lax.rem(block - route.first_item(), clusters)
    nth = jnp.where(nth < 0, nth + clusters, nth)
    mine = lax.div(route.items() - nth + (clusters - 1), clusters)

    def take(i: Array, _: None) -> None:
        item = nth + i * clusters
        wanted = lax.div(item, per_round)
        pl.when((i > 0) | (wanted != here))(functools.partial(_fetch_route, refs, wanted))
        me = lax.axis_index("split")
        _take(
            _Block(
                launch,
                plan,
                refs,
                me,
                rank_start=lax.rem(item, per_round) * plan.width,
                row_start=route.tile() * launch.rows,
                k_start=me * launch.share,
                ids=route.ids(),
                is_scattered=route.is_scattered(),
            )
        )

    lax.fori_loop(0, mine, take, None)


def _fetch_route(refs: _Refs, wanted: Array) -> None:
    """Copies another round's route, and waits for it."""
    plgpu.commit_smem()  # all are done with the one before
    refs.route.fetch(refs.table, wanted, refs.route_loaded)
    plgpu.barrier_wait(refs.route_loaded)


def _take(block: _Block) -> None:
    """A round, with room for one adapter or several."""
    launch, plan = block.launch, block.plan
    same = launch.stages(plan.width) == launch.stages(plan.stack * plan.width)
    if plan.stack == 1 or (same and not launch.widens):
        return _round(block, plan.stack)
    # Room for more adapters costs stages, or the time to widen what is not there, and most tiles
    # have one adapter.
    is_one = block.refs.route.count() <= 1
    pl.when(is_one)(functools.partial(_round, block, 1))
    pl.when(~is_one)(functools.partial(_round, block, plan.stack))


def _round(block: _Block, count: int) -> None:
    """A round, which has up to `count` adapters: from x to v in device memory."""
    launch, plan, refs = block.launch, block.plan, block.refs
    adapters = [refs.route.adapter(0, j) for j in range(count)]
    v = pl.run_scoped(
        lambda *memory: _share_of_v(block, adapters, _Pipeline(*memory)),
        *launch.pipeline(count * plan.width),
    )
    if launch.interpreted:
        share: Memory = plgpu.SMEM((launch.rows, plan.width), jnp.float32)
        pl.run_scoped(functools.partial(_store_share, block, adapters, v), share)
    else:
        layout = operand_layout(jnp.float32, plan.width)
        share = plgpu.SMEM((launch.rows, plan.width), jnp.float32, transforms=layout)
        pl.run_scoped(functools.partial(_exchange, block, adapters, v), share)


# ------------------------------------------------------------- the pipeline, and the products


class _Pipeline(NamedTuple):
    """A ring in shared memory: x `[stages, planes, rows, block_k]`, and A of a round's adapters one
    below the other, `[stages, wide, block_k]`. A barrier per stage says that both are here.

    Where A comes in 8 bits, products read `wide_a`, `[2, wide, block_k]`, whose two places take
    turns."""

    x: Ref
    a: Ref
    wide_a: Ref | None = None

    def operand(self, line: int, k: Array, slot: Array) -> Ref:
        """A of step k, from its slot, as products take it in tiles of `line` columns. Those of step
        k - 2 have ended."""
        if self.wide_a is None:
            return self.a.at[slot]
        wide = self.wide_a.at[lax.rem(jnp.int32(k), jnp.int32(_WIDENED))]
        widen_rows(self.a.at[slot], wide, self.a.shape[1], line)
        return wide


def _share_of_v(
    block: _Block, adapters: list[Array], ring: _Pipeline
) -> Float[Array, "rows width"]:
    """Each row's sum with its own adapter over the block's share of H, scaled; zero without one.
    In registers."""
    plan = block.plan
    products = _products(block, adapters, ring)
    v = jnp.zeros((block.launch.rows, plan.width), jnp.float32)
    for j, adapter in enumerate(adapters):
        scale = _scale(block, adapter)
        mine = products[:, j * plan.width : (j + 1) * plan.width] * scale
        v = jnp.where(row_mask(block.ids, adapter, plan.width), mine, v)
    return v


def _scale(block: _Block, adapter: Array) -> Float[Array, "*rows_width"]:
    """What an adapter's columns of v are multiplied by: one number, or one each."""
    plan, scales = block.plan, block.refs.scales
    slot = jnp.maximum(adapter, 0) if scales.shape[0] > 1 else 0
    if not block.launch.widens:
        return scales[plan.first_scale + slot]
    first = plan.first_scale + slot * plan.rank + block.rank_start
    own = plgpu.load(scales.at[pl.ds(first, plan.width)], layout=COLUMNS, optimized=False)
    return lax.broadcast_in_dim(own, (block.launch.rows, plan.width), (1,))


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

    stages = ring.x.shape[0]
    for k in range(stages):
        _fetch(block, adapters, ring, k, k)
    if launch.sorts:
        fetch = lambda k, _: _fetch_rows(block, ring, k, k, True)  # noqa: E731
        pl.when(block.is_scattered)(lambda: lax.fori_loop(0, stages, fetch, None))
    zeros = jnp.zeros((rows, wide), jnp.float32)
    if steps <= span_steps:
        return span(0, zeros)
    return lax.fori_loop(0, -(-steps // span_steps), span, zeros)


def _step(block: _Block, adapters: list[Array], ring: _Pipeline, acc: Ref, k: Array) -> None:
    """Adds the products of step k to `acc`, once they are here, and asks for a later step's."""
    launch, stages = block.launch, ring.x.shape[0]
    slot = lax.rem(jnp.int32(k), jnp.int32(stages))
    # This step still reads its slot, so the next copy goes to the slot of the step before. With one
    # stage that is the same slot, and this step must end first.
    running = min(1, stages - 1)
    plgpu.barrier_wait(block.refs.loaded.at[slot])
    if launch.sorts:
        pl.when(block.is_scattered)(lambda: wait_for_groups(stages - 1 - running))
    a = ring.operand(launch.line, k, slot)
    for p in range(launch.planes):
        plgpu.wgmma(acc, ring.x.at[slot, p], a.T)
    if launch.steps > stages or launch.widens:
        plgpu.wgmma_wait(launch.planes * running)
    ahead = k + (stages - running)
    later = lax.rem(jnp.int32(ahead), jnp.int32(stages))
    is_more = (k >= running) & (ahead < launch.steps)
    if launch.steps > stages:
        pl.when(is_more)(lambda: _fetch(block, adapters, ring, ahead, later))
    if launch.sorts:
        pl.when(block.is_scattered)(lambda: _fetch_rows(block, ring, ahead, later, is_more))


def _fetch(
    block: _Block, adapters: list[Array], ring: _Pipeline, k: Array | int, slot: Array | int
) -> None:
    """Starts the copies of step k: a tile of x, and A of the round's adapters.

    A stage's barrier expects the same arrivals in each step. So a block arrives itself for what TMA
    does not copy: adapters that the round lacks, and x where lanes copy rows. No
    barrier tells when such rows are here, but the groups of the lanes' copies.
    """
    launch, plan, refs = block.launch, block.plan, block.refs
    barrier = refs.loaded.at[slot]
    columns = pl.ds(block.k_start + k * launch.block_k, launch.block_k)

    def copy_x() -> None:
        for p in range(launch.planes):
            plgpu.copy_gmem_to_smem(
                refs.x.at[p, pl.ds(block.row_start, launch.rows), columns],
                ring.x.at[slot, p],
                barrier,
            )

    def copy_a(j: int, adapter: Array) -> None:
        plgpu.copy_gmem_to_smem(
            refs.a.at[place_of(adapter, plan.shared), pl.ds(block.rank_start, plan.width), columns],
            ring.a.at[slot, pl.ds(j * plan.width, plan.width)],
            barrier,
        )

    if launch.sorts:
        pl.when(~block.is_scattered)(copy_x)
        pl.when(block.is_scattered)(lambda: _arrive(barrier, launch.planes))
    else:
        copy_x()
    for j, adapter in enumerate(adapters):
        pl.when(adapter >= 0)(functools.partial(copy_a, j, adapter))
        pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(barrier))
    _arrive(barrier, launch.arrivals - launch.planes - len(adapters))


def _arrive(barrier: Ref, times: int) -> None:
    for _ in range(times):
        plgpu.barrier_arrive(barrier)


# ------------------------------------------------------------- rows of x that are not side by side


def _fetch_rows(
    block: _Block, ring: _Pipeline, k: Array, slot: Array, is_step: Array | bool
) -> None:
    """Starts to copy the tokens' columns of x of step k row by row, if there is that step.

    In either case this is one group of copies, so it is known how many of them are on their way.
    """
    launch, words = block.launch, block.refs.route.words
    start = block.k_start + k * launch.block_k

    @pl.when(is_step)
    def copy() -> None:
        for plane in range(launch.planes):
            lanes.fetch(
                ring.x.at[slot, plane],
                launch.layout,
                lanes.Array(block.refs.x, launch.dtype, *launch.x_shape),
                lanes.Tokens(words, launch.rows, launch.num_tokens),
                start,
                plane,
            )

    end_group()


# ----------------------------------------------------------------------- from registers to v


def _exchange(block: _Block, adapters: list[Array], v: Array, share: Ref) -> None:
    """Sums what the cluster's blocks have, in their order. Each block takes some of the rows, and
    stores those with one of the adapters; in the first round also those without any.

    `share` is the block's share of v in shared memory.
    """
    launch, plan, refs = block.launch, block.plan, block.refs
    plgpu.commit_smem()  # all warps have read the ring, in whose memory the share lies
    share[...] = v
    sums = lanes.Sums(
        split=launch.split,
        width=plan.width,
        out_width=plan.row_width,
        own=launch.rows // launch.split,
    )
    mine = lanes.Share(sums, share, operand_layout(jnp.float32, plan.width))
    array = lanes.Array(refs.v, plan.out.dtype, *plan.out.shape)
    out = lanes.Corner(array, block.row_start, block.rank_start)
    cluster_barrier()
    lanes.add_up_shares(mine, refs.route.words, out, block.me, adapters, refs.route.is_first())
    cluster_barrier()  # peers read `share` until here
    plgpu.commit_smem()  # TMA may write there next


def _store_share(block: _Block, adapters: list[Array], v: Array, share: Ref) -> None:
    """In interpret mode: stores the block's share of those rows."""
    launch, refs = block.launch, block.refs
    share[...] = v
    plgpu.commit_smem()
    columns = pl.ds(block.rank_start, block.plan.width)

    def store_row(row: Array, _: None) -> None:
        adapter = refs.route.id_of(row)
        mine = [(adapter == a) & (a >= 0) for a in adapters]
        mine.append((adapter < 0) & refs.route.is_first())
        is_token = block.row_start + row < launch.num_tokens
        pl.when(functools.reduce(jnp.logical_or, mine) & is_token)(
            lambda: plgpu.copy_smem_to_gmem(
                share.at[pl.ds(row, 1)],
                refs.v.at[block.me, pl.ds(block.row_start + row, 1), columns],
            )
        )

    lax.fori_loop(0, launch.rows, store_row, None)
    plgpu.wait_smem_to_gmem(0)
