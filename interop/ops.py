"""LoRAX's ops on torch tensors, in place, computed by `pallas_kernels`."""

import functools
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad

import pallas_kernels
from interop import checks, functions, internals, native
from interop.dlpack import identity, may_be_exact, on_jax, update, update_padded

Path = Literal["dlpack", "native"]
Config = Mapping[str, int] | None


class Op(NamedTuple):
    """An op that changes its first tensor: its checks, its JAX function and its static arguments.

    It takes up to `tensors` tensors, `scaled` ones a scale besides. `torch.ops.jax_lora` has it by
    `name`, with None for what may be left out, and beside the differentiable one `add_lora`, which
    autograd follows. `rows` numbers the tensors whose first axis is tokens or segments, each with
    what a row holds that changes nothing.
    """

    name: str
    check: Callable[..., None]
    function: Callable[..., Any]
    tensors: int
    rows: Mapping[int, int]
    scaled: bool = False
    static: tuple[str, ...] = ()
    differentiable: bool = False


_TOKENS, _SEGMENTS = {0: 0, 1: 0, 3: -1}, {0: 0, 1: 0, 3: 0, 4: 0, 5: -1}
BGMV_SHRINK = Op("bgmv_shrink", checks.bgmv_shrink, functions.bgmv_shrink, 4, _TOKENS, scaled=True)
SGMV_SHRINK = Op(
    "sgmv_shrink", checks.sgmv_shrink, functions.sgmv_shrink, 6, _SEGMENTS, scaled=True
)
_EXPAND = ("offset", "add_inputs")
BGMV_EXPAND = Op(
    "bgmv_expand", checks.bgmv_expand, functions.bgmv_expand, 4, _TOKENS, static=_EXPAND
)
SGMV_EXPAND = Op(
    "sgmv_expand", checks.sgmv_expand, functions.sgmv_expand, 6, _SEGMENTS, static=_EXPAND
)
_ADD_LORA = ("offset", "phase")
ADD_LORA = Op(
    "add_lora_", checks.add_lora, functions.add_lora, 6, {0: 0, 1: 0, 4: -1}, True, _ADD_LORA, True
)

Tensors = tuple[torch.Tensor, ...]
_Route = Callable[[Tensors, float | None], None]  # runs an op, as autograd's versions tell

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What checks and compiled code depend on, with `is_contiguous` and torch's dispatch keys, which
# tell of negated views, ZeroTensors and wrappers.
_metadata = operator.attrgetter("shape", "dtype", "device")
_is_contiguous = torch.Tensor.is_contiguous
_is_nested = operator.attrgetter("is_nested")
_routes: dict[Any, _Route] = {}


def _dispatch_keys(tensor: torch.Tensor) -> int:
    return int(torch._C._dispatch_keys(tensor).raw_repr())


_changed = torch._C._increment_version

# What each stack of weights was last called with, and where that went.
_last: dict[Any, tuple[Callable[..., bool], _Route]] = {}
_MOST_KEPT = 4096
# A forked child chooses anew, and is told if JAX cannot run in it.
os.register_at_fork(after_in_child=_last.clear)
os.register_at_fork(after_in_child=_routes.clear)


def dispatch(
    op: Op, tensors: Tensors, scale: float | None, path: Any, static: tuple[Any, ...] = ()
) -> None:
    """Runs `op` now, or records it where torch traces: torch.compile, fake tensors, subclasses.

    Where gradients are recorded, a differentiable one becomes part of the graph.
    """
    grad = torch.is_grad_enabled()
    if not torch.compiler.is_dynamo_compiling():
        # An identity may pass to another tensor; what decides is that the tensors are alike.
        key = op.name, path, static, grad, len(tensors), identity(tensors[2])
        try:
            is_like, route = _last[key]
            # Likeness tells of negated views and torch.func's wrappers, not of tangents nor of
            # modes that record, and torch ends the process where it is asked of a nested tensor.
            is_plain = forward_ad._current_level < 0 and not torch._C._len_torch_dispatch_stack()
            may_ask = is_plain and not any(map(_is_nested, tensors))
        except (KeyError, TypeError, AttributeError):  # new, unhashable, or no tensor
            pass
        else:
            if may_ask and is_like(*tensors):
                return route(tensors, scale)
        checks.no_transforms(op.name.rstrip("_"), tensors)
    scales = (scale,) if op.scaled else ()
    recorded = *_in_full(op, tensors), *scales, *static, path
    if op.differentiable and grad and any(getattr(t, "requires_grad", False) for t in tensors):
        tensors[0].copy_(torch.ops.jax_lora.add_lora(*recorded))
    elif torch.compiler.is_compiling() or _is_traced(tensors):
        getattr(torch.ops.jax_lora, op.name)(*recorded)
    else:
        route = run(op, tensors, scale, path, static)
        if len(_last) >= _MOST_KEPT:
            _last.clear()
        _last[key] = internals.likeness(tensors), route


def run(
    op: Op, tensors: Tensors, scale: float | None, path: Any, static: tuple[Any, ...]
) -> _Route:
    """Runs `op` on tensors[1:], changing tensors[0]; returns the way it went."""
    try:
        key = op.name, path, static, *map(_metadata, tensors), *map(_is_contiguous, tensors)
        key += (*map(_dispatch_keys, tensors),)
        route = _routes.get(key)
    except (AttributeError, TypeError, RuntimeError):  # no tensors, unhashable, sparse
        route = None
    if route is None:
        checks.path(path)
        op.check(*_in_full(op, tensors), *static)
        route = _choose(op, tensors, scale, path, static)
        if len(_routes) >= _MOST_KEPT:
            _routes.clear()
        _routes[key] = route
    route(tensors, scale)
    return route


def _in_full(op: Op, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
    return *tensors, *[None] * (op.tensors - len(tensors))


def _is_traced(tensors: Tensors) -> bool:
    is_plain = all(type(t) in _PLAIN for t in tensors) and not torch._C._len_torch_dispatch_stack()
    return not is_plain and all(isinstance(t, torch.Tensor) for t in tensors)


def _choose(
    op: Op, tensors: Tensors, scale: float | None, path: Any, static: tuple[Any, ...]
) -> _Route:
    if any(0 in t.shape for t in tensors):
        return lambda tensors, scale: None
    arguments = {name: value or 0 if name == "offset" else value
                 for name, value in zip(op.static, static)}  # fmt: skip
    internals.refuse_forked()
    call = functions.bound(op.function, **arguments)
    if path != "dlpack":
        try:
            return _native(call, tensors, scale is not None)
        except NotImplementedError:
            if path == "native":
                raise
    return _by_dlpack(op, call, tensors)


# ---------------------------------------------------------------------------------------- by DLPack


def _by_dlpack(op: Op, call: Any, tensors: Tensors) -> _Route:
    function, device = functions.jitted(call, 1), tensors[0].device
    exact = may_be_exact(function, tensors)

    @functools.lru_cache(maxsize=64)
    def arrays(scale: float | None) -> tuple[jax.Array, ...]:
        return () if scale is None else (jax.device_put(np.float32(scale), on_jax(device)[0]),)

    def route(tensors: Tensors, scale: float | None) -> None:
        if exact:
            update(function, tensors[:1], tensors[1:], arrays(scale))
        else:
            update_padded(function, tensors[:1], tensors[1:], op.rows, arrays(scale))
        _changed((tensors[0],))

    return route


# ---------------------------------------------------------------------------------------- natively


def _native(call: Any, tensors: Tensors, scaled: bool) -> _Route:
    device = tensors[0].device
    if device.type != "cuda":
        raise NotImplementedError(f"path='native' needs CUDA tensors, got {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise NotImplementedError(
            f"path='native' needs compute capability 9.0 (Hopper), {device} has "
            f"{'.'.join(map(str, capability))}"
        )
    specs = [_spec(t) for t in tensors]
    if scaled:
        specs.append(jax.ShapeDtypeStruct((), np.float32))
    program = _program(call, tuple(specs), device)

    @functools.cache
    def address(scale: float | None) -> tuple[int, ...]:
        return () if scale is None else (_torch_scalar(scale, device).data_ptr(),)

    def route(tensors: Tensors, scale: float | None) -> None:
        try:
            program(tensors, address(scale))
        except ValueError:  # an address; nothing was launched
            program([*map(_aligned, tensors)], address(scale))
        _changed((tensors[0],))

    return route


@functools.cache  # for path=None and "native"
def _program(call: Any, specs: tuple[Any, ...], device: torch.device) -> native.Program:
    return native.compile(call, specs, device, donate=(0,))


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """Indices at addresses that GPU code cannot take, as slices have, are copied; they are few."""
    return t if t.is_floating_point() or not checks.has_memory(t) else t.clone()


def _spec(t: torch.Tensor) -> jax.ShapeDtypeStruct:
    if t.dtype == torch.int64:
        return jax.ShapeDtypeStruct((*t.shape, 2), np.int32)
    return jax.ShapeDtypeStruct(tuple(t.shape), str(t.dtype).removeprefix("torch."))


@functools.cache
def _torch_scalar(value: float, device: torch.device) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the scale {value} is new and cannot be brought to the GPU while a CUDA graph is "
            "captured: call the op once before"
        )
    return torch.tensor(value, dtype=torch.float32, device=device)


# ------------------------------------------------------------------------------------ public names


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
    override_config: Config = None,
    *,
    path: Path | None = None,
) -> None:
    """output_tensor[t] += scaling * inputs[t] @ lora_a_weights[i].T, i = lora_indices_tensor[t].

    In place; rows of -1, or of any other id outside `[0, L)`, keep every byte. LoRAX's split-K
    adds into its output, so this does, for every `override_config`.

    Args:
      inputs: `[T, H]` float32, bfloat16 or float16, as the weights.
      lora_a_weights: `[L, R, H]` or `[L, 1, R, H]`.
      output_tensor: `[T, R]` of any of these dtypes. The sum is float32, rounded once.
      lora_indices_tensor: `[T]` int32 or int64.
      scaling: a number.
      override_config: LoRAX's hints to Triton. Their names and values are checked; these kernels
        take their tiles from the shapes, so that equal shapes give equal bits.
      path: "native" or "dlpack", which never fall back; None for the native path where it takes
        the case.

    Raises:
      TypeError: no tensor, a sparse, nested or quantised one, or a dtype that is not listed above.
      ValueError: shapes that do not fit, tensors that are not contiguous or on several devices,
        negated views, memory that was freed, unknown hints or path.
      NotImplementedError: `path` is "native" and lacks what the case needs; a tensor of torch.func
        or with a forward-mode tangent.
      RuntimeError: a CUDA graph is being captured and the case is not native, or is new; the
        process was forked from one that had used JAX.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_shrink.py.
    """
    if override_config is not None:
        checks.hints("bgmv_shrink", override_config)
    scaling = checks.number("scaling", scaling)
    tensors = (output_tensor, inputs, lora_a_weights, lora_indices_tensor)
    dispatch(BGMV_SHRINK, tensors, scaling, path)


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
    override_config: Config = None,
    *,
    path: Path | None = None,
) -> None:
    """output_tensor[t] += inputs[t] @ lora_b_weights[i].T, i = lora_indices_tensor[t]; in place.

    Args:
      inputs: `[T, R]`. float32 is rounded to half-precision weights' dtype first, as LoRAX does.
      lora_b_weights: `[L, N, R]` or `[L, 1, N, R]`.
      output_tensor: `[T, N]`. The sum is float32, rounded once. Rows of -1 keep every byte.
      lora_indices_tensor, override_config, path: as in `bgmv_shrink`.
      add_inputs: False overwrites rows that have an adapter instead of adding to them.

    Raises: as `bgmv_shrink`.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_expand.py.
    """
    if override_config is not None:
        checks.hints("bgmv_expand", override_config)
    tensors = (output_tensor, inputs, lora_b_weights, lora_indices_tensor)
    dispatch(BGMV_EXPAND, tensors, None, path, (None, bool(add_inputs)))


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
    override_config: Config = None,
    *,
    path: Path | None = None,
) -> None:
    """`bgmv_expand` into columns `[slice_offset, slice_offset + slice_size)`, no other byte.

    `slice_size` is `lora_b_weights`' N.

    Source: LoRAX, server/lorax_server/utils/ops/bgmv_expand_slice.py.
    """
    if override_config is not None:
        checks.hints("bgmv_expand", override_config)
    offset = checks.columns(lora_b_weights, slice_offset, slice_size)
    tensors = (output_tensor, inputs, lora_b_weights, lora_indices_tensor)
    dispatch(BGMV_EXPAND, tensors, None, path, (offset, bool(add_inputs)))


def sgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    scaling: float,
    *,
    path: Path | None = None,
) -> None:
    """`bgmv_shrink` by segments: segment s is seq_len_tensor[s] tokens from b_seq_start_loc[s] on.

    Tokens that no segment covers keep every byte.

    Args:
      inputs, lora_a_weights, output_tensor, scaling, path: as in `bgmv_shrink`.
      b_seq_start_loc: `[S]` int32 or int64, first token of each segment.
      seq_len_tensor: `[S]`, tokens of each segment.
      lora_indices_tensor: `[S]`, adapter of each segment; -1 for none.
      batches: S.
      max_seq_length: the bound of seq_len_tensor that sizes LoRAX's grid; it changes nothing here.

    Raises: as `bgmv_shrink`.

    Source: LoRAX, server/lorax_server/utils/ops/sgmv_shrink.py.
    """
    checks.segment_counts(lora_indices_tensor, batches, max_seq_length)
    scaling = checks.number("scaling", scaling)
    tensors = (
        output_tensor, inputs, lora_a_weights, b_seq_start_loc, seq_len_tensor, lora_indices_tensor,
    )  # fmt: skip
    dispatch(SGMV_SHRINK, tensors, scaling, path)


def sgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    add_inputs: bool = False,
    *,
    path: Path | None = None,
) -> None:
    """`bgmv_expand` by the segments of `sgmv_shrink`.

    Source: LoRAX, server/lorax_server/utils/ops/sgmv_expand.py.
    """
    checks.segment_counts(lora_indices_tensor, batches, max_seq_length)
    tensors = (
        output_tensor, inputs, lora_b_weights, b_seq_start_loc, seq_len_tensor, lora_indices_tensor,
    )  # fmt: skip
    dispatch(SGMV_EXPAND, tensors, None, path, (None, bool(add_inputs)))


def sgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
    *,
    path: Path | None = None,
) -> None:
    """`bgmv_expand_slice` by the segments of `sgmv_shrink`.

    Source: LoRAX, server/lorax_server/utils/ops/sgmv_expand_slice.py.
    """
    checks.segment_counts(lora_indices_tensor, batches, max_seq_length)
    offset = checks.columns(lora_b_weights, slice_offset, slice_size)
    tensors = (
        output_tensor, inputs, lora_b_weights, b_seq_start_loc, seq_len_tensor, lora_indices_tensor,
    )  # fmt: skip
    dispatch(SGMV_EXPAND, tensors, None, path, (offset, bool(add_inputs)))


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    indices: torch.Tensor,
    *,
    scales: float | torch.Tensor | None = None,
    phase: Literal["decode", "prefill"] = "decode",
    y_offset: int | None = None,
    path: Path | None = None,
) -> torch.Tensor:
    """y[t] += scales[i] * (x[t] @ lora_a[i].T) @ lora_b[i].T where i = indices[t]; returns y.

    In place, both halves in one call; rows of -1 keep every byte. Where gradients are recorded and
    y, x, lora_a, lora_b or scales requires them, autograd follows the change of y.

    Args:
      y: `[T, N]` float32, bfloat16 or float16.
      x: `[T, H]`.
      lora_a: `[L, R, H]` or `[L, 1, R, H]`.
      lora_b: `[L, N, R]` or `[L, 1, N, R]`.
      indices: `[T]` int32 or int64.
      scales: a number, `[L]` floats, or None for 1.
      phase: "decode" (few tokens per adapter) or "prefill".
      y_offset: the first of the N columns of a wider y that change; None where y has N columns.
      path: as in `bgmv_shrink`.

    Raises: as `bgmv_shrink`; ValueError for an unknown phase.

    Source: LoRAX, PunicaWrapper.add_lora in server/lorax_server/utils/punica.py.
    """
    tensors: Tensors = (y, x, lora_a, lora_b, indices)
    scale = None
    if type(scales) is not float and isinstance(scales, torch.Tensor):  # the latter takes 0.1 us
        tensors = *tensors, scales
    else:
        scale = checks.number("scales", 1.0 if scales is None else scales)
    offset = None if y_offset is None else checks.count("y_offset", y_offset)
    dispatch(ADD_LORA, tensors, scale, path, (offset, phase))
    return y


def pad_rank(t: torch.Tensor, dim: int, world_size: int = 1) -> torch.Tensor:
    """`t` with axis `dim` zero-padded to `padded_rank(t.shape[dim], world_size)`.

    Raises:
      TypeError: `t` is not a tensor.
      ValueError: `t` has no axis `dim`, or that axis is empty.

    Source: LoRAX, server/lorax_server/utils/punica.py.
    """
    _need_tensor("t", t)
    if not -t.ndim <= dim < t.ndim:
        raise ValueError(f"dim must name an axis of shape {list(t.shape)}, got {dim}")
    rank = t.shape[dim]
    missing = pallas_kernels.padded_rank(rank, world_size) - rank
    after = t.ndim - 1 - dim % t.ndim
    return torch.nn.functional.pad(t, (0, 0) * after + (0, missing)) if missing else t


def orient_for_rank(t: torch.Tensor, rank: int) -> torch.Tensor:
    """`t` as LoRAX stores it for `rank`: axes 0 and 1 swapped for ranks 16 to 128, else as is.

    Raises:
      TypeError: `t` is not a tensor.
      ValueError: `rank` is below 1.
    """
    _need_tensor("t", t)
    tier = pallas_kernels.rank_tier(rank)
    return t.transpose(0, 1) if tier is pallas_kernels.RankTier.CUSTOM else t


def _need_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
