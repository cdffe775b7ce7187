"""dx[t] = dv[t] @ A[i] where tiles have few tokens, lane by lane.

The life of a block:

    tile       which tokens, of which adapter          registers
    ring       8 ranks of A and of dv, part by part    shared memory, each warp for itself
    sums       8 tokens by a lane's 8 columns          registers, float32
    dx         rounded once                            device memory

A block takes a tile's tokens in eights. One of tokens without an adapter stores zeros.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.mosaic_gpu.backward.few import (
    CHUNK,
    COLUMNS,
    EACH,
    halves,
    launch,
    packed,
    place_of,
)
from pallas_kernels.mosaic_gpu.backward.squares import SIDE
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles
from pallas_kernels.mosaic_gpu.backward.wide import WidePart, by_range
from pallas_kernels.mosaic_gpu.lanes.values import Int, Machine, Real, Ref
from pallas_kernels.routing import SlotRange

_TOKENS = 8  # that a lane has sums of
_STAGES = 2  # of a warp's ring

# A stage: 16 bytes a lane for each of 8 ranks, and then 16 bytes of dv in each of the first places.
_A_WORDS = EACH * 32 * 4
_STAGE_WORDS = _A_WORDS + 32 * 4
_WARP_WORDS = _STAGES * _STAGE_WORDS
_WORDS = COLUMNS // CHUNK * _WARP_WORDS


class _Part(NamedTuple):
    """A part and its arrays in device memory; `height` rows have a plane of dv."""

    of: WidePart
    height: int
    dv: Ref
    a: Ref
    place: Ref


class _Block(NamedTuple):
    """What one block has: its tile's adapter, where its tokens start and how many there are; its
    tile's first row of dv; and its lanes' columns."""

    m: Machine
    rows: Ref
    dx: Ref
    features: int
    adapter: Int
    start: Int
    tokens: Int
    tile_row: Int
    column: Int

    def run(self, slots: SlotRange | None, parts: Sequence[_Part]) -> None:
        """Stores dx of the tile's tokens: the sum over the parts of its range."""
        m = self.m

        def eight(k: Int, _: list[Int]) -> list[Int]:
            sums = [m.real(0.0)] * (_TOKENS * EACH)
            for part in parts:
                assert slots is not None
                adapter = place_of(m, part.place, self.adapter - slots.first, part.of.shared)
                sums = self._add(part, adapter, k * _TOKENS, sums)
            self._put(k * _TOKENS, sums)
            return []

        m.loop((self.tokens + (_TOKENS - 1)) // _TOKENS, eight, [])

    def _stage(self, k: Int) -> Int:
        return self.m.tid // 32 * _WARP_WORDS + k % _STAGES * _STAGE_WORDS

    def _fetch(self, part: _Part, adapter: Int, first: Int, k: Int) -> None:
        """Starts to copy 8 ranks, of the tokens from number `first` on: those of stage k."""
        m, lane, stage, rank = self.m, self.m.tid % 32, self._stage(k), k * EACH
        is_rank = rank < part.of.lora_a.shape[1]
        for j in range(EACH):
            row = m.address(part.a, adapter * part.of.lora_a.shape[1] + rank + j, self.features)
            there = is_rank & (self.column < self.features)
            m.copy(stage + j * 128 + lane * 4, row, self.column, there)
        token = first + lane
        at = self.tile_row + part.of.nth * part.height + token
        row = m.address(part.dv, at, part.of.lora_a.shape[1])
        there = is_rank & (lane < _TOKENS) & (token < self.tokens)
        m.copy(stage + _A_WORDS + lane * 4, row, rank, there)
        m.commit()

    def _add(self, part: _Part, adapter: Int, first: Int, sums: list[Real]) -> list[Real]:
        """Adds what a part gives to the tokens from number `first` on."""
        m, lane = self.m, self.m.tid % 32
        m.warp_barrier()  # all lanes have read what the stages held
        self._fetch(part, adapter, first, m.integer(0))

        def step(k: Int, sums: list[Real]) -> list[Real]:
            self._fetch(part, adapter, first, k + 1)
            m.arrived(_STAGES - 1)
            m.warp_barrier()
            stage, dtype = self._stage(k), part.a.dtype
            a = [halves(m, stage + j * 128 + lane * 4, dtype) for j in range(EACH)]
            for t in range(_TOKENS):
                dv = halves(m, stage + (_A_WORDS + t * 4), dtype)
                own = sums[t * EACH : (t + 1) * EACH]
                for factor, row in zip(dv, a):
                    own = [m.fma(factor, one, total) for one, total in zip(row, own)]
                sums = [*sums[: t * EACH], *own, *sums[(t + 1) * EACH :]]
            m.warp_barrier()
            return sums

        sums = m.loop(m.integer(part.of.lora_a.shape[1] // EACH), step, sums)
        m.arrived(0)
        return sums

    def _put(self, first: Int, sums: list[Real]) -> None:
        m = self.m
        for t in range(_TOKENS):
            there = first + t < self.tokens
            token = m.load(m.address(self.rows, self.start, 1), first + t, there)
            own = sums[t * EACH : (t + 1) * EACH]
            to = m.address(self.dx, token, self.features)
            m.store(
                to,
                self.column,
                packed(m, own, self.dx.dtype),
                there & (self.column < self.features),
            )


def wide_few_kernel(
    parts: tuple[WidePart, ...], tiles: Tiles, num_tokens: int, dtype: DTypeLike
) -> Float[Array, "T H"]:
    """As `wide_kernel`."""
    features = parts[0].lora_a.shape[2]
    ranges = by_range(parts)
    column_blocks = -(-features // COLUMNS)
    operands = [tiles.table, tiles.rows]
    for part in parts:
        operands += [part.dv, part.lora_a, part.place]

    def body(m: Machine, arrays: Sequence[Ref], nth: Int) -> None:
        table, rows, *inputs, dx = arrays
        given = [
            _Part(part, part.dv.shape[1], *refs)
            for part, refs in zip(parts, itertools.batched(inputs, 3))
        ]
        tile = nth // column_blocks
        numbers = m.address(table, tile, 5)
        adapter, start, tokens = (m.load(numbers, i, m.tid >= 0) for i in range(3))
        column = nth % column_blocks * COLUMNS + m.tid * EACH
        block = _Block(m, rows, dx, features, adapter, start, tokens, tile * SIDE, column)
        has_none = tokens >= 1
        for slots, mine in ranges.items():
            holds = (adapter >= slots.first) & (adapter < slots.stop)
            m.when(holds, functools.partial(block.run, slots, [given[i] for i in mine]))
            has_none = has_none & ~holds
        m.when(has_none, functools.partial(block.run, None, []))

    ranks = "_".join(f"r{part.lora_a.shape[1]}" for part in parts)
    out = jax.ShapeDtypeStruct((num_tokens, features), dtype)
    blocks = tiles.count * column_blocks
    [dx] = launch(f"lora_wide_few_{ranks}", body, blocks, _WORDS, operands, [out])
    return dx
