"""`Config`: how the Mosaic kernels cut their work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels cut their work. One `Config` gives a row the same bits in every batch.

    `split` and `warps` fix the order in which H is summed: other values change bits. The rest
    changes speed alone.

    Attributes:
      split: blocks of a cluster over which the shrink splits H: 1, 2, 4 or 8.
      rank_block: ranks that one block of the shrink computes, at most; a divisor of R is taken.
      stack: adapters that one block of the shrink multiplies at once.
      stages: pipeline stages of the shrink, at most.
      row_tiles: tiles of 64 tokens that share what a block of the shrink loads of A, at most: 1 or
        2. A launch takes the least of its parts, and 1 where two don't fit.
      block_n: output features of one block of the expand.
      expand_stack: adapters that one block of the expand multiplies at once.
      expand_stages: pipeline stages of the expand, at most. In the decode kernel they are those of
        the widest rows of B. Narrower rows may have more, up to four, that take no more bytes.
      expand_columns: a block of the expand takes `block_n` columns so many times, one after the
        other, at most. From 2 on it is doubled, up to 8, where a sweep has more than two parts.
      expand_row_tiles: as `row_tiles`, of the expand and B.
      warps: of a block of the decode kernel, which does both halves in one launch; None for two.
      column_clusters: clusters of the decode kernel that deal the columns of y among themselves.
    """

    split: int = 8
    rank_block: int = 128
    stack: int = 1
    stages: int = 4
    row_tiles: int = 1
    block_n: int = 64
    expand_stack: int = 1
    expand_stages: int = 2
    expand_columns: int = 1
    expand_row_tiles: int = 1
    warps: int | None = None
    column_clusters: int = 1

    def __post_init__(self) -> None:
        if self.warps not in (None, 4, 8, 16):
            raise ValueError(f"warps must be None, 4, 8 or 16, got {self.warps}")
        if self.split not in (1, 2, 4, 8):
            raise ValueError(f"split must be 1, 2, 4 or 8, got {self.split}")
        for name in ("row_tiles", "expand_row_tiles"):
            if getattr(self, name) not in (1, 2):
                raise ValueError(f"{name} must be 1 or 2, got {getattr(self, name)}")
        if self.block_n % 8 or not 8 <= self.block_n <= 256:
            raise ValueError(f"block_n must be a multiple of 8 up to 256, got {self.block_n}")
        counts = "stack", "stages", "expand_stack", "expand_stages", "expand_columns"
        for name in (*counts, "column_clusters"):
            if not 1 <= getattr(self, name) <= 64:
                raise ValueError(f"{name} must be between 1 and 64, got {getattr(self, name)}")
