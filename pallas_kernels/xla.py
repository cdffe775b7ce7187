"""The ops and their gradients as plain XLA, for any device.

Two forms. *bgmv* gathers the adapter of each token and contracts, a few tokens at a time so that
the gathered weights stay small. *sgmv* walks the tile map of the segments: one dense product per
tile of tokens that share an adapter. Neither reads a slot that no token uses, so neither grows with
the number of slots. Operands of unequal dtypes meet in float32; products accumulate in float32.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from pallas_kernels.call import Call
from pallas_kernels.ranks import SGMV_BLOCK_SIZE
from pallas_kernels.routing import (
    AnyIds,
    Mix,
    Segments,
    SlotRange,
    TokenIds,
    columns_of,
    ids_of,
    local_segments,
    slots_in_use,
)
from pallas_kernels.stacks import LoRAPart, Sharing, apart, side_by_side

# Weights that one step of the bgmv form gathers at most. A CPU writes them out before it multiplies
# and wants them in its cache: docs/lab/2026-11.md has the times. On a GPU each step costs launches.
_GATHER_BYTES_CPU = 2**20
_GATHER_BYTES = 32 * 2**20
# On a GPU the host waits for what a branch asks, unless one CUDA graph holds both. To gather the
# weights of so few tokens in vain takes less.
_UNASKED_TOKENS = 2

# One for all adapters, one for each, or one for each rank column of each.
Scale = Float[Array, "*L"]
# Where a layer's first adapter stands in a stack; traced where the stack is that of several layers.
Place = int | Array


def dot(subscripts: str, x: Array, w: Array) -> Array:
    """einsum with float32 accumulation and result; float32 operands in full precision, not TF32.

    Bytes are weights in 8 bits, which become x's dtype where the product reads them.
    """
    if _are_bytes(w):
        w = w.astype(x.dtype) if w.dtype == jnp.int8 else _from_bytes(w, x.dtype)
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, w, precision=precision, preferred_element_type=jnp.float32)


def _are_bytes(weights: Array) -> bool:
    """Whether they are in 8 bits: int8, or float8_e4m3fn as `_bytes_of` makes it."""
    return weights.dtype in (jnp.int8, jnp.uint8)


def _bytes_of(stack: Array) -> Array:
    """Floats of 8 bits as their bytes, other stacks as they are.

    XLA's CPU compiler copies the bytes, once in a call; of floats of 8 bits it would convert all to
    16, several times slower. The bundled model, 110 rows of ten adapters, on 2 CPU cores: 1.6 s by
    bytes, 4.4 by floats, 1.1 in float32.
    """
    is_float = stack.dtype == jnp.float8_e4m3fn
    return lax.bitcast_convert_type(stack, jnp.uint8) if is_float else stack


def _from_bytes(weights: Array, dtype: DTypeLike) -> Array:
    """Floats of 8 bits, exactly: their bits, moved to those of a float16, are 2^-8 of it."""
    bits = weights.astype(jnp.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    wide = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    return (wide * 256).astype(dtype)


def cast_v(v: Array, lora_b: Array) -> Array:
    """`v` as the expand multiplies it: float32 takes half-precision B's dtype (LoRAX CAST_TYPE).
    Beside B in 8 bits, which are bytes here, it stays as it is."""
    is_cast = v.dtype == jnp.float32 and not _are_bytes(lora_b)
    return v.astype(lora_b.dtype) if is_cast else v


class Held(NamedTuple):
    """How a stack holds adapters: adapter 0 stands at `first`, `shared` adapters have one place,
    and `transposed` matrices are `[H, R]` or `[R, N]`."""

    first: Place = 0
    shared: int = 1
    transposed: bool = False

    def place(self, adapter: Array) -> Array:
        return (self.first + adapter) // self.shared

    def matrix(self, stack: Array, adapter: Array) -> Array:
        """`[R, H]` or `[N, R]` of an adapter."""
        return turned(stack[self.place(adapter)], self.transposed)


ONE_EACH = Held()


def slots_of(indices: Int[Array, " T"], stack: Array) -> Int[Array, " T"]:
    """Ids for a gather that fills: -1 would wrap to the last adapter, `len(stack)` is out of
    bounds."""
    return jnp.where(indices < 0, stack.shape[0], indices)


def take(stack: Array, ids: Array) -> Array:
    """Rows of `stack`; zeros for ids out of bounds."""
    return stack.at[ids].get(mode="fill", fill_value=0)


def _places(indices: Int[Array, " T"], held: Held) -> Int[Array, " T"]:
    """Ids for a gather whose rows of -1 are masked behind the product: they name adapter 0.

    A gather that fills needs a table of what is in bounds, which on a GPU is a launch.
    """
    return held.place(jnp.maximum(indices, 0))


def _at(stack: Array, places: Array) -> Array:
    return stack.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def add_rows(v: Array, new: Array, segments: Segments) -> Array:
    """v + new, rounded once; rows of -1 keep v."""
    total = (v.astype(jnp.float32) + new).astype(v.dtype)
    return jnp.where((segments.indices >= 0)[:, None], total, v)


class LocalPart(NamedTuple):
    """A part with the tokens of its own adapters, whose ids count from its first slot.

    They stand in `lora_a` and `lora_b` from `first` on: M is L, or that of several layers. Where
    adapters share one A, or B, M is less. What a token's adapter adds is multiplied by the token's
    weight, if tokens have weights.

    `lora_a` is `[M, R, H]` and `lora_b` `[M, N, R]`; if `transposed`, `[M, H, R]` and `[M, R, N]`.
    Stacks in 8 bits are their bytes.
    """

    lora_a: Shaped[Array, "M _ _"]
    lora_b: Shaped[Array, "_ _ _"]
    scales: Scale
    segments: Segments
    y_offset: int
    first: Place = 0
    weights: Float[Array, " T"] | None = None
    transposed: bool = False
    sharing: Sharing = Sharing()

    @property
    def held(self) -> tuple[Held, Held]:
        """How A and B hold the adapters."""
        of_a, of_b = (Held(self.first, shared, self.transposed) for shared in self.sharing)
        return of_a, of_b

    def halves(self, adapter: Array) -> tuple[Array, Array]:
        """A `[R, H]` and B `[N, R]` of an adapter."""
        of_a, of_b = self.held
        return of_a.matrix(self.lora_a, adapter), of_b.matrix(self.lora_b, adapter)

    @property
    def columns(self) -> slice:
        width = self.lora_b.shape[2 if self.transposed else 1]
        return slice(self.y_offset, self.y_offset + width)


def local_parts(parts: tuple[LoRAPart, ...], ids: AnyIds) -> list[LocalPart]:
    """The parts, each with its own tokens and its own scales alone; of a mix all of them for the
    first adapters of tokens, then for the second ones, and so on."""
    found = []
    for (token_ids, weights), part in itertools.product(columns_of(ids), parts):
        a, b, scales = jnp.asarray(part.lora_a), jnp.asarray(part.lora_b), part.own_scales()
        segments = local_segments(token_ids, SlotRange(part.first_slot, part.slots))
        place: Place = 0
        if (layers := part.layers) is not None:
            place = layers.layer * part.slots
            a, b, _ = layers.flat
        a, b = _bytes_of(a), _bytes_of(b)
        how = part.y_offset, place, weights, part.transposed, part.sharing
        found.append(LocalPart(a, b, scales, segments, *how))
    return found


def turned(matrices: Array, transposed: bool) -> Array:
    """The matrices with their two axes in the other order, if so. XLA has it done by the product
    that reads them, or makes them."""
    return matrices.swapaxes(-1, -2) if transposed else matrices


def touches(part: LocalPart, width: int) -> Bool[Array, "T width"]:
    """Whether a part adds to each element of y."""
    column = jnp.arange(width)[None]
    inside = (part.columns.start <= column) & (column < part.columns.stop)
    return (part.segments.indices >= 0)[:, None] & inside


def _rows(y: Array, rows: Array, columns: slice) -> Array:
    return y.at[rows, columns].get(mode="fill", fill_value=0)


def _per_token(fn: Callable[..., Array], stack: Array, tokens: Array, ids: Array) -> Array:
    """fn(tokens[c], stack[ids[c]]) over chunks c of tokens, concatenated."""
    num_tokens, slot_bytes = tokens.shape[0], stack[0].size * stack.dtype.itemsize

    def chunked(limit: int, stack: Array, tokens: Array, ids: Array) -> Array:
        chunk = max(1, limit // slot_bytes)
        if chunk >= num_tokens:
            return fn(tokens, _at(stack, ids))
        chunks = -(-num_tokens // chunk)
        pad = chunks * chunk - num_tokens
        tokens = jnp.pad(tokens, ((0, pad), (0, 0))).reshape(chunks, chunk, -1)
        ids = jnp.pad(ids, (0, pad)).reshape(chunks, chunk)
        out = lax.map(lambda xs: fn(xs[0], _at(stack, xs[1])), (tokens, ids))
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
    call: Call, v: Array | None, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> Array:
    """v[t] + scale * x[t] @ lora_a[i].T, rounded once; rows of -1 keep v. None is zeros."""
    segments = local_segments(token_ids, SlotRange(0, lora_a.shape[0]))
    run = _shrink_bgmv if call.kernels[0] == "bgmv" else _shrink_sgmv
    new = run(x, lora_a, segments, scale)
    return new if v is None else add_rows(v, new, segments)


def _shrink_bgmv(
    x: Float[Array, "T H"],
    lora_a: Shaped[Array, "L _ _"],
    segments: Segments,
    scale: Scale,
    held: Held = ONE_EACH,
) -> Float[Array, "T R"]:
    ids = _places(segments.indices, held)

    def some(xs: Array, a: Array) -> Array:
        return dot("th,trh->tr", xs, turned(a, held.transposed))

    v = _per_token(some, lora_a, x, ids)
    if scale.ndim:
        scale = _at(scale, _places(segments.indices, ONE_EACH)).reshape(x.shape[0], -1)
    return jnp.where(segments.indices[:, None] < 0, 0.0, v * scale)


def _shrink_sgmv(
    x: Float[Array, "T H"], lora_a: Float[Array, "L R H"], segments: Segments, scale: Scale
) -> Float[Array, "T R"]:
    def tile(v: Array, rows: Array, adapter: Array) -> Array:
        out = dot("th,rh->tr", take(x, rows), lora_a[adapter]) * _scale_of(scale, adapter)
        return v.at[rows].set(out, mode="drop")

    v = _zeros((x.shape[0], lora_a.shape[1]), x, lora_a, segments.indices, scale)
    return _over_tiles(segments, _block(segments), tile, v)


def expand(call: Call, v: Array, lora_b: Array, token_ids: TokenIds, y: Array) -> Array:
    """y[t, columns] (+)= v[t] @ lora_b[i].T, rounded once; rows of -1 keep y."""
    segments = local_segments(token_ids, SlotRange(0, lora_b.shape[0]))
    run = _expand_bgmv if call.kernels[0] == "bgmv" else _expand_sgmv
    columns = slice(call.y_offset, call.y_offset + lora_b.shape[1])
    return run(v, lora_b, segments, y, columns, add_inputs=call.add_inputs)


def _updated(old: Array, delta: Array, *, add_inputs: bool) -> Array:
    new = old.astype(jnp.float32) + delta if add_inputs else delta
    return new.astype(old.dtype)


def _expand_bgmv(
    v: Float[Array, "T R"],
    lora_b: Shaped[Array, "L _ _"],
    segments: Segments,
    y: Float[Array, "T Ny"],
    columns: slice,
    held: Held = ONE_EACH,
    *,
    add_inputs: bool,
) -> Float[Array, "T Ny"]:
    ids = _places(segments.indices, held)

    def some(vs: Array, b: Array) -> Array:
        return dot("tr,tnr->tn", vs, turned(b, held.transposed))

    delta = _per_token(some, lora_b, cast_v(v, lora_b), ids)
    old = y[:, columns]
    new = _updated(old, delta, add_inputs=add_inputs)
    new = jnp.where(segments.indices[:, None] < 0, old, new)
    if new.shape == y.shape:
        return new
    # Fused with the update, XLA's CPU compiler selects bfloat16 through float32, which quiets
    # the signalling NaNs in bytes that are not ours.
    new = lax.optimization_barrier(new)
    return lax.dynamic_update_slice_in_dim(y, new, columns.start, axis=1)


def _expand_sgmv(
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    segments: Segments,
    y: Float[Array, "T Ny"],
    columns: slice,
    *,
    add_inputs: bool,
) -> Float[Array, "T Ny"]:
    v = cast_v(v, lora_b)

    def tile(y: Array, rows: Array, adapter: Array) -> Array:
        delta = dot("tr,nr->tn", take(v, rows), lora_b[adapter])
        new = _updated(_rows(y, rows, columns), delta, add_inputs=add_inputs)
        return y.at[rows, columns].set(new, mode="drop")

    return _over_tiles(segments, _block(segments), tile, y)


def add_lora(
    call: Call, ys: tuple[Array, ...], x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, ...]:
    """The ys plus both halves of each part, in order. A token's sum is rounded once."""
    y = side_by_side(ys)
    locals_ = local_parts(parts, ids)
    acc = y if len(locals_) == 1 else y.astype(jnp.float32)
    acc = _add_parts(acc, x, locals_, call.kernels)
    if acc.dtype != y.dtype:
        # Through float32 and back, a NaN may lose its payload: rows without adapter keep y's bytes.
        acc = jnp.where(_touched(locals_, y), acc.astype(y.dtype), y)
    return apart(acc, tuple(one.shape[1] for one in ys))


def lora_delta(call: Call, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds) -> tuple[Array, ...]:
    """What `add_lora` adds, rounded once; -0.0 where nothing is added."""
    locals_ = local_parts(parts, ids)
    whose = [ids_of(column) for column, _ in columns_of(ids)]
    zeros = _zeros((x.shape[0], sum(call.widths)), x, *whose, *jax.tree.leaves(parts))
    total = _add_parts(zeros, x, locals_, call.kernels).astype(call.dtype)
    total = jnp.where(_touched(locals_, total), total, jnp.asarray(-0.0, total.dtype))
    return apart(total, call.widths)


def _zeros(shape: tuple[int, ...], *operands: Array) -> Float[Array, "..."]:
    """Zeros to which results of the operands are added: inside of `jax.shard_map` they vary over
    the same axes of the mesh."""
    return jnp.broadcast_to(_never(*operands).astype(jnp.float32), shape)


def _never(*operands: Array) -> Bool[Array, ""]:
    """False, which varies as the operands do, and costs nothing: XLA knows what it is."""
    return functools.reduce(jnp.logical_or, [(t.reshape(-1)[0] != 0) & False for t in operands])


def _touched(parts: list[LocalPart], y: Array) -> Bool[Array, "T Ny"]:
    touched = jnp.zeros(y.shape, bool)
    for part in parts:
        touched |= touches(part, y.shape[1])
    return touched


def _add_parts(acc: Array, x: Array, parts: list[LocalPart], kernels: tuple[str, ...]) -> Array:
    asks = len(parts) > 1 or x.shape[0] > _UNASKED_TOKENS
    for part, kernel in zip(parts, itertools.cycle(kernels)):
        if kernel != "bgmv":
            acc = _add_sgmv(acc, x, part)
            continue
        add = functools.partial(_add_bgmv, part=part)
        if_used = functools.partial(_if_used, add, part)
        acc = if_used(acc, x) if asks else lax.platform_dependent(acc, x, cpu=if_used, default=add)
    return acc


def _if_used(add: Callable[[Array, Array], Array], part: LocalPart, acc: Array, x: Array) -> Array:
    """add(acc, x), unless no token has an adapter of the part."""
    return lax.cond(jnp.any(part.segments.indices >= 0), add, lambda acc, _: acc, acc, x)


def weighted(v: Float[Array, "T R"], weights: Float[Array, " T"] | None) -> Float[Array, "T R"]:
    """Each token's v times its weight, if it has one."""
    return v if weights is None else v * weights[:, None]


def _factors(part: LocalPart, rows: Array, adapter: Array) -> Array:
    """What v is multiplied by: the adapter's scale, and the weight of each row, `[rows, 1]`."""
    scale = _scale_of(part.scales, adapter)
    return scale if part.weights is None else scale * take(part.weights, rows)[:, None]


def _add_bgmv(y: Array, x: Array, part: LocalPart) -> Array:
    of_a, of_b = part.held
    v = _shrink_bgmv(x, part.lora_a, part.segments, part.scales, of_a)
    v = weighted(v, part.weights)
    return _expand_bgmv(v, part.lora_b, part.segments, y, part.columns, of_b, add_inputs=True)


def _add_sgmv(y: Array, x: Array, part: LocalPart) -> Array:
    def tile(y: Array, rows: Array, adapter: Array) -> Array:
        a, b = part.halves(adapter)
        v = dot("th,rh->tr", take(x, rows), a)
        v = cast_v(v * _factors(part, rows, adapter), b)
        delta = dot("tr,nr->tn", v, b)
        new = _rows(y, rows, part.columns).astype(jnp.float32) + delta
        return y.at[rows, part.columns].set(new.astype(y.dtype), mode="drop")

    return _over_tiles(part.segments, _block(part.segments), tile, y)


# Gradients. One walk over the tiles each; sums over tokens are kept in float32, in the order of the
# tiles. An adapter without tokens has no tile, so its gradient is the zeros that the sum starts at.


def _sums[C](segments: Segments, body: Callable[[C, Array, Array], C], zeros: C) -> C:
    """`_over_tiles` of sums that start at zeros; where there can be one tile alone, it is no loop.

    On 2 CPU cores, forward and backward of one token take 1.3 to 3.6 times as long by the loop; the
    only slot of 8 tokens 1.3, of 128 as long. For more tiles, static shapes do not tell whether a
    form without a loop is faster: docs/lab/2026-11.md.
    """
    num_tokens, block = segments.num_tokens, _block(segments)
    if num_tokens > block or segments.group_adapters.shape[0] != 1:
        # Few tokens fill no tile; rows without one would be multiplied too.
        return _over_tiles(segments, min(block, 1 << (num_tokens - 1).bit_length()), body, zeros)
    rows, adapter = segments.rows, segments.group_adapters[0]
    rows = jnp.where(jnp.arange(num_tokens) < segments.group_starts[1], rows, num_tokens)
    sums = body(zeros, rows, jnp.maximum(adapter, 0))
    # Without tokens, the NaN that slot 0 may hold has no place in a sum.
    return jax.tree.map(lambda new, zero: jnp.where(adapter < 0, zero, new), sums, zeros)


def _add_at(stack: Array, adapter: Array, update: Array) -> Array:
    return stack.at[adapter].add(update)


def _scale_grad(ds: Array, adapter: Array, update: Array) -> Array:
    return ds + update if ds.ndim == 0 else ds.at[adapter].add(update)


def shrink_grad(
    call: Call, dv: Array, x: Array, lora_a: Array, token_ids: TokenIds, scale: Array
) -> tuple[Array, Array, Array]:
    """Gradients of `shrink` in x, lora_a and scale."""
    segments = local_segments(token_ids, SlotRange(0, lora_a.shape[0]))

    def tile(
        carry: tuple[Array, Array, Array], rows: Array, adapter: Array
    ) -> tuple[Array, Array, Array]:
        dx, da, ds = carry
        xs, a, dvs = take(x, rows), lora_a[adapter], take(dv, rows)
        u, du = dot("th,rh->tr", xs, a), dvs * _scale_of(scale, adapter)
        dx = dx.at[rows].set(dot("tr,rh->th", du, a).astype(x.dtype), mode="drop")
        da = _add_at(da, adapter, dot("tr,th->rh", du, xs))
        return dx, da, _scale_grad(ds, adapter, jnp.sum(u * dvs))

    zeros = (jnp.zeros_like(x), jnp.zeros(lora_a.shape, jnp.float32), jnp.zeros_like(scale))
    dx, da, ds = _sums(segments, tile, zeros)
    return dx, da.astype(lora_a.dtype), ds


def expand_grad(
    call: Call, dy: Array, v: Array, lora_b: Array, token_ids: TokenIds
) -> tuple[Array, Array, Array]:
    """Gradients of `expand` in v, lora_b and y."""
    segments = local_segments(token_ids, SlotRange(0, lora_b.shape[0]))
    columns = slice(call.y_offset, call.y_offset + lora_b.shape[1])
    operand = cast_v(v, lora_b)

    def tile(carry: tuple[Array, Array], rows: Array, adapter: Array) -> tuple[Array, Array]:
        dv, db = carry
        dys = _rows(dy, rows, columns)
        dv = dv.at[rows].set(dot("tn,nr->tr", dys, lora_b[adapter]).astype(v.dtype), mode="drop")
        return dv, _add_at(db, adapter, dot("tn,tr->nr", dys, take(operand, rows)))

    zeros = (jnp.zeros_like(v), jnp.zeros(lora_b.shape, jnp.float32))
    dv, db = _sums(segments, tile, zeros)
    return dv, db.astype(lora_b.dtype), expand_grad_of_y(call, dy, lora_b, segments)


def expand_grad_of_y(call: Call, dy: Array, lora_b: Array, segments: Segments) -> Array:
    """Gradient of `expand` in y: zero where the expand overwrites it."""
    if call.add_inputs:
        return dy
    columns = slice(call.y_offset, call.y_offset + lora_b.shape[1])
    kept = jnp.where(segments.indices[:, None] < 0, dy[:, columns], 0).astype(dy.dtype)
    return dy.at[:, columns].set(kept)


def add_lora_grad(
    call: Call, dy: Array, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, tuple[LoRAPart, ...], Array | None]:
    """Gradients of `add_lora` in x, in each part's stacks and own scales, and in weights."""
    columns = itertools.batched(local_parts(parts, ids), max(1, len(parts)))
    found = [[_part_grad(dy, x, local) for local in column] for column in columns]
    dx = jnp.zeros(x.shape, jnp.float32)
    for one in itertools.chain(*found):
        dx += one.x
    weights = None
    if isinstance(ids, Mix):
        weights = jnp.stack([_added([one.weights for one in column]) for column in found], axis=1)
    dparts = []
    for part, of_part in zip(parts, zip(*found)):
        a, b = jnp.asarray(part.lora_a), jnp.asarray(part.lora_b)
        da = _added([one.lora_a for one in of_part]).astype(a.dtype)
        db = _added([one.lora_b for one in of_part]).astype(b.dtype)
        ds = _added([one.scales for one in of_part])
        if call.compact is not None:
            [column] = columns_of(ids)
            own = SlotRange(part.first_slot, part.slots)
            used = slots_of(slots_in_use(column.token_ids, own, call.compact), da)
            da, db = take(da, used), take(db, used)
            ds = take(ds, used) if ds.ndim else ds
        dparts.append(dataclasses.replace(part, lora_a=da, lora_b=db, scales=ds, layers=None))
    return dx.astype(x.dtype), tuple(dparts), weights


def _added(arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


class _PartGrad(NamedTuple):
    """Gradients in x and in what a part holds, float32; of tokens without weights none in these."""

    x: Float[Array, "T H"]
    lora_a: Float[Array, "_ _ _"]
    lora_b: Float[Array, "_ _ _"]
    scales: Scale
    weights: Float[Array, " T"]


def _part_grad(dy: Float[Array, "T Ny"], x: Float[Array, "T H"], part: LocalPart) -> _PartGrad:
    lora_a, lora_b, scales, sharing = part.lora_a, part.lora_b, part.scales, part.sharing

    def tile(sums: _PartGrad, rows: Array, adapter: Array) -> _PartGrad:
        xs, factors = take(x, rows), _factors(part, rows, adapter)
        dys, (a, b) = _rows(dy, rows, part.columns), part.halves(adapter)
        u = dot("th,rh->tr", xs, a)
        dvs = dot("tn,nr->tr", dys, b)
        of_b = dot("tn,tr->nr", dys, cast_v(u * factors, b))
        db = _add_at(sums.lora_b, adapter // sharing.lora_b, turned(of_b, part.transposed))
        du = dvs * factors
        dx = sums.x.at[rows].set(dot("tr,rh->th", du, a), mode="drop")
        of_a = dot("tr,th->rh", du, xs)
        da = _add_at(sums.lora_a, adapter // sharing.lora_a, turned(of_a, part.transposed))
        terms, dw = dvs * u, sums.weights
        if part.weights is not None:
            own = jnp.sum(terms, axis=1) * _scale_of(scales, adapter)
            dw = dw.at[rows].set(own, mode="drop")
            terms = terms * take(part.weights, rows)[:, None]
        return _PartGrad(dx, da, db, _scale_grad(sums.scales, adapter, jnp.sum(terms)), dw)

    slots = part.segments.num_adapters
    zero = _zeros((), dy, x, lora_a, lora_b, part.segments.indices)
    shapes = (
        x.shape,
        (slots // sharing.lora_a, *lora_a.shape[1:]),
        (slots // sharing.lora_b, *lora_b.shape[1:]),
        scales.shape,
        (0,) if part.weights is None else (x.shape[0],),
    )
    zeros = _PartGrad(*(jnp.broadcast_to(zero, shape) for shape in shapes))
    return _sums(part.segments, tile, zeros)
