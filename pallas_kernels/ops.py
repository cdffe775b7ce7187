"""The public ops: checks, then the operation of the backend that runs the case."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, DTypeLike, Float

from pallas_kernels import autodiff, checks, derivatives
from pallas_kernels.call import Call
from pallas_kernels.dispatch import (
    Implementation,
    check_undivided,
    choose,
    compiled,
    phase_of,
    prefers_xla,
    xla_kernel,
)
from pallas_kernels.masks import masked
from pallas_kernels.mosaic_gpu import support
from pallas_kernels.mosaic_gpu.backend import makes_delta_at_once
from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.ranks import check_phase
from pallas_kernels.renamed import removed_keywords
from pallas_kernels.routing import (
    AnyIds,
    Mix,
    Segments,
    SlotRange,
    TokenIds,
    WideIndices,
    columns_of,
    slots_in_use,
    static,
)
from pallas_kernels.stacks import LoRAPart


class _How(NamedTuple):
    """What a caller says of how an op is to be computed."""

    implementation: Implementation | None
    config: Config | None


def _shrink_op(
    kernel: str,
    x: ArrayLike,
    lora_a: ArrayLike,
    indices: ArrayLike | TokenIds,
    scale: ArrayLike,
    how: _How,
    v: ArrayLike | None = None,
) -> Array:
    lora_a = checks.stack("lora_a", lora_a, "L R H")
    x = checks.floats("x", x, "T H")
    checks.same("x and lora_a differ in features H", x.shape[1], lora_a.shape[2])
    token_ids = checks.token_ids(indices, x.shape[0], lora_a.shape[0])
    scale = checks.scales("scale", scale, size=None)
    _, rank, features = lora_a.shape
    missing = support.missing(lora_a.dtype, rank, features)
    implementation, config = choose(how.implementation, how.config, missing)
    call = Call(f"{kernel}_shrink", implementation, (kernel,), config=config)
    if v is not None:
        v = checks.floats("v", v, "T R")
        checks.same("v and x differ in tokens T", v.shape[0], x.shape[0])
        checks.same("v and lora_a differ in rank R", v.shape[1], rank)
    check_undivided(call, x, lora_a)
    if x.shape[0] == 0:
        return jnp.zeros((0, rank), jnp.float32) if v is None else v
    return autodiff.shrink(call, v, x, lora_a, token_ids, scale)


class _Columns(NamedTuple):
    """Columns of y that an expand changes."""

    y_offset: int
    y_slice_size: int


def _expand_op(
    kernel: str,
    v: ArrayLike,
    lora_b: ArrayLike,
    indices: ArrayLike | TokenIds,
    y: ArrayLike | None,
    columns: _Columns | None,
    add_inputs: bool,
    how: _How,
) -> Array:
    lora_b = checks.stack("lora_b", lora_b, "L N R")
    v = checks.floats("v", v, "T R")
    _, width, rank = lora_b.shape
    checks.same("v and lora_b differ in rank R", v.shape[1], rank)
    y = jnp.zeros((v.shape[0], width), lora_b.dtype) if y is None else checks.floats("y", y, "T N")
    checks.same("v and y differ in tokens T", v.shape[0], y.shape[0])
    if columns is None:
        checks.same("y and lora_b differ in features N", y.shape[1], width)
        columns = _Columns(0, width)
    size = static("y_slice_size", columns.y_slice_size)
    checks.same("y_slice_size and lora_b differ in features N", size, width)
    y_offset = checks.columns(y.shape, columns.y_offset, width)
    token_ids = checks.token_ids(indices, v.shape[0], lora_b.shape[0])
    missing = support.missing(lora_b.dtype, rank, None, width, y.dtype, y.shape[1], y_offset)
    implementation, config = choose(how.implementation, how.config, missing)
    op = f"{kernel}_expand"
    call = Call(op, implementation, (kernel,), y_offset, bool(add_inputs), config=config)
    check_undivided(call, v, lora_b, y)
    if v.shape[0] == 0:
        return y
    return autodiff.expand(call, v, lora_b, token_ids, y)


def _need_segments(segments: object) -> Segments:
    if not isinstance(segments, Segments):
        raise TypeError(
            "sgmv takes Segments: make_segments(indices, num_adapters) or segments_from_lengths"
            f"(...), got {type(segments).__name__}"
        )
    return segments


def bgmv_shrink(
    x: ArrayLike,
    lora_a: ArrayLike,
    indices: ArrayLike,
    *,
    scale: ArrayLike = 1.0,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """v[t] = scale * x[t] @ lora_a[indices[t]].T; zero where indices[t] is -1.

    Args:
      x: `[T, H]` float32, bfloat16 or float16.
      lora_a: `[L, R, H]` or `[L, 1, R, H]`.
      indices: `[T]` integers. -1, and anything outside `[0, L)`, is no adapter.
      scale: a number.
      implementation: "xla", "mosaic_gpu", "loop", or None for the best on device and shape.
      config: tile sizes of the named kernel; None for its own choice.

    Returns:
      `[T, R]` float32.

    Raises:
      TypeError: a dtype that is not listed above.
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: the named implementation lacks what the case needs.

    Source: Punica (arXiv 2310.18547); LoRAX, server/lorax_server/utils/ops/bgmv_shrink.py.
    """
    return _shrink_op("bgmv", x, lora_a, indices, scale, _How(implementation, config))


def add_shrink(
    v: ArrayLike,
    x: ArrayLike,
    lora_a: ArrayLike,
    indices: ArrayLike | Segments | WideIndices,
    *,
    scale: ArrayLike = 1.0,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """v'[t] = v[t] + scale * x[t] @ lora_a[indices[t]].T; rows of -1 keep v. LoRAX's shrink.

    `v` is `[T, R]`, in whose dtype the float32 sum is rounded once. Otherwise as `bgmv_shrink`.
    """
    return _shrink_op("bgmv", x, lora_a, indices, scale, _How(implementation, config), v)


def bgmv_expand(
    v: ArrayLike,
    lora_b: ArrayLike,
    indices: ArrayLike,
    y: ArrayLike | None = None,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """y'[t] = y[t] + v[t] @ lora_b[indices[t]].T; rows of -1 keep y.

    Args:
      v: `[T, R]`. float32 is rounded to a half-precision `lora_b`'s dtype first, as LoRAX does; by
        "mosaic_gpu" so is the other half precision.
      lora_b: `[L, N, R]` or `[L, 1, N, R]`.
      indices: `[T]` integers. -1, and anything outside `[0, L)`, is no adapter.
      y: `[T, N]`, or None for zeros of `lora_b`'s dtype.
      add_inputs: False overwrites rows that have an adapter instead of adding to them.
      implementation, config: as in `bgmv_shrink`.

    Returns:
      `[T, N]` in y's dtype; the sum is float32, rounded once.

    Raises: as `bgmv_shrink`.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_expand.py.
    """
    how = _How(implementation, config)
    return _expand_op("bgmv", v, lora_b, indices, y, None, add_inputs, how)


def bgmv_expand_slice(
    v: ArrayLike,
    lora_b: ArrayLike,
    indices: ArrayLike,
    y: ArrayLike,
    y_offset: int,
    y_slice_size: int,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """`bgmv_expand` into columns `[y_offset, y_offset + y_slice_size)` of y; no other byte changes.

    `y_slice_size` is `lora_b`'s N; `y_offset` is a static int. Otherwise as `bgmv_expand`.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_expand_slice.py.
    """
    columns, how = _Columns(y_offset, y_slice_size), _How(implementation, config)
    return _expand_op("bgmv", v, lora_b, indices, y, columns, add_inputs, how)


def sgmv_shrink(
    x: ArrayLike,
    lora_a: ArrayLike,
    segments: Segments,
    *,
    scale: ArrayLike = 1.0,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """`bgmv_shrink` over `Segments`: the tokens of one adapter are multiplied together."""
    how = _How(implementation, config)
    return _shrink_op("sgmv", x, lora_a, _need_segments(segments), scale, how)


def sgmv_expand(
    v: ArrayLike,
    lora_b: ArrayLike,
    segments: Segments,
    y: ArrayLike | None = None,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """`bgmv_expand` over `Segments`: the tokens of one adapter are multiplied together."""
    how = _How(implementation, config)
    return _expand_op("sgmv", v, lora_b, _need_segments(segments), y, None, add_inputs, how)


def sgmv_expand_slice(
    v: ArrayLike,
    lora_b: ArrayLike,
    segments: Segments,
    y: ArrayLike,
    y_offset: int,
    y_slice_size: int,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """`bgmv_expand_slice` over `Segments`: the tokens of one adapter are multiplied together."""
    columns, how = _Columns(y_offset, y_slice_size), _How(implementation, config)
    return _expand_op("sgmv", v, lora_b, _need_segments(segments), y, columns, add_inputs, how)


# -------------------------------------------------------------------------------------- both halves


class _Parts(NamedTuple):
    """The checked operands of a call with parts, and what is static about it."""

    call: Call
    x: Float[Array, "T H"]
    parts: tuple[LoRAPart, ...]
    ids: AnyIds


class _Adapters(NamedTuple):
    """What a caller says of the tokens' adapters: `indices`, and `weights` of several per token."""

    indices: ArrayLike | AnyIds
    weights: ArrayLike | None = None


def _layer_of(part: LoRAPart) -> tuple[int, int] | None:
    """Which layer of how many a part's stacks are, if they are slices."""
    layers = part.layers
    return None if layers is None else (id(layers.layer), layers.lora_a.shape[0])


def _check_parts(
    op: str,
    x: Array,
    given: Sequence[LoRAPart],
    adapters: _Adapters,
    phase: str | None,
    ys: Sequence[jax.ShapeDtypeStruct],
    how: _How,
) -> _Parts:
    for one in ys:
        checks.same("x and y differ in tokens T", x.shape[0], one.shape[0])
    widths, dtype = tuple(one.shape[1] for one in ys), ys[0].dtype
    phase = phase_of(x.shape[0]) if phase is None else check_phase(phase)
    y_shape = [x.shape[0], sum(widths)]
    parts = tuple(checks.part(n, part, x.shape[1], y_shape) for n, part in enumerate(given))
    if len({_layer_of(part) for part in parts}) > 1:
        # A launch is of one layer, and all of its parts are of as many.
        parts = tuple(dataclasses.replace(part, layers=None) for part in parts)
    ranges = checks.slot_ranges(parts)
    ids = checks.shared_ids(*adapters, x.shape[0], ranges)
    missing = support.missing_parts(parts, widths, dtype)
    implementation, config = choose(how.implementation, how.config, missing)
    kernels = tuple(xla_kernel(part.rank, phase) for part in parts)
    call = Call(op, implementation, kernels, widths=widths, dtype=dtype, config=config)
    check_undivided(
        call, x, *(jnp.asarray(t) for part in parts for t in (part.lora_a, part.lora_b))
    )
    return _Parts(call, x, parts, ids)


def add_lora(
    y: ArrayLike,
    x: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    indices: ArrayLike | Segments | Mix,
    *,
    weights: ArrayLike | None = None,
    scales: ArrayLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array:
    """y'[t] = y[t] + scales[i] * (x[t] @ lora_a[i].T) @ lora_b[i].T where i = indices[t].

    Both halves in one call; rows of -1 keep y.

    Args:
      y: `[T, N]`, the base layer's output.
      x: `[T, H]`.
      lora_a: `[L, R, H]`, or `[slots, experts, R, H]` with ids of `expert_indices`.
      lora_b: `[L, N, R]`, or `[slots, experts, N, R]`. Experts may share A or B: see `LoRAPart`.
      indices: `[T]` integers, or the `Segments` of them, so that layers share one sort. For
        several adapters per token `[T, K]`, -1 for none, or the `Mix` of them and their weights.
      weights: `[T, K]`, with such indices: y' is then y plus the sum of what a token's adapters
        add, each multiplied by its weight.
      scales: a number, `[L]`, or None for 1; `[L, R]` with stacks in 8 bits (see `LoRAPart`).
      phase: "decode" (few tokens per adapter) or "prefill", a hint for XLA's forms; None follows
        from T.
      implementation, config: as in `bgmv_shrink`. None is "xla" for a token or two of high ranks
        with one adapter each; their gradients run as kernels.

    Returns:
      `[T, N]` in y's dtype.

    Raises: as `bgmv_shrink`; ValueError for an unknown phase.

    Source: LoRAX, PunicaWrapper.add_lora in server/lorax_server/utils/punica.py.
    """
    y = checks.floats("y", y, "T N")
    lora_a = checks.stack("lora_a", lora_a, "L R H", of_part=True)
    lora_b = checks.stack("lora_b", lora_b, "L N R", of_part=True)
    checks.same("y and lora_b differ in features N", y.shape[1], lora_b.shape[1])
    part = LoRAPart(lora_a, lora_b, scales)
    for one in indices.columns if isinstance(indices, Mix) else (indices,):
        if isinstance(one, Segments):
            what = "segments and stack differ in adapters"
            checks.same(what, one.num_adapters, part.slots)
    how = _How(implementation, config)
    [new] = _add_to((y,), x, (part,), _Adapters(indices, weights), phase, how)
    return new


_ADDED_ONCE = "lora_delta(x, parts, indices, widths) gives what is to be added"


@overload
def add_lora_multi(
    y: ArrayLike,
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    *,
    weights: ArrayLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array: ...


@overload
def add_lora_multi(
    y: tuple[ArrayLike, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    *,
    weights: ArrayLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> tuple[Array, ...]: ...


@removed_keywords(
    fuse=_ADDED_ONCE,
    exclusive="a token has one id, so parts of different slots never share a token",
)
def add_lora_multi(
    y: ArrayLike | tuple[ArrayLike, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    *,
    weights: ArrayLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array | tuple[Array, ...]:
    """`add_lora` of several parts at once: rank buckets, slices of a packed projection, or both.

    A token has one id, which counts through all slots of a model. Each part holds a range of them:
    it adds to the tokens whose id lies in `[first_slot, first_slot + L)`. Parts may differ in rank
    and width. Where parts of one range add to the same columns of a token, their float32 sum is
    rounded to y's dtype once, or after each ("mosaic_gpu", up to 256 tokens; beyond, after each of
    several groups of parts, where a block's memory does not hold all of them).

    Args:
      y: `[T, Ny]`, or a tuple of such arrays of one dtype, whose columns are counted as if they
        stood side by side: the outputs of several projections of one x.
      x: `[T, H]`, shared by all parts.
      parts: see `LoRAPart`. Their ranges of slots are equal or disjoint.
      indices: `[T]` integers, the id of each token, -1 for none; or the `Segments` of them, whose
        `num_adapters` covers all parts. An id in no part's range is none. For several adapters
        per token `[T, K]`, or the `Mix` of them and their weights.
      weights: `[T, K]`, as in `add_lora`. The float32 sum of a token's adapters is rounded once,
        or, by "mosaic_gpu" beyond the tokens of one launch, after each of them.
      phase, implementation, config: as in `add_lora`; but None is "mosaic_gpu" for a token or two
        too, unless there is one part, one y, and the part has all of its columns.

    Returns:
      `[T, Ny]` in y's dtype; a tuple of them where y is one.

    Raises:
      ValueError: a part's columns leave y, ranges of slots overlap, or `Segments` don't cover them.
      TypeError: the arrays of a tuple differ in dtype.

    The others are those of `add_lora`.
    """
    is_tuple = isinstance(y, tuple)
    given = y if isinstance(y, tuple) else (y,)
    ys = tuple(
        checks.floats(f"y[{n}]" if is_tuple else "y", one, "T Ny") for n, one in enumerate(given)
    )
    if not ys:
        raise ValueError("y must hold at least one array, got ()")
    if len(dtypes := {one.dtype for one in ys}) > 1:
        raise TypeError(f"the arrays of y must have one dtype, got {[str(d) for d in dtypes]}")
    how = _How(implementation, config)
    ys = _add_to(ys, x, parts, _Adapters(indices, weights), phase, how)
    return ys if is_tuple else ys[0]


def _add_to(
    ys: tuple[Array, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    adapters: _Adapters,
    phase: str | None,
    how: _How,
    *,
    few_by_xla: bool = True,
) -> tuple[Array, ...]:
    """`add_lora_multi` of ys that are checked. `few_by_xla`: whether `prefers_xla` is asked."""
    x = checks.floats("x", x, "T H")
    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in ys]
    call, x, parts, ids = _check_parts("add_lora", x, parts, adapters, phase, shapes, how)
    if not (parts and x.shape[0] * sum(call.widths)):
        return ys
    call = call._replace(few=few_by_xla and prefers_xla(call, x.shape[0], parts, ids))
    return autodiff.add_lora(call, ys, x, parts, ids)


def add_by_kernels(
    y: ArrayLike,
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | WideIndices,
    *,
    phase: str | None = None,
) -> Array:
    """`add_lora_multi` of one y that is "mosaic_gpu" for few tokens too.

    A call of `interop` is one launch then, by its native path, which launches kernels alone.
    """
    y, how = checks.floats("y", y, "T Ny"), _How(None, None)
    [new] = _add_to((y,), x, parts, _Adapters(indices), phase, how, few_by_xla=False)
    return new


@overload
def lora_delta(
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    widths: int,
    *,
    weights: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array: ...


@overload
def lora_delta(
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    widths: tuple[int, ...],
    *,
    weights: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> tuple[Array, ...]: ...


def lora_delta(
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    widths: int | tuple[int, ...],
    *,
    weights: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    phase: str | None = None,
    implementation: Implementation | None = None,
    config: Config | None = None,
) -> Array | tuple[Array, ...]:
    """What `add_lora_multi` adds, for the caller to add: `y + lora_delta(x, parts, indices, N)`.

    XLA fuses the addition with what makes y and what reads the sum, and runs the LoRA beside the
    product that makes y, on which it doesn't wait: faster between the other operations of a jitted
    step, slower alone. It needs no y in memory, so it works inside `jax.shard_map`.

    Args:
      x: `[T, H]`.
      parts, indices, weights: as in `add_lora_multi`.
      widths: columns Ny of y, or a tuple of those of several ys, which count side by side.
      dtype: of the result, to which a token's float32 sum is rounded; None for that of x. Kernels
        round what each adapter of a mix adds so too, before its weight multiplies it.
      phase, implementation, config: as in `add_lora`.

    Returns:
      `[T, Ny]`, or a tuple of them where `widths` is one. Elements that no part adds to are -0.0,
      whose addition changes no number.

    Raises: as `add_lora_multi`; TypeError where `dtype` is no float of the ops.
    """
    x = checks.floats("x", x, "T H")
    is_tuple = isinstance(widths, tuple)
    named = widths if isinstance(widths, tuple) else (widths,)
    if not named:
        raise ValueError("widths must hold at least one number of columns, got ()")
    sizes = [checks.width("widths", size) for size in named]
    dtype = checks.float_dtype("dtype", x.dtype if dtype is None else dtype)
    shapes = [jax.ShapeDtypeStruct((x.shape[0], size), dtype) for size in sizes]
    how = _How(implementation, config)
    adapters = _Adapters(indices, weights)
    checked = _check_parts("lora_delta", x, parts, adapters, phase, shapes, how)
    if checked.parts and x.shape[0]:
        out = autodiff.lora_delta(checked.call, x, checked.parts, checked.ids)
    else:
        out = tuple(jnp.full(shape.shape, -0.0, dtype) for shape in shapes)
    return out if is_tuple else out[0]


class LoRAGradient(NamedTuple):
    """The gradients in a part.

    Attributes:
      lora_a: `[S, R, H]`, lora_b: `[S, N, R]`, in the dtype of the part's.
      scales: `[S]`, or a number where the part has one for all.
      slots: `[S]`, the slot of each row, counted from the part's first one; -1 for rows of zeros.
      in_use: how many slots tokens use, a scalar.
    """

    lora_a: Array
    lora_b: Array
    scales: Array
    slots: Array
    in_use: Array


def lora_gradients(
    dy: ArrayLike,
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments,
    *,
    compact: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, tuple[LoRAGradient, ...]]:
    """The gradients of `add_lora_multi(y, x, parts, indices)` where y' has the gradient `dy`.

    `jax.grad` gives the same, in whole stacks, S = L. In the compact form a stack has rows for the
    slots that tokens use, in order: no zeros are written for the many others.

    Args:
      dy: `[T, Ny]`.
      x: `[T, H]`.
      parts, indices: as in `add_lora_multi`.
      compact: S of the compact form, a bound on the slots of a part that tokens use; None for
        whole stacks. If `in_use` is larger, the gradients of the last slots are left out.
      implementation: as in `add_lora`.

    Returns:
      The gradient in x, `[T, H]` in its dtype, and one `LoRAGradient` for each part.

    Raises: as `add_lora_multi`; TypeError or ValueError where `compact` is no int of at least 1.
    """
    if compact is not None and (compact := static("compact", compact)) < 1:
        raise ValueError(f"compact must be at least 1, got {compact}")
    dy, x = checks.floats("dy", dy, "T Ny"), checks.floats("x", x, "T H")
    shapes = [jax.ShapeDtypeStruct(dy.shape, dy.dtype)]
    how = _How(implementation, None)
    if isinstance(indices, Mix):
        raise TypeError(
            "lora_gradients takes one adapter per token, got a Mix; jax.grad of lora_delta gives "
            "the gradients of a mix"
        )
    checked = _check_parts("lora_gradients", x, parts, _Adapters(indices), None, shapes, how)
    derivatives.refuse_eight_bits("lora_gradients", checked.parts)
    if compact is not None and any(max(part.sharing) > 1 for part in checked.parts):
        raise ValueError(
            f"compact must be None for parts in which experts share A or B, got {compact}"
        )
    token_ids = columns_of(checked.ids)[0].token_ids
    call = checked.call._replace(compact=compact)
    dx, found = jnp.zeros_like(x), checked.parts
    if x.shape[0] and found:
        dx, found, _ = compiled("add_lora_grad", call)(dy, x, found, token_ids)
    gradients = []
    for part, (a, b, scales) in zip(checked.parts, map(_arrays, found)):
        slots = SlotRange(part.first_slot, part.slots)
        rows = jnp.arange(slots.slots, dtype=jnp.int32)
        if compact is not None:
            rows = slots_in_use(token_ids, slots, compact)
        groups = slots_in_use(token_ids, slots, slots.slots)
        in_use = jnp.sum(groups >= 0, dtype=jnp.int32)
        if not x.shape[0]:
            size = rows.shape[0]
            a, b = (jnp.zeros((size, *stack.shape[1:]), stack.dtype) for stack in (a, b))
            scales = jnp.zeros((size,) * scales.ndim, scales.dtype)
        gradients.append(LoRAGradient(a, b, scales, rows, in_use))
    return dx, tuple(gradients)


def _arrays(part: LoRAPart) -> tuple[Array, Array, Array]:
    return jnp.asarray(part.lora_a), jnp.asarray(part.lora_b), jnp.asarray(part.scales)


def delta_ahead(
    base_x: Array,
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    shapes: Sequence[jax.ShapeDtypeStruct],
    *,
    phase: str,
) -> tuple[Array, tuple[Array, ...] | None]:
    """What a decode step is to add to the ys, launched ahead of the product that makes them.

    What reads the `base_x` that comes back is scheduled behind the launch, but does not wait for
    it: XLA takes the barrier away once the order stands. A launch behind a product that fills the
    GPU starts when that ends. H200, Llama-3-8B's decode step, 64 rows, 8 adapters of R=16: 280 us a
    layer ahead, 292 behind.

    Args:
      base_x: what the product reads; `x` is it as a matrix.
      shapes: of the ys.

    Returns:
      `base_x`, and the deltas; None for these where another form is faster.
    """
    if phase != "decode" or not parts:
        return base_x, None
    x, how = checks.floats("x", x, "T H"), _How(None, None)
    checked = _check_parts("lora_delta", x, parts, _Adapters(indices), phase, shapes, how)
    if not _is_fastest_as_delta(checked, x, shapes[0].dtype):
        return base_x, None
    deltas = autodiff.lora_delta(
        checked.call._replace(unmasked=True), x, checked.parts, checked.ids
    )
    behind: tuple[Array, tuple[Array, ...]] = jax.lax.optimization_barrier((base_x, deltas))
    base_x, deltas = behind
    # A mask in front of the barrier would be a launch of its own, for which the product waits.
    return base_x, deltas if isinstance(checked.ids, Mix) else masked(
        deltas, checked.parts, checked.ids
    )


def _is_fastest_as_delta(checked: _Parts, x: Array, dtype: DTypeLike) -> bool:
    """Whether a step is fastest by `lora_delta`, which one launch makes."""
    call = checked.call
    if not (checked.parts and x.shape[0] * sum(call.widths)) or call.implementation != "auto":
        return False
    return makes_delta_at_once(x, checked.parts, call.widths, dtype, len(columns_of(checked.ids)))


def add_in_step(
    ys: tuple[Array, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    indices: ArrayLike | Segments | Mix,
    *,
    phase: str,
    deltas: tuple[Array, ...] | None = None,
) -> tuple[Array, ...]:
    """`add_lora_multi` for a layer of a jitted step, in the form that is fastest there.

    That is `lora_delta` where one launch of "mosaic_gpu" makes it, else the form in place. In the
    phase "exact" it is the form of `exact.in_chunks`. `deltas` are those of `delta_ahead`, if it
    made some.
    """
    if deltas is not None:
        return _sums(ys, deltas)
    x = checks.floats("x", x, "T H")
    shapes = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys]
    is_exact, how = phase == "exact", _How(None, None)
    phase = "decode" if is_exact else phase
    checked = _check_parts("add_lora", x, parts, _Adapters(indices), phase, shapes, how)
    call = checked.call._replace(exact=is_exact)
    if not (checked.parts and x.shape[0] * sum(call.widths)):
        return ys
    by_kernels = _is_fastest_as_delta(checked, x, ys[0].dtype)
    if not (is_exact or by_kernels):
        return autodiff.add_lora(call, ys, x, checked.parts, checked.ids)
    return _sums(ys, autodiff.lora_delta(call, x, checked.parts, checked.ids))


def _sums(ys: tuple[Array, ...], deltas: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(
        (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)
        for y, delta in zip(ys, deltas)
    )
