"""Layers stacked for a scan, on a Hopper GPU: what they compute, and what their loop copies.

PYTHONPATH=. python3 -m pytest tests/gpu/test_stacked_device.py -m gpu
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import compiling
from jax_lora import Adapter, AdapterBank, LoRAConfig, LoRAWeights, apply_lora, use
from jax_lora.llama import Llama, LlamaConfig, decode, prefill

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
RANKS, ROWS, PROMPT = {"a": 8, "b": 16, "c": 48}, 16, 96


def adapter(name: str, bank: AdapterBank) -> Adapter:
    rng, rank = np.random.default_rng(RANKS[name]), RANKS[name]
    modules = {
        module: LoRAWeights(
            (rng.normal(size=(rank, site.features[0])) / 16).astype(jnp.bfloat16),
            (rng.normal(size=(site.features[1], rank)) / 8).astype(jnp.bfloat16),
            1.0,
        )
        for module, site in sorted(bank._sites.items())
    }
    return Adapter(LoRAConfig(rank, rank), modules)


def served(*, scan: bool) -> tuple[Llama, AdapterBank]:
    """The same weights in either form."""
    model = Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), scan=False)
    if scan:
        own = dict(nnx.to_flat_state(nnx.state(model)))
        model = Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        state = []
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            if path[:2] == ("model", "layers"):
                layers = [own[*path[:2], n, *path[2:]].get_value() for n in range(4)]
                value = jnp.stack(layers)
            else:
                value = own[path].get_value()
            state.append((path, variable.replace(value)))
        nnx.update(model, nnx.from_flat_state(state))
    apply_lora(model, slots=2, buckets=(8, 16, 64))
    bank = AdapterBank(model)
    for name in RANKS:
        bank.load(name, adapter(name, bank))
    return model, bank


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_scanned_layers_compute_what_unrolled_ones_do(phase: str) -> None:
    names = (["a", None, "b", "c", "c"] * ROWS)[:ROWS]
    tokens = np.random.default_rng(0).integers(0, 512, (ROWS, PROMPT)).astype(np.int32)
    lengths = np.full(ROWS, PROMPT - 2, np.int32)

    @jax.jit
    def run(split: Any, batch: Any) -> Any:
        model = nnx.merge(*split)
        with use(None if phase == "decode" else batch):
            logits, cache = prefill(model, model.init_cache(ROWS, PROMPT), tokens, lengths)
        if phase == "prefill":
            return logits
        with use(batch):
            return decode(model, cache, tokens[:, 0])[0]

    results = []
    for scan in (True, False):
        model, bank = served(scan=scan)
        results.append(np.float64(run(nnx.split(model), bank.batch(names, phase=phase))))
        base = np.float64(run(nnx.split(model), bank.batch([None] * ROWS, phase=phase)))
    scanned, unrolled = results
    scale = np.abs(unrolled).max()
    assert np.abs(scanned - unrolled).max() < 0.03 * scale
    moved = np.abs(unrolled - base).max(axis=1) > 0.05 * scale
    assert moved.tolist() == [name is not None for name in names]


def test_no_loop_copies_stacks() -> None:
    rows = compiling.run(4, lambda _: None, scan=True, config=CONFIG)
    assert [(row.name, row.stacks) for row in rows] == [
        ("prefill", []),
        ("decode", []),
        ("gradient", []),
    ]
