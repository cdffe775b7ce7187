"""Whole weights of a layer's own for a few adapters: what PEFT calls `modules_to_save`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike

from jax_lora.nn.stacks import LoRAScale


class FullTable(LoRAScale):
    """Which of a layer's full slots each adapter has, -1 for none: `[S]` int32, by its id."""


class FullWeights(nnx.Module):
    """One full slot of a layer: another weight, in its place.

    Attributes:
      weight: as PEFT stores it, `[N, H]`; of an embedding, `[vocabulary, features]`.
      bias: `[N]`, if the layer has one.
    """

    # A variable for each slot: a load replaces it whole, and a step reads it where it stands.

    def __init__(self, shape: tuple[int, int], has_bias: bool, dtype: DTypeLike) -> None:
        self.weight: nnx.LoRAParam[Array] = nnx.LoRAParam(jnp.zeros(shape, dtype))
        zeros = jnp.zeros(shape[:1], dtype)
        self.bias: nnx.LoRAParam[Array] | None = nnx.LoRAParam(zeros) if has_bias else None

    @property
    def nbytes(self) -> int:
        return sum(variable.get_value().nbytes for variable in self.variables)

    @property
    def variables(self) -> list[nnx.LoRAParam[Array]]:
        return [v for v in (self.weight, self.bias) if v is not None]


class FullRoom(nnx.Module):
    """The full slots of a layer, and its table."""

    def __init__(
        self, count: int, shape: tuple[int, int], has_bias: bool, dtype: DTypeLike, ids: int
    ) -> None:
        self.slots = nnx.List([FullWeights(shape, has_bias, dtype) for _ in range(count)])
        self.table = FullTable(jnp.full(ids, -1, jnp.int32))

    def slot_of(self, ids: Array) -> Array:
        """The full slot of each id, -1 for none."""
        return jnp.where(ids >= 0, self.table[...][jnp.maximum(ids, 0)], -1)
