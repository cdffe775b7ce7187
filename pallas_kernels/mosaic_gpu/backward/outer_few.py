"""The gradients of A and B where slots have few tokens, lane by lane.

    dA[i] = sum of dv[t]^T x[t]       dB[i] = sum of dy[t]^T v[t]       over the tokens t of slot i

A lane has the sums of 8 columns by 8 ranks. The life of a block:

    slot       which tokens                            registers
    ring       8 columns of x or dy, 8 ranks of dv     shared memory, each warp for itself
    sums       columns by ranks                        registers, float32

A warp takes 256 columns. If a slot has more than `_ALONE` tokens, all warps of a block take the
same columns, one fourth of the tokens each, and add up their sums in order. So the order of a sum
follows from the slot's own tokens, and there are no atomics.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array

from pallas_kernels.mosaic_gpu.backward.few import (
    CHUNK,
    COLUMNS,
    EACH,
    WARPS,
    halves,
    launch,
    packed,
)
from pallas_kernels.mosaic_gpu.backward.outer import OuterSum
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.lanes.values import Flag, Int, Machine, Real, Ref

_TOKENS = 4  # that a warp takes at a time
_STAGES = 4  # of its ring
_ALONE = 16  # tokens of a slot that one warp takes by itself

# A stage: for each token 16 bytes a lane, and then 16 bytes of ranks in each of the first places.
_WIDE_WORDS = _TOKENS * 32 * 4
_STAGE_WORDS = _WIDE_WORDS + 32 * 4
_WORDS = WARPS * _STAGES * _STAGE_WORDS


class _Refs(NamedTuple):
    """Arrays in device memory: as in `OuterSum`, `Tiles.rows` and `Tiles.slot_tokens`."""

    rows: Ref
    wide: Ref
    narrow: Ref
    slot_tokens: Ref
    out: Ref


class _Plan(NamedTuple):
    """One sum: its blocks are those from `first_block` on, and `height` rows have a plane of
    `narrow`."""

    sum: OuterSum
    height: int
    width: int
    first_block: int

    @property
    def rank_blocks(self) -> int:
        return self.sum.rank // EACH

    @property
    def column_blocks(self) -> int:
        return -(-self.sum.columns // COLUMNS)

    @property
    def blocks(self) -> int:
        return self.sum.slots * self.column_blocks * self.rank_blocks


class _Block(NamedTuple):
    """What one block has: its sum, its slot, its first column and rank; where the slot's tokens
    start in the rows of the tiles and in the sorted ones, and how many there are."""

    m: Machine
    plan: _Plan
    refs: _Refs
    slot: Int
    column: Int
    rank: Int
    tile_row: Int
    start: Int
    tokens: Int

    @classmethod
    def of(cls, m: Machine, plan: _Plan, refs: _Refs, nth: Int) -> "_Block":
        per_slot = plan.column_blocks * plan.rank_blocks
        slot, place = nth // per_slot, nth % per_slot
        table, always = m.address(refs.slot_tokens, slot, 3), m.tid >= 0
        numbers = (m.load(table, i, always) for i in range(3))
        column = place // plan.rank_blocks * COLUMNS
        return cls(m, plan, refs, slot, column, place % plan.rank_blocks * EACH, *numbers)

    def run(self) -> None:
        m, warp = self.m, self.m.tid // 32
        together = self.tokens >= _ALONE + 1
        laps = m.select(together, m.integer(WARPS), 1)

        def lap(k: Int, _: list[Int]) -> list[Int]:
            chunk = m.select(together, k, warp)
            column = self.column + chunk * CHUNK + m.tid % 32 * EACH
            warp_tokens = _Tokens(self, column, m.select(together, warp, 0), laps)
            sums = warp_tokens.sums()
            m.when(~together, lambda: self._put_own(column, sums))
            m.when(together, lambda: self._put_together(column, sums))
            return []

        m.loop(laps, lap, [])

    def _put_own(self, column: Int, sums: list[Real]) -> None:
        for i in range(EACH):
            self._put(column, self.m.integer(i), sums[EACH * i : EACH * (i + 1)])

    def _put_together(self, column: Int, sums: list[Real]) -> None:
        """Adds up the warps' sums, in the memory of their rings. Each puts two eighths of them."""
        m, warp, lane = self.m, self.m.tid // 32, self.m.tid % 32
        each = len(sums) * 32
        m.barrier()
        for i, one in enumerate(sums):
            m.put(warp * each + (lane + i * 32), [m.as_word(one)])
        m.barrier()
        for half in range(2):
            nth = warp * 2 + half
            total = []
            for j in range(EACH):
                place = (nth * EACH + j) * 32 + lane
                shares = [m.as_real(m.get(place + w * each, 1)[0]) for w in range(WARPS)]
                total.append(functools.reduce(operator.add, shares))
            self._put(column, nth, total)
        m.barrier()

    def _put(self, column: Int, i: Int, values: list[Real]) -> None:
        """Stores 16 bytes: rank number `i` of 8 columns, or column number `i` of 8 ranks."""
        m, one, out = self.m, self.plan.sum, self.refs.out
        words = packed(m, values, out.dtype)
        is_column = column < one.columns
        if one.ranks_first:
            to = m.address(out, self.slot * one.rank + self.rank + i, one.columns)
            m.store(to, column, words, is_column)
        else:
            to = m.address(out, self.slot * one.columns + column + i, one.rank)
            m.store(to, self.rank, words, is_column)


class _Tokens(NamedTuple):
    """The tokens that a warp takes of its block's slot: from number `first` on each `stride`th. Its
    lanes take 8 columns each, from `column` on."""

    block: _Block
    column: Int
    first: Int
    stride: Int

    @property
    def _memory(self) -> Int:
        return self.block.m.tid // 32 * (_STAGES * _STAGE_WORDS)

    def _stage(self, k: Int) -> Int:
        return self._memory + k % _STAGES * _STAGE_WORDS

    def _nth(self, n: Int) -> tuple[Int, Flag]:
        """The number of the warp's nth token among the slot's, and whether there is one."""
        number = n * self.stride + self.first
        return number, number < self.block.tokens

    def _fetch(self, k: Int) -> None:
        """Starts to copy what stage k has; zeros for tokens that are not there."""
        block, m, lane, stage = self.block, self.block.m, self.block.m.tid % 32, self._stage(k)
        one, refs = block.plan.sum, block.refs
        sorted_tokens = m.address(refs.rows, block.start, 1)
        is_column = self.column < one.columns
        for j in range(_TOKENS):
            number, there = self._nth(k * _TOKENS + j)
            token = m.load(sorted_tokens, number, there)
            row = m.address(refs.wide, token, block.plan.width)
            m.copy(stage + j * 128 + lane * 4, row, self.column + one.first, there & is_column)
        number, there = self._nth(k * _TOKENS + lane)
        first = block.tile_row + one.nth * block.plan.height
        row = m.address(refs.narrow, first + number, one.rank)
        m.copy(stage + _WIDE_WORDS + lane * 4, row, block.rank, there & (lane < _TOKENS))
        m.commit()

    def sums(self) -> list[Real]:
        """Of 8 ranks by 8 columns, or of 8 columns by 8 ranks, as the gradient lies."""
        m = self.block.m
        mine = (self.block.tokens + (self.stride - 1) - self.first) // self.stride
        steps = (mine + (_TOKENS - 1)) // _TOKENS

        def first() -> None:
            for k in range(_STAGES - 1):
                self._fetch(m.integer(k))

        m.when(steps >= 1, first)

        def step(k: Int, sums: list[Real]) -> list[Real]:
            m.arrived(_STAGES - 2)
            m.warp_barrier()  # and all lanes have read the stage before
            self._fetch(k + (_STAGES - 1))
            return self._add(k, sums)

        sums = m.loop(steps, step, [m.real(0.0)] * EACH**2)
        m.arrived(0)
        m.warp_barrier()
        return sums

    def _add(self, k: Int, sums: list[Real]) -> list[Real]:
        m, one, dtype = self.block.m, self.block.plan.sum, self.block.refs.wide.dtype
        lane, stage = m.tid % 32, self._stage(k)
        for j in range(_TOKENS):
            wide = halves(m, stage + j * 128 + lane * 4, dtype)
            narrow = halves(m, stage + (_WIDE_WORDS + j * 4), dtype)
            left, right = (narrow, wide) if one.ranks_first else (wide, narrow)
            pairs = ((a, b) for a in left for b in right)
            sums = [m.fma(a, b, total) for (a, b), total in zip(pairs, sums)]
        return sums


def outer_few_kernel(sums: tuple[OuterSum, ...], tiles: Tiles) -> list[Array]:
    """As `outer_kernel`. No slots share what is summed."""
    plans: list[_Plan] = []
    for one in sums:
        before = plans[-1].first_block + plans[-1].blocks if plans else 0
        plans.append(_Plan(one, one.narrow.shape[1], one.wide.shape[1], before))
    operands = [tiles.rows]
    for one in sums:
        operands += [one.wide, one.narrow, tiles.slot_tokens(one.wanted)]

    def body(m: Machine, arrays: Sequence[Ref], nth: Int) -> None:
        inputs, outs = arrays[1 : len(operands)], arrays[len(operands) :]
        for i, plan in enumerate(plans):
            wide, narrow, slot_tokens = inputs[3 * i : 3 * i + 3]
            refs = _Refs(arrays[0], wide, narrow, slot_tokens, outs[i])
            own = nth - plan.first_block
            m.when((own >= 0) & (own < plan.blocks), functools.partial(_run, m, plan, refs, own))

    ranks = "_".join(dict.fromkeys(f"r{one.rank}" for one in sums))
    blocks = plans[-1].first_block + plans[-1].blocks
    outs = [one.out for one in sums]
    return launch(f"lora_outer_few_{ranks}", body, blocks, _WORDS, operands, outs)


def _run(m: Machine, plan: _Plan, refs: _Refs, nth: Int) -> None:
    _Block.of(m, plan, refs, nth).run()
