"""How the backward kernels cut a case: rules over static shapes."""

from typing import NamedTuple

from pallas_kernels.mosaic_gpu.backward.squares import squares_of
from pallas_kernels.mosaic_gpu.chip import MULTIPROCESSORS

# Squares of the ranks that one block has sums of, at most.
RANK_SQUARES = 2


class NarrowCut(NamedTuple):
    """How u and dv are cut: blocks that share the columns, and stages of a block's ring."""

    split: int
    stages: int


def narrow_cut(blocks: int, columns: int) -> NarrowCut:
    """As many shares as give each multiprocessor two blocks, of four squares or more; `blocks` is
    how many there are of one share."""
    wanted = -(-2 * MULTIPROCESSORS // blocks)
    most = max(1, squares_of(columns) // 4)
    return NarrowCut(split=min(16, most, 1 << (wanted - 1).bit_length()), stages=4)


class WideCut(NamedTuple):
    """How dx is cut: squares of columns of a block, and stages of its ring."""

    columns: int
    stages: int


def wide_cut(tiles: int, features: int) -> WideCut:
    return WideCut(columns=min(2, squares_of(features)), stages=2)


class OuterCut(NamedTuple):
    """How the gradients of A and B are cut: squares of columns of a block, and stages."""

    columns: int
    stages: int


def outer_cut(slots: int, features: int) -> OuterCut:
    """One square of columns where few slots have few blocks, else two."""
    blocks = slots * squares_of(features)
    return OuterCut(columns=1 if blocks < MULTIPROCESSORS else 2, stages=4)
