"""What the decode kernel has to do, cut up: parts, jobs, strips and pieces, and who takes them."""

import itertools
from typing import NamedTuple

import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.stacks import Sharing

TOKENS = 8  # of a cluster: the rows of mma's operand
LINE = 128  # bytes of a row of A, as many columns of x and A as a warp takes in turn
COLUMNS = 32  # columns of y that a warp takes in turn
OCTETS = 8  # of ranks, whose sums are in registers at once
# Ranks of the parts whose sums are exchanged together, unless one part has more.
JOB_RANKS = 128
_TURN_RANKS = 128  # ranks of B that a warp takes at once, at most
# From this many columns of v on each block adds up some of them for all blocks: the sums that it
# receives take 4 KiB then, not 34, so that a block finds room beside a product. H100, a step with
# LoRA of five buckets beside the products: 53 us a layer without, 44 to 50 with.
_SCATTER_FROM = 128
# Up to this many columns of v each warp adds them up for itself, which saves a barrier. H100, T=64,
# R=16, q, k and v: 6.1 us without, 5.9 with.
_OWN_V = 16
# A kernel with one job has loops of up to so many turns written out. With more jobs its code would
# be too long: it comes cold from device memory. H100, Llama-3-8B's projections with five buckets,
# one layer in a step: 186 us written out, 123 in loops.
_WRITTEN_OUT = 8


class Range(NamedTuple):
    """Slots that have one rank: ids [first, first + slots) name their adapters."""

    first: int
    slots: int

    @property
    def stop(self) -> int:
        return self.first + self.slots


class Part(NamedTuple):
    """A stack of adapters of one rank: what the kernel knows of it when it is traced."""

    rank: int
    width: int
    range: Range
    sharing: Sharing
    own_scales: bool  # one for each slot, else one for all
    first_scale: int
    scales: int  # of a layer: those of all of its stacks


class Bundle(NamedTuple):
    """Octets of ranks, (part, octet), that are multiplied at once, and their first column of v."""

    octets: tuple[tuple[int, int], ...]
    first: int

    @property
    def parts(self) -> list[int]:
        return sorted({part for part, _ in self.octets})

    @property
    def columns(self) -> int:
        return 8 * len(self.octets)


class Piece(NamedTuple):
    """Columns [start, stop) of one of the ys, to which a part adds its columns from `first` on."""

    start: int
    stop: int
    part: int
    y: int
    first: int


# Pieces of different columns whose parts have one rank: warps take them one after the other.
Strip = list[Piece]


class Job(NamedTuple):
    """Parts of the same tokens whose sums are exchanged together.

    The job's columns of y are dealt to `clusters` clusters, from number `cluster` on.
    """

    parts: tuple[int, ...]
    bundles: list[Bundle]
    strips: list[Strip]
    columns: dict[int, int]  # each part's first column of v
    cluster: int
    clusters: int


class Case(NamedTuple):
    """What the operands' shapes say."""

    tokens: int
    x_rows: int  # fewer than tokens where these take turns to read the same rows of x
    features: int
    y_widths: tuple[int, ...]
    dtype: np.dtype  # of the operands of products
    weights: np.dtype  # of A and B, if in 8 bits another one
    x_dtype: np.dtype
    y_dtype: np.dtype
    parts: tuple[Part, ...]
    shrinks: bool
    expands: bool
    add_inputs: bool
    layers: int  # whose stacks stand one behind the other; an operand says which one's are used

    @property
    def is_eight_bits(self) -> bool:
        """Whether A and B are, so that each column of v has a scale of its own."""
        return self.weights != self.dtype

    @property
    def unit(self) -> int:
        """Columns of x and A that a warp takes in turn."""
        return LINE // self.weights.itemsize


class Work(NamedTuple):
    """A case cut into jobs, and the blocks and warps that share them."""

    case: Case
    jobs: tuple[Job, ...]
    seated: bool  # ids are a table of clusters' tokens
    id_words: int  # else: of an id
    split: int  # blocks of a cluster
    warps: int  # of a block
    column_clusters: int

    # ---------------------------------------------------------------------- clusters and tokens

    @property
    def ranges(self) -> list[Range]:
        """The ranges of ids, in the order of parts. A token's id is in one of them at most."""
        return list(dict.fromkeys(part.range for part in self.case.parts))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[start, stop) of ids that are in some range, in order, as few as possible."""
        spans: list[tuple[int, int]] = []
        for one in sorted(self.ranges):
            if spans and spans[-1][1] == one.first:
                spans[-1] = spans[-1][0], one.stop
            else:
                spans.append((one.first, one.stop))
        return spans

    def dealt(self, mine: Range) -> int:
        """Clusters that deal the columns of y for the same tokens of a range."""
        if not self.seated:
            return self.column_clusters
        jobs = (job for n, job in enumerate(self.jobs) if self.range_of(n) == mine)
        return max(job.cluster + job.clusters for job in jobs)

    @property
    def grid(self) -> tuple[int, int]:
        """The most clusters that can have work, and how many deal columns for the same tokens."""
        if not self.seated:
            return self._most([(sum(one.slots for one in self.ranges), 1)]), self.column_clusters
        # A table names a cluster's columns too, so that each range has as many as it needs.
        return self._most([(one.slots, self.dealt(one)) for one in self.ranges]), 1

    def _most(self, ranges: list[tuple[int, int]]) -> int:
        """Clusters at most, for ranges of so many adapters with so many clusters for each."""
        # An adapter's first token opens its clusters, and each eight more of its tokens as many.
        tokens = self.case.tokens
        opened = [each for slots, each in ranges for _ in range(min(slots, tokens))]
        opened = sorted(opened, reverse=True)[:tokens]
        first = enumerate(itertools.accumulate(opened), 1)
        return max(total + (tokens - n) // TOKENS * opened[0] for n, total in first)

    # ------------------------------------------------------------------------------------- jobs

    def range_of(self, number: int) -> Range:
        """The range of a job's ids."""
        return self.case.parts[self.jobs[number].parts[0]].range

    def earlier(self, number: int) -> list[int]:
        """The jobs that may have run for the same tokens before a job does."""
        mine = self.range_of(number)
        return [n for n in range(number) if self.range_of(n) == mine]

    def before(self, number: int, piece: Piece) -> list[int]:
        """The jobs that add to the columns of a piece before job `number` adds it.

        That job is among them if an earlier strip of its own adds to these columns.
        """
        there = [
            (n, other)
            for n in (*self.earlier(number), number)
            for other in itertools.chain(*self.jobs[n].strips)
            if (other.y, other.start) == (piece.y, piece.start)
        ]
        return [n for n, _ in there[: there.index((number, piece))]]

    def reads_y(self, number: int, strip: Strip) -> bool:
        """Whether a strip of the job adds to what is in y: the input, or what others have added."""
        return self.case.add_inputs or any(self.before(number, piece) for piece in strip)

    def job_ranks(self, job: Job) -> int:
        """Columns of a job's v."""
        return sum(self.case.parts[p].rank for p in job.parts)

    @property
    def ranks(self) -> int:
        """Columns of v, at most."""
        return max(map(self.job_ranks, self.jobs))

    # ---------------------------------------------------------------------------- warps' shares

    @property
    def share_units(self) -> int:
        """Units of H that are a block's."""
        return pl.cdiv(pl.cdiv(self.case.features, self.case.unit), self.split)

    @property
    def units(self) -> int:
        """Units of H that are a warp's."""
        return pl.cdiv(self.share_units, self.warps)

    def share(self, job: Job, piece: Piece) -> int:
        """How many times 32 columns are a block's, at most."""
        return pl.cdiv(pl.cdiv(piece.stop - piece.start, COLUMNS), self.split * job.clusters)

    def turns(self, job: Job, strip: Strip) -> int:
        """How many times 32 columns are a warp's, at most."""
        return sum(pl.cdiv(self.share(job, piece), self.warps) for piece in strip)

    def strip_rank(self, strip: Strip) -> int:
        return self.case.parts[strip[0].part].rank

    def sections(self, strip: Strip) -> int:
        """In how many sections a warp takes the ranks of B."""
        rank = self.strip_rank(strip)
        return rank // turn_ranks(rank)

    # --------------------------------------------------------------------------------- variants

    @property
    def written_out(self) -> int:
        """Turns that are written out; longer ones are loops."""
        return _WRITTEN_OUT if len(self.jobs) == 1 else 1

    @property
    def leaves(self) -> bool:
        """Whether clusters without tokens end only where others have asked for their first copies.

        A branch at the start would wait for the table, which tells whether there are tokens. So all
        clusters go on as if they had some, and meanwhile do the arithmetic that needs no table.
        """
        return self.seated and self.case.shrinks and len(self.jobs) == 1

    @property
    def holds_sums(self) -> bool:
        """Whether a warp holds its sums until all of A has come, and puts them in A's place."""
        return all(len(job.bundles) * OCTETS * 8 <= JOB_RANKS for job in self.jobs)

    @property
    def own_v(self) -> bool:
        """Whether each warp adds up v for itself."""
        return self.case.expands and self.ranks <= _OWN_V

    @property
    def scatters(self) -> bool:
        """Whether each block of a cluster adds up some columns of v and tells the others, a
        reduce-scatter and an all-gather; else each adds up all: one exchange, not two."""
        both = self.case.shrinks and self.case.expands and self.split > 1
        # Where a warp's sums are in shared memory too it does not pay: R=256, 19.6 us to 20.4.
        return both and self.holds_sums and self.ranks >= _SCATTER_FROM

    def own_columns(self, job: Job) -> int:
        """Columns of a job's v that each block adds up where it adds up some, in fours."""
        return 4 * pl.cdiv(self.job_ranks(job), 4 * self.split)


def turn_ranks(rank: int) -> int:
    """Ranks of B that a warp takes at once: all, or an equal section of them."""
    sections = [
        r for r in range(8, _TURN_RANKS + 1, 8) if rank % r == 0 and (r % 16 == 0 or r == rank)
    ]
    # Three copies of 64 ranks on their way, not one of 128. H100, T=64, 8 adapters of R=128: 13.3
    # us with one of 128, 11.3 so.
    return 64 if rank % 64 == 0 else sections[-1]
