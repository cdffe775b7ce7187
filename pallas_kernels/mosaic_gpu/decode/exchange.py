"""v, the sum over all columns of H: of warps, then of blocks, through shared memory in fixed order.

Each block adds up its warps' sums. It pushes the result, a sheet, to the blocks of the cluster.
Then each block adds up the sheets that it received. If there are many columns of v (`scatters`), a
block gets and adds up an equal number of them alone, and then pushes the result to all. A lane
takes four columns at a time (`quads`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Refs, Task
from pallas_kernels.mosaic_gpu.decode.work import TOKENS
from pallas_kernels.mosaic_gpu.lanes.values import Address, Flag, Int, Number, Real, Ref


class Quad(NamedTuple):
    """4 columns of a token's v, from `column` on, that a lane takes where `here` holds.

    `copy`: which of the lanes that take the same columns this is.
    """

    copy: Int
    token: Int
    column: Int
    here: Flag


def quads(
    lane: Lane, count: Int, start: Number, columns: int, times: int = 1, *, by_warp: bool = False
) -> Iterator[Quad]:
    """`columns` from `start` on of `count` tokens, `times` each, dealt to the lanes of the block,
    or if `by_warp`, to those of each warp."""
    wide = columns // 4
    me, lanes = (lane.number, 32) if by_warp else (lane.m.tid, 32 * lane.work.warps)
    total = TOKENS * wide * times
    for first in range(0, total, lanes):
        i = me + first
        t = i // wide % TOKENS
        here = t < count if total % lanes == 0 else (t < count) & (i < total)
        yield Quad(i // (wide * TOKENS), t, i % wide * 4 + start, here)


def exchange(lane: Lane, task: Task, refs: Refs) -> None:
    """The sums of all warps become v, in shared memory, or, without an expand, are added to y.

    Called by kernel.py when the warps have put their sums. Where it returns after a barrier of the
    cluster, v is there for all; else what reads it needs one more barrier.
    """
    lane.m.barrier()
    for bundle in task.job.bundles:
        _send(lane, task, bundle.first, bundle.columns)
    lane.m.cluster_barrier()
    if lane.work.scatters:
        _tell(lane, task)
        lane.m.cluster_barrier()
        return
    for bundle in task.job.bundles:
        count = task.tokens.size
        for quad in quads(lane, count, bundle.first, bundle.columns, by_warp=lane.work.own_v):
            place = lane.at.block_sums + quad.token * lane.at.received_stride + quad.column
            total = _scaled(lane, task, place, quad.column, bundle.parts)
            if lane.case.expands:
                lane.m.put(_place_of_v(lane, quad), _operands(lane, total), quad.here)
            else:
                here = quad.here & lane.m.equal(lane.share, 0)
                _add_to_y(lane, task, refs.ys[0], quad._replace(here=here), total)


def load_v(lane: Lane, task: Task, x: Ref) -> None:
    """v as it is given, of an expand alone, to shared memory; called by kernel.py."""
    for bundle in task.job.bundles:
        count = task.tokens.size
        for quad in quads(lane, count, bundle.first, bundle.columns, by_warp=lane.work.own_v):
            _, words = _words_of(lane, task, x, lane.case.features, quad)
            values = _floats(lane, words, lane.case.x_dtype)
            lane.m.put(_place_of_v(lane, quad), _operands(lane, values), quad.here)


def _send(lane: Lane, task: Task, first: int, columns: int) -> None:
    """Sums of the block's warps, to the blocks that add up these columns."""
    m, at, own = lane.m, lane.at, lane.work.own_columns(task.job)
    lanes = 1 if lane.work.scatters else _senders(lane, columns)
    for quad in quads(lane, task.tokens.size, first, columns, lanes):
        sums = at.warp_first + at.sums + quad.token * at.sum_stride + quad.column
        total = _added(lane, sums, lane.work.warps, at.warp_words)
        words = [m.as_word(value) for value in total]
        place = at.block_sums + lane.share * at.sheet + quad.token * at.received_stride
        if lane.work.scatters:
            m.push(quad.column // own, place + quad.column % own, words, quad.here)
        else:
            _to_blocks(lane, lanes, quad, place + quad.column, words)


def _tell(lane: Lane, task: Task) -> None:
    """The columns of v that are the block's own, added up and rounded, to all blocks."""
    own, at = lane.work.own_columns(task.job), lane.at
    lanes = _senders(lane, own)
    for quad in quads(lane, task.tokens.size, lane.share * own, own, lanes):
        here = quad.here & (quad.column < lane.work.job_ranks(task.job))
        column = quad.column - lane.share * own
        place = at.block_sums + quad.token * at.received_stride + column
        total = _scaled(lane, task, place, quad.column, task.job.parts)
        place = _place_of_v(lane, quad)
        _to_blocks(lane, lanes, quad._replace(here=here), place, _operands(lane, total))


def _receivers(lane: Lane) -> int:
    return lane.work.split if lane.case.expands else 1


def _senders(lane: Lane, columns: int) -> int:
    """How many lanes send the same columns, each to its own blocks: as many as there are."""
    most = min(_receivers(lane), 32 * lane.work.warps // (TOKENS * columns // 4))
    return 1 << max(0, most.bit_length() - 1)


def _to_blocks(lane: Lane, senders: int, quad: Quad, place: Int, words: list[Int]) -> None:
    """Pushes the words to those blocks that are this lane's, of `senders` that share them."""
    receivers = _receivers(lane)
    each = receivers // senders
    for n in range(each):
        block = lane.m.minimum(quad.copy * each + n, receivers - 1)
        lane.m.push(block, place, words, quad.here)


def _added(lane: Lane, place: Int, times: int, stride: int) -> list[Real]:
    """The sum, in order, of 4 floats in so many places."""
    m = lane.m
    total = [m.as_real(word) for word in m.get(place, 4)]
    for n in range(1, times):
        more = [m.as_real(word) for word in m.get(place + n * stride, 4)]
        total = [a + b for a, b in zip(total, more)]
    return total


def _scaled(lane: Lane, task: Task, place: Int, column: Int, parts: Sequence[int]) -> list[Real]:
    """What all blocks have together, of columns of v that belong to one of these parts."""
    total, scales = _added(lane, place, lane.work.split, lane.at.sheet), task.stacks.scales
    if lane.case.is_eight_bits:
        factors = lane.m.get(lane.at.factors + column, 4)
        return [s * lane.m.as_real(factor) for s, factor in zip(total, factors)]
    scale = scales[parts[0]]
    for p in parts[1:]:
        scale = lane.m.select(column < task.job.columns[p], scale, scales[p])
    return [s * scale for s in total]


def _operands(lane: Lane, total: list[Real]) -> list[Int]:
    """Columns of v as the expand takes them."""
    return [lane.m.pack(total[n], total[n + 1], lane.case.dtype) for n in (0, 2)]


def _place_of_v(lane: Lane, quad: Quad) -> Int:
    return lane.v + quad.token * lane.at.v_stride + quad.column // 2


def _words_of(
    lane: Lane, task: Task, ref: Ref, width: int, quad: Quad
) -> tuple[Address, list[Int]]:
    """A token's row of an array, and the words of its 4 columns there."""
    m = lane.m
    token = m.select(quad.here, quad.token, 0)
    row = m.address(ref, m.get(task.tokens.rows + token, 1)[0], width)
    each = 4 // row.dtype.itemsize  # columns of a word
    words = [m.load(row, quad.column + n, quad.here, fixed=False) for n in range(0, 4, each)]
    return row, words


def _floats(lane: Lane, words: list[Int], dtype: np.dtype) -> list[Real]:
    if dtype == np.float32:
        return [lane.m.as_real(word) for word in words]
    return [value for word in words for value in lane.m.unpack(word, dtype)]


def _add_to_y(lane: Lane, task: Task, y: Ref, quad: Quad, total: list[Real]) -> None:
    """y += v in device memory, rounded once, of a shrink alone."""
    m, dtype = lane.m, lane.case.y_dtype
    row, old = _words_of(lane, task, y, lane.case.y_widths[0], quad)
    new = [a + b for a, b in zip(_floats(lane, old, dtype), total)]
    if dtype == np.float32:
        words = [m.as_word(value) for value in new]
    else:
        words = [m.pack(new[n], new[n + 1], dtype) for n in (0, 2)]
    m.store(row, quad.column, words, quad.here)
