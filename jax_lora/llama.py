"""A compact decoder of the Llama family in Flax NNX, with a static key-value cache.

Its forward knows nothing of adapters. Its NNX paths, joined by dots, are the module names of
Hugging Face and PEFT (`model.layers.0.self_attn.q_proj`), so `jax_lora.apply_lora` and PEFT's
adapters fit as they are.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.adapters import read_json, read_safetensors
from jax_lora.bank import guard_of
from jax_lora.batch import AdapterBatch, current, use
from jax_lora.compiling import step_options
from jax_lora.layers import call_packed
from jax_lora.process import check_process

# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies; see Hugging Face's `rope_type="llama3"`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _check_positive(name, value)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a Llama's forward depends on, named as in the `config.json` of Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.max_position_embeddings is not None:
            _check_size("max_position_embeddings", self.max_position_embeddings)
        for name in ("rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if (value := getattr(self, name)) not in (True, False):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of a `config.json`.

        Raises:
          ValueError: a key is missing, or asks for something that is not implemented.
        """
        for key, allowed in _IMPLEMENTED.items():
            if key in values and values[key] not in allowed:
                raise ValueError(
                    f"{key}={values[key]!r} is not supported; it must be one of {list(allowed)}"
                )
        if missing := [name for name in _SIZES[:5] if values.get(name) is None]:
            raise ValueError(f"config.json lacks {missing}; is it that of a Llama?")
        found = {
            f.name: values[f.name]
            for f in dataclasses.fields(cls)
            if values.get(f.name) is not None
        }
        for name in _SIZES[:5]:
            _check_size(name, found[name])
        heads = found["num_attention_heads"]
        found.setdefault("num_key_value_heads", heads)
        found.setdefault("head_dim", found["hidden_size"] // heads)
        rope = _rope_values(values)
        return cls(
            **found
            | {
                "rope_theta": rope.get("rope_theta", found.get("rope_theta", 10000.0)),
                "rope_scaling": _rope_scaling(rope, values),
                "eos_token_id": end_tokens(found.get("eos_token_id", ())),
            }
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """From a folder's `config.json`, with the end tokens of its `generation_config.json`.

        As in Transformers, the `eos_token_id` of the latter replaces that of the former.

        Raises:
          FileNotFoundError: there is no such folder, or no `config.json` in it.
          ValueError: a file is malformed, or asks for something that is not implemented.
        """
        folder, generation = Path(path), "generation_config.json"
        config = cls.from_dict(read_json(folder, "config.json"))
        if not os.path.lexists(folder / generation):
            return config
        if (ends := read_json(folder, generation).get("eos_token_id")) is None:
            return config
        try:
            return dataclasses.replace(config, eos_token_id=end_tokens(ends))
        except ValueError as error:
            raise ValueError(f"{folder / generation}: {error}") from None


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Keys by which a checkpoint may ask for what is not implemented. Whatever else config.json holds,
# the forward of Hugging Face's Llama doesn't read.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
}


def end_tokens(value: object) -> tuple[int, ...]:
    """One token, or several, as an `eos_token_id` gives them.

    Raises:
      ValueError: it holds something else than integers.
    """
    tokens = (value,) if isinstance(value, int | np.integer) else value
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if not isinstance(tokens, list | tuple):
        raise ValueError(f"eos_token_id must be an integer or several, got {value!r:.100}")
    for token in tokens:
        is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not (is_integer and abs(token) <= _INT32_MAX):
            raise ValueError(f"eos_token_id must hold integers of 32 bits, got {token!r:.100}")
    return tuple(map(int, tokens))


_INT32_MAX = 2**31 - 1


def _rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # Transformers 5 writes rope_parameters, with rope_theta among them; older versions rope_scaling
    # beside rope_theta. Where a config has both, both versions read rope_scaling alone.
    for key in ("rope_scaling", "rope_parameters"):
        if rope := values.get(key):
            if not isinstance(rope, dict):
                raise ValueError(f"{key} must be an object, got {rope!r:.100}")
            return rope
    return {}


def _rope_scaling(rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; it must be 'default' or 'llama3'")
    parameters: dict[str, Any] = {f.name: rope.get(f.name) for f in dataclasses.fields(RopeScaling)}
    if parameters["original_max_position_embeddings"] is None:
        parameters["original_max_position_embeddings"] = values.get("max_position_embeddings")
    return RopeScaling(**parameters)


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive number, got {value!r}")


# ------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------


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


def _rope_frequencies(config: LlamaConfig) -> np.ndarray:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if (scaling := config.rope_scaling) is None:
        return frequencies
    # Turns of each frequency over the original context: few turns are stretched, many are kept.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (kept * frequencies + (1 - kept) * frequencies / scaling.factor).astype(np.float32)


def _rope(positions: Array, config: LlamaConfig) -> tuple[Array, Array]:
    frequencies = _rope_frequencies(config)[None, None, None]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    cos, sin = (t.astype(x.dtype) for t in rope)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)`, normalised in float32."""

    def __init__(self, features: int, epsilon: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(features, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        # Else XLA multiplies by the scale once more in each product and each kernel that reads it.
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return jax.lax.optimization_barrier(scale * x32.astype(x.dtype))


class Attention(nnx.Module):
    """Self-attention with grouped key-value heads and rotary embeddings."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = _linear(hidden, queries, bias, dtype, rngs)
        self.k_proj = _linear(hidden, keys, bias, dtype, rngs)
        self.v_proj = _linear(hidden, keys, bias, dtype, rngs)
        self.o_proj = _linear(queries, hidden, bias, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        rope: tuple[Array, Array],
        mask: Bool[Array, "#B S T"],
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Float[Array, "B S H"], tuple[Array, Array]]:
        """Also returns the keys and values it attended to: those of x, put into `past` if any."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        projections = call_packed((self.q_proj, self.k_proj, self.v_proj), x)
        q, k, v = (t.reshape(split) for t in projections)
        q, k = _rotate(q, rope), _rotate(k, rope)
        # Heads before positions, as the products below batch over rows and heads: in another
        # order XLA transposes the whole cache at each step.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if past is not None:
            keys, values, lengths = past
            rows = jnp.arange(batch)
            k = keys.at[rows, :, lengths].set(k[:, :, 0], mode="drop")
            v = values.at[rows, :, lengths].set(v[:, :, 0], mode="drop")
        # Query head n reads key-value head n // G.
        q = q.reshape(batch, length, k.shape[1], -1, self.head_dim)
        precision = _precision(x.dtype)
        scores = jnp.einsum(
            "bsngd,bntd->bngst", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[:, None, None], scores * self.head_dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bngst,bntd->bsngd", weights, v, precision=precision)
        # Else XLA transposes the product once for each that reads it: the projection, its adapters.
        out = jax.lax.optimization_barrier(out.reshape(batch, length, -1))
        return self.o_proj(out), (k, v)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(hidden, inner, bias, dtype, rngs)
        self.up_proj = _linear(hidden, inner, bias, dtype, rngs)
        self.down_proj = _linear(inner, hidden, bias, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = call_packed((self.gate_proj, self.up_proj), x)
        return self.down_proj(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: Array,
        rope: tuple[Array, Array],
        mask: Array,
        past: tuple[Array, Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        attended, memory = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), memory


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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self, tokens: Int[Array, "B S"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "B S H"], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        """With a cache, `tokens` `[B, 1]` follow what it holds; without, they begin at 0.

        Also returns the keys and values of all layers: of the tokens, or those of the whole cache.
        """
        if cache is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            mask = positions[:, :, None] >= positions[:, None, :]
        else:
            positions = cache.lengths[:, None]
            stored = jnp.arange(cache.keys[0].shape[2], dtype=jnp.int32)
            mask = positions[:, :, None] >= stored[None, None]
        rope = _rope(positions, self.config)
        x = self.embed_tokens(tokens)
        memories = []
        for i, layer in enumerate(self.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.lengths)
            x, memory = layer(x, rope, mask, past)
            memories.append(memory)
        keys, values = zip(*memories, strict=True)
        return self.norm(x), (keys, values)


class Llama(nnx.Module):
    """A decoder of the Llama family.

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
            return jnp.matmul(hidden, embedding.T, precision=_precision(hidden.dtype))
        return self.lm_head(hidden)

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        config = self.config
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        zeros = jnp.zeros(shape, self.model.embed_tokens.embedding.dtype)
        layers = (zeros,) * config.num_hidden_layers
        return KVCache(layers, layers, jnp.zeros(batch, jnp.int32))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
    ) -> Self:
        """Reads `config.json` and `model.safetensors`, or its shards, from a folder.

        Args:
          path: a local folder, as Hugging Face's `save_pretrained` writes it.
          dtype: None for that of the stored embedding.

        Raises:
          FileNotFoundError: the folder or a file is missing.
          ValueError: a file is malformed, the config asks for something that is not implemented,
            or weights are missing, superfluous or of another shape.
        """
        folder = Path(path)
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


# ------------------------------------------------------------------------------------------------
# Serving
# ------------------------------------------------------------------------------------------------


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
    hidden, memories = model.model(tokens)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """What a model is but for its arrays, hashed once: jit looks at it at every step."""

    graphdef: nnx.GraphDef[Llama]
    treedef: jax.tree_util.PyTreeDef
    digest: int

    @classmethod
    def of(cls, graphdef: nnx.GraphDef[Llama], treedef: jax.tree_util.PyTreeDef) -> Self:
        return cls(graphdef, treedef, hash((graphdef, treedef)))

    def merge(self, leaves: list[Array]) -> Llama:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def __hash__(self) -> int:
        return self.digest

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Structure)
            and (self.digest, self.treedef, self.graphdef)
            == (other.digest, other.treedef, other.graphdef)
        )


_Stepped = tuple[KVCache, Array, Array]  # the cache, each row's token, and whether it has ended


class _LiveModel:
    """A model whose stacks other threads may load while it steps."""

    def __init__(self, model: Llama) -> None:
        self.guard = guard_of(model)
        with self.guard.lock:
            graphdef, self.state = nnx.split(model)  # holds the model's own variables
            self.writes = self.guard.writes
            self.leaves, treedef = jax.tree.flatten(self.state)
        self.structure = _Structure.of(graphdef, treedef)

    def call(self, step: Callable[..., _Stepped], *args: object) -> _Stepped:
        """`step` of the arrays that the variables hold now; a load waits until it is launched."""
        with self.guard.lock:
            if self.guard.writes != self.writes:
                self.writes, self.leaves = self.guard.writes, jax.tree.leaves(self.state)
            return step(self.structure, self.leaves, *args)


def _first_token(
    structure: _Structure,
    leaves: list[Array],
    tokens: Array,
    lengths: Array,
    eos: Array,
    adapters: AdapterBatch | None,
    max_length: int,
) -> _Stepped:
    model = structure.merge(leaves)
    with use(adapters):
        logits, cache = prefill(
            model, model.init_cache(tokens.shape[0], max_length), tokens, lengths
        )
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return cache, token, (token[:, None] == eos[None]).any(axis=-1)


def _next_token(
    structure: _Structure,
    leaves: list[Array],
    cache: KVCache,
    token: Array,
    done: Array,
    eos: Array,
    adapters: AdapterBatch | None,
) -> _Stepped:
    with use(adapters):
        logits, cache = decode(structure.merge(leaves), cache, token)
    token = jnp.where(done, token, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return cache, token, done | (token[:, None] == eos[None]).any(axis=-1)


@functools.cache
def _steps() -> tuple[Callable[..., _Stepped], Callable[..., _Stepped]]:
    # Jitted by the first call: before, nobody knows whether JAX will run on a GPU.
    options = step_options()
    first = jax.jit(
        _first_token, static_argnames=("structure", "max_length"), compiler_options=options
    )
    following = jax.jit(
        _next_token, static_argnames="structure", donate_argnames="cache", compiler_options=options
    )
    return first, following


def check_prompts(
    config: LlamaConfig, tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int
) -> None:
    """Whether `generate` takes these arguments for a model of this config; raises as it does."""
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or tokens.size == 0:
        raise ValueError(
            f"tokens must be [B, S] and lengths [B], got {tokens.shape} and {lengths.shape}"
        )
    if not (np.issubdtype(tokens.dtype, np.integer) and np.issubdtype(lengths.dtype, np.integer)):
        raise TypeError(f"tokens and lengths must be integers, got {tokens.dtype}, {lengths.dtype}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokens must lie in [0, {config.vocab_size}), got {tokens.min()} to {tokens.max()}"
        )
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(
            f"lengths must lie in [1, {tokens.shape[1]}], got {lengths.min()} to {lengths.max()}"
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r:.100}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    positions = config.max_position_embeddings
    if positions is not None and lengths.max() > positions:
        raise ValueError(
            f"the prompt of row {lengths.argmax()} has {lengths.max()} tokens; the model takes at "
            f"most {positions} (max_position_embeddings)"
        )


def generate(
    model: Llama,
    tokens: ArrayLike,
    lengths: ArrayLike,
    *,
    adapters: AdapterBatch | None = None,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
) -> np.ndarray:
    """Greedy completions of a batch of prompts, by one compiled prefill and one compiled decode.

    Nothing compiles again for another batch of the same shape, whatever its adapters. Other threads
    may load and evict adapters meanwhile; those of the batch stay as they are.

    Args:
      model: see `Llama`; with LoRA layers or without.
      tokens: `[B, S]` prompts, padded on the right with any valid tokens.
      lengths: `[B]` true lengths, 1 to S.
      adapters: each row's adapter, in either phase; None for the plain model.
      max_new_tokens: columns of the result; fewer are computed if all rows end before. It may lead
        beyond the config's `max_position_embeddings`, where a model computes what it was not
        trained for.
      eos_id: the token, or tokens, that end a row; None for those of the config, `()` for none.

    Returns:
      `[B, max_new_tokens]` int32. A row that has ended repeats its last token.

    Raises:
      TypeError: tokens, lengths or `max_new_tokens` are not integers.
      ValueError: shapes, lengths or tokens are out of range; or a prompt is longer than the
        config's `max_position_embeddings`.
      RuntimeError: this process was forked from one that had used JAX.
    """
    check_process()
    prompts, sizes = np.asarray(tokens), np.asarray(lengths)
    check_prompts(model.config, prompts, sizes, max_new_tokens)
    max_new_tokens = int(max_new_tokens)
    ends = model.config.eos_token_id if eos_id is None else end_tokens(eos_id)
    eos = np.asarray(ends or (-1,), np.int32)
    by_phase = (
        {"prefill": None, "decode": None}
        if adapters is None
        else {
            # Through "decode", which drops the lengths of a flat layout: here rows are [B, S].
            phase: adapters.with_phase("decode").with_phase(phase)
            for phase in ("prefill", "decode")
        }
    )
    live = _LiveModel(model)
    first_token, next_token = _steps()
    cache, token, done = live.call(
        functools.partial(first_token, max_length=prompts.shape[1] + max_new_tokens),
        prompts.astype(np.int32),
        sizes.astype(np.int32),
        eos,
        by_phase["prefill"],
    )
    columns = [token]
    while len(columns) < max_new_tokens and not (ends and np.asarray(done).all()):
        cache, token, done = live.call(next_token, cache, token, done, eos, by_phase["decode"])
        columns.append(token)
    columns += [token] * (max_new_tokens - len(columns))
    return np.stack([np.asarray(column) for column in columns], axis=1)
