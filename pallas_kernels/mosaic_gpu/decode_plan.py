"""How the decode kernel cuts work and shared memory: what follows from shapes and config."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.config import MAX_DECODE_TOKENS, Config
from pallas_kernels.mosaic_gpu.tiles import cuts
from pallas_kernels.parts import StackView

TOKENS = 8  # of a cluster: rows of mma's operand
UNIT = 64  # columns of x and A that a warp takes in turn: a line of 128 bytes
COLUMNS = 32  # columns of y that a warp takes in turn
_TILES = 8  # of 8 ranks, whose sums are in registers at once
_RANKS = 128  # ranks of B that a warp takes at once, at most
_COPIES = 4  # of B that a warp has on their way, unless the highest rank has more
_JOB_RANKS = 128  # of parts whose sums are exchanged together, unless one part has more
# Blocks that are there at once, one on a multiprocessor: the multiprocessors of a GPC take whole
# clusters. H100, T=16, 16 adapters of R=128: 16 clusters of 8 took 21.3 us so, two on each 16.3.
_AT_ONCE = 112
# Of shared memory, for four, two or one block on a multiprocessor, each with 1 KiB of its own.
_SHARED_BYTES = (55 * 1024, 112 * 1024, 225 * 1024)
# From this many columns of v on each block adds up some for all, and its sums take 4 KiB, not 34.
# H100, one call as fast either way; a step with LoRA of five buckets beside the products, 53 us a
# layer to 44 and 50. Not where a warp's sums are in shared memory too: R=256, 19.6 us to 20.4.
_SCATTER_FROM = 128
# Up to this many columns of v each warp adds them up for itself. H100, R=16, T=64: q, k, v 6.1 us
# otherwise, 5.9 so; gate, up 10.6 and 10.4.
_OWN_V = 16


class DecodePart(NamedTuple):
    """One stack: lora_a `[L, R, H]`, lora_b `[L, N, R]`, scales `[1]` or `[S]`, of which the stack
    has L from `first_scale` on, which of the ids (an index), first column.

    Without lora_a and scales, x is v `[T, R]`. Without lora_b, y is v, to which its sum is added.
    """

    lora_a: Float[Array, "L R H"] | StackView | None
    lora_b: Float[Array, "L N R"] | StackView | None
    scales: Float[Array, " S"] | None
    ids: int
    y_offset: int
    first_scale: int = 0

    @property
    def stacks(self) -> list[Any]:
        return [stack for stack in (self.lora_a, self.lora_b) if stack is not None]

    @property
    def operands(self) -> list[Array]:
        """What the kernel takes: the stacks, or the arrays that they lie in, and the scales."""
        arrays = [s.array if isinstance(s, StackView) else s for s in self.stacks]
        return arrays if self.scales is None else [*arrays, self.scales]

    @property
    def rank(self) -> int:
        if self.lora_a is not None:
            return self.lora_a.shape[1]
        return self.stacks[0].shape[2]

    @property
    def width(self) -> int:
        return self.rank if self.lora_b is None else self.lora_b.shape[1]


class _Part(NamedTuple):
    rank: int
    width: int
    slots: int
    own_scales: bool
    first_scale: int
    firsts: tuple[int, ...]  # where each of its stacks starts in its array
    ids: int


class Bundle(NamedTuple):
    """Tiles of 8 ranks, (part, tile), that are multiplied at once; their first column of v."""

    tiles: tuple[tuple[int, int], ...]
    first: int


class Piece(NamedTuple):
    """Columns [start, stop) of one of the ys, to which a part adds its columns from `first` on."""

    start: int
    stop: int
    part: int
    y: int
    first: int


class Job(NamedTuple):
    """Parts with the same ids, whose sums are exchanged together. Their columns are dealt to
    `clusters` clusters, from number `cluster` on."""

    parts: tuple[int, ...]
    bundles: list[Bundle]
    strips: list[list[Piece]]  # the pieces of a strip have one rank, and different columns
    columns: dict[int, int]  # each part's first column of v
    cluster: int
    clusters: int


class Plan(NamedTuple):
    """What follows from shapes and config."""

    tokens: int
    features: int
    y_widths: tuple[int, ...]
    dtype: np.dtype[Any]
    x_dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]
    parts: tuple[_Part, ...]
    jobs: tuple[Job, ...]
    shrinks: bool
    expands: bool
    add_inputs: bool
    exclusive: bool
    seated: bool  # ids are one table of clusters' tokens
    id_words: tuple[int, ...]
    split: int
    warps: int
    column_clusters: int
    stages: int  # copies of A that a warp has on their way, at most
    a_copies: int  # of the largest ones there is room for as many
    b_copies: int  # of B that a warp has on their way for the widest rows of B, at most

    def job_ranks(self, job: Job) -> int:
        """Columns of a job's v."""
        return sum(self.parts[p].rank for p in job.parts)

    @property
    def ranks(self) -> int:
        """Columns of v, at most."""
        return max(map(self.job_ranks, self.jobs))

    @property
    def lists(self) -> dict[int, int]:
        """Slots of the stacks, by the number of the ids."""
        return {part.ids: part.slots for part in self.parts}

    @property
    def keys(self) -> list[dict[int, int]]:
        """The words by which tokens are grouped: the lists of ids that each of them stands for, and
        where their ids start in it."""
        starts = itertools.accumulate(self.lists.values(), initial=0)
        if self.exclusive:
            return [dict(zip(self.lists, starts))]
        return [{ids: 0} for ids in self.lists]

    def dealt(self, ids: int) -> int:
        """Clusters that deal the columns of y for the same tokens of a list of ids."""
        if not self.seated:
            return self.column_clusters
        mine = (job for job in self.jobs if self.parts[job.parts[0]].ids == ids)
        return max(job.cluster + job.clusters for job in mine)

    @property
    def grid(self) -> tuple[int, int]:
        """The most clusters that can have work, and how many deal columns for the same tokens."""
        if len(self.keys) > 1:
            return self.tokens, self.column_clusters
        if not self.seated:
            return self._most([(sum(self.lists.values()), 1)]), self.column_clusters
        # Where a table names a cluster's columns too, each list has as many clusters as it needs.
        return self._most([(slots, self.dealt(ids)) for ids, slots in self.lists.items()]), 1

    def _most(self, lists: list[tuple[int, int]]) -> int:
        """Clusters at most, for lists of so many adapters with so many clusters for each."""
        # An adapter's first token opens its clusters, and each eight more of its tokens as many.
        opened = [each for slots, each in lists for _ in range(min(slots, self.tokens))]
        opened = sorted(opened, reverse=True)[: self.tokens]
        first = enumerate(itertools.accumulate(opened), 1)
        return max(sum_ + (self.tokens - n) // TOKENS * opened[0] for n, sum_ in first)

    @property
    def share_units(self) -> int:
        """Units of H that are a block's."""
        return pl.cdiv(pl.cdiv(self.features, UNIT), self.split)

    @property
    def units(self) -> int:
        """Units of H that are a warp's."""
        return pl.cdiv(self.share_units, self.warps)

    def share(self, job: Job, piece: Piece) -> int:
        """How many times 32 columns are a block's, at most."""
        return pl.cdiv(pl.cdiv(piece.stop - piece.start, COLUMNS), self.split * job.clusters)

    def turns(self, job: Job, strip: list[Piece]) -> int:
        """How many times 32 columns are a warp's, at most."""
        return sum(pl.cdiv(self.share(job, piece), self.warps) for piece in strip)

    def chunks(self, strip: list[Piece]) -> int:
        """In how many parts a warp takes the ranks of B."""
        rank = self.parts[strip[0].part].rank
        return rank // turn_ranks(rank)

    def ids_of(self, number: int) -> int:
        """The list of ids of a job."""
        return self.parts[self.jobs[number].parts[0]].ids

    def earlier(self, number: int) -> list[int]:
        """The jobs that may have run for the same tokens before a job does."""
        mine = self.ids_of(number)
        return [n for n in range(number) if not self.exclusive or self.ids_of(n) == mine]

    def before(self, number: int, piece: Piece) -> list[int]:
        """The jobs that add to the columns of a job's piece before it does, itself among them if
        another strip of its own does."""
        there = [
            (n, other)
            for n in (*self.earlier(number), number)
            for other in itertools.chain(*self.jobs[n].strips)
            if (other.y, other.start) == (piece.y, piece.start)
        ]
        return [n for n, _ in there[: there.index((number, piece))]]

    # Shared memory, in words. Strides keep a warp's lanes in different banks.
    @property
    def masks(self) -> int:
        return 0

    @property
    def rows(self) -> int:
        return MAX_DECODE_TOKENS // 32

    @property
    def numbers(self) -> int:
        # Those of a table each warp gets for itself, which needs no barrier of the block.
        return self.rows + TOKENS * (self.warps if self.seated else 1)

    @property
    def ids_stride(self) -> int:
        return 0 if self.seated else pl.cdiv(self.tokens, 32) * 32

    @property
    def ids(self) -> int:
        return self.numbers + self.ids_stride

    @property
    def v(self) -> int:
        return self.ids + len(self.keys) * self.ids_stride

    @property
    def leaves(self) -> bool:
        """Whether clusters without tokens leave where their first copies would be on their way and
        not before, so that all that does not follow from the table is known before it is here."""
        return self.seated and self.shrinks and len(self.jobs) == 1

    @property
    def own_v(self) -> bool:
        """Whether each warp adds up v for itself, which needs no barrier of the block."""
        return self.expands and self.ranks <= _OWN_V

    @property
    def scatters(self) -> bool:
        """Whether each block of a cluster adds up some columns of v and tells the others, a
        reduce-scatter and an all-gather; else each adds up all: one exchange, not two."""
        both = self.shrinks and self.expands and self.split > 1
        return both and self.holds_sums and self.ranks >= _SCATTER_FROM

    def own_columns(self, job: Job) -> int:
        """Columns of a job's v that each block adds up where it adds up some, in fours."""
        return 4 * pl.cdiv(self.job_ranks(job), 4 * self.split)

    @property
    def v_stride(self) -> int:
        return self.ranks // 2 + 4 if self.expands else 0

    @property
    def block_sums(self) -> int:
        return self.v + TOKENS * self.v_stride * (self.warps if self.own_v else 1)

    @property
    def sum_stride(self) -> int:
        return self.ranks + 8 if self.shrinks else 0

    @property
    def received_stride(self) -> int:
        """From a token's sums to the next one's, of those that another block sent."""
        return max(map(self.own_columns, self.jobs)) if self.scatters else self.sum_stride

    @property
    def warp_first(self) -> int:
        """The first warp's copies, of A, then of B, and its sums behind them."""
        return self.block_sums + self.split * TOKENS * self.received_stride

    @property
    def holds_sums(self) -> bool:
        """Whether a warp holds its sums until all of A has come, and puts them in A's place."""
        return all(len(job.bundles) * _TILES * 8 <= _JOB_RANKS for job in self.jobs)

    @property
    def a_words(self) -> int:
        """What copies of A are to have room for, at least."""
        return self.a_copies * max(map(self.a_slot, self.jobs)) if self.shrinks else 0

    @property
    def b_words(self) -> int:
        """What copies of B take, and sums that lie behind them while they come."""
        sizes = (self.b_stages(job, strip) * self.b_slot(strip) for job, strip in self._strips)
        return max(sizes, default=0) + self.holds_sums * TOKENS * self.sum_stride

    @property
    def warp_words(self) -> int:
        """From a warp's copies to the next one's."""
        sums = 0 if self.holds_sums else TOKENS * self.sum_stride
        return max(self.a_words, self.b_words) + sums

    @property
    def sums(self) -> int:
        """From a warp's copies to its sums."""
        return self.warp_words - TOKENS * self.sum_stride

    @property
    def words(self) -> int:
        return self.warp_first + self.warps * self.warp_words

    def a_slot(self, job: Job) -> int:
        """Words of a copy of x and A."""
        return (1 + max(len(bundle.tiles) for bundle in job.bundles)) * 8 * UNIT // 2

    def a_stages(self, job: Job) -> int:
        room = self.warp_words if self.holds_sums else self.sums
        return min(self.stages, self.units, room // self.a_slot(job))

    def b_rows(self, strip: list[Piece]) -> int:
        """Words of B in a copy of B; y's columns follow."""
        return COLUMNS * turn_ranks(self.parts[strip[0].part].rank) // 2

    def b_slot(self, strip: list[Piece]) -> int:
        return self.b_rows(strip) + TOKENS * COLUMNS * self.y_dtype.itemsize // 4

    def b_stages(self, job: Job, strip: list[Piece]) -> int:
        """Copies of B that a warp has on their way. Of narrow rows more, up to `_COPIES`: as many
        bytes as of the widest. Still more would keep others' A waiting."""
        widest = max(self.b_rows(other) for _, other in self._strips)
        alike = self.b_copies * widest // self.b_rows(strip)
        most = max(self.b_copies, min(_COPIES, alike))
        return min(self.turns(job, strip) * self.chunks(strip), most)

    @property
    def _strips(self) -> list[tuple[Job, list[Piece]]]:
        return [(job, strip) for job in self.jobs for strip in job.strips] if self.expands else []


def turn_ranks(rank: int) -> int:
    """Ranks of B that a warp takes at once: all, or an equal part of them."""
    parts = [r for r in range(8, _RANKS + 1, 8) if rank % r == 0 and (r % 16 == 0 or r == rank)]
    # Three copies of 64 ranks on their way, not one of 128. H100, T=64, R=128: 64 adapters 51.8 and
    # 50.5 us, 8 adapters 13.3 and 11.3; with two copies 50.8 and 12.0.
    return 64 if rank % 64 == 0 else parts[-1]


def plan(
    ys: Sequence[Array],
    x: Array,
    parts: tuple[DecodePart, ...],
    config: Config,
    *,
    add_inputs: bool = True,
    exclusive: bool = False,
    seated: bool = False,
    id_words: tuple[int, ...] | None = None,
) -> Plan | None:
    """The plan of a case; None if the kernel does not take it. All parts have the same halves.

    `exclusive`: a token has an adapter in one of the lists of ids at most. `seated`: instead of ids
    there is a table of the clusters' tokens. `id_words`: of each list of ids, the words of one; 1
    if not given.
    """
    if config.warps is None or not 1 <= x.shape[0] <= MAX_DECODE_TOKENS:
        return None
    shrinks, expands = parts[0].lora_a is not None, parts[0].lora_b is not None
    dtype = parts[0].stacks[0].dtype
    if any(w.dtype != dtype for part in parts for w in part.stacks):
        return None
    if len({y.dtype for y in ys}) > 1 or (shrinks and x.dtype != dtype):
        return None
    column_clusters = config.column_clusters if expands else 1
    pieces = _pieces(ys, parts)
    if any((piece.stop - piece.start) % 8 for piece in pieces):
        return None  # parts that overlap by other than multiples of 8 columns
    static = tuple(
        _Part(
            p.rank,
            p.width,
            p.stacks[0].shape[0],
            p.scales is not None and p.scales.size > 1,
            p.first_scale,
            tuple(s.first if isinstance(s, StackView) else 0 for s in p.stacks),
            p.ids,
        )
        for p in parts
    )
    jobs: list[Job] = []
    all_ids = dict.fromkeys(part.ids for part in static)
    ranks = {ids: [part.rank for part in static if part.ids == ids] for ids in all_ids}
    # Whole pieces where one job can't hold all parts of some ids: it would take several in turn.
    whole = {ids: sum(some) > _JOB_RANKS for ids, some in ranks.items()}
    dealt = dict.fromkeys(all_ids, column_clusters)
    if exclusive:  # as many as there is work for; else, as a token may be in several, alike in all
        most = max(max(some) for some in ranks.values())
        dealt = {ids: pl.cdiv(column_clusters * max(some), most) for ids, some in ranks.items()}
    else:
        whole = dict.fromkeys(all_ids, any(whole.values()))
    for ids in all_ids:
        for cluster, clusters, mine in _dealt(pieces, dealt[ids], whole=whole[ids]):
            used = {piece.part for piece in mine}
            rest = [p for p, part in enumerate(static) if part.ids == ids and p in used]
            while rest:
                total = list(itertools.accumulate(static[p].rank for p in rest))
                count = max(1, sum(ranks <= _JOB_RANKS for ranks in total))
                jobs.append(_job(static, tuple(rest[:count]), mine, cluster, clusters))
                rest = rest[count:]
    found = Plan(
        tokens=x.shape[0],
        features=x.shape[1],
        y_widths=tuple(y.shape[1] for y in ys),
        dtype=jnp.dtype(dtype),
        x_dtype=jnp.dtype(x.dtype),
        y_dtype=jnp.dtype(ys[0].dtype),
        parts=static,
        jobs=tuple(jobs),
        shrinks=shrinks,
        expands=expands,
        add_inputs=add_inputs,
        exclusive=exclusive,
        seated=seated,
        id_words=id_words or (1,) * (1 + max(p.ids for p in parts)),
        split=config.split,
        warps=config.warps,
        column_clusters=column_clusters,
        stages=config.stages,
        a_copies=1,
        b_copies=1,
    )
    # More blocks than fit at once would wait for others to end, those without work too: H100, T=64,
    # 64 adapters of R=16, 14.4 us with three blocks on a multiprocessor, 12.0 with four.
    blocks = math.prod(found.grid) * found.split
    fits = [room for n, room in zip((4, 2, 1), _SHARED_BYTES) if blocks > n // 2 * _AT_ONCE]
    for room in fits:
        a, b = min(config.stages, found.units), config.expand_stages
        b_least = 1 if room == _SHARED_BYTES[-1] else min(2, b)
        while True:
            sizes = found._replace(a_copies=a, b_copies=b)
            if 4 * sizes.words <= room:
                return sizes
            if a > 1 and (sizes.a_words >= sizes.b_words or b <= b_least):
                a -= 1
            elif b > b_least:
                b -= 1
            else:
                break
    return None


def _pieces(ys: Sequence[Array], parts: tuple[DecodePart, ...]) -> list[Piece]:
    """What each part adds to, cut where another one starts or ends."""
    edges = list(itertools.accumulate((y.shape[1] for y in ys), initial=0))
    spans = [(p.y_offset, p.y_offset + p.width) for p in parts]
    # Each y is a span of its own, lest a piece go from one to the next.
    return [
        Piece(cut.start - edges[y], cut.stop - edges[y], p, y, cut.start - parts[p].y_offset)
        for cut in cuts((*spans, *itertools.pairwise(edges)))
        for y in [bisect.bisect(edges, cut.start) - 1]
        for p in cut.parts
        if p < len(parts)
    ]


def _dealt(
    pieces: list[Piece], clusters: int, *, whole: bool
) -> list[tuple[int, int, list[Piece]]]:
    """(first cluster, how many, their pieces): all share each piece, or if `whole`, some have it.

    A cluster needs A of those parts alone whose columns it has. Parts of the same columns have the
    same clusters, as a token may have several of them: its columns must not be updated by two.
    """
    if not whole:
        return [(0, clusters, pieces)]
    starts = list(dict.fromkeys((piece.y, piece.start) for piece in pieces))
    each = max(1, clusters // len(starts))
    dealt: dict[int, list[Piece]] = {}
    for piece in pieces:
        first = starts.index((piece.y, piece.start)) * each % clusters
        dealt.setdefault(first, []).append(piece)
    return [(first, each, mine) for first, mine in dealt.items()]


def _job(
    parts: tuple[_Part, ...],
    mine: tuple[int, ...],
    pieces: list[Piece],
    cluster: int,
    clusters: int,
) -> Job:
    tiles = [(p, n) for p in mine for n in range(parts[p].rank // 8)]
    bundles = [
        Bundle(some, n * 8 * _TILES) for n, some in enumerate(itertools.batched(tiles, _TILES))
    ]
    starts = itertools.accumulate((parts[p].rank for p in mine), initial=0)
    strips: list[list[Piece]] = []
    for piece in pieces:
        if piece.part not in mine:
            continue
        for strip in strips:
            covered = any((other.y, other.start) == (piece.y, piece.start) for other in strip)
            if parts[strip[0].part].rank == parts[piece.part].rank and not covered:
                break
        else:
            strips.append(strip := [])
        strip.append(piece)
    return Job(mine, bundles, strips, dict(zip(mine, starts)), cluster, clusters)
