"""Whole weights of a layer's own for a few adapters: what PEFT calls `modules_to_save`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike

from jax_lora.nn.stacks import LoRAScale
from pallas_kernels.routing import Mix, Segments, ids_of


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

    def put_in(
        self, y: Array, segments: Segments | Mix, output: Callable[[FullWeights], Array]
    ) -> Array:
        """y, but the `output` of their own weights in rows whose adapters have some.

        A row with several adapters has none that has whole weights.
        """
        first = segments.columns[0] if isinstance(segments, Mix) else segments
        ids = ids_of(first).reshape(y.shape[:-1])[..., None]
        slot = jnp.where(ids >= 0, self.table[...][jnp.maximum(ids, 0)], -1)
        for n, weights in enumerate(self.slots):

            def replaced(
                y: Array, weights: FullWeights = weights, rows: Array = slot == n
            ) -> Array:
                return jnp.where(rows, output(weights).astype(y.dtype), y)

            # Weights that no row has are not read: they may be those of a whole vocabulary.
            y = jax.lax.cond(jnp.any(slot == n), replaced, lambda y: y, y)
        return y
