"""Our punica wrapper does what vLLM's own torch functions do, for the batch that vLLM describes."""

import types

import pytest
import torch
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

from interop.vllm_punica import PunicaWrapper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (7, 9, 0, 7, 7, 0)  # vLLM's ids of the requests' adapters; 0 is the base model
LENGTHS = (3, 1, 2, 5, 1, 4)
IDS = {7: 0, 0: -1, 9: 2}  # the slots that they are in
PER_TOKEN = torch.tensor([IDS[row] for row, n in zip(ROWS, LENGTHS) for _ in range(n)])
PER_ROW = torch.tensor([IDS[row] for row in ROWS])
RANK, HIDDEN, WIDTHS = 16, 64, (64, 96)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def stacks():
    a = tuple(normal(3, 1, RANK, HIDDEN) / 8 for _ in WIDTHS)
    return a, tuple(normal(3, 1, n, RANK) for n in WIDTHS)


def wrapper(rows=ROWS):
    config = types.SimpleNamespace(max_loras=3, specialize_active_lora=False)
    made = PunicaWrapper(32, 8, DEVICE, lora_config=config)
    tokens = tuple(row for row, n in zip(rows, LENGTHS) for _ in range(n))
    mapping = types.SimpleNamespace(index_mapping=tokens, prompt_mapping=rows, is_prefill=True)
    made.update_metadata(mapping, [7, None, 9], 3, 100)
    return made


def on_device(value):
    return tuple(t.to(DEVICE) for t in value) if isinstance(value, tuple) else value.to(DEVICE)


def reference(y, x, a, b, ids, scale, add_inputs=True):
    """By vLLM's functions of torch, in float32."""
    y, offset = y.float(), 0
    for one, two in zip(a, b):
        v = torch.zeros(len(x), RANK)
        bgmv_shrink(x.float(), one.float(), v, ids, scale)
        width = two.shape[-2]
        bgmv_expand_slice(v, two.float(), y, ids, offset, width, add_inputs)
        offset += width
    return y


def close(got, want):
    torch.testing.assert_close(got.cpu().float(), want, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("add_inputs", [True, False])
def test_linear(add_inputs):
    (a, b), x, y = stacks(), normal(16, HIDDEN), normal(16, sum(WIDTHS))
    want = reference(y, x, a, b, PER_TOKEN, 0.5, add_inputs)
    args = map(on_device, (y, x, a, b))
    y, x, a, b = args
    wrapper().add_lora_linear(y, x, a, b, 0.5, WIDTHS, add_inputs=add_inputs)
    close(y, want)


def test_rows_that_a_captured_batch_has_too_many_are_the_base_model():
    (a, b), x, y = stacks(), normal(20, HIDDEN), normal(20, sum(WIDTHS))
    ids = torch.cat([PER_TOKEN, torch.full((4,), -1)])
    want, made = reference(y, x, a, b, ids, 1.0), wrapper((9,) * 6)
    y, x, a, b = map(on_device, (y, x, a, b))
    mapping = types.SimpleNamespace(
        index_mapping=tuple(row for row, n in zip(ROWS, LENGTHS) for _ in range(n)),
        prompt_mapping=ROWS, is_prefill=True,
    )  # fmt: skip
    made.update_metadata(mapping, [7, None, 9], 3, 100)
    made.add_lora_linear(y, x, a, b, 1.0, WIDTHS)
    close(y, want)


def test_logits_embeddings_and_full_weights():
    (a, b), made = stacks(), wrapper()
    x, y = normal(6, HIDDEN), normal(6, WIDTHS[0])
    want = reference(y, x, a[:1], b[:1], PER_ROW, 2.0)
    got = y.to(DEVICE)
    made.add_lora_logits(got, x.to(DEVICE), a[0].to(DEVICE), b[0].to(DEVICE), 2.0)
    close(got, want)

    v, y = normal(16, RANK), normal(16, WIDTHS[0])
    want = y.float()
    bgmv_expand_slice(v.float(), b[0].float(), want, PER_TOKEN, 0, WIDTHS[0], True)
    got = y.to(DEVICE)
    made.add_lora_embedding(got, v.to(DEVICE), b[0].to(DEVICE))
    close(got, want)

    weight, bias = normal(3, 1, 24, HIDDEN) / 8, normal(3, 24)
    enabled, y = torch.tensor([True, True, False]), normal(6, 24)
    want = y.float()
    for row, slot in enumerate(PER_ROW.tolist()):
        if slot >= 0 and enabled[slot]:
            want[row] = x[row].float() @ weight[slot, 0].float().T + bias[slot].float()
    got = y.to(DEVICE)
    made.apply_lora_full_linear(got, x.to(DEVICE), *map(on_device, (weight, bias, enabled)))
    close(got, want)


def test_a_batch_of_the_base_model_alone_changes_nothing():
    (a, b), y = stacks(), normal(16, sum(WIDTHS))
    got, x = y.to(DEVICE), normal(16, HIDDEN).to(DEVICE)
    wrapper((0,) * 6).add_lora_linear(got, x, *map(on_device, (a, b)), 0.5, WIDTHS)
    assert torch.equal(got.cpu(), y)
