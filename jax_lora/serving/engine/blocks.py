"""Who may take blocks of the key-value cache. Nobody gives any back before its end."""

from collections.abc import Sequence

import numpy as np

# Blocks of a row: those that it may still need, and those that it has. A plain tuple, as these are
# made and sorted beside each step: 64 take a third of what a NamedTuple's take.
Claim = tuple[int, int]


def is_safe(claims: Sequence[Claim], free: int) -> bool:
    """Whether rows can come to their ends one after the other, as the banker's algorithm says.

    In the order of their needs, each one's must be at most what is free and what those before it
    have, since they end and give it back.
    """
    for need, held in sorted(claims):
        if need > free:
            return False
        free += held
    return True


class Grants:
    """Blocks for the rows of a step, from a safe state to a safe state.

    The row that needs the least may always take it, so some row goes on in each step. A row that
    begins has nothing that others could lack, so it leaves a safe state safe, if it fits alone.

    Rows ask in the order in which they began. One that may not take blocks waits for rows that need
    less, and from then on none that needs as much or more may take any. While one waits, the
    scheduler begins no request. So those that it waits for come to their ends, and its turn comes.
    """

    def __init__(self, claims: Sequence[Claim], free: int) -> None:
        """`claims` of the rows, in the order in which they began."""
        self._claims, self._free = [*claims], free
        self._is_enough = sum(need for need, _ in self._claims) <= free
        self._limit: int | None = None  # the least need of a row that waits

    @property
    def has_refused(self) -> bool:
        return self._limit is not None

    def take(self, row: int, count: int) -> bool:
        """Whether the row may take `count` blocks, of those that it may need; if so, it has."""
        if self._is_enough:
            return True
        need, held = claim = self._claims[row]
        if self._limit is not None and need >= self._limit:
            return False
        self._claims[row] = need - count, held + count
        if is_safe(self._claims, self._free - count):
            self._free -= count
            return True
        self._claims[row], self._limit = claim, need
        return False


def most_blocks(tokens: np.ndarray, steps: np.ndarray, sizes: np.ndarray, block: int) -> int:
    """The most blocks that rows have at a time, if each takes a token in each step until its end.

    Args:
      tokens: `[N]`, those that each row has now.
      steps: `[N]`, after which each gives its blocks back; at least 1.
      sizes: `[N]`, tokens that each has at most.
      block: tokens of a block.
    """
    times = steps[:, None]  # between two ends it only grows
    blocks = -(-np.minimum(tokens + times, sizes) // block)
    return int(np.where(steps >= times, blocks, 0).sum(axis=1).max())
