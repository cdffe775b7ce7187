"""A model whose adapters come and go while they are trained."""

import jax
import numpy as np
import optax
from flax import nnx
from tiny import Mlp, tokens

from jax_lora import AdapterBank, LoRAConfig, apply_lora, use
from jax_lora.training import per_adapter

ROWS = 10
X, TARGETS = tokens(ROWS, seed=1), tokens(ROWS, seed=2)
ROWS_OF = {"first": [0, 3, 7], "second": [1, 4, 5, 8], "third": [2, 6, 9]}
CONFIGS = {
    "first": LoRAConfig(3, 6),
    "second": LoRAConfig(7, 5, rslora=True),
    "third": LoRAConfig(12, 5, rank_pattern={"up": 9}),
}
ADAMW = optax.chain(optax.clip_by_global_norm(0.2), optax.adamw(0.02, weight_decay=0.1))


class Run:
    """A model with room for two adapters of each bucket, and a jitted step that trains some."""

    def __init__(self, tx, model=None):
        self.model = Mlp(nnx.Rngs(0)) if model is None else model
        apply_lora(self.model, slots=2, buckets=(8, 16))
        self.bank = AdapterBank(self.model)
        self.tx, self.traces = per_adapter(tx), 0
        graphdef, lora, _ = nnx.split(self.model, nnx.LoRAParam, ...)
        self.state = self.tx.init(lora)

        @jax.jit
        def step(lora, rest, state, batch, trainees, weights):
            self.traces += 1

            def loss(lora):
                with use(batch):
                    y = nnx.merge(graphdef, lora, rest)(X)
                return (((y - TARGETS) ** 2).mean(-1) * weights).sum()

            gradients = jax.grad(loss)(lora)
            with jax.numpy_dtype_promotion("standard"):  # optax is not strict
                updates, state = self.tx.update(gradients, state, lora, trainees=trainees)
            return optax.apply_updates(lora, updates), state

        self.compiled = step

    def create(self, *names):
        for name in names:
            self.bank.create(name, CONFIGS[name], rngs=nnx.Rngs(len(name)))

    def train(self, steps, names, rates=None, *, beside=()):
        """`beside`: adapters that the batch uses and the step does not train."""
        rows, weights = [None] * ROWS, np.zeros(ROWS, np.float32)
        for name in (*names, *beside):
            for row in ROWS_OF[name]:
                rows[row], weights[row] = name, 1 / len(ROWS_OF[name])
        batch, trainees = self.bank.batch(rows), self.bank.trainees(names, rates)
        for _ in range(steps):
            _, lora, rest = nnx.split(self.model, nnx.LoRAParam, ...)
            lora, self.state = self.compiled(lora, rest, self.state, batch, trainees, weights)
            nnx.update(self.model, lora)

    def weights(self, name):
        modules = self.bank._adapter(name).modules
        return {(m, half): getattr(w, half) for m, w in modules.items() for half in "ab"}


def assert_same(one, other):
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=str(path))
