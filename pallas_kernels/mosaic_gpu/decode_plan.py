"""How the decode kernel cuts work and shared memory: what follows from shapes and config."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.config import MAX_DECODE_TOKENS, Config
from pallas_kernels.mosaic_gpu.tiles import Cut, cuts

TOKENS = 8  # of a cluster: rows of mma's operand
UNIT = 64  # columns of x and A that a warp takes in turn: a line of 128 bytes
COLUMNS = 32  # columns of y that a warp takes in turn
_TILES = 8  # of 8 ranks, whose sums are in registers at once
_RANKS = 128  # ranks of B in a warp's turn, at most
_JOB_RANKS = 128  # of parts whose sums are exchanged together, unless one part has more
# Of shared memory, for four, two or one block on a multiprocessor, each with 1 KiB of its own.
_SHARED_BYTES = (55 * 1024, 112 * 1024, 225 * 1024)
_MULTIPROCESSORS = 132


class DecodePart(NamedTuple):
    """One stack: lora_a `[L, R, H]`, lora_b `[L, N, R]`, scales `[1]` or `[L]`, which of the ids
    (an index), first column."""

    lora_a: Float[Array, "L R H"]
    lora_b: Float[Array, "L N R"]
    scales: Float[Array, " S"]
    ids: int
    y_offset: int


class _Part(NamedTuple):
    rank: int
    width: int
    slots: int
    own_scales: bool
    ids: int
    y_offset: int


class Bundle(NamedTuple):
    """Tiles of 8 ranks, (part, tile), that are multiplied at once; their first column of v."""

    tiles: tuple[tuple[int, int], ...]
    first: int


class Piece(NamedTuple):
    """Columns [start, stop) of y, to which a part adds."""

    start: int
    stop: int
    part: int


class Job(NamedTuple):
    """Parts with the same ids, whose sums are exchanged together."""

    parts: tuple[int, ...]
    bundles: list[Bundle]
    strips: list[list[Piece]]  # the pieces of a strip have one rank, and different columns
    columns: dict[int, int]  # each part's first column of v


class Plan(NamedTuple):
    """What follows from shapes and config."""

    tokens: int
    features: int
    y_width: int
    dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]
    parts: tuple[_Part, ...]
    jobs: tuple[Job, ...]
    split: int
    warps: int
    column_clusters: int
    a_stages: int
    b_stages: int

    @property
    def ranks(self) -> int:
        """Columns of v, at most."""
        return max(sum(self.parts[p].rank for p in job.parts) for job in self.jobs)

    @property
    def lists(self) -> dict[int, int]:
        """Slots of the stacks, by the number of the ids."""
        return {part.ids: part.slots for part in self.parts}

    @property
    def clusters(self) -> int:
        """The most that can have work: each adapter may leave one with fewer than 8 tokens."""
        if len(self.lists) > 1:
            return self.tokens
        [slots] = self.lists.values()
        groups = min(self.tokens, slots)
        return (self.tokens + (TOKENS - 1) * groups) // TOKENS

    @property
    def share_units(self) -> int:
        """Units of H that are a block's."""
        return pl.cdiv(pl.cdiv(self.features, UNIT), self.split)

    @property
    def blocks(self) -> int:
        """Blocks that deal y's columns."""
        return self.split * self.column_clusters

    def share(self, piece: Piece) -> int:
        """How many times 32 columns are a block's, at most."""
        return pl.cdiv(pl.cdiv(piece.stop - piece.start, COLUMNS), self.blocks)

    def turns(self, strip: list[Piece]) -> int:
        """How many times 32 columns are a warp's, at most."""
        return sum(pl.cdiv(self.share(piece), self.warps) for piece in strip)

    def chunks(self, strip: list[Piece]) -> int:
        """In how many parts a warp takes the ranks of B."""
        rank = self.parts[strip[0].part].rank
        return rank // turn_ranks(rank)

    # Shared memory, in words. Strides keep a warp's lanes in different banks.
    @property
    def masks(self) -> int:
        return 0

    @property
    def rows(self) -> int:
        return MAX_DECODE_TOKENS // 32

    @property
    def numbers(self) -> int:
        return self.rows + TOKENS

    @property
    def ids_stride(self) -> int:
        return pl.cdiv(self.tokens, 32) * 32

    @property
    def ids(self) -> int:
        return self.numbers + self.ids_stride

    @property
    def v(self) -> int:
        return self.ids + len(self.lists) * self.ids_stride

    @property
    def v_stride(self) -> int:
        return self.ranks // 2 + 4

    @property
    def block_sums(self) -> int:
        return self.v + TOKENS * self.v_stride

    @property
    def sum_stride(self) -> int:
        return self.ranks + 8

    @property
    def a_slot(self) -> int:
        tiles = max(len(bundle.tiles) for job in self.jobs for bundle in job.bundles)
        return (1 + tiles) * 8 * UNIT // 2

    @property
    def b_words(self) -> int:
        """Words of B in a slot; y's columns follow."""
        return COLUMNS * max(turn_ranks(part.rank) for part in self.parts) // 2

    @property
    def b_slot(self) -> int:
        return self.b_words + TOKENS * COLUMNS * self.y_dtype.itemsize // 4

    @property
    def warp_sums(self) -> int:
        """The first warp's; a warp's ring follows its sums."""
        return self.block_sums + self.split * TOKENS * self.sum_stride

    @property
    def ring(self) -> int:
        """The first warp's: of A, then of B."""
        return self.warp_sums + TOKENS * self.sum_stride

    @property
    def warp_words(self) -> int:
        """From a warp's sums and ring to the next one's."""
        copies = max(self.a_stages * self.a_slot, self.b_stages * self.b_slot)
        return TOKENS * self.sum_stride + copies

    @property
    def words(self) -> int:
        return self.warp_sums + self.warps * self.warp_words


def turn_ranks(rank: int) -> int:
    """Ranks of B that a warp takes in turn: all, or an equal part of them."""
    return max(r for r in range(8, _RANKS + 1, 8) if rank % r == 0 and (r % 16 == 0 or r == rank))


def plan(y: Array, x: Array, parts: tuple[DecodePart, ...], config: Config) -> Plan | None:
    """The plan of a case; None if the kernel does not take it."""
    if config.warps is None or not 1 <= x.shape[0] <= MAX_DECODE_TOKENS:
        return None
    if any(w.dtype != x.dtype for part in parts for w in (part.lora_a, part.lora_b)):
        return None
    spans = cuts(tuple((p.y_offset, p.y_offset + p.lora_b.shape[1]) for p in parts))
    if any((cut.stop - cut.start) % 8 for cut in spans):
        return None  # parts that overlap by other than multiples of 8 columns
    static = tuple(
        _Part(
            p.lora_a.shape[1], p.lora_b.shape[1], p.lora_a.shape[0], p.scales.size > 1, p.ids,
            p.y_offset,
        )
        for p in parts
    )  # fmt: skip
    jobs = []
    for ids in dict.fromkeys(part.ids for part in static):
        rest = [p for p, part in enumerate(static) if part.ids == ids]
        while rest:
            total = list(itertools.accumulate(static[p].rank for p in rest))
            count = max(1, sum(ranks <= _JOB_RANKS for ranks in total))
            jobs.append(_job(static, tuple(rest[:count]), spans))
            rest = rest[count:]
    found = Plan(
        tokens=x.shape[0],
        features=x.shape[1],
        y_width=y.shape[1],
        dtype=jnp.dtype(x.dtype),
        y_dtype=jnp.dtype(y.dtype),
        parts=static,
        jobs=tuple(jobs),
        split=config.split,
        warps=config.warps,
        column_clusters=config.column_clusters,
        a_stages=1,
        b_stages=1,
    )
    items = max(found.turns(strip) * found.chunks(strip) for job in jobs for strip in job.strips)
    # A ring that held all of a warp's A would start all copies at once, and keep others' waiting.
    a_most = min(config.stages, max(1, pl.cdiv(found.share_units, config.warps) - 1))
    b_most = min(config.expand_stages, items)
    # More blocks than fit at once would wait for others to end, those without work too: H100, T=64,
    # 64 adapters of R=16, 14.4 us with three blocks on a multiprocessor, 12.0 with four.
    blocks = found.clusters * found.blocks
    fits = [room for n, room in zip((4, 2, 1), _SHARED_BYTES) if blocks > n // 2 * _MULTIPROCESSORS]
    for room in fits:
        a, b = a_most, b_most
        b_least = 1 if room == _SHARED_BYTES[-1] else min(2, b_most)
        while True:
            sizes = found._replace(a_stages=a, b_stages=b)
            if 4 * sizes.words <= room:
                return sizes
            if a > 1 and (a * sizes.a_slot >= b * sizes.b_slot or b <= b_least):
                a -= 1
            elif b > b_least and b * sizes.b_slot >= a * sizes.a_slot:
                b -= 1
            else:
                break
    return None


def _job(parts: tuple[_Part, ...], mine: tuple[int, ...], spans: list[Cut]) -> Job:
    tiles = [(p, n) for p in mine for n in range(parts[p].rank // 8)]
    bundles = [
        Bundle(some, n * 8 * _TILES) for n, some in enumerate(itertools.batched(tiles, _TILES))
    ]
    starts = itertools.accumulate((parts[p].rank for p in mine), initial=0)
    strips: list[list[Piece]] = []
    for cut in spans:
        for p in sorted(set(cut.parts) & set(mine)):
            for strip in strips:
                covered = any(piece.start == cut.start for piece in strip)
                if parts[strip[0].part].rank == parts[p].rank and not covered:
                    break
            else:
                strips.append(strip := [])
            strip.append(Piece(cut.start, cut.stop, p))
    return Job(mine, bundles, strips, dict(zip(mine, starts)))
