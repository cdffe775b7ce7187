"""The ops under torch.compile, torch.library's own checks, and autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_cases import Case, relative_error, runs, same_bytes

import interop

OPS = torch.ops.jax_lora


def arguments(name: str) -> tuple:
    t = Case(num_tokens=6).tensors()
    starts, lengths = runs([1] * 6)
    given = {
        "bgmv_shrink": (torch.zeros(6, 16), t.x, t.a, t.ids, 1.0, None),
        "sgmv_shrink": (torch.zeros(6, 16), t.x, t.a, starts, lengths, t.ids, 1.0, None),
        "bgmv_expand": (t.y, t.v, t.b, t.ids, None, True, None),
        "sgmv_expand": (t.y, t.v, t.b, starts, lengths, t.ids, 0, False, None),
        "add_lora_": (t.y, t.x, t.a, t.b, t.ids, torch.ones(5), None, None, "decode", None),
        "add_lora": (t.y, t.x, t.a, t.b, t.ids, None, 0.5, None, "prefill", "dlpack"),
        "add_lora_backward": (
            t.y, t.x, t.a, t.b, t.ids, torch.tensor(0.5), None, "decode",
        ),
    }  # fmt: skip
    return given[name]


@pytest.mark.ci
@pytest.mark.parametrize("name", [
    "bgmv_shrink", "sgmv_shrink", "bgmv_expand", "sgmv_expand", "add_lora_", "add_lora",
    "add_lora_backward",
])  # fmt: skip
def test_opcheck(name):
    results = torch.library.opcheck(getattr(OPS, name).default, arguments(name))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.ci
def test_opcheck_with_gradients():
    y, x, a, b, ids, *_ = arguments("add_lora")
    tensors = (y.float(), x.float().requires_grad_(), *(w.float().requires_grad_() for w in (a, b)))
    rest = (ids, torch.ones(5, requires_grad=True), None, None, "decode", None)
    results = torch.library.opcheck(OPS.add_lora.default, (*tensors, *rest))
    assert set(results.values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """A dense projection with LoRA in LoRAX's two steps, and once more in one call."""

    def __init__(self, t) -> None:
        super().__init__()
        self.base = torch.nn.Linear(96, 80, bias=False, dtype=torch.bfloat16)
        self.a, self.b = torch.nn.Parameter(t.a), torch.nn.Parameter(t.b)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        buffer = torch.zeros(x.shape[0], 16)
        interop.bgmv_shrink(x, self.a, buffer, ids, 2.0)
        interop.bgmv_expand(buffer, self.b, y, ids, True, {"BLOCK_N": 64})
        interop.bgmv_expand_slice(buffer, self.b, y, ids, 0, 80)
        interop.add_lora(y, x, self.a, self.b, ids, scales=0.5)
        return y.relu()


# What torch's own compiler warns of within torch is not ours to mend.
@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_a_whole_module_gives_equal_results(backend):
    t = Case().tensors()
    layer = Layer(t)
    with torch.no_grad():
        want = layer(t.x, t.ids)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert same_bytes(compiled(t.x, t.ids), want)
        other = Case(seed=1).tensors()
        assert same_bytes(compiled(other.x, other.ids), layer(other.x, other.ids))
        assert torch._dynamo.explain(layer)(t.x, t.ids).graph_break_count == 0


@pytest.mark.ci
def test_compile_with_gradients():
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32).tensors()

    def loss(x, a, b):
        y = x @ torch.ones(96, 80) / 96
        interop.add_lora(y, x, a, b, t.ids)
        return (y**2).sum()

    def gradients(function):
        leaves = [w.clone().requires_grad_() for w in (t.x, t.a, t.b)]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(loss)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_fake_tensors_are_checked():
    with FakeTensorMode():
        x, a = torch.empty(4, 64), torch.empty(2, 8, 64)
        ids = torch.empty(4, dtype=torch.int32)
        interop.bgmv_shrink(x, a, torch.empty(4, 8), ids)
        with pytest.raises(ValueError, match="differ in rank R: 9 and 8"):
            interop.bgmv_shrink(x, a, torch.empty(4, 9), ids)


def reference(y, x, a, b, ids, scales):
    """y + LoRA by torch's own differentiable operations."""
    rows = []
    for t, i in enumerate(ids.tolist()):
        v = x[t] @ a[i].T * scales[i]
        rows.append(y[t] + v @ b[i].T if i >= 0 else y[t])
    return torch.stack(rows)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_gradients_equal_torchs(phase):
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32).tensors()
    cotangent = torch.randn(13, 80)

    def gradients(function):
        leaves = [w.clone().requires_grad_() for w in (t.y, t.x, t.a, t.b, torch.rand(5))]
        leaves[4].data.copy_(torch.linspace(0.5, 2, 5))
        y = function(leaves[0] * 1.0, *leaves[1:4], t.ids, leaves[4])
        (y * cotangent).sum().backward()
        return y.detach(), [leaf.grad for leaf in leaves]

    def ours(y, x, a, b, ids, scales):
        assert interop.add_lora(y, x, a, b, ids, scales=scales, phase=phase) is y
        return y

    (got_y, got), (want_y, want) = gradients(ours), gradients(reference)
    torch.testing.assert_close(got_y, want_y, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got, want):
        assert relative_error(mine, theirs.double().numpy()) < 1e-5


def test_gradients_through_a_constant_scale_and_a_slice():
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32).tensors()
    x, wide = t.x.clone().requires_grad_(), torch.zeros(13, 100)
    interop.add_lora(wide, x, t.a, t.b, t.ids, scales=0.5, y_offset=8)
    wide.sum().backward()
    other = t.x.clone().requires_grad_()
    reference(torch.zeros(13, 80), other, t.a, t.b, t.ids, torch.full((5,), 0.5)).sum().backward()
    assert relative_error(x.grad, other.grad.double().numpy()) < 1e-5
    assert not wide[:, :8].any()
    assert not wide[:, 88:].any()


def test_the_mode_decides_on_gradients_not_the_last_call():
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32).tensors()
    a = t.a.requires_grad_()
    for grad in (False, True, False, True):
        with torch.set_grad_enabled(grad):
            assert interop.add_lora(t.y.clone(), t.x, a, t.b, t.ids).requires_grad is grad
