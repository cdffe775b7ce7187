"""Rows of a tile's tokens, which may lie anywhere in an array, to and from squares.

Pallas copies one row after the other, each with a barrier, which takes longer than the bytes. So
the lanes copy by themselves here: eight of them a row of a square, 16 bytes each. Shared memory is
swizzled: part c of row r lies at place c ^ (r % 8). Such copies have no barrier. Each lane closes a
group of its copies for each step of a ring, and waits for all groups but the last ones.

Pallas's interpreter runs no such code: there the rows are copied by Pallas, in a loop.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.backward.squares import ROW_BYTES, SIDE, Squares
from pallas_kernels.mosaic_gpu.lanes import Gpu, MemRef
from pallas_kernels.mosaic_gpu.lanes.values import Int
from pallas_kernels.mosaic_gpu.layouts import (
    Ref,
    end_group,
    interpreted,
    plain_layout,
    wait_for_groups,
)

_REFS = (plgpu.RefType(), plgpu.RefType(), plgpu.RefType(plain_layout(ROW_BYTES)))
_NUMBERS = (plgpu.Layout.WG_SPLAT,) * 3
_HALF = np.dtype(np.float16)  # or bfloat16, which is as large
_PARTS = ROW_BYTES // 16
_AT_ONCE = 128 // _PARTS  # rows that the lanes copy at a time


def fetch_rows(
    array: Ref, tokens: Ref, where: tuple[Array, Array, Array], memory: Squares, slot: Array,
    loaded: Ref,
) -> None:  # fmt: skip
    """Starts to copy to the squares `memory.rows[slot]`; `where` are start, count and column. The
    rows are those of tokens[start], tokens[start + 1] and so on, `count` of them. Behind them are
    zeros; in the interpreter, the last of them again. Its barriers `loaded` hear of each row."""
    if not interpreted():
        _fetch_by_lanes(array, tokens, memory.rows.at[slot], *where)
        return
    start, count, column = where

    def row(r: Array, _: None) -> None:
        token = tokens[start + jnp.minimum(r, count - 1)]
        for j in range(memory.rows.shape[1]):
            plgpu.copy_gmem_to_smem(
                array.at[pl.ds(token, 1), pl.ds(column + j * SIDE, SIDE)],
                memory.rows.at[slot, j, pl.ds(r, 1)],
                loaded.at[slot],
            )

    lax.fori_loop(jnp.int32(0), jnp.int32(SIDE), row, None)


def close_fetched() -> None:
    """Closes a group of what `fetch_rows` copies: once in each step of a ring, copies or not."""
    if not interpreted():
        end_group()


def wait_for_rows(pending: int, loaded: Ref) -> None:
    """Waits for what `fetch_rows` copies, but for the last `pending` groups."""
    if interpreted():
        plgpu.barrier_wait(loaded)
        return
    wait_for_groups(pending)


def put_rows(
    square: Ref, array: Ref, tokens: Ref, start: Array, count: Array, column: Array
) -> None:
    """Copies the first `count` rows of a square, one of `Squares.rows`, to their tokens' rows."""
    if not interpreted():
        _put_by_lanes(array, tokens, square, start, count, column)
        return

    def row(r: Array, _: None) -> None:
        plgpu.copy_smem_to_gmem(
            square.at[pl.ds(r, 1)], array.at[pl.ds(tokens[start + r], 1), pl.ds(column, SIDE)]
        )

    lax.fori_loop(jnp.int32(0), count, row, None)


@plgpu.inline_mgpu(arg_types=(*_REFS, *_NUMBERS))  # type: ignore[untyped-decorator]
def _fetch_by_lanes(
    _: object, array: ir.Value, tokens: ir.Value, squares: ir.Value, *where: mgpu.FragmentedArray
) -> None:
    m = Gpu(squares, begins=False)
    start, count, column = map(m.uniform, where)
    columns, number_of_squares = _shape(array)[1], _shape(squares)[0]
    table, part = m.address(MemRef(tokens, np.dtype(np.int32)), m.integer(0), 1), m.tid % _PARTS
    m.barrier()  # no lane still reads these squares
    for first in range(0, SIDE, _AT_ONCE):
        row = m.tid // _PARTS + first
        token = m.load(table, start + row, row < count)
        source = m.address(MemRef(array, _HALF), token, columns)
        for j in range(number_of_squares):
            here = column + (part * 8 + j * SIDE)
            m.copy(
                _word(row, part) + j * SIDE * ROW_BYTES // 4,
                source,
                here,
                (row < count) & (here < columns),
            )


@plgpu.inline_mgpu(arg_types=(*_REFS, *_NUMBERS))  # type: ignore[untyped-decorator]
def _put_by_lanes(
    _: object, array: ir.Value, tokens: ir.Value, square: ir.Value, *where: mgpu.FragmentedArray
) -> None:
    m = Gpu(square, begins=False)
    start, count, column = map(m.uniform, where)
    columns = _shape(array)[1]
    table, part = m.address(MemRef(tokens, np.dtype(np.int32)), m.integer(0), 1), m.tid % _PARTS
    here = column + part * 8
    for first in range(0, SIDE, _AT_ONCE):
        row = m.tid // _PARTS + first
        is_row = (row < count) & (here < columns)
        target = m.address(MemRef(array, _HALF), m.load(table, start + row, is_row), columns)
        m.store(target, here, m.get(_word(row, part), 4), is_row)


def _word(row: Int, part: Int) -> Int:
    """Where a part of a row lies in a square, in words."""
    return row * (ROW_BYTES // 4) + (part ^ (row % _PARTS)) * 4


def _shape(ref: ir.Value) -> list[int]:
    return list(ir.MemRefType(ref.type).shape)
