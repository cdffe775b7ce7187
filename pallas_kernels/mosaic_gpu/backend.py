"""The ops as Pallas:Mosaic GPU kernels for Hopper (sm_90): the seam of the backend "mosaic_gpu".

`docs/kernels.md` draws them. There are two kinds.

The *prefill* kernels take tiles of 64 tokens. They multiply all rows of a tile with every adapter
that occurs in it, and each row keeps its own product. So tokens may come in any order, and what a
row gets depends on that row and its adapter alone. A tile has consecutive tokens where adapters
come in runs. Else it has tokens sorted by adapter, whose rows are copied one by one.

The *decode* kernel takes few tokens, and does one half or both in one launch. A cluster takes up to
eight tokens of one adapter, wherever they stand.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from pallas_kernels import xla
from pallas_kernels.call import Call
from pallas_kernels.masks import changed, masked
from pallas_kernels.mosaic_gpu import inference, lowered
from pallas_kernels.mosaic_gpu.backward import (
    GradientPart,
    expand_gradients,
    gradients,
    shrink_gradients,
)
from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.mosaic_gpu.decode import (
    MAX_UNSEATED_TOKENS,
    DecodePart,
    Plan,
    Seating,
    decode_config,
    decode_kernel,
    plan,
)
from pallas_kernels.mosaic_gpu.layouts import cuts, interpreted, pad_rows, pad_to
from pallas_kernels.mosaic_gpu.prefill import (
    ExpandPart,
    ShrinkPart,
    default_config,
    expand_kernel,
    shrink_kernel,
)
from pallas_kernels.mosaic_gpu.prefill.route import may_sort, order
from pallas_kernels.mosaic_gpu.support import MAX_FEATURES, missing_gradient
from pallas_kernels.routing import (
    AnyIds,
    Column,
    Mix,
    Segments,
    SlotRange,
    TokenIds,
    WideIndices,
    columns_of,
    ids_of,
    local_segments,
    slots_in_use,
)
from pallas_kernels.stacks import LoRAPart, apart, is_eight_bits, side_by_side

inference.shorten()
lowered.keep()

# ------------------------------------------------------------------------------ the right platform

_needs_hopper_p = Primitive("lora_needs_hopper")
_needs_hopper_p.def_abstract_eval(lambda x: x)
_needs_hopper_p.def_impl(lambda x: jax.jit(_needs_hopper_p.bind)(x))
batching.primitive_batchers[_needs_hopper_p] = lambda args, axes: (
    _needs_hopper_p.bind(*args),
    axes[0],
)


def _refuse(*_: object) -> list[mlir.ir.Value]:
    raise NotImplementedError(
        "implementation 'mosaic_gpu' needs a Hopper GPU, or plgpu.force_gpu_interpret_mode(...)"
    )


mlir.register_lowering(_needs_hopper_p, _refuse)
mlir.register_lowering(_needs_hopper_p, lambda _, x: [x], platform="cuda")


def _needs_hopper(x: Array) -> Array:
    """x; lowered for another platform than CUDA, outside of interpret mode, an error.

    Pallas raises a ValueError there that doesn't say whose kernel it is, and what runs it.
    """
    if interpreted():
        return x
    out: Array = _needs_hopper_p.bind(x)
    return out


# ---------------------------------------------------------------------------- the four operations


def shrink(
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> Array:
    """v[t] + scale * x[t] @ lora_a[i].T, rounded once; rows of -1 keep v. None is zeros."""
    x = _needs_hopper(x)
    num_adapters, rank, features = lora_a.shape
    old = jnp.zeros((x.shape[0], rank), jnp.float32) if v is None else v
    part = DecodePart(lora_a, None, scale.reshape(-1))
    launch = _one_launch((old,), x, _Decode((part,)), token_ids, call)
    if launch is not None:
        [new] = launch.run((old,), x)
        return new
    segments = local_segments(token_ids, SlotRange(0, num_adapters))
    config = call.config or _prefill_config(x, lora_a.shape, features)
    by_tiles = _Shrink(lora_a, SlotRange(0, num_adapters), scale, 0, config)
    [new] = _shrink_parts(x, [by_tiles], segments, operands=False)
    return new if v is None else xla.add_rows(v, new, segments)


def expand(call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
    """y[t, columns] (+)= v[t] @ lora_b[i].T, rounded once; rows of -1 keep y."""
    v = _needs_hopper(v)
    num_adapters, width, rank = lora_b.shape
    part = DecodePart(None, lora_b, None, y_offset=call.y_offset)
    launch = _one_launch((y,), v, _Decode((part,)), token_ids, call, add_inputs=call.add_inputs)
    if launch is not None:
        [new] = launch.run((y,), v)
        return new
    config = call.config or default_config(v.shape[0], MAX_FEATURES, width, rank, num_adapters)
    segments = local_segments(token_ids, SlotRange(0, num_adapters))
    slots = SlotRange(0, num_adapters)
    two = ExpandPart(_operand(v, lora_b.dtype), lora_b, slots, call.y_offset, config)
    return expand_kernel(y, (two,), segments, add_inputs=call.add_inputs)


def add_lora(
    call: Call, ys: tuple[Array, ...], x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, ...]:
    """The ys plus both halves of every part: in one launch where the decode kernel takes them all,
    else in one or two launches for some of the parts at a time."""
    x, parts = _needs_hopper(x), _by_rows(parts)
    widths = tuple(one.shape[1] for one in ys)
    if isinstance(ids, Mix):
        wide = tuple(jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in ys)
        sums = _mixed_at_once(call, wide, x, parts, ids)
        if sums is not None:
            return tuple(map(_plus, ys, sums))
    elif (launch := _one_launch(ys, x, _decode_parts(parts), ids, call)) is not None:
        return launch.run(ys, x)
    launches = _launches(parts)
    homes = [_home(some, widths) for some in launches]
    if None in homes:  # a launch adds to several ys: then they are copied side by side, and back
        y = side_by_side(ys)
        for some in launches:
            y = _add_some(call, y, x, some, ids)
        return apart(y, widths)
    new = list(ys)
    for some, home in zip(launches, filter(None, homes)):
        own = (dataclasses.replace(p, y_offset=p.y_offset - home.start) for p in some)
        new[home.number] = _add_some(call, new[home.number], x, tuple(own), ids)
    return tuple(new)


class _Home(NamedTuple):
    """One of the ys, and where its columns start among those of all."""

    number: int
    start: int


def _home(parts: tuple[LoRAPart, ...], widths: tuple[int, ...]) -> _Home | None:
    """The one of the ys to which all of the parts add; None if there is none."""
    edges = itertools.pairwise(itertools.accumulate(widths, initial=0))
    for n, (start, stop) in enumerate(edges):
        if all(start <= p.y_offset and p.y_offset + p.width <= stop for p in parts):
            return _Home(n, start)
    return None


# Jitted, so that JAX traces and lowers the kernels of like ys once.
@functools.partial(jax.jit, static_argnums=0)
def _add_some(call: Call, y: Array, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds) -> Array:
    """y plus the parts of `_launches`, in one launch, or in two for each column of a mix."""
    for column in columns_of(ids):
        launch = None
        if not isinstance(ids, Mix):
            launch = _one_launch((y,), x, _decode_parts(parts), ids, call)
        if launch is None:
            y = _two_launches(y, x, parts, column, call.config)
        else:
            [y] = launch.run((y,), x)
    return y


def lora_delta(call: Call, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds) -> tuple[Array, ...]:
    """What `add_lora` adds, of `call.widths` and `call.dtype`; -0.0 where nothing is added, unless
    the call is `unmasked`."""
    x, parts = _needs_hopper(x), _by_rows(parts)
    shapes = tuple(jax.ShapeDtypeStruct((x.shape[0], width), call.dtype) for width in call.widths)
    if isinstance(ids, Mix):
        sums = _mixed_at_once(call, shapes, x, parts, ids)
        if sums is not None:
            return tuple(total.astype(call.dtype) for total, _ in sums)
    else:
        launch = _one_launch(shapes, x, _decode_parts(parts), ids, call, add_inputs=False)
        if launch is not None:
            deltas = launch.run(shapes, x)  # undefined where no part adds anything
            return deltas if call.unmasked else masked(deltas, parts, ids)
    zeros = tuple(jnp.full(s.shape, -0.0, s.dtype) for s in shapes)
    return add_lora(call, zeros, x, parts, ids)


def _by_rows(parts: tuple[LoRAPart, ...]) -> tuple[LoRAPart, ...]:
    """The parts as the kernels load them, by rows of H and of R."""
    return tuple(part.with_layout(transposed=False) for part in parts)


def makes_delta_at_once(
    x: Array,
    parts: tuple[LoRAPart, ...],
    widths: tuple[int, ...],
    dtype: DTypeLike,
    columns: int = 1,
) -> bool:
    """Whether one launch makes `lora_delta` of a case, which is then the fastest form in a step.
    `columns` counts the adapters of a token."""
    call = Call("lora_delta", "mosaic_gpu", ())
    rows = x.shape[0] * columns
    shapes = tuple(jax.ShapeDtypeStruct((rows, width), dtype) for width in widths)
    operands = _decode_parts(_by_rows(parts)).parts
    sizes = _plan(shapes, x, operands, call, add_inputs=False, seated=True)
    return sizes is not None


# ------------------------------------------------------------------ several adapters of a token


class _Sum(NamedTuple):
    """What is added to one of the ys, float32, and where; -0.0 elsewhere."""

    total: Float[Array, "T N"]
    changed: Bool[Array, "T _"]


def _mixed_at_once(
    call: Call,
    ys: tuple[jax.ShapeDtypeStruct, ...],
    x: Array,
    parts: tuple[LoRAPart, ...],
    mix: Mix,
) -> list[_Sum] | None:
    """What a mix adds to each y; None where one launch does not make it.

    The decode kernel takes each column of the mix for tokens of their own, that read the same rows
    of x. So no two clusters add to one row of y. It rounds the rows that it makes to the dtype of
    ys. XLA adds them up in float32, in the order of the columns, together with what it does to y.
    """
    columns, count, widths = columns_of(mix), x.shape[0], tuple(y.shape[1] for y in ys)
    shapes = tuple(
        jax.ShapeDtypeStruct((count * len(columns), width), ys[0].dtype) for width in widths
    )
    tokens = mix.as_tokens()
    launch = _one_launch(shapes, x, _decode_parts(parts), tokens, call, add_inputs=False)
    if launch is None:
        return None
    made = launch.run(shapes, x)  # undefined where no part adds anything
    sums = [_Sum(jnp.float32(-0.0), jnp.bool_(False))] * len(widths)
    row = jnp.arange(count, dtype=jnp.int32)
    for n, (ids, weights) in enumerate(columns):
        assert weights is not None  # a mix has them
        # XLA reads what it masks. So entries without adapter name the first column's row, which is
        # in the cache then.
        mine = jnp.where(ids_of(ids) >= 0, row + n * count, row)
        for i, (before, where, delta) in enumerate(zip(sums, changed(widths, parts, ids), made)):
            own = delta[:count] if n == 0 else _rows_at(delta, mine)
            share = own.astype(jnp.float32) * weights[:, None]
            new = jnp.where(where, share, jnp.float32(-0.0))
            sums[i] = _Sum(before.total + new, before.changed | where)
    return sums


def _rows_at(array: Array, rows: Int[Array, " T"]) -> Array:
    return array.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _plus(y: Array, added: _Sum) -> Array:
    """y plus the sum, rounded once; what nothing is added to keeps y's bytes."""
    new = (y.astype(jnp.float32) + added.total).astype(y.dtype)
    return jnp.where(added.changed, new, y)


# ---------------------------------------------------------------------------------- one launch


class _Launch(NamedTuple):
    """What the decode kernel takes beside the ys and x."""

    ids: Int[Array, " T"] | Int[Array, "T 2"] | Int[Array, "clusters 10"]
    parts: tuple[DecodePart, ...]
    plan: Plan
    layer: Int[Array, ""] | None

    def run(self, ys: tuple[Array | jax.ShapeDtypeStruct, ...], x: Array) -> tuple[Array, ...]:
        return decode_kernel(ys, x, self.ids, self.parts, self.plan, self.layer)


class _Decode(NamedTuple):
    """Parts as the decode kernel takes them, and the number of their layer, if of several."""

    parts: tuple[DecodePart, ...]
    layer: Int[Array, ""] | None = None


def _decode_parts(parts: tuple[LoRAPart, ...]) -> _Decode:
    found, layer = [], None
    for p in parts:
        a, b, scales = (jnp.asarray(t) for t in (p.lora_a, p.lora_b, p.scales))
        count = 1
        if p.layers is not None and (several := p.layers.lora_a.shape[0]) > 1:
            a, b, scales = p.layers.flat
            count, layer = several, p.layers.layer
        own = p.first_slot, p.y_offset, p.scales_offset or 0
        found.append(DecodePart(a, b, scales.reshape(-1), *own, count))
    return _Decode(tuple(found), layer)


def _one_launch(
    ys: tuple[Array | jax.ShapeDtypeStruct, ...],
    x: Array,
    decode: _Decode,
    token_ids: TokenIds,
    call: Call,
    *,
    add_inputs: bool = True,
) -> _Launch | None:
    """The launch that does all of it; None where the decode kernel does not take the case."""
    words = token_ids.words if isinstance(token_ids, WideIndices) else ids_of(token_ids)
    seated = isinstance(token_ids, Segments) or words.shape[0] > MAX_UNSEATED_TOKENS
    parts = decode.parts
    sizes = _plan(ys, x, parts, call, add_inputs=add_inputs, seated=seated, id_words=words.ndim)
    if sizes is None:
        return None
    if isinstance(token_ids, Segments):  # they serve all layers of a step, which share the table
        [words] = token_ids.table(Seating.of(sizes))
    elif seated:
        words = Seating.of(sizes).seat(words)
    return _Launch(words, parts, sizes, decode.layer)


def _plan(
    ys: tuple[Array | jax.ShapeDtypeStruct, ...],
    x: Array,
    parts: tuple[DecodePart, ...],
    call: Call,
    *,
    add_inputs: bool,
    seated: bool,
    id_words: int = 1,
) -> Plan | None:
    """Pallas's interpreter, whose race detection a caller asks for, cannot run the decode kernel:
    there only a config that names the kernel gets it, by its own emulator."""
    config = call.config
    if config is None and interpreted():
        return None
    if config is None:
        rank, width = max(part.rank for part in parts), sum(y.shape[1] for y in ys)
        ranges = {(part.first_slot, part.slots) for part in parts}
        config = decode_config(
            x.shape[0],
            width,
            rank,
            features=x.shape[1],
            buckets=len(ranges),
            delta=not add_inputs,
            weight_bytes=parts[0].stacks[0].dtype.itemsize,
        )
    return plan(ys, x, parts, config, add_inputs=add_inputs, seated=seated, id_words=id_words)


# --------------------------------------------------------------------------------- two launches

# The kernels' code has a piece for each part, and lowering takes more than in proportion: 15 parts
# (five rank buckets of three slices) 79 s in one launch, 38 s in three (2 CPU cores).
_MOST_PARTS = 6


def _launches(parts: tuple[LoRAPart, ...]) -> list[tuple[LoRAPart, ...]]:
    """The parts, those of the same columns together, up to `_MOST_PARTS` per launch if they fit."""
    spans = tuple((p.y_offset, p.y_offset + p.width) for p in parts)
    together: list[set[int]] = []
    for cut in cuts(spans):
        touching = [group for group in together if group & set(cut.parts)]
        together = [group for group in together if group not in touching]
        together.append(set(cut.parts).union(*touching))
    launches: list[list[int]] = []
    for group in together:
        if launches and len(launches[-1]) + len(group) <= _MOST_PARTS:
            launches[-1] += sorted(group)
        else:
            launches.append(sorted(group))
    return [tuple(parts[i] for i in launch) for launch in launches]


def _two_launches(
    y: Array,
    x: Array,
    parts: tuple[LoRAPart, ...],
    column: Column,
    config: Config | None,
) -> Array:
    """A shrink and an expand of the prefill kernels."""
    segments = _segments_of_all(parts, column.token_ids)
    sorts = may_sort(segments.num_tokens)
    placed, shrinks = [_placed(part) for part in parts], []
    for part, (a, b, scales, first_scale, first) in zip(parts, placed):
        slots = SlotRange(part.first_slot, part.slots)
        own = config or _prefill_config(x, (part.slots, *a.shape[1:]), b.shape[1])
        shared = part.sharing.lora_a
        shrinks.append(_Shrink(a, slots, scales, first_scale, own, first, shared))
    vs = _shrink_parts(x, shrinks, segments, operands=True, sorts=sorts, weights=column.weights)
    expands = tuple(
        ExpandPart(v, p.b, s.slots, part.y_offset, s.config, s.first, part.sharing.lora_b)
        for part, p, s, v in zip(parts, placed, shrinks, vs)
    )
    return expand_kernel(y, expands, segments, add_inputs=True, sorts=sorts)


def _segments_of_all(parts: tuple[LoRAPart, ...], token_ids: TokenIds) -> Segments:
    """The tokens sorted by the adapters of all parts."""
    if isinstance(token_ids, Segments):
        return token_ids
    stop = max(part.first_slot + part.slots for part in parts)
    return local_segments(token_ids, SlotRange(0, stop))


class _Placed(NamedTuple):
    """The arrays in which the prefill kernels read a part's adapters, from `first` on."""

    a: Float[Array, "M R H"]
    b: Float[Array, "M N R"]
    scales: Float[Array, "*S"]
    first_scale: int
    first: Int[Array, ""] | None


def _placed(part: LoRAPart) -> _Placed:
    a, b, scales = (jnp.asarray(t) for t in (part.lora_a, part.lora_b, part.scales))
    layers, offset = part.layers, part.scales_offset or 0
    # An H that is to be padded would be padded for all layers.
    if layers is None or a.shape[2] % 16:
        return _Placed(a, b, scales, offset, None)
    a, b, _ = layers.flat
    scales = layers.scales[:, offset : offset + part.num_scales].reshape(-1)
    return _Placed(a, b, scales, 0, layers.layer * part.slots)


def _prefill_config(x: Array, of_a: tuple[int, ...], width: int) -> Config:
    num_adapters, rank, features = of_a
    return default_config(x.shape[0], features, width, rank, num_adapters)


def _operand(v: Array, dtype: DTypeLike) -> Array:
    """v as the expand loads it: in B's dtype (LoRAX's CAST_TYPE) and at least 16 ranks wide."""
    return pad_rows(pad_to(v.astype(dtype), 1, 16))


class _Shrink(NamedTuple):
    """One stack of a shrink by tiles."""

    lora_a: Float[Array, "L R H"]
    slots: SlotRange
    scales: Float[Array, "*S"]
    first_scale: int
    config: Config
    first: Int[Array, ""] | None = None
    shared: int = 1


def _shrink_parts(
    x: Array,
    parts: list[_Shrink],
    segments: Segments,
    *,
    operands: bool,
    sorts: bool = False,
    weights: Float[Array, " T"] | None = None,
) -> list[Array]:
    """v of each part, times each token's weight, if it has one: float32 `[T, R]`, zero in rows of
    -1; or, if `operands`, as the expand loads it, undefined in rows of -1. Rows are in `Order` if
    `sorts`, else in that of x."""
    twin, tokens = interpreted(), order(segments, sorts)
    vs: dict[int, Array] = {}
    for weights_dtype in dict.fromkeys(part.lora_a.dtype for part in parts):
        which = [i for i, part in enumerate(parts) if part.lora_a.dtype == weights_dtype]
        dtype = jnp.dtype(jnp.bfloat16) if is_eight_bits(weights_dtype) else weights_dtype
        planes, factor = _planes(x, dtype)
        if weights is not None:
            factor = weights if factor is None else weights * factor
        direct = operands and factor is None and not twin
        kernel_parts = tuple(
            # TMA's swizzle needs rows of 32 bytes: an H that is only a multiple of 8 is padded.
            ShrinkPart(
                pad_to(part.lora_a, 2, 16),
                part.scales.reshape(-1),
                part.slots,
                dtype if direct else jnp.dtype(jnp.float32),
                part.config,
                part.first_scale,
                part.first,
                part.shared,
            )
            for part in (parts[i] for i in which)
        )
        padded = pad_to(pad_rows(planes, 1), 2, 16)
        out = shrink_kernel(padded, kernel_parts, segments, zero_rows=not operands, sorts=sorts)
        for i, v in zip(which, out):
            if twin:
                used = parts[i].slots.holds(segments.indices)[:, None]
                v = jnp.where(used, functools.reduce(jnp.add, list(v)), 0.0)
            if factor is not None:
                v = v * (factor if tokens is None else factor[tokens])[:, None]
            vs[i] = _operand(v, dtype) if operands and not direct else v
    return [vs[i] for i in range(len(parts))]


def _planes(x: Array, dtype: DTypeLike) -> tuple[Float[Array, "P T H"], Float[Array, " T"] | None]:
    """x as a sum of planes of `dtype`, exact to float32, and what to multiply its rows by.

    Planes are cut off, not rounded: that cannot overflow, and XLA, which may drop a conversion to
    half precision and back, cannot undo it. bfloat16 has float32's range and 8 bits a plane.
    float16 has 11 bits, but not the range: rows are scaled by a power of two to below 2^15.
    """
    if x.dtype == dtype:
        return x[None], None
    rest, factor = x.astype(jnp.float32), None
    if dtype == jnp.bfloat16:
        count, mask = (3 if x.dtype == jnp.float32 else 2), 0xFFFF0000
    else:
        count, mask = (3 if x.dtype == jnp.float32 else 1), 0xFFFFE000
        largest = jnp.max(jnp.abs(rest), axis=1)
        _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0))
        exponent = jnp.clip(exponent - 15, -126, 126)  # the power and its inverse are normal
        factor = jnp.ldexp(jnp.float32(1.0), exponent)
        rest = rest * jnp.ldexp(jnp.float32(1.0), -exponent)[:, None]
    planes = []
    for _ in range(count):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(mask)
        top = lax.bitcast_convert_type(bits, jnp.float32)
        planes.append(top.astype(dtype))
        rest = jnp.where(jnp.isfinite(rest), rest - top, 0.0)
    return jnp.stack(planes), factor


# ----------------------------------------------------------------------------------- gradients


def shrink_grad(
    call: Call, dv: Array, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> tuple[Array, Array, Array]:
    """Gradients of `shrink` in x, lora_a and scale."""
    if missing_gradient(x.shape[0], [lora_a.dtype], x=x.dtype) is not None:
        return xla.shrink_grad(call, dv, x, lora_a, token_ids, scale)
    segments = local_segments(token_ids, SlotRange(0, lora_a.shape[0]))
    scales = jnp.broadcast_to(scale, lora_a.shape[0])
    dx, da, ds = shrink_gradients(dv, _needs_hopper(x), lora_a, scales, segments)
    return dx, da, ds if scale.ndim else jnp.sum(ds)


def expand_grad(
    call: Call, dy: Array, v: Array, lora_b: Array, token_ids: TokenIds
) -> tuple[Array, Array, Array]:
    """Gradients of `expand` in v, lora_b and y."""
    operand = xla.cast_v(v, lora_b)
    lacks = missing_gradient(v.shape[0], [lora_b.dtype], y=dy.dtype, v=operand.dtype)
    if lacks is not None:
        return xla.expand_grad(call, dy, v, lora_b, token_ids)
    segments = local_segments(token_ids, SlotRange(0, lora_b.shape[0]))
    dv, db = expand_gradients(_needs_hopper(dy), operand, lora_b, segments, call.y_offset)
    return dv.astype(v.dtype), db, xla.expand_grad_of_y(call, dy, lora_b, segments)


def add_lora_grad(
    call: Call, dy: Array, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, tuple[LoRAPart, ...], Array | None]:
    """Gradients of `add_lora` in x, in each part's stacks and own scales, and in weights."""
    dtypes = [jnp.result_type(part.lora_a) for part in parts]
    if missing_gradient(x.shape[0], dtypes, x=x.dtype, y=dy.dtype) is not None:
        return xla.add_lora_grad(call, dy, x, parts, ids)
    x, layouts, parts = _needs_hopper(x), [part.transposed for part in parts], _by_rows(parts)
    token_ids = ids.as_tokens() if isinstance(ids, Mix) else ids
    weights = ids.flat_weights() if isinstance(ids, Mix) else None
    kernel_parts = []
    for part in parts:
        a, b, *_, first = _placed(part)
        place = jnp.zeros(1, jnp.int32) if first is None else first.reshape(1)
        slots = SlotRange(part.first_slot, part.slots)
        scales = jnp.broadcast_to(part.own_scales(), slots.slots)
        wanted = jnp.arange(slots.slots, dtype=jnp.int32)
        if call.compact is not None:
            wanted = slots_in_use(token_ids, slots, call.compact)
        how = slots, part.y_offset, wanted, part.sharing
        kernel_parts.append(GradientPart(a, b, place, scales, *how))
    segments = _segments_of_all(parts, token_ids)
    dx, found, dweights = gradients(dy, x, tuple(kernel_parts), segments, weights)
    if dweights is not None:
        dweights = dweights.reshape(-1, x.shape[0]).T
    dparts = []
    for part, transposed, (da, db, ds) in zip(parts, layouts, found):
        ds = ds if jnp.asarray(part.scales).ndim else jnp.sum(ds)
        gradient = dataclasses.replace(part, lora_a=da, lora_b=db, scales=ds, layers=None)
        dparts.append(gradient.with_layout(transposed=transposed))
    return dx, tuple(dparts), dweights
