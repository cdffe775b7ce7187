"""vLLM's and SGLang's functions on a Hopper GPU, captured into CUDA graphs at any size."""

import types

import numpy as np
import pytest
import torch
from torch_cases import Case, products, relative_error, same_bytes
from torch_cases import double as float64

from interop import capture, sglang, vllm

pytestmark = pytest.mark.gpu

# (tokens, rank, features, width): one launch, several, and sizes that no kernel takes.
SIZES = [(20, 16, 512, 320), (600, 16, 512, 320), (300, 256, 512, 320), (9, 12, 50, 36)]


def captured(call):
    """The call in a graph, after one outside of it."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def case(tokens, rank, features, width):
    sizes = dict(num_tokens=tokens, rank=rank, features=features, width=width)
    return Case(**sizes, num_adapters=6, device="cuda").tensors()


@pytest.mark.parametrize("sizes", SIZES)
def test_a_graph_of_vllms_ops_reads_new_ids(sizes):
    t, flag = case(*sizes), torch.tensor([False])
    a, b = [t.a, t.a.flip(0).contiguous()], [t.b, t.b.flip(0).contiguous()]
    meta = t.ids, None, None, None, None, flag, None
    v = torch.empty(2, *t.v.shape, device="cuda")
    y = torch.zeros(len(t.x), 2 * t.y.shape[1], device="cuda", dtype=t.y.dtype)
    whole = y.clone()

    def step():
        vllm.lora_shrink(t.x, a, v, *meta, 0.5)
        vllm.lora_expand(v, b, y, *meta, add_inputs=True)
        vllm.add_lora_linear(whole, t.x, a, b, t.ids, flag, 0.5)

    graph = captured(step)
    for shift in (1, 2):
        t.ids.copy_(torch.where(t.ids < 0, t.ids, (t.ids + shift) % 6))
        y.zero_()
        whole.zero_()
        graph.replay()
        sums = [0.5 * products(t.x, stack, t.ids) for stack in a]
        for got, want in zip(v, sums):
            assert relative_error(got, want) < 1e-5
        want = [products(torch.tensor(s), stack, t.ids) for s, stack in zip(sums, b)]
        for got in (y, whole):
            assert relative_error(got, np.concatenate(want, 1)) < 1e-2
            assert not got[t.ids < 0].any()


@pytest.mark.parametrize("sizes", SIZES)
def test_a_graph_of_sglangs_functions_reads_new_segments(sizes):
    t = case(*sizes)
    tokens, rank, width = len(t.x), t.a.shape[1], t.b.shape[1]
    ends = torch.tensor([0, 3, 5, 5, 8, 8, 8], device="cuda", dtype=torch.int32)
    info = types.SimpleNamespace(
        use_cuda_graph=True,
        seg_indptr=ends,
        weight_indices=torch.tensor([4, 1, 0, 2, 0, 0], device="cuda", dtype=torch.int32),
        lora_ranks=torch.full((6,), rank, device="cuda", dtype=torch.int32),
        scalings=torch.tensor([1.0, 2, 0.5, 1, 2, 1], device="cuda"),
        permutation=torch.randperm(tokens, device="cuda").int(),
    )
    offsets, y = torch.tensor([0, width], dtype=torch.int32, device="cuda"), torch.zeros_like(t.y)
    kept = {}

    def step():
        kept["v"] = sglang.chunked_sgmv_lora_shrink_forward(t.x, t.a, info)
        sglang.chunked_sgmv_lora_expand_forward(kept["v"], t.b, info, offsets, width, y)

    graph = captured(step)
    info.weight_indices.copy_(torch.tensor([5, 3, 0, 1, 2, 0]))
    ends.copy_(torch.tensor([0, 2, 4, 7, 9, 9, 9]))
    info.lora_ranks[3] = 0
    y.zero_()
    graph.replay()
    ids = np.full(tokens, -1)
    ids[info.permutation[:9].cpu()] = [5, 5, -1, -1, 0, 0, 0, 1, 1]
    ids = torch.tensor(ids)
    assert relative_error(kept["v"], products(t.x, t.a, ids)) < 4e-3
    scaled = float64(kept["v"]) * info.scalings.cpu().double().numpy()[ids][:, None]
    assert relative_error(y, products(torch.tensor(scaled), t.b, ids)) < 1e-2
    assert not y[ids < 0].any()


def test_a_prefill_is_not_captured_and_is_right():
    t, flag = case(capture.MOST_TOKENS + 1, 16, 512, 320), torch.tensor([False])
    y = t.y.clone()
    vllm.add_lora_linear(y, t.x, [t.a], [t.b], t.ids, flag, 1.0)
    want = float64(t.y) + products(torch.tensor(products(t.x, t.a, t.ids)), t.b, t.ids)
    assert relative_error(y, want) < 1e-2
    assert same_bytes(y[t.ids < 0], t.y[t.ids < 0])
