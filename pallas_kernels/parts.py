"""One LoRA among several that one call adds: a rank bucket of one output slice."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("first", "shape")
)
@dataclasses.dataclass(frozen=True)
class StackView:
    """A stack that lies in a flat array, among others: elements `[first, first + prod(shape))`.

    The kernel of a decode reads it there. Elsewhere it is cut out, which may copy it.

    Attributes:
      array: `[S]`.
      first: where the stack starts (static).
      shape: `(L, R, H)` or `(L, N, R)` (static).
    """

    array: Any
    first: int
    shape: tuple[int, int, int]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def cut_out(self) -> Array:
        """The stack as an array of its own."""
        stop = self.first + self.size
        return jax.lax.slice_in_dim(self.array, self.first, stop).reshape(self.shape)

    def put(self, stack: Array) -> "StackView":
        """A view like this of zeros that hold `stack` here."""
        stop = self.first + self.size
        flat = jnp.zeros_like(self.array).at[self.first : stop].set(stack.reshape(-1))
        return dataclasses.replace(self, array=flat)


class LoRAPart(NamedTuple):
    """Adds `scales * (x @ A^T) @ B^T` to columns `[y_offset, y_offset + N)` of `y`.

    Attributes:
      lora_a: `[L, R, H]` (or `[L, 1, R, H]`), down-projections; or a `StackView` of them.
      lora_b: `[L, N, R]` (or `[L, 1, N, R]`), up-projections; or a `StackView` of them.
      indices: `[T]` integers, the adapter of each token, -1 for none; or the `Segments` of them.
      scales: a scalar, `[L]`, or None for 1.
      y_offset: first column of `y` that the part adds to (static).
      scales_offset: where the part's L scales start in `scales` `[S]`, which then may hold those of
        many parts (static).
    """

    lora_a: Any
    lora_b: Any
    indices: Any
    scales: Any = None
    y_offset: int = 0
    scales_offset: int | None = None

    def cut_out(self) -> "LoRAPart":
        """The part with stacks that are arrays of their own."""
        return self._replace(lora_a=whole(self.lora_a), lora_b=whole(self.lora_b))


def whole(stack: Any) -> Array:
    """A stack as an array of its own."""
    array: Array = stack.cut_out() if isinstance(stack, StackView) else stack
    return array


def side_by_side(ys: tuple[Array, ...]) -> Array:
    """The columns of all ys in one array."""
    return jnp.concatenate(ys, axis=1) if len(ys) > 1 else ys[0]


def apart(y: Array, ys: tuple[Array, ...]) -> tuple[Array, ...]:
    """`y` cut into arrays as wide as the ys."""
    edges = list(itertools.accumulate(one.shape[1] for one in ys))
    return tuple(jnp.split(y, edges[:-1], axis=1))
