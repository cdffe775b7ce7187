"""A Llama and its adapters in a few lines of float64, on the CPU: logits, and gradients of A and B.

It shares no code with the model that it checks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_lora import Adapter
from jax_lora.llama import Llama, LlamaConfig

# A and B of each module, by its name: of one adapter, or of several, stacked.
Halves = dict[str, tuple[np.ndarray, np.ndarray]]


def weights_of(model: Llama) -> dict[str, np.ndarray]:
    """Every weight by its module's name; layers that are stacked for a scan one by one."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, (*names, _) = np.float64(variable.get_value()), map(str, path)
        if model.model.scan and names[:2] == ["model", "layers"]:
            for n, own in enumerate(value):
                found[".".join(["model", "layers", f"{n}", *names[2:]])] = own
        else:
            found[".".join(names)] = value
    return found


def halves_of(adapter: Adapter) -> Halves:
    return {
        name: (np.float64(weights.a), np.float64(weights.b))
        for name, weights in adapter.modules.items()
    }


class Float64Llama:
    """The model, whose row b has `rows[b]` of the adapters, or none."""

    def __init__(
        self, model: Llama, adapters: dict[str, Adapter], rows: Sequence[str | None]
    ) -> None:
        self.config, self.weights, self.adapters = model.config, weights_of(model), adapters
        self.rows = np.array([-1 if name is None else [*adapters].index(name) for name in rows])
        # Side by side, zeros behind their ranks. The last one is all zeros, for rows without.
        self.stacks, self.scales = {}, {}
        rank = max(len(a) for each in adapters.values() for a, _ in halves_of(each).values())
        for name in next(iter(adapters.values())).modules:
            own = [halves_of(adapter)[name] for adapter in adapters.values()]
            ranks = [(0, rank - len(a)) for a, _ in own]
            a = [np.pad(a, (more, (0, 0))) for (a, _), more in zip(own, ranks)]
            b = [np.pad(b, ((0, 0), more)) for (_, b), more in zip(own, ranks)]
            self.stacks[name] = tuple(np.stack([*t, np.zeros_like(t[0])]) for t in (a, b))
            scales = [adapter.modules[name].scale for adapter in adapters.values()]
            self.scales[name] = np.array([*scales, 0.0])

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """`[B, S, V]` of every position of `tokens` `[B, S]`."""
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(jax.jit(self._logits)(self.stacks, tokens))

    def gradients(self, tokens: np.ndarray, cotangent: np.ndarray) -> dict[str, Halves]:
        """Those of `sum(cotangent * logits)`, by the adapter's name."""

        def loss(stacks: Halves, tokens: jax.Array, cotangent: jax.Array) -> jax.Array:
            return jnp.sum(self._logits(stacks, tokens) * cotangent)

        operands = self.stacks, tokens, cotangent.astype(np.float64)

        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            found = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(*operands))
        return {
            adapter: {
                name: (found[name][0][n, : len(w.a)], found[name][1][n, :, : len(w.a)])
                for name, w in each.modules.items()
            }
            for n, (adapter, each) in enumerate(self.adapters.items())
        }

    def _logits(self, stacks: Halves, tokens: np.ndarray) -> jax.Array:
        return jax.vmap(self._row, (0, 0, None))(tokens, self.rows, stacks)

    def _row(self, ids: jax.Array, row: jax.Array, stacks: Halves) -> jax.Array:
        """`[S, V]` of one row."""

        def linear(name: str, x: jax.Array) -> jax.Array:
            y = x @ self.weights[name]
            if name not in stacks:
                return y
            a, b = (jnp.asarray(stack)[row] for stack in stacks[name])
            return y + jnp.asarray(self.scales[name])[row] * ((x @ a.T) @ b.T)

        def norm(name: str, x: jax.Array) -> jax.Array:
            mean = jnp.mean(x * x, axis=-1, keepdims=True)
            return self.weights[name] * x / jnp.sqrt(mean + self.config.rms_norm_eps)

        x = jnp.asarray(self.weights["model.embed_tokens"])[ids]
        for n in range(self.config.num_hidden_layers):
            layer = f"model.layers.{n}"
            y, of = norm(f"{layer}.input_layernorm", x), f"{layer}.self_attn"
            q, k, v = (linear(f"{of}.{half}_proj", y) for half in "qkv")
            x += linear(f"{of}.o_proj", attention(self.config, q, k, v))
            y, of = norm(f"{layer}.post_attention_layernorm", x), f"{layer}.mlp"
            gate, up = linear(f"{of}.gate_proj", y), linear(f"{of}.up_proj", y)
            x += linear(f"{of}.down_proj", gate / (1 + jnp.exp(-gate)) * up)
        return linear("lm_head", norm("model.norm", x))


def attention(config: LlamaConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Each head's, causal, with rotary embeddings: `[S, heads * head_dim]`."""
    count, size, half = len(q), config.head_dim, config.head_dim // 2
    angles = np.outer(np.arange(count), config.rope_theta ** (-np.arange(half) / half))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(x: jax.Array) -> jax.Array:
        low, high = x[..., :half], x[..., half:]
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    q, k, v = (x.reshape(count, -1, size) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    q, k, v = turned(q), jnp.repeat(turned(k), group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("snd,tnd->nst", q, k) / np.sqrt(size)
    scores = jnp.where(np.tri(count, dtype=bool), scores, -np.inf)
    return jnp.einsum("nst,tnd->snd", jax.nn.softmax(scores, axis=-1), v).reshape(count, -1)
