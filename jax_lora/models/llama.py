"""A compact decoder of Llama and its relatives in Flax NNX, with a static key-value cache.

Its forward knows nothing of adapters. Its NNX paths, joined by dots, are the module names of
Hugging Face and PEFT (`model.layers.0.self_attn.q_proj`), so `jax_lora.apply_lora` and PEFT's
adapters fit as they are. Its layers are stacked in one module and run by a scan, which compiles one
of them: the names then lack the number, which is an axis of the arrays.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.adapters import read_safetensors
from jax_lora.batch import current, use
from jax_lora.models.config import LlamaConfig
from jax_lora.models.hub import check_format, local_folder
from jax_lora.models.mlp import MLP, SparseMLP, linear, precision_of
from jax_lora.models.pages import Lanes, LayerPages, PagedTokens, Pages, Span
from jax_lora.models.parallel import placing
from jax_lora.models.rope import rotate, waves
from jax_lora.models.weights import expert_name, mixtral_name, peft_names, stored
from jax_lora.nn.embed import tie_head
from jax_lora.nn.packed import call_packed
from jax_lora.nn.scan import scan_layers


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


# Keys and values of some tokens, each `[B, num_key_value_heads, T, head_dim]`.
Memory = tuple[Array, Array]
# What all layers have: one array with an axis of layers in front, or a tuple if not stacked.
OfLayers = Array | tuple[Array, ...]
# A mask `[#B, S, T]`; of pages, one for each kind of lanes, or what a kernel takes in its place.
Mask = Array | tuple[Array | Span, ...]
# What tokens see: cosine and sine of their positions, and a mask.
View = tuple[tuple[Array, Array], Mask]
# What a layer has of its own: the past tokens, and which of the views (None: there is one).
Own = tuple[Memory | None, int | Array | None]


class Attention(nnx.Module):
    """Self-attention with grouped key-value heads and rotary embeddings."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.config = config
        if config.packed_projections:
            self.qkv_proj = linear(hidden, queries + 2 * keys, bias, dtype, rngs)
        else:
            self.q_proj = linear(hidden, queries, bias, dtype, rngs)
            self.k_proj = linear(hidden, keys, bias, dtype, rngs)
            self.v_proj = linear(hidden, keys, bias, dtype, rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config, dtype)
            self.k_norm = RMSNorm(config.head_dim, config, dtype)
        self.o_proj = linear(queries, hidden, config.attention_bias, dtype, rngs)

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

    @property
    def _scale(self) -> float:
        return float((self.config.query_pre_attn_scalar or self.config.head_dim) ** -0.5)

    def _scores(self, q: Float[Array, "B S N G D"], k: Float[Array, "B N T D"]) -> Array:
        """`[B, N, G, S, T]` in float32, before the mask."""
        exact = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = exact("bsngd,bntd->bngst", q, k, precision=precision_of(q.dtype)) * self._scale
        return _soft_cap(scores, self.config.attn_logit_softcapping)

    def __call__(
        self,
        x: Float[Array, "B S H"],
        rope: tuple[Array, Array],
        mask: Mask,
        past: Memory | LayerPages | None,
    ) -> tuple[Float[Array, "B S H"], Memory | LayerPages]:
        """Attends to the `past` tokens, if any, and to those of x; also returns the latter's keys
        and values. `mask` says which: all of the past ones, then those of x. Where `past` is
        pages, it returns them with the tokens of x, `[T, 1, H]`."""
        batch, length, _ = x.shape
        q, k, v = self._heads(x)
        q, k = rotate(q, rope), rotate(k, rope)
        # Heads before positions, as the products below batch over rows and heads: in another
        # order XLA transposes the whole cache at each step.
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        # Query head n reads key-value head n // G.
        q = q.reshape(batch, length, k.shape[1], -1, self.config.head_dim)
        memory: Memory | LayerPages
        if isinstance(past, LayerPages):
            memory = past.with_tokens(k[:, :, 0], v[:, :, 0])
            parts = zip(past.tokens.split(q[:, 0]), past.tokens.lanes, mask, strict=True)
            read = [
                memory.read_in_place(own, lanes, seen, self._scale)
                if isinstance(seen, Span)
                else self._attended(own, [memory.of_lanes(lanes)], seen)
                for own, (lanes, _), seen in parts
            ]
            out = jnp.concatenate([part.reshape(-1, *q.shape[1:]) for part in read])
        else:
            memory = (k, v)
            # The past is read where it stands: who adds to it first has to copy the layer's.
            memories = [memory] if past is None else [past, memory]
            out = self._attended(q, memories, cast(Array, mask))
        # Else XLA transposes the product once for each that reads it: the projection, its adapters.
        out = jax.lax.optimization_barrier(out.reshape(batch, length, -1))
        return self.o_proj(out), memory

    def _attended(
        self,
        q: Float[Array, "B S N G D"],
        memories: list[Memory],
        mask: Bool[Array, "#B S T"],
    ) -> Float[Array, "B S N G D"]:
        """What the queries see of the memories, which stand behind each other in the mask."""
        scores = [self._scores(q, keys) for keys, _ in memories]
        score = jnp.where(mask[:, None, None], jnp.concatenate(scores, axis=-1), -jnp.inf)
        weights = jax.nn.softmax(score, axis=-1).astype(q.dtype)
        each = jnp.split(weights, [scores[0].shape[-1]], axis=-1)
        attended = [
            jnp.einsum("bngst,bntd->bsngd", some, values, precision=precision_of(q.dtype))
            for some, (_, values) in zip(each, memories)
        ]
        return sum(attended[1:], attended[0])


class DecoderLayer(nnx.Module):
    """Attention, then MLP or experts, each behind a norm and added to the stream.

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
        self.mlp = (SparseMLP if config.num_experts else MLP)(config, dtype, rngs)

    def __call__(
        self,
        x: Array,
        rope: tuple[Array, Array],
        mask: Mask,
        past: Memory | LayerPages | None,
    ) -> tuple[Array, Memory | LayerPages]:
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
      keys, values: `[layers, B, num_key_value_heads, T, head_dim]`; of a model with `scan=False`, a
        tuple of the layers'.
      lengths: `[B]` int32, how many of the T positions of each row are in use.
    """

    keys: OfLayers
    values: OfLayers
    lengths: Array

    @property
    def size(self) -> int:
        """T."""
        return int(jax.tree.leaves(self.keys)[0].shape[-2])

    def extended(self, keys: OfLayers, values: OfLayers) -> "KVCache":
        """With one more token per row, whose keys and values have T = 1; a full row keeps its own.

        Once for all layers, so that nothing but the new ones is written.
        """
        rows = jnp.arange(self.lengths.shape[0])

        def put(old: Array, new: Array) -> Array:
            new = jnp.moveaxis(new, -4, 0)[..., 0, :]
            return old.at[..., rows, :, self.lengths, :].set(new, mode="drop")

        keys, values = jax.tree.map(put, (self.keys, self.values), (keys, values))
        return KVCache(keys, values, self.lengths + 1)


class Decoder(nnx.Module):
    """From tokens to the last hidden states."""

    def __init__(
        self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs, *, scan: bool
    ) -> None:
        self.config, self.scan = config, scan
        embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.embed_tokens = tie_head(embed) if config.tie_word_embeddings else embed
        make, count = functools.partial(DecoderLayer, config, dtype), config.num_hidden_layers
        self.layers: DecoderLayer | nnx.List[DecoderLayer] = (
            nnx.vmap(make)(rngs.split(count))
            if scan
            else nnx.List(make(rngs) for _ in range(count))
        )
        self.norm = RMSNorm(config.hidden_size, config, dtype)

    def __call__(
        self, tokens: Int[Array, "B S"], cache: KVCache | None = None, *, room: int | None = None
    ) -> tuple[Float[Array, "B S H"], tuple[OfLayers, OfLayers]]:
        """With a cache, `tokens` `[B, 1]` follow what it holds; without, they begin at 0.

        Also returns the tokens' keys and values in all layers. Scaled rotary embeddings follow the
        size of the cache that these are for: `room`, by default that of `cache`, or the tokens'
        number.
        """
        config = self.config
        if cache is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            distances = positions[:, :, None] - positions[:, None]
            is_seen = distances >= 0
        else:
            positions = cache.lengths[:, None]
            distances = positions[:, :, None] - jnp.arange(cache.size, dtype=jnp.int32)[None, None]
            own = [(0, 0), (0, 0), (0, 1)]  # the token itself
            is_seen = jnp.pad(distances > 0, own, constant_values=True)
            distances = jnp.pad(distances, own)
        room = room or (tokens.shape[1] if cache is None else cache.size)
        views: list[View] = [
            (
                waves(kind.rope, config.head_dim, positions, room),
                is_seen if kind.window is None else is_seen & (distances < kind.window),
            )
            for kind in config.attention_kinds
        ]
        past = None if cache is None else (cache.keys, cache.values)
        x, memories = self._run_layers(self._embedded(tokens), views, past)
        return self.norm(x), memories

    def _embedded(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S H"]:
        x = self.embed_tokens(tokens)
        if self.config.scaled_embeddings:
            x *= jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x

    def paged(
        self,
        tokens: Int[Array, " T"],
        pages: Pages,
        lanes: tuple[tuple[Lanes[Array], int], ...],
        *,
        room: int,
        in_place: bool = False,
    ) -> tuple[Float[Array, "T H"], Pages]:
        """The tokens of all lanes, kind after kind; each sees what its request has in the blocks.

        Args:
          lanes: kinds of lanes, and how many tokens a lane of each kind has.
          room: positions that scaled rotary embeddings are for.
          in_place: lanes of one token read the blocks where they stand, by a kernel; see
            `pages.lacks_in_place`.

        Returns:
          The last hidden states, and the blocks with the tokens.
        """
        config, step = self.config, PagedTokens.of(lanes, pages, in_place=in_place)
        views: list[View] = [
            (
                waves(kind.rope, config.head_dim, step.positions[:, None], room),
                step.masks(pages.block, kind.window),
            )
            for kind in config.attention_kinds
        ]
        view_of_kind = jax.tree.map(lambda *each: jnp.stack(each), *views)

        def run(
            layer: DecoderLayer, carry: tuple[Array, Pages], own: tuple[Array | int, ...] | None
        ) -> tuple[tuple[Array, Pages], None]:
            (x, pages), (number, kind) = carry, own or ()
            is_only = len(views) == 1
            rope, masks = views[0] if is_only else jax.tree.map(lambda t: t[kind], view_of_kind)
            x, memory = layer(x, rope, masks, LayerPages(pages, number, step))
            return (x, cast(LayerPages, memory).pages), None

        carry, kinds = (self._embedded(tokens[:, None]), pages), self._kinds()
        if self.scan:
            own = jnp.arange(len(kinds), dtype=jnp.int32), jnp.array(kinds, jnp.int32)
            carry, _ = scan_layers(run, cast(DecoderLayer, self.layers), carry, own)
        else:
            for each in zip(cast(nnx.List[DecoderLayer], self.layers), enumerate(kinds)):
                carry, _ = run(each[0], carry, each[1])
        x, pages = carry
        return self.norm(x)[:, 0], pages

    def _kinds(self) -> list[int]:
        """Which of the config's kinds of attention each layer has."""
        return [self.config.attention_kinds.index(k) for k in self.config.kinds_of_layers]

    def _run_layers(
        self, x: Array, views: list[View], past: tuple[OfLayers, OfLayers] | None
    ) -> tuple[Array, tuple[OfLayers, OfLayers]]:
        kinds = self._kinds()
        view_of_kind = jax.tree.map(lambda *each: jnp.stack(each), *views)

        def run(layer: DecoderLayer, x: Array, own: Own | None) -> tuple[Array, Memory]:
            past, kind = own or (None, None)
            # In a scan the kind is data: its view is one of several that stand side by side.
            rope, mask = views[0] if kind is None else jax.tree.map(lambda t: t[kind], view_of_kind)
            x, memory = layer(x, rope, mask, past)
            return x, cast(Memory, memory)

        def run_stacked(layer: DecoderLayer, x: Array, own: Own | None) -> tuple[Array, Array]:
            # As one array: a GPU would copy the weights of v and multiply twice, once for the
            # layer and once to write all layers' values.
            x, memory = run(layer, x, own)
            return x, jnp.stack(memory)

        if self.scan:
            numbers = jnp.array(kinds, jnp.int32) if len(views) > 1 else None
            stacked, own = cast(DecoderLayer, self.layers), cast(Own, (past, numbers))
            x, both = scan_layers(run_stacked, stacked, x, own)
            return x, (both[:, 0], both[:, 1])
        layers = cast(nnx.List[DecoderLayer], self.layers)
        each = [None] * len(layers) if past is None else zip(*past, strict=True)
        memories = []
        for layer, past_of_layer, kind in zip(layers, each, kinds, strict=True):
            x, memory = run(layer, x, (past_of_layer, kind))
            memories.append(memory)
        keys, values = zip(*memories, strict=True)
        return x, (keys, values)


def _last(hidden: Float[Array, "B S H"], lengths: Int[Array, " B"]) -> Float[Array, "B H"]:
    """The hidden state of each row's last token."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def _soft_cap(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.tanh(x / limit) * limit


class Llama(nnx.Module):
    """A decoder of Llama or of a relative: Mistral, SmolLM2, Qwen2 and 3, Gemma 2 and 3, Phi-3,
    Mixtral and Qwen3-MoE.

    Example::

        model = Llama.from_pretrained("path/of/a/checkpoint")
        logits = model(tokens)

    Args:
      config: see `LlamaConfig`.
      dtype: of parameters, cache and computation. float32 is computed in full float32.
      rngs: for the random initial weights.
      scan: whether the layers are stacked and run by a scan, so that one of them is compiled.
      num_labels: of a classifier, `score`, beside the output layer; None for no classifier. It is
        zero: adapters bring their own, as Hugging Face's `...ForSequenceClassification` have it.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        scan: bool = True,
        num_labels: int | None = None,
    ) -> None:
        self.config = config
        self.model = Decoder(config, dtype, rngs, scan=scan)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, dtype, rngs)
        if num_labels is not None:
            self.score = linear(config.hidden_size, num_labels, False, dtype, rngs)
            self.score.kernel.set_value(jnp.zeros_like(self.score.kernel[...]))

    @property
    def peft_names(self) -> dict[str, str]:
        """PEFT's names of the layers whose paths are others."""
        # No attribute of the module: a dict there would keep its structure from being hashed.
        return peft_names(self.config, scan=self.model.scan)

    @property
    def peft_rename(self) -> Callable[[str], str] | None:
        """From a name of an adapter's module to PEFT's: modules of experts have two names each."""
        if self.config.mixtral_names:
            return mixtral_name
        return expert_name if self.config.num_experts else None

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Logits of every position, without a cache."""
        return self.logits(self.model(tokens)[0])

    def scores(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B num_labels"]:
        """What the classifier says of each text, from its last token.

        Example::

            model = Llama.from_pretrained(path, num_labels=3)
            apply_lora(model, full_slots={"score": 4})  # of four adapters at once
            bank = AdapterBank(model)
            bank.load("topics", "adapters/topics")  # of PEFT, with task_type="SEQ_CLS"
            with jax_lora.use(bank.batch(["topics"], phase="prefill")):
                scores = model.scores(tokens, lengths)

        Args:
          tokens: padded on the right with any valid tokens.
          lengths: true lengths, 1 to S.

        Raises:
          ValueError: the model has no classifier.
        """
        if not hasattr(self, "score"):
            raise ValueError("the model has no classifier; give from_pretrained num_labels=")
        hidden, _ = self.model(tokens)
        return self.score(_last(hidden, lengths))

    def logits(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """From the decoder's output to logits."""
        if self.config.tie_word_embeddings:
            precision = "highest" if hidden.dtype == jnp.float32 else None
            with jax.default_matmul_precision(precision):  # attend takes none
                logits = self.model.embed_tokens.attend(hidden)
        else:
            logits = self.lm_head(hidden)
        return _soft_cap(logits, self.config.final_logit_softcapping)

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` rows of at most `max_length` tokens."""
        config = self.config
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers, dtype = config.num_hidden_layers, self.model.embed_tokens.embedding.dtype
        zeros: OfLayers = (
            jnp.zeros((layers, *shape), dtype)
            if self.model.scan
            else (jnp.zeros(shape, dtype),) * layers
        )
        return KVCache(zeros, zeros, jnp.zeros(batch, jnp.int32))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: DTypeLike | None = None,
        revision: str | None = None,
        scan: bool = True,
        num_labels: int | None = None,
    ) -> Self:
        """Reads `config.json` and `model.safetensors`, or its shards, from a folder.

        Where `jax.set_mesh` has set a mesh with an axis `tp`, the weights are divided over it.

        Args:
          path: a local folder, as Hugging Face's `save_pretrained` writes it; or a name on the hub,
            `OWNER/NAME`, of which `huggingface_hub` keeps the files in its cache.
          dtype: None for that of the stored embedding.
          revision: of a name on the hub: a branch, a tag or a commit.
          scan, num_labels: as in `Llama`.

        Raises:
          FileNotFoundError: the folder or a file is missing; or the hub can't give it.
          ValueError: weights are in a form that is not read, a file is malformed, the config asks
            for something that is not implemented, weights are missing, superfluous or of another
            shape, or heads or the MLP do not divide over the mesh.
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
        model = nnx.eval_shape(
            lambda: cls(
                config,
                dtype=dtype or jnp.float32,
                rngs=nnx.Rngs(0),
                scan=scan,
                num_labels=num_labels,
            )
        )
        if num_labels is not None:
            shape = num_labels, config.hidden_size
            tensors["score.weight"] = np.zeros(shape, model.score.kernel.dtype)
        params = nnx.to_flat_state(nnx.state(model))
        found = {path: stored(path, config, scan=scan) for path, _ in params}
        expected = set(itertools.chain(*(each.names for each in found.values())))
        if tensors.keys() != expected:
            missing = sorted(expected - tensors.keys())
            superfluous = sorted(tensors.keys() - expected)
            raise ValueError(
                f"{folder} doesn't fit its config.json: it lacks {missing[:3]} ({len(missing)} in "
                f"all) and has {superfluous[:3]} ({len(superfluous)} in all) too many"
            )
        loaded, place = [], placing(config)
        for path_, param in params:
            own = found[path_]
            for name in own.names:
                if (given := tensors[name].shape) != own.shape(param):
                    raise ValueError(
                        f"{folder}: {name} has shape {[*given]}, which config.json contradicts; "
                        f"the layer holds {[*param.shape[len(own.lead) :]]}"
                    )
            value = own.read(tensors, param.dtype)
            loaded.append((path_, param.replace(place(path_, value))))
        nnx.update(model, nnx.from_flat_state(loaded))
        return model


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
    size = cache.size
    if tokens.shape[1] > size:
        raise ValueError(f"prompts of {tokens.shape[1]} tokens exceed the cache's {size} positions")
    hidden, memories = model.model(tokens, room=size)
    # Zeros behind the prompts, so that what another batch left there, NaN maybe, is never read.
    room = [(0, 0), (0, 0), (0, size - tokens.shape[1]), (0, 0)]

    def fill(new: Array) -> Array:
        return jnp.pad(new, [(0, 0)] * (new.ndim - 4) + room)

    keys, values = jax.tree.map(fill, memories)
    return model.logits(_last(hidden, lengths)), KVCache(keys, values, lengths.astype(jnp.int32))


def decode(
    model: Llama, cache: KVCache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """One more token per row: its logits, and the cache with it.

    For the caller to jit, with the cache donated. A row that has used up the cache's positions
    is not extended: size the cache for prompt and completion.

    Where no row of the batch of `jax_lora.use` has an adapter, the plain model runs.
    """

    def step() -> tuple[Array, tuple[OfLayers, OfLayers]]:
        hidden, memories = model.model(tokens[:, None], cache)
        return model.logits(hidden[:, 0]), memories

    def plain() -> tuple[Array, tuple[OfLayers, OfLayers]]:
        with use(None):
            return step()

    if (batch := current()) is None:
        logits, memories = step()
    else:
        # In one program, so that nothing recompiles; and once, for the whole step, as XLA takes the
        # choice into the step's CUDA graph, where it costs a launch.
        logits, memories = jax.lax.cond(jnp.any(batch.indices >= 0), step, plain)
    return logits, cache.extended(*memories)
