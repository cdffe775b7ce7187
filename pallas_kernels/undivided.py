"""Operands of a kernel that XLA would gather on each device of a mesh, and the error of it.

A kernel is one custom call to XLA. In a program of several devices, outside of a `jax.shard_map`,
XLA gathers what the call takes, and each device computes all of it.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, Sharding
from jaxtyping import Array

# What `custom_partitioning` gives its callbacks, and what it takes: the mesh, what each device
# does, and shardings of results and operands.
type Divided = Sequence[jax.ShapeDtypeStruct]
type Partitioned = tuple[Mesh, Callable[[Array], Array], Sharding, tuple[Sharding, ...]]

_MEND = (
    "so each device would gather all of it for the kernel; call it inside of jax.shard_map, on "
    "each device's part, or give implementation='xla', which XLA divides; LoRA layers do so "
    "themselves where they know how their kernel is divided"
)


def _cut(shape: Sequence[int], sharding: Sharding) -> list[int]:
    """The axes that make a gather an error, of those that are divided: each one of a stack; the
    columns of x, v and y. Tokens are whole batches to the kernels, as their segments are."""
    first = 0 if len(shape) > 2 else 1
    shard = sharding.shard_shape(tuple(shape))
    return [axis for axis in range(first, len(shape)) if shard[axis] != shape[axis]]


def _is_operand(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, np.floating)


def _refusal(op: str, shape: Sequence[int], axes: Sequence[int]) -> NotImplementedError:
    return NotImplementedError(
        f"{op} gets an operand {list(shape)} whose axes {list(axes)} are divided over devices, "
        f"{_MEND}"
    )


def check(op: str, operands: Sequence[Array]) -> None:
    """NotImplementedError for operands on a mesh of explicit axes: no type says how the results
    are divided, and JAX lowers a kernel for manual axes alone. And for arrays, if they are no
    tracers, that are divided over automatic axes."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for operand in operands:
        mesh = jax.typeof(operand).sharding.mesh
        kinds = zip(mesh.axis_names, mesh.axis_types)
        explicit = [axis for axis, kind in kinds if kind == AxisType.Explicit]
        if explicit:
            raise NotImplementedError(
                f"{op} gets {jax.typeof(operand)} on a mesh with explicit axes {explicit}; call it "
                "inside of jax.shard_map, on each device's part; LoRA layers do so themselves"
            )
        if manual or isinstance(operand, jax.core.Tracer) or not _is_operand(operand):
            continue
        if axes := _cut(operand.shape, operand.sharding):
            raise _refusal(op, operand.shape, axes)


def in_program[T](op: str, operands: T) -> T:
    """`operands`, and an error where XLA, as it compiles, finds one divided.

    JAX has no shardings of arrays over automatic axes while it traces. In a program of one device
    nothing is added.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return operands
    seen = _seen(op)
    return jax.tree.map(lambda leaf: seen(leaf) if _is_operand(leaf) else leaf, operands)


@functools.cache
def _seen(op: str) -> custom_partitioning:
    seen = custom_partitioning(lambda x: x)

    def partition(mesh: Mesh, arguments: Divided, _: object) -> Partitioned:
        [argument] = arguments
        if axes := _cut(argument.shape, argument.sharding):
            raise _refusal(op, argument.shape, axes)
        return mesh, lambda x: x, argument.sharding, (argument.sharding,)

    def rule(_: Mesh, operands: Divided, __: object) -> str:
        axes = " ".join(f"i{n}" for n in range(len(operands[0].shape)))
        return f"{axes} -> {axes}"

    seen.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return seen
