"""Pallas:Mosaic GPU kernels on torch's current CUDA stream, without JAX's runtime.

    program = compile(function, (x_spec, y_spec), torch.device("cuda"), donate=(1,))
    program((x, y))         # a few microseconds of host time; torch.cuda.CUDAGraph captures it

The function is lowered by JAX once per shapes. What is left of it must be Mosaic kernels and
operations that move nothing, such as reshapes: then running it is launching those kernels in
order, and this needs pointers and a stream, nothing else.
"""

import functools
import operator
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from interop import checks, internals

ALIGNMENT = 16  # bytes: TMA's, and what XLA assumes of its parameters
_BLOCK = 256  # bytes: buffers of the scratch memory start at multiples of it
# A tensor whose storage was freed starts at its offset in bytes, and no tensor has so many.
_OFFSETS = 2**40

Program = Callable[..., Any]  # what `compile` returns

# What these do to dense tensors moves no byte: the result is the operand under another shape.
_FREE = ("stablehlo.reshape", "stablehlo.optimization_barrier")


class _Buffer:
    """Memory that StableHLO values share, since a kernel or a reshape passes it on."""

    def __init__(self, nbytes: int, argument: int | None = None, constant: Any = None) -> None:
        self.nbytes, self.argument, self.constant = nbytes, argument, constant
        self.writes = 0


class _Value(NamedTuple):
    """A StableHLO value: what its buffer holds after so many writes."""

    buffer: _Buffer
    writes: int


class _Plan:
    """The kernels of a lowered function in order, with the buffers that each reads and writes."""

    def __init__(self, module: Any, donate: Sequence[int]) -> None:
        self.kernels: list[tuple[bytes, list[_Buffer]]] = []
        self.obstacles: list[str] = []
        self._functions, self._donate = internals.functions(module), donate
        main = internals.block(self._functions["main"])
        values = {
            value: _Value(_Buffer(_nbytes(value), argument=i), 0)
            for i, value in enumerate(main.arguments)
        }
        self.arguments = [value.buffer for value in values.values()]
        self.results = [self._read(value) for value in self._run(main, values)]
        for i, buffer in enumerate(self.results):
            if buffer.constant is not None or self.results.index(buffer) != i:
                self._refuse(f"result {i} is a constant or another result")
            if buffer.argument is not None and not buffer.writes:
                self._refuse(f"result {i} is argument {buffer.argument} as it is")

    def _refuse(self, reason: str) -> None:
        if reason not in self.obstacles:
            self.obstacles.append(reason)

    def _read(self, value: _Value) -> _Buffer:
        if value.writes != value.buffer.writes:
            self._refuse("a kernel overwrites what is read later")
        return value.buffer

    def _run(self, block: Any, values: dict[Any, _Value]) -> list[_Value]:
        """What the block returns, given the values that it may refer to."""
        returned: list[_Value] = []
        for operation in block.operations:
            operands = [values[operand] for operand in operation.operands]
            if operation.name.endswith(".return"):
                returned = operands
            else:
                results = self._operation(operation, operands, values)
                values.update(zip(operation.results, results))
        return returned

    def _operation(
        self, operation: Any, operands: list[_Value], values: dict[Any, _Value]
    ) -> list[_Value]:
        if operation.name in _FREE:
            return operands
        if operation.name == "func.call":
            block = internals.block(self._functions[internals.callee(operation)])
            return self._run(block, dict(zip(block.arguments, operands)))
        if operation.name == "stablehlo.case":  # of platforms, of which this is one
            which = operands[0].buffer.constant
            if which is not None:
                return self._run(internals.block(operation, int(which)), dict(values))
        if (kernel := internals.mosaic_module(operation)) is not None:
            return self._kernel(kernel, operation, operands)
        constant = self._constant(operation, operands)
        if constant is None:
            self._refuse(internals.name(operation))
        return [
            _Value(_Buffer(_nbytes(result), constant=constant), 0) for result in operation.results
        ]

    def _constant(self, operation: Any, operands: list[_Value]) -> Any:
        if operation.name == "stablehlo.constant":
            return internals.constant(operation)
        if operation.name == "stablehlo.broadcast_in_dim":
            value, [result] = operands[0].buffer.constant, operation.results
            if value is not None and not internals.broadcast_dimensions(operation):
                return np.broadcast_to(value, internals.shape(result)[0])
        return None

    def _kernel(self, kernel: bytes, operation: Any, operands: list[_Value]) -> list[_Value]:
        buffers = [self._read(operand) for operand in operands]
        overwritten = internals.aliases(operation)
        outputs = []
        for i, result in enumerate(operation.results):
            if i not in overwritten:
                outputs.append(_Buffer(_nbytes(result)))
                continue
            buffer = buffers[overwritten[i]]
            if buffer.constant is not None:
                self._refuse("a kernel overwrites a constant")
            elif buffer.argument is not None and buffer.argument not in self._donate:
                self._refuse(
                    f"a kernel overwrites argument {buffer.argument}, which is not donated"
                )
            buffer.writes += 1
            outputs.append(buffer)
        self.kernels.append((kernel, buffers + outputs))
        return [_Value(buffer, buffer.writes) for buffer in outputs]


def _nbytes(value: Any) -> int:
    shape, bits = internals.shape(value)
    return int(np.prod(shape, dtype=np.int64)) * max(bits, 8) // 8


def misaligned(argument: int, pointer: int) -> str:
    return (
        f"tensor {argument} starts at address {pointer:#x}; GPU code needs a multiple of "
        f"{ALIGNMENT}: .clone() gives it memory of its own"
    )


class _Thread(threading.local):
    has_context = False  # that this module knows of


_thread = _Thread()


class _Scratch(threading.local):
    """Memory between the kernels of one call, never shared with calls that may overlap it.

    Those of one thread on one stream follow each other. A captured graph may be replayed on any
    stream, so its memory is its own, from its pool.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._new = functools.partial(torch.empty, nbytes, dtype=torch.uint8, device=device)
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, stream: int) -> torch.Tensor:
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._new()
        if stream not in self._kept:
            self._kept[stream] = self._new()
        return self._kept[stream]


def _link(plan: _Plan, specs: Sequence[Any], device: torch.device) -> Program:
    # A kernel's pointers are picked from one list: arguments, results, constants, scratch.
    place = {id(buffer): i for i, buffer in enumerate(plan.arguments)}
    fresh = []
    for buffer, spec in zip(plan.results, specs):
        if buffer.argument is None:
            place[id(buffer)] = len(place)
            dtype = getattr(torch, np.dtype(spec.dtype).name)
            fresh.append(functools.partial(torch.empty, spec.shape, dtype=dtype, device=device))
    others = {id(b): b for _, buffers in plan.kernels for b in buffers if id(b) not in place}
    constants = []
    for key, buffer in others.items():
        if buffer.constant is not None:
            place[key] = len(place)
            constants.append(torch.from_numpy(np.array(buffer.constant)).to(device))
    offsets, nbytes = [], 0
    for key, buffer in others.items():
        if buffer.constant is None:
            place[key] = len(place)
            offsets.append(nbytes)
            nbytes += -(-buffer.nbytes // _BLOCK) * _BLOCK
    scratch = _Scratch(nbytes, device)
    returned = operator.itemgetter(*[place[id(buffer)] for buffer in plan.results])
    launches = []
    with torch.cuda.device(device):
        internals.enter(device.index)
        for kernel, buffers in plan.kernels:
            places = [place[id(buffer)] for buffer in buffers]
            places += places[:1]  # which no kernel reads: of one place itemgetter makes no tuple
            pack = struct.Struct(f"{len(places)}P").pack
            launches.append((internals.compile_mosaic(kernel), pack, operator.itemgetter(*places)))

    # All that a call needs is in variables, which are read faster than attributes.
    index, get_device = device.index, torch._C._cuda_getDevice
    get_stream, handle = torch._C._cuda_getCurrentRawStream, internals.handle

    def program(tensors: Sequence[torch.Tensor], kept: Sequence[int] = ()) -> Any:
        if get_device() != index:
            with torch.cuda.device(index):
                return program(tensors, kept)
        if not _thread.has_context:
            internals.enter(index)
            _thread.has_context = True
        pointers = [tensor.data_ptr() for tensor in tensors]
        for pointer in pointers:
            if pointer < _OFFSETS:
                checks.need_memory(tensors)
            if pointer % ALIGNMENT:
                raise ValueError(misaligned(pointers.index(pointer), pointer))
        pointers += kept
        stream = get_stream(index)
        values: Sequence[Any] = tensors
        if fresh:
            results = [new() for new in fresh]
            values = *tensors, *kept, *results
            pointers += [tensor.data_ptr() for tensor in results]
        if constants:
            pointers += [tensor.data_ptr() for tensor in constants]
        if offsets:
            memory = scratch(stream)
            start = memory.data_ptr()
            pointers += [start + offset for offset in offsets]
        for launch, pack, pick in launches:
            launch(handle(stream), pack(*pick(pointers)))
        return returned(values)

    return program


def plan(function: Callable[..., Any], arguments: Sequence[Any], donate: Sequence[int]) -> _Plan:
    """The kernels of `function`, lowered for CUDA, also on a machine without a GPU.

    Raises:
      NotImplementedError: something stands in the way; the message lists all of it.
    """
    module = internals.lower(function, tuple(arguments))
    found = _Plan(module, donate)
    if found.obstacles:
        raise NotImplementedError(
            "path='native' runs functions of Pallas:Mosaic GPU kernels alone; in the way: "
            + ", ".join(found.obstacles)
        )
    return found


def compile(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    device: torch.device,
    *,
    donate: Sequence[int] = (),
) -> Program:
    """`function` of JAX arrays as one of torch tensors, queued on torch's current stream.

    The tensors must be contiguous CUDA tensors, of the shapes and dtypes it was compiled for, and
    at addresses that are multiples of 16; only the last is checked, by a ValueError. It returns the
    result, or a tuple of several: those that overwrite an argument are that tensor, others are new.
    Addresses may stand for the last arguments, as in program((x, y), (scale.data_ptr(),)), if the
    caller keeps that memory. Threads and streams may share it.

    Args:
      function: positional arrays to a pytree of arrays, made of `plgpu.kernel` calls.
      arguments: a `jax.ShapeDtypeStruct` per array.
      device: the CUDA device that it is compiled for.
      donate: numbers of the arguments that kernels may overwrite.

    Raises:
      NotImplementedError: JAX has no CUDA plugin or is a version this was not tried with, or the
        function does more than launch Mosaic kernels; the message lists what.
      RuntimeError: a CUDA graph is being captured: loading kernels cannot be part of one.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a kernel cannot be compiled while a CUDA graph is captured: call it once before with "
            "tensors of these shapes"
        )
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    found = plan(function, arguments, donate)
    return _link(found, jax.tree.leaves(jax.eval_shape(function, *arguments)), device)
