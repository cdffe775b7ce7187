"""The stacks of a layer: room for adapters, by rank bucket and output slice."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, DTypeLike

from jax_lora.adapters.types import SharedHalf
from pallas_kernels import LoRAPart
from pallas_kernels.ranks import check_buckets
from pallas_kernels.stacks import EIGHT_BITS_NAMES, LayerStacks, is_eight_bits

Slots = int | Mapping[int, int]

FLAT_IS_GONE = "the library stores stacks in the form that its steps read fastest"


class LoRAScale(nnx.Variable[Array]):
    """Scale of each slot of a layer's stacks, one stack behind the other, alpha / r of the true
    rank: `[*lead, S]` float32. No Param: it is not trained. In stacks of 8 bits a slot has one
    for each rank column, times that."""

    # One array, as a step pays for each: H100, 16 layers with five buckets, 1,827 arguments, 5.7 to
    # 6.3 ms of the host's time; without 558 of the scales 3.9 to 5.1.


class InPlace(nnx.Variable[Array]):
    """An array of all layers of a scan, or the number of a turn's own; see `scan_layers`."""


class StackShape(NamedTuple):
    """One stack of a layer.

    Attributes:
      slots: L. bucket: R. features: H and the width n of the slice.
      y_offset: first of the layer's output columns that the stack adds to.
      scales_offset: where its scales start in the layer's.
      scales_per_slot: 1; of stacks in 8 bits R, one for each rank column.
      of_experts: whether the last axis of the layer's `lead` is that of experts.
      shared: the half of which a slot has one for all experts; None where each has its own.
    """

    slots: int
    bucket: int
    features: tuple[int, int]
    y_offset: int
    scales_offset: int
    scales_per_slot: int = 1
    of_experts: bool = False
    shared: SharedHalf | None = None

    @property
    def num_scales(self) -> int:
        """How many of the layer's scales are its own."""
        return self.slots * self.scales_per_slot

    @property
    def sizes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The shapes of A, `[L, R, H]`, and of B, `[L, n, R]`."""
        in_features, out_features = self.features
        return (self.slots, self.bucket, in_features), (self.slots, out_features, self.bucket)

    def in_slot(self, axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of a slot's A, and of its B, in front of their matrices, of a layer whose
        `lead` are `axes`: all but that of experts which share the half. Likewise of a place."""
        of_a, of_b = (axes[:-1] if half == self.shared else axes for half in "AB")
        return of_a, of_b

    def arrays(self, lead: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B, of all layers; see `LoRAStack`."""
        layers = lead[:-1] if self.of_experts else lead
        a, b = (
            (*layers, slots, math.prod(axes[len(layers) :]) * rows, columns)
            for axes, (slots, rows, columns) in zip(self.in_slot(lead), self.sizes)
        )
        return a, b


class LoRAStack(nnx.Module):
    """The adapters of one rank bucket and one output slice of a layer.

    Attributes:
      lora_a: `[*lead, L, R, H]`, `lora_b`: `[*lead, L, n, R]`; zeros where empty. `lead` are the
        axes of layers that are stacked for a scan, if any. E experts have `[*lead, L, E * R, H]`
        and `[*lead, L, E * n, R]`, a slot's experts one below the other; without E in what they
        share.
      rescale: `[*lead, L, 1, n]` float32 in a model with room for DoRA: what each column of the
        output is multiplied with, less 1; zeros for adapters without DoRA.
      shape: what is static about it.
      in_place: in a turn of `scan_layers`, A and B of all layers.
    """

    in_place: nnx.List[InPlace]
    rescale: LoRAScale | None = None

    def __init__(self, shape: StackShape, lora_a: Array, lora_b: Array) -> None:
        self.shape = shape
        self.lora_a: nnx.LoRAParam[Array] = nnx.LoRAParam(lora_a)
        self.lora_b: nnx.LoRAParam[Array] = nnx.LoRAParam(lora_b)

    def add_rescale(self) -> None:
        """Makes room for DoRA."""
        lead, width = self.lora_b.shape[:-2], self.lora_b.shape[-2]
        self.rescale = LoRAScale(jnp.zeros((*lead, 1, width), jnp.float32))

    @property
    def bucket(self) -> int:
        return self.shape.bucket

    @property
    def slots(self) -> int:
        return self.shape.slots

    @property
    def y_offset(self) -> int:
        return self.shape.y_offset

    @property
    def variables(self) -> tuple[nnx.LoRAParam[Array], nnx.LoRAParam[Array]]:
        """A and B of all of its adapters."""
        return self.lora_a, self.lora_b


def get_slot(stack: Array, slot: ArrayLike) -> Array:
    """One adapter's A or B out of a stack, of all layers that are stacked."""
    return jax.lax.dynamic_index_in_dim(stack, slot, stack.ndim - 3, keepdims=False)


def get_scales(scales: Array, shape: StackShape, slot: ArrayLike) -> Array:
    """The scales of one slot's rank columns out of a layer's, of all layers that are stacked."""
    size = shape.scales_per_slot
    start = shape.scales_offset + slot * size
    return jax.lax.dynamic_slice_in_dim(scales, start, size, scales.ndim - 1)


def set_slot(stack: Array, slot: ArrayLike, new: Array) -> Array:
    """`stack` with one adapter's A or B replaced, in all layers that are stacked. `new` may have
    an axis of experts."""
    new = new.reshape(*stack.shape[:-3], *stack.shape[-2:])
    return jax.lax.dynamic_update_index_in_dim(stack, new, slot, stack.ndim - 3)


class StackArrays(NamedTuple):
    """A, B and the layer's scales, and where they stand among those of a scan's layers, if so."""

    lora_a: Array
    lora_b: Array
    scales: Array
    layers: LayerStacks | None = None

    def part(self, shape: StackShape, first_slot: int) -> LoRAPart:
        """What the stack adds to its layer's output."""
        a, b, scales, layers = self
        return LoRAPart(a, b, scales, first_slot, shape.y_offset, shape.scales_offset, layers)


def slots_of(shapes: Iterable[StackShape]) -> dict[int, int]:
    """`{bucket: slots}` of a layer with these stacks."""
    return {shape.bucket: shape.slots for shape in shapes}


def stack_shapes(
    features: tuple[int, int],
    slots: Slots,
    buckets: Sequence[int],
    slices: Sequence[int],
    dtype: DTypeLike = jnp.float32,
) -> list[StackShape]:
    """The stacks of a layer: by bucket, and of each bucket by slice."""
    in_features, out_features = features
    if sum(slices) != out_features or any(n < 1 for n in slices):
        raise ValueError(f"slices {tuple(slices)} must be positive and sum to {out_features}")
    offsets = itertools.accumulate(slices, initial=0)
    columns = list(zip(slices, offsets))
    shapes: list[StackShape] = []
    scales_offset = 0
    for bucket, n in check_slots(slots, buckets).items():
        for width, y_offset in columns:
            each = bucket if is_eight_bits(dtype) else 1
            size = in_features, width
            shapes.append(StackShape(n, bucket, size, y_offset, scales_offset, each))
            scales_offset += shapes[-1].num_scales
    return shapes


def empty_scales(shapes: Sequence[StackShape], lead: tuple[int, ...] = ()) -> Array:
    """The scales of a layer with these stacks."""
    return jnp.zeros((*lead, sum(shape.num_scales for shape in shapes)), jnp.float32)


def check_slots(slots: Slots, buckets: Sequence[int]) -> dict[int, int]:
    """`{bucket: slots}` in the order of `buckets`.

    Raises:
      TypeError: a number of slots is no int.
      ValueError: a number is below 1, or a dict does not name exactly the buckets.
    """
    checked = check_buckets(buckets)
    if isinstance(slots, Mapping):
        if set(slots) != set(checked):
            raise ValueError(f"slots name buckets {sorted(slots)}, buckets are {checked}")
        by_bucket = {bucket: slots[bucket] for bucket in checked}
    else:
        by_bucket = dict.fromkeys(checked, slots)
    for bucket, n in by_bucket.items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"slots must be an int or {{bucket: int}}, got {n!r}")
        if n < 1:
            raise ValueError(f"bucket {bucket} must have at least 1 slot, got {n}")
    return by_bucket


def stack_dtype(dtype: Any, *, eight_bits: bool = False) -> Any:
    """`dtype`, or a ValueError if stacks can't have it; `eight_bits`: they may be so."""
    found, also = jnp.dtype(dtype), f", or {EIGHT_BITS_NAMES}" if eight_bits else ""
    is_float = found in (jnp.float32, jnp.bfloat16, jnp.float16)
    if not is_float and not (eight_bits and is_eight_bits(found)):
        raise ValueError(
            f"stacks are float32, bfloat16 or float16{also}, not {dtype}; give their dtype"
        )
    return found
