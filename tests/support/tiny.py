"""A model too small to be slow, random adapters for it, and what they compute, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_lora
from jax_lora import Adapter, AdapterBank, LoRAConfig, LoRAWeights, apply_lora

FEATURES = {"up": (4, 6), "down": (6, 4)}


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def make_bank(slots=2, buckets=(8, 16), **options):
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=slots, buckets=buckets, **options)
    return model, AdapterBank(model)


def make_adapter(seed, rank, *, features=FEATURES, dtype=np.float32, embeddings=(), **config):
    """Random weights for the modules of `features`, `{name: (H, N)}`."""
    rng = np.random.default_rng(seed)
    config = LoRAConfig(**{"rank": rank, "alpha": 2.0, **config})
    modules = {}
    for name, (h, n) in features.items():
        r = config.rank_of(name)
        a, b = rng.normal(size=(r, h)) / np.sqrt(h), rng.normal(size=(n, r)) / np.sqrt(r)
        scale, is_embedding = config.scale_of(name), name in embeddings
        modules[name] = LoRAWeights(a.astype(dtype), b.astype(dtype), scale, is_embedding)
    return Adapter(config, modules)


def filled_with(value, rank=4):
    """An adapter whose weights are all `value`."""
    adapter = make_adapter(0, rank)
    return Adapter(
        adapter.config,
        {
            name: LoRAWeights(np.full_like(w.a, value), np.full_like(w.b, value), w.scale)
            for name, w in adapter.modules.items()
        },
    )


def expected(model, x, adapters):
    """`[B, 4]` of float64: row b of `x` `[B, 4]` through the model with adapters[b]."""

    def linear(name, x, adapter):
        layer = getattr(model, name)
        y = x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])
        if adapter is not None and name in adapter.modules:
            w = adapter.modules[name]
            y = y + w.scale * (x @ np.float64(w.a).T) @ np.float64(w.b).T
        return y

    return np.stack(
        [
            linear("down", np.tanh(linear("up", np.float64(row), adapter)), adapter)
            for row, adapter in zip(x, adapters)
        ]
    )


@jax.jit
def _forward(split, x, batch):
    with jax_lora.use(batch):
        return nnx.merge(*split)(x)


def forward(model, x, batch=None):
    """`model(x)` under jit, with `batch` ambient."""
    return np.asarray(_forward(nnx.split(model), x, batch))


def tokens(rows, seed=0, features=4):
    return np.random.default_rng(seed).normal(size=(rows, features)).astype(np.float32)


@nnx.jit
def logits_and_gradients(model, ids, adapters):
    def loss(model):
        with jax_lora.use(adapters):
            logits = model(ids)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(model)
