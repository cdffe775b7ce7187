"""A LoRA among several that one call adds: a rank bucket of one output slice."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike

from pallas_kernels.renamed import removed_keywords


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStacks:
    """Stacks of several like layers, one behind the other, in which a layer's own stand.

    In a loop over layers, a layer's stacks are slices of these. A kernel takes arrays, so XLA would
    copy the slices for it in each turn. Those who know these arrays read the layer's in their
    place. They are never differentiated: gradients are those of the slices.

    Attributes:
      lora_a: `[layers, L, R, H]`.
      lora_b: `[layers, L, N, R]`.
      scales: `[layers, S]`.
      layer: int32, which layer's they are; it may be traced.
    """

    lora_a: Array
    lora_b: Array
    scales: Array
    layer: Array

    @property
    def flat(self) -> tuple[Array, Array, Array]:
        """A `[layers * L, R, H]`, B and the scales, with the first two axes as one."""
        a, b, s = (t.reshape(-1, *t.shape[2:]) for t in (self.lora_a, self.lora_b, self.scales))
        return a, b, s

    def own(self) -> tuple[Array, Array, Array]:
        """A `[L, R, H]`, B and the scales `[S]` of the layer, as slices."""
        arrays = self.lora_a, self.lora_b, self.scales
        a, b, s = (lax.dynamic_index_in_dim(t, self.layer, keepdims=False) for t in arrays)
        return a, b, s


# The largest number of each dtype of a byte that stacks may have. A float8_e4m3fn has a sign, four
# bits of exponent and three of mantissa, and no infinity. In int8, -128 has no counterpart.
EIGHT_BITS = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.float8_e4m3fn): 448}
EIGHT_BITS_NAMES = " or ".join(map(str, EIGHT_BITS))


def is_eight_bits(dtype: DTypeLike) -> bool:
    """Whether stacks of this dtype are in 8 bits, so that each rank column has a scale."""
    return jnp.dtype(dtype) in EIGHT_BITS


class Sharing(NamedTuple):
    """How many adapters share one A and one B; those that do follow each other."""

    lora_a: int = 1
    lora_b: int = 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lora_a", "lora_b", "scales", "layers"),
    meta_fields=("first_slot", "y_offset", "scales_offset", "transposed"),
)
@dataclasses.dataclass(frozen=True)
class LoRAPart:
    """Adds `scales * (x @ A^T) @ B^T` to columns `[y_offset, y_offset + N)` of y.

    Ids count through all slots of a model. The part holds slots `[first_slot, first_slot + L)`:
    token t uses its adapter `indices[t] - first_slot` where that lies in `[0, L)`, else nothing.

    A mixture of experts has an adapter for each pair of a slot and an expert. The id of a pair is
    `slot * experts + expert` (`expert_indices`), so L is `slots * experts`. Experts may share A:
    `lora_a` then has fewer rows, and adapter i has row `i // (L / len(lora_a))`. Likewise B. A part
    shares one of the two, not both: L is the larger of their rows, so ids would be those of slots.

    Stacks in 8 bits, both `int8` or both `float8_e4m3fn`, have a scale for each rank column of each
    adapter: `(scales * (x @ A^T)) @ B^T`. It is what both halves were divided by (`quantised`).
    They hold no NaN: what one gives is undefined. They have no gradients.

    Attributes:
      lora_a: `[L, R, H]` (or `[slots, experts, R, H]`), down-projections; `[slots, R, H]` if
        experts share them.
      lora_b: `[L, N, R]` (or `[slots, experts, N, R]`), up-projections; `[slots, N, R]` if
        experts share them.
      scales: a number, `[L]`, or None for 1; of stacks in 8 bits `[L, R]`.
      first_slot: the id of the part's first adapter (static).
      y_offset: the first column of y that the part adds to (static).
      scales_offset: where the part's L scales start in `scales` `[S]`, which then holds those of
        several parts (static). A slice for each part would cost a launch. Stacks in 8 bits have
        L * R of them, an adapter's side by side, and an offset that is a multiple of 4.
      layers: where the part's arrays stand among those of several layers, if they are slices of
        them; else None. `lora_a` and `lora_b` are then `[L, R, H]` and `[L, N, R]`, and `scales`
        has its `scales_offset`.
      transposed: whether `lora_a` is `[L, H, R]` and `lora_b` `[L, R, N]`, as Flax lays kernels out
        (static). "xla" and "loop" read them as they stand. "mosaic_gpu", which loads rows of H,
        reads a copy that each call makes. Such a part has no `layers`.
    """

    lora_a: ArrayLike
    lora_b: ArrayLike
    scales: ArrayLike | None = None
    first_slot: int = 0
    y_offset: int = 0
    scales_offset: int | None = None
    layers: LayerStacks | None = None
    transposed: bool = False

    @property
    def slots(self) -> int:
        """L."""
        return max(jnp.shape(self.lora_a)[0], jnp.shape(self.lora_b)[0])

    @property
    def sharing(self) -> Sharing:
        """How many adapters share one A, and one B."""
        return Sharing(*(self.slots // jnp.shape(t)[0] for t in (self.lora_a, self.lora_b)))

    @property
    def rank(self) -> int:
        """R."""
        return jnp.shape(self.lora_a)[2 if self.transposed else 1]

    @property
    def features(self) -> int:
        """H."""
        return jnp.shape(self.lora_a)[1 if self.transposed else 2]

    @property
    def width(self) -> int:
        """N."""
        return jnp.shape(self.lora_b)[2 if self.transposed else 1]

    @property
    def dtype(self) -> np.dtype:
        """That of `lora_a`."""
        return jnp.result_type(self.lora_a)

    @property
    def is_eight_bits(self) -> bool:
        """Whether the stacks are in 8 bits."""
        return is_eight_bits(self.dtype)

    @property
    def num_scales(self) -> int:
        """How many scales it has of its own, if not one for all: L, of stacks in 8 bits L * R."""
        return self.slots * (self.rank if self.is_eight_bits else 1)

    def own_scales(self) -> Array:
        """Its own scales alone: a number, `[L]`, or of stacks in 8 bits `[L, R]`."""
        scales, first = jnp.asarray(self.scales), self.scales_offset
        if first is not None:
            scales = scales[first : first + self.num_scales]
        return scales.reshape(self.slots, self.rank) if self.is_eight_bits else scales

    def with_layout(self, *, transposed: bool) -> "LoRAPart":
        """The part with its stacks in a layout."""
        if self.transposed == transposed:
            return self
        a, b = (jnp.asarray(t).swapaxes(1, 2) for t in (self.lora_a, self.lora_b))
        return dataclasses.replace(self, lora_a=a, lora_b=b, transposed=transposed)

    def without_slices(self) -> "LoRAPart":
        """The part as a gradient keeps it: a loop would store the slices of all of its turns."""
        if self.layers is None:
            return self
        return dataclasses.replace(self, lora_a=0.0, lora_b=0.0, scales=0.0)

    def with_slices(self) -> "LoRAPart":
        """The inverse of `without_slices`."""
        if self.layers is None:
            return self
        a, b, scales = self.layers.own()
        return dataclasses.replace(self, lora_a=a, lora_b=b, scales=scales)


LoRAPart.__init__ = removed_keywords(  # type: ignore[method-assign]
    indices="a call takes one list of ids, add_lora_multi(y, x, parts, indices), and a part says "
    "which of them are its own by first_slot="
)(LoRAPart.__init__)


def side_by_side(ys: tuple[Array, ...]) -> Array:
    """The columns of all ys in one array."""
    return jnp.concatenate(ys, axis=1) if len(ys) > 1 else ys[0]


def apart(y: Array, widths: tuple[int, ...]) -> tuple[Array, ...]:
    """`y` cut into arrays of so many columns."""
    edges = list(itertools.accumulate(widths))
    return tuple(jnp.split(y, edges[:-1], axis=1))
