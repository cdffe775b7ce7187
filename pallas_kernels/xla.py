"""The ops as plain XLA, for any device; and the gradients, for every implementation.

Two forms. *bgmv* gathers the adapter of each token and contracts, a few tokens at a time so that
the gathered weights stay small. *sgmv* walks the tile map of the segments: one dense product per
tile of tokens that share an adapter. Neither reads a slot that no token uses, so neither grows with
the number of slots. Operands of unequal dtypes meet in float32; products accumulate in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.parts import LoRAPart
from pallas_kernels.ranks import SGMV_BLOCK_SIZE
from pallas_kernels.segments import Segments

# Weights that one step of the bgmv form gathers at most. A CPU writes them out before it multiplies
# and wants them in its cache: docs/performance.md has the times. On a GPU each step costs launches.
_GATHER_BYTES_CPU = 2**20
_GATHER_BYTES = 32 * 2**20

Scale = Float[Array, "*L"]


def dot(subscripts: str, x: Array, w: Array) -> Array:
    """einsum with float32 accumulation and result; float32 operands in full precision, not TF32."""
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, w, precision=precision, preferred_element_type=jnp.float32)


def cast_v(v: Array, lora_b: Array) -> Array:
    """`v` as the expand multiplies it: float32 takes half-precision B's dtype (LoRAX CAST_TYPE)."""
    return v.astype(lora_b.dtype) if v.dtype == jnp.float32 else v


def slots_of(indices: Int[Array, " T"], num_adapters: int) -> Int[Array, " T"]:
    """Ids for a gather that fills: -1 would wrap to the last adapter, `L` is out of bounds."""
    return jnp.where(indices < 0, num_adapters, indices)


def take(stack: Array, ids: Array) -> Array:
    """Rows of `stack`; zeros for ids out of bounds."""
    return stack.at[ids].get(mode="fill", fill_value=0)


def add_rows(v: Array, new: Array, segments: Segments) -> Array:
    """v + new, rounded once; rows of -1 keep v."""
    total = (v.astype(jnp.float32) + new).astype(v.dtype)
    return jnp.where((segments.indices >= 0)[:, None], total, v)


def touches(part: LoRAPart, width: int) -> Array:
    """`[T, width]`: whether a part adds to that element of y."""
    column = jnp.arange(width)[None]
    stop = part.y_offset + part.lora_b.shape[1]
    return (part.indices.indices >= 0)[:, None] & (part.y_offset <= column) & (column < stop)


def _rows(y: Array, rows: Array, columns: slice) -> Array:
    return y.at[rows, columns].get(mode="fill", fill_value=0)


def _per_token(fn: Callable[..., Array], stack: Array, tokens: Array, ids: Array) -> Array:
    """fn(tokens[c], stack[ids[c]]) over chunks c of tokens, concatenated."""
    num_tokens, slot_bytes = tokens.shape[0], stack[0].size * stack.dtype.itemsize

    def chunked(limit: int, stack: Array, tokens: Array, ids: Array) -> Array:
        chunk = max(1, limit // slot_bytes)
        if chunk >= num_tokens:
            return fn(tokens, take(stack, ids))
        chunks = -(-num_tokens // chunk)
        pad = chunks * chunk - num_tokens
        tokens = jnp.pad(tokens, ((0, pad), (0, 0))).reshape(chunks, chunk, -1)
        ids = jnp.pad(ids, (0, pad), constant_values=stack.shape[0]).reshape(chunks, chunk)
        out = lax.map(lambda xs: fn(xs[0], take(stack, xs[1])), (tokens, ids))
        return out.reshape(chunks * chunk, -1)[:num_tokens]

    return lax.platform_dependent(
        stack,
        tokens,
        ids,
        cpu=functools.partial(chunked, _GATHER_BYTES_CPU),
        default=functools.partial(chunked, _GATHER_BYTES),
    )


def _over_tiles[C](
    segments: Segments, block: int, body: Callable[[C, Array, Array], C], init: C
) -> C:
    """Folds body(carry, rows, adapter) over the tiles; dead entries of `rows` are out of bounds."""
    tiles = segments.tiles(block)
    rows = jnp.pad(segments.rows, (0, block), constant_values=segments.num_tokens)
    lane = jnp.arange(block, dtype=jnp.int32)

    def step(i: Array, carry: C) -> C:
        tile = lax.dynamic_slice_in_dim(rows, tiles.start[i], block)
        tile = jnp.where(lane < tiles.stop[i] - tiles.start[i], tile, segments.num_tokens)
        return body(carry, tile, tiles.adapter[i])

    return lax.fori_loop(0, tiles.count, step, init)


def _block(segments: Segments) -> int:
    """Rows of a tile: about the tokens that an adapter has if all slots are in use, 16 to 128."""
    share = -(-segments.num_tokens // segments.num_adapters)
    return min(max(SGMV_BLOCK_SIZE, 1 << (share - 1).bit_length()), 128)


def _scale_of(scale: Scale, adapter: Array) -> Array:
    return scale if scale.ndim == 0 else scale[adapter]


def shrink(
    x: Float[Array, "T H"],
    lora_a: Float[Array, "L R H"],
    segments: Segments,
    scale: Scale,
    *,
    kernel: str,
) -> Float[Array, "T R"]:
    """v[t] = scale * x[t] @ lora_a[indices[t]].T in float32; zero in rows of -1."""
    if kernel == "bgmv":
        ids = slots_of(segments.indices, lora_a.shape[0])
        v = _per_token(lambda xs, a: dot("th,trh->tr", xs, a), lora_a, x, ids)
        scales = scale if scale.ndim == 0 else take(scale, ids)[:, None]
        return jnp.where(segments.indices[:, None] < 0, 0.0, v * scales)

    def tile(v: Array, rows: Array, adapter: Array) -> Array:
        out = dot("th,rh->tr", take(x, rows), lora_a[adapter]) * _scale_of(scale, adapter)
        return v.at[rows].set(out, mode="drop")

    v = jnp.zeros((x.shape[0], lora_a.shape[1]), jnp.float32)
    return _over_tiles(segments, _block(segments), tile, v)


def expand(
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    segments: Segments,
    y: Float[Array, "T Ny"],
    y_offset: int,
    *,
    add_inputs: bool,
    kernel: str,
) -> Float[Array, "T Ny"]:
    """y[t, y_offset:][:N] (+)= v[t] @ lora_b[indices[t]].T, rounded once; rows of -1 keep y."""
    v = cast_v(v, lora_b)
    columns = slice(y_offset, y_offset + lora_b.shape[1])

    def update(old: Array, delta: Array) -> Array:
        new = old.astype(jnp.float32) + delta if add_inputs else delta
        return new.astype(y.dtype)

    if kernel == "bgmv":
        ids = slots_of(segments.indices, lora_b.shape[0])
        delta = _per_token(lambda vs, b: dot("tr,tnr->tn", vs, b), lora_b, v, ids)
        old = y[:, columns]
        new = jnp.where(segments.indices[:, None] < 0, old, update(old, delta))
        if new.shape == y.shape:
            return new
        # Fused with the update, XLA's CPU compiler selects bfloat16 through float32, which quiets
        # the signalling NaNs in bytes that are not ours.
        new = lax.optimization_barrier(new)
        return lax.dynamic_update_slice_in_dim(y, new, y_offset, axis=1)

    def tile(y: Array, rows: Array, adapter: Array) -> Array:
        delta = dot("tr,nr->tn", take(v, rows), lora_b[adapter])
        return y.at[rows, columns].set(update(_rows(y, rows, columns), delta), mode="drop")

    return _over_tiles(segments, _block(segments), tile, y)


def add_lora_multi(
    y: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[LoRAPart, ...],
    *,
    kernels: tuple[str, ...],
) -> Float[Array, "T Ny"]:
    """Both halves of each part, in order. Where parts overlap their sum is rounded once."""
    acc = y if len(parts) == 1 else y.astype(jnp.float32)
    touched = jnp.zeros(y.shape, bool)
    for part, kernel in zip(parts, kernels):
        if kernel == "bgmv":
            acc = lax.cond(
                jnp.any(part.indices.indices >= 0),
                lambda acc, part=part: _add_bgmv(acc, x, part),
                lambda acc: acc,
                acc,
            )
        else:
            acc = _add_sgmv(acc, x, part)
        touched |= touches(part, y.shape[1])
    # Through float32 and back, a NaN may lose its payload: rows without adapter keep y's bytes.
    return acc if acc.dtype == y.dtype else jnp.where(touched, acc.astype(y.dtype), y)


def _add_bgmv(y: Array, x: Array, part: Any) -> Array:
    v = shrink(x, part.lora_a, part.indices, part.scales, kernel="bgmv")
    return expand(v, part.lora_b, part.indices, y, part.y_offset, add_inputs=True, kernel="bgmv")


def _add_sgmv(y: Array, x: Array, part: Any) -> Array:
    columns = slice(part.y_offset, part.y_offset + part.lora_b.shape[1])

    def tile(y: Array, rows: Array, adapter: Array) -> Array:
        v = dot("th,rh->tr", take(x, rows), part.lora_a[adapter])
        v = cast_v(v * _scale_of(part.scales, adapter), part.lora_b)
        delta = dot("tr,nr->tn", v, part.lora_b[adapter])
        new = _rows(y, rows, columns).astype(jnp.float32) + delta
        return y.at[rows, columns].set(new.astype(y.dtype), mode="drop")

    return _over_tiles(part.indices, _block(part.indices), tile, y)


# Gradients. One walk over the tiles each; sums over tokens are kept in float32, in the order of the
# tiles. An adapter without tokens has no tile, so its gradient is the zeros that the sum starts at.


def _add_at(stack: Array, adapter: Array, update: Array) -> Array:
    return stack.at[adapter].add(update)


def _scale_grad(ds: Array, adapter: Array, update: Array) -> Array:
    return ds + update if ds.ndim == 0 else ds.at[adapter].add(update)


def shrink_grad(
    dv: Float[Array, "T R"],
    x: Float[Array, "T H"],
    lora_a: Float[Array, "L R H"],
    segments: Segments,
    scale: Scale,
) -> tuple[Array, Array, Array]:
    """Gradients of `shrink` in x, lora_a and scale."""

    def tile(carry: tuple[Array, Array, Array], rows: Array, adapter: Array) -> Any:
        dx, da, ds = carry
        xs, a, dvs = take(x, rows), lora_a[adapter], take(dv, rows)
        u, du = dot("th,rh->tr", xs, a), dvs * _scale_of(scale, adapter)
        dx = dx.at[rows].set(dot("tr,rh->th", du, a).astype(x.dtype), mode="drop")
        da = _add_at(da, adapter, dot("tr,th->rh", du, xs))
        return dx, da, _scale_grad(ds, adapter, jnp.sum(u * dvs))

    zeros = (jnp.zeros_like(x), jnp.zeros(lora_a.shape, jnp.float32), jnp.zeros_like(scale))
    dx, da, ds = _over_tiles(segments, _block(segments), tile, zeros)
    return dx, da.astype(lora_a.dtype), ds


def expand_grad(
    dy: Float[Array, "T Ny"],
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    segments: Segments,
    y_offset: int,
    *,
    add_inputs: bool,
) -> tuple[Array, Array, Array]:
    """Gradients of `expand` in v, lora_b and y."""
    columns = slice(y_offset, y_offset + lora_b.shape[1])
    operand = cast_v(v, lora_b)

    def tile(carry: tuple[Array, Array], rows: Array, adapter: Array) -> Any:
        dv, db = carry
        dys = _rows(dy, rows, columns)
        dv = dv.at[rows].set(dot("tn,nr->tr", dys, lora_b[adapter]).astype(v.dtype), mode="drop")
        return dv, _add_at(db, adapter, dot("tn,tr->nr", dys, take(operand, rows)))

    zeros = (jnp.zeros_like(v), jnp.zeros(lora_b.shape, jnp.float32))
    dv, db = _over_tiles(segments, _block(segments), tile, zeros)
    if not add_inputs:
        kept = jnp.where(segments.indices[:, None] < 0, dy[:, columns], 0).astype(dy.dtype)
        dy = dy.at[:, columns].set(kept)
    return dv, db.astype(lora_b.dtype), dy


def add_lora_grad(
    dy: Float[Array, "T Ny"], x: Float[Array, "T H"], part: LoRAPart
) -> tuple[Array, Array, Array, Array]:
    """Gradients of one part of `add_lora_multi` in x (float32), lora_a, lora_b and scales."""
    lora_a, lora_b, segments, scales, y_offset, _ = part
    columns = slice(y_offset, y_offset + lora_b.shape[1])

    def tile(carry: tuple[Array, Array, Array, Array], rows: Array, adapter: Array) -> Any:
        dx, da, db, ds = carry
        xs, dys, scale = take(x, rows), _rows(dy, rows, columns), _scale_of(scales, adapter)
        a, b = lora_a[adapter], lora_b[adapter]
        u = dot("th,rh->tr", xs, a)
        dvs = dot("tn,nr->tr", dys, b)
        db = _add_at(db, adapter, dot("tn,tr->nr", dys, cast_v(u * scale, b)))
        du = dvs * scale
        dx = dx.at[rows].set(dot("tr,rh->th", du, a), mode="drop")
        da = _add_at(da, adapter, dot("tr,th->rh", du, xs))
        return dx, da, db, _scale_grad(ds, adapter, jnp.sum(dvs * u))

    zeros = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(lora_a.shape, jnp.float32),
        jnp.zeros(lora_b.shape, jnp.float32),
        jnp.zeros_like(scales),
    )
    dx, da, db, ds = _over_tiles(segments, _block(segments), tile, zeros)
    return dx, da.astype(lora_a.dtype), db.astype(lora_b.dtype), ds
