"""The originals' fallback: one dense product per adapter, over all tokens, masked.

Its time grows with the number of slots. It exists to switch kernels off
(`JAX_LORA_DISABLE_KERNELS=1`) and as a second opinion: its forward shares no code path with the
others. Its gradients are XLA's.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.call import Call
from pallas_kernels.routing import AnyIds, Segments, SlotRange, TokenIds, local_segments
from pallas_kernels.stacks import LoRAPart, apart, side_by_side
from pallas_kernels.xla import (
    ONE_EACH,
    Held,
    LocalPart,
    Scale,
    add_rows,
    cast_v,
    dot,
    local_parts,
    touches,
    weighted,
)
from pallas_kernels.xla import add_lora_grad as add_lora_grad
from pallas_kernels.xla import expand_grad as expand_grad
from pallas_kernels.xla import shrink_grad as shrink_grad


def shrink(
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> Array:
    """v[t] + scale * x[t] @ lora_a[i].T, rounded once; rows of -1 keep v. None is zeros."""
    segments = local_segments(token_ids, SlotRange(0, lora_a.shape[0]))
    new = _shrink(x, lora_a, segments, scale)
    return new if v is None else add_rows(v, new, segments)


def expand(call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
    """y[t, columns] (+)= v[t] @ lora_b[i].T, rounded once; rows of -1 keep y."""
    segments = local_segments(token_ids, SlotRange(0, lora_b.shape[0]))
    columns = slice(call.y_offset, call.y_offset + lora_b.shape[1])
    return _expand(v, lora_b, segments, y, columns, add_inputs=call.add_inputs)


def add_lora(
    call: Call, ys: tuple[Array, ...], x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, ...]:
    """The ys plus both halves of each part, in order. A token's sum is rounded once."""
    y, locals_ = side_by_side(ys), _local_parts(parts, ids)
    acc, touched = _add_parts(y if len(locals_) == 1 else y.astype(jnp.float32), x, locals_)
    if acc.dtype != y.dtype:
        acc = jnp.where(touched, acc.astype(y.dtype), y)
    return apart(acc, tuple(one.shape[1] for one in ys))


def lora_delta(call: Call, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds) -> tuple[Array, ...]:
    """What `add_lora` adds, rounded once; -0.0 where nothing is added."""
    zeros = jnp.zeros((x.shape[0], sum(call.widths)), jnp.float32)
    total, touched = _add_parts(zeros, x, _local_parts(parts, ids))
    total = total.astype(call.dtype)
    return apart(jnp.where(touched, total, jnp.asarray(-0.0, total.dtype)), call.widths)


def _local_parts(parts: tuple[LoRAPart, ...], ids: AnyIds) -> list[LocalPart]:
    """By slices where they are those of several layers: every adapter of a layer is read anyway."""
    return local_parts(tuple(dataclasses.replace(part, layers=None) for part in parts), ids)


def _select(mask: Array, new: Array, old: Array) -> Array:
    return jnp.where(mask[:, None], new, old)


def _shrink(
    x: Float[Array, "T H"],
    lora_a: Shaped[Array, "L _ _"],
    segments: Segments,
    scale: Scale,
    held: Held = ONE_EACH,
) -> Float[Array, "T R"]:
    def adapter(i: Array, v: Array) -> Array:
        out = dot("th,rh->tr", x, held.matrix(lora_a, i))
        return _select(segments.indices == i, out * (scale if scale.ndim == 0 else scale[i]), v)

    v = jnp.zeros((x.shape[0], lora_a.shape[2 if held.transposed else 1]), jnp.float32)
    return lax.fori_loop(0, held.shared * lora_a.shape[0], adapter, v)


def _expand(
    v: Float[Array, "T R"],
    lora_b: Shaped[Array, "L _ _"],
    segments: Segments,
    y: Float[Array, "T Ny"],
    columns: slice,
    held: Held = ONE_EACH,
    *,
    add_inputs: bool,
) -> Float[Array, "T Ny"]:
    v = cast_v(v, lora_b)
    old = y[:, columns]

    def adapter(i: Array, new: Array) -> Array:
        delta = dot("tr,nr->tn", v, held.matrix(lora_b, i))
        out = (old.astype(jnp.float32) + delta if add_inputs else delta).astype(y.dtype)
        return _select(segments.indices == i, out, new)

    new = lax.fori_loop(0, held.shared * lora_b.shape[0], adapter, old)
    return lax.dynamic_update_slice_in_dim(y, new, columns.start, axis=1)


def _add_parts(acc: Array, x: Array, parts: list[LocalPart]) -> tuple[Array, Array]:
    touched = jnp.zeros(acc.shape, bool)
    for part in parts:
        of_a, of_b = part.held
        v = _shrink(x, part.lora_a, part.segments, part.scales, of_a)
        v = weighted(v, part.weights)
        acc = _expand(v, part.lora_b, part.segments, acc, part.columns, of_b, add_inputs=True)
        touched |= touches(part, acc.shape[1])
    return acc, touched
