"""Zero-copy exchange of arrays between PyTorch and JAX, and torch tensors that JAX updates."""

import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.dlpack
import torch
import torch.utils.dlpack

from interop import checks, internals, native

# What JAX narrows, by a copy, unless it is told to keep 64 bits.
_WIDE = (torch.int64, torch.uint64, torch.float64, torch.complex128)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """`tensor` as a JAX array on the same memory, ordered after torch's current stream.

    Gradients end here: a tensor that requires them is detached. The array is not a copy. JAX takes
    arrays to be constant and computes later than Python calls it, so while the array is in use
    torch must not write to the memory: a computation that was called before such a write may read
    what was there before, what was written, or a mix. Wait for its result first, or pass
    `tensor.clone()`.

    Args:
      tensor: dense and contiguous, on a CPU or CUDA device that JAX has.

    Raises:
      TypeError: not a tensor, a nested, wrapped or fake one, or a layout or dtype that JAX lacks.
      ValueError: not contiguous, a negated or conjugated view, memory that was freed, a
        forward-mode tangent, or JAX can't alias it (its address, its device). The message says what
        to do; nothing is ever copied silently.
      RuntimeError: the process was forked from one that had used JAX.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"to_jax takes a torch.Tensor, got {type(tensor).__name__}")
    internals.refuse_forked()
    checks.only_memory("to_jax: the tensor", tensor)
    if checks.has_tangent(tensor):
        raise ValueError(
            f"the tensor of shape {list(tensor.shape)} has a forward-mode tangent, which JAX would "
            "not see; use unpack_dual(tensor).primal"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"to_jax takes tensors on a CPU or CUDA device, got {tensor.device}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"to_jax takes dense tensors, got layout {tensor.layout}, dtype {tensor.dtype}; use "
            ".to_dense() or .dequantize()"
        )
    if tensor.dtype in _WIDE and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"JAX has no {tensor.dtype} unless jax_enable_x64 is set; convert the tensor to a "
            "narrower dtype"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"the tensor of shape {list(tensor.shape)} has strides {list(tensor.stride())}; use "
            ".contiguous()"
        )
    try:
        return jax.dlpack.from_dlpack(tensor.detach(), copy=False)
    except Exception as error:
        raise ValueError(
            f"JAX cannot alias this {tensor.dtype} tensor on {tensor.device} at address "
            f"{tensor.data_ptr():#x} ({error}); .clone() gives it memory of its own, aligned"
        ) from error


def to_torch(array: jax.Array) -> torch.Tensor:
    """`array` as a torch tensor on the same memory, ordered before torch's current stream.

    The tensor keeps the memory alive. Writing to it would change a JAX array, which is taken to be
    constant: don't, unless the array was donated or dropped.

    Raises:
      TypeError: not a concrete JAX array.
      ValueError: the array lies on several devices, or torch lacks its dtype.
      RuntimeError: the process was forked from one that had used JAX.
    """
    internals.refuse_forked()
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise TypeError(f"to_torch takes a concrete jax.Array, got {type(array).__name__}")
    if len(array.devices()) != 1:
        raise ValueError(f"to_torch takes an array on one device, got {array.sharding}")
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except Exception as error:
        raise ValueError(f"torch cannot take this {array.dtype} array ({error})") from error


def update(
    function: Callable[..., Sequence[jax.Array]],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    arrays: Sequence[jax.Array] = (),
) -> None:
    """outputs[:] = function(*outputs, *inputs, *arrays), in the outputs' own memory.

    In order with torch's current stream on both sides and without the host waiting: JAX starts
    after what is queued there, and what torch queues next starts after JAX. So memory that torch
    frees when this returns is as safe as after an operation of torch itself. On a CPU, whose arrays
    JAX does not overwrite, results are copied into the outputs.

    Args:
      function: jitted, with the outputs donated; as many results as outputs, of their shapes.
      outputs, inputs: contiguous tensors on one device. int64 inputs `[n]`, which JAX lacks by
        default, become `[n, 2]` words of int32.
      arrays: more inputs, which JAX has on that device.

    Raises:
      RuntimeError: a CUDA graph is being captured, of which JAX's work cannot be part.
      ValueError: a CUDA tensor's address is not a multiple of 16; inputs of integers are copied.
        A tensor's memory was freed.
    """
    device = outputs[0].device
    checks.need_memory((*outputs, *inputs))
    jax_device, ready = on_jax(device)
    if ready is None:
        # XLA wants 64-byte addresses, which slices seldom have: unlike in to_jax, they are copied.
        tensors = map(_words, (*outputs, *inputs))
        results = function(*[internals.alias(t, jax_device, None, None) for t in tensors], *arrays)
        for result in results:
            # Asking for its address would wait too, but with the GIL, which JAX's threads may need
            # to drop a tensor.
            result.block_until_ready()
    else:
        if torch._C._cuda_isCurrentStreamCapturing():
            raise RuntimeError(
                "JAX's work cannot be captured into a CUDA graph: path='native' can, for the cases "
                "that it takes, after one call before the capture"
            )
        for i, tensor in enumerate(outputs):
            if (pointer := tensor.data_ptr()) % native.ALIGNMENT:
                raise ValueError(native.misaligned(i, pointer))
        given = [_array(i, tensor, jax_device) for i, tensor in enumerate(inputs, len(outputs))]
        stream = _wait_for_torch(ready, device)
        # A program starts when all its arguments are ready, so one that waits for torch's stream
        # is enough, and spares an event of 11 us for each of the others (H200, 2026-11-22).
        first, *others = outputs
        donated = [internals.alias(first, jax_device, ready.cuda_stream, False)]
        donated += [internals.alias(t, jax_device, internals.READY, False) for t in others]
        results = function(*donated, *given, *arrays)
        for result in results:
            internals.wait(result, stream)
    for output, result in zip(outputs, results):
        # XLA may decline a donation, and on a CPU it does.
        if result.unsafe_buffer_pointer() != output.data_ptr():
            output.detach().copy_(torch.utils.dlpack.from_dlpack(result))


# JAX keeps all that it compiled, some 1.4 MB each. So programs are of few sizes: on a CPU always,
# where tensors are copied anyway; on a GPU, where they are not, from this many exact ones on.
_MOST_EXACT = 256
_exact: set[tuple[Any, ...]] = set()


def may_be_exact(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `function` is to be compiled for these shapes as they are, or padded."""
    if on_jax(tensors[0].device)[1] is None:  # a CPU
        return False
    key = function, *[(t.shape, t.dtype, t.device) for t in tensors]
    if len(_exact) < _MOST_EXACT:
        _exact.add(key)
    return key in _exact


def padded_rows(rows: int) -> int:
    """The next of 1, 2, 4, 8, 10, 12, 14, 16, 20, ...: four sizes from each power of two on."""
    step = 1 << max((rows - 1).bit_length() - 3, 0)
    return rows if rows < 3 else 4 * -(-rows // 4) if rows <= 8 else -(-rows // step) * step


def update_padded(
    function: Callable[..., Sequence[jax.Array]],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    rows: Mapping[int, int],
    arrays: Sequence[jax.Array] = (),
) -> None:
    """`update` by a program of a size that others use too: no result depends on other rows.

    Args:
      rows: numbers among `(*outputs, *inputs)` of the tensors that get more rows, with what these
        hold: adapter -1, or segments of no tokens.
    """
    tensors = [*outputs, *inputs]
    checks.need_memory(tensors)
    for i, fill in rows.items():
        tensor = tensors[i].detach()
        size = tensor.shape[0]
        if (padded := padded_rows(size)) != size:
            tensors[i] = tensor.new_full((padded, *tensor.shape[1:]), fill)
            tensors[i][:size].copy_(tensor)
    results = tensors[: len(outputs)]
    update(function, results, tensors[len(outputs) :], arrays)
    for output, result in zip(outputs, results):
        if result is not output:
            output.detach().copy_(result[: output.shape[0]])


def _words(tensor: torch.Tensor) -> torch.Tensor:
    words = tensor.dtype == torch.int64
    return tensor.detach().unsqueeze(1).view(torch.int32) if words else tensor.detach()


# As `id`, which takes ten times as long once anything hooks into Python's audit events.
identity = object.__hash__
_kept: dict[int, tuple[weakref.ref[torch.Tensor], Any, jax.Array]] = {}


def _array(number: int, tensor: torch.Tensor, device: jax.Device) -> jax.Array:
    """A CUDA tensor as an array, which is kept for calls that pass the same tensor again.

    Aliasing a tensor and dropping the array costs the host 10 us and more (H200, 2026-11-22).
    Weights come back in every step, indices in every layer, activations in every projection of a
    layer. The array lives as long as the tensor object, and reads its memory as it is then.
    """
    key, what = identity(tensor), (tensor.data_ptr(), tensor.shape, tensor.dtype)
    entry = _kept.get(key)
    if entry is not None and entry[0]() is tensor and entry[1] == what:
        return entry[2]
    # Aliasing `tensor` itself would keep that object alive, and so itself.
    alias, pointer = _words(tensor), what[0]
    if pointer % native.ALIGNMENT:  # as slices have it
        if tensor.is_floating_point():
            raise ValueError(native.misaligned(number, pointer))
        return internals.alias(alias.clone(), device, internals.READY, False)  # indices are few
    array = internals.alias(alias, device, internals.READY, False)
    _kept[key] = weakref.ref(tensor, lambda _: _kept.pop(key, None)), what, array
    return array


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}
_events = threading.local()


def _wait_for_torch(ready: torch.cuda.Stream, device: torch.device) -> int:
    """Makes `ready` wait for torch's current stream, whose handle this returns.

    What `ready.wait_stream(torch.cuda.current_stream())` does, without its two new objects.
    """
    handle = torch._C._cuda_getCurrentRawStream(device.index)
    key = handle, device.index
    stream = _streams.get(key)
    if stream is None:  # an ExternalStream of handle 0 would be a stream of its own
        stream = _streams[key] = (
            torch.cuda.ExternalStream(handle, device)
            if handle
            else torch.cuda.default_stream(device)
        )
    try:
        event = _events.by_device[device.index]
    except AttributeError:
        _events.by_device = {device.index: (event := torch.cuda.Event())}
    except KeyError:
        event = _events.by_device[device.index] = torch.cuda.Event()
    # A wait is for what was recorded last, so one event per thread is enough.
    event.record(stream)
    ready.wait_event(event)
    return handle


@functools.cache
def on_jax(device: torch.device) -> tuple[jax.Device, torch.cuda.ExternalStream | None]:
    """JAX's device that is `device`; of a GPU, the stream by which it takes arrays to be ready.

    Raises:
      ValueError: JAX does not have it.
      RuntimeError: the process was forked from one that had used JAX.
    """
    internals.refuse_forked()
    try:
        jax_device = next(
            d
            for d in jax.local_devices(backend=device.type)
            if device.type == "cpu" or d.local_hardware_id == device.index
        )
    except (RuntimeError, StopIteration) as error:
        raise ValueError(
            f"JAX has no {device}, it has {jax.local_devices()}; install jax-lora[cuda13] or "
            "[cuda12], and see that JAX_PLATFORMS allows it"
        ) from error
    if device.type == "cpu":
        return jax_device, None
    ready = jax_device.get_stream_for_external_ready_events()
    return jax_device, torch.cuda.ExternalStream(ready, device)


# A forked child asks anew, and is refused.
os.register_at_fork(after_in_child=on_jax.cache_clear)
