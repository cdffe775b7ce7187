"""A mixed batch against transformers + peft in torch: row by row, the model with that adapter."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import jax_lora
from jax_lora import AdapterBank, apply_lora
from jax_lora.llama import Llama, decode, prefill

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rank8": dict(r=8, lora_alpha=4, target_modules=ATTENTION),
    "rank12": dict(r=12, lora_alpha=24, target_modules=MLP),
    "rank16": dict(r=16, lora_alpha=16, target_modules=ATTENTION + MLP),
    "rank64": dict(r=64, lora_alpha=16, target_modules=["o_proj", "down_proj"], use_rslora=True),
    "rank130": dict(r=130, lora_alpha=65, target_modules=["k_proj", "up_proj"]),
    "patterns": dict(
        r=8,
        lora_alpha=16,
        target_modules=ATTENTION,
        rank_pattern={"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 15},
        alpha_pattern={"o_proj": 40, "q_proj": 1},
    ),
}
BUCKETS = (8, 16, 64, 144)
ROWS, LENGTH, STEPS = 8, 7, 3


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A PEFT model that holds every adapter, and the folder of base and adapters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "base")
    model: Any = None
    for name, options in ADAPTERS.items():
        lora = peft.LoraConfig(init_lora_weights=False, **options)
        if model is None:
            model = peft.PeftModel(base, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    model.save_pretrained(folder)
    return model.eval(), folder


def torch_logits(model: Any, name: str | None, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        if name is None:
            with model.disable_adapter():
                return model(torch.tensor(tokens)).logits.numpy()
        model.set_adapter(name)
        return model(torch.tensor(tokens)).logits.numpy()


class Served:
    """The JAX side: compiled prefill and decode over `bank.state`, for any mix."""

    def __init__(self, folder: Path) -> None:
        model = Llama.from_pretrained(folder / "base", dtype=jnp.float32)
        apply_lora(model, slots=2, buckets=BUCKETS)
        self.bank = AdapterBank(model)
        self.model = model
        self.prefill, self.decode = nnx.jit(_prefill), nnx.jit(_decode)

    def logits(self, names: list[str | None], tokens: np.ndarray) -> np.ndarray:
        """`[B, STEPS + 1, V]`: after the prompt, and after each decoded (given) token."""
        batch = self.bank.batch(names, phase="prefill")
        lengths = np.full(ROWS, LENGTH, np.int32)
        out, cache = self.prefill(self.model, tokens[:, :LENGTH], lengths, batch)
        steps = [out]
        for step in range(STEPS):
            token = tokens[:, LENGTH + step]
            out, cache = self.decode(self.model, cache, token, batch.with_phase("decode"))
            steps.append(out)
        return np.stack(steps, axis=1)


def _prefill(model: Llama, tokens: Any, lengths: Any, batch: jax_lora.AdapterBatch) -> Any:
    with jax_lora.use(batch):
        return prefill(model, model.init_cache(ROWS, LENGTH + STEPS), tokens, lengths)


def _decode(model: Llama, cache: Any, token: Any, batch: jax_lora.AdapterBatch) -> Any:
    with jax_lora.use(batch):
        return decode(model, cache, token)


@pytest.fixture(scope="module")
def served(torch_model: tuple[Any, Path]) -> Served:
    return Served(torch_model[1])


def check(served: Served, model: Any, names: list[str | None], seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 96, (ROWS, LENGTH + STEPS)).astype(np.int32)
    got = served.logits(names, tokens)
    for row, name in enumerate(names):
        want = torch_logits(model, name, tokens[row : row + 1])[0, LENGTH - 1 :]
        assert np.abs(want).max() > 1
        np.testing.assert_allclose(got[row], want, atol=1e-4, rtol=1e-4, err_msg=f"{row} {name}")


@pytest.mark.ci
def test_mixed_batch_equals_peft_row_by_row_also_after_evict_and_reload(
    served: Served, torch_model: tuple[Any, Path]
) -> None:
    model, folder = torch_model
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name", "?"))

    def load(*names: str) -> None:
        for name in names:
            served.bank.load(name, folder / name)

    load("rank4", "rank8", "rank12", "rank16", "rank64", "rank130")
    check(served, model, ["rank4", None, "rank130", "rank8", "rank12", "rank64", "rank16", None], 0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        check(served, model, [None] * ROWS, 1)
        load("patterns")  # rank 15: evicts rank12, the older of bucket 16
        assert "rank12" not in served.bank.names
        check(served, model, ["rank16", "patterns", None, "patterns"] * 2, 2)
        served.bank.unload("rank4")
        served.bank.unload("rank8")
        load("rank8", "rank4", "rank12")  # other slots than before
        check(served, model, ["rank12", "rank4", "rank8", None, "rank130"] + ["patterns"] * 3, 3)
        served.bank.load("rank4", folder / "rank8", replace=True)
        tokens = np.zeros((ROWS, LENGTH + STEPS), np.int32)
        both = served.logits(["rank4", "rank8"] * 4, tokens)
        np.testing.assert_array_equal(both[0], both[1])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


@pytest.mark.ci
def test_decode_dispatches_to_bgmv_prefill_and_large_ranks_to_sgmv(served: Served) -> None:
    def kernels(phase: str, buckets: tuple[int, ...]) -> set[str]:
        layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        apply_lora(layer, slots=1, buckets=buckets)
        batch = AdapterBank(layer).batch([None, None], phase=phase)
        jaxpr = str(jax.make_jaxpr(lambda x, batch: layer(x, batch))(jnp.ones((2, 8)), batch))
        return {name for name in ("bgmv", "sgmv") if f"{name}_" in jaxpr}

    assert kernels("decode", (8, 16, 32, 64, 128)) == {"bgmv"}
    assert kernels("prefill", (8, 16, 32, 64, 128)) == {"sgmv"}
    assert kernels("decode", (144,)) == {"sgmv"}
    assert kernels("decode", (128, 144)) == {"bgmv", "sgmv"}
