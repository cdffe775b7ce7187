"""LoRA over `nnx.Einsum`, and over modules of a user's own that are one."""

import functools
import inspect
import math
import operator
import types
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import Array

from jax_lora.nn.layer import LoRALayer
from jax_lora.sharding import Label, Labels


def einsum_labels(einsum_str: str | None) -> tuple[str, str, str, str, str]:
    """Labels of kernel and output; of the tokens, of H and of N."""
    operands, _, out = (einsum_str or "").partition("->")
    lhs, _, kernel = operands.partition(",")
    summed = "".join(c for c in kernel if c in lhs and c not in out)
    kept = "".join(c for c in kernel if c in out and c not in lhs)
    lead = "".join(c for c in lhs if c not in summed)
    is_product = sorted(summed + kept) == sorted(kernel) and sorted(lead + kept) == sorted(out)
    labels = lhs.replace("...", "")
    if not (is_product and kept) or any(len({*s}) < len(s) for s in (labels, kernel)):
        raise ValueError(
            f"LoRA covers einsums that are a product with a matrix, not {einsum_str!r}"
        )
    return kernel, out, lead, summed, kept


def x_as_matrix(einsum_str: str | None, x: Array) -> Array:
    """The einsum's left operand as `[..., H]`, with the tokens in front."""
    lhs, (_, _, lead, summed, _) = (einsum_str or "").partition(",")[0], einsum_labels(einsum_str)
    x = jnp.einsum(f"{lhs}->{lead}{summed}", x)
    return x.reshape(*x.shape[: x.ndim - len(summed)], -1)


def y_from_matrix(einsum_str: str | None, y: Array, size: Mapping[str, int]) -> Array:
    """`[..., N]` as the einsum's result; `size`: of its labels."""
    _, out, lead, _, kept = einsum_labels(einsum_str)
    y = y.reshape(*y.shape[:-1], *(size[label] for label in kept))
    return jnp.einsum(f"{lead}{kept}->{out}", y)


class EinsumLayer(LoRALayer):
    """A layer that is the einsum `einsum_str` of x and its kernel: a matrix product in disguise.

    Each axis of the kernel is either summed with the input (together they are H, in the kernel's
    order) or appears in the output (together N).
    """

    einsum_str: str | None

    def sizes(self) -> dict[str, int]:
        """The sizes of the kernel's axes by their labels, in one layer."""
        raise NotImplementedError

    def matrix_shape(self) -> tuple[int, int]:
        (_, _, _, summed, kept), size = einsum_labels(self.einsum_str), self.sizes()
        return math.prod(size[c] for c in summed), math.prod(size[c] for c in kept)

    def labels(self, x_ndim: int) -> Labels:
        operands, _, out = (self.einsum_str or "").partition("->")
        lhs, _, kernel = operands.partition(",")
        dots = tuple(range(x_ndim - len(lhs.replace("...", ""))))

        def each(labels: str) -> tuple[Label, ...]:
            before, found, behind = labels.partition("...")
            return (*before, *(dots if found else ()), *behind)

        return Labels(each(lhs), each(kernel), each(out))

    def x_matrix(self, x: Array) -> Array:
        return x_as_matrix(self.einsum_str, x)

    def y_matrix(self, y: Array) -> Array:
        _, out, lead, _, kept = einsum_labels(self.einsum_str)
        y = jnp.einsum(f"{out}->{lead}{kept}", y)
        return y.reshape(*y.shape[: y.ndim - len(kept)], -1)

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        return y_from_matrix(self.einsum_str, y_matrix, self.sizes())

    def kernel_matrix(self, index: tuple[int | Array, ...] = ()) -> Array:
        kernel, _, _, summed, kept = einsum_labels(self.einsum_str)
        matrix = jnp.einsum(f"{kernel}->{summed}{kept}", self.kernel[index])
        return matrix.reshape(self.matrix_shape())

    def kernel_tensor(self, matrix: Array) -> Array:
        kernel, _, _, summed, kept = einsum_labels(self.einsum_str)
        size = self.sizes()
        tensor = matrix.reshape([size[c] for c in summed + kept])
        return jnp.einsum(f"{summed}{kept}->{kernel}", tensor)


class LoRAEinsum(EinsumLayer, nnx.Einsum):  # type: ignore[misc]
    """`nnx.Einsum` with stacks of LoRA adapters. Made by `apply_lora`."""

    def sizes(self) -> dict[str, int]:
        return dict(zip(einsum_labels(self.einsum_str)[0], self.kernel_shape))

    def resize(self) -> None:
        self.kernel_shape = self.kernel.shape


class _OwnEinsum(EinsumLayer):
    """What a user's module that is an einsum becomes; its own class comes behind."""

    bias = None
    promote_dtype = staticmethod(dtypes.promote_dtype)

    def sizes(self) -> dict[str, int]:
        kernel = einsum_labels(self.einsum_str)[0]
        return dict(zip(kernel, self.kernel.shape[-len(kernel) :]))

    def resize(self) -> None:
        """Nothing: it takes its sizes from the kernel."""

    def _base(self, x: Array, out_sharding: object = None) -> Array:
        call = super(LoRALayer, self).__call__
        if "out_sharding" in inspect.signature(call).parameters:
            return cast(Array, call(x, out_sharding=out_sharding))
        y: Array = call(x)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


@functools.cache
def _own_class(kind: type[nnx.Module], kernel_name: str) -> type[EinsumLayer]:
    def fill(names: dict[str, object]) -> None:
        names |= {"kernel_name": kernel_name, "__doc__": f"`{kind.__name__}` with LoRA adapters."}
        if kernel_name != "kernel":
            names["kernel"] = property(operator.attrgetter(kernel_name))

    made: type[EinsumLayer] = types.new_class(f"LoRA{kind.__name__}", (_OwnEinsum, kind), {}, fill)
    return made


def own_einsum(module: nnx.Module) -> type[EinsumLayer] | None:
    """The class with LoRA of a user's module that is an einsum; None for all others.

    It is one whose attribute `einsum_str` says what its call returns of x and of its only
    parameter, a matrix, as `nnx.Einsum` has it. Beside that it may have a `bias`.
    """
    einsum = getattr(module, "einsum_str", None)
    params = [
        name
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param) and name != "bias"
    ]
    if isinstance(module, LoRALayer | nnx.Einsum) or not isinstance(einsum, str):
        return None
    if len(params) != 1:
        return None
    try:
        kernel = einsum_labels(einsum)[0]
    except ValueError:
        return None
    fits = len(jnp.shape(vars(module)[params[0]].get_value())) >= len(kernel)
    return _own_class(type(module), params[0]) if fits else None
