"""Tensors that are more than memory, torch.func, forward mode, forks: right, or a sentence."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch_cases import Case, double, products, relative_error, runs, same_bytes

import interop
from interop import dlpack, ops

# What torch warns of within torch, where forward mode is first used, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

FLOAT32 = dict(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32)


def tensors(**changes):
    return Case(num_tokens=6, **FLOAT32, **changes).tensors()


def calls(t):
    """The op of every name, as call(x or v), and what it changes."""
    out, y = torch.zeros(6, 16), t.y.clone()
    how = *runs([1] * 6), t.ids, 6, 1
    return {
        "bgmv_shrink": (lambda x: interop.bgmv_shrink(x, t.a, out, t.ids), t.x, out),
        "sgmv_shrink": (lambda x: interop.sgmv_shrink(x, t.a, out, *how, 1.0), t.x, out),
        "bgmv_expand": (lambda v: interop.bgmv_expand(v, t.b, y, t.ids), t.v, y),
        "sgmv_expand": (lambda v: interop.sgmv_expand(v, t.b, y, *how), t.v, y),
        "bgmv_expand_slice": (
            lambda v: interop.bgmv_expand_slice(v, t.b, y, t.ids, 0, 80), t.v, y,
        ),
        "sgmv_expand_slice": (
            lambda v: interop.sgmv_expand_slice(v, t.b, y, *how, 0, 80), t.v, y,
        ),
        "add_lora": (lambda x: interop.add_lora(y, x, t.a, t.b, t.ids), t.x, y),
    }  # fmt: skip


NAMES = list(calls(tensors()))


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def freed_slice(t):
    """As FSDP's flat parameters: views at an offset of one storage."""
    t = torch.cat([torch.zeros(16), t.flatten()])[16:].view(t.shape)
    t.untyped_storage().resize_(0)
    return t


def shrunk(t):
    t = t.clone()
    t.untyped_storage().resize_(8)
    return t


MORE = {
    "negated": (torch._neg_view, ValueError, r"holds the negated values; use \.resolve_neg"),
    "zero": (lambda t: torch._efficientzerotensor(t.shape), ValueError, "is a ZeroTensor, which"),
    "freed": (freed, ValueError, "has no memory: its storage was freed or shrunk to 0 bytes"),
    "freed slice": (freed_slice, ValueError, "its storage was freed or shrunk to 0 bytes"),
    "shrunk": (shrunk, ValueError, "its storage was freed or shrunk to 8 bytes"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), TypeError, "not be a nested tensor"),
    "mkldnn": (lambda t: t.to_mkldnn(), TypeError, r"dense.*layout torch\._mkldnn"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("name", NAMES)
def test_ops_refuse_what_is_more_or_less_than_memory(name, kind):
    change, error, message = MORE[kind]
    call, plain, out = calls(tensors())[name]
    for _ in range(2):  # also where the same shapes went before
        call(plain)
        before = out.clone()
        with pytest.raises(error, match=message):
            call(change(plain))
        assert same_bytes(out, before)


@pytest.mark.parametrize("kind", ["negated", "zero", "freed", "freed slice"])
def test_outputs_and_weights_are_refused_too(kind):
    change, error, message = MORE[kind]
    t = tensors()
    interop.add_lora(t.y.clone(), t.x, t.a, t.b, t.ids)
    for given in ((change(t.y), t.x, t.a, t.b), (t.y, t.x, change(t.a), t.b),
                  (t.y, t.x, t.a, change(t.b))):  # fmt: skip
        with pytest.raises(error, match=message):
            interop.add_lora(*given, t.ids)


def test_weights_that_are_freed_after_a_call_and_restored():
    t = tensors()
    a, size, first, last = t.a.clone(), t.a.untyped_storage().nbytes(), t.y.clone(), t.y.clone()
    interop.add_lora(first, t.x, a, t.b, t.ids)
    a.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"of shape \[5, 16, 96\] has no memory"):
        interop.add_lora(last, t.x, a, t.b, t.ids)
    a.untyped_storage().resize_(size)
    a.copy_(t.a)
    interop.add_lora(last, t.x, a, t.b, t.ids)
    assert same_bytes(first, last)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", MORE)
def test_to_jax_refuses_what_is_more_or_less_than_memory(kind):
    change, error, message = MORE[kind]
    with pytest.raises(error, match=message.replace("dense.*layout", "layout")):
        interop.to_jax(change(torch.ones(6, 16)))


def test_to_jax_refuses_wrappers_tangents_and_conjugates():
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match="is a FakeTensor, a w"):
        interop.to_jax(torch.ones(16))
    with pytest.raises(ValueError, match=r"conjugate values; use \.resolve_conj"):
        interop.to_jax(torch.ones(16, dtype=torch.complex64).conj())
    with pytest.raises(ValueError, match="on a CPU or CUDA device, got meta"):
        interop.to_jax(torch.ones(16, device="meta"))
    for transform, name in [(torch.func.vmap, "vmap"), (torch.func.grad, "grad, vjp or jvp"),
                            (torch.func.functionalize, "functionalize")]:  # fmt: skip
        with pytest.raises(TypeError, match=rf"wrapped by torch\.func \({name}\)"):
            transform(interop.to_jax)(torch.ones(16))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(16), torch.ones(16))
        with pytest.raises(ValueError, match=r"has a forward-mode tangent.*use unpack_dual"):
            interop.to_jax(dual)


@pytest.mark.parametrize("name", NAMES)
def test_no_op_drops_a_tangent(name):
    call, plain, out = calls(tensors())[name]
    call(plain)
    before, op = out.clone(), name.removesuffix("_slice")
    with forward_ad.dual_level():
        for tensor in (plain, plain.clone().requires_grad_()):
            dual = forward_ad.make_dual(tensor, torch.ones_like(plain))
            with pytest.raises(NotImplementedError, match=f"^{op} has no forward-mode derivative"):
                call(dual)
        assert same_bytes(out, before)
        out.zero_()
        call(plain)
    assert out.any()


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_torch_func_are_refused_by_the_ops_name(name):
    call, plain, out = calls(tensors())[name]
    call(plain)
    before, func, op = out.clone(), torch.func, name.removesuffix("_slice")

    def total(x):
        call(x)
        return x.sum()

    for transform in (
        lambda: func.vmap(total)(plain[None]), lambda: func.grad(total)(plain),
        lambda: func.vjp(total, plain), lambda: func.jvp(total, (plain,), (plain,)),
        lambda: func.jacrev(total)(plain), lambda: func.jacfwd(total)(plain),
        lambda: func.hessian(total)(plain), lambda: func.functionalize(total)(plain),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=rf"^{op} does not run under torch\.func \("):
            transform()
    assert same_bytes(out, before)


def test_a_second_derivative_is_refused_and_a_first_with_its_graph_is_not():
    t = tensors()
    x = t.x.requires_grad_()
    y = interop.add_lora(t.y.clone(), x, t.a, t.b, t.ids)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(
        (interop.add_lora(t.y.clone(), x, t.a, t.b, t.ids) ** 2).sum(), x
    )
    assert same_bytes(gradient, plain)
    with pytest.raises(NotImplementedError, match=r"^add_lora has no second derivative"):
        gradient.sum().backward()


def test_make_fx_records_the_ops():
    t = tensors()

    def layer(y, x):
        y = y * 1
        interop.add_lora(y, x, t.a, t.b, t.ids)
        return y

    layer(t.y, t.x)  # a plain call before keeps no way around the mode
    graph, other = make_fx(layer)(t.y, t.x), tensors(seed=1)
    assert "jax_lora.add_lora_" in graph.code
    assert same_bytes(graph(other.y, other.x), layer(other.y, other.x))


class Plain(torch.Tensor):
    pass


def test_a_subclass_without_a_dispatch_of_its_own_is_its_memory():
    t = tensors()
    want, got = t.y.clone(), t.y.clone()
    interop.add_lora(want, t.x, t.a, t.b, t.ids)
    interop.add_lora(got, t.x.as_subclass(Plain), t.a, t.b, t.ids)
    assert same_bytes(got, want)


# ----------------------------------------------------------------------- what a caller writes later


@pytest.mark.parametrize("offset", [0, 1])
def test_a_caller_may_overwrite_inputs_once_a_call_returns(offset):
    t = Case(num_tokens=64, features=1024, **FLOAT32).tensors()
    want = 1 + products(t.x, t.a, t.ids)
    for _ in range(20):
        # At addresses that XLA takes, and at some that it does not.
        x = torch.cat([torch.zeros(offset), t.x.flatten()])[offset:].view(t.x.shape)
        a, ids, out = t.a.clone(), t.ids.clone(), torch.ones(64, 16)
        interop.bgmv_shrink(x, a, out, ids)
        for tensor in (x, a):
            tensor.fill_(float("nan"))
        ids.fill_(0)
        assert relative_error(out, want) < 2e-6


# ------------------------------------------------------------------------------------ token counts


def test_rows_are_padded_to_few_sizes():
    sizes = [dlpack.padded_rows(n) for n in range(1, 4097)]
    assert sizes[:20] == [1, 2, 4, 4, 8, 8, 8, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20, 20, 20, 20]
    assert all(n <= size <= max(1.25 * n, n + 3) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 40


@pytest.mark.ci
def test_many_token_counts_compile_few_programs_of_equal_results():
    t = Case(num_tokens=40, features=48, width=24, **FLOAT32).tensors()
    delta = products(products_of(t), t.b, t.ids)
    for n in range(1, 41):
        y = t.y[:n].clone()
        interop.add_lora(y, t.x[:n].clone(), t.a, t.b, t.ids[:n].clone())
        assert relative_error(y, double(t.y[:n]) + delta[:n]) < 2e-6
        assert same_bytes(y[t.ids[:n] < 0], t.y[:n][t.ids[:n] < 0])
    function = ops.functions.jitted(
        ops.functions.bound(ops.functions.add_lora, offset=0, phase="decode"), 1
    )
    before = function._cache_size()
    t = Case(num_tokens=100, features=40, width=16, **FLOAT32).tensors()
    for n in range(65, 101):
        interop.add_lora(t.y[:n].clone(), t.x[:n].clone(), t.a, t.b, t.ids[:n].clone())
    assert function._cache_size() == before + 3  # of 80, 96 and 112 tokens


def products_of(t) -> torch.Tensor:
    return torch.from_numpy(np.asarray(products(t.x, t.a, t.ids)))


def test_what_a_gpu_compiles_exactly_is_bounded(monkeypatch):
    monkeypatch.setattr(dlpack, "on_jax", lambda device: (None, object()))
    monkeypatch.setattr(dlpack, "_exact", set())
    monkeypatch.setattr(dlpack, "_MOST_EXACT", 3)
    for _ in range(2):
        exact = [dlpack.may_be_exact(print, (torch.ones(n, 8),)) for n in range(1, 6)]
        assert exact == [True, True, True, False, False]


# ------------------------------------------------------------------------------------------- forks


def in_a_child(work) -> str:
    """What work() raises, or returns, in a forked child, which is killed if it hangs."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", [*NAMES, "to_jax", "to_torch"])
def test_a_child_of_a_process_that_used_jax_is_refused(name):
    t = tensors()
    array = interop.to_jax(torch.ones(16))
    works = {
        "to_jax": lambda: interop.to_jax(torch.ones(16)),
        "to_torch": lambda: interop.to_torch(array),
    }  # fmt: skip
    if name in NAMES:
        call, plain, _ = calls(t)[name]
        call(plain)  # the ways of before the fork are not taken
        works[name] = lambda: call(plain)
    assert "forked from one that had used JAX, whose threads" in in_a_child(works[name])


@pytest.mark.ci
def test_a_child_of_a_process_that_did_not_use_jax_computes():
    code = """
import os, torch, interop
x, a, ids, out = torch.ones(2, 8), torch.ones(1, 8, 8), torch.tensor([0, -1]), torch.zeros(2, 8)
child = os.fork()
if not child:
    interop.bgmv_shrink(x, a, out, ids)
    os._exit(0 if out.tolist() == [[8.0] * 8, [0.0] * 8] else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "0\n", done.stderr
