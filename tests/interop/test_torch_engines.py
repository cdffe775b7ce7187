"""vLLM's and SGLang's functions on CPU tensors: their lists, metadata and packed slices."""

import itertools
import types

import numpy as np
import pytest
import torch
from torch_cases import Case, double, products, relative_error, same_bytes

from interop import sglang, vllm

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


@pytest.mark.ci
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


def test_sglangs_base_output_may_be_made_anew():
    info, stack = batch(), torch.ones(4, 256, 16).half()
    v, offsets = torch.ones(24, 48).half(), torch.tensor(SLICES, dtype=torch.int32)
    y = sglang.chunked_sgmv_lora_expand_forward(v, stack, info, offsets, 128, None, offsets)
    scales = info.scalings * info.lora_ranks
    assert torch.equal(y, scales[list(ADAPTER_OF_ROW)].half()[:, None].expand(-1, 256))
    empty = stack[:, :, :0]
    assert not sglang.chunked_sgmv_lora_expand_forward(v, empty, info, offsets, 128, None).any()
