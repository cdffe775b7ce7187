"""The map of a block's shared memory, in words. Strides keep a warp's lanes in different banks.

    masks | rows | numbers | ids | factors | v | sums of the cluster's blocks | each warp's own

seating.py writes what tells of the tokens (`masks` to `ids`). A warp's own memory is its ring. It
holds columns of x and A, and later, when these are used up, rows of B and columns of y. The warp's
sums stand behind the copies of B: where A was, or, where `holds_sums` is false, behind A too.
"""

from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu.decode.config import MAX_DECODE_TOKENS
from pallas_kernels.mosaic_gpu.decode.work import (
    COLUMNS,
    LINE,
    TOKENS,
    Job,
    Strip,
    Work,
    turn_ranks,
)

WARP_WORDS = 32 * 4  # what the lanes of a warp copy at once, 16 bytes each
_COPIES = 4  # of B that a warp has on their way, unless the highest rank has more


class MemoryMap(NamedTuple):
    """Where things lie, and how many copies a warp has on their way."""

    work: Work
    stages: int  # copies of A, at most
    a_copies: int  # for how many of the largest copies of A there is room
    b_copies: int  # copies of the widest rows of B, at most

    # ---------------------------------------------------------------------------------- tokens

    @property
    def masks(self) -> int:
        """Which tokens lead, in bits."""
        return 0

    @property
    def rows(self) -> int:
        """The cluster's tokens. Those of a table each warp gets for itself, without a barrier."""
        return MAX_DECODE_TOKENS // 32

    @property
    def numbers(self) -> int:
        """How many earlier tokens have the same id."""
        return self.rows + TOKENS * (self.work.warps if self.work.seated else 1)

    @property
    def ids_stride(self) -> int:
        return 0 if self.work.seated else pl.cdiv(self.work.case.tokens, 32) * 32

    @property
    def ids(self) -> int:
        """All tokens' ids; -1 for those that are in no range."""
        return self.numbers + self.ids_stride

    # --------------------------------------------------------------------------------- v, sums

    @property
    def factors(self) -> int:
        """What columns of v are multiplied by, of a job with stacks in 8 bits."""
        return self.ids + self.ids_stride

    @property
    def factor_warps(self) -> int:
        """How many warps copy them: each those of so many columns as it copies words at once."""
        return pl.cdiv(self.work.ranks, WARP_WORDS) if self.work.case.is_eight_bits else 0

    @property
    def v(self) -> int:
        """v as products take it: the block's, or each warp's own."""
        return self.factors + self.factor_warps * WARP_WORDS

    @property
    def v_stride(self) -> int:
        """From a token's v to the next one's."""
        return self.work.ranks // 2 + 4 if self.work.case.expands else 0

    @property
    def block_sums(self) -> int:
        """A sheet of sums from each block of the cluster."""
        return self.v + TOKENS * self.v_stride * (self.work.warps if self.work.own_v else 1)

    @property
    def received_stride(self) -> int:
        """From a token's sums to the next one's, of those that another block sent."""
        work = self.work
        return max(map(work.own_columns, work.jobs)) if work.scatters else self.sum_stride

    @property
    def sheet(self) -> int:
        """From the sums of one block to those of the next."""
        return TOKENS * self.received_stride

    @property
    def sum_stride(self) -> int:
        """From a token's sums to the next one's, of a warp's own."""
        return self.work.ranks + 8 if self.work.case.shrinks else 0

    # ------------------------------------------------------------------------------ warps' own

    @property
    def warp_first(self) -> int:
        """The first warp's copies."""
        return self.block_sums + self.work.split * self.sheet

    @property
    def warp_words(self) -> int:
        """From a warp's copies to the next one's."""
        sums = 0 if self.work.holds_sums else TOKENS * self.sum_stride
        return max(self.a_words, self.b_words) + sums

    @property
    def sums(self) -> int:
        """From a warp's copies to its sums."""
        return self.warp_words - TOKENS * self.sum_stride

    @property
    def words(self) -> int:
        """All of what a block has."""
        return self.warp_first + self.work.warps * self.warp_words

    @property
    def a_words(self) -> int:
        """What copies of A are to have room for, at least."""
        if not self.work.case.shrinks:
            return 0
        return self.a_copies * max(map(self.a_slot, self.work.jobs))

    @property
    def b_words(self) -> int:
        """Room for copies of B and, behind them, for sums that are needed while B comes."""
        sizes = (self.b_stages(job, strip) * self.b_slot(strip) for job, strip in self._strips)
        return max(sizes, default=0) + self.work.holds_sums * TOKENS * self.sum_stride

    def a_slot(self, job: Job) -> int:
        """Words of a copy of x and A."""
        return self.x_rows + max(len(bundle.octets) for bundle in job.bundles) * 8 * LINE // 4

    @property
    def x_rows(self) -> int:
        """Words of x in a copy of x and A."""
        return TOKENS * self.work.case.unit * self.work.case.dtype.itemsize // 4

    def a_stages(self, job: Job) -> int:
        """Copies of x and A that a warp has on their way; 0 without a shrink."""
        if not self.work.case.shrinks:
            return 0
        room = self.warp_words if self.work.holds_sums else self.sums
        return min(self.stages, self.work.units, room // self.a_slot(job))

    def b_rows(self, strip: Strip) -> int:
        """Words of B in a copy of B; y's columns follow."""
        return max(WARP_WORDS, COLUMNS * self.b_row(strip))

    def b_row(self, strip: Strip) -> int:
        """Words of one row of B there."""
        return turn_ranks(self.work.strip_rank(strip)) * self.work.case.weights.itemsize // 4

    def b_slot(self, strip: Strip) -> int:
        """Words of a copy of B and y."""
        return self.b_rows(strip) + TOKENS * COLUMNS * self.work.case.y_dtype.itemsize // 4

    def b_stages(self, job: Job, strip: Strip) -> int:
        """Copies of B that a warp has on their way.

        Narrow rows have more copies than the widest ones, up to `_COPIES`, but no more bytes. With
        still more, other clusters would wait for their A.
        """
        widest = max(self.b_rows(other) for _, other in self._strips)
        alike = self.b_copies * widest // self.b_rows(strip)
        most = max(self.b_copies, min(_COPIES, alike))
        return min(self.work.turns(job, strip) * self.work.sections(strip), most)

    @property
    def _strips(self) -> list[tuple[Job, Strip]]:
        if not self.work.case.expands:
            return []
        return [(job, strip) for job in self.work.jobs for strip in job.strips]
