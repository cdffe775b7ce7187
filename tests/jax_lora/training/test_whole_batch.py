"""Gradients of a whole batch: the same from two halves of it, and where activations are computed
again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gradient_cases import TOLERANCE
from mosaic_cases import relative_error
from tiny import Mlp, make_adapter, tokens

from jax_lora import AdapterBank, AdapterBatch, apply_lora, use

NAMES = ["small", "large", None, "small", "large", "small", None, "large"]
X, TARGETS = (tokens(len(NAMES), seed=seed) for seed in (1, 2))

Loss = Callable[[nnx.State, jax.Array, jax.Array, AdapterBatch], jax.Array]
Gradients = Callable[[Loss, nnx.State, AdapterBatch], nnx.State]


def of_whole(loss: Loss, lora: nnx.State, batch: AdapterBatch) -> nnx.State:
    return jax.grad(loss)(lora, X, TARGETS, batch)


def of_halves(loss: Loss, lora: nnx.State, batch: AdapterBatch) -> nnx.State:
    """Summed by a scan over two micro-batches. A batch is a tree, whose leaves are of rows."""

    def add(total: nnx.State, half: Any) -> tuple[nnx.State, None]:
        return jax.tree.map(jnp.add, total, jax.grad(loss)(lora, *half)), None

    halves = jax.tree.map(lambda t: t.reshape(2, -1, *t.shape[1:]), (X, TARGETS, batch))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, lora), halves)[0]


def of_checkpoint(policy: Callable[..., bool]) -> Gradients:
    def gradients(loss: Loss, lora: nnx.State, batch: AdapterBatch) -> nnx.State:
        return of_whole(jax.checkpoint(loss, policy=policy), lora, batch)

    return gradients


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize(
    "how",
    [
        of_halves,
        of_checkpoint(jax.checkpoint_policies.dots_saveable),
        of_checkpoint(jax.checkpoint_policies.nothing_saveable),
    ],
    ids=["halves", "dots_saveable", "nothing_saveable"],
)
def test_gradients_equal_those_of_the_whole_batch(how: Gradients, phase: str) -> None:
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank = AdapterBank(model)
    for seed, (name, rank) in enumerate({"small": 5, "large": 12}.items()):
        bank.load(name, make_adapter(seed, rank))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora: nnx.State, x: jax.Array, targets: jax.Array, batch: AdapterBatch) -> jax.Array:
        with use(batch):
            return jnp.sum((nnx.merge(graphdef, lora, rest)(x) - targets) ** 2)

    batch = bank.batch(NAMES, phase=phase)
    want, got = (
        jax.tree.leaves(jax.jit(lambda *given, way=way: way(loss, *given))(lora, batch))
        for way in (of_whole, how)
    )
    for one, right in zip(got, want, strict=True):
        error = relative_error(np.asarray(one), np.asarray(right, np.float64))
        assert np.any(right) and error < TOLERANCE["float32"], error
