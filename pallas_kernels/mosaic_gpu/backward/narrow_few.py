"""u[t] = x[t] @ A[i]^T and dv[t] = dy[t] @ B[i] where tiles have few tokens, lane by lane.

A block takes a tile, 8 ranks, and a share of the columns. The life of a block:

    tile       which tokens, of which adapter                   registers
    ring       8 columns of x or dy, and of A or B, of a lane   shared memory, each lane for itself
    sums       8 tokens by 8 ranks, of a lane's columns         registers, float32
    out        the sums of all lanes, in their order            shared memory, then device memory

A block takes a tile's tokens in eights.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.backward.few import COLUMNS, EACH, THREADS, halves, launch, place_of
from pallas_kernels.mosaic_gpu.backward.narrow import NarrowSum
from pallas_kernels.mosaic_gpu.backward.squares import SIDE
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.lanes.values import Flag, Int, Machine, Real, Ref

_TOKENS = 8  # that a lane has sums of
_STAGES = 2
_MOST_SHARES = 16

# A stage: 16 bytes a lane for each of 8 tokens, and for each of 8 ranks, or columns of B.
_HALF_WORDS = EACH * THREADS * 4
_STAGE_WORDS = 2 * _HALF_WORDS
# Sums of the lanes, one row for each of 64: a word more, lest those of a lane lie in one bank.
_ROW_WORDS = THREADS + 1
_WORDS = _STAGES * _STAGE_WORDS


class _Refs(NamedTuple):
    """Arrays in device memory: as in `Tiles` and `NarrowSum`, and what comes out."""

    table: Ref
    rows: Ref
    wide: Ref
    weights: Ref
    place: Ref
    out: Ref


class _Job(NamedTuple):
    """A sum's blocks are those from `first_block` on: for each of `tiles` tiles, for each of 8
    ranks, for each of `split` shares one. A share has `laps` times the columns of a block. What
    they sum is number `nth` of array `out`."""

    sum: NarrowSum
    out: int
    nth: int
    tiles: int
    split: int
    first_block: int

    @property
    def laps(self) -> int:
        return -(-self.sum.columns // (COLUMNS * self.split))

    @property
    def rank_blocks(self) -> int:
        return self.sum.rank // EACH

    @property
    def blocks(self) -> int:
        return self.tiles * self.rank_blocks * self.split


class _Block(NamedTuple):
    """What one block has: its job, its tile, that one's adapter and tokens, its share, and its
    first rank; and the first of its adapter's rows of the weights."""

    m: Machine
    job: _Job
    refs: _Refs
    tile: Int
    start: Int
    tokens: Int
    share: Int
    rank: Int
    weights_row: Int

    def run(self) -> None:
        m = self.m

        def eight(k: Int, _: list[Int]) -> list[Int]:
            first = k * _TOKENS
            self._put(first, self._sums(first))
            return []

        m.loop((self.tokens + (_TOKENS - 1)) // _TOKENS, eight, [])

    def _place(self, lap: Int) -> tuple[Int, Int, Flag]:
        """A lap's stage, the lane's first column there, and whether there is one."""
        share = self.job.laps * COLUMNS
        within = lap * COLUMNS + self.m.tid * EACH
        column = self.share * share + within
        is_column = (column < self.job.sum.columns) & (within < share)
        return lap % _STAGES * _STAGE_WORDS + self.m.tid * 4, column, is_column

    def _fetch(self, first: Int, lap: Int) -> None:
        """Starts to copy what a lap takes of the tokens from number `first` on."""
        m, one, refs = self.m, self.job.sum, self.refs
        stage, column, is_column = self._place(lap)
        sorted_tokens = m.address(refs.rows, self.start, 1)
        for t in range(_TOKENS):
            there = first + t < self.tokens
            token = m.load(sorted_tokens, first + t, there)
            wide = m.address(refs.wide, token, one.wide.shape[1])
            m.copy(stage + t * (4 * THREADS), wide, column + one.first, there & is_column)
        for j in range(EACH):
            if one.ranks_first:
                row, at = m.address(refs.weights, self.weights_row + j, one.columns), column
            else:
                row, at = (
                    m.address(refs.weights, self.weights_row + column + j, one.rank),
                    self.rank,
                )
            m.copy(stage + (_HALF_WORDS + j * (4 * THREADS)), row, at, is_column)
        m.commit()

    def _sums(self, first: Int) -> list[Real]:
        """Of 8 tokens from number `first` on, and 8 ranks: those over the lane's columns."""
        m, one = self.m, self.job.sum
        self._fetch(first, m.integer(0))

        def step(lap: Int, sums: list[Real]) -> list[Real]:
            self._fetch(first, lap + 1)
            m.arrived(_STAGES - 1)
            stage, _, _ = self._place(lap)
            weights = [
                halves(m, stage + (_HALF_WORDS + j * (4 * THREADS)), self.refs.weights.dtype)
                for j in range(EACH)
            ]
            by_rank = weights if one.ranks_first else list(zip(*weights))
            for t in range(_TOKENS):
                wide = halves(m, stage + t * (4 * THREADS), self.refs.wide.dtype)
                for r, row in enumerate(by_rank):
                    for a, b in zip(wide, row):
                        sums[t * EACH + r] = m.fma(a, b, sums[t * EACH + r])
            return sums

        sums = m.loop(m.integer(self.job.laps), step, [m.real(0.0)] * (_TOKENS * EACH))
        m.arrived(0)
        return sums

    def _put(self, first: Int, sums: list[Real]) -> None:
        """Stores the sums of all lanes. Two lanes take one, and add up half of the lanes each."""
        m, half = self.m, self.m.tid // (_TOKENS * EACH)
        nth, each = m.tid % (_TOKENS * EACH), THREADS // 2
        m.barrier()  # all have read the ring, in whose memory the sums lie
        for i, one in enumerate(sums):
            m.put(m.tid + i * _ROW_WORDS, [m.as_word(one)])
        m.barrier()
        mine = nth * _ROW_WORDS + half * each
        total = functools.reduce(
            operator.add, [m.as_real(m.get(mine + i, 1)[0]) for i in range(each)]
        )
        m.barrier()
        m.put(m.tid, [m.as_word(total)])
        m.barrier()
        other = m.as_real(m.get(nth + each, 1)[0])
        shares = self.job.nth * self.job.split + self.share
        row = shares * (self.job.tiles * SIDE) + self.tile * SIDE + first + nth // EACH
        to = m.address(self.refs.out, row, self.job.sum.rank)
        m.store(to, self.rank + nth % EACH, [m.as_word(total + other)], half < 1)
        m.barrier()


def narrow_few_kernel(
    alike: tuple[tuple[NarrowSum, ...], ...], tiles: Tiles
) -> list[Float[Array, "sums split rows K"]]:
    """As `narrow_kernel`."""
    columns = max(one.columns for some in alike for one in some)
    split = min(_MOST_SHARES, -(-columns // COLUMNS))
    jobs: list[_Job] = []
    for i, some in enumerate(alike):
        for nth, one in enumerate(some):
            before = jobs[-1].first_block + jobs[-1].blocks if jobs else 0
            jobs.append(_Job(one, i, nth, tiles.count, split, before))
    operands = [tiles.table, tiles.rows]
    for job in jobs:
        operands += [job.sum.wide, job.sum.weights, job.sum.place]

    def body(m: Machine, arrays: Sequence[Ref], nth: Int) -> None:
        outs = arrays[len(operands) :]
        for i, job in enumerate(jobs):
            wide, weights, place = arrays[2 + 3 * i : 5 + 3 * i]
            refs = _Refs(arrays[0], arrays[1], wide, weights, place, outs[job.out])
            own = nth - job.first_block
            m.when((own >= 0) & (own < job.blocks), functools.partial(_run, m, job, refs, own))

    ranks = "_".join(dict.fromkeys(f"r{job.sum.rank}" for job in jobs))
    shapes = [(len(some), split, tiles.count * SIDE, some[0].rank) for some in alike]
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    blocks = jobs[-1].first_block + jobs[-1].blocks
    return launch(f"lora_narrow_few_{ranks}", body, blocks, _WORDS, operands, outs)


def _run(m: Machine, job: _Job, refs: _Refs, nth: Int) -> None:
    """Block number `nth` of a job."""
    one, always = job.sum, m.tid >= 0
    tile, within = nth // (job.rank_blocks * job.split), nth % (job.rank_blocks * job.split)
    share, rank = within // job.rank_blocks, within % job.rank_blocks * EACH
    numbers = m.address(refs.table, tile, 5)
    adapter, start, tokens = (m.load(numbers, i, always) for i in range(3))

    def run() -> None:
        mine = place_of(m, refs.place, adapter - one.slots.first, one.shared)
        row = mine * one.rank + rank if one.ranks_first else mine * one.columns
        _Block(m, job, refs, tile, start, tokens, share, rank, row).run()

    m.when((adapter >= one.slots.first) & (adapter < one.slots.stop), run)
