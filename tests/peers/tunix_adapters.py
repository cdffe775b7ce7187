"""Tunix, unchanged, trains four adapters in one batch, and its sampler samples from all of them."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.sft import peft_trainer, utils
from tunix.tests import test_common

import jax_lora
from jax_lora.integrations.qwix import MultiLoraProvider, set_rows

SLOTS, LENGTH, RANK = 4, 12, 8
VOCAB = test_common.MockVocab()
RULES = {"module_path": ".*(_proj|lm_head)", "rank": RANK, "alpha": 16.0}
SIZES = {
    "num_layers": 2, "vocab_size": VOCAB.GetPieceSize(), "embed_dim": 32, "hidden_dim": 64,
    "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5,
}  # fmt: skip


MODELS = {"llama": (llama3, llama3.Llama3), "qwen": (qwen3, qwen3.Qwen3)}


def tokens():
    """Row b goes up by b + 1."""
    return (jnp.arange(LENGTH)[None] * (jnp.arange(SLOTS)[:, None] + 1) + 3) % (
        VOCAB.GetPieceSize() - 3
    ) + 3


def inputs(tokens, mask=None):
    mask = jnp.ones_like(tokens, bool) if mask is None else mask
    return {
        "input_tokens": tokens,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def train(model, steps):
    def of_model(batch):
        return {**inputs(batch.input_tokens), "input_mask": batch.input_mask}

    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=steps)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(2e-2), config)
    batch = peft_trainer.TrainingInput(tokens(), jnp.ones((SLOTS, LENGTH), jnp.int32))
    trainer.with_gen_model_input_fn(of_model).train([batch] * steps)


@nnx.jit
def logits_of(model, tokens):
    return model(**inputs(tokens), cache=None)[0]


def row_losses(model, tokens):
    logits = logits_of(model, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean(1)


@pytest.mark.parametrize("remat", ["NONE", "BLOCK"])
@pytest.mark.parametrize("name", MODELS)
def test_four_adapters(name, remat):
    module, kind = MODELS[name]
    base = kind(module.ModelConfig(**SIZES), rngs=nnx.Rngs(0))
    provider = MultiLoraProvider(**RULES, slots=SLOTS)
    model = qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(1))
    # Where a block is a copy of itself, in remat, parameters that its first call makes are lost.
    base.config.remat_config = model.config.remat_config = module.RematConfig[remat]
    set_rows(model, provider, range(SLOTS))
    before = row_losses(model, tokens())
    np.testing.assert_array_equal(before, row_losses(base, tokens()))  # B is zero
    train(model, 80)
    after = row_losses(model, tokens())
    assert (after < before / 2).all(), (before, after)

    # Each slot is what qwix has as its one adapter.
    single = qwix.apply_lora_to_model(
        base, qwix.LoraProvider(**RULES), **base.get_model_input(), rngs=nnx.Rngs(1)
    )
    for slot in range(SLOTS):
        own = jax.tree.map(operator.itemgetter(slot), nnx.state(model, nnx.LoRAParam))
        nnx.update(single, own)
        mine, theirs = logits_of(model, tokens()), logits_of(single, tokens())
        np.testing.assert_allclose(mine[slot], theirs[slot], rtol=1e-4, atol=1e-4)

    sample(model, provider)


@pytest.mark.parametrize("name", MODELS)
def test_apply_lora_itself(name):
    """Tunix's Einsum says its product by `einsum_str`, so `apply_lora` covers it."""
    module, kind = MODELS[name]
    model, base = (kind(module.ModelConfig(**SIZES), rngs=nnx.Rngs(0)) for _ in range(2))
    jax_lora.apply_lora(model, slots=2, buckets=(RANK,))
    assert all(".embedder" in f".{path}" for path in jax_lora.left_alone(model))
    bank, config = jax_lora.AdapterBank(model), jax_lora.LoRAConfig(RANK, alpha=16)
    bank.create("one", config, rngs=nnx.Rngs(1))
    for layer in (m for _, m in nnx.iter_modules(model) if hasattr(m, "stacks")):
        layer.stacks[0].lora_b.set_value(layer.stacks[0].lora_b[...] + 0.02)

    @nnx.jit
    def run(model, tokens, batch):
        with jax_lora.use(batch):
            return model(**inputs(tokens), cache=None)[0]

    got = run(model, tokens(), bank.batch([None, "one", None, "one"]))
    want = logits_of(base, tokens())
    np.testing.assert_array_equal(got[::2], want[::2])
    nnx.update(base, bank.merge("one"))
    np.testing.assert_allclose(got[1::2], logits_of(base, tokens())[1::2], rtol=1e-3, atol=1e-3)


def sample(model, provider):
    """Four prompts, alike, go on as their adapters were trained; None as the base model."""
    cache = sampler_lib.CacheConfig(cache_size=64, num_layers=2, num_kv_heads=2, head_dim=8)
    sampler = sampler_lib.Sampler(transformer=model, tokenizer=VOCAB, cache_config=cache)

    def run(rows):
        set_rows(model, provider, rows)
        sampler.transformer_state = nnx.variables(model)
        out = sampler(["input string hello world"] * SLOTS, max_generation_steps=6)
        return np.asarray(out.tokens)

    straight, back = run([0, 1, 2, 3]), run([3, 2, 1, 0])
    np.testing.assert_array_equal(straight, back[::-1])
    assert len({row.tobytes() for row in straight}) == SLOTS
    none = run([None, None, 2, 2])
    np.testing.assert_array_equal(none[2], straight[2])
    np.testing.assert_array_equal(none[0], none[1])
    assert (none[0] != straight).any(axis=1).all()
