"""What the ops ask of their tensors: a clear error before anything is written.

Only metadata is read, so the same checks serve the fake tensors of torch.compile.
"""

import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import DispatchKey

PATHS = (None, "dlpack", "native")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)

# Keys of LoRAX's override_config: Triton's tiles, splits and launch options.
_HINTS = {
    "bgmv_shrink": {"BLOCK_K", "SPLIT_K", "num_warps", "num_stages", "num_ctas"},
    "bgmv_expand": {"BLOCK_N", "SPLIT_N", "num_warps", "num_stages", "num_ctas"},
}


def path(value: Any) -> None:
    if value not in PATHS:
        raise ValueError(f"path must be None, 'dlpack' or 'native', got {value!r}")


def hints(op: str, config: Mapping[str, int]) -> None:
    """LoRAX's `override_config`: hints, whose names and values are checked."""
    if not isinstance(config, Mapping):
        raise TypeError(f"override_config must be a dict or None, got {type(config).__name__}")
    if unknown := [key for key in config if key not in _HINTS[op]]:
        raise ValueError(
            f"override_config of {op} may hint {', '.join(sorted(_HINTS[op]))}; it has no {unknown}"
        )
    for key, value in config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"override_config[{key!r}] must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"override_config[{key!r}] must be at least 1, got {value}")


def number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def count(name: str, value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _transform(tensor: torch.Tensor) -> str | None:
    """The transform of torch.func that wraps a tensor, which has no memory then."""
    if torch._is_functional_tensor(tensor):
        return "functionalize"
    if torch._C._functorch.is_batchedtensor(tensor):
        return "vmap"
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return "grad, vjp or jvp" if is_wrapped else None


def no_transforms(op: str, tensors: Any) -> None:
    """Refuses what torch.func and forward-mode differentiation pass, which no op here follows."""
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            continue
        if transform := _transform(tensor):
            raise NotImplementedError(
                f"{op} does not run under torch.func ({transform}), got a wrapped tensor of shape "
                f"{list(tensor.shape)}; call it outside of the transform"
            )
        if has_tangent(tensor):
            raise NotImplementedError(
                f"{op} has no forward-mode derivative, got a tensor of shape "
                f"{list(tensor.shape)} with a tangent; use reverse mode (backward), or pass "
                "unpack_dual(tensor).primal"
            )


def has_tangent(tensor: torch.Tensor) -> bool:
    # An integer has none, and outside of a level nothing has.
    if forward_ad._current_level < 0 or not tensor.is_floating_point():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _is_wrapper(tensor: torch.Tensor) -> bool:
    return bool(torch._C._dispatch_keys(tensor).has(DispatchKey.Python))


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage is as long as the tensor needs: FSDP frees storages under tensors."""
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return not tensor.numel() or tensor.untyped_storage().nbytes() >= needed


def only_memory(name: str, tensor: torch.Tensor) -> None:
    """Refuses tensors whose values are not, or not only, what their memory holds.

    Raises:
      TypeError: a nested tensor or a wrapper, such as a fake tensor.
      ValueError: a negated or conjugated view, or memory that was freed or never was.
    """
    if tensor.is_nested:
        raise TypeError(f"{name} must not be a nested tensor; use .unbind() or .to_padded_tensor()")
    what = f"{name} of shape {list(tensor.shape)}"
    if transform := _transform(tensor):
        raise TypeError(
            f"{what} is wrapped by torch.func ({transform}) and has no memory of its own"
        )
    if _is_wrapper(tensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}, a wrapper without memory of its own")
    _plain_view(what, tensor)
    if tensor.layout == torch.strided and tensor.device.type != "meta" and not has_memory(tensor):
        raise ValueError(
            f"{what} has no memory: its storage was freed or shrunk to "
            f"{tensor.untyped_storage().nbytes()} bytes; restore the storage before the call"
        )


def need_memory(tensors: Sequence[torch.Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if not has_memory(tensor):
            only_memory(f"tensor {i}", tensor)


def _plain_view(what: str, tensor: torch.Tensor) -> None:
    if tensor._is_zerotensor():
        raise ValueError(f"{what} is a ZeroTensor, which has no memory; use .clone()")
    if tensor.is_neg():
        raise ValueError(
            f"{what} is a view whose memory holds the negated values; use .resolve_neg()"
        )
    if tensor.is_conj():
        raise ValueError(
            f"{what} is a view whose memory holds the conjugate values; use .resolve_conj()"
        )


def _dense(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must not be a nested tensor; use .unbind() or .to_padded_tensor()")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}; use .to_dense()")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {value.dtype}; use .dequantize()")
    if not _is_wrapper(value):  # torch's own dispatch unwraps those, or takes them to be fake
        only_memory(name, value)
    return value


def _contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}; use .contiguous()"
        )


def _floats(name: str, value: Any, *forms: str) -> torch.Tensor:
    """A contiguous float tensor with as many axes as one of `forms`, such as "T H"."""
    tensor = _dense(name, value)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.ndim not in [len(form.split()) for form in forms]:
        wanted = " or ".join(f"[{form.replace(' ', ', ')}]" for form in forms)
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    _contiguous(name, tensor)
    return tensor


def _integers(name: str, value: Any, size: int, what: str) -> torch.Tensor:
    tensor = _dense(name, value)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.ndim != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} must have shape [{size}] ({what}), got {list(tensor.shape)}")
    _contiguous(name, tensor)
    return tensor


def _stack(name: str, value: Any, axes: str) -> tuple[int, int, int]:
    """Sizes of a weight stack, without the second axis of LoRAX's 4-D form."""
    first, rest = axes.split(" ", 1)
    shape = tuple(_floats(name, value, axes, f"{first} 1 {rest}").shape)
    if len(shape) == 4:
        if shape[1] != 1:
            raise ValueError(f"{name} must have 1 on axis 1, got {list(shape)}")
        shape = (shape[0], *shape[2:])
    if 0 in shape:
        raise ValueError(f"{name} must not have an empty axis, got {list(shape)}")
    return shape[0], shape[1], shape[2]


def _same(what: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise ValueError(f"{what}: {expected} and {got}")


def _one_device(**tensors: torch.Tensor) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) != 1:
        raise ValueError(f"the tensors must be on one device, got {devices}")
    if next(iter(tensors.values())).device.type not in ("cpu", "cuda"):
        raise ValueError(f"the tensors must be on a CPU or CUDA device, got {devices}")


def _columns(name: str, output: torch.Tensor, width: int, offset: int | None) -> None:
    if offset is None:
        _same(f"{name} and the weights differ in features N", output.shape[1], width)
    elif not 0 <= offset <= output.shape[1] - width:
        raise ValueError(
            f"columns [{offset}, {offset + width}) leave {name} of shape {list(output.shape)}"
        )


def bgmv_shrink(output: Any, inputs: Any, lora_a: Any, ids: Any) -> None:
    _shrink(output, inputs, lora_a)
    _integers("lora_indices_tensor", ids, inputs.shape[0], "tokens of inputs")
    _one_device(inputs=inputs, lora_a_weights=lora_a, output_tensor=output, lora_indices_tensor=ids)


def sgmv_shrink(output: Any, inputs: Any, lora_a: Any, starts: Any, lengths: Any, ids: Any) -> None:
    _shrink(output, inputs, lora_a)
    _segments(starts, lengths, ids)
    _one_device(
        inputs=inputs, lora_a_weights=lora_a, output_tensor=output, b_seq_start_loc=starts,
        seq_len_tensor=lengths, lora_indices_tensor=ids,
    )  # fmt: skip


def bgmv_expand(
    output: Any, inputs: Any, lora_b: Any, ids: Any, offset: int | None, add_inputs: bool
) -> None:
    _expand(output, inputs, lora_b, offset)
    _integers("lora_indices_tensor", ids, inputs.shape[0], "tokens of inputs")
    _one_device(inputs=inputs, lora_b_weights=lora_b, output_tensor=output, lora_indices_tensor=ids)


def sgmv_expand(
    output: Any, inputs: Any, lora_b: Any, starts: Any, lengths: Any, ids: Any,
    offset: int | None, add_inputs: bool,
) -> None:  # fmt: skip
    _expand(output, inputs, lora_b, offset)
    _segments(starts, lengths, ids)
    _one_device(
        inputs=inputs, lora_b_weights=lora_b, output_tensor=output, b_seq_start_loc=starts,
        seq_len_tensor=lengths, lora_indices_tensor=ids,
    )  # fmt: skip


def _shrink(output: Any, inputs: Any, lora_a: Any) -> None:
    _, rank, features = _stack("lora_a_weights", lora_a, "L R H")
    _floats("inputs", inputs, "T H")
    _floats("output_tensor", output, "T R")
    if inputs.dtype != lora_a.dtype:
        raise TypeError(
            f"inputs and lora_a_weights must have one dtype, got {inputs.dtype} and {lora_a.dtype}"
        )
    _same("inputs and lora_a_weights differ in features H", inputs.shape[1], features)
    _same("inputs and output_tensor differ in tokens T", inputs.shape[0], output.shape[0])
    _same("output_tensor and lora_a_weights differ in rank R", output.shape[1], rank)


def _expand(output: Any, inputs: Any, lora_b: Any, offset: int | None) -> None:
    _, width, rank = _stack("lora_b_weights", lora_b, "L N R")
    _floats("inputs", inputs, "T R")
    _floats("output_tensor", output, "T N")
    _same("inputs and lora_b_weights differ in rank R", inputs.shape[1], rank)
    _same("inputs and output_tensor differ in tokens T", inputs.shape[0], output.shape[0])
    _columns("output_tensor", output, width, offset)


def _segments(starts: Any, lengths: Any, ids: Any) -> None:
    batches = _dense("b_seq_start_loc", starts).numel()
    _integers("b_seq_start_loc", starts, batches, "segments")
    _integers("seq_len_tensor", lengths, batches, "segments of b_seq_start_loc")
    _integers("lora_indices_tensor", ids, batches, "segments of b_seq_start_loc")


def add_lora(
    y: Any, x: Any, lora_a: Any, lora_b: Any, ids: Any, scales: Any, offset: int | None, phase: str
) -> None:
    num_adapters, rank, features = _stack("lora_a", lora_a, "L R H")
    num_b, width, rank_b = _stack("lora_b", lora_b, "L N R")
    _floats("x", x, "T H")
    _floats("y", y, "T N")
    _same("lora_a and lora_b differ in adapters L", num_adapters, num_b)
    _same("lora_a and lora_b differ in rank R", rank, rank_b)
    _same("x and lora_a differ in features H", x.shape[1], features)
    _same("x and y differ in tokens T", x.shape[0], y.shape[0])
    _columns("y", y, width, offset)
    _integers("indices", ids, x.shape[0], "tokens of x")
    tensors = {"y": y, "x": x, "lora_a": lora_a, "lora_b": lora_b, "indices": ids}
    if scales is not None:
        tensors["scales"] = _floats("scales", scales, "L")
        _same("scales and lora_a differ in adapters L", scales.shape[0], num_adapters)
    _one_device(**tensors)
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase must be 'decode' or 'prefill', got {phase!r}")


def add_lora_slices(y: Any, x: Any, *others: Any) -> None:
    *stacks, ids, offsets = others
    for a, b, offset in zip(stacks[: len(offsets)], stacks[len(offsets) :], offsets):
        add_lora(y, x, a, b, ids, None, offset, "decode")


def columns(weights: Any, offset: Any, size: Any) -> int:
    """A slice's offset; its size must be the weights' N."""
    size = count("slice_size", size)
    try:
        width = weights.shape[-2]
    except (AttributeError, IndexError):  # the op's own check says so
        width = size
    _same("slice_size and lora_b_weights differ in features N", width, size)
    return count("slice_offset", offset)


def segment_counts(ids: Any, batches: Any, max_seq_length: Any) -> None:
    count("max_seq_length", max_seq_length)
    batches = count("batches", batches)
    if isinstance(ids, torch.Tensor) and ids.ndim == 1:
        _same("batches and lora_indices_tensor differ in segments", batches, ids.shape[0])
