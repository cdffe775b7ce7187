"""One gradient for each operation, whatever runs it: the forward and backward of its backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import derivatives
from pallas_kernels.call import Call
from pallas_kernels.dispatch import compiled
from pallas_kernels.exact import in_chunks
from pallas_kernels.manual import varying
from pallas_kernels.routing import AnyIds, Mix, TokenIds
from pallas_kernels.stacks import LoRAPart, side_by_side

Parts = tuple[LoRAPart, ...]
Ys = tuple[Array, ...]


# ------------------------------------------------------------------------------------------ shrink


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shrink(
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> Array:
    return compiled("shrink", call)(v, x, lora_a, token_ids, scale)


def _shrink_fwd(
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> tuple[Array, tuple[Array | None, Array, Array, TokenIds, Array]]:
    return shrink(call, v, x, lora_a, token_ids, scale), (v, x, lora_a, token_ids, scale)


@functools.partial(jax.jit, static_argnums=0)
def _shrink_bwd(
    call: Call, residuals: tuple[Array | None, Array, Array, TokenIds, Array], dv: Array
) -> tuple[Array | None, ...]:
    residuals, dv = derivatives.cotangents(call.op, (residuals, dv))
    v, x, lora_a, token_ids, scale = residuals
    gradient = compiled("shrink_grad", call)
    dx, da, ds = gradient(dv.astype(jnp.float32), x, lora_a, token_ids, scale)
    return None if v is None else dv, dx, da, None, ds


_shrink.defvjp(_shrink_fwd, _shrink_bwd)


def shrink(
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> Array:
    """`Backend.shrink`, with its gradient."""
    operands = _alike((v, x, lora_a, token_ids, scale))
    out: Array = _shrink(call, *derivatives.operands(call.op, operands))
    return out


# ------------------------------------------------------------------------------------------ expand


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
    return compiled("expand", call)(v, lora_b, token_ids, y)


def _expand_fwd(
    call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array
) -> tuple[Array, tuple[Array, Array, TokenIds]]:
    return expand(call, v, lora_b, token_ids, y), (v, lora_b, token_ids)


@functools.partial(jax.jit, static_argnums=0)
def _expand_bwd(
    call: Call, residuals: tuple[Array, Array, TokenIds], dy: Array
) -> tuple[Array | None, ...]:
    (v, lora_b, token_ids), dy = derivatives.cotangents(call.op, (residuals, dy))
    dv, db, dy = compiled("expand_grad", call)(dy, v, lora_b, token_ids)
    return dv, db, None, dy


_expand.defvjp(_expand_fwd, _expand_bwd)


def expand(call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
    """`Backend.expand`, with its gradient."""
    operands = _alike((v, lora_b, token_ids, y))
    out: Array = _expand(call, *derivatives.operands(call.op, operands))
    return out


# ------------------------------------------------------------------------------------- both halves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_lora(call: Call, ys: Ys, x: Array, parts: Parts, ids: AnyIds) -> Ys:
    return compiled("add_lora", call)(ys, x, parts, ids)


def _add_lora_fwd(
    call: Call, ys: Ys, x: Array, parts: Parts, ids: AnyIds
) -> tuple[Ys, tuple[Array, Parts, AnyIds]]:
    derivatives.refuse_eight_bits(call.op, parts)
    return add_lora(call, ys, x, parts, ids), (x, _kept(parts), ids)


def _kept(parts: Parts) -> Parts:
    return tuple(part.without_slices() for part in parts)


def _add_lora_bwd(
    call: Call, residuals: tuple[Array, Parts, AnyIds], dys: Ys
) -> tuple[Ys, Array, Parts, Mix | None]:
    return dys, *_gradients(call, residuals, dys)


_add_lora.defvjp(_add_lora_fwd, _add_lora_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lora_delta(call: Call, x: Array, parts: Parts, ids: AnyIds) -> Ys:
    delta = compiled("lora_delta", call)
    return in_chunks(delta, x, parts, ids) if call.exact else delta(x, parts, ids)


def _lora_delta_fwd(
    call: Call, x: Array, parts: Parts, ids: AnyIds
) -> tuple[Ys, tuple[Array, Parts, AnyIds]]:
    derivatives.refuse_eight_bits(call.op, parts)
    return lora_delta(call, x, parts, ids), (x, _kept(parts), ids)


def _lora_delta_bwd(
    call: Call, residuals: tuple[Array, Parts, AnyIds], dys: Ys
) -> tuple[Array, Parts, Mix | None]:
    return _gradients(call, residuals, dys)


_lora_delta.defvjp(_lora_delta_fwd, _lora_delta_bwd)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    call: Call, residuals: tuple[Array, Parts, AnyIds], dys: Ys
) -> tuple[Array, Parts, Mix | None]:
    (x, parts, ids), dys = derivatives.cotangents(call.op, (residuals, dys))
    parts = tuple(part.with_slices() for part in parts)
    gradient = compiled("add_lora_grad", call)
    dx, dparts, dweights = gradient(side_by_side(dys), x, parts, ids)
    of_ids = None if dweights is None else Mix(None, dweights)  # type: ignore[arg-type]
    return dx, tuple(map(_in_whole_scales, parts, dparts)), of_ids


def _in_whole_scales(part: LoRAPart, gradient: LoRAPart) -> LoRAPart:
    """A part's gradient in all of the scales that it was given, zero in those of others.

    It has no `layers`: a backend gives the gradients of the slices of them.
    """
    if part.scales_offset is None:
        return gradient
    own = jnp.asarray(gradient.scales)
    whole = jnp.zeros_like(jnp.asarray(part.scales))
    whole = whole.at[part.scales_offset : part.scales_offset + own.size].set(own)
    return dataclasses.replace(gradient, scales=whole, scales_offset=part.scales_offset)


def add_lora(call: Call, ys: Ys, x: Array, parts: Parts, ids: AnyIds) -> Ys:
    """`Backend.add_lora`, with its gradient."""
    out: Ys = _add_lora(call, *derivatives.operands(call.op, _alike((ys, x, parts, ids))))
    return out


def lora_delta(call: Call, x: Array, parts: Parts, ids: AnyIds) -> Ys:
    """`Backend.lora_delta`, with its gradient."""
    out: Ys = _lora_delta(call, *derivatives.operands(call.op, _alike((x, parts, ids))))
    return out


def _alike[T](operands: T) -> T:
    """In a `shard_map`, each of them as different on each device as all of them are.

    Stacks that all devices share get a sum of gradients: JAX sees that where they meet x.
    """
    return varying(operands, operands)
