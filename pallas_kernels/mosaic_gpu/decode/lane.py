"""Where a lane is, and what it knows when a job starts: the values that all files here share."""

from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.mosaic_gpu.decode.memory import MemoryMap
from pallas_kernels.mosaic_gpu.decode.plan import Plan
from pallas_kernels.mosaic_gpu.decode.work import Case, Job, Work
from pallas_kernels.mosaic_gpu.lanes.values import Address, Flag, Int, Machine, Number, Real, Ref


class Refs(NamedTuple):
    """The operands in device memory."""

    ys: Sequence[Ref]
    x: Ref
    ids: Ref
    layer: Sequence[Ref]  # the number of the layer, if the stacks are those of several
    parts: Sequence[Sequence[Ref]]  # of each part A, B and the scales: those that it has


class Lane(NamedTuple):
    """A lane of a cluster; made once by kernel.py. All of it is in registers."""

    m: Machine
    work: Work
    at: MemoryMap
    number: Int  # in its warp
    warp: Int  # in its block
    row: Int  # of mma's operands: the token of the cluster that its products belong to
    quad: Int  # of mma's operands: which columns are its own
    share: Int  # the number of its block in the cluster
    ring: Int  # the first word of its warp's copies
    v: Number  # the first word of the v that its warp multiplies with B
    layer: Number = 0  # whose stacks it reads, of those that stand one behind the other

    @property
    def case(self) -> Case:
        return self.work.case

    @property
    def always(self) -> Flag:
        return self.m.tid >= 0

    def operands(self, words: list[Int]) -> list[Int]:
        """Words of A or B as products take them: of 8 bits twice as many."""
        if not self.case.is_eight_bits:
            return words
        return [wide for word in words for wide in self.m.widen(word, self.case.weights)]

    @staticmethod
    def of(m: Machine, plan: Plan, share: Int) -> "Lane":
        work, at = plan
        number, warp = m.tid % 32, m.tid // 32
        ring = at.warp_first + warp * at.warp_words
        own_v = warp * (8 * at.v_stride) if work.own_v else 0
        return Lane(m, work, at, number, warp, number // 4, number % 4, share, ring, own_v + at.v)


class Seated(NamedTuple):
    """A cluster's tokens: `size` of them, in shared memory from word `rows` on.

    `id` names their adapter, -1 if there are none. `copied` are those that this lane copies x for,
    numbers `number // 8` and 4 more: the token, or -1.
    """

    rows: Int
    size: Int
    id: Int
    copied: list[Int]


class Task(NamedTuple):
    """A job for the tokens of a cluster; made by kernel.py. All of it is in registers."""

    number: int
    job: Job
    nth: Int  # which of the clusters that deal the job's columns this one is
    tokens: Seated
    active: Flag  # whether the cluster has tokens; else it is to leave
    ran: Sequence[Flag]  # whether each job up to this one has run
    stacks: "Stacks"


class Stacks(NamedTuple):
    """The adapter's A, B and scale of each of a job's parts, by the number of the part. Stacks in 8
    bits have `factors` for a scale: that of each rank column."""

    a: dict[int, Address]
    b: dict[int, Address]
    scales: dict[int, Real]
    factors: dict[int, Address]


def row_of(lane: Lane, tokens: Seated, nth: Int, ref: Ref, width: int) -> tuple[Address, Flag]:
    """(the row of the cluster's nth token in an array, whether there is such a token)"""
    m, there = lane.m, nth < tokens.size
    token = m.select(there, m.get(tokens.rows + nth, 1)[0], 0)
    return m.address(ref, token, width), there
