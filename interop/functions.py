"""The ops as JAX functions of whole tensors: what DLPack calls and the native path launches.

Each takes the tensor that it changes first and returns its new value. Integers arrive as int32
`[n]`, or `[n, 2]`: the words of int64, which JAX lacks by default.

The native path runs those whose lowering for CUDA consists of Pallas kernels alone. What stands in
its way is here (`_accumulate`, `_ids` of int64) and in `pallas_kernels.mosaic_gpu` (routes, casts);
`native.compile` names it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pallas_kernels as kernels


def _ids(words: Array) -> Array:
    """int32 ids; those of int64 that do not fit become -1."""
    if words.ndim == 1:
        return words
    low, high = words[:, 0], words[:, 1]
    return jnp.where(high == low >> 31, low, jnp.int32(-1))


def _accumulate(output: Array, v: Array, ids: Array) -> Array:
    """output + v, rounded once; other rows keep every byte."""
    total = (output.astype(jnp.float32) + v).astype(output.dtype)
    return jnp.where((ids >= 0)[:, None], total, output)


def _in_range(ids: Array, num_adapters: int) -> Array:
    return jnp.where((ids >= 0) & (ids < num_adapters), ids, jnp.int32(-1))


def _segments(weights: Array, num_tokens: int, starts: Array, lengths: Array, ids: Array) -> Any:
    ids, starts, lengths = _ids(ids), _ids(starts), _ids(lengths)
    return kernels.segments_from_lengths(starts, lengths, ids, num_tokens, weights.shape[0])


def bgmv_shrink(output: Array, x: Array, lora_a: Array, ids: Array, scale: Array) -> Array:
    ids = _in_range(_ids(ids), lora_a.shape[0])
    return _accumulate(output, kernels.bgmv_shrink(x, lora_a, ids, scale=scale), ids)


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
    v = kernels.sgmv_shrink(x, lora_a, segments, scale=scale)
    return _accumulate(output, v, segments.indices)


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
    part = kernels.LoRAPart(lora_a, lora_b, _ids(ids), scales, offset)
    return kernels.add_lora_multi(y, x, [part], phase=phase)


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
