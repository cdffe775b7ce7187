"""Types of arrays inside of a `jax.shard_map`: over which axes of a mesh their values vary."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def _varies(operands: object) -> set[str]:
    """The axes of a mesh over which they vary, inside of a `jax.shard_map` that checks."""
    leaves = jax.tree.leaves(operands)
    return {axis for leaf in leaves for axis in jax.typeof(leaf).manual_axis_type.varying}


def varying[T](results: T, operands: object) -> T:
    """`results`, which vary as the operands do: JAX does not see that of what a kernel makes."""
    axes = _varies(operands)
    return jax.tree.map(
        lambda t: jax.lax.pcast(t, tuple(sorted(axes - _varies(t))), to="varying"), results
    )


_untyped_p = Primitive("lora_untyped")
_untyped_p.def_abstract_eval(lambda x: x.update(manual_axis_type=jax.sharding.ManualAxisType()))
_untyped_p.def_impl(lambda x: jax.jit(_untyped_p.bind)(x))
batching.primitive_batchers[_untyped_p] = lambda args, axes: (_untyped_p.bind(*args), axes[0])
mlir.register_lowering(_untyped_p, lambda _, x: [x])


def untyped(x: Array) -> Array:
    """x, as if it were the same on all devices.

    A kernel changes arrays in place through references, and JAX has none to what varies over a
    mesh. What the kernel leaves in them gets its type back by `varying`.
    """
    return _untyped_p.bind(x) if _varies(x) else x
