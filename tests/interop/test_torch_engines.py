"""vLLM's and SGLang's functions on CPU tensors: their lists, metadata and packed slices."""

import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import Case, double, products, relative_error, same_bytes

from interop import capture, functions, internals, native, ops, sglang, vllm

TRUE, FALSE = torch.tensor([True]), torch.tensor([False])


def meta(ids, flag=FALSE):
    """As LoRAKernelMeta.meta_args gives it; what is not read is None."""
    return ids, None, None, None, None, flag, None


@pytest.fixture(scope="module")
def slices():
    t = Case().tensors()
    b = torch.randn(5, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    return t, [t.a, t.a.flip(0).contiguous()], [t.b, b]


@pytest.mark.ci
def test_vllms_halves_and_both_in_one(slices):
    t, a, b = slices
    v = torch.full((2, 13, 16), torch.nan)
    vllm.lora_shrink(t.x, a, v, *meta(t.ids), 0.5)
    want = [0.5 * products(t.x, stack, t.ids) for stack in a]
    for got, one in zip(v, want):
        assert relative_error(got, one) < 1e-6  # zeros in rows of -1 too
    y = torch.randn(13, 160).bfloat16()
    before, used = y.clone(), t.ids >= 0
    vllm.lora_expand(v, b, y, *meta(t.ids), offset_start=8, add_inputs=True)
    deltas = [products(torch.tensor(one), stack, t.ids) for one, stack in zip(want, b)]
    expected = double(before)
    expected[:, 8:152] += np.concatenate(deltas, 1)
    assert relative_error(y, expected) < 4e-3
    assert same_bytes(y[~used], before[~used])
    assert same_bytes(y[:, 152:], before[:, 152:])
    assert same_bytes(y[:, :8], before[:, :8])
    whole = before[:, 8:152].contiguous()
    vllm.add_lora_linear(whole, t.x, a, b, t.ids, FALSE, 0.5)
    assert relative_error(whole, expected[:, 8:152]) < 4e-3
    vllm.lora_expand(v, b, y, *meta(t.ids), offset_start=8)  # overwrites
    assert relative_error(y[used, 8:152], np.concatenate(deltas, 1)[used]) < 8e-3
    assert same_bytes(y[~used], before[~used])


def test_vllms_flag_stops_all(slices):
    t, a, b = slices
    v, y = torch.ones(2, 13, 16), torch.ones(13, 144)
    vllm.lora_shrink(t.x, a, v, *meta(t.ids, TRUE), 0.5)
    vllm.lora_expand(v, b, y, *meta(t.ids, TRUE), add_inputs=True)
    vllm.add_lora_linear(y, t.x, a, b, t.ids, TRUE, 0.5)
    assert (v == 1).all() and (y == 1).all()


@pytest.mark.slow
def test_torch_compile_does_not_look_at_vllms_flag(slices):
    t, a, b = slices
    flag = FALSE.clone()

    def layer(y, x, ids, flag):
        vllm.add_lora_linear(y, x, a, b, ids, flag, 1.0)
        return y * 2

    want = layer(torch.zeros(13, 144), t.x, t.ids, flag)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert same_bytes(compiled(torch.zeros(13, 144), t.x, t.ids, flag), want)
    flag[0] = True
    assert not compiled(torch.zeros(13, 144), t.x, t.ids, flag).any()


def test_slices_that_do_not_fit_are_refused(slices):
    t, a, b = slices
    with pytest.raises(ValueError, match=r"a slice for each of 2 weights, got \[1, 13, 16\]"):
        vllm.lora_shrink(t.x, a, torch.zeros(1, 13, 16), *meta(t.ids), 1.0)
    with pytest.raises(ValueError, match=r"a slice for each of 2 weights, got \[3, 13, 16\]"):
        vllm.lora_expand(torch.zeros(3, 13, 16), b, torch.zeros(13, 144), *meta(t.ids))
    with pytest.raises(ValueError, match="differ in slices: 2 and 1"):
        vllm.add_lora_linear(torch.zeros(13, 144), t.x, a, b[:1], t.ids, FALSE, 1.0)


# Adapters of ranks 8, 16, 0 and 4 in stacks of rank 16; three slices; segments of at most 4 rows.
RANKS, SLICES, ADAPTER_OF_ROW = (8, 16, 0, 4), (0, 128, 192, 256), (1,) * 5 + (0,) * 7 + (2, 3) * 6


def batch(permuted=True):
    rows = torch.tensor(ADAPTER_OF_ROW)
    order = torch.argsort(rows, stable=True)
    segments = [part for a in range(4) for part in rows[order][rows[order] == a].split(4)]
    ends = np.cumsum([0, *map(len, segments)]).tolist()
    i32 = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    return types.SimpleNamespace(
        use_cuda_graph=False,
        seg_indptr=i32([*ends, 24, 24]),  # a captured graph's buffers are longer
        weight_indices=i32([int(part[0]) for part in segments] + [0, 0]),
        lora_ranks=i32(RANKS),
        scalings=torch.tensor([1.0, 0.5, 1.0, 2.0]),
        permutation=i32([*order.tolist(), 3, 3]) if permuted else None,
    )


def test_sglangs_segments_name_the_adapter_of_each_row():
    rows = torch.tensor(ADAPTER_OF_ROW)
    expected = torch.where(rows == 2, -1, rows)
    assert sglang.token_adapters(batch(), 24).tolist() == expected.tolist()
    beyond = sglang.token_adapters(batch(), 26)  # rows of a graph's batch that a step lacks
    assert beyond.tolist() == [*expected.tolist(), -1, -1]
    ordered = sglang.token_adapters(batch(permuted=False), 24)
    assert ordered.tolist() == sorted(ADAPTER_OF_ROW)[:12] + [-1] * 6 + [3] * 6


@pytest.mark.parametrize("strided", [False, True])
def test_sglangs_halves_with_slices_packed_by_own_ranks(strided):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).half()

    a, b, x, y = normal(4, 48, 64), normal(4, 256, 16), normal(24, 64), normal(24, 256)
    a[3, 12:] = torch.nan  # what an adapter of a larger rank left there
    info, before = batch(), double(y)
    if strided:
        y = torch.cat([y, y], 1)[:, :256]
    v = sglang.chunked_sgmv_lora_shrink_forward(x, a, info, 3)
    offsets = torch.tensor(SLICES, dtype=torch.int32)
    out = sglang.chunked_sgmv_lora_expand_forward(v, b, info, offsets, 128, y)
    assert out is y
    for t, adapter in enumerate(ADAPTER_OF_ROW):
        rank, scale = RANKS[adapter], float(info.scalings[adapter])
        first = double(a[adapter, : 3 * rank]) @ double(x[t])
        np.testing.assert_allclose(double(v[t, : 3 * rank]), first, rtol=2e-3, atol=2e-2)
        for s, (start, stop) in enumerate(itertools.pairwise(SLICES)):
            own = double(v[t, s * rank : (s + 1) * rank])
            before[t, start:stop] += scale * (double(b[adapter, start:stop, :rank]) @ own)
    assert relative_error(y, before) < 1e-3


@pytest.mark.ci
def test_sglangs_blocks_of_columns_may_be_calls_of_their_own(monkeypatch):
    info, offsets = batch(), torch.tensor(SLICES, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    v, b = (torch.randn(s, generator=generator).half() for s in ((24, 48), (4, 256, 16)))

    def expand():
        return sglang.chunked_sgmv_lora_expand_forward(v, b, info, offsets, 128, None)

    at_once = expand()
    monkeypatch.setattr(capture, "MOST_TOKENS", 23)
    assert relative_error(expand(), double(at_once)) < 1e-6


def test_what_was_made_of_a_batch_is_kept_while_the_batch_cannot_change():
    info = batch()
    kept = sglang._token_adapters(info, 24)
    assert sglang._token_adapters(info, 24) is kept
    assert sglang._token_adapters(info, 25) is not kept
    info.use_cuda_graph = True
    assert sglang._token_adapters(info, 24) is not kept
    info.weight_indices[0] = 3
    assert sglang._token_adapters(info, 24).tolist() != kept.tolist()


def test_a_capture_gets_kernels_unless_they_lack_the_sizes(slices, monkeypatch):
    t, a, b = slices

    def refuse(*_):
        raise AssertionError("torch's gather instead of a kernel")

    products_by_torch = capture._products
    monkeypatch.setattr(capture, "_is_captured", lambda _: True)
    monkeypatch.setattr(capture, "_products", refuse)
    v, y = torch.zeros(2, 13, 16), torch.zeros(13, 144).bfloat16()
    vllm.lora_shrink(t.x, a, v, *meta(t.ids), 0.5)
    vllm.lora_expand(v, b, y, *meta(t.ids), add_inputs=True)
    vllm.add_lora_linear(y, t.x, a, b, t.ids, FALSE, 0.5)

    monkeypatch.setattr(capture, "_products", products_by_torch)
    odd = Case(features=50, rank=12, width=36).tensors()
    y, used = odd.y.clone(), odd.ids >= 0
    vllm.add_lora_linear(y, odd.x, [odd.a], [odd.b], odd.ids, FALSE, 0.5)
    delta = products(torch.tensor(0.5 * products(odd.x, odd.a, odd.ids)), odd.b, odd.ids)
    assert relative_error(y, double(odd.y) + delta) < 4e-3
    vllm.lora_expand(odd.v[None], [odd.b], y, *meta(odd.ids))  # overwrites
    assert relative_error(y[used], products(odd.v.bfloat16(), odd.b, odd.ids)[used]) < 4e-3
    assert same_bytes(y[~used], odd.y[~used])


class TorchOps(TorchDispatchMode):
    """The names of torch's operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **kwargs or {})


@pytest.fixture
def capture_without_gpu(monkeypatch):
    """Calls of fake CUDA tensors go where a capture on a Hopper GPU sends them; yields the plans of
    the launches and torch's operations beside them."""
    plans = []

    def no_kernel(*_):
        raise AssertionError("no kernel")

    def choose(op, tensors, scale, path, static=()):
        ops._choose(op, tensors, scale, path, static)

    monkeypatch.setattr(ops, "dispatch", choose)
    monkeypatch.setattr(
        ops, "_program", lambda call, specs, _: plans.append(native.plan(call, specs, (0,)))
    )
    monkeypatch.setattr(ops, "_by_dlpack", no_kernel)
    monkeypatch.setattr(capture, "_products", no_kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0)
    )
    monkeypatch.setattr(internals, "capture_id", lambda _: 1)
    with FakeTensorMode(), TorchOps() as seen:
        yield plans, seen.names


def fake(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("tokens", "widths", "launches"),
    [(1, (4096,), 1), (64, (4096, 1024, 1024), 1), (600, (4096, 1024, 1024), 3)],
)
def test_a_captured_call_of_vllms_is_kernels_alone(capture_without_gpu, tokens, widths, launches):
    plans, by_torch = capture_without_gpu
    ids, flag = fake(tokens, dtype=torch.int32), types.SimpleNamespace(item=lambda: False)
    x, y = fake(tokens, 4096), fake(tokens, sum(widths))
    a, b = [fake(4, 16, 4096) for _ in widths], [fake(4, n, 16) for n in widths]
    v, rest = fake(len(widths), tokens, 16, dtype=torch.float32), meta(ids, flag)
    by_torch.clear()
    for call, count in (
        (lambda: vllm.lora_shrink(x, a, v, *rest, 1.0), launches * len(widths)),
        (lambda: vllm.lora_expand(v, b, y, *rest, add_inputs=True), launches * len(widths)),
        (lambda: vllm.add_lora_linear(y, x, a, b, ids, flag, 1.0), launches),
    ):
        plans.clear()
        call()
        assert [len(plan.kernels) for plan in plans] == [1] * count
    assert by_torch <= {"zero_", "unbind", "slice", "device"}  # views, but for the zeros


@pytest.mark.parametrize(
    ("tokens", "widths"), [(1, (4096,)), (64, (4096, 1024, 1024)), (400, (4096, 1024, 1024))]
)
def test_a_captured_call_of_sglangs_is_kernels_once_its_rows_are_known(
    capture_without_gpu, tokens, widths
):
    plans, by_torch = capture_without_gpu
    i32 = functools.partial(fake, dtype=torch.int32)
    info = types.SimpleNamespace(
        use_cuda_graph=True, seg_indptr=i32(9), weight_indices=i32(8), lora_ranks=i32(8),
        scalings=fake(8, dtype=torch.float32), permutation=i32(tokens),
    )  # fmt: skip
    x, y, offsets = fake(tokens, 4096), fake(tokens, sum(widths)), [0, *np.cumsum(widths)]
    a, b = fake(8, 16 * len(widths), 4096), fake(8, sum(widths), 16)
    unread, on_host = i32(4), types.SimpleNamespace(tolist=lambda: offsets)
    for _ in range(2):  # layers
        by_torch.clear()
        v = sglang.chunked_sgmv_lora_shrink_forward(x, a, info, len(widths))
        sglang.chunked_sgmv_lora_expand_forward(v, b, info, unread, 4096, y, on_host)
    views = {"view", "unsqueeze", "slice", "split", "device"}
    picks = {"expand", "gather"} if len(widths) > 1 else set()
    assert by_torch - views == {"new_zeros", "mul", "masked_fill_"} | picks
    blocks = sum(widths) // math.gcd(*widths)
    launches = -(-tokens // 256) + -(-tokens * blocks // 256)
    assert [len(plan.kernels) for plan in plans] == [1] * launches * 2


@pytest.mark.ci
def test_all_slices_of_a_projection_are_one_kernel():
    shapes = [(16, 192), (16, 64), *[(3, 16, 64)] * 2, (3, 128, 16), (3, 64, 16)]
    specs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    specs += [jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)]
    call = functions.bound(functions.add_lora_slices, offsets=(0, 128))
    assert len(native.plan(call, specs, donate=(0,)).kernels) == 1


def test_sglangs_base_output_may_be_made_anew():
    info, stack = batch(), torch.ones(4, 256, 16).half()
    v, offsets = torch.ones(24, 48).half(), torch.tensor(SLICES, dtype=torch.int32)
    y = sglang.chunked_sgmv_lora_expand_forward(v, stack, info, offsets, 128, None, offsets)
    scales = info.scalings * info.lora_ranks
    assert torch.equal(y, scales[list(ADAPTER_OF_ROW)].half()[:, None].expand(-1, 256))
    empty = stack[:, :, :0]
    assert not sglang.chunked_sgmv_lora_expand_forward(v, empty, info, offsets, 128, None).any()
