"""y[t, offset:][:N] (+)= v[t] @ B[i].T: a block owns 64 or 128 tokens times a few columns of y.

It takes `block_n` columns at a time. The life of these:

    route      which adapters the tokens have      shared memory, copied once
    v          of all tokens and ranks             shared memory, copied once per sweep
    B          a few adapters' rows                shared memory, a ring per part
    product    v with each adapter's B             registers, float32
    delta      each row's own product, all parts   registers, float32
    y          old + delta, rounded once           shared memory, a ring: load, add, store

The functions stand top down: the plan of a launch, a block, its sweeps, and the rings of y and B.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

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
    Cut,
    Memory,
    Ref,
    accumulator,
    bands,
    body_of,
    cuts,
    eight_bit_layout,
    end_group,
    grid_of,
    in_place,
    operand_layout,
    place_of,
    plain_layout,
    shared_bytes,
    wait_for_groups,
)
from pallas_kernels.mosaic_gpu.prefill import rows as lanes
from pallas_kernels.mosaic_gpu.prefill.route import (
    Portions,
    Route,
    Routes,
    RouteSize,
    moved,
    route_size,
    row_mask,
)
from pallas_kernels.mosaic_gpu.prefill.widening import PAIR, pairs_of, widen_pairs, widen_rows
from pallas_kernels.routing import Segments, SlotRange
from pallas_kernels.stacks import is_eight_bits

# Stages of y's ring: one is being stored, one added to, and one loaded.
_Y_STAGES = 3
# A block that takes sweeps has room for the largest of them. One more block on each multiprocessor
# gains more than a third stage. T=4096, ranks 8 to 128: 28.9 us with three, 26.3 with two.
_Y_STAGES_IN_SWEEPS = 2
# Where a launch has more tiles, each has adapters of one range, more often than not.
_FEW_TILES = 63
# A sweep of several ranges takes tiles with so many adapters of each range, at most: it takes them
# one by one. H200, 63 rows of as many adapters of R=16 to 128 beside a prompt of 961: 51.1 us in a
# sweep for each range, 76.8 together.
_FEW_ADAPTERS = 2
# What a part's ring of B may fill then, so that two blocks fit a multiprocessor.
_SHORT_RING = 16 * 1024
# What arrays may fill of shared memory.
_SHARED_BYTES = chip.ARRAY_BYTES


class ExpandPart(NamedTuple):
    """One stack of adapters.

    Attributes:
      v: `[rows, max(R, 16)]` in B's dtype, `operand_rows` of them; bfloat16 where B is in 8 bits.
      lora_b: `[L, N, R]`.
      slots: those of its adapters: a token of id i has adapter `i - slots.first`. A token has an
        adapter of one range at most.
      y_offset: first column of y that the part adds to (static).
      config: how to cut the work.
      first: where its adapters start in `lora_b`, if that is of several layers. It counts
        adapters, of which several may share one B.
      shared: how many adapters share one B (static).
    """

    v: Float[Array, "rows K"]
    lora_b: Float[Array, "L N R"]
    slots: SlotRange
    y_offset: int
    config: Config
    first: Int[Array, ""] | None = None
    shared: int = 1


def expand_kernel(
    y: Float[Array, "T Ny"],
    parts: tuple[ExpandPart, ...],
    segments: Segments,
    *,
    add_inputs: bool,
    sorts: bool = False,
) -> Float[Array, "T Ny"]:
    """y' in place where XLA can: y plus the float32 sum of the parts' products, rounded once.

    Without `add_inputs` the sum takes the place of what a token with an adapter has in the parts'
    columns. A block takes range after range, mostly one that its tokens use. Where shared memory
    doesn't hold all parts of a range that share columns, it takes several sweeps for them, and
    rounds after each.

    Rows of v are in `Order` if `sorts`, else in that of y.
    """
    plan = _plan(y, parts, add_inputs, sorts)
    ranks = "_".join(f"r{part.lora_b.shape[2]}" for part in parts)
    kernel = plgpu.kernel(
        body_of(functools.partial(_block_body, plan)),
        scratch_types=[
            plgpu.Barrier(num_arrivals=plan.route_arrivals),
            plgpu.Barrier(num_arrivals=plan.v_arrivals),
            plgpu.Barrier(num_barriers=plan.y_stages, num_arrivals=plan.y_arrivals),
            *(
                plgpu.Barrier(
                    num_barriers=part.config.expand_stages, num_arrivals=part.config.expand_stack
                )
                for part in plan.parts
            ),
        ],
        **grid_of(
            tile=plan.tiles + plan.portions.spare, block=sum(cut.blocks for cut in plan.cuts)
        ),
        kernel_name=f"lora_expand_{ranks}",
    )
    operands: list[Array] = []
    for part in parts:
        [table] = segments.table(Routes(part.slots, plan.rows, sorts, plan.portions))
        operands += part.v, _as_copied(part), moved(table, plan.rows, part.first)
    [y] = in_place(kernel, (y,), *operands)
    return y


def _in_pairs(part: ExpandPart) -> bool:
    """Whether rows of B have 8 bytes, too few for a copy, so that two of them are copied as one."""
    return is_eight_bits(part.lora_b.dtype) and part.lora_b.shape[2] == 8


def _as_copied(part: ExpandPart) -> Array:
    """B by the rows that are copied."""
    b = part.lora_b
    return b.reshape(b.shape[0], -1, PAIR) if _in_pairs(part) else b


# ------------------------------------------------------------------------ the plan, from shapes


class _Sweep(NamedTuple):
    """What a block adds at once.

    Attributes:
      parts: their v and B are in shared memory at the same time. A token has an adapter in those of
        one range, which stand side by side.
      adds: whether their sum is added to y, or takes its place.
    """

    parts: tuple[int, ...]
    adds: bool


class _CutPlan(NamedTuple):
    """How a launch cuts one cut of y's columns.

    Attributes:
      cut: the columns, and the parts that add to them.
      sweeps: in which a block adds these parts, range after range.
      together: one sweep of all of them, where a tile likely has few adapters of several ranges.
      whole: how many times the cut has `block_n` columns.
      groups: blocks that deal these among themselves.
      rest: columns behind them. They have a block, and code, of their own.
    """

    cut: Cut
    sweeps: tuple[_Sweep, ...]
    together: _Sweep | None
    whole: int
    groups: int
    rest: int

    @property
    def blocks(self) -> int:
        return self.groups + (self.rest > 0)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a launch cuts its work.

    Attributes:
      parts: with configs whose shared memory fits.
      cuts: the columns of y.
      dtype: of y.
      y_shape: rows and columns of y.
      rows: tokens of a block.
      block_n: columns of y that a block takes at once.
      columns: how many times it takes those, at most.
      portions: of tiles, that blocks deal among themselves.
      y_stages: stages of y's ring.
      sorts: whether tokens may be sorted, so that rows of y are copied one by one.
    """

    parts: tuple[ExpandPart, ...]
    cuts: tuple[_CutPlan, ...]
    dtype: DTypeLike
    y_shape: tuple[int, int]
    rows: int
    block_n: int
    columns: int
    portions: Portions
    y_stages: int
    sorts: bool

    @property
    def tiles(self) -> int:
        return -(-self.y_shape[0] // self.rows)

    @property
    def y_early(self) -> int:
        """Stages of y's ring that a block asks for before it has its route: those that it takes in
        any case."""
        return 1 if self.portions.spare else self.y_stages

    # A barrier expects the same number of arrivals in every block. A block with fewer copies than
    # another arrives itself for each that it lacks.

    def copies_of_routes(self, cut: Cut) -> int:
        return sum(self.route_size(i).copies for i in cut.parts)

    def route_size(self, part: int) -> RouteSize:
        return route_size(self.parts[part].slots.slots, self.rows)

    @property
    def route_arrivals(self) -> int:
        return max(self.copies_of_routes(cut.cut) for cut in self.cuts)

    @property
    def v_arrivals(self) -> int:
        sweeps = [(*cut.sweeps, *filter(None, [cut.together])) for cut in self.cuts]
        return max(len(sweep.parts) for of_cut in sweeps for sweep in of_cut)

    @property
    def y_arrivals(self) -> int:
        widths = (self.block_n, *(cut.rest for cut in self.cuts))
        return max(len(self.y_bands(width)) for width in widths)

    def y_bands(self, width: int) -> list[Band]:
        return bands(width, jnp.dtype(self.dtype).itemsize)


def _plan(
    y: Float[Array, "T Ny"], parts: tuple[ExpandPart, ...], add_inputs: bool, sorts: bool
) -> _Plan:
    """The plan of `expand_kernel`."""
    dtype = jnp.dtype(y.dtype)
    spans = cuts(tuple((p.y_offset, p.y_offset + p.lora_b.shape[1]) for p in parts))
    sweeps = [_sweeps(cut.parts, parts, add_inputs, dtype.itemsize) for cut in spans]
    few_tiles = y.shape[0] <= _FEW_TILES * TILE
    at_once = {sweep.parts for of_cut in sweeps for sweep in of_cut}
    in_sweeps = any(len(of_cut) > 1 for of_cut in sweeps)
    most_ys = _Y_STAGES_IN_SWEEPS if in_sweeps else _Y_STAGES
    widest = max(cut.stop - cut.start for cut in spans)
    columns = _columns(parts, widest, max(map(len, at_once)))
    fit = _fitting(_Fit.of(parts, columns), at_once, most_ys, dtype.itemsize)
    plans = []
    for cut, of_cut in zip(spans, sweeps):
        whole, rest = divmod(cut.stop - cut.start, fit.block_n)
        y_bytes = dtype.itemsize * min(most_ys, fit.columns)
        together = _together(of_cut, fit, y_bytes, add_inputs) if few_tiles else None
        plans.append(_CutPlan(cut, of_cut, together, whole, -(-whole // fit.columns), rest))
    return _Plan(
        parts=fit.parts,
        cuts=tuple(plans),
        dtype=dtype,
        y_shape=(y.shape[0], y.shape[1]),
        rows=fit.rows,
        block_n=fit.block_n,
        columns=fit.columns,
        portions=_portions(-(-y.shape[0] // fit.rows), fit.columns, plans),
        y_stages=min(most_ys, fit.columns),
        sorts=sorts,
    )


def _portions(tiles: int, columns: int, plans: list[_CutPlan]) -> Portions:
    """Blocks without work end at once: one for each multiprocessor costs nothing."""
    spare = max(columns - 1, MULTIPROCESSORS // sum(cut.blocks for cut in plans))
    return Portions(columns, min(spare, tiles * (columns - 1)))


def _columns(parts: tuple[ExpandPart, ...], widest: int, most_at_once: int) -> int:
    """How many times a block takes `block_n` columns, at most."""
    configs = [part.config for part in parts]
    row_tiles = min(config.expand_row_tiles for config in configs)
    # The parts with fewer tiles decide: the others count on more rows for each load of B.
    columns = max(c.expand_columns for c in configs if c.expand_row_tiles == row_tiles)
    if columns > 1 and most_at_once > 2:
        # v and B of so many parts fill shared memory, so few blocks are there at once. T=4096,
        # ranks 8 to 128 together: 69.5 us with 4, 65.2 with 8, 76.8 with 16.
        columns = max(columns, min(2 * columns, 8))
    return max(1, min(columns, widest // min(config.block_n for config in configs)))


def _sweeps(
    of_cut: tuple[int, ...], parts: tuple[ExpandPart, ...], add_inputs: bool, itemsize: int
) -> tuple[_Sweep, ...]:
    """Range after range, its parts in as few sweeps as shared memory lets them."""
    ranges: dict[int, list[int]] = {}
    for i in of_cut:
        ranges.setdefault(parts[i].slots.first, []).append(i)
    least = _with(parts, expand_stages=1)
    sweeps: list[_Sweep] = []
    for mine in ranges.values():
        sweeps.append(_Sweep((mine[0],), add_inputs))
        for i in mine[1:]:
            together = (*sweeps[-1].parts, i)
            if _nbytes(together, least, TILE, 8, itemsize) <= _SHARED_BYTES:
                sweeps[-1] = sweeps[-1]._replace(parts=together)
            else:  # the same tokens again, which have the sum of the sweep before
                sweeps.append(_Sweep((i,), adds=True))
    return tuple(sweeps)


def _with_short_ring(part: ExpandPart) -> ExpandPart:
    """The part with a ring of B for one adapter at a time. In a sweep of several ranges each has
    such a ring, and all fill at the same time."""
    adapter_bytes = part.config.block_n * part.lora_b.shape[2] * 2
    stages = max(1, min(part.config.expand_stages, _SHORT_RING // adapter_bytes))
    [short] = _with((part,), expand_stack=1, expand_stages=stages)
    return short


class _Fit(NamedTuple):
    """What decides a block's shared memory, and may shrink until it fits. As in `_Plan`."""

    parts: tuple[ExpandPart, ...]
    rows: int
    block_n: int
    columns: int

    @classmethod
    def of(cls, parts: tuple[ExpandPart, ...], columns: int) -> "_Fit":
        """What the parts' configs ask for."""
        row_tiles = min(part.config.expand_row_tiles for part in parts)
        block_n = min(MAX_COLUMNS // row_tiles, *(part.config.block_n for part in parts))
        return cls(parts, row_tiles * TILE, block_n, columns)


def _fitting(given: _Fit, at_once: set[tuple[int, ...]], most_ys: int, itemsize: int) -> _Fit:
    """`given` with what must be smaller for the parts of each sweep to fit; `itemsize` is y's."""
    fit = given

    def is_too_large(sweep: tuple[int, ...]) -> bool:
        y_bytes = itemsize * min(most_ys, fit.columns)
        return _nbytes(sweep, fit.parts, fit.rows, fit.block_n, y_bytes) > _SHARED_BYTES

    while any(map(is_too_large, at_once)):
        if any(part.config.expand_stages > 1 for part in fit.parts):
            fit = fit._replace(parts=_with(fit.parts, expand_stages=1))
        elif fit.rows > TILE and fit.block_n <= 32:
            # With still fewer columns, wgmma would mostly wait for v.
            again = _Fit.of(_with(given.parts, expand_row_tiles=1), given.columns)
            return _fitting(again, at_once, most_ys, itemsize)
        elif fit.block_n > 8:
            fit = fit._replace(block_n=max(8, fit.block_n // 16 * 8))
        elif fit.columns > 1:
            fit = fit._replace(columns=1)
        else:
            break  # more adapters of the highest ranks at once than fit, which Mosaic refuses
    return fit


def _together(
    sweeps: tuple[_Sweep, ...], fit: _Fit, y_bytes: int, add_inputs: bool
) -> _Sweep | None:
    """One sweep of all ranges, if they are several, each has one sweep, and all fit."""
    ranges = {fit.parts[sweep.parts[0]].slots.first for sweep in sweeps}
    of_all = tuple(i for sweep in sweeps for i in sweep.parts)
    short = tuple(_with_short_ring(part) for part in fit.parts)
    fits = _nbytes(of_all, short, fit.rows, fit.block_n, y_bytes) <= _SHARED_BYTES
    return _Sweep(of_all, add_inputs) if 1 < len(sweeps) == len(ranges) and fits else None


def _nbytes(
    sweep: tuple[int, ...], parts: tuple[ExpandPart, ...], rows: int, block_n: int, y_bytes: int
) -> int:
    """Shared memory of a sweep of these parts; `y_bytes` is what an element of y takes in all
    stages of its ring."""
    memory = [
        ref for i in sweep for ref in _part_memory(parts[i], rows, block_n) if ref is not None
    ]
    memory += [route_size(part.slots.slots, rows).memory for part in parts]
    return shared_bytes(memory) + rows * block_n * y_bytes


def _with(parts: tuple[ExpandPart, ...], **fields: int) -> tuple[ExpandPart, ...]:
    """The parts, with these fields in their configs."""
    return tuple(p._replace(config=dataclasses.replace(p.config, **fields)) for p in parts)


class _PartMemory(NamedTuple):
    """A part's arrays in shared memory.

    Attributes:
      v: `[rows, max(R, 16)]`.
      b: a ring, `[stages, wide, R]`: the adapters of a round one below the other. For rank 8 in
        8 bits it is `[stages, pairs, 16]`.
      wide_b: `[wide, max(R, 16)]`, only where R is 8, or B in 8 bits. Rows of 16 bytes cannot be
        swizzled, wgmma's K is 16, and it has no product with 8 bits. So B goes through here, with
        zeros behind its 8 ranks.
    """

    v: Ref
    b: Ref
    wide_b: Ref | None = None


def _stacked(config: Config, rows: int, width: int) -> int:
    """Adapters that a block multiplies at once with `width` columns."""
    return min(config.expand_stack, MAX_COLUMNS * TILE // rows // width)


def _part_memory(part: ExpandPart, rows: int, width: int) -> _PartMemory:
    """The shared memory to ask for, where a block takes `width` columns at once."""
    (_, width_v), dtype, rank = part.v.shape, part.v.dtype, part.lora_b.shape[2]
    wide, stages = _stacked(part.config, rows, width) * width, part.config.expand_stages
    v: Memory = plgpu.SMEM((rows, width_v), dtype, transforms=operand_layout(dtype, width_v))
    if is_eight_bits(part.lora_b.dtype):
        wide_b = plgpu.SMEM((wide, width_v), dtype, transforms=operand_layout(dtype, width_v))
        return _PartMemory(v, _ring_of_eight_bits(part, wide, width), wide_b)
    if rank > 8:
        layout = operand_layout(dtype, rank)
        return _PartMemory(v, plgpu.SMEM((stages, wide, rank), dtype, transforms=layout))
    wide = -(-wide // TILE) * TILE  # B passes through registers, whose WGMMA layout has 64 rows
    wide_b = plgpu.SMEM((wide, 16), dtype, transforms=operand_layout(dtype, 16))
    return _PartMemory(v, plgpu.SMEM((stages, wide, rank), dtype), wide_b)


def _ring_of_eight_bits(part: ExpandPart, wide: int, width: int) -> Memory:
    """The ring of B in 8 bits, of `wide` rows of which `width` have the same adapter."""
    stages, rank, dtype = part.config.expand_stages, part.lora_b.shape[2], part.lora_b.dtype
    if _in_pairs(part):
        return plgpu.SMEM((stages, wide // width * pairs_of(width), PAIR), dtype)
    return plgpu.SMEM((stages, wide, rank), dtype, transforms=eight_bit_layout(rank))


# --------------------------------------------------------------------------------- a block


class _Inputs(NamedTuple):
    """A part's operands in device memory, and the barriers of its ring of B."""

    v: Ref
    b: Ref
    table: Ref
    b_loaded: Ref


class _Launched(NamedTuple):
    """What every block of a launch has: the plan, y in device memory, each part's inputs, and the
    barriers of routes, of a sweep's v, and of each stage of y's ring."""

    plan: _Plan
    y: Ref
    inputs: list[_Inputs]
    routes_loaded: Ref
    v_loaded: Ref
    y_loaded: Ref


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block owns: `count` times `width` columns of y from `column` on, of `rows` tokens from
    `row_start` on; `route`: its row in the tables of routes. Where `is_spare`, that has a further
    portion of a tile, and only the route tells which tokens and columns the block owns."""

    launched: _Launched
    cut: _CutPlan
    width: int
    column: Array
    count: Array
    route: Array
    row_start: Array
    is_spare: Bool[Array, ""] | bool

    def placed(self, route: Route) -> "_Block":
        """The block once its route is here."""
        plan = self.launched.plan
        if not plan.portions.spare:
            return self
        first = route.first_step()
        return dataclasses.replace(
            self,
            column=self.column + first * self.width,
            count=jnp.clip(self.count - first, 0, route.steps()),
            row_start=route.tile() * plan.rows,
        )

    def early(self, run: Callable[[], None]) -> None:
        """run() if the block knows its tokens before the route is here."""
        if not self.launched.plan.portions.spare:
            return run()
        pl.when(jnp.logical_not(self.is_spare))(run)


def _block_body(plan: _Plan, y_ref: Ref, *refs: Ref) -> None:
    """What every block runs: finds the columns that it owns, and adds to them."""
    operands = itertools.batched(refs[: 3 * len(plan.parts)], 3)
    routes_loaded, v_loaded, y_loaded, *b_loaded = refs[3 * len(plan.parts) :]
    inputs = [_Inputs(v, b, table, loaded) for (v, b, table), loaded in zip(operands, b_loaded)]
    launched = _Launched(plan, y_ref, inputs, routes_loaded, v_loaded, y_loaded)
    place, block = lax.axis_index("tile"), lax.axis_index("block")
    route: Array = place
    is_spare: Array | bool = False
    if spare := plan.portions.spare:  # these start first, as they take long
        is_spare = place < spare
        route = jnp.where(is_spare, place + plan.tiles, place - spare)

    def run(cut: _CutPlan, width: int, column: Array, count: Array) -> None:
        row_start = route * plan.rows
        _run_block(_Block(launched, cut, width, column, count, route, row_start, is_spare))

    first = 0
    for cut in plan.cuts:
        start = cut.cut.start
        if cut.whole:
            nth = (block - first) * plan.columns
            column = start + nth * plan.block_n
            count = jnp.minimum(cut.whole - nth, plan.columns)
            pl.when((block >= first) & (block < first + cut.groups))(
                functools.partial(run, cut, plan.block_n, column, count)
            )
        if cut.rest:
            column = jnp.int32(start + cut.whole * plan.block_n)
            pl.when(block == first + cut.groups)(
                functools.partial(run, cut, cut.rest, column, jnp.int32(1))
            )
        first += cut.blocks


def _run_block(block: _Block) -> None:
    """Gives a block the shared memory of its ring of y and of its routes, and lets it work."""
    plan, cut = block.launched.plan, block.cut.cut
    itemsize = jnp.dtype(plan.dtype).itemsize

    def run(y_smem: list[Ref], *words: Ref) -> None:
        route_of = {i: Route(of, plan.rows) for i, of in zip(cut.parts, words)}
        _take_sweeps(block, _YRing(block, y_smem, route_of[cut.parts[0]]), route_of)

    pl.run_scoped(
        run,
        [
            plgpu.SMEM(
                (plan.y_stages, plan.rows, size),
                plan.dtype,
                transforms=plain_layout(size * itemsize),
            )
            for _, size in plan.y_bands(block.width)
        ],
        *(plan.route_size(i).memory for i in cut.parts),
    )


# ----------------------------------------------------------------------------------- sweeps


def _take_sweeps(block: _Block, ring: "_YRing", route_of: dict[int, Route]) -> None:
    """Copies the routes, then takes the sweeps in which some token has an adapter."""
    launched, sweeps = block.launched, block.cut.sweeps
    plan, cut = launched.plan, block.cut.cut
    for i in cut.parts:
        route_of[i].fetch(launched.inputs[i].table, block.route, launched.routes_loaded)
    for _ in range(plan.copies_of_routes(cut), plan.route_arrivals):
        plgpu.barrier_arrive(launched.routes_loaded)
    if len(sweeps) == 1:
        pl.run_scoped(
            functools.partial(_only_sweep, block, ring, route_of), _sweep_memory(block, cut.parts)
        )
    else:
        block.early(ring.fetch_early)
        plgpu.barrier_wait(launched.routes_loaded)
        placed = block.placed(route_of[cut.parts[0]])
        routed = ring.routed(placed, _is_used(cut.parts, route_of))
        if block.cut.together is None:
            _range_after_range(placed, routed, route_of)
        else:
            most = _most_adapters(cut.parts, route_of)
            few = (most > 0) & (most <= _FEW_ADAPTERS)
            pl.when(few)(functools.partial(_ranges_together, placed, routed, route_of))
            pl.when(~few)(functools.partial(_range_after_range, placed, routed, route_of))
    ring.wait_for_unused(~_is_used(cut.parts, route_of))


def _only_sweep(
    block: _Block, ring: "_YRing", route_of: dict[int, Route], memory: list[_PartMemory]
) -> None:
    """All parts at once. Only further portions wait for the routes to ask for v and y."""
    launched, [sweep] = block.launched, block.cut.sweeps

    def fetch_v(block: _Block) -> None:
        _fetch_v(block, sweep.parts, memory)

    block.early(functools.partial(fetch_v, block))
    block.early(ring.fetch_early)
    plgpu.barrier_wait(launched.routes_loaded)
    placed, used = block.placed(route_of[sweep.parts[0]]), _is_used(sweep.parts, route_of)
    if launched.plan.portions.spare:
        pl.when(used & block.is_spare)(functools.partial(fetch_v, placed))
    routed = ring.routed(placed, used)
    pl.when(used)(functools.partial(_add_sweep, placed, routed, route_of, sweep, memory))
    pl.when(~used)(lambda: block.early(lambda: plgpu.barrier_wait(launched.v_loaded)))


def _range_after_range(block: _Block, ring: "_YRing", route_of: dict[int, Route]) -> None:
    """The sweeps in which some token has an adapter."""
    for n, sweep in enumerate(block.cut.sweeps):
        pl.when(_is_used(sweep.parts, route_of))(
            functools.partial(_one_of_several, block, ring, route_of, n)
        )


def _ranges_together(block: _Block, ring: "_YRing", route_of: dict[int, Route]) -> None:
    """All ranges in one sweep. v is copied of those that have tokens here."""
    sweep = block.cut.together
    assert sweep is not None

    def run(memory: list[_PartMemory]) -> None:
        _fetch_v(block, sweep.parts, memory, route_of)
        _add_parts(block, ring, route_of, sweep, memory, at_once=1, short=True)

    pl.run_scoped(run, _sweep_memory(block, sweep.parts, short=True))


def _one_of_several(block: _Block, ring: "_YRing", route_of: dict[int, Route], n: int) -> None:
    """Sweep n, some of whose adapters the tokens have. Then y comes anew if a later sweep adds."""
    sweep, later = block.cut.sweeps[n], block.cut.sweeps[n + 1 :]

    def run(memory: list[_PartMemory]) -> None:
        _fetch_v(block, sweep.parts, memory)
        _add_sweep(block, ring, route_of, sweep, memory)

    pl.run_scoped(run, _sweep_memory(block, sweep.parts))
    if used := [_is_used(other.parts, route_of) for other in later]:
        pl.when(functools.reduce(jnp.logical_or, used))(ring.fetch_again)


def _sweep_memory(
    block: _Block, parts: tuple[int, ...], *, short: bool = False
) -> list[_PartMemory]:
    """The shared memory to ask for in a sweep of these parts, with `short` rings or whole ones."""
    plan = block.launched.plan
    given = [_with_short_ring(plan.parts[i]) if short else plan.parts[i] for i in parts]
    return [_part_memory(part, plan.rows, block.width) for part in given]


def _is_used(parts: tuple[int, ...], route_of: dict[int, Route]) -> Bool[Array, ""]:
    """Whether some token has an adapter of these parts."""
    return _most_adapters(parts, route_of) > 0


def _most_adapters(parts: tuple[int, ...], route_of: dict[int, Route]) -> Int[Array, ""]:
    """How many adapters of one of these parts the tokens have, at most."""
    return functools.reduce(jnp.maximum, [route_of[i].count() for i in parts])


def _fetch_v(
    block: _Block, parts: tuple[int, ...], memory: list[_PartMemory],
    route_of: dict[int, Route] | None = None,
) -> None:  # fmt: skip
    """Starts to copy v of a sweep's parts; with `route_of` of those that have tokens."""
    launched = block.launched
    rows = pl.ds(block.row_start, launched.plan.rows)
    for i, of_part in zip(parts, memory):
        copy = functools.partial(
            plgpu.copy_gmem_to_smem, launched.inputs[i].v.at[rows], of_part.v, launched.v_loaded
        )
        if route_of is None:
            copy()
            continue
        pl.when(route_of[i].count() > 0)(copy)
        pl.when(route_of[i].count() == 0)(lambda: plgpu.barrier_arrive(launched.v_loaded))
    for _ in range(len(parts), launched.plan.v_arrivals):
        plgpu.barrier_arrive(launched.v_loaded)


def _add_sweep(
    block: _Block, ring: "_YRing", route_of: dict[int, Route], sweep: _Sweep,
    memory: list[_PartMemory],
) -> None:  # fmt: skip
    """Adds the parts of a sweep, with several adapters of a part at once if the tile has them."""
    configs = [block.launched.plan.parts[i].config for i in sweep.parts]
    add = functools.partial(_add_parts, block, ring, route_of, sweep, memory)
    if max(config.expand_stack for config in configs) == 1:
        return add(at_once=1)
    most = _most_adapters(sweep.parts, route_of)
    # wgmma would multiply with what is there of other adapters. T=1024, 8 adapters of R=16, one in
    # most tiles: 15.4 us with one, 18.1 with four.
    pl.when(most == 1)(functools.partial(add, at_once=1))
    pl.when(most > 1)(functools.partial(add, at_once=MAX_COLUMNS))


def _add_parts(
    block: _Block, ring: "_YRing", route_of: dict[int, Route], sweep: _Sweep,
    memory: list[_PartMemory], *, at_once: int, short: bool = False,
) -> None:  # fmt: skip
    """Adds the parts of a sweep to all columns of the block, `width` of them at a time. `short`:
    with short rings of B."""
    launched = block.launched
    of_ranges: dict[int, list[_BRing]] = {}
    for i, of_part in zip(sweep.parts, memory):
        ring_of_b = _BRing.of(block, i, route_of[i], of_part, at_once, short)
        ring_of_b.fetch_first()
        of_ranges.setdefault(launched.plan.parts[i].slots.first, []).append(ring_of_b)
    used = [of_range[0].ids >= 0 for of_range in of_ranges.values()]
    touched = functools.reduce(jnp.logical_or, used)
    plgpu.barrier_wait(launched.v_loaded)

    def add(n: Array, _: None) -> None:
        delta = zeros = jnp.zeros((launched.plan.rows, block.width), jnp.float32)
        for nth, (mine, of_range) in enumerate(zip(used, of_ranges.values())):
            if len(of_range) == 1:
                delta = of_range[0].delta(n, delta)
                continue
            own = functools.reduce(jnp.add, [of_b.delta(n, zeros) for of_b in of_range])
            mask = lax.broadcast_in_dim(mine, zeros.shape, (0,))
            delta = jnp.where(mask, own, delta) if nth else own
        ring.put(n, delta, touched, adds=sweep.adds)

    lax.fori_loop(0, block.count, add, None)
    plgpu.wait_smem_to_gmem(0)


# ------------------------------------------------------------------------- the rings of y and B


class _YRing(NamedTuple):
    """A block's columns of y on their way, in shared memory: `[stages, rows, size]` for each band
    of `width` columns. Columns n are in stage n modulo stages; its barrier says that they came.

    TMA copies whole tiles. Where the route says that the tokens do not lie side by side, lanes copy
    row by row instead.
    """

    block: _Block
    memory: list[Ref]
    route: Route
    is_scattered: Bool[Array, ""] | bool = False  # before the route is here nothing tells

    @property
    def stages(self) -> int:
        return self.block.launched.plan.y_stages

    @property
    def bands(self) -> list[Band]:
        return self.block.launched.plan.y_bands(self.block.width)

    def start_of(self, n: Array | int, band: Band) -> Array:
        """The first column of y in a band of columns n."""
        return self.block.column + n * self.block.width + band.first

    def band_of_y(self, n: Array | int, band: Band) -> Ref:
        """A tile's band of columns n in device memory."""
        block, rows = self.block, self.block.launched.plan.rows
        columns = pl.ds(self.start_of(n, band), band.size)
        return block.launched.y.at[pl.ds(block.row_start, rows), columns]

    def either(self, tile: Callable[[], None], rows: Callable[[], None]) -> None:
        """tile(), or rows() where the tokens do not lie side by side."""
        if not self.block.launched.plan.sorts:
            return tile()
        pl.when(jnp.logical_not(self.is_scattered))(tile)
        pl.when(self.is_scattered)(rows)

    def fetch(self, n: Array | int, slot: Array | int) -> None:
        """Starts to copy columns n of a tile."""
        loaded = self.block.launched.y_loaded.at[slot]
        for band, memory in zip(self.bands, self.memory):
            plgpu.copy_gmem_to_smem(self.band_of_y(n, band), memory.at[slot], loaded)
        for _ in range(len(self.bands), self.block.launched.plan.y_arrivals):
            plgpu.barrier_arrive(loaded)

    def fetch_first(self) -> None:
        """Starts to copy as many columns of a tile as there are stages."""
        for n in range(self.stages):
            pl.when(n < self.block.count)(functools.partial(self.fetch, n, n))

    def fetch_early(self) -> None:
        """As `fetch_first`, of the columns that do not wait for the route."""
        for n in range(self.block.launched.plan.y_early):
            pl.when(n < self.block.count)(functools.partial(self.fetch, n, n))

    def fetch_late(self) -> None:
        """As `fetch_first`, of the other columns."""
        for n in range(self.stages):
            is_late = self.block.is_spare | (n >= self.block.launched.plan.y_early)
            pl.when(is_late & (n < self.block.count))(functools.partial(self.fetch, n, n))

    def fetch_rows(self, n: Array, slot: Array, is_more: Bool[Array, ""]) -> None:
        """Starts to copy columns n row by row, if there `is_more`; in either case one group."""
        plan = self.block.launched.plan

        @pl.when(is_more)
        def copy() -> None:
            for band, memory in zip(self.bands, self.memory):
                lanes.fetch(
                    memory.at[slot], plain_layout(band.size * jnp.dtype(plan.dtype).itemsize),
                    self.y_of_lanes, self.tokens, self.start_of(n, band),
                )  # fmt: skip

        end_group()

    @property
    def y_of_lanes(self) -> lanes.Array:
        plan = self.block.launched.plan
        return lanes.Array(self.block.launched.y, plan.dtype, *plan.y_shape)

    @property
    def tokens(self) -> lanes.Tokens:
        plan = self.block.launched.plan
        return lanes.Tokens(self.route.words, plan.rows, plan.y_shape[0])

    def fetch_first_rows(self) -> None:
        """As `fetch_first`, row by row."""

        def fetch(n: Array, _: None) -> None:
            self.fetch_rows(n, n, n < self.block.count)

        lax.fori_loop(0, self.stages, fetch, None)

    def fetch_again(self) -> None:
        """The first columns once more, with what was stored."""
        self.either(self.fetch_first, self.fetch_first_rows)

    def routed(self, placed: _Block, used: Bool[Array, ""]) -> "_YRing":
        """The ring of the `placed` block once its route is here, which tells whether the tokens lie
        side by side.

        Copies of early columns did not wait for the route, and took consecutive tokens. Where the
        tokens are others, these columns come anew, row by row.
        """
        plan, ring = placed.launched.plan, self._replace(block=placed)
        if plan.sorts:
            ring = ring._replace(is_scattered=self.route.is_scattered())

            @pl.when(used & ring.is_scattered)
            def change() -> None:
                self.block.early(self.wait_for_early)
                ring.fetch_first_rows()

        if plan.portions.spare:
            pl.when(used & jnp.logical_not(ring.is_scattered))(ring.fetch_late)
        return ring

    def put(
        self, n: Array, delta: Float[Array, "rows width"], touched: Bool[Array, " rows"], *,
        adds: bool,
    ) -> None:  # fmt: skip
        """Adds delta, in registers, to the `touched` rows of columns n, or puts it in their place.
        Then stores these columns, and asks for later ones."""
        plan = self.block.launched.plan
        slot = lax.rem(n, jnp.int32(self.stages))
        self.either(
            lambda: plgpu.barrier_wait(self.block.launched.y_loaded.at[slot]),
            lambda: wait_for_groups(max(0, self.stages - 2)),
        )
        for (first, size), memory in zip(self.bands, self.memory):
            here = memory.at[slot]
            old = plgpu.load(here, layout=plgpu.Layout.WGMMA, optimized=False)
            new = delta[:, first : first + size]
            if adds:
                new = old.astype(jnp.float32) + new
            mask = lax.broadcast_in_dim(touched, (plan.rows, size), (0,))
            here[...] = jnp.where(mask, new.astype(plan.dtype), old)
        plgpu.commit_smem()
        self.either(
            functools.partial(self.store_tile, n, slot), functools.partial(self.store_rows, n, slot)
        )

    def store_tile(self, n: Array, slot: Array) -> None:
        """Starts to store columns n, and to copy later ones to the place of those before."""
        for band, memory in zip(self.bands, self.memory):
            plgpu.copy_smem_to_gmem(memory.at[slot], self.band_of_y(n, band))
        if self.stages > 1:
            plgpu.wait_smem_to_gmem(len(self.bands), wait_read_only=True)
            ahead = n + (self.stages - 1)
            pl.when((n > 0) & (ahead < self.block.count))(
                lambda: self.fetch(ahead, lax.rem(ahead, jnp.int32(self.stages)))
            )

    def store_rows(self, n: Array, slot: Array) -> None:
        """As `store_tile`, row by row."""
        itemsize = jnp.dtype(self.block.launched.plan.dtype).itemsize
        for band, memory in zip(self.bands, self.memory):
            lanes.store(
                memory.at[slot], plain_layout(band.size * itemsize), self.y_of_lanes, self.tokens,
                self.start_of(n, band),
            )  # fmt: skip
        if self.stages > 1:
            ahead = n + (self.stages - 1)
            is_more = (n > 0) & (ahead < self.block.count)
            self.fetch_rows(ahead, lax.rem(ahead, jnp.int32(self.stages)), is_more)

    def wait_for_early(self) -> None:
        """Waits for the columns of `fetch_early`."""
        for n in range(self.block.launched.plan.y_early):
            pl.when(n < self.block.count)(
                functools.partial(plgpu.barrier_wait, self.block.launched.y_loaded.at[n])
            )

    def wait_for_unused(self, unused: Bool[Array, ""]) -> None:
        """If the columns are `unused`, waits for the early ones: a block must not end before what
        it has copied is here."""
        pl.when(unused)(lambda: self.block.early(self.wait_for_early))


class _BRing(NamedTuple):
    """A part's B on its way, in shared memory.

    Items come one after the other: for columns 0 all rounds of the tile's adapters, then for
    columns 1, and so on. A round has a few adapters. Item k is in stage k modulo stages, whose
    barrier says that it came.

    Attributes:
      part: the part, with a ring as in memory.
      arrivals: at the barrier of a stage.
      inputs: its operands, of which B is read, and the barriers.
      memory: v and the ring.
      route: of the block.
      ids: each row's adapter, in registers.
      feature: first row of B.
      width: rows of B, which are columns of y, in an item.
      stack: adapters in an item.
      rounds: items of the same columns.
      total: all items of the block.
    """

    part: ExpandPart
    arrivals: int
    inputs: _Inputs
    memory: _PartMemory
    route: Route
    ids: Int[Array, " rows"]
    feature: Array
    width: int
    stack: int
    rounds: Array
    total: Array

    @classmethod
    def of(
        cls, block: _Block, i: int, route: Route, memory: _PartMemory, at_once: int, short: bool
    ) -> "_BRing":
        """The ring of part i, with `at_once` adapters in an item, at most."""
        whole = block.launched.plan.parts[i]
        part = _with_short_ring(whole) if short else whole
        stack = min(at_once, _stacked(part.config, route.rows, block.width))
        rounds = route.rounds(stack)
        return cls(
            part, whole.config.expand_stack, block.launched.inputs[i], memory, route, route.ids(),
            block.column - part.y_offset, block.width, stack, rounds, block.count * rounds,
        )  # fmt: skip

    @property
    def stages(self) -> int:
        return self.part.config.expand_stages

    def fetch(self, item: Array | int, slot: Array | int) -> None:
        """Starts to copy an item. What is not copied arrives."""
        loaded = self.inputs.b_loaded.at[slot]
        n, nth = lax.div(jnp.int32(item), self.rounds), lax.rem(jnp.int32(item), self.rounds)
        first, count = self.feature + n * self.width, self.width
        if _in_pairs(self.part):  # whole 128 bytes; rows behind the item's are not used
            first, count = lax.div(first, jnp.int32(2)), pairs_of(count)

        def copy(j: int, adapter: Array) -> None:
            place = place_of(adapter, self.part.shared)
            plgpu.copy_gmem_to_smem(
                self.inputs.b.at[place, pl.ds(first, count)],
                self.memory.b.at[slot, pl.ds(j * count, count)],
                loaded,
            )

        for j in range(self.stack):
            adapter = self.route.adapter(nth * self.stack, j)
            pl.when(adapter >= 0)(functools.partial(copy, j, adapter))
            pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(loaded))
        for _ in range(self.stack, self.arrivals):
            plgpu.barrier_arrive(loaded)

    def fetch_first(self) -> None:
        """Starts to copy as many items as there are stages."""
        for item in range(self.stages):
            pl.when(item < self.total)(functools.partial(self.fetch, item, item))

    def delta(self, n: Array, before: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
        """Each row's product with its adapter in columns n, or, without one, what `before` has; in
        registers. To be asked for in order."""
        return lax.fori_loop(0, self.rounds, functools.partial(self.add_round, n), before)

    def add_round(self, n: Array, nth: Array, delta: Array) -> Array:
        """`delta` with the products of the rows whose adapters are in round `nth`."""
        item = n * self.rounds + nth
        slot = lax.rem(item, jnp.int32(self.stages))
        plgpu.barrier_wait(self.inputs.b_loaded.at[slot])
        operand = self.operand(slot)

        def product(acc: Ref) -> Array:
            plgpu.wgmma(acc, self.memory.v, operand.T)
            return acc[...]

        wide = self.stack * self.width
        products = pl.run_scoped(product, accumulator(self.route.rows, wide))
        for j in range(self.stack):
            mine = row_mask(self.ids, self.route.adapter(nth * self.stack, j), self.width)
            delta = jnp.where(mine, products[:, j * self.width : (j + 1) * self.width], delta)
        ahead = item + self.stages
        pl.when(ahead < self.total)(lambda: self.fetch(ahead, slot))
        return delta

    def operand(self, slot: Array) -> Ref:
        """B of an item as wgmma takes it, in shared memory."""
        wide, wide_b = self.stack * self.width, self.memory.wide_b
        used = pl.ds(0, wide)
        if wide_b is None:
            return self.memory.b.at[slot, used]
        if is_eight_bits(self.part.lora_b.dtype):
            here = self.memory.b.at[slot]
            if _in_pairs(self.part):
                widen_pairs(here, wide_b, self.stack, self.width)
            else:
                widen_rows(here, wide_b, wide, math.gcd(wide_b.shape[1], 64))
            return wide_b.at[used]
        b = plgpu.load(self.memory.b.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
        wide_b[...] = jnp.concatenate([b, jnp.zeros_like(b)], axis=1)
        plgpu.commit_smem()
        return wide_b.at[used]
