"""One LoRA among several that one call adds: a rank bucket of one output slice."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class LoRAPart(NamedTuple):
    """Adds `scales * (x @ A^T) @ B^T` to columns `[y_offset, y_offset + N)` of `y`.

    Attributes:
      lora_a: `[L, R, H]` (or `[L, 1, R, H]`), down-projections.
      lora_b: `[L, N, R]` (or `[L, 1, N, R]`), up-projections.
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


def side_by_side(ys: tuple[Array, ...]) -> Array:
    """The columns of all ys in one array."""
    return jnp.concatenate(ys, axis=1) if len(ys) > 1 else ys[0]


def apart(y: Array, ys: tuple[Array, ...]) -> tuple[Array, ...]:
    """`y` cut into arrays as wide as the ys."""
    edges = list(itertools.accumulate(one.shape[1] for one in ys))
    return tuple(jnp.split(y, edges[:-1], axis=1))
