"""How the prefill kernels cut a case: rules over static shapes.

Times in comments are of an H100 with H = N = 4096; docs/lab/prefill-comments.md has more of them.
"""

import dataclasses

from pallas_kernels.mosaic_gpu.chip import MAX_COLUMNS, MULTIPROCESSORS, TILE
from pallas_kernels.mosaic_gpu.config import Config

# A block's share of H is a multiple of this.
SPLIT_UNIT = 128


def rank_width(rank: int, at_most: int) -> int:
    """Ranks of one block of the shrink: the largest divisor of R up to `at_most`, in eights.

    Where all of these are small, as for 16 x 17, it is the largest up to 256, where wgmma's N ends.
    """
    divisors = [d for d in range(8, MAX_COLUMNS + 1, 8) if rank % d == 0]
    fair = [d for d in divisors if d <= at_most]
    return fair[-1] if fair and fair[-1] >= min(rank, 48) else divisors[-1]


def default_config(
    num_tokens: int, features: int, width: int, rank: int, num_adapters: int
) -> Config:
    """The config of a case, from static shapes alone.

    `features` is H, `width` N, `num_adapters` L.
    """
    tiles = -(-num_tokens // TILE)
    per_tile = min(num_tokens, TILE, num_adapters)  # adapters of a tile, at most
    split = _split(tiles, features, rank)
    if tiles * -(-width // 128) < MULTIPROCESSORS:
        return _few_tiles(split, rank, per_tile)
    config = _many_tiles(split, tiles, width, rank, per_tile)
    if rank >= 128 and num_tokens >= 4096:  # fewer tokens have not been timed
        config = _high_rank(config, num_tokens, width, rank)
    return config


def _split(tiles: int, features: int, rank: int) -> int:
    """Blocks of a cluster: as many as it takes to fill the chip, since each has a shorter way
    through H then. But they exchange 64 x R x split floats per tile.

    H200: T=512, 4 adapters of R=16, 13.1 us with 2, 10.9 with 4, 9.7 with 8. T=1024, 8 of R=128,
    21.4 us with 2, 19.4 with 4, 23.5 with 8.
    """
    most = MULTIPROCESSORS * 3 // 2 if rank <= 32 else MULTIPROCESSORS * 5 // 9
    split = next((s for s in (8, 4) if tiles * s <= most), 2)
    return min(split, 1 << (-(-features // SPLIT_UNIT) - 1).bit_length())


def _few_tiles(split: int, rank: int, per_tile: int) -> Config:
    """For tiles too few to keep the multiprocessors busy: narrow blocks, so that there are more,
    which take many adapters at once and so use all of wgmma's N."""
    # Every block pays for x and for the exchange, whatever its adapters. T=64, 64 adapters of R=16:
    # 28.9 us with 2 in a round, 21.9 with 8.
    adapter_bytes = 32 * rank * 2  # of B, in one block
    expand_stack = max(1, min(per_tile, MAX_COLUMNS // 32, 32 * 1024 // adapter_bytes))
    expand_stages = min(6, 96 * 1024 // (expand_stack * adapter_bytes))
    if rank >= 128:  # H200, T=256, 8 adapters of R=128: 18.9 us with 4 and 3 stages, 12.5 so
        expand_stack, expand_stages = 1, 2
    return Config(
        split=split,
        rank_block=64,
        # H200, T=256, 64 adapters of R=128: 55.1 us with 2, 48.1 with 4.
        stack=max(1, min(per_tile, (256 if rank >= 128 else 128) // rank_width(rank, 64))),
        stages=4,
        block_n=32,
        expand_stack=expand_stack,
        expand_stages=max(1, expand_stages),
    )


def _many_tiles(split: int, tiles: int, width: int, rank: int, per_tile: int) -> Config:
    """For tiles that fill the chip: what lets several blocks share a multiprocessor."""
    block_n = 64
    # A block adds to its columns while the next ones come, but each multiprocessor wants blocks
    # too. T=4096, 32 adapters of R=16: 53.8 us with 1, 50.1 with 4, 51.2 with 8.
    blocks = tiles * -(-width // block_n)
    columns = max(1, min(4 if rank <= 32 else 2, blocks // (4 * MULTIPROCESSORS)))
    adapter_bytes = block_n * rank * 2  # of B, in one block
    # A tile of decode rows has many adapters. Among many tiles it is one, and room for more
    # adapters would cost the others blocks on a multiprocessor. H200, 64 rows of 64 adapters and a
    # prompt of 1984: R=64 58.0 us with 1, 47.4 with 2, 42.3 with 4; R=128 78.3, 66.7, 70.3.
    at_once = 1 if tiles >= 64 else min(MAX_COLUMNS // block_n, max(2, 8 * 1024 // adapter_bytes))
    return Config(
        split=split,
        rank_block=128,
        # A tile seldom has more than two adapters. T=4096, 7 of R=48: 55.6 us with 1, 45.3 with 2.
        # Room for more costs stages. H200, T=2048, 8 of R=16: 21.3 us with 2, 30.8 with 8.
        stack=max(1, min(per_tile, 2, MAX_COLUMNS // rank_width(rank, 128))),
        stages=4,
        block_n=block_n,
        expand_stack=max(1, min(per_tile, at_once)),
        # H200, 64 rows of 64 adapters of R=128 and a prompt of 1984: 168 us with 1, 113 with 2.
        expand_stages=max(1, min(2, 32 * 1024 // adapter_bytes)),
        expand_columns=columns,
    )


def _high_rank(config: Config, num_tokens: int, width: int, rank: int) -> Config:
    """For high ranks and many tokens: what reads A, B and v less often. Each block reads them from
    the L2 cache; from rank 128 on that takes longer than x and y take from device memory."""
    # T=4096, 8 adapters of R=256: 90.3 us with one tile and 2 columns, 81.0 with two tiles in the
    # shrink and 4 columns. The expand has one tile, as v of two leaves too little shared memory.
    pairs = -(-num_tokens // (2 * TILE))
    rank_blocks = rank // rank_width(rank, config.rank_block)
    fill = pairs * rank_blocks * config.split > MULTIPROCESSORS * 3 // 4
    # A pair of tiles has the adapters of both. H200, R=128, H=N=2048, T=4096, 64 adapters: 47.0 us
    # with two tiles, 37.2 with one; H=N=4096, one adapter: 38.9 and 41.0.
    expand_row_tiles = 2 if rank < 192 and num_tokens * width > 4096 * 4096 else 1
    columns = config.expand_columns
    if rank >= 192 or expand_row_tiles == 2:  # then few blocks have room on a multiprocessor
        blocks = -(-num_tokens // (expand_row_tiles * TILE)) * -(-width // config.block_n)
        columns = max(1, min(8 if rank < 192 else 16, -(-blocks // MULTIPROCESSORS)))
    return dataclasses.replace(
        config,
        row_tiles=2 if fill else 1,
        expand_row_tiles=expand_row_tiles,
        expand_columns=columns,
        # Above rank 320 a multiprocessor holds one block in any case, so a second stage is free.
        # R=512, one tile: 148.4 us with one stage, 132.7 with two.
        expand_stages=2 if rank > 320 else 1,
    )
