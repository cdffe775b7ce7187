"""v = x A^T, a warp's share of it: products of what its copies have brought.

By its layout, `mma` takes four columns from a lane: 2c, 2c + 1, 2c + 8 and 2c + 9, where c is the
lane's `quad`. A lane loads 8 consecutive columns instead, in one vector, and gives four of them to
each of two products. x and A are both dealt so: each column of x still meets the same column of A.
Where A is in 8 bits, a lane has 16 columns, for four products.
"""

import functools
import itertools
from collections.abc import Callable

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Task
from pallas_kernels.mosaic_gpu.decode.load import CopiesOfA
from pallas_kernels.mosaic_gpu.decode.work import Bundle
from pallas_kernels.mosaic_gpu.lanes.values import Int, Number, Real

_Turns = list[tuple[Bundle, int]]


def shrink(
    lane: Lane, task: Task, copies: CopiesOfA, meanwhile: Callable[[], None]
) -> list[list[Real]]:
    """The warp's sums; called by kernel.py. They are in registers, a list for each bundle, or, of
    ranks too high for that (`holds_sums` is false), in shared memory.

    `meanwhile` is done while the first copies are on their way. At the end none is.
    """
    bundles, sums = task.job.bundles, []
    if lane.work.holds_sums:
        sums = _products(lane, task, copies, bundles, meanwhile)
    else:
        for bundle in bundles:
            put_sums(lane, bundle, *_products(lane, task, copies, [bundle], meanwhile))
    # Only now is B asked for: A of all clusters comes before B of any, and B while sums are
    # exchanged.
    lane.m.arrived(0)
    return sums


def put_sums(lane: Lane, bundle: Bundle, sums: list[Real]) -> None:
    """The warp's sums for its 8 tokens, to shared memory: a lane has 2 columns of each octet."""
    m, at = lane.m, lane.at
    place = lane.ring + at.sums + lane.row * at.sum_stride + bundle.first + lane.quad * 2
    for octet in range(len(bundle.octets)):
        m.put(place + 8 * octet, [m.as_word(value) for value in sums[2 * octet : 2 * octet + 2]])


def _products(
    lane: Lane, task: Task, copies: CopiesOfA, bundles: list[Bundle], meanwhile: Callable[[], None]
) -> list[list[Real]]:
    """Sums of the bundles, one after the other, the next copies always on their way."""
    m, work = lane.m, lane.work
    accs = [[m.real(0.0)] * (2 * len(bundle.octets)) for bundle in bundles]
    stages = lane.at.a_stages(task.job)
    if work.units > max(work.written_out, stages):
        for nth, bundle in enumerate(bundles):
            _first_copies(lane, task, copies, [(bundle, n) for n in range(stages)], meanwhile)
            turn = functools.partial(_turn, lane, task, copies, bundle)
            accs[nth] = m.loop(work.units, turn, accs[nth])
        return accs
    turns: _Turns = list(itertools.product(bundles, range(work.units)))
    _first_copies(lane, task, copies, turns, meanwhile)
    for i, (bundle, _) in enumerate(turns):
        nth = i // work.units
        m.arrived(stages - 1)
        m.warp_barrier()
        accs[nth] = _multiply(lane, task, bundle, i % stages, accs[nth])
        if i + stages < len(turns):
            m.warp_barrier()
            copies.ask(*turns[i + stages], i % stages)
        m.commit()
    return accs


def _first_copies(
    lane: Lane, task: Task, copies: CopiesOfA, turns: _Turns, meanwhile: Callable[[], None]
) -> None:
    """Asks for the first copies, then does what need not wait for them."""
    m = lane.m
    if len(lane.work.jobs) > 1 or len(task.job.bundles) > 1:
        m.arrived(0)
        m.warp_barrier()  # the ring is free
    if turns[0][0] is task.job.bundles[0]:
        copies.ask_factors()
    for slot, (bundle, n) in enumerate(turns[: lane.at.a_stages(task.job)]):
        copies.ask(bundle, n, slot)
        m.commit()
    if lane.work.leaves:
        m.leave(~task.active)
    meanwhile()
    m.begun()


def _turn(
    lane: Lane, task: Task, copies: CopiesOfA, bundle: Bundle, n: Int, acc: list[Real]
) -> list[Real]:
    """A turn of the loop over H."""
    m, stages = lane.m, lane.at.a_stages(task.job)
    m.arrived(stages - 1)
    m.warp_barrier()
    acc = _multiply(lane, task, bundle, n % stages, acc)
    m.warp_barrier()
    copies.ask(bundle, n + stages, n % stages)  # the last bring zeros
    m.commit()
    return acc


def _multiply(lane: Lane, task: Task, bundle: Bundle, slot: Number, acc: list[Real]) -> list[Real]:
    """acc plus the products of a slot's columns; two sums of a lane for each octet."""
    m, at, acc = lane.m, lane.at, list(acc)
    row = lane.ring + slot * at.a_slot(task.job) + lane.row * 32
    for half in range(2):
        place = row + lane.quad * 4 + (lane.row + half) % 2 * 16
        if lane.case.is_eight_bits:
            tokens = _beside_eight_bits(lane, row + 256 * half)
        else:
            tokens = m.get(place, 4)
        for n in range(len(bundle.octets)):
            mine = slice(2 * n, 2 * n + 2)
            ranks = lane.operands(m.get(place + (at.x_rows + 256 * n), 4))
            for step in range(0, len(ranks), 2):
                pair = tokens[step : step + 2], ranks[step : step + 2]
                acc[mine] = m.mma(acc[mine], *pair, lane.case.dtype)
    return acc


def _beside_eight_bits(lane: Lane, row: Int) -> list[Int]:
    """A lane's 16 columns of x in a line, of which A in 8 bits has as many in 16 bytes."""
    vectors = [(lane.quad * 2 + n) ^ lane.row % 2 for n in range(2)]
    return [word for vector in vectors for word in lane.m.get(row + vector * 4, 4)]
