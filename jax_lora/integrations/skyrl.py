"""SkyRL-tx's LoRA over these kernels."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, DTypeLike, Float, Int

from jax_lora.sharding import annotated
from pallas_kernels import LoRAPart, lora_delta


class LoRALinear(Protocol):
    """What is read of SkyRL-tx's layer of this name, and of `FusedLoRALinear`."""

    lora_A: nnx.Variable[Float[Array, "L H R"]] | None
    lora_B: nnx.Variable[Float[Array, "L R N"]] | None
    lora_scaling: nnx.Variable[Float[Array, " L"]] | None


def apply_lora(
    self: LoRALinear, x: Array, base_output: Array, adapter_indices: Array | None
) -> Array:
    """base_output[b] + lora_scaling[i] * x[b] @ lora_A[i] @ lora_B[i], i = adapter_indices[b].

    The body of SkyRL-tx's `LoRAMixin.apply_lora`, as one call that sorts nothing by hand and reads
    the stacks as they lie. Projections that are fused, and share one A, are one B side by side.

    On a mesh each device adds to its own rows and columns: stacks are divided as their metadata
    say, over `fsdp`, `ep` and `tp` or any other axes. Rows are divided over `fsdp`, as SkyRL-tx has
    them, where they divide; weights that are divided over it too are then gathered.

    Example::

        lora.LoRALinear.apply_lora = apply_lora  # skyrl.tx.layers.lora

    Args:
      self: a layer.
      x: `[B, ..., H]`.
      base_output: `[B, ..., N]`.
      adapter_indices: `[B]`; -1 for rows without an adapter. None, as a layer without stacks, for
        `base_output` itself.

    Returns:
      `[B, ..., N]` in base_output's dtype. What the adapters add is a float32 sum, rounded to that
      dtype before it is added, as SkyRL-tx has it.

    Source: skyrl/tx/layers/lora.py.
    """
    if adapter_indices is None or self.lora_A is None or self.lora_B is None:
        return base_output
    scaling = None if self.lora_scaling is None else self.lora_scaling[...]
    operands = x, self.lora_A[...], self.lora_B[...], scaling, adapter_indices
    mesh, dtype = jax.sharding.get_abstract_mesh(), base_output.dtype
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return base_output + _delta(*operands, dtype=dtype)
    rows = "fsdp" if x.shape[0] % mesh.shape.get("fsdp", x.shape[0] + 1) == 0 else None
    summed, kept = (
        None if axis == rows else axis for axis in (_axis(self.lora_A, -2), _axis(self.lora_B, -1))
    )

    def local(*operands: Array) -> Array:
        if summed is None:
            return _delta(*operands, dtype=dtype)
        return jax.lax.psum(_delta(*operands, dtype=jnp.float32), summed).astype(dtype)

    between = [None] * (x.ndim - 2)
    run = jax.shard_map(
        local,
        in_specs=(
            P(rows, *between, summed),
            P(None, summed, None),
            P(None, None, kept),
            P(),
            P(rows),
        ),
        out_specs=P(rows, *between, kept),
    )
    return base_output + jax.jit(run)(*operands)


def _delta(
    x: Float[Array, "B *S H"],
    lora_a: Float[Array, "L H R"],
    lora_b: Float[Array, "L R N"],
    scaling: Float[Array, " L"] | None,
    indices: Int[Array, " B"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "B *S N"]:
    """What the adapters add. Its gradients are kernels where dtype is that of the stacks."""
    matrix = x.reshape(-1, x.shape[-1])
    ids = jnp.repeat(indices, len(matrix) // len(indices), total_repeat_length=len(matrix))
    part = LoRAPart(lora_a, lora_b, scaling, transposed=True)
    delta = lora_delta(matrix, [part], ids, part.width, dtype=dtype)
    return delta.reshape(*x.shape[:-1], part.width)


def _axis(stacks: nnx.Variable[Array], axis: int) -> str | tuple[str, ...] | None:
    """What divides an axis of the stacks; their metadata may also have axes of layers in front."""
    spec = annotated(stacks)
    return spec[axis] if len(spec) >= -axis else None
