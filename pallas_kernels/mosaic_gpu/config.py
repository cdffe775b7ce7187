"""What the Mosaic kernels take, and how they cut their work."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import DTypeLike

MAX_RANK = 512
MAX_FEATURES = 131072
# Tokens of a tile: wgmma has no other M.
TILE = 64
# Columns that a tile is multiplied with at once: where wgmma's N ends. Two tiles together have half
# as many, as their float32 sums would be all registers of a thread.
MAX_COLUMNS = 256
# A block's share of H is a multiple of this.
SPLIT_UNIT = 128
MULTIPROCESSORS = 132  # of an H100
# Of the decode kernel, which looks for equal adapters among all tokens.
MAX_DECODE_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels cut their work. One `Config` gives a row the same bits in every batch.

    `split` and `warps` fix the order in which H is summed: other values change bits. The rest
    changes speed alone.

    Attributes:
      split: blocks of a cluster over which the shrink splits H: 1, 2, 4 or 8.
      rank_block: ranks that one block of the shrink computes, at most; a divisor of R is taken.
      stack: adapters that one block of the shrink multiplies at once.
      chunks: blocks among which the shrink deals a tile's adapters.
      stages: pipeline stages of the shrink, at most.
      row_tiles: tiles of 64 tokens that share what a block of the shrink loads of A, at most: 1 or
        2. A launch takes the least of its parts, and 1 where two don't fit.
      block_n: output features of one block of the expand.
      expand_stack: adapters that one block of the expand multiplies at once.
      expand_stages: pipeline stages of the expand, at most; in the decode kernel those of its
        highest rank, beside which lower ones may have up to four.
      expand_columns: how many times `block_n` columns a block of the expand takes in turn, at most;
        where it holds more than two parts at once twice as many, up to 8.
      expand_row_tiles: as `row_tiles`, of the expand and B.
      warps: of a block of the decode kernel, which does both halves in one launch; None for two.
      column_clusters: clusters of the decode kernel that deal the columns of y among themselves.
    """

    split: int = 8
    rank_block: int = 128
    stack: int = 1
    chunks: int = 1
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
        counts = "stack", "chunks", "stages", "expand_stack", "expand_stages", "expand_columns"
        for name in (*counts, "column_clusters"):
            if not 1 <= getattr(self, name) <= 64:
                raise ValueError(f"{name} must be between 1 and 64, got {getattr(self, name)}")


def rank_width(rank: int, at_most: int) -> int:
    """Ranks of one block of the shrink: the largest divisor of R up to `at_most`, in eights.

    Ranks such as 16 x 17 have no fair divisor below 128; wgmma's N ends at 256.
    """
    divisors = [d for d in range(8, MAX_COLUMNS + 1, 8) if rank % d == 0]
    fair = [d for d in divisors if d <= at_most]
    return fair[-1] if fair and fair[-1] >= min(rank, 48) else divisors[-1]


def default_config(
    num_tokens: int, features: int, width: int, rank: int, num_adapters: int
) -> Config:
    """The config of a case, from static shapes alone; `split` from H, so T changes no bit.

    `features` is H, `width` N, `num_adapters` L.
    """
    tiles = -(-num_tokens // TILE)
    per_tile = min(num_tokens, TILE, num_adapters)  # adapters of a tile, at most
    few = tiles * -(-width // 128) < MULTIPROCESSORS  # tiles that don't fill them as they are
    # A cluster's blocks exchange 64 x R x split^2 floats per tile, which costs more than the
    # shorter way through H saves. H100, add_lora, H = N = 4096, T = 4096, one adapter: R=16 47.3 us
    # at 4, 43.7 at 2, 49.0 at 1; R=128 95.5, 54.6, 60.1.
    split = min(2, 1 << (-(-features // SPLIT_UNIT) - 1).bit_length())
    rank_block = 64 if few else 128
    part = rank_width(rank, rank_block)
    # A block's fixed cost (x, the exchange) wants many adapters in it: 64 of them, R=16, T=64: 28.9
    # us in stacks of 2, 21.9 of 8. With many tokens a tile seldom has more than two: 7 adapters,
    # T=4096, R=48 55.6 us with 1, 45.3 with 2.
    stack = max(1, min(per_tile, 128 // part if few else min(2, 256 // part)))
    chunks = -(-per_tile // stack) if few else 1
    # Few tokens: narrow blocks, so that there are enough, and all of wgmma's N. Many: occupancy.
    block_n = 32 if few else 64
    slot = block_n * rank * 2
    expand_stack = max(1, min(per_tile, 256 // block_n, 32 * 1024 // slot)) if few else 1
    pipeline = 96 * 1024 // (expand_stack * slot) if few else 16 * 1024 // slot
    # A block's next columns come while it adds to these. H100, T=4096, 32 adapters, R=16: 53.8 us
    # with 1, 50.1 with 4, 51.2 with 8; R=64 56.5 with 1, 54.3 with 2, 56.9 with 4. But first of all
    # each multiprocessor wants blocks.
    blocks = tiles * -(-width // block_n)
    columns = max(1, min(4 if rank <= 32 else 2, blocks // (4 * MULTIPROCESSORS)))
    config = Config(
        split=split,
        rank_block=rank_block,
        stack=stack,
        chunks=chunks,
        stages=4,
        block_n=block_n,
        expand_stack=expand_stack,
        expand_stages=max(1, min(6 if few else 2, pipeline)),
        expand_columns=columns,
    )
    if rank >= 128 and num_tokens >= 4096 and not few:  # fewer tokens have not been timed
        return _of_high_rank(config, num_tokens, width, rank)
    return config


def _of_high_rank(config: Config, num_tokens: int, width: int, rank: int) -> Config:
    """Of many tokens, what reads A, B and v less often: they come from the L2 cache, once per
    block, and from rank 128 on take longer than x and y do from memory."""
    pairs = -(-num_tokens // (2 * TILE))
    # H100, T=4096, 8 adapters, R=256: 90.3 us with one tile and 2 columns in turn, 81.0 with two
    # tiles in the shrink and 4 columns. The expand alone 36.4 with two tiles and 8 columns, 34.3
    # with one, 16 columns, and room for two blocks on a multiprocessor. R=512, where v of two tiles
    # leaves the expand little room: 165.6, 119.8 with two in the shrink alone, 122.6 in both; the
    # expand alone 58.2 with 8 columns, 54.9 with 16.
    # T=8192, one adapter of R=128: 108.8, 98.1 with two in both.
    rank_blocks = rank // rank_width(rank, config.rank_block)
    fill = pairs * rank_blocks * config.split > MULTIPROCESSORS * 3 // 4
    expand_row_tiles = 2 if rank < 192 else 1
    blocks = -(-num_tokens // (expand_row_tiles * TILE)) * -(-width // config.block_n)
    return dataclasses.replace(
        config,
        row_tiles=2 if fill else 1,
        expand_row_tiles=expand_row_tiles,
        expand_columns=max(1, min(8 if rank < 192 else 16, -(-blocks // MULTIPROCESSORS))),
        # Of higher ranks there is one block on a multiprocessor in any case. R=512, one tile: 148.4
        # us with one stage, 132.7 with two.
        expand_stages=2 if rank > 320 else 1,
    )


def decode_config(
    num_tokens: int,
    features: int,
    width: int,
    rank: int,
    *,
    buckets: int = 1,
    exclusive: bool = False,
    fuse: bool = False,
) -> Config:
    """The decode kernel's config for ranks up to `rank` and ys of `width` columns together; `warps`
    is None where two launches are taken. `buckets` counts lists of ids, `exclusive` if no token is
    in several, `fuse` if XLA adds, so that it may run beside what makes y."""
    if num_tokens > MAX_DECODE_TOKENS:
        return Config()
    config = _decode_config(num_tokens, width, rank, buckets)
    if buckets > 1 and rank >= 64:
        # Few tokens have the highest rank, and one cluster would be busy with it when all others
        # are done. H100, Llama-3-8B's projections, T=64, 8 adapters of ranks 8 to 128, one layer:
        # 124 us with 1, 96 with 2, 86 with 3, 88 with 4. Where low ranks need not have as many, a
        # layer takes in a step that runs LoRA beside the products 57 us more than without LoRA
        # with 3, 53 with 4 (12 for gate and up). Since blocks need less memory, and so find room
        # beside a product, clusters beyond one wave of them wait: 44 us with 12 for gate and up, 40
        # with 4; of all 32 layers in another run 41 with 4, 31 with 3, 40 with 2.
        wide = 3 if fuse else 12
        clusters = (wide if width > 8192 else 4) if exclusive else 3
        return dataclasses.replace(config, column_clusters=max(clusters, config.column_clusters))
    return config


def _decode_config(num_tokens: int, width: int, rank: int, buckets: int) -> Config:
    if num_tokens > 128 and (rank > 128 or (rank == 128 and buckets > 1)):
        # H100, T=256, one launch and two: 64 adapters of R=128 53.2 us and 59.7, 8 of them 20.6 and
        # 24.9, one 20.5 and 19.6; 32 of R=256 60.6 and 58.5, 8 of them 44.1 and 28.0. Several
        # buckets, each with clusters of its own, have not been timed in one.
        return Config()
    # Copies in flight, some 8 to 12 KiB of B in a warp: more keep others' A waiting. H100, T=64, 64
    # adapters of R=64, 30.0 us with 2 stages, 35.2 with 4. R=128 comes by 64 ranks (`turn_ranks`).
    # Up to six turns all of B: q, k, v of Llama-3-8B, R=16, 8 adapters 6.1 us with 4 copies, 5.8
    # with 6, 64 adapters 18.7 and 17.9; but of more turns: 14336 columns, 18.9 with 4, 20.8 with 6.
    all_at_once = width <= 6 * 8 * 4 * 32
    expand_stages = min(6 if all_at_once else 4, 128 // rank) if rank <= 64 else 3
    # With one token few blocks have work, so more clusters deal y's columns: H100, T=1, R=16,
    # H=N=4096, 4.5 us with 4, 5.7 with 2, 4.8 with 8. So too if columns are many: T=64, 8 adapters
    # of R=16, two slices of 14336 columns, 14.9 us with 1, 11.1 with 2.
    clusters = max(4 // max(1, num_tokens), 2 if width > 8192 else 1)
    # All of a warp's columns of A at once up to H=8192. H100, T=64, 8 adapters of R=16, H=14336,
    # 6.7 us with 2 stages, 6.1 with 4.
    return Config(split=8, warps=4, stages=4, expand_stages=expand_stages, column_clusters=clusters)


def missing(
    weight_dtype: DTypeLike,
    rank: int,
    features: int | None = None,
    width: int | None = None,
    y_dtype: DTypeLike | None = None,
    y_width: int | None = None,
    y_offset: int = 0,
) -> str | None:
    """What the kernels lack for a case, as the object of "lacks"; None if they take it.

    `features` is H (None for an expand), `width` N and `y_width` y's columns (None for a shrink).
    x may have any dtype of the ops.
    """
    if weight_dtype not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(weight_dtype).name} weights (it takes bfloat16 and float16)"
    if rank != 8 and (rank % 16 or not 16 <= rank <= MAX_RANK):
        return f"rank {rank} (it takes 8 and the multiples of 16 up to {MAX_RANK})"
    for name, size in (("H", features), ("N", width)):
        if size is not None and (size % 8 or not 64 <= size <= MAX_FEATURES):
            return f"{name}={size} (it takes multiples of 8 from 64 to {MAX_FEATURES})"
    if y_dtype is not None and y_width is not None:  # TMA copies and strides in units of 16 bytes
        row, first = (n * jnp.dtype(y_dtype).itemsize for n in (y_width, y_offset))
        if row % 16:
            return f"rows of y of {row} bytes (it takes multiples of 16)"
        if first % 16:
            return f"y_offset={y_offset}, {first} bytes into y (it takes multiples of 16)"
    return None
