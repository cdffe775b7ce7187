"""DoRA: an adapter that also says how long the rows of the whole weight are.

`y = c * (x @ W.T + scale * (x @ A.T) @ B.T) + bias`, where c, of each column of y, is the adapter's
magnitude over the norm of that row of `W + scale * B @ A`. It is computed when an adapter is loaded
(`jax_lora.bank.dora`); stacks hold `c - 1`, so that zeros are for adapters without DoRA.
"""

from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_lora.nn.stacks import LoRAStack
from pallas_kernels import LoRAPart, Mix, Segments
from pallas_kernels.routing import SlotRange
from pallas_kernels.xla import take


class Rescaling(Protocol):
    """What this module needs of a LoRA layer."""

    stacks: nnx.List[LoRAStack]
    bias: nnx.Param[Array] | None


def rescaled(
    layer: Rescaling, y: Float[Array, "T N"], parts: Sequence[LoRAPart], segments: Segments | Mix
) -> Float[Array, "T N"]:
    """`y`, to which adapters are added, times their c. Rows without DoRA keep their bits.

    An adapter with DoRA has its rows alone, so that of a mix the first adapter says c.
    """
    rescales = [stack.rescale[...] for stack in layer.stacks if stack.rescale is not None]
    if not rescales:
        return y
    first = segments.columns[0] if isinstance(segments, Mix) else segments
    assert isinstance(first, Segments)  # a batch sorts its tokens
    change: Array | float = 0.0
    for rescale, part in zip(rescales, parts, strict=True):
        slots = SlotRange(part.first_slot, part.slots)
        local = jnp.where(slots.holds(first.indices), first.indices - slots.first, slots.slots)
        own = take(rescale[:, 0], local)
        behind = y.shape[1] - part.y_offset - own.shape[1]
        change += jnp.pad(own, ((0, 0), (part.y_offset, behind)))
    bias = 0.0 if layer.bias is None else layer.bias[...].reshape(1, -1).astype(jnp.float32)
    wide = y.astype(jnp.float32)
    return jnp.where(change == 0, y, (wide + change * (wide - bias)).astype(y.dtype))


def refuse_divided(layer: Rescaling) -> None:
    """ValueError if the layer, whose kernel is divided over a mesh, has room for DoRA."""
    if any(stack.rescale is not None for stack in layer.stacks):
        raise ValueError(
            "DoRA needs whole kernels, but this layer's is divided over the mesh; give apply_lora "
            "no dora=True, or keep the kernels of these layers whole"
        )
