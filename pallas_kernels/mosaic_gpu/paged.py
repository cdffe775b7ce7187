"""Attention of rows with one token each over keys and values in blocks, without a copy of these.

    out[b, n, g] = softmax(q[b, n, g] . keys[b's blocks, n]) values[b's blocks, n]

A program takes a row and a head of keys: its group of query heads reads them once. It copies tiles
of 64 tokens into a ring in shared memory, block after block as the row's table says, and multiplies
them as flash attention does. wgmma wants 64 rows, so those of the queries behind the group hold
whatever was there; rows do not mix, and theirs are not stored.

A row's programs depend on nothing but the row: the same bits whatever the others are.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.mosaic_gpu.chip import TILE
from pallas_kernels.mosaic_gpu.layouts import ROWS, Ref, accumulator, operand_layout, pad_to

# Tiles in flight. With two, a multiprocessor has room for two programs, else for one. H200, 64 rows
# of 1024 tokens, 8 heads of 128 features: 71.5 us with 2, 87.6 with 3, 88.9 with 4.
_STEPS = 2
_HEAD_DIMS = (64, 128)


def lacks_paged_attention(group: int, head_dim: int, block: int, dtype: DTypeLike) -> str | None:
    """Why the kernel does not take such shapes; None where it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"keys of {jnp.dtype(dtype).name}"
    if head_dim not in _HEAD_DIMS:
        return f"heads of {head_dim} features; it takes {_HEAD_DIMS}"
    if block % 8 or TILE % block:
        return f"blocks of {block} tokens; it takes 8, 16, 32 and 64"
    return None if group <= TILE else f"{group} query heads for one of keys; it takes {TILE}"


def paged_attention(
    q: Float[Array, "B N G D"],
    keys: Float[Array, "P N S D"],
    values: Float[Array, "P N S D"],
    tables: Int[Array, "B W"],
    firsts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N G D"]:
    """See the top. A row that sees nothing gets zeros.

    What lies before the row's first position or behind its last, NaN included, never reaches it.

    Args:
      tables: blocks of each row; any numbers where the row sees nothing.
      firsts, lengths: a row sees the positions from its first one on, those before its length.

    Raises:
      ValueError: `lacks_paged_attention` says why.
    """
    rows, heads, group, head_dim = q.shape
    block = keys.shape[2]
    if why := lacks_paged_attention(group, head_dim, block, q.dtype):
        raise ValueError(f"paged_attention lacks {why}")
    padded = pad_to(q, 2, 8)
    tables = pad_to(tables, 1, TILE // block)  # whole tiles
    layout = operand_layout(q.dtype, head_dim)
    ring = plgpu.SMEM((_STEPS, TILE, head_dim), q.dtype, transforms=layout)

    def body(*refs: Ref) -> None:
        count = len(_Inputs._fields)
        _attend(_Inputs(*refs[:count]), refs[count], _Memory(*refs[count + 1 :]), block, scale)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        scratch_types=_Memory(
            plgpu.SMEM((TILE, head_dim), q.dtype, transforms=layout),
            plgpu.SMEM((TILE, TILE), q.dtype, transforms=operand_layout(q.dtype, TILE)),
            ring,
            ring,
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=_STEPS, num_arrivals=2 * TILE // block),
        ),
        grid=(rows, heads),
        grid_names=("row", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_attention",
    )
    out: Array = kernel(padded, keys, values, tables.astype(jnp.int32), firsts, lengths)
    return out[:, :, :group]


class _Inputs(NamedTuple):
    q: Ref
    keys: Ref
    values: Ref
    tables: Ref
    firsts: Ref
    lengths: Ref


class _Memory(NamedTuple):
    """Shared memory: the queries, and at last what they see; weights of a tile; the ring."""

    own: Ref
    weights: Ref
    keys: Ref
    values: Ref
    own_loaded: Ref
    loaded: Ref


def _attend(of: _Inputs, out: Ref, memory: _Memory, block: int, scale: float) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    first, length = of.firsts[row], of.lengths[row]
    begin, end = lax.div(first, jnp.int32(TILE)), lax.div(length + (TILE - 1), jnp.int32(TILE))
    end = jnp.where(first < length, end, begin)
    own, padded = memory.own, out.shape[2]

    def fetch(tile: Array) -> None:
        slot = lax.rem(tile - begin, jnp.int32(_STEPS))
        for n in range(TILE // block):
            place, part = of.tables[row, tile * (TILE // block) + n], pl.ds(n * block, block)
            for source, ring in ((of.keys, memory.keys), (of.values, memory.values)):
                plgpu.copy_gmem_to_smem(
                    source.at[place, head], ring.at[slot, part], memory.loaded.at[slot]
                )

    plgpu.copy_gmem_to_smem(of.q.at[row, head], own.at[pl.ds(0, padded)], memory.own_loaded)
    for n in range(_STEPS):
        pl.when(begin + n < end)(functools.partial(fetch, begin + n))
    plgpu.barrier_wait(memory.own_loaded)

    def step(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, most, total = carry
        slot = lax.rem(tile - begin, jnp.int32(_STEPS))
        plgpu.barrier_wait(memory.loaded.at[slot])
        scores = _product(own, memory.keys.at[slot].transpose((1, 0)))
        at = tile * TILE + _iota((TILE, TILE), 1)
        is_seen = (at >= first) & (at < length)
        scores = jnp.where(is_seen, scores * (scale * math.log2(math.e)), -jnp.inf)
        above = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(above, scores.shape, [0]))
        fade = jnp.exp2(most - above)
        memory.weights[...] = weights.astype(own.dtype)
        values = memory.values.at[slot]
        start, stop = first - tile * TILE, length - tile * TILE
        pl.when((start > 0) | (stop < TILE))(lambda: _keep(values, start, stop))
        plgpu.commit_smem()
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0]) + _product(memory.weights, values)
        plgpu.commit_smem()  # all warps have read the slot
        pl.when(tile + _STEPS < end)(functools.partial(fetch, tile + _STEPS))
        return acc, above, total * fade + weights.sum(axis=1)

    def rows_of(value: float) -> Array:
        return plgpu.layout_cast(jnp.full((TILE,), value, jnp.float32), ROWS)

    acc = plgpu.layout_cast(jnp.zeros(own.shape, jnp.float32), plgpu.Layout.WGMMA)
    acc, _, total = lax.fori_loop(begin, end, step, (acc, rows_of(-jnp.inf), rows_of(0.0)))
    total = jnp.where(total == 0, 1.0, total)
    own[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(own.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own.at[pl.ds(0, padded)], out.at[row, head])
    plgpu.wait_smem_to_gmem(0)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _product(a: Ref, b: Ref) -> Array:
    def multiply(acc: Ref) -> Array:
        plgpu.wgmma(acc, a, b)
        product: Array = acc[...]
        return product

    found: Array = pl.run_scoped(multiply, accumulator(a.shape[0], b.shape[1]))
    return found


def _keep(tile: Ref, start: Array, stop: Array) -> None:
    """Zeros in all rows but those from `start` to `stop`: 0 times NaN would be NaN."""
    held, row = plgpu.load(tile, layout=plgpu.Layout.WGMMA), _iota(tile.shape, 0)
    tile[...] = jnp.where((row >= start) & (row < stop), held, jnp.zeros_like(held))
