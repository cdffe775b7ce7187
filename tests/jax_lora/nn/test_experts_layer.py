"""`Experts` against a product per expert; its two forms; and its pairs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_lora
from jax_lora.llama import LlamaConfig
from jax_lora.models.mlp import SparseMLP
from jax_lora.nn import experts as module

pytestmark = pytest.mark.ci

TOKENS, EXPERTS, TOP, H, N = 7, 4, 2, 12, 8


def chosen() -> jax.Array:
    rng = np.random.default_rng(0)
    each = [rng.permutation(EXPERTS)[:TOP] for _ in range(TOKENS)]
    return jnp.asarray(np.stack(each), jnp.int32)


def total(layer: jax_lora.Experts, x: jax.Array) -> jax.Array:
    pairs = jax_lora.pairs_of(chosen(), EXPERTS, x.shape[:-1])
    return pairs.summed(layer(pairs.gathered(x), pairs), jnp.full((TOKENS, TOP), 0.5))


@pytest.mark.parametrize("most", [module._MOST_COPIED, 0])
def test_each_pair_has_the_weights_of_its_expert(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """By one grouped product, and by tiles of pairs where that would take much memory."""
    monkeypatch.setattr(module, "_MOST_COPIED", most)
    layer = jax_lora.Experts(EXPERTS, H, N, precision=jax.lax.Precision.HIGHEST, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (TOKENS, H))
    kernel = layer.kernel[...]

    def wanted(kernel: jax.Array, x: jax.Array) -> jax.Array:
        each = jnp.einsum("th,tkhn->tkn", x, kernel[chosen()], precision="highest")
        return 0.5 * jnp.sum(each, axis=1)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(total(layer, x), wanted(kernel, x))
    of_layer, of_x = nnx.grad(lambda *z: jnp.sum(jnp.sin(total(*z))), argnums=(0, 1))(layer, x)
    want = jax.grad(lambda *z: jnp.sum(jnp.sin(wanted(*z))), argnums=(0, 1))(kernel, x)
    close(of_layer.kernel[...], want[0])
    close(of_x, want[1])


def test_training_moves_the_adapters_of_the_batch_alone() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=H, intermediate_size=N, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=H, num_experts=EXPERTS,
        num_experts_per_tok=TOP,
    )  # fmt: skip
    model = SparseMLP(config, jnp.float32, nnx.Rngs(0))
    jax_lora.apply_lora(model, slots=2, buckets=(8,), target=r"experts\..*")
    bank = jax_lora.AdapterBank(model)
    for name in ("one", "other"):
        bank.create(name, jax_lora.LoRAConfig(4, 8), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, H))
    batch = bank.batch(["one", None], phase="prefill")
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(lora: nnx.State, x: jax.Array, batch: jax_lora.AdapterBatch) -> jax.Array:
        with jax_lora.use(batch):
            return jnp.sum((nnx.merge(graphdef, lora, rest)(x) - jnp.roll(x, 1, axis=-1)) ** 2)

    losses, start = [], lora
    for _ in range(4):
        value, gradients = loss(lora, x, batch)
        losses.append(float(value))
        lora = jax.tree.map(lambda p, g: p - 0.02 * g, lora, gradients)
    assert all(after < before for before, after in itertools.pairwise(losses))
    moved = jax.tree.map(lambda old, new: jnp.any(old != new, axis=(0, 2, 3)), start, lora)
    for by_slot in jax.tree.leaves(moved):  # of stacks [experts, slots, ...]
        np.testing.assert_array_equal(by_slot, [True, False])
