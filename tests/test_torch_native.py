"""The native path's reading of StableHLO, which needs no GPU: what it launches, what it refuses."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch
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


def test_ops_of_today_need_glue_or_are_native():
    """Either way the answer is exact: all kernels, or the operations between them by name."""
    specs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((8, 256), jnp.bfloat16), ((8, 256), jnp.bfloat16), ((4, 16, 256), jnp.bfloat16),
            ((4, 256, 16), jnp.bfloat16), ((8,), jnp.int32), ((), F32),
        ]
    ]  # fmt: skip
    call = functions.bound(functions.add_lora, offset=0, phase="decode")
    module = internals.lower(call, tuple(specs))
    plan = native._Plan(module, (0,))
    assert plan.kernels
    assert all("." in reason for reason in plan.obstacles), plan.obstacles
    if not plan.obstacles:
        assert [buffer.argument for buffer in plan.results] == [0]


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


@pytest.mark.parametrize(("settings", "warns"), [
    ({}, True),
    ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, False),
    ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, False),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".1"}, False),
    ({"JAX_PLATFORMS": "cpu"}, False),
    ({"JAX_PLATFORMS": "cuda,cpu"}, True),
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
