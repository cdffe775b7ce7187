"""The ops as JAX functions of whole tensors: what DLPack calls and the native path launches.

Each takes the tensor that it changes first and returns its new value. Integers arrive as int32
`[n]`, or `[n, 2]`: the words of int64, which JAX lacks by default.

The native path runs those whose lowering for CUDA is Pallas kernels alone. That is so where the
decode kernel takes a case of the bgmv ops or of `add_lora`: it finds each adapter's tokens itself.
Segments, more tokens and other dtypes need XLA's operations too; `native.plan` names them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pallas_kernels as kernels
from pallas_kernels.ops import add_by_kernels, add_shrink
from pallas_kernels.routing import WideIndices
from pallas_kernels.xla import add_rows


def _ids(words: Array) -> Any:
    return words if words.ndim == 1 else WideIndices(words)


def _narrow(words: Array) -> Array:
    return words if words.ndim == 1 else WideIndices(words).narrow()


def _clamped(words: Array) -> Array:
    return words if words.ndim == 1 else WideIndices(words).nearest()


def _segments(
    weights: Array, num_tokens: int, starts: Array, lengths: Array, ids: Array
) -> kernels.Segments:
    starts, lengths = map(_clamped, (starts, lengths))
    return kernels.segments_from_lengths(
        starts, lengths, _narrow(ids), num_tokens, weights.shape[0]
    )


def bgmv_shrink(output: Array, x: Array, lora_a: Array, ids: Array, scale: Array) -> Array:
    return add_shrink(output, x, lora_a, _ids(ids), scale=scale)


def bgmv_expand(
    output: Array, v: Array, lora_b: Array, ids: Array, *, offset: int, add_inputs: bool
) -> Array:
    width = lora_b.shape[-2]
    return kernels.bgmv_expand_slice(
        v, lora_b, _ids(ids), output, offset, width, add_inputs=add_inputs
    )


def sgmv_shrink(
    output: Array, x: Array, lora_a: Array, starts: Array, lengths: Array, ids: Array, scale: Array
) -> Array:
    segments = _segments(lora_a, x.shape[0], starts, lengths, ids)
    return add_rows(output, kernels.sgmv_shrink(x, lora_a, segments, scale=scale), segments)


def sgmv_expand(
    output: Array, v: Array, lora_b: Array, starts: Array, lengths: Array, ids: Array,
    *, offset: int, add_inputs: bool,
) -> Array:  # fmt: skip
    segments = _segments(lora_b, v.shape[0], starts, lengths, ids)
    width = lora_b.shape[-2]
    return kernels.sgmv_expand_slice(
        v, lora_b, segments, output, offset, width, add_inputs=add_inputs
    )


def add_lora(
    y: Array, x: Array, lora_a: Array, lora_b: Array, ids: Array, scales: Array,
    *, offset: int, phase: str,
) -> Array:  # fmt: skip
    part = kernels.LoRAPart(lora_a, lora_b, scales, y_offset=offset)
    return add_by_kernels(y, x, [part], _ids(ids), phase=phase)


def add_lora_slices(y: Array, x: Array, *others: Array, offsets: tuple[int, ...]) -> Array:
    """The others are A of each slice, B of each, ids and the scale of all."""
    *stacks, ids, scale = others
    slices = zip(stacks[: len(offsets)], stacks[len(offsets) :], offsets)
    parts = [kernels.LoRAPart(a, b, scale, y_offset=offset) for a, b, offset in slices]
    return add_by_kernels(y, x, parts, _ids(ids))


def add_lora_backward(
    dx: Array, da: Array, db: Array, dscales: Array, dy: Array,
    x: Array, lora_a: Array, lora_b: Array, ids: Array, scales: Array,
    *, offset: int, phase: str,
) -> tuple[Array, ...]:  # fmt: skip
    """Gradients of `add_lora`; the first four are only the memory that they go to."""

    def forward(x: Array, lora_a: Array, lora_b: Array, scales: Array) -> Array:
        return add_lora(
            jnp.zeros_like(dy), x, lora_a, lora_b, ids, scales, offset=offset, phase=phase
        )

    _, pullback = jax.vjp(forward, x, lora_a, lora_b, scales)
    return tuple(pullback(dy))


@functools.cache
def bound(function: Callable[..., Any], **static: Any) -> Callable[..., tuple[Array, ...]]:
    """`function` with its static arguments, returning a tuple."""

    @functools.wraps(function)
    def call(*arrays: Array) -> tuple[Array, ...]:
        result = function(*arrays, **static)
        return result if isinstance(result, tuple) else (result,)

    return call


@functools.cache
def jitted(call: Callable[..., Any], outputs: int) -> Callable[..., tuple[Array, ...]]:
    """`call` compiled, its first `outputs` arguments donated, used or not."""
    return jax.jit(call, donate_argnums=tuple(range(outputs)), keep_unused=True)
