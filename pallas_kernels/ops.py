"""The public ops: checks, the choice of an implementation, and one gradient for all of them."""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, ArrayLike

from pallas_kernels import derivatives, loop, mosaic_gpu, xla
from pallas_kernels.parts import LoRAPart, StackView, apart, side_by_side
from pallas_kernels.ranks import check_phase, kernels_disabled, select_kernel
from pallas_kernels.segments import (
    Route,
    Segments,
    WideIndices,
    as_segments,
    checked_indices,
    static,
)

Implementation = Literal["xla", "mosaic_gpu", "loop"]
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "loop")

_HERE = os.path.dirname(__file__)  # warnings point at the first caller outside

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


class _Spec(NamedTuple):
    """What is static about a call: which code runs, and where its columns start."""

    op: str
    implementation: str
    kernels: tuple[str, ...]
    y_offsets: tuple[int, ...] = ()
    scales_offsets: tuple[int | None, ...] = ()
    routes: tuple[int, ...] = ()  # for each part the first one that has the same ids
    add_inputs: bool = True
    fuse: bool = False
    exclusive: bool = False
    config: mosaic_gpu.Config | None = None


# ---------------------------------------------------------------------------------------- checks


def _floats(name: str, value: ArrayLike, axes: str) -> Array:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    if dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    array = jnp.asarray(value)
    if array.ndim != len(axes.split()):
        raise ValueError(
            f"{name} must have shape [{axes.replace(' ', ', ')}], got {list(array.shape)}"
        )
    return array


def _stack(name: str, value: Any, axes: str) -> Array:
    """An `[L, a, b]` stack; LoRAX's `[L, 1, a, b]` loses its second axis."""
    if isinstance(value, StackView):
        raise TypeError(f"{name} must be an array; add_lora and add_lora_multi alone take views")
    if getattr(value, "ndim", 0) == 4 and value.shape[1] == 1:
        value = value.squeeze(1)
    stack = _floats(name, value, axes)
    if 0 in stack.shape:
        raise ValueError(f"{name} must not have an empty axis, got {list(stack.shape)}")
    return stack


def _stack_or_view(name: str, value: Any, axes: str) -> Any:
    if not isinstance(value, StackView):
        return _stack(name, value, axes)
    array = _floats(f"{name}.array", value.array, "S")
    first = static(f"{name}.first", value.first)
    shape: Any = tuple(static(f"{name}.shape", n) for n in value.shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name} must be a view of shape [{axes.replace(' ', ', ')}], got {shape}")
    view = StackView(array, first, shape)
    if not 0 <= first <= array.size - view.size:
        raise ValueError(
            f"{name} views elements [{first}, {first + view.size}) of an array of {array.size}"
        )
    return view


def _same(what: str, expected: int, got: int) -> None:
    if expected != got:
        raise ValueError(f"{what}: {expected} and {got}")


def _route(indices: Any, num_tokens: int, num_adapters: int) -> Any:
    if isinstance(indices, Segments):
        _same("segments and stack differ in adapters", indices.num_adapters, num_adapters)
        _same("segments and tensor differ in tokens", indices.num_tokens, num_tokens)
        return indices
    if isinstance(indices, WideIndices):
        _same("indices and tensor differ in tokens", indices.words.shape[0], num_tokens)
        return indices
    # What sorts ids checks them, and so does the kernel that doesn't: nothing runs before it.
    is_plain = isinstance(indices, jax.Array) and indices.dtype == jnp.int32 and indices.ndim == 1
    if not is_plain:
        indices = checked_indices(indices, num_adapters)
    _same("indices and tensor differ in tokens", indices.shape[0], num_tokens)
    return indices


def _scales(name: str, value: ArrayLike, *, per_adapter: int | None) -> Array:
    if value is None:
        raise TypeError(f"{name} must be real numbers, got None")
    scales = jnp.asarray(value)
    if not (
        jnp.issubdtype(scales.dtype, jnp.floating) or jnp.issubdtype(scales.dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be real numbers, got {scales.dtype}")
    allowed = [()] if per_adapter is None else [(), (per_adapter,)]
    if scales.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {shapes}, got {list(scales.shape)}")
    return scales.astype(jnp.float32)


def _scales_at(name: str, part: LoRAPart, num_adapters: int) -> tuple[Array, int | None]:
    """A part's scales, and where its own start in them."""
    if part.scales_offset is None:
        scales = 1.0 if part.scales is None else part.scales
        return _scales(f"{name}.scales", scales, per_adapter=num_adapters), None
    offset = static(f"{name}.scales_offset", part.scales_offset)
    shape = () if part.scales is None else jnp.shape(part.scales)
    size = shape[0] if len(shape) == 1 else 0
    if not 0 <= offset <= size - num_adapters:
        raise ValueError(
            f"{name} has scales [{offset}, {offset + num_adapters}) by its scales_offset, but "
            f"scales have shape {list(shape)}"
        )
    return _scales(f"{name}.scales", part.scales, per_adapter=size), offset


def _misaligned(stack: Any) -> str | None:
    """What mosaic_gpu lacks for a view: it copies 16 bytes at once."""
    if isinstance(stack, StackView) and (first := stack.first * stack.dtype.itemsize) % 16:
        return f"a view that starts {first} bytes into its array (it takes multiples of 16)"
    return None


def _columns(shape: Sequence[int], y_offset: int, size: int) -> int:
    y_offset = static("y_offset", y_offset)
    if not 0 <= y_offset <= shape[1] - size:
        raise ValueError(f"columns [{y_offset}, {y_offset + size}) leave y of shape {list(shape)}")
    return y_offset


# ------------------------------------------------------------------------ choice of implementation


@functools.cache
def _warn_loop() -> None:
    warnings.warn(
        "LoRA runs as one dense product per adapter slot (implementation 'loop'): slow, meant for "
        "comparison. Unset JAX_LORA_DISABLE_KERNELS, or name another implementation.",
        skip_file_prefixes=(_HERE,),
    )


def _gpu_capability() -> str | None:
    """Compute capability of the default device, such as "9.0"; None where that is no GPU."""
    device = jax.local_devices()[0]
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


@functools.cache
def _warn_no_hopper(capability: str) -> None:
    warnings.warn(
        f"the GPU has compute capability {capability}; jax-lora's kernels need Hopper's, 9.0, so "
        "LoRA runs as plain XLA",
        skip_file_prefixes=(_HERE,),
    )


def _choose(implementation: str | None, config: Any, missing: str | None) -> str:
    """The implementation that runs, by name; "auto" where the platform decides at lowering.

    `missing` says what the case asks of mosaic_gpu that it lacks. A named implementation never
    falls back.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )
    capability = _gpu_capability()
    if implementation is None:
        if kernels_disabled():
            implementation = "loop"
        elif missing is not None:
            implementation = "xla"
        elif capability in (None, "9.0"):
            implementation = "auto"
        else:
            _warn_no_hopper(capability)
            implementation = "xla"
    if implementation == "mosaic_gpu":
        if missing is not None:
            raise NotImplementedError(f"implementation 'mosaic_gpu' lacks {missing}")
        if capability not in (None, "9.0"):
            raise NotImplementedError(
                f"implementation 'mosaic_gpu' needs compute capability 9.0 (Hopper), this GPU has "
                f"{capability}"
            )
        if not isinstance(config, mosaic_gpu.Config | None):
            raise TypeError(f"config must be a mosaic_gpu.Config, got {config!r}")
    elif config is not None:
        raise ValueError(f"config needs implementation='mosaic_gpu', got {config!r}")
    if implementation == "loop":
        _warn_loop()
    return implementation


# By tokens, the least rank from which one call is faster by XLA's kernels, which deal A among all
# multiprocessors, than by clusters of eight. H100, side by side, T=1, mosaic_gpu and XLA: H=N=4096
# R=16 2.95 and 3.18 us, R=32 2.89 and 3.16, R=64 3.79 and 3.33; 2048 R=16 2.91 and 2.97, R=64 3.35
# and 3.07; 4096x14336 R=16 3.29 and 3.29; 14336x4096 R=16 3.52 and 3.47. T=2 R=128 5.9 and 4.1.
_XLA_FROM_RANK = {1: 64, 2: 128}


def prefers_xla(num_tokens: int, rank: int, phase: str) -> bool:
    """Whether `add_lora` takes "xla" on a GPU too, if not told otherwise."""
    least = _XLA_FROM_RANK.get(num_tokens)
    return least is not None and rank >= least and select_kernel(rank, phase) == "bgmv"


def _kernel(rank: int, phase: str) -> str:
    """bgmv or sgmv; where kernels are off, the form that a named implementation still takes."""
    kernel = select_kernel(rank, phase)
    return "sgmv" if kernel == "loop" else kernel


@functools.cache
def _named(run: Callable[..., Any], spec: _Spec) -> Callable[..., Any]:
    """run(spec, ...) under jit, by a name that tells in a jaxpr or a profile what ran."""
    if spec.implementation == "auto":
        on_gpu = _named(run, spec._replace(implementation="mosaic_gpu"))
        elsewhere = _named(run, spec._replace(implementation="xla"))
        return lambda *args: jax.lax.platform_dependent(*args, cuda=on_gpu, default=elsewhere)

    def call(*args: Any) -> Any:
        return run(spec, *args)

    kernels = () if spec.implementation == "loop" else tuple(dict.fromkeys(spec.kernels))
    call.__name__ = "_".join((*kernels, run.__name__, spec.implementation))
    # A kernel launch has no batching rule of its own: under vmap it runs once per element.
    batched = sequential_vmap(call) if spec.implementation == "mosaic_gpu" else call
    return jax.jit(batched)


# --------------------------------------------------------------------------- the three operations


def shrink(
    spec: _Spec, v: Array | None, x: Array, lora_a: Array, route: Route, scale: Array
) -> Array:
    if spec.implementation == "mosaic_gpu":
        x = mosaic_gpu.needs_hopper(x)
        return mosaic_gpu.shrink(x, lora_a, route, scale, v, config=spec.config)
    segments = as_segments(route, lora_a.shape[0])
    if spec.implementation == "loop":
        new = loop.shrink(x, lora_a, segments, scale)
    else:
        new = xla.shrink(x, lora_a, segments, scale, kernel=spec.kernels[0])
    return new if v is None else xla.add_rows(v, new, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shrink(spec: _Spec, *args: Any) -> Array:
    v: Array = _named(shrink, spec)(*args)
    return v


def _shrink_fwd(spec: _Spec, *args: Any) -> Any:
    return _shrink(spec, *args), args


@functools.partial(jax.jit, static_argnums=0)
def _shrink_bwd(spec: _Spec, residuals: Any, dv: Array) -> Any:
    v, x, lora_a, route, scale = derivatives.cotangents(spec.op, residuals)
    segments = as_segments(route, lora_a.shape[0])
    dx, da, ds = xla.shrink_grad(dv.astype(jnp.float32), x, lora_a, segments, scale)
    return None if v is None else dv, dx, da, None, ds


_shrink.defvjp(_shrink_fwd, _shrink_bwd)


def expand(spec: _Spec, v: Array, lora_b: Array, route: Route, y: Array) -> Array:
    (kernel,), (y_offset,), add_inputs = spec.kernels, spec.y_offsets, spec.add_inputs
    if spec.implementation == "mosaic_gpu":
        v = mosaic_gpu.needs_hopper(v)
        return mosaic_gpu.expand(
            v, lora_b, route, y, y_offset, add_inputs=add_inputs, config=spec.config
        )
    segments = as_segments(route, lora_b.shape[0])
    if spec.implementation == "loop":
        return loop.expand(v, lora_b, segments, y, y_offset, add_inputs=add_inputs)
    return xla.expand(v, lora_b, segments, y, y_offset, add_inputs=add_inputs, kernel=kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(spec: _Spec, *args: Any) -> Array:
    y: Array = _named(expand, spec)(*args)
    return y


def _expand_fwd(spec: _Spec, *args: Any) -> Any:
    return _expand(spec, *args), args[:3]


@functools.partial(jax.jit, static_argnums=0)
def _expand_bwd(spec: _Spec, residuals: Any, dy: Array) -> Any:
    v, lora_b, route = derivatives.cotangents(spec.op, residuals)
    segments = as_segments(route, lora_b.shape[0])
    dv, db, dy = xla.expand_grad(
        dy, v, lora_b, segments, spec.y_offsets[0], add_inputs=spec.add_inputs
    )
    return dv, db, None, dy


_expand.defvjp(_expand_fwd, _expand_bwd)


def add_lora_parts(spec: _Spec, ys: tuple[Array, ...], x: Array, stacks: Any) -> tuple[Array, ...]:
    if spec.implementation == "mosaic_gpu":
        x = mosaic_gpu.needs_hopper(x)
        how: Any = dict(fuse=spec.fuse, exclusive=spec.exclusive, config=spec.config)
        return mosaic_gpu.add_lora_multi(ys, x, _parts(spec, stacks), **how)
    y = side_by_side(ys)
    parts = _parts(spec, stacks, ordered=True)
    if spec.implementation == "loop":
        y = loop.add_lora_multi(y, x, parts)
    else:
        y = xla.add_lora_multi(y, x, parts, kernels=spec.kernels)
    return apart(y, ys)


def _parts(spec: _Spec, stacks: Any, *, ordered: bool = False) -> tuple[LoRAPart, ...]:
    """The parts; those with the same ids share one object. If `ordered` that is `Segments`, and
    a part has its own scales and stacks alone."""
    routes = {
        n: as_segments(stacks[n][2], stacks[n][0].shape[0]) if ordered else stacks[n][2]
        for n in set(spec.routes)
    }
    parts = []
    for n, (a, b, _, scales) in enumerate(stacks):
        offset = spec.scales_offsets[n]
        if ordered and offset is not None:
            scales, offset = scales[offset : offset + a.shape[0]], None
        part = LoRAPart(a, b, routes[spec.routes[n]], scales, spec.y_offsets[n], offset)
        parts.append(part.cut_out() if ordered else part)
    return tuple(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_lora(spec: _Spec, *args: Any) -> tuple[Array, ...]:
    ys: tuple[Array, ...] = _named(add_lora_parts, spec)(*args)
    return ys


def _add_lora_fwd(spec: _Spec, *args: Any) -> Any:
    return _add_lora(spec, *args), args[1:]


@functools.partial(jax.jit, static_argnums=0)
def _add_lora_bwd(spec: _Spec, residuals: Any, dys: tuple[Array, ...]) -> Any:
    x, stacks = derivatives.cotangents(spec.op, residuals)
    dx, dstacks, dy = jnp.zeros(x.shape, jnp.float32), [], side_by_side(dys)
    for n, part in enumerate(_parts(spec, stacks, ordered=True)):
        dx_part, da, db, ds = xla.add_lora_grad(dy, x, part)
        dx += dx_part
        if (offset := spec.scales_offsets[n]) is not None:
            ds = jnp.zeros_like(stacks[n][3]).at[offset : offset + ds.size].set(ds)
        a, b, *_ = stacks[n]
        dstacks.append((_like(a, da), _like(b, db), None, ds))
    return dys, dx.astype(x.dtype), tuple(dstacks)


def _like(stack: Any, gradient: Array) -> Any:
    return stack.put(gradient) if isinstance(stack, StackView) else gradient


_add_lora.defvjp(_add_lora_fwd, _add_lora_bwd)


# ------------------------------------------------------------------------------------ public names


def _shrink_op(
    kernel: str, x: ArrayLike, lora_a: ArrayLike, route: Any, scale: Any, how: Any, v: Any = None
) -> Array:
    lora_a = _stack("lora_a", lora_a, "L R H")
    x = _floats("x", x, "T H")
    _same("x and lora_a differ in features H", x.shape[1], lora_a.shape[2])
    route = _route(route, x.shape[0], lora_a.shape[0])
    scale = _scales("scale", scale, per_adapter=None)
    _, rank, features = lora_a.shape
    missing = mosaic_gpu.missing(lora_a.dtype, rank, features)
    implementation, config = how
    op = f"{kernel}_shrink"
    spec = _Spec(op, _choose(implementation, config, missing), (kernel,), config=config)
    if v is not None:
        v = _floats("v", v, "T R")
        _same("v and x differ in tokens T", v.shape[0], x.shape[0])
        _same("v and lora_a differ in rank R", v.shape[1], rank)
    if x.shape[0] == 0:
        return jnp.zeros((0, rank), jnp.float32) if v is None else v
    return _shrink(spec, *derivatives.operands(op, (v, x, lora_a, route, scale)))


def _expand_op(
    kernel: str,
    v: ArrayLike,
    lora_b: ArrayLike,
    route: Any,
    y: ArrayLike | None,
    columns: tuple[int, int] | None,
    add_inputs: bool,
    how: Any,
) -> Array:
    lora_b = _stack("lora_b", lora_b, "L N R")
    v = _floats("v", v, "T R")
    width = lora_b.shape[1]
    _same("v and lora_b differ in rank R", v.shape[1], lora_b.shape[2])
    y = jnp.zeros((v.shape[0], width), lora_b.dtype) if y is None else _floats("y", y, "T N")
    _same("v and y differ in tokens T", v.shape[0], y.shape[0])
    if columns is None:
        _same("y and lora_b differ in features N", y.shape[1], width)
        columns = 0, width
    y_offset, y_slice_size = columns[0], static("y_slice_size", columns[1])
    _same("y_slice_size and lora_b differ in features N", y_slice_size, width)
    y_offset = _columns(y.shape, y_offset, width)
    route = _route(route, v.shape[0], lora_b.shape[0])
    missing = mosaic_gpu.missing(
        lora_b.dtype, lora_b.shape[2], None, width, y.dtype, y.shape[1], y_offset
    )
    implementation, config = how
    op = f"{kernel}_expand"
    spec = _Spec(
        op,
        _choose(implementation, config, missing),
        (kernel,),
        (y_offset,),
        add_inputs=bool(add_inputs),
        config=config,
    )
    if v.shape[0] == 0:
        return y
    return _expand(spec, *derivatives.operands(op, (v, lora_b, route, y)))


def _need_segments(segments: Any) -> Segments:
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
    config: Any = None,
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
    return _shrink_op("bgmv", x, lora_a, indices, scale, (implementation, config))


def add_shrink(
    v: ArrayLike,
    x: ArrayLike,
    lora_a: ArrayLike,
    indices: ArrayLike | Segments | WideIndices,
    *,
    scale: ArrayLike = 1.0,
    implementation: Implementation | None = None,
    config: Any = None,
) -> Array:
    """v'[t] = v[t] + scale * x[t] @ lora_a[indices[t]].T; rows of -1 keep v. LoRAX's shrink.

    `v` is `[T, R]`, in whose dtype the float32 sum is rounded once. Otherwise as `bgmv_shrink`.
    """
    return _shrink_op("bgmv", x, lora_a, indices, scale, (implementation, config), v)


def bgmv_expand(
    v: ArrayLike,
    lora_b: ArrayLike,
    indices: ArrayLike,
    y: ArrayLike | None = None,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Any = None,
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
    how = implementation, config
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
    config: Any = None,
) -> Array:
    """`bgmv_expand` into columns `[y_offset, y_offset + y_slice_size)` of y; no other byte changes.

    `y_slice_size` is `lora_b`'s N; `y_offset` is a static int. Otherwise as `bgmv_expand`.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_expand_slice.py.
    """
    columns, how = (y_offset, y_slice_size), (implementation, config)
    return _expand_op("bgmv", v, lora_b, indices, y, columns, add_inputs, how)


def sgmv_shrink(
    x: ArrayLike,
    lora_a: ArrayLike,
    segments: Segments,
    *,
    scale: ArrayLike = 1.0,
    implementation: Implementation | None = None,
    config: Any = None,
) -> Array:
    """`bgmv_shrink` over `Segments`: the tokens of one adapter are multiplied together."""
    how = implementation, config
    return _shrink_op("sgmv", x, lora_a, _need_segments(segments), scale, how)


def sgmv_expand(
    v: ArrayLike,
    lora_b: ArrayLike,
    segments: Segments,
    y: ArrayLike | None = None,
    *,
    add_inputs: bool = True,
    implementation: Implementation | None = None,
    config: Any = None,
) -> Array:
    """`bgmv_expand` over `Segments`: the tokens of one adapter are multiplied together."""
    how = implementation, config
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
    config: Any = None,
) -> Array:
    """`bgmv_expand_slice` over `Segments`: the tokens of one adapter are multiplied together."""
    columns, how = (y_offset, y_slice_size), (implementation, config)
    return _expand_op("sgmv", v, lora_b, _need_segments(segments), y, columns, add_inputs, how)


def add_lora(
    y: ArrayLike,
    x: ArrayLike,
    lora_a: ArrayLike | StackView,
    lora_b: ArrayLike | StackView,
    indices: ArrayLike | Segments,
    *,
    scales: ArrayLike | None = None,
    phase: str = "decode",
    implementation: Implementation | None = None,
    config: Any = None,
) -> Array:
    """y'[t] = y[t] + scales[i] * (x[t] @ lora_a[i].T) @ lora_b[i].T where i = indices[t].

    Both halves in one call; rows of -1 keep y. `phase` picks the kernel by `select_kernel`.

    Args:
      y: `[T, N]`, the base layer's output.
      x: `[T, H]`.
      lora_a: `[L, R, H]` or `[L, 1, R, H]`.
      lora_b: `[L, N, R]` or `[L, 1, N, R]`.
      indices: `[T]` integers, or the `Segments` of them, so that layers share one sort.
      scales: a number, `[L]`, or None for 1.
      phase: "decode" (few tokens per adapter) or "prefill".
      implementation, config: as in `bgmv_shrink`. None is "xla" for a token or two of high ranks,
        where `add_lora_multi` stays with "mosaic_gpu".

    Returns:
      `[T, N]` in y's dtype.

    Raises: as `bgmv_shrink`; ValueError for an unknown phase.

    Source: LoRAX, PunicaWrapper.add_lora in server/lorax_server/utils/punica.py.
    """
    part = LoRAPart(lora_a, lora_b, indices, scales)
    y = _floats("y", y, "T N")
    _, width, rank = _stack_or_view("lora_b", lora_b, "L N R").shape
    _same("y and lora_b differ in features N", y.shape[1], width)
    if implementation is None and prefers_xla(y.shape[0], rank, phase):
        implementation = "xla"
    return add_lora_multi(y, x, (part,), phase=phase, implementation=implementation, config=config)


@overload
def add_lora_multi(
    y: ArrayLike,
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    *,
    phase: str = "decode",
    implementation: Implementation | None = None,
    fuse: bool = False,
    exclusive: bool = False,
    config: Any = None,
) -> Array: ...


@overload
def add_lora_multi(
    y: tuple[ArrayLike, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    *,
    phase: str = "decode",
    implementation: Implementation | None = None,
    fuse: bool = False,
    exclusive: bool = False,
    config: Any = None,
) -> tuple[Array, ...]: ...


def add_lora_multi(
    y: ArrayLike | tuple[ArrayLike, ...],
    x: ArrayLike,
    parts: Sequence[LoRAPart],
    *,
    phase: str = "decode",
    implementation: Implementation | None = None,
    fuse: bool = False,
    exclusive: bool = False,
    config: Any = None,
) -> Array | tuple[Array, ...]:
    """`add_lora` of several parts at once: rank buckets, slices of a packed projection, or both.

    Parts may differ in rank, width and adapters, and may overlap. Where several adapters add to
    the same columns of a token, their float32 sum is rounded to y's dtype once, or after each
    ("mosaic_gpu", up to 256 tokens; beyond, after each of several groups of parts, where a block's
    memory does not hold all of them). Parts that share ids are fastest with one `indices` object.

    Args:
      y: `[T, Ny]`, or a tuple of such arrays of one dtype, whose columns are counted as if they
        stood side by side: the outputs of several projections of one x.
      x: `[T, H]`, shared by all parts.
      parts: see `LoRAPart`.
      phase, implementation, config: as in `add_lora`.
      fuse: leave the addition to XLA, which fuses it with what makes y and what reads the result,
        and lets the LoRA run beside the product that makes y, on which it then doesn't wait: faster
        between the other operations of a jitted step, slower alone. Takes effect where "mosaic_gpu"
        takes all parts in one launch (up to 256 tokens); there a token's sum is rounded to y's
        dtype before it is added.
      exclusive: a promise that no token has adapters in several of the lists of ids, as is so with
        rank buckets. Then one launch shares its work out by rank. Of a token that breaks it, some
        adapters may be left out.

    Returns:
      `[T, Ny]` in y's dtype; a tuple of them where y is one.

    Raises: as `add_lora`; ValueError where a part's columns leave y; TypeError where the arrays of
      a tuple differ in dtype.
    """
    if isinstance(y, tuple):
        ys = tuple(_floats(f"y[{n}]", one, "T Ny") for n, one in enumerate(y))
        if not ys:
            raise ValueError("y must hold at least one array, got ()")
    else:
        ys = (_floats("y", y, "T Ny"),)
    if len(dtypes := {one.dtype for one in ys}) > 1:
        raise TypeError(f"the arrays of y must have one dtype, got {[str(d) for d in dtypes]}")
    x = _floats("x", x, "T H")
    for one in ys:
        _same("x and y differ in tokens T", x.shape[0], one.shape[0])
    widths = [one.shape[1] for one in ys]
    shape, dtype = [x.shape[0], sum(widths)], ys[0].dtype
    check_phase(phase)
    stacks: list[Any] = []
    kernels: list[str] = []
    y_offsets: list[int] = []
    scales_offsets: list[int | None] = []
    first_with_ids: list[int] = []
    seen: dict[tuple[int, int], int] = {}
    parts = tuple(parts)  # keeps their ids alive, which are told apart by identity
    for n, part in enumerate(parts):
        if not isinstance(part, LoRAPart):
            raise TypeError(f"parts[{n}] must be a LoRAPart, got {type(part).__name__}")
        a = _stack_or_view(f"parts[{n}].lora_a", part.lora_a, "L R H")
        b = _stack_or_view(f"parts[{n}].lora_b", part.lora_b, "L N R")
        _same(f"x and parts[{n}].lora_a differ in features H", x.shape[1], a.shape[2])
        _same(f"parts[{n}]: lora_a and lora_b differ in adapters L", a.shape[0], b.shape[0])
        _same(f"parts[{n}]: lora_a and lora_b differ in rank R", a.shape[1], b.shape[2])
        scales, scales_offset = _scales_at(f"parts[{n}]", part, a.shape[0])
        scales_offsets.append(scales_offset)
        y_offsets.append(_columns(shape, part.y_offset, b.shape[1]))
        stacks.append((a, b, _route(part.indices, x.shape[0], a.shape[0]), scales))
        first_with_ids.append(seen.setdefault((id(part.indices), a.shape[0]), n))
        kernels.append(_kernel(a.shape[1], phase))
    lacks = [
        mosaic_gpu.missing(
            weights.dtype, a.shape[1], a.shape[2], b.shape[1], dtype, width, y_offset
        )
        for (a, b, *_), y_offset in zip(stacks, y_offsets)
        for weights in (a, b)
        for width in (*widths, shape[1])
    ]
    lacks += [_misaligned(stack) for a, b, *_ in stacks for stack in (a, b)]
    lacks += [
        f"{a.dtype} lora_a beside {b.dtype} lora_b (it takes both in one dtype)"
        for a, b, *_ in stacks
        if a.dtype != b.dtype
    ]
    spans = tuple((start, start + b.shape[1]) for (_, b, *_), start in zip(stacks, y_offsets))
    lacks.append(mosaic_gpu.missing_together(spans))
    missing = next(filter(None, lacks), None)
    spec = _Spec(
        "add_lora",
        _choose(implementation, config, missing),
        tuple(kernels),
        tuple(y_offsets),
        tuple(scales_offsets),
        tuple(first_with_ids),
        fuse=bool(fuse),
        exclusive=bool(exclusive),
        config=config,
    )
    if stacks and shape[0] * shape[1]:
        ys = _add_lora(spec, *derivatives.operands("add_lora", (ys, x, tuple(stacks))))
    return ys if isinstance(y, tuple) else ys[0]
