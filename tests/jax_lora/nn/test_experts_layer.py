"""`Experts` against a product per expert; its two forms; and its pairs."""

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_run import assert_same

import jax_lora
from jax_lora import training
from jax_lora.llama import LlamaConfig
from jax_lora.models.mlp import SparseMLP
from jax_lora.nn import experts as module

pytestmark = pytest.mark.ci

TOKENS, EXPERTS, TOP, H, N = 7, 4, 2, 12, 8
SHARE = {"(gate|up)_proj": "A", "down_proj": "B"}


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


def sparse_mlp(hidden: int, inner: int, of: str = "float32", **room: Any) -> SparseMLP:
    """A mixture of experts, which alone have LoRA."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=hidden, num_experts=EXPERTS,
        num_experts_per_tok=TOP,
    )  # fmt: skip
    model = SparseMLP(config, jnp.dtype(of), nnx.Rngs(0))
    jax_lora.apply_lora(model, slots=2, target=r"experts\..*", **room)
    return model


@pytest.mark.parametrize(
    ("stacks", "share"), [("bfloat16", {}), ("bfloat16", SHARE), ("int8", {}), ("int8", SHARE)]
)
def test_experts_take_the_kernels_of_plain_rows(stacks: str, share: dict) -> None:
    """What a Hopper GPU runs for them. Gates and ups share a launch of two parts."""
    model = sparse_mlp(64, 128, "bfloat16", buckets=(16,), dtype=stacks, experts_share=share)
    batch = jax_lora.AdapterBank(model).batch([None] * 16)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def run(lora: nnx.State, x: jax.Array, batch: jax_lora.AdapterBatch) -> jax.Array:
        with jax_lora.use(batch):
            return nnx.merge(graphdef, lora, rest)(x)

    def step(lora: nnx.State, x: jax.Array, batch: jax_lora.AdapterBatch) -> Any:
        y, pull = jax.vjp(functools.partial(run, batch=batch), lora, x)
        return y, pull(y)

    def kernels(function: Callable[..., Any]) -> set[str]:
        x = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16)
        traced = jax.jit(function).trace(lora, x, batch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.while" not in text
        return {*re.findall(r"lora_?[a-z]*(?:_r16)+", text)}

    forward = {"lora_r16", "lora_r16_r16"}
    assert kernels(run) == forward
    if stacks == "bfloat16":  # 8 bits have no gradients
        backward = {f"lora_{kind}_r16" for kind in ("narrow", "wide", "outer")}
        assert kernels(step) == forward | backward | {"lora_wide_r16_r16"}


class Training:
    """A model of experts, and a jitted step that trains some adapters."""

    def __init__(self) -> None:
        self.model = sparse_mlp(H, N, buckets=(8,))
        self.bank = jax_lora.AdapterBank(self.model)
        graphdef, lora, rest = nnx.split(self.model, nnx.LoRAParam, ...)
        tx = training.per_adapter(optax.adamw(0.02, weight_decay=0.1))
        self.state = tx.init(lora)
        x = jax.random.normal(jax.random.key(0), (2, 5, H))

        @jax.jit
        def step(lora: nnx.State, state: Any, batch: Any, trainees: Any) -> Any:
            def loss(lora: nnx.State) -> jax.Array:
                with jax_lora.use(batch):
                    y = nnx.merge(graphdef, lora, rest)(x)
                return jnp.sum((y - jnp.roll(x, 1, axis=-1)) ** 2)

            value, gradients = jax.value_and_grad(loss)(lora)
            with jax.numpy_dtype_promotion("standard"):  # optax is not strict
                moves, state = tx.update(gradients, state, lora, trainees=trainees)
            return value, optax.apply_updates(lora, moves), state

        self._step = step

    def create(self, name: str) -> None:
        self.bank.create(name, jax_lora.LoRAConfig(4, 8), rngs=nnx.Rngs(0))

    def train(self, name: str, steps: int) -> list[float]:
        """The losses."""
        given = self.bank.batch([name, None], phase="prefill"), self.bank.trainees([name])
        losses = []
        for _ in range(steps):
            lora = nnx.state(self.model, nnx.LoRAParam)
            value, lora, self.state = self._step(lora, self.state, *given)
            nnx.update(self.model, lora)
            losses.append(float(value))
        return losses

    def weights(self, name: str) -> dict[tuple[str, str], np.ndarray]:
        modules = self.bank._adapter(name).modules
        return {(m, half): getattr(w, half) for m, w in modules.items() for half in "ab"}


def test_training_moves_the_adapters_of_the_batch_alone() -> None:
    run = Training()
    for name in ("one", "other"):
        run.create(name)
    start = jax.tree.map(np.array, nnx.state(run.model, nnx.LoRAParam))
    losses = run.train("one", 4)
    assert all(after < before for before, after in itertools.pairwise(losses))
    now = nnx.state(run.model, nnx.LoRAParam)
    moved = jax.tree.map(lambda old, new: jnp.any(old != new, axis=(1, 2)), start, now)
    for by_slot in jax.tree.leaves(moved):  # of stacks [slots, ...]
        np.testing.assert_array_equal(by_slot, [True, False])


def test_training_of_experts_goes_on_elsewhere_and_is_published(tmp_path: Path) -> None:
    """In another slot, bit for bit; and a copy for users stays as it is."""
    run, other = Training(), Training()
    run.create("one")
    run.train("one", 3)
    run.bank.save("one", tmp_path)
    training.save_state(run.state, run.bank, "one", tmp_path / "state")
    other.create("before")
    other.bank.load("one", tmp_path)
    assert other.bank._entry("one").slot != run.bank._entry("one").slot
    other.state = training.load_state(other.state, other.bank, "one", tmp_path / "state")
    run.bank.publish("users'", "one")
    published = run.weights("users'")
    assert_same(published, run.weights("one"))
    assert run.train("one", 3) == other.train("one", 3)
    assert_same(run.weights("one"), other.weights("one"))
    assert_same(run.weights("users'"), published)
    assert any((run.weights("one")[path] != old).any() for path, old in published.items())
