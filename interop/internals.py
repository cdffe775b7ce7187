"""All that this package takes from JAX's internals, and torch's guards, where they were tried.

With another JAX `AVAILABLE` is False: DLPack then goes through JAX's public functions, which do the
same at several times the host time, and the native path is refused. With another torch calls cost
the host a few microseconds more.
"""

import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch

_CUDA, _CPU = 2, 1  # DLPack's numbers of device types
READY = -1  # instead of a stream: the caller sees to the order


def _internal(name: str) -> Any:
    """A module of JAX's, which type checkers are not to look into."""
    return importlib.import_module(name)


try:
    _jax: Any = _internal("jax._src.lib")._jax
    ir: Any = _internal("jax._src.lib.mlir").ir
    hlo: Any = _internal("jax._src.lib.mlir.dialects").hlo
    AVAILABLE = (0, 11, 2) <= jax.__version_info__ < (0, 13) and all(
        hasattr(_jax, name)
        for name in ("dlpack_managed_tensor_to_buffer", "buffer_to_dlpack_managed_tensor")
    )
except (ImportError, AttributeError):
    AVAILABLE = False


class _Fork:
    """Whether JAX had started in a process before it forked.

    No fork copies JAX's threads, and a lock that one of them held is never released in the child.
    """

    jax_started = False
    in_child = False

    @classmethod
    def before(cls) -> None:
        cls.jax_started = cls.jax_started or _jax_started()

    @classmethod
    def after_in_child(cls) -> None:
        cls.in_child = cls.jax_started


def _jax_started() -> bool:
    try:
        return bool(_internal("jax._src.xla_bridge").backends_are_initialized())
    except (ImportError, AttributeError):  # another JAX, which may have
        return True


os.register_at_fork(before=_Fork.before, after_in_child=_Fork.after_in_child)


def refuse_forked() -> None:
    """Raises RuntimeError where JAX would wait for ever."""
    if _Fork.in_child:
        raise RuntimeError(
            f"process {os.getpid()} was forked from one that had used JAX, whose threads a fork "
            "does not copy, so JAX would hang here; start workers by multiprocessing's 'spawn' or "
            "'forkserver' (DataLoader: multiprocessing_context='spawn')"
        )


def alias(tensor: torch.Tensor, device: jax.Device, stream: int | None, copy: bool | None) -> Any:
    """`tensor` as a committed array on `device`, which is its own, used after what is on `stream`.

    `stream` is one of the device's `get_stream_for_external_ready_events`, or READY; None for the
    CPU.
    """
    if not AVAILABLE:
        return jax.dlpack.from_dlpack(tensor.detach(), copy=copy)
    # jax.dlpack.from_dlpack looks up backend and device, makes torch order streams in Python, and
    # ends in jnp.asarray: seven times the time of this, the one call that does the work.
    capsule = torch._C._to_dlpack(tensor)
    kind = _CPU if stream is None else _CUDA
    stream = None if stream == READY else stream
    return _jax.dlpack_managed_tensor_to_buffer(capsule, device, stream, copy, kind)


def wait(array: jax.Array, stream: int) -> None:
    """Makes the CUDA stream wait until `array` is computed; the host does not."""
    stream = stream or 1  # DLPack's and the driver's number of the legacy default stream
    if AVAILABLE:
        _jax.buffer_to_dlpack_managed_tensor(array, stream=stream)
    else:
        public: Any = array  # the stub of __dlpack__ lacks its stream
        public.__dlpack__(stream=stream)


def likeness(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Tells of as many others whether they have the classes, dtypes, devices, shapes, strides and
    requires_grad of `tensors`, or says False: also where two are one tensor, and in other modes.

    It is torch.compile's guard: for five tensors 0.5 us, where asking each for its attributes takes
    4 (a Xeon, torch 2.11).
    """
    if not torch.__version__.startswith("2.11."):  # others were not tried
        return lambda *_: False
    guards: Any = torch._C._dynamo.guards.TensorGuards
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


# ------------------------------------------------------------------------------- Mosaic GPU kernels


CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_MOSAIC_CALL = "mosaic_gpu_v2"

Launch = Callable[[ctypes.c_void_p, bytes], None]

# A stream as a launch takes it. ctypes passes on what has its type already at once.
handle = functools.cache(ctypes.c_void_p)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def enter(index: int) -> None:
    """Makes the primary context of a CUDA device current in this thread, unless it has one.

    CUDA's runtime does so where a thread first needs it. Mosaic loads and launches kernels by the
    driver, which refuses without, and Mosaic tells nobody. Nothing here waits or allocates: it may
    be done while a CUDA graph is captured.
    """

    def call(name: str, *arguments: Any) -> None:
        if error := getattr(_driver(), name)(*arguments):
            raise RuntimeError(f"{name} of CUDA's driver failed with error {error}")

    context, device = ctypes.c_void_p(), ctypes.c_int()
    call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)


def capture_id(stream: int) -> int:
    """The number of the CUDA graph capture that a stream is part of, which no other one ever has; 0
    where the driver does not tell."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    tell = getattr(_driver(), "cuStreamGetCaptureInfo_v2", None)
    results = ctypes.byref(status), ctypes.byref(number), None, None, None
    return 0 if tell is None or tell(handle(stream), *results) else number.value


@functools.cache
def _compiler() -> Any:
    """MosaicGpuCompile of JAX's CUDA plugin, a C function."""
    for name in CUDA_PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = _internal(name)
            break
    else:
        raise NotImplementedError(
            "JAX's CUDA plugin is not installed: pip install 'jax-lora[cuda13]'"
        )
    library = ctypes.CDLL(plugin._get_library_path())
    if not hasattr(library, "MosaicGpuCompile"):
        raise NotImplementedError(f"JAX {jax.__version__}'s CUDA plugin has no MosaicGpuCompile")
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.MosaicGpuCompile.restype = ctypes.POINTER(ctypes.c_void_p)
    return library.MosaicGpuCompile


def compile_mosaic(module: bytes) -> Launch:
    """Compiles and loads one kernel for the current device: launch(handle(stream), pointers).

    The kernel stays loaded as long as the process: a CUDA graph may hold it.
    """
    # The environment that the compiler reads is set by this import.
    _internal("jax.experimental.mosaic.gpu")

    compiled = _compiler()(module, len(module))
    if not compiled:
        raise RuntimeError("Mosaic GPU did not compile the kernel; its reason is on stderr")
    function, entry = compiled[0], compiled[1]
    # The GIL is let go: a launch waits where the stream's queue is full, perhaps for Python.
    return functools.partial(ctypes.CFUNCTYPE(None)(entry), ctypes.c_void_p(function))


def lower(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """StableHLO of `function` for CUDA, also where there is no GPU."""
    if not AVAILABLE:
        raise NotImplementedError(f"path='native' was not tried with JAX {jax.__version__}")
    traced = jax.jit(function, keep_unused=True).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).compiler_ir()


def functions(module: Any) -> dict[str, Any]:
    """The functions of a StableHLO module by name."""
    return {ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body.operations}


def block(operation: Any, region: int = 0) -> Any:
    """The operations and the arguments of one region of an operation."""
    [only] = operation.regions[region].blocks
    return only


def mosaic_module(call: Any) -> bytes | None:
    """The kernel of a Mosaic custom call; None for what is not one, or talks to other devices."""
    if call.name != "stablehlo.custom_call":
        return None
    if ir.StringAttr(call.attributes["call_target_name"]).value != _MOSAIC_CALL:
        return None
    config = ir.DictAttr(call.attributes["mhlo.backend_config"])
    shared = "uses_xla_collective_metadata"
    if shared in config and ir.BoolAttr(config[shared]).value:
        return None
    return ir.StringAttr(config["module"]).value_bytes


def aliases(call: Any) -> dict[int, int]:
    """Number of the operand that each result of a custom call overwrites."""
    found: dict[int, int] = {}
    if "output_operand_aliases" not in call.attributes:
        return found
    for attribute in call.attributes["output_operand_aliases"]:
        pair = hlo.OutputOperandAlias(attribute)
        [result] = pair.output_tuple_indices or [0]
        found[result] = pair.operand_index
    return found


def shape(value: Any) -> tuple[tuple[int, ...], int]:
    """Shape and bits of an element of a StableHLO tensor."""
    kind = ir.RankedTensorType(value.type)
    return tuple(kind.shape), kind.element_type.width


def constant(operation: Any) -> np.ndarray | None:
    """The value of a stablehlo.constant; None for types that numpy lacks, such as bfloat16."""
    value = np.array(ir.DenseElementsAttr(operation.attributes["value"]))
    return None if value.dtype == object else value


def callee(call: Any) -> str:
    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def broadcast_dimensions(operation: Any) -> list[int]:
    return list(ir.DenseI64ArrayAttr(operation.attributes["broadcast_dimensions"]))


def name(operation: Any) -> str:
    """The name of an operation, with the target of a custom call and the type of a constant."""
    if operation.name == "stablehlo.custom_call":
        return f"{operation.name} @{ir.StringAttr(operation.attributes['call_target_name']).value}"
    if operation.name == "stablehlo.constant":
        return f"{operation.name} of {operation.results[0].type}"
    return str(operation.name)
