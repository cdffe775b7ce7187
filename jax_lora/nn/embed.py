"""LoRA over `nnx.Embed`, and over the output layer that has the weights of an embedding."""

import functools
import itertools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_lora.batch import AdapterBatch
from jax_lora.nn.full import FullWeights
from jax_lora.nn.layer import LoRALayer
from jax_lora.sharding import Labels, Shards
from pallas_kernels import LoRAPart, bgmv_expand, select_kernel, sgmv_expand
from pallas_kernels.dispatch import Implementation
from pallas_kernels.routing import Segments, SlotRange, columns_of, local_segments


class TiedHead(nnx.Module):
    """The output layer whose weights are those of an embedding: `y = x @ embedding.T`."""

    bias = None

    def __init__(self, embed: nnx.Embed) -> None:
        self.embedding = embed.embedding
        self.dtype = embed.dtype
        self.promote_dtype = embed.promote_dtype

    def __call__(
        self, query: Array, *, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> Array:
        return self._attend(self.embedding[...], query, out_sharding)

    def _attend(
        self,
        embedding: Array,
        query: Array,
        out_sharding: NamedSharding | PartitionSpec | None = None,
    ) -> Array:
        query, embedding = self.promote_dtype((query, embedding), dtype=self.dtype)
        return jnp.dot(query, embedding.T, out_sharding=out_sharding)


class TiedEmbed(nnx.Embed):
    """An embedding whose `attend` is a layer of its own, `head`; made by `tie_head`."""

    head: TiedHead

    def attend(
        self, query: Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> Array:
        return self.head(query, out_sharding=out_sharding)


def tie_head(embed: nnx.Embed) -> TiedEmbed:
    """Makes `embed.attend` a layer of its own, `embed.head`, so that adapters can adapt it.

    For models whose output layer has the weights of the embedding. It changes `embed` in place,
    which computes what it did; the paths of its state stay. The layer's path is a target of
    `apply_lora` as any other. PEFT calls it `lm_head`, which the model says by `peft_names`.

    Example::

        class Model(nnx.Module):
            peft_names = {"embed.head": "lm_head"}  # of the class, so that the model stays hashable

            def __init__(self, rngs):
                self.embed = jax_lora.tie_head(nnx.Embed(vocabulary, features, rngs=rngs))

    Raises:
      TypeError: `embed` is no `nnx.Embed`, or has a head or LoRA already.
    """
    if type(embed) is not nnx.Embed:
        raise TypeError(f"tie_head takes an nnx.Embed, got {type(embed).__name__}")
    tied = cast(TiedEmbed, embed)
    tied.__class__ = TiedEmbed
    tied.head = TiedHead(embed)
    return tied


class LoRAHead(LoRALayer, TiedHead):  # type: ignore[misc]
    """`TiedHead` with stacks of LoRA adapters. Made by `apply_lora`."""

    kernel_name = "embedding"

    @property
    def kernel(self) -> nnx.Param[Array]:  # type: ignore[override]
        return self.embedding

    def matrix_shape(self) -> tuple[int, int]:
        vocabulary, features = self.embedding.shape[-2:]
        return features, vocabulary

    def labels(self, x_ndim: int) -> Labels:
        lead = tuple(range(x_ndim - 1))
        return Labels((*lead, "h"), ("n", "h"), (*lead, "n"))

    def resize(self) -> None:
        pass  # its sizes are those of the embedding

    def x_matrix(self, x: Array) -> Array:
        return x

    def kernel_matrix(self, index: tuple[int | Array, ...] = ()) -> Array:
        return self.embedding[index].T

    def kernel_tensor(self, matrix: Array) -> Array:
        return matrix.T

    def by_full(self, weights: FullWeights, x: Array) -> Array:
        return self._attend(weights.weight[...], x)


class LoRAEmbed(LoRALayer, nnx.Embed):  # type: ignore[misc]
    """`nnx.Embed` with stacks of LoRA adapters: `y[t] = E[x[t]] + s A[:, x[t]] B^T`.

    A is `[slots, R, vocabulary]`, of which a token reads one column; B is `[slots, features, R]`.
    Made by `apply_lora` where a target names the embedding. `attend` has no part in it.

    On a mesh, XLA divides it; explicit axes are refused.
    """

    kernel_name = "embedding"
    takes_eight_bits = False
    is_transposed = False
    bias = None

    @property
    def kernel(self) -> nnx.Param[Array]:  # type: ignore[override]
        return self.embedding

    def matrix_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.features

    def labels(self, x_ndim: int) -> Labels:
        lead = tuple(range(x_ndim))
        return Labels((*lead, "h"), ("h", "n"), (*lead, "n"))  # as if tokens were one-hot

    def x_matrix(self, x: Array) -> Array:
        return x[..., None]

    def kernel_matrix(self, index: tuple[int | Array, ...] = ()) -> Array:
        return self.embedding[index]

    def by_full(self, weights: FullWeights, x: Array) -> Array:
        (embedding,) = self.promote_dtype((weights.weight[...],), dtype=self.dtype, inexact=False)
        return jnp.take(embedding, x, axis=0)

    def _on_shards(self, shards: Shards, x: Array, adapters: AdapterBatch) -> Array:
        if AxisType.Explicit in shards.mesh.axis_types:
            raise NotImplementedError(
                "LoRA of an embedding does not cover a mesh with explicit axes, got "
                f"{shards.mesh}; make its axes AxisType.Auto"
            )
        return self._add_by(nnx.Embed.__call__(self, x), x, adapters, "xla")

    def _ahead(self, x: Array, adapters: AdapterBatch) -> tuple[Array, None]:
        return x, None  # there is no product

    def _add_lora(
        self,
        y: Array,
        x: Array,
        adapters: AdapterBatch,
        shards: Shards | None = None,
        deltas: tuple[Array, ...] | None = None,
    ) -> Array:
        return self._add_by(y, jnp.asarray(x), adapters, None)

    def _add_by(
        self, y: Array, x: Array, adapters: AdapterBatch, implementation: Implementation | None
    ) -> Array:
        if adapters.phase == "exact":
            raise ValueError(
                "the phase 'exact' does not cover LoRA of embeddings; give apply_lora a target "
                "without them"
            )
        tokens, out = x.reshape(-1), y.reshape(-1, y.shape[-1])
        stacks = list(zip(self.stacks, self.parts(adapters)))
        columns = columns_of(adapters.segments(x.shape))
        for (ids, weights), (stack, part) in itertools.product(columns, stacks):
            own = local_segments(ids, SlotRange(part.first_slot, stack.slots))
            v = _columns(part, tokens, own)
            v = v if weights is None else v * weights[:, None]
            if select_kernel(stack.bucket, adapters.phase) == "bgmv":
                out = bgmv_expand(v, part.lora_b, own.indices, out, implementation=implementation)
            else:
                out = sgmv_expand(v, part.lora_b, own, out, implementation=implementation)
        return out.reshape(y.shape)


class LoRATiedEmbed(LoRAEmbed, TiedEmbed):  # type: ignore[misc]
    """`LoRAEmbed` with a head, which may have adapters of its own."""


def _columns(part: LoRAPart, tokens: Array, segments: Segments) -> Array:
    """`[T, R]` float32: the column of A of each token, scaled; zeros without an adapter."""
    lora_a, slots = jnp.asarray(part.lora_a), segments.indices
    columns = _read(lora_a, slots, tokens, jax.ShapeDtypeStruct(lora_a.shape, lora_a.dtype))
    scales = jnp.asarray(part.scales)[(part.scales_offset or 0) + jnp.maximum(slots, 0)]
    return jnp.where(slots[:, None] >= 0, columns.astype(jnp.float32) * scales[:, None], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(lora_a: Array, slots: Array, tokens: Array, like: jax.ShapeDtypeStruct) -> Array:
    """`lora_a[slots[t], :, tokens[t]]`; zeros beyond the vocabulary. `like` is `lora_a`'s shape."""
    at = lora_a.at[slots, :, tokens]
    return at.get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _read_forward(
    lora_a: Array, slots: Array, tokens: Array, like: jax.ShapeDtypeStruct
) -> tuple[Array, tuple[Array, Array]]:
    return _read(lora_a, slots, tokens, like), (slots, tokens)


def _read_backward(
    like: jax.ShapeDtypeStruct, indices: tuple[Array, Array], gradient: Array
) -> tuple[Array, None, None]:
    # The sums of JAX's own gradient are made by atomics on a GPU, in any order. Here those of one
    # column stand side by side, are summed, and the last has the sum.
    order = jnp.lexsort(indices[::-1])
    slots, tokens = (one[order] for one in indices)
    is_new = (slots[1:] != slots[:-1]) | (tokens[1:] != tokens[:-1])
    edge = jnp.ones(1, bool)
    starts, ends = jnp.concatenate([edge, is_new]), jnp.concatenate([is_new, edge])

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    given = starts[:, None], gradient[order].astype(jnp.float32)
    _, sums = jax.lax.associative_scan(add, given)
    rows = jnp.where(ends & (slots >= 0) & (tokens >= 0), slots, like.shape[0])  # others drop out
    zeros = jnp.zeros(like.shape, like.dtype)
    return zeros.at[rows, :, tokens].set(sums.astype(like.dtype), mode="drop"), None, None


_read.defvjp(_read_forward, _read_backward)
