"""Every family against Transformers, in float32: configs, logits, prefill and decode, adapters."""

import shutil
from pathlib import Path
from typing import Any

import families
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from marks import on_request

import jax_lora
from jax_lora import llama
from jax_lora.generation import fitting_slots

FAMILIES = ["Llama-3.2", "Mistral-v0.1", "Qwen2.5", "Qwen3", "Gemma-2", "Gemma-3", "Phi-3-4k"]
# The others have nothing that an adapter meets and that these lack.
ADAPTED = ["Llama-3.2", "Qwen3", "Gemma-3", "Phi-3-4k"]
QUICK = ["Llama-3.2", "Qwen3", "Gemma-3"]  # few of them have an option that these lack


def build(tmp_path: Path, name: str) -> tuple[Any, Path, Path]:
    """The reference, its folder with the config.json of its author, and one of Transformers 5."""
    old, new = tmp_path / "old", tmp_path / "new"
    families.write_config(old, name)
    reference = families.reference_of(old)
    reference.save_pretrained(new)
    shutil.copy(new / "model.safetensors", old)
    return reference, old, new


def tokens_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 61, shape).astype(np.int32)


def logits_of(reference: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[]
            if name in QUICK
            # `test_moe_models.py` has the logits of these two, beside those of adapters.
            else [pytest.mark.slow if name in ("Mixtral", "Qwen3-MoE") else pytest.mark.ci],
        )
        for name in families.CONFIGS
    ],
)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    reference, old, new = build(tmp_path, name)
    model = llama.Llama.from_pretrained(old)
    # Longer than the windows; not longer than the contexts that scaled embeddings start from.
    tokens = tokens_of((2, 15))
    expected = logits_of(reference, tokens)
    assert np.abs(expected).max() > 1
    run = nnx.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(run(model, tokens), expected, atol=1e-4)
    # Longer than those contexts: the frequencies that change with the length are the changed ones.
    tokens = tokens_of((1, 40))
    np.testing.assert_allclose(run(model, tokens), logits_of(reference, tokens), atol=1e-4)
    assert llama.LlamaConfig.from_json(old) == llama.LlamaConfig.from_json(new)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "scan"), [*((name, True) for name in FAMILIES), ("Gemma-2", False), ("Gemma-3", False)]
)
def test_prefill_and_decode_equal_transformers_whatever_the_padding(
    tmp_path: Path, name: str, scan: bool
) -> None:
    reference, folder, _ = build(tmp_path, name)
    model = llama.Llama.from_pretrained(folder, scan=scan)
    tokens, lengths, rows = tokens_of((3, 16)), np.array([12, 1, 7], np.int32), np.arange(3)
    expected = logits_of(reference, tokens)
    run_prefill, run_decode = nnx.jit(llama.prefill), nnx.jit(llama.decode)
    # What follows a prompt is padding to prefill, whatever it is.
    logits, cache = run_prefill(model, model.init_cache(3, 16), tokens[:, :12], lengths)
    for step in range(4):
        np.testing.assert_allclose(logits, expected[rows, lengths + step - 1], atol=1e-4)
        logits, cache = run_decode(model, cache, tokens[rows, lengths + step])


@pytest.mark.ci
@pytest.mark.parametrize(("prompt", "room"), [(12, 32), (36, 40)])
def test_the_cache_decides_which_factors_of_longrope_count(
    tmp_path: Path, prompt: int, room: int
) -> None:
    """Up to 32 positions the short ones, beyond the long ones: for prompt and new tokens alike."""
    reference, folder, _ = build(tmp_path, "Phi-3-128k")
    model = llama.Llama.from_pretrained(folder)
    tokens = tokens_of((1, prompt + 3))
    expected = logits_of(reference, tokens)[:, prompt - 1 :]
    cache, lengths = model.init_cache(1, room), np.array([prompt], np.int32)
    logits, cache = nnx.jit(llama.prefill)(model, cache, tokens[:, :prompt], lengths)
    run_decode = nnx.jit(llama.decode)
    for step in range(3):
        np.testing.assert_allclose(logits, expected[:, step], atol=1e-4)
        logits, cache = run_decode(model, cache, tokens[:, prompt + step])
    np.testing.assert_allclose(logits, expected[:, 3], atol=1e-4)


ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "middle": {"r": 16, "lora_alpha": 16, "target_modules": r".*self_attn\.(o|v|qkv)_proj"},
    "large": {
        "r": 40,
        "lora_alpha": 20,
        "target_modules": r".*\.mlp\.\w+_proj",
        "use_rslora": True,
    },
}


@pytest.mark.ci
@pytest.mark.parametrize("name", [n if n in ADAPTED else on_request(n) for n in FAMILIES])
def test_a_batch_of_adapters_generates_what_peft_does(tmp_path: Path, name: str) -> None:
    reference, folder, _ = build(tmp_path, name)
    torch.manual_seed(1)
    wrapped: Any = None
    for adapter, options in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
        if wrapped is None:
            wrapped = peft.get_peft_model(reference, config, adapter_name=adapter)
        else:
            wrapped.add_adapter(adapter, config)
    wrapped.save_pretrained(folder)
    model = llama.Llama.from_pretrained(folder)
    slots = fitting_slots([options["r"] for options in ADAPTERS.values()])
    jax_lora.apply_lora(model, slots=slots, buckets=tuple(slots))
    bank = jax_lora.AdapterBank(model)
    for adapter in ADAPTERS:
        bank.load(adapter, folder / adapter)
    names = [*ADAPTERS, None]
    prompts, lengths = tokens_of((4, 9), seed=5), np.array([9, 3, 6, 9])
    got = llama.generate(
        model, prompts, lengths, adapters=bank.batch(names), max_new_tokens=7, eos_id=()
    )
    expected = [
        peft_tokens(wrapped, adapter, prompt[:length])
        for adapter, prompt, length in zip(names, prompts, lengths)
    ]
    np.testing.assert_array_equal(got, expected)
    assert len({*map(tuple, expected)}) == 4


def peft_tokens(model: Any, adapter: str | None, prompt: np.ndarray) -> np.ndarray:
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = torch.from_numpy(prompt[None]).long()
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                return model.generate(tokens, **options)[0, len(prompt) :].numpy()
        model.set_adapter(adapter)
        return model.generate(tokens, **options)[0, len(prompt) :].numpy()
