"""LoRA over `nnx.Einsum`."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
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


class LoRAEinsum(LoRALayer, nnx.Einsum):  # type: ignore[misc]
    """`nnx.Einsum` with stacks of LoRA adapters, where it is a matrix product in disguise.

    Each axis of the kernel is either summed with the input (together they are H, in the kernel's
    order) or appears in the output (together N). Made by `apply_lora`.
    """

    def matrix_shape(self) -> tuple[int, int]:
        kernel, _, _, summed, kept = einsum_labels(self.einsum_str)
        size = dict(zip(kernel, self.kernel_shape))
        return math.prod(size[c] for c in summed), math.prod(size[c] for c in kept)

    def labels(self, x_ndim: int) -> Labels:
        operands, _, out = (self.einsum_str or "").partition("->")
        lhs, _, kernel = operands.partition(",")
        dots = tuple(range(x_ndim - len(lhs.replace("...", ""))))

        def each(labels: str) -> tuple[Label, ...]:
            before, found, behind = labels.partition("...")
            return (*before, *(dots if found else ()), *behind)

        return Labels(each(lhs), each(kernel), each(out))

    def resize(self) -> None:
        self.kernel_shape = self.kernel.shape

    def x_matrix(self, x: Array) -> Array:
        return x_as_matrix(self.einsum_str, x)

    def y_matrix(self, y: Array) -> Array:
        _, out, lead, _, kept = einsum_labels(self.einsum_str)
        y = jnp.einsum(f"{out}->{lead}{kept}", y)
        return y.reshape(*y.shape[: y.ndim - len(kept)], -1)

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        kernel = einsum_labels(self.einsum_str)[0]
        return y_from_matrix(self.einsum_str, y_matrix, dict(zip(kernel, self.kernel_shape)))

    def kernel_matrix(self, index: tuple[int | Array, ...] = ()) -> Array:
        kernel, _, _, summed, kept = einsum_labels(self.einsum_str)
        matrix = jnp.einsum(f"{kernel}->{summed}{kept}", self.kernel[index])
        return matrix.reshape(self.matrix_shape())

    def kernel_tensor(self, matrix: Array) -> Array:
        kernel, _, _, summed, kept = einsum_labels(self.einsum_str)
        size = dict(zip(kernel, self.kernel_shape))
        tensor = matrix.reshape([size[c] for c in summed + kept])
        return jnp.einsum(f"{summed}{kept}->{kernel}", tensor)
