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


def narrow_cut(blocks: int, columns: int, rank: int, *, sparse: bool) -> NarrowCut:
    """Cuts the columns into as many shares as it takes for two blocks on each multiprocessor: at
    most 16, of four squares or more. `blocks` is how many blocks one share would have. (A tile's
    adapter is in one range, so it has blocks for the sums of that range alone.)

    Where tiles are `sparse`, and few ranks make the shares small, it takes eight blocks: half of
    them or more may have no tile, and each waits for square after square. H200, T=256, 32 adapters
    of R=8 in 64 slots, H=N=8192: 28.9 us with 2 shares, 18.7 with 8.
    """
    wanted = -(-(8 if sparse and rank <= 32 else 2) * MULTIPROCESSORS // blocks)
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
    stages = max(2, min(4, tiles // slots))
    # As many blocks fit at once as have two stages, but not three. H200, T=1024, 8 adapters of
    # R=16, H=N=4096: 9.8 us with 3, 8.0 with 2.
    if stages == 3 and 3 * MULTIPROCESSORS < blocks <= 4 * MULTIPROCESSORS:
        stages = 2
    return OuterCut(columns=1 if blocks < MULTIPROCESSORS else 2, stages=stages)


# Tokens times ranks for each group of tokens, at most, and squares of columns, at least.
_MOST_OF_GROUP = 64
_LEAST_SQUARES = 2048


def by_lanes(num_tokens: int, groups: int, ranks: int, squares: int) -> bool:
    """Whether lanes compute a sum, and not squares: where an adapter has few tokens of few ranks,
    if all `groups` have as many, and blocks of squares would be many. `ranks`: of all parts of a
    token's range. `squares`: 64 columns of a tile, or of a slot, each.

    H200, forward and backward by squares, and by lanes. R=8, H=N=8192: T=64, 64 adapters 127.6 and
    48.4 us; T=256, 32 in 64 slots 88.8 and 45.2; T=512, 64 adapters 139.2 and 65.9. R=16, H=N=4096:
    T=64, 32 adapters 40.8 and 34.5; but T=256, 16 adapters 30.2 and 71.9, and T=512, 32 adapters
    50.4 and 99.6. T=128, 32 adapters of R=32: 55.7 and 82.8.
    """
    return num_tokens * ranks <= _MOST_OF_GROUP * groups and squares >= _LEAST_SQUARES
