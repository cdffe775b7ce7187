"""y += scale * (x A^T) B^T in one launch, for few tokens: a cluster per 8 tokens of one adapter.
Or one half of it: v += scale * x A^T, y += v B^T.

The blocks of a cluster divide H among themselves, and their warps divide a block's share. A warp
has a ring of copies on their way: first its columns of A and x, then its rows of B and columns of
y. The latter come while sums are exchanged. A warp reads only what it copied itself. So warps wait
for each other only to add up sums.
"""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float
from jaxtyping import Int as Ints

from pallas_kernels.mosaic_gpu.decode.exchange import exchange, load_v
from pallas_kernels.mosaic_gpu.decode.expand import Expand
from pallas_kernels.mosaic_gpu.decode.lane import Lane, Refs, Seated, Stacks, Task
from pallas_kernels.mosaic_gpu.decode.load import CopiesOfA
from pallas_kernels.mosaic_gpu.decode.plan import DecodePart, Plan, Y
from pallas_kernels.mosaic_gpu.decode.seating import find
from pallas_kernels.mosaic_gpu.decode.shrink import put_sums, shrink
from pallas_kernels.mosaic_gpu.decode.work import Job, Range
from pallas_kernels.mosaic_gpu.lanes import ArrayMemory, Emulator, Gpu, Left, MemRef
from pallas_kernels.mosaic_gpu.lanes.values import Flag, Int, Ref
from pallas_kernels.mosaic_gpu.layouts import body_of, in_place, interpreted

# ------------------------------------------------------------------------------- a cluster's life


def run_cluster(lane: Lane, cluster: Int, column_block: Int, refs: Refs) -> None:
    """Finds the cluster's tokens, and does those jobs whose adapters they use."""
    m, work = lane.m, lane.work
    for layer in refs.layer:  # it comes while the tokens are found
        lane = lane._replace(layer=m.load(m.address(layer, m.integer(0), 1), 0, lane.always))
    found = find(lane, cluster, column_block, refs.ids)
    # Where clusters without tokens leave later, nothing depends on whether there are any.
    when = _do if work.leaves else m.when

    def run() -> None:
        tokens = found.seat()
        if len(work.jobs) > 1:
            m.begun()
        adapters = _adapters(lane, tokens)
        ran: list[Flag] = []
        for number, job in enumerate(work.jobs):
            uses, slot = adapters[mine := work.range_of(number)]
            nth = found.column_block - job.cluster
            here = m.tid >= 0
            if len(work.ranges) > 1:  # else the tokens' id is in the one that there is
                here = uses
            if job.clusters < work.dealt(mine):
                here = here & (nth >= 0) & (nth < job.clusters)
            do = functools.partial(
                _run_job, lane, number, nth, slot, tokens, found.active, ran, refs
            )
            ran.append(here)
            when(here, do)

    when(found.active, run)


def _do(_: Flag, do: Callable[[], None]) -> None:
    do()


def _adapters(lane: Lane, tokens: Seated) -> dict[Range, tuple[Flag, Int]]:
    """For each range of ids, whether the tokens' id is in it, and the slot of their adapter."""
    m, found = lane.m, dict[Range, tuple[Flag, Int]]()
    for one in lane.work.ranges:
        adapter = tokens.id - one.first if one.first else tokens.id
        uses = adapter >= 0
        if len(lane.work.ranges) > 1:
            uses = uses & (adapter < one.slots)
        found[one] = uses, m.select(uses, adapter, 0)
    return found


def _run_job(
    lane: Lane, number: int, nth: Int, slot: Int, tokens: Seated, active: Flag,
    ran: Sequence[Flag], refs: Refs,
) -> None:  # fmt: skip
    """The life of a cluster's tokens in one job: A, sums, exchange, B, y."""
    m, work, case = lane.m, lane.work, lane.case
    earlier = [ran[n] for n in work.earlier(number)]
    if earlier and case.shrinks:
        # All blocks are done with the sums that they received.
        m.when(functools.reduce(operator.or_, earlier), m.cluster_barrier)
    job = work.jobs[number]
    stacks = _stacks(lane, job, slot, refs)
    task = Task(number, job, nth, tokens, active, ran, stacks)
    copies, expand = CopiesOfA(lane, task, refs.x), Expand(lane, task, refs)
    sums = shrink(lane, task, copies, expand.find_rows) if case.shrinks else []
    m.warp_barrier()
    expand.find_rows()
    for bundle, acc in zip(job.bundles, sums):
        put_sums(lane, bundle, acc)
    if case.expands:
        expand.first_copies(job.strips[0])
    if case.shrinks:
        exchange(lane, task, refs)
    else:
        load_v(lane, task, refs.x)
    if not case.expands:
        return
    if work.own_v:
        m.warp_barrier()
    elif not work.scatters:
        m.barrier()
    expand.run()


def _stacks(lane: Lane, job: Job, slot: Int, refs: Refs) -> Stacks:
    """Where the adapter's A and B are, and its scales."""
    m, case, stacks = lane.m, lane.case, Stacks({}, {}, {}, {})
    for p in job.parts:
        part, mine = case.parts[p], refs.parts[p]
        adapter = slot + lane.layer * part.range.slots
        of_a, of_b = (adapter // n if n > 1 else adapter for n in part.sharing)
        if case.shrinks:
            stacks.a[p] = m.address(mine[0], of_a, part.rank * case.features)
            if case.is_eight_bits:
                own = slot * part.rank + lane.layer * part.scales
                stacks.factors[p] = m.ahead(m.address(mine[-1], own, 1), part.first_scale)
            else:
                own = slot + lane.layer * part.scales
                scale = m.address(mine[-1], own, 1 if part.own_scales else 0)
                stacks.scales[p] = m.as_real(m.load(scale, part.first_scale, lane.always))
        if case.expands:
            b = mine[1 if case.shrinks else 0]
            stacks.b[p] = m.address(b, of_b, part.rank * part.width)
    return stacks


# ------------------------------------------------------------------------------------- the launch

_NAMES = {
    (True, True): "lora",
    (True, False): "lora_decode_shrink",
    (False, True): "lora_decode_expand",
}


def decode_kernel(
    ys: tuple[Y, ...],
    x: Float[Array, "T H"],
    ids: Ints[Array, " T"] | Ints[Array, "T 2"] | Ints[Array, "clusters 10"],
    parts: tuple[DecodePart, ...],
    plan: Plan,
    layer: Ints[Array, ""] | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """Adds `scales * (x A^T) B^T` of a token's adapter, for each part that has it, to the ys.

    The sum is rounded once for each part that adds to a token's columns. A token whose id is in no
    part's range keeps its ys.

    Args:
      ys: arrays, changed in place where XLA can; or shapes, with a plan without `add_inputs`: new
        arrays then hold what the parts add, undefined in elements that no part adds to.
      x: `[T, H]`, in the dtype of A; or v, of parts without A. The ys may have a multiple of T
        rows, for as many tokens: token n reads row n % T.
      ids: `[T]`; `[T, 2]`, words of 64-bit ids, the low one first; or, of a seated plan, the table
        of `Seating`.
      parts: those that the plan was made of.
      plan: by `plan`.
      layer: whose stacks to read, where the parts have those of several layers. An operand, so that
        XLA need not slice the stacks in a loop over layers, which copies them.
    """
    which = () if layer is None else (layer.reshape(1),)
    operands = x, ids, *which, *(array for part in parts for array in part.operands)
    made = tuple(y for y in ys if isinstance(y, jax.ShapeDtypeStruct))
    given = tuple(y for y in ys if not isinstance(y, jax.ShapeDtypeStruct))
    if interpreted():
        # NaN shows who reads what is undefined.
        given = given or tuple(jnp.full(y.shape, jnp.nan, y.dtype) for y in made)
        shapes = tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys)
        run = functools.partial(_emulate, plan)
        return jax.pure_callback(run, shapes, *given, *operands, vmap_method="sequential")
    dtypes = [jnp.dtype(array.dtype) for array in (*ys, *operands)]
    kernel = _launch(plan, dtypes, made)
    return tuple(kernel(*operands)) if made else in_place(kernel, given, *operands)


def _launch(plan: Plan, dtypes: list[np.dtype], made: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """The kernel, a function of refs of ys, unless they are `made`, and of the operands."""
    work, num_ys = plan.work, len(plan.work.case.y_widths)

    def body(*refs: Any) -> None:
        if made:  # outputs come behind the operands
            first = len(dtypes) - num_ys
            refs = (*refs[first:-1], *refs[:first], refs[-1])
        places = [lax.axis_index(name) for name in ("cluster", "columns", "share")]

        @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
            arg_types=(*[plgpu.RefType()] * len(refs), *[plgpu.Layout.WG_SPLAT] * 3)
        )
        def inline(_: Any, *args: Any) -> None:
            m = Gpu(args[len(dtypes)])
            cluster, columns, share = (m.uniform(place) for place in args[-3:])
            arrays = [MemRef(*array) for array in zip(args, dtypes)]
            lane = Lane.of(m, plan, share)
            run_cluster(lane, cluster, columns, _sorted_out(arrays, plan))

        inline(*refs, *places)

    case = work.case
    name = "_".join([_NAMES[case.shrinks, case.expands], *(f"r{p.rank}" for p in case.parts)])
    groups = work.warps // 4
    threads: dict[str, Any] = dict(num_threads=groups, thread_name="group") if groups > 1 else {}
    return plgpu.kernel(
        body_of(body),
        out_type=made,
        scratch_types=[plgpu.SMEM((plan.memory.words,), jnp.int32)],
        grid=work.grid,
        grid_names=("cluster", "columns"),
        cluster=(work.split,),
        cluster_names=("share",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
        **threads,
    )


def _sorted_out(arrays: Sequence[Ref], plan: Plan) -> Refs:
    """ys, x, ids, the layer's number, and each part's stacks and scales."""
    case = plan.work.case
    num_ys, first = len(case.y_widths), 1 if case.layers > 1 else 0
    ys, (x, ids, *rest) = arrays[:num_ys], arrays[num_ys:]
    layer, stacks = rest[:first], rest[first:]
    return Refs(ys, x, ids, layer, list(itertools.batched(stacks, len(stacks) // len(case.parts))))


def _emulate(plan: Plan, *arrays: Array) -> tuple[np.ndarray, ...]:
    """The kernel carried out in numpy, a cluster after the other."""
    work, memory = plan.work, ArrayMemory([np.asarray(array) for array in arrays])
    refs = _sorted_out(memory.refs, plan)
    for cluster, columns in itertools.product(*map(range, work.grid)):
        m = Emulator(memory, plan.memory.words, work.split, 32 * work.warps)
        lane = Lane.of(m, plan, m.block)
        with contextlib.suppress(Left):
            run_cluster(lane, m.integer(cluster), m.integer(columns), refs)
    return tuple(memory.array(n) for n in range(len(work.case.y_widths)))
