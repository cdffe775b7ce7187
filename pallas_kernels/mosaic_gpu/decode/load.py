"""Rows of x and A on their way from device memory to a warp's ring in shared memory."""

import functools

from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Task
from pallas_kernels.mosaic_gpu.decode.work import Bundle
from pallas_kernels.mosaic_gpu.lanes.values import Address, Flag, Int, Number, Ref


class CopiesOfA:
    """Asks for x and A, turn by turn of H; made by kernel.py, called by shrink.py.

    A stage of the ring has 8 rows of x, and behind them 8 rows of A for each octet of a bundle. In
    registers a lane has the rows of x that it copies from, and which 16 bytes of a row it copies.
    128 bytes of A in 8 bits are twice as many columns: x then takes two lines of 128 bytes.
    """

    def __init__(self, lane: Lane, task: Task, x: Ref) -> None:
        m, work, case = lane.m, lane.work, lane.case
        self._lane, self._task = lane, task
        self._first_unit = lane.share * work.share_units
        last = pl.cdiv(case.features, case.unit)
        self._end_unit = m.minimum(self._first_unit + work.share_units, last)
        # A warp copies 4 lines of 8 times 16 bytes at once.
        self._line, self._vector = lane.number // 8, lane.number % 8
        self._x_rows = [
            (m.address(x, self._row_of(m.select(token >= 0, token, 0)), case.features), token >= 0)
            for token in task.tokens.copied
        ]

    def _row_of(self, token: Int) -> Int:
        """The row of x that a token reads."""
        case = self._lane.case
        return token if case.tokens == case.x_rows else token % case.x_rows

    def ask_factors(self) -> None:
        """Copies what the job's columns of v are multiplied by, of stacks in 8 bits."""
        lane, m, job, warps = self._lane, self._lane.m, self._task.job, self._lane.at.factor_warps
        if not warps:
            return
        column = m.tid * 4
        source: Address | None = None
        for p, start in job.columns.items():
            own = m.ahead(self._task.stacks.factors[p], column - start)
            if source is not None:
                own = own._replace(first=m.select(column < start, source.first, own.first))
            source = own
        assert source is not None  # a job has parts
        here = column < lane.work.job_ranks(job)
        if lane.work.leaves:
            here = here & self._task.active
        copy = functools.partial(m.copy, lane.at.factors + column, source, 0, here)
        m.when(lane.warp < warps, copy)

    def ask(self, bundle: Bundle, n: Number, slot: Number) -> None:
        """Copies the warp's nth unit to a slot; zeros where H or the block's share has ended."""
        lane, m, case = self._lane, self._lane.m, self._lane.case
        first = (self._first_unit + n * lane.work.warps + lane.warp) * case.unit
        at = lane.ring + slot * lane.at.a_slot(self._task.job) + self._line * 32
        # Rows of 128 bytes lie in the same banks: the halves of odd ones change places. A
        # lane reads two vectors of x side by side if A is in 8 bits, so these do.
        of_a = at + (self._vector ^ self._line % 2 * 4) * 4
        of_x = at + (self._vector ^ self._line % 2) * 4 if case.is_eight_bits else of_a
        for part in range(lane.at.x_rows // 256):
            k = first + (self._vector * 8 + part * 64)
            inside = self._inside(k)
            for row, (address, there) in enumerate(self._x_rows):
                m.copy(of_x + (row * 128 + part * 256), address, k, inside & there)
        k = first + self._vector * (16 // case.weights.itemsize)
        inside = self._inside(k)
        start = self._line * case.features + k
        first_rows = {p: m.ahead(self._task.stacks.a[p], start) for p in bundle.parts}
        for row, (p, octet) in enumerate(bundle.octets):
            for half in range(2):
                to = of_a + (lane.at.x_rows + 256 * row + 128 * half)
                m.copy(to, first_rows[p], (8 * octet + 4 * half) * case.features, inside)

    def _inside(self, k: Int) -> Flag:
        """Whether a column is in H and in the block's share."""
        case = self._lane.case
        here = (k < self._end_unit * case.unit) & (k < case.features)
        return here & self._task.active if self._lane.work.leaves else here
