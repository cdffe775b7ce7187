"""Linear layers of a mixture of experts, and LoRA over them.

A router sends each token to some experts. What an expert computes for a token is a *pair*. Pairs
are sorted by expert, so that one grouped product serves all experts; and each pair has an adapter:
that of its token's slot and its expert.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, DTypeLike, Float, Int

from jax_lora.adapters.types import SharedHalf
from jax_lora.batch import AdapterBatch, current
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.ops import add_in_step
from jax_lora.nn.stacks import LoRAStack, Slots, StackArrays, StackShape, slots_of
from jax_lora.sharding import Shards
from jax_lora.tokens import Ranges
from pallas_kernels import LoRAPart
from pallas_kernels.ops import sgmv_shrink
from pallas_kernels.routing import (
    Mix,
    Segments,
    SlotRange,
    columns_of,
    expert_indices,
    ids_of,
    make_segments,
)
from pallas_kernels.stacks import LayerStacks

# XLA has no grouped product on a GPU (jax 0.11.2): it makes a copy of x for each expert, zero where
# pairs have another. These are so many elements at most. A prefill of 4096 tokens of Qwen3-30B-A3B
# would take 17 GB and 128 times the operations. Beyond, tiles of pairs are multiplied one by one.
_MOST_COPIED = 2**27


class Pairs(NamedTuple):
    """Pairs of a token and an expert, P = T * K of them, in the order of experts.

    Attributes:
      tokens, experts: `[P]`, those of each pair.
      sizes: `[E]`, pairs of each expert.
      places: `[T, K]`, where the pairs of a token stand.
      adapters: the id of each pair's adapter, in the batch of `jax_lora.use`; None without one.
    """

    tokens: Int[Array, " P"]
    experts: Int[Array, " P"]
    sizes: Int[Array, " E"]
    places: Int[Array, "T K"]
    adapters: Segments | Mix | None

    def gathered(self, x: Float[Array, "T H"]) -> Float[Array, "P H"]:
        """The token of each pair."""
        return x[self.tokens]

    def summed(self, y: Float[Array, "P N"], weights: Float[Array, "T K"]) -> Float[Array, "T N"]:
        """What a token's experts computed, each multiplied by its weight; summed in float32."""
        each = y[self.places].astype(jnp.float32) * weights[..., None]
        return jnp.sum(each, axis=1).astype(y.dtype)


def pairs_of(experts: Int[Array, "T K"], num_experts: int, lead: tuple[int, ...]) -> Pairs:
    """The pairs of tokens and experts that a router chose.

    Args:
      experts: `[T, K]`, K experts of each token.
      num_experts: E.
      lead: the axes that tokens are made of: x is `[*lead, H]`.
    """
    batch, chosen = current(), experts.reshape(-1)
    every, adapters = jnp.arange(chosen.shape[0], dtype=jnp.int32), None
    if batch is None:
        order = jnp.argsort(chosen, stable=True)
    else:
        # Pairs of an expert and an adapter side by side, as the kernels take tiles of pairs.
        of_tokens = batch.segments(lead)
        first = ids_of(columns_of(of_tokens)[0].token_ids)[every // experts.shape[1]]
        order = jnp.argsort(chosen * (batch.num_slots + 1) + first, stable=True)
        of_pairs = order // experts.shape[1], chosen[order]
        adapters = _adapters(of_tokens, *of_pairs, num_experts, batch.ranges)
    places = jnp.zeros_like(every).at[order].set(every, unique_indices=True)
    sizes = jnp.bincount(chosen, length=num_experts).astype(jnp.int32)
    tokens = order // experts.shape[1]
    return Pairs(tokens, chosen[order], sizes, places.reshape(experts.shape), adapters)


def _adapters(
    of_tokens: Segments | Mix,
    tokens: Int[Array, " P"],
    experts: Int[Array, " P"],
    num_experts: int,
    ranges: Ranges,
) -> Segments | Mix:
    """The adapters of pairs, whose tokens and experts these are."""
    columns: list[Segments] = []
    for token_ids, _ in columns_of(of_tokens):
        ids = expert_indices(ids_of(token_ids)[tokens], experts[:, None], num_experts)
        segments = make_segments(ids[:, 0], num_experts * sum(slots for _, slots in ranges))
        columns.append(segments.split(_pair_ranges(num_experts, ranges)))
    if isinstance(of_tokens, Mix):
        return Mix(tuple(columns), of_tokens.weights[tokens])
    return columns[0]


def _pair_ranges(num_experts: int, ranges: Ranges) -> list[SlotRange]:
    """The ids of pairs in each rank bucket: as many times more as there are experts."""
    sizes = [slots for _, slots in ranges]
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        SlotRange(num_experts * first, num_experts * size) for first, size in zip(firsts, sizes)
    ]


class Experts(nnx.Module):
    """A linear layer of each expert, without bias: `y[p] = x[p] W[e]`, e the expert of pair p.

    Args:
      num_experts: E.
      in_features, out_features: of each expert; `kernel` is `[E, H, N]`.
      dtype, param_dtype, precision: as in `nnx.Linear`.
    """

    bias = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.Precision | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        shape = num_experts, in_features, out_features
        self.kernel = nnx.Param(initial(rngs.params(), shape, param_dtype))
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.precision = dtype, precision

    def __call__(self, x: Float[Array, "P H"], pairs: Pairs) -> Float[Array, "P N"]:
        """Each pair's product of its x and its expert's kernel; x is in the order of `pairs`."""
        return call_experts((self,), x, pairs)[0]

    def base(self, x: Float[Array, "P H"], pairs: Pairs) -> Float[Array, "P N"]:
        """Without adapters."""
        x, kernel = promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        if kernel.shape[0] * x.size > _MOST_COPIED:
            by_expert = make_segments(pairs.experts, kernel.shape[0])
            y = sgmv_shrink(x, kernel.swapaxes(1, 2), by_expert, implementation="xla")
            return y.astype(x.dtype)
        return jax.lax.ragged_dot(x, kernel, pairs.sizes, precision=self.precision)


class LoRAExperts(LoRALayer, Experts):  # type: ignore[misc]
    """`Experts` with stacks of LoRA adapters, one for each slot and expert. Made by `apply_lora`.

    The stacks of a bucket are `[slots, E * R, H]` and `[slots, E * N, R]`. A half that experts
    share has one of a slot: `[slots, R, H]`, or `[slots, N, R]`.

    Attributes:
      shared: the half that they share; None where each has its own. Set it before `add_stacks`.
    """

    shared: SharedHalf | None = None

    def __call__(self, x: Float[Array, "P H"], pairs: Pairs) -> Float[Array, "P N"]:  # type: ignore[override]
        """As `Experts`, with the adapters of the batch of `jax_lora.use`."""
        return call_experts((self,), x, pairs)[0]

    def matrix_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def parts(self, batch: AdapterBatch) -> list[LoRAPart]:
        batch.check_guard(self.guard, type(self).__name__)
        first_slots = batch.first_slots(slots_of(stack.shape for stack in self.stacks))
        (experts,) = self.lead
        return [
            LoRAPart(a, b, scales, experts * first_slots[stack.bucket], 0, 0, layers)
            for stack in self.stacks
            for a, b, scales, layers in [self._flat(stack)]
        ]

    def _stack_shapes(
        self, slots: Slots, buckets: Sequence[int], slices: Sequence[int], dtype: DTypeLike
    ) -> list[StackShape]:
        return [
            shape._replace(of_experts=True, shared=self.shared)
            for shape in super()._stack_shapes(slots, buckets, slices, dtype)
        ]

    def _flat(self, stack: LoRAStack) -> StackArrays:
        """A bucket's arrays with slots and experts as one axis."""
        shape = stack.shape
        own = slice(shape.scales_offset, shape.scales_offset + shape.num_scales)
        matrices = [size[1:] for size in shape.sizes]

        def flat(a: Array, b: Array, scales: Array) -> tuple[Array, Array, Array]:
            """`scales` are `[*layers, E, S]`: a bank writes those of experts as those of layers."""
            layers = scales.shape[:-2]
            a, b = (t.reshape(*layers, -1, *size) for t, size in zip((a, b), matrices))
            each = scales[..., own].reshape(*scales.shape[:-1], shape.slots, -1)
            return a, b, each.swapaxes(-3, -2).reshape(*layers, -1)

        a, b, scales, layers = self._arrays(stack)
        if layers is not None:
            of_all = flat(layers.lora_a, layers.lora_b, layers.scales)
            layers = LayerStacks(*of_all, layers.layer)
        return StackArrays(*flat(a, b, scales), layers)

    def _place(self, shards: Shards | None, holder: nnx.Module) -> None:
        if shards is not None and shards.mesh.size > 1:
            raise ValueError(
                f"LoRA of experts is for models on one device, but the {type(self).__name__} is on "
                f"a mesh of {shards.mesh.size}; leave its layers out of target"
            )
        super()._place(shards, holder)


def call_experts(
    layers: Sequence[Experts], x: Float[Array, "P H"], pairs: Pairs
) -> tuple[Float[Array, "P _"], ...]:
    """`layer(x, pairs)` of each layer, with the adapters of all of them in one op."""
    ys, batch = tuple(layer.base(x, pairs) for layer in layers), current()
    if batch is None or pairs.adapters is None:
        return ys
    starts = itertools.accumulate((layer.out_features for layer in layers), initial=0)
    parts = [
        dataclasses.replace(part, y_offset=start)
        for layer, start in zip(layers, starts)
        if isinstance(layer, LoRAExperts)
        for part in layer.parts(batch)
    ]
    if not parts:
        return ys
    return add_in_step(ys, x.astype(ys[0].dtype), parts, pairs.adapters, phase=batch.phase)
