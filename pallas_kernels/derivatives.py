"""What the ops' gradients can't do, said by the op's name: forward mode and second derivatives.

An op has reverse-mode gradients (`jax.custom_vjp`). Without these guards JAX's errors for the other
modes name neither the op nor what to do.
"""

from collections.abc import Callable, Iterable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike
from jaxtyping import Array

from pallas_kernels.stacks import LoRAPart


def _identity(name: str) -> Primitive:
    """A primitive that returns its operand, and lowers to nothing."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, *, op: x)
    primitive.def_abstract_eval(lambda x, *, op: x)
    mlir.register_lowering(primitive, lambda _, x, *, op: [x])
    batching.primitive_batchers[primitive] = lambda args, axes, *, op: (
        primitive.bind(*args, op=op),
        axes[0],
    )
    return primitive


def _refuse_forward(*_: object, op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op} has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize); use reverse "
        "mode: jax.grad, jax.vjp or jax.jacrev"
    )


def _refuse_second(*_: object, op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op} has first derivatives alone, but its gradient is differentiated again (jax.hessian, "
        "or jax.grad of a jax.grad); stop it with jax.lax.stop_gradient"
    )


# An operand. Its tangent is one of the primitive below, which reverse mode transposes and forward
# mode computes. What is differentiated gets the operand itself, for a gradient to keep: a scan then
# sees that its turn keeps the very slices that it was given, and stores none of them.
_operand_p = _identity("lora_operand")
_tangent_p = Primitive("lora_tangent")
_tangent_p.def_impl(_refuse_forward)
_tangent_p.def_abstract_eval(lambda x, *, op: x)
mlir.register_lowering(_tangent_p, _refuse_forward)
batching.primitive_batchers[_tangent_p] = _refuse_forward  # reverse mode batches no tangents
ad.deflinear2(_tangent_p, lambda cotangent, x, *, op: [cotangent])
ad.primitive_jvps[_operand_p] = lambda primals, tangents, *, op: (
    primals[0],
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent_p.bind(tangents[0], op=op),
)

_gradient_p = _identity("lora_gradient")
ad.primitive_jvps[_gradient_p] = lambda primals, tangents, *, op: _refuse_second(op=op)


def refuse_eight_bits(op: str, parts: Iterable[LoRAPart]) -> None:
    """NotImplementedError if a part, of which gradients are asked for, is in 8 bits."""
    for n, part in enumerate(parts):
        if part.is_eight_bits:
            raise NotImplementedError(
                f"{op} has no gradients with stacks of {part.dtype}, as parts[{n}] has; train in "
                "stacks of bfloat16 or float32 (apply_lora's dtype=), then load the adapter here"
            )


def _on_floats[T](bind: Callable[[Array], Array], tree: T) -> T:
    def one(leaf: ArrayLike) -> ArrayLike:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return bind(jnp.asarray(leaf)) if is_float else leaf

    return jax.tree.map(one, tree)


def operands[T](op: str, tree: T) -> T:
    """`tree`, whose forward-mode tangents are an error that names `op`."""
    return _on_floats(lambda x: _operand_p.bind(x, op=op), tree)


def cotangents[T](op: str, tree: T) -> T:
    """`tree`, which a gradient of `op` reads: its derivative is an error that names `op`."""
    return _on_floats(lambda x: _gradient_p.bind(x, op=op), tree)
