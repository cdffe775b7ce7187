"""The adapters of a layer whose ranks are divided over a mesh, and not its features alone."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_lora.batch import of_any_batch
from jax_lora.sharding import Shards
from pallas_kernels import LoRAPart, lora_delta
from pallas_kernels.routing import Segments

_LEAST = 64  # columns of x and y that kernels take


@of_any_batch
def add_by_ranks(
    y: Array, x: Array, parts: Sequence[LoRAPart], segments: Segments, phase: str, shards: Shards
) -> Array:
    """`y + lora(x)` inside of the layer's `shard_map`, where each device has some ranks.

    Each device shrinks x by its shard of A. Where N is divided, A's ranks are: the devices gather
    the `v` of all ranks, and each expands it by its rows of B. Where H is divided, B's ranks are:
    each device gets the sum of some ranks, and expands it to part of the sum that the base layer
    takes anyway. The form of S-LoRA and LoRAX: one small exchange, and no array held twice.

    Args:
      y: `[T, N]` and x: `[T, H]`, of this device.
      parts: A `[L, R / devices of N, H]` and B `[L, N, R / devices of H]`, of this device.
    """
    vs = shards.by_ranks(_shrink(x, parts, segments, phase))
    delta = _expand(vs, y, parts, segments, phase)
    return (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)


def _shrink(x: Array, parts: Sequence[LoRAPart], segments: Segments, phase: str) -> list[Array]:
    """`v` `[T, R]` of each part, zero where the token has no adapter of it.

    All by one launch: a LoRA whose B leaves v as it is.
    """
    arrays = [jnp.asarray(part.lora_a) for part in parts]
    ranks = [a.shape[1] for a in arrays]
    widths = [max(rank, _LEAST) for rank in ranks]
    ends = list(itertools.accumulate(widths))
    halves = [
        LoRAPart(a, _like(jnp.eye(width, rank), a), None, part.first_slot, end - width)
        for part, a, rank, width, end in zip(parts, arrays, ranks, widths, ends)
    ]
    out = lora_delta(x, halves, segments, ends[-1], dtype=jnp.float32, phase=phase)
    return [out[:, end - width : end - width + r] for end, width, r in zip(ends, widths, ranks)]


def _expand(
    vs: Sequence[Array], y: Array, parts: Sequence[LoRAPart], segments: Segments, phase: str
) -> Array:
    """The sum of all parts' `v B^T`, `[T, N]`.

    By one launch: a LoRA whose A takes a part's own ranks out of those of all parts.
    """
    ends = list(itertools.accumulate(v.shape[1] for v in vs))
    size = max(ends[-1], _LEAST)
    v = jnp.pad(jnp.concatenate(vs, axis=1), ((0, 0), (0, size - ends[-1])))
    halves = []
    for part, own, end in zip(parts, vs, ends):
        b, rank = jnp.asarray(part.lora_b), own.shape[1]
        own_ranks = _like(jnp.eye(rank, size, end - rank), b)
        halves.append(dataclasses.replace(part, lora_a=own_ranks, lora_b=b, layers=None))
    return lora_delta(v, halves, segments, y.shape[1], dtype=y.dtype, phase=phase)


def _like(matrix: Array, stack: Array) -> Array:
    """`matrix` for each slot of `stack`."""
    shape = (stack.shape[0], *matrix.shape)
    axes = tuple(jax.typeof(stack).manual_axis_type.varying)
    whole = jnp.broadcast_to(matrix.astype(stack.dtype), shape)
    return jax.lax.pcast(whole, axes, to="varying")
