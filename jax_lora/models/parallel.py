"""A Llama's weights over a mesh of devices: tensor parallelism."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_lora.models.config import LlamaConfig
from jax_lora.nn.names import ModulePath
from jax_lora.sharding import AnyMesh, put

AXIS = "tp"
ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
"""Projections whose input features are divided, and whose outputs are then summed."""
COLUMN_PARALLEL = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"})
"""Projections whose output features are divided."""


def placing(config: LlamaConfig) -> Callable[[ModulePath, Array | np.ndarray], Array | np.ndarray]:
    """Puts a weight, by its path, where it belongs on the mesh of `jax.set_mesh`.

    Heads and the MLP are divided over the mesh's axis `tp`, and the output layer if that divides.
    Other weights are on all devices. Where no mesh with that axis is set, weights stay.

    Raises:
      ValueError: heads or the MLP do not divide over the axis, projections are packed in one, or
        the model has experts.
    """
    mesh = jax.sharding.get_mesh()
    if AXIS not in mesh.axis_names:
        return lambda path, value: value
    devices = mesh.shape[AXIS]
    if config.packed_projections and devices > 1:
        raise ValueError(
            f"{AXIS}={devices} does not divide a model that packs query, key and value in one "
            "projection; split qkv_proj and gate_up_proj, or use one device"
        )
    if config.num_experts and devices > 1:
        raise ValueError(
            f"{AXIS}={devices} does not divide a mixture of experts; use one device for a model of "
            f"{config.num_experts} experts"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % devices:
            raise ValueError(f"{name}={getattr(config, name)} does not divide over tp={devices}")

    def place(path: ModulePath, value: Array | np.ndarray) -> Array:
        layer, kind = (*path[-2:],) if len(path) > 1 else ("", path[-1])
        spec: tuple[str | None, ...] = ()
        if layer in COLUMN_PARALLEL and value.shape[-1] % devices == 0:
            spec = (AXIS,)
        elif layer in ROW_PARALLEL and kind == "kernel":
            spec = (AXIS, None)
        ends = PartitionSpec(*[None] * (value.ndim - len(spec)), *spec)
        return put(value, NamedSharding(mesh, ends))

    return place


def placements(mesh: AnyMesh | None) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Where blocks of keys and values go, by heads as XLA divides them, and what all devices have.

    A step gives its arrays so. They begin so too, else its second call would compile again.
    """
    if mesh is None:
        return None, None
    heads = PartitionSpec(None, AXIS) if AXIS in mesh.axis_names else PartitionSpec()
    return NamedSharding(mesh, heads), NamedSharding(mesh, PartitionSpec())


def bytes_per_device(
    name: str, features: tuple[int, int], rank: int, itemsize: int, devices: int, *, fully: bool
) -> float:
    """What a device holds of one slot of a projection's stacks: A and B.

    Args:
      name: of the projection, its last part.
      features: H and N. rank: of the bucket.
    """
    inputs, outputs = features
    by_rank = devices if fully else 1
    if name in ROW_PARALLEL:
        held = inputs / devices + outputs / by_rank
    elif name in COLUMN_PARALLEL:
        held = inputs / by_rank + outputs / devices
    else:
        held = inputs + outputs
    return itemsize * rank * held
