"""`enable_lora` of PEFT 0.2: LoRA of some of the parts of a packed projection."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import expected, forward, make_bank, tokens

from jax_lora import LoRAWeights, load_peft, save_peft

H, N, RANK, ALPHA = 4, 6, 2, 8
KEY = "base_model.model.{}.lora_{}.weight"


class MergedLinear(torch.nn.Module):
    """What PEFT 0.2 and loralib compute beside the base layer.

    PEFT 0.2 makes two groups of whatever number of parts, loralib one for each enabled part.
    """

    def __init__(self, enabled, groups, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        count = sum(enabled)
        self.enabled = torch.tensor(enabled).repeat_interleave(N // len(enabled))
        self.lora_A = torch.nn.Linear(H, RANK * count, bias=False)
        self.lora_B = torch.nn.Conv1d(
            RANK * count, N // len(enabled) * count, 1, groups=groups, bias=False
        )

    def forward(self, x):
        y = torch.zeros(*x.shape[:-1], N)
        y[..., self.enabled] = self.lora_B(self.lora_A(x).transpose(-2, -1)).transpose(-2, -1)
        return y * (ALPHA / RANK)


def save(folder, layer, enabled, module="up", **changes):
    """As PEFT 0.2 writes it, but for the pickle."""
    folder.mkdir(exist_ok=True)
    config = {
        "base_model_name_or_path": "gpt2",
        "bias": "none",
        "enable_lora": enabled,
        "fan_in_fan_out": True,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": [module],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    halves = (("A", layer.lora_A), ("B", layer.lora_B))
    tensors = {KEY.format(module, half): part.weight.detach().numpy() for half, part in halves}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


ENABLED = {
    "q and v": ([True, False, True], 2),
    "v": ([False, False, True], 1),
    "q, k and v, of loralib": ([True, True, True], 3),
    "q, k and v, of PEFT 0.2": ([True, True, True], 2),
    "v, of PEFT 0.2": ([False, False, True], 2),
    "two parts": ([True, False], 1),
    "one part": ([True], 1),
}


@pytest.mark.parametrize("case", ENABLED)
def test_enabled_parts_are_exact(tmp_path, case):
    enabled, groups = ENABLED[case]
    layer = MergedLinear(enabled, groups)
    adapter = load_peft(save(tmp_path, layer, enabled))
    weights = adapter.modules["up"]
    assert weights.a.shape == (RANK * sum(enabled), H) and weights.b.shape == (N, weights.rank)
    assert weights.scale == ALPHA / RANK
    x = torch.from_numpy(tokens(5))
    got = weights.scale * x.numpy() @ weights.a.T @ weights.b.T
    right = layer(x).detach().numpy()
    assert np.abs(right).max() > 0.1
    np.testing.assert_allclose(got, right, atol=1e-5)
    save_peft(adapter, tmp_path / "plain")
    again = load_peft(tmp_path / "plain").modules["up"]
    assert again.scale == weights.scale
    np.testing.assert_array_equal(again.b, weights.b)


def test_a_bank_serves_them_in_a_mixed_batch(tmp_path):
    layer = MergedLinear([True, False, True], 2)
    model, bank = make_bank()
    x = tokens(3)
    bank.load("merged", save(tmp_path, layer, [True, False, True]))
    for _ in range(2):
        got = forward(model, x, bank.batch(["merged", None, "merged"]))
        # The base layer's own output, and what the adapter adds to it.
        w = layer.lora_A.weight.detach().numpy(), layer(torch.eye(H)).detach().numpy()
        dense = LoRAWeights(np.eye(H, dtype=np.float32), w[1].T, 1.0)
        adapter = type("Dense", (), {"modules": {"up": dense}})
        np.testing.assert_allclose(got, expected(model, x, [adapter, None, adapter]), atol=1e-5)
        bank.unload("merged")
        bank.load("merged", tmp_path)


def test_parts_that_are_all_off_or_absent_are_plain_lora(tmp_path):
    layer = torch.nn.Module()
    layer.lora_A, layer.lora_B = torch.nn.Linear(H, RANK), torch.nn.Linear(RANK, N)
    for value in (None, []):
        assert load_peft(save(tmp_path, layer, value)).modules["up"].scale == ALPHA / RANK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_lora": [False, False]}, r"enable_lora=\[False, False\] must say .* one must"),
        ({"enable_lora": [1, 0]}, r"enable_lora=\[1, 0\] must say of each part"),
        ({"enable_lora": "yes"}, "enable_lora='yes' must say"),
        ({"enable_lora": [True] * 9}, "at most 8"),
        ({"use_rslora": True}, "enable_lora is PEFT 0.2's, which has no use_rslora"),
        ({"rank_pattern": {"up": 2}}, "enable_lora is PEFT 0.2's"),
        ({"r": 4096}, r"r times the 2 parts of enable_lora must be between 1 and 4096, got 8192"),
        ({"r": 3}, "the config says rank 6 but lora_A is"),
        ({"enable_lora": None}, r"up: lora_A must be \[r, H\] and lora_B \[N, r\], got"),
        ({"enable_lora": [True] * 3}, r"lora_A must be \[3 r, H\] and lora_B \[3 N / 3, r, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    layer = MergedLinear([True, False, True], 2)
    with pytest.raises(ValueError, match=message):
        load_peft(save(tmp_path, layer, [True, False, True], **changes))


def test_a_small_file_takes_little_memory(tmp_path):
    """Many groups would make a dense matrix of thousands of times the file's size."""
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.Linear(1, 4096)
    layer.lora_B = torch.nn.Conv1d(4096, 4096, 1, groups=4096)
    with pytest.raises(ValueError, match=r"lora_B \[2 N / 2, r, 1\], got"):
        load_peft(save(tmp_path, layer, [True, True], r=2048))
