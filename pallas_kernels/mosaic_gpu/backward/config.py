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
    """Cuts the columns into as many shares as it takes for two blocks on each multiprocessor: at
    most 16, of four squares or more. `blocks` is how many blocks one share would have. (A tile's
    adapter is in one range, so it has blocks for the sums of that range alone.)"""
    wanted = -(-2 * MULTIPROCESSORS // blocks)
    most = max(1, squares_of(columns) // 4)
    return NarrowCut(split=min(16, most, 1 << (wanted - 1).bit_length()), stages=4)


class WideCut(NamedTuple):
    """How dx is cut: squares of columns of a block, and stages of its ring."""

    columns: int
    stages: int


def wide_cut(features: int, steps: int) -> WideCut:
    """`steps` is how many squares of ranks a block takes, at most. One stage where there is one:
    more blocks then fit a multiprocessor, and hide each other's way to the first product."""
    return WideCut(columns=min(2, squares_of(features)), stages=min(2, steps))


class OuterCut(NamedTuple):
    """How the gradients of A and B are cut: squares of columns of a block, and stages."""

    columns: int
    stages: int


def outer_cut(tiles: int, slots: int, columns: int) -> OuterCut:
    """A block takes two squares of columns, or one where even that gives fewer blocks than there
    are multiprocessors. It has a stage more than a slot has full tiles, if the tokens are spread
    evenly over all slots, but 2 to 4. The fewer stages, the more blocks share a multiprocessor."""
    blocks = slots * squares_of(columns)
    return OuterCut(
        columns=1 if blocks < MULTIPROCESSORS else 2,
        stages=max(2, min(4, tiles // slots)),
    )
