"""Rows of x and A on their way from device memory to a warp's ring in shared memory."""

from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Task
from pallas_kernels.mosaic_gpu.decode.work import UNIT, Bundle
from pallas_kernels.mosaic_gpu.lanes.values import Int, Number, Ref


class CopiesOfA:
    """Asks for units of 64 columns of x and A; made by kernel.py, called by shrink.py.

    A slot of the ring takes 8 rows of x, and behind them 8 rows of A for each octet of a bundle. In
    registers a lane has the rows of x that it copies from, and which 16 bytes of a row it copies.
    """

    def __init__(self, lane: Lane, task: Task, x: Ref) -> None:
        m, work, case = lane.m, lane.work, lane.case
        self._lane, self._task = lane, task
        self._first_unit = lane.share * work.share_units
        last = pl.cdiv(lane.case.features, UNIT)
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

    def ask(self, bundle: Bundle, n: Number, slot: Number) -> None:
        """Copies the warp's nth unit to a slot; zeros where H or the block's share has ended."""
        lane, m, features = self._lane, self._lane.m, self._lane.case.features
        k = (self._first_unit + n * lane.work.warps + lane.warp) * UNIT + self._vector * 8
        here = (k < self._end_unit * UNIT) & (k < features)
        if lane.work.leaves:
            here = here & self._task.active
        # Rows of 128 bytes lie in the same banks: the halves of odd ones change places.
        swapped = self._vector ^ self._line % 2 * 4
        a_slot = lane.at.a_slot(self._task.job)
        place = lane.ring + slot * a_slot + self._line * 32 + swapped * 4
        for row, (address, there) in enumerate(self._x_rows):
            m.copy(place + row * 128, address, k, here & there)
        start = self._line * features + k
        first_rows = {p: m.ahead(self._task.stacks.a[p], start) for p in bundle.parts}
        for row, (p, octet) in enumerate(bundle.octets):
            for half in range(2):
                to = place + (256 * (row + 1) + 128 * half)
                m.copy(to, first_rows[p], (8 * octet + 4 * half) * features, here)
