"""LoRA over `nnx.Linear` and `nnx.LinearGeneral`."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike

from jax_lora.nn.full import FullWeights
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.stacks import FLAT_IS_GONE, Slots
from jax_lora.sharding import Labels
from pallas_kernels.ranks import DEFAULT_BUCKETS
from pallas_kernels.renamed import removed_keywords


class LoRADense(LoRALayer, nnx.Linear):  # type: ignore[misc]
    """`nnx.Linear` with stacks of LoRA adapters: `y[t] = x[t] W + b + s (x[t] A^T) B^T`.

    Example::

        layer = LoRADense(512, 512, slots=4, buckets=(16,), rngs=nnx.Rngs(0))
        y = layer(x)             # as nnx.Linear
        y = layer(x, adapters)   # row b with the adapter that `adapters` gives it

    Attribute names and state paths of kernel and bias are those of `nnx.Linear`.

    Args:
      in_features, out_features: as in `nnx.Linear`.
      slots: adapters per bucket, an int or `{bucket: n}`.
      buckets: ranks that the stacks are allocated with; `pallas_kernels.rank_bucket`.
      slices: widths of the projections packed side by side in the output (QKV, gate/up), each
        with adapters of its own; None for one.
      lora_dtype: dtype of the stacks; None for `param_dtype`.
      rngs, **linear: as in `nnx.Linear`.

    Raises:
      ValueError: `slices` do not sum to `out_features`; `buckets` or `slots` that can't be.
    """

    @removed_keywords(flat=FLAT_IS_GONE)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        slots: Slots = 8,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        slices: Sequence[int] | None = None,
        lora_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
        **linear: Any,
    ) -> None:
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **linear)
        self.add_stacks(slots, buckets, slices, lora_dtype or self.kernel.dtype)

    def matrix_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def resize(self) -> None:
        self.in_features, self.out_features = self.kernel.shape

    def by_full(self, weights: FullWeights, x: Array) -> Array:
        bias = None if weights.bias is None else weights.bias[...]
        arrays = x, weights.weight[...], bias
        x, weight, bias = self.promote_dtype(arrays, dtype=self.dtype)
        y = jnp.matmul(x, weight.T, precision=self.precision)
        return y if bias is None else y + bias


class LoRADenseGeneral(LoRALayer, nnx.LinearGeneral):  # type: ignore[misc]
    """`nnx.LinearGeneral` with stacks of LoRA adapters over its flattened features.

    Made by `apply_lora`. PEFT's A is `[r, prod(in_features)]`, its B `[prod(out_features), r]`.
    """

    def matrix_shape(self) -> tuple[int, int]:
        if self.batch_axis:
            raise ValueError(f"LoRA does not cover batch_axis, got {dict(self.batch_axis)}")
        return math.prod(self.in_features), math.prod(self.out_features)

    def labels(self, x_ndim: int) -> Labels:
        summed = [f"h{n}" for n in range(len(self.in_features))]
        kept = tuple(f"n{n}" for n in range(len(self.out_features)))
        of_axis = dict(zip((axis % x_ndim for axis in self.axis), summed))
        x = tuple(of_axis.get(axis, axis) for axis in range(x_ndim))
        lead = tuple(axis for axis in range(x_ndim) if axis not in of_axis)
        return Labels(x, (*summed, *kept), (*lead, *kept))

    def resize(self) -> None:
        count = len(self.in_features)
        self.in_features, self.out_features = self.kernel.shape[:count], self.kernel.shape[count:]

    def x_matrix(self, x: Array) -> Array:
        axes = tuple(sorted(axis % x.ndim for axis in self.axis))  # as LinearGeneral does
        lead = tuple(axis for axis in range(x.ndim) if axis not in axes)
        return x.transpose(*lead, *axes).reshape(*(x.shape[axis] for axis in lead), -1)

    def y_matrix(self, y: Array) -> Array:
        return y.reshape(*y.shape[: y.ndim - len(self.out_features)], -1)
