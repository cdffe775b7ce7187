"""A compact decoder of Llama and its relatives in Flax NNX, with a static key-value cache.

Its forward knows nothing of adapters. Its NNX paths, joined by dots, are the module names of
Hugging Face and PEFT (`model.layers.0.self_attn.q_proj`), so `jax_lora.apply_lora` and PEFT's
adapters fit as they are.
"""

import dataclasses
import os
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.adapters import read_safetensors
from jax_lora.batch import current, use
from jax_lora.models.config import AttentionKind, LlamaConfig
from jax_lora.models.hub import check_format, local_folder
from jax_lora.models.rope import rotate, waves
from jax_lora.nn.packed import call_packed


def _precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    # JAX's default for float32 on GPUs is TF32, which keeps 10 bits.
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _linear(inputs: int, outputs: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=_precision(dtype),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)`, normalised in float32.

    With `zero_centered_norms` the factor is `1 + scale`, multiplied in float32 too.
    """

    def __init__(self, features: int, config: LlamaConfig, dtype: DTypeLike) -> None:
        self.is_zero_centered = config.zero_centered_norms
        initial = jnp.zeros if self.is_zero_centered else jnp.ones
        self.scale = nnx.Param(initial(features, dtype))
        self.epsilon = config.rms_norm_eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        if self.is_zero_centered:
            out = (x32 * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        else:
            out = scale * x32.astype(x.dtype)
        # Else XLA multiplies by the scale once more in each product and each kernel that reads it.
        return jax.lax.optimization_barrier(out)


class Attention(nnx.Module):
    """Self-attention with grouped key-value heads and rotary embeddings."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.config = config
        if config.packed_projections:
            self.qkv_proj = _linear(hidden, queries + 2 * keys, bias, dtype, rngs)
        else:
            self.q_proj = _linear(hidden, queries, bias, dtype, rngs)
            self.k_proj = _linear(hidden, keys, bias, dtype, rngs)
            self.v_proj = _linear(hidden, keys, bias, dtype, rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config, dtype)
            self.k_norm = RMSNorm(config.head_dim, config, dtype)
        self.o_proj = _linear(queries, hidden, config.attention_bias, dtype, rngs)

    def _heads(self, x: Float[Array, "B S H"]) -> list[Float[Array, "B S N D"]]:
        """Query, key and value."""
        if self.config.packed_projections:
            queries, keys = self.o_proj.in_features, self.config.num_key_value_heads
            ends = (queries, queries + keys * self.config.head_dim)
            projections = tuple(jnp.split(self.qkv_proj(x), ends, axis=-1))
        else:
            projections = call_packed((self.q_proj, self.k_proj, self.v_proj), x)
        split = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (t.reshape(split) for t in projections)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]

    def _scores(self, q: Float[Array, "B S N G D"], k: Float[Array, "B N T D"]) -> Array:
        """`[B, N, G, S, T]` in float32, before the mask."""
        config = self.config
        scores = jnp.einsum(
            "bsngd,bntd->bngst",
            q,
            k,
            precision=_precision(q.dtype),
            preferred_element_type=jnp.float32,
        )
        scores *= (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        return _soft_cap(scores, config.attn_logit_softcapping)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        rope: tuple[Array, Array],
        mask: Bool[Array, "#B S T"],
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Float[Array, "B S H"], tuple[Array, Array]]:
        """Also returns the keys and values it attended to: those of x, put into `past` if any."""
        batch, length, _ = x.shape
        q, k, v = self._heads(x)
        q, k = rotate(q, rope), rotate(k, rope)
        # Heads before positions, as the products below batch over rows and heads: in another
        # order XLA transposes the whole cache at each step.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if past is not None:
            keys, values, lengths = past
            rows = jnp.arange(batch)
            k = keys.at[rows, :, lengths].set(k[:, :, 0], mode="drop")
            v = values.at[rows, :, lengths].set(v[:, :, 0], mode="drop")
        # Query head n reads key-value head n // G.
        q = q.reshape(batch, length, k.shape[1], -1, self.config.head_dim)
        scores = jnp.where(mask[:, None, None], self._scores(q, k), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bngst,bntd->bsngd", weights, v, precision=_precision(x.dtype))
        # Else XLA transposes the product once for each that reads it: the projection, its adapters.
        out = jax.lax.optimization_barrier(out.reshape(batch, length, -1))
        return self.o_proj(out), (k, v)


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU, or with GELU."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_packed = config.packed_projections
        self.hidden_act = config.hidden_act
        if self.is_packed:
            self.gate_up_proj = _linear(hidden, 2 * inner, bias, dtype, rngs)
        else:
            self.gate_proj = _linear(hidden, inner, bias, dtype, rngs)
            self.up_proj = _linear(hidden, inner, bias, dtype, rngs)
        self.down_proj = _linear(inner, hidden, bias, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        if self.is_packed:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = call_packed((self.gate_proj, self.up_proj), x)
        return self.down_proj(_ACTIVATIONS[self.hidden_act](gate) * up)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the stream.

    With `sandwich_norms`, each has a norm behind it too, and `post_attention_layernorm` is that.
    """

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.is_sandwich = config.sandwich_norms
        self.input_layernorm = RMSNorm(hidden, config, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(hidden, config, dtype)
        if self.is_sandwich:
            self.pre_feedforward_layernorm = RMSNorm(hidden, config, dtype)
            self.post_feedforward_layernorm = RMSNorm(hidden, config, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: Array,
        rope: tuple[Array, Array],
        mask: Array,
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        attended, memory = self.self_attn(self.input_layernorm(x), rope, mask, past)
        if not self.is_sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), memory
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, of one static size.

    Attributes:
      keys, values: per layer, `[B, num_key_value_heads, T, head_dim]`.
      lengths: `[B]` int32, how many of the T positions of each row are in use.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array


class Decoder(nnx.Module):
    """From tokens to the last hidden states."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            DecoderLayer(config, dtype, rngs) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config, dtype)

    def __call__(
        self, tokens: Int[Array, "B S"], cache: KVCache | None = None, *, room: int | None = None
    ) -> tuple[Float[Array, "B S H"], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        """With a cache, `tokens` `[B, 1]` follow what it holds; without, they begin at 0.

        Also returns the keys and values of all layers: of the tokens, or those of the whole cache.
        Scaled rotary embeddings follow the positions of the cache that these are for: `room`, by
        default those of `cache`, or of the tokens.
        """
        if cache is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            stored, size = positions, tokens.shape[1]
        else:
            positions, size = cache.lengths[:, None], cache.keys[0].shape[2]
            stored = jnp.arange(size, dtype=jnp.int32)[None]
        views = {
            kind: _view(kind, self.config.head_dim, positions, stored, room or size)
            for kind in self.config.attention_kinds
        }
        x = self.embed_tokens(tokens)
        if self.config.scaled_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        memories = []
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.kinds_of_layers)):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.lengths)
            x, memory = layer(x, *views[kind], past)
            memories.append(memory)
        keys, values = zip(*memories, strict=True)
        return self.norm(x), (keys, values)


def _view(
    kind: AttentionKind,
    head_dim: int,
    positions: Int[Array, "#B S"],
    stored: Int[Array, "#B T"],
    room: int,
) -> tuple[tuple[Array, Array], Bool[Array, "#B S T"]]:
    """What tokens at `positions` see of those at `stored`: the waves that turn them, and a mask."""
    distance = positions[:, :, None] - stored[:, None]
    mask = distance >= 0
    if kind.window is not None:
        mask &= distance < kind.window
    return waves(kind.rope, head_dim, positions, room), mask


def _soft_cap(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.tanh(x / limit) * limit


class Llama(nnx.Module):
    """A decoder of Llama or of a relative: Mistral, SmolLM2, Qwen2 and 3, Gemma 2 and 3, Phi-3.

    Example::

        model = Llama.from_pretrained("path/of/a/checkpoint")
        logits = model(tokens)

    Args:
      config: see `LlamaConfig`.
      dtype: of parameters, cache and computation. float32 is computed in full float32.
      rngs: for the random initial weights.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.model = Decoder(config, dtype, rngs)
        if not config.tie_word_embeddings:  # else there is no layer of its own to adapt
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False, dtype, rngs)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Logits of every position, without a cache."""
        return self.logits(self.model(tokens)[0])

    def logits(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """From the decoder's output to logits."""
        if self.config.tie_word_embeddings:
            embedding = self.model.embed_tokens.embedding[...]
            logits = jnp.matmul(hidden, embedding.T, precision=_precision(hidden.dtype))
        else:
            logits = self.lm_head(hidden)
        return _soft_cap(logits, self.config.final_logit_softcapping)

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        config = self.config
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        zeros = jnp.zeros(shape, self.model.embed_tokens.embedding.dtype)
        layers = (zeros,) * config.num_hidden_layers
        return KVCache(layers, layers, jnp.zeros(batch, jnp.int32))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        revision: str | None = None,
    ) -> Self:
        """Reads `config.json` and `model.safetensors`, or its shards, from a folder.

        Args:
          path: a local folder, as Hugging Face's `save_pretrained` writes it; or a name on the hub,
            `OWNER/NAME`, of which `huggingface_hub` keeps the files in its cache.
          dtype: None for that of the stored embedding.
          revision: of a name on the hub: a branch, a tag or a commit.

        Raises:
          FileNotFoundError: the folder or a file is missing; or the hub can't give it.
          ValueError: weights are in a form that is not read, a file is malformed, the config asks
            for something that is not implemented, or weights are missing, superfluous or of another
            shape.
        """
        folder = local_folder(path, revision=revision)
        check_format(folder)
        config = LlamaConfig.from_json(folder)
        tensors = {
            name: tensor
            for name, tensor in read_safetensors(folder, "model").items()
            if not name.endswith(".rotary_emb.inv_freq")  # stored by old versions; computed here
        }
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        if dtype is None and "model.embed_tokens.weight" in tensors:
            dtype = tensors["model.embed_tokens.weight"].dtype
        model = nnx.eval_shape(lambda: cls(config, dtype=dtype or jnp.float32, rngs=nnx.Rngs(0)))
        params = nnx.to_flat_state(nnx.state(model))
        names = {path: _stored_name(path) for path, _ in params}
        if tensors.keys() != set(names.values()):
            missing = sorted(set(names.values()) - tensors.keys())
            superfluous = sorted(tensors.keys() - set(names.values()))
            raise ValueError(
                f"{folder} doesn't fit its config.json: it lacks {missing[:3]} ({len(missing)} in "
                f"all) and has {superfluous[:3]} ({len(superfluous)} in all) too many"
            )
        loaded = []
        for path_, param in params:
            tensor = tensors[names[path_]]
            # Transposed on the device: NumPy would walk the kernel in strides.
            value = jnp.array(tensor, param.dtype)
            value = value.T if path_[-1] == "kernel" else value
            if value.shape != param.shape:
                raise ValueError(
                    f"{folder}: {names[path_]} has shape {[*tensor.shape]}, which config.json "
                    f"contradicts; the layer holds {[*param.shape]}"
                )
            loaded.append((path_, param.replace(value)))
        nnx.update(model, nnx.from_flat_state(loaded))
        return model


def _stored_name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path[:-1])) + (".bias" if path[-1] == "bias" else ".weight")


def prefill(
    model: Llama, cache: KVCache, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads the prompts, from their first token on: what the cache held is lost.

    For the caller to jit. Padding costs time but changes nothing.

    Args:
      model: see `Llama`.
      cache: of B rows and at least S positions.
      tokens: prompts, padded on the right with any valid tokens.
      lengths: true lengths, 1 to S.

    Returns:
      The logits of each prompt's last token, and the cache.
    """
    size = cache.keys[0].shape[2]
    if tokens.shape[1] > size:
        raise ValueError(f"prompts of {tokens.shape[1]} tokens exceed the cache's {size} positions")
    hidden, memories = model.model(tokens, room=size)
    # Zeros behind the prompts, so that what another batch left there, NaN maybe, is never read.
    room = [(0, 0), (0, 0), (0, size - tokens.shape[1]), (0, 0)]
    keys, values = (tuple(jnp.pad(t, room) for t in layers) for layers in memories)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), KVCache(keys, values, lengths.astype(jnp.int32))


def decode(
    model: Llama, cache: KVCache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """One more token per row: its logits, and the cache with it.

    For the caller to jit, with the cache donated. A row that has used up the cache's positions
    is not extended: size the cache for prompt and completion.

    Where no row of the batch of `jax_lora.use` has an adapter, the plain model runs.
    """

    def step(cache: KVCache) -> tuple[Array, KVCache]:
        hidden, (keys, values) = model.model(tokens[:, None], cache)
        return model.logits(hidden[:, 0]), KVCache(keys, values, cache.lengths + 1)

    def plain(cache: KVCache) -> tuple[Array, KVCache]:
        with use(None):
            return step(cache)

    if (batch := current()) is None:
        return step(cache)
    # In one program, so that nothing recompiles; and once, for the whole step, as XLA takes the
    # choice into the step's CUDA graph, where it costs a launch.
    return jax.lax.cond(jnp.any(batch.indices >= 0), step, plain, cache)
