"""The native path's reading of StableHLO, which needs no GPU: what it launches, what it refuses."""

import contextlib
import ctypes
import itertools
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
import torch
from marks import in_ci
from tiny_kernels import add_in_place, double, shift

import interop
from interop import functions, internals, native

F32 = jnp.float32
X = jax.ShapeDtypeStruct((128,), F32)


def names(plan) -> list[list[tuple]]:
    """The buffers of each kernel: ("argument", i), ("constant", value) or ("memory", bytes, id)."""
    numbers: dict[int, int] = {}

    def name(buffer):
        if buffer.argument is not None:
            return "argument", buffer.argument
        if buffer.constant is not None:
            return "constant", buffer.constant.tolist()
        return "memory", buffer.nbytes, numbers.setdefault(id(buffer), len(numbers))

    return [[name(buffer) for buffer in buffers] for _, buffers in plan.kernels]


def test_kernels_are_wired_by_their_buffers():
    @jax.jit
    def inner(x):
        return double(x.reshape(2, 64).reshape(128))

    def function(x):
        y = jax.lax.optimization_barrier(inner(x))
        return shift(y, jnp.int32(3)).reshape(1, 128)

    plan = native.plan(function, (X,), ())
    between, result = ("memory", 512, 0), ("memory", 512, 1)
    assert names(plan) == [
        [("argument", 0), between],
        [between, ("constant", 3), result],
    ]
    assert [buffer.nbytes for buffer in plan.results] == [512]
    assert all(isinstance(kernel, bytes) and len(kernel) > 1000 for kernel, _ in plan.kernels)


def test_a_kernel_may_overwrite_what_it_was_given():
    plan = native.plan(lambda y, x: add_in_place(add_in_place(y, x), x), (X, X), (0,))
    y, x = ("argument", 0), ("argument", 1)
    assert names(plan) == [[y, x, y], [y, x, y]]
    assert [buffer.argument for buffer in plan.results] == [0]


@pytest.mark.parametrize(("function", "donate", "message"), [
    (lambda y, x: double(jnp.sin(y) + x), (), "stablehlo.sine, stablehlo.add$"),
    (lambda y, x: add_in_place(y, x), (), "overwrites argument 0, which is not donated"),
    (lambda y, x: (add_in_place(y, x), double(y)), (0,), r"stablehlo.|overwrites what is read"),
    (lambda y, x: (double(x), y), (0,), "result 1 is argument 0 as it is"),
    (lambda y, x: add_in_place(jnp.zeros(128, F32), x), (), "overwrites a constant"),
    (lambda y, x: double(x + jnp.arange(128.0)), (), "stablehlo.iota, stablehlo.add"),
])  # fmt: skip
def test_what_stands_in_the_way_is_named(function, donate, message):
    with pytest.raises(NotImplementedError, match=message) as caught:
        native.plan(function, (X, X), donate)
    assert "Pallas:Mosaic GPU kernels alone; in the way: " in str(caught.value)


# ------------------------------------------------------------------------ the ops that are native


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids_of(words: int, num_tokens: int = 20):
    """int32, or the words of int64."""
    return spec(jnp.int32, num_tokens, *[2] * (words - 1))


def stack(dtype, *shape, four_dim: bool):
    return spec(dtype, shape[0], *[1] * four_dim, *shape[1:])


def is_one_kernel(function, arguments, name: str, **static) -> None:
    """Lowering is one kernel on the arguments alone, which leaves its result in the first."""
    plan = native.plan(functions.bound(function, **static), arguments, (0,))
    [(kernel, buffers)] = plan.kernels
    assert f"{name}_mosaic_gpu".encode() in kernel
    order = [buffer.argument for buffer in buffers]
    assert sorted(order[:-1]) == list(range(len(arguments)))
    assert order[0] == order[-1] == 0
    assert [buffer.argument for buffer in plan.results] == [0]


HALVES, FLOATS = (jnp.bfloat16, jnp.float16), (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("words", [1, in_ci(2)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("v_dtype", FLOATS)
def test_shrinks_are_one_kernel(v_dtype, dtype, words):
    for rank, four_dim in [(8, False), (16, True), (128, False)]:
        a = stack(dtype, 6, rank, 512, four_dim=four_dim)
        given = spec(v_dtype, 20, rank), spec(dtype, 20, 512), a, ids_of(words), spec(F32)
        is_one_kernel(functions.bgmv_shrink, given, f"lora_decode_shrink_r{rank}")


@pytest.mark.ci
@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("v_dtype", FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS)
def test_expands_are_one_kernel(y_dtype, v_dtype, words):
    for dtype, add, slice_ in itertools.product(HALVES, (True, False), (True, False)):
        b = stack(dtype, 6, 320, 16, four_dim=words == 2)
        y = spec(y_dtype, 20, 400 if slice_ else 320)
        static = dict(offset=48 if slice_ else 0, add_inputs=add)
        given = y, spec(v_dtype, 20, 16), b, ids_of(words)
        is_one_kernel(functions.bgmv_expand, given, "lora_decode_expand_r16", **static)


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("y_dtype", FLOATS)
def test_both_halves_are_one_kernel(y_dtype, dtype, words):
    """For one token of rank 64 too, where `add_lora_multi` takes XLA's form."""
    cases = ((), True, 20, 16), ((6,), False, 20, 16), ((6,), True, 20, 16), ((), False, 1, 64)
    for scales, slice_, tokens, rank in cases:
        a = stack(dtype, 6, rank, 512, four_dim=slice_)
        b = stack(dtype, 6, 320, rank, four_dim=slice_)
        y = spec(y_dtype, tokens, 400 if slice_ else 320)
        given = y, spec(dtype, tokens, 512), a, b, ids_of(words, tokens), spec(F32, *scales)
        static = dict(offset=48 if slice_ else 0, phase="decode")
        is_one_kernel(functions.add_lora, given, f"lora_r{rank}", **static)


def expand_case(num_tokens: int, dtype, *index):
    y, v = spec(dtype, num_tokens, 320), spec(F32, num_tokens, 16)
    return y, v, stack(dtype, 6, 320, 16, four_dim=False), *index


SEGMENTS = [spec(jnp.int32, 4)] * 3


@pytest.mark.parametrize(("function", "arguments", "lacks"), [
    (functions.sgmv_expand, expand_case(20, jnp.bfloat16, *SEGMENTS), "stablehlo.sort"),
    (functions.bgmv_expand, expand_case(300, jnp.bfloat16, ids_of(1, 300)), "stablehlo.compare"),
    (functions.bgmv_expand, expand_case(20, F32, ids_of(2)), "stablehlo.dot_general"),
])  # fmt: skip
def test_what_xla_has_a_part_in_is_refused(function, arguments, lacks):
    with pytest.raises(NotImplementedError, match=f"in the way: .*{lacks}"):
        native.plan(functions.bound(function, offset=0, add_inputs=True), arguments, (0,))


class Driver:
    """As much of CUDA's driver as gives a thread a context."""

    def __init__(self) -> None:
        self.asked, self.thread = 0, threading.local()

    def cuCtxGetCurrent(self, context):
        self.asked += 1
        context._obj.value = getattr(self.thread, "context", None)

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 10 + ordinal

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 2**46 + device.value

    def cuCtxSetCurrent(self, context):
        self.thread.context = context.value


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(internals, "_driver", lambda: driver)
    monkeypatch.setattr(native, "_thread", native._Thread())
    return driver


@pytest.fixture
def launches(monkeypatch, driver):
    """The arguments of launches, where programs are run without a GPU."""
    found = []
    monkeypatch.setattr(internals, "compile_mosaic", lambda kernel: lambda *a: found.append(a))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return found


def test_a_launch_gets_the_addresses_in_the_kernels_order(launches):
    def function(y, x):
        return add_in_place(y, shift(x, jnp.int32(3)))

    program = native.compile(function, (X, X), torch.device("cpu", 0), donate=(0,))
    y, x = torch.ones(128), torch.ones(128)
    assert program((y, x)) is y
    (first_stream, shifted), (second_stream, added) = launches
    assert first_stream.value == second_stream.value == 7
    of_x, constant, between, _ = struct.unpack("4P", shifted)
    assert of_x == x.data_ptr()
    assert ctypes.c_int32.from_address(constant).value == 3
    assert struct.unpack("3P", added[:24]) == (y.data_ptr(), between, y.data_ptr())
    program((y,), (x.data_ptr(),))
    assert launches[2][1] == shifted
    with pytest.raises(ValueError, match=r"tensor 1 starts at .*needs a multiple of 16"):
        program((y, torch.ones(129)[1:]))
    freed = torch.ones(256)[128:]
    freed.untyped_storage().resize_(0)
    assert freed.data_ptr() == 512  # an offset into nothing
    with pytest.raises(ValueError, match=r"tensor 1 of shape \[128\] has no memory"):
        program((y, freed))
    assert len(launches) == 4


def test_a_thread_has_a_context_before_its_first_launch(launches, driver):
    program = native.compile(double, (X,), torch.device("cpu", 0))
    x = torch.ones(128)
    assert (driver.asked, driver.thread.context) == (1, 2**46 + 10)  # the kernel was loaded in it
    for n in range(3):  # of one identity, perhaps
        with ThreadPoolExecutor(1) as thread:
            thread.submit(program, (x,)).result()
            assert thread.submit(lambda: driver.thread.context).result() == 2**46 + 10
            thread.submit(program, (x,)).result()
        assert driver.asked == n + 2
    driver.thread.context = 5  # another's
    program((x,))
    assert driver.thread.context == 5
    assert len(launches) == 7


@pytest.mark.parametrize(
    "name", ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
)
def test_without_a_context_nothing_is_launched(name, launches, driver, monkeypatch):
    program = native.compile(double, (X,), torch.device("cpu", 0))
    monkeypatch.setattr(driver, name, lambda *_: 201)
    refusal = f"{name} of CUDA's driver failed with error 201"
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=refusal):
                thread.submit(program, (torch.ones(128),)).result()
    assert launches == []


def test_a_launch_passes_on_whole_addresses(monkeypatch):
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def entry(function, stream, pointers):
        seen.append((function, stream, ctypes.string_at(pointers, 16)))

    compiled = (ctypes.c_void_p * 2)(2**47 + 1, ctypes.cast(entry, ctypes.c_void_p).value)
    monkeypatch.setattr(internals, "_compiler", lambda: lambda module, size: compiled)
    launch = internals.compile_mosaic(b"")
    launch(internals.handle(2**46 + 2), struct.pack("2P", 2**45, 3))
    assert seen == [(2**47 + 1, 2**46 + 2, struct.pack("2P", 2**45, 3))]


@pytest.mark.parametrize("change", [
    lambda y, v, b, ids: (y[:1], v, b, ids),
    lambda y, v, b, ids: (y.half(), v, b, ids),
    lambda y, v, b, ids: (y, v.view(torch.int32), b, ids),
    lambda y, v, b, ids: (y.T.contiguous().T, v, b, ids),
    lambda y, v, b, ids: (y, v.to("meta"), b, ids),
    lambda y, v, b, ids: (y, v, torch.nn.Parameter(b), ids),
    lambda y, v, b, ids: (y, v, b.to_sparse(), ids),
    lambda y, v, b, ids: (y, v, b, ids.tolist()),
    lambda y, v, b, ids: (y, v, b, ids.int()),
    lambda y, v, b, ids: (y, v.requires_grad_(), b, ids),
])  # fmt: skip
def test_likeness_is_of_all_that_checks_and_programs_depend_on(change):
    def tensors():
        return torch.ones(4, 80), torch.ones(4, 16), torch.ones(3, 80, 16), torch.arange(4)

    is_like = internals.likeness(tensors())
    assert is_like(*tensors())
    assert is_like(*(t * 2 for t in tensors()))
    assert not is_like(*change(*tensors()))


def test_an_untried_torch_likens_nothing(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert not internals.likeness((torch.ones(2),))(torch.ones(2))


def test_an_untried_jax_has_no_native_path_but_dlpack(monkeypatch):
    monkeypatch.setattr(internals, "AVAILABLE", False)
    with pytest.raises(NotImplementedError, match=f"was not tried with JAX {jax.__version__}"):
        native.plan(double, (X,), ())
    tensor = torch.arange(64.0)
    array = internals.alias(tensor, jax.devices("cpu")[0], None, None)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    x, a = torch.randn(3, 32), torch.randn(2, 8, 32)
    out, ids = torch.zeros(3, 8), torch.tensor([1, 0, -1])
    interop.bgmv_shrink(x, a, out, ids)
    torch.testing.assert_close(out[0], a[1] @ x[0])


def test_a_machine_without_the_cuda_plugin_says_so(monkeypatch):
    monkeypatch.setattr(internals, "CUDA_PLUGINS", ("jax_plugins.none",))
    with pytest.raises(NotImplementedError, match="JAX's CUDA plugin is not installed"):
        internals._compiler.__wrapped__()


@pytest.mark.ci
@pytest.mark.parametrize(("settings", "warns"), [
    ({}, True),
    ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".1"}, False),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, True),
    ]),
])  # fmt: skip
def test_the_import_warns_once_of_jaxs_preallocation(settings, warns):
    code = (
        "import importlib.util, os, warnings, torch\n"
        "for name in list(os.environ):\n"
        "    if name.startswith(('XLA_PYTHON', 'JAX_PLATFORMS')): del os.environ[name]\n"
        f"os.environ.update({settings!r})\n"
        "before = dict(os.environ)\n"
        "torch.cuda.is_available = lambda: True\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: 'jax_plugins' in n or find(n, *a)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import interop\n"
        "    import interop\n"
        "print([str(w.message) for w in caught if 'PREALLOCATE' in str(w.message)].__len__())\n"
        "added = {n for n in os.environ if n not in before}\n"
        "print(sorted(n for n in added if n.startswith('XLA')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str(int(warns)), "[]"], done.stderr
