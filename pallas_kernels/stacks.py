"""A LoRA among several that one call adds: a rank bucket of one output slice."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from pallas_kernels.renamed import removed_keywords


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lora_a", "lora_b", "scales"),
    meta_fields=("first_slot", "y_offset", "scales_offset"),
)
@dataclasses.dataclass(frozen=True)
class LoRAPart:
    """Adds `scales * (x @ A^T) @ B^T` to columns `[y_offset, y_offset + N)` of y.

    Ids count through all slots of a model. The part holds slots `[first_slot, first_slot + L)`:
    token t uses its adapter `indices[t] - first_slot` where that lies in `[0, L)`, else nothing.

    Attributes:
      lora_a: `[L, R, H]` (or `[L, 1, R, H]`), down-projections.
      lora_b: `[L, N, R]` (or `[L, 1, N, R]`), up-projections.
      scales: a number, `[L]`, or None for 1.
      first_slot: the id of the part's first adapter (static).
      y_offset: the first column of y that the part adds to (static).
      scales_offset: where the part's L scales start in `scales` `[S]`, which then holds those of
        several parts (static). A slice for each part would cost a launch.
    """

    lora_a: ArrayLike
    lora_b: ArrayLike
    scales: ArrayLike | None = None
    first_slot: int = 0
    y_offset: int = 0
    scales_offset: int | None = None


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
