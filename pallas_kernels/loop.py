"""The originals' fallback: one dense product per adapter, over all tokens, masked.

Its time grows with the number of slots. It exists to switch kernels off
(`JAX_LORA_DISABLE_KERNELS=1`) and as a second opinion, and shares no code path with the others.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.parts import LoRAPart
from pallas_kernels.segments import Segments
from pallas_kernels.xla import Scale, cast_v, dot, touches


def _select(mask: Array, new: Array, old: Array) -> Array:
    return jnp.where(mask[:, None], new, old)


def shrink(
    x: Float[Array, "T H"],
    lora_a: Float[Array, "L R H"],
    segments: Segments,
    scale: Scale,
) -> Float[Array, "T R"]:
    def adapter(i: Array, v: Array) -> Array:
        out = dot("th,rh->tr", x, lora_a[i]) * (scale if scale.ndim == 0 else scale[i])
        return _select(segments.indices == i, out, v)

    v = jnp.zeros((x.shape[0], lora_a.shape[1]), jnp.float32)
    return lax.fori_loop(0, lora_a.shape[0], adapter, v)


def expand(
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    segments: Segments,
    y: Float[Array, "T Ny"],
    y_offset: int,
    *,
    add_inputs: bool,
) -> Float[Array, "T Ny"]:
    v = cast_v(v, lora_b)
    old = y[:, y_offset : y_offset + lora_b.shape[1]]

    def adapter(i: Array, new: Array) -> Array:
        delta = dot("tr,nr->tn", v, lora_b[i])
        out = (old.astype(jnp.float32) + delta if add_inputs else delta).astype(y.dtype)
        return _select(segments.indices == i, out, new)

    new = lax.fori_loop(0, lora_b.shape[0], adapter, old)
    return lax.dynamic_update_slice_in_dim(y, new, y_offset, axis=1)


def add_lora_multi(
    y: Float[Array, "T Ny"], x: Float[Array, "T H"], parts: tuple[LoRAPart, ...]
) -> Float[Array, "T Ny"]:
    acc = y if len(parts) == 1 else y.astype(jnp.float32)
    touched = jnp.zeros(y.shape, bool)
    part: Any
    for part in parts:
        v = shrink(x, part.lora_a, part.indices, part.scales)
        acc = expand(v, part.lora_b, part.indices, acc, part.y_offset, add_inputs=True)
        touched |= touches(part, y.shape[1])
    return acc if acc.dtype == y.dtype else jnp.where(touched, acc.astype(y.dtype), y)
