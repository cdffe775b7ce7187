"""A model of SkyRL-tx has the outputs and gradients that its own `apply_lora` gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from skyrl.tinker.types import LoraConfig
from skyrl.tx.layers import lora
from skyrl.tx.models.configs import Llama3Config, Qwen3Config
from skyrl.tx.models.llama3 import Llama3ForCausalLM
from skyrl.tx.models.qwen3 import Qwen3ForCausalLM
from transformers import AutoConfig

MODELS = {
    "unsloth/Llama-3.2-1B": (Llama3Config, Llama3ForCausalLM),
    "Qwen/Qwen3-0.6B": (Qwen3Config, Qwen3ForCausalLM),  # its projections are fused
}


def value_and_gradients(model):
    tokens, ids = jnp.arange(24).reshape(4, 6), jnp.array([0, 1, 1, 0], jnp.int32)
    graphdef, own, rest = nnx.split(model, model.is_lora_param, ...)

    @jax.jit
    def both(own, rest):
        def loss(own):
            merged = nnx.merge(graphdef, own, rest)
            mask = jnp.ones_like(tokens)
            states = merged(tokens, attention_mask=mask, adapter_indices=ids).last_hidden_state
            return jnp.mean(jnp.square(merged.compute_logits(states, ids)))

        return jax.value_and_grad(loss)(own)

    return both(own, rest)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, mesh_shape, monkeypatch):
    config_of, kind = MODELS[name]
    how = {"max_lora_adapters": 3, "max_lora_rank": 8, "shard_attention_heads": True}
    config = config_of(AutoConfig.from_pretrained(name), **how)
    axes = ("fsdp", "tp")
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        for index in (0, 1):
            lora.init_lora_adapter(model, index, LoraConfig(rank=8, alpha=16, seed=index))
        stacks = nnx.state(model, model.is_lora_param)
        nnx.update(model, jax.tree.map(lambda t: t + 0.01, stacks))  # B starts as zero
        mine = value_and_gradients(model)
        monkeypatch.delattr(lora.LoRALinear, "apply_lora")
        theirs = value_and_gradients(model)
    assert float(mine[0]) > 0 and any(leaf.any() for leaf in jax.tree.leaves(mine[1]))
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * max(1, abs(other).max()))
