"""How the decode kernel cuts its work, where the caller does not say."""

import dataclasses

from pallas_kernels.mosaic_gpu.config import Config

# The most tokens of a launch; XLA seats them (`Seating`) where there are more than 256.
MAX_DECODE_TOKENS = 1024
# Rows of a launch: those tokens, once for each of a token's adapters.
MAX_DECODE_ROWS = 2048
# Up to so many tokens a launch finds the tokens of each cluster by itself, if it is given raw ids.
# It compares each token with all earlier ones: of 512 that would be four times what it is of 256.
MAX_UNSEATED_TOKENS = 256
# Clusters of eight tokens read an eighth of so many elements of A and B from the L2 cache, in the
# time that two launches take. H200, T=384, 8 adapters of R=64, H=28672, N=2048: 35.6 us in one,
# 25.6 in two. T=192, 2 of R=128, H=14336, N=8192, which is 550 million: 20.9 and 24.3.
_MOST_ELEMENTS = 700_000_000


def decode_config(
    num_tokens: int,
    width: int,
    rank: int,
    *,
    features: int = 0,
    buckets: int = 1,
    delta: bool = False,
    weight_bytes: int = 2,
) -> Config:
    """The decode kernel's config for ranks up to `rank` and ys of `width` columns together; `warps`
    is None where two launches are taken. `features`: of x, which decide above 128 tokens alone.

    A token that may have several adapters counts once. `buckets` counts the ranges of ids. `delta`:
    XLA adds what the kernel makes, so that it may run beside the product that makes y.
    `weight_bytes`: of an element of A or B.
    """
    columns = features + width
    if num_tokens > _most_tokens(rank, buckets, num_tokens * rank * columns):
        return Config()
    config = _decode_config(num_tokens, width, rank, weight_bytes, delta)
    if buckets > 1 and rank >= 64:
        clusters = _clusters_of_buckets(num_tokens, width, delta)
        if num_tokens <= 64:
            clusters = max(clusters, config.column_clusters)
        return dataclasses.replace(config, column_clusters=clusters)
    return config


def _clusters_of_buckets(num_tokens: int, width: int, delta: bool) -> int:
    """Clusters that deal the columns of y where there are several buckets, the highest of 64 ranks
    or more.

    Few tokens have the highest rank: one cluster would be busy with it when all others are done.
    H100, Llama-3-8B's projections, T=64, 8 adapters of ranks 8 to 128, one layer: 124 us with 1
    cluster, 96 with 2, 88 with 4. Gate and up, which are wide, take 12. Beside a product they take
    3, as clusters beyond those that fit at once wait: all 32 layers 41 us with 4, 31 with 3.

    More tokens keep all busy, and each cluster computes v. H200, ranks 16 to 128, T=192, 16
    adapters, H=14336: 23.9 us with 1, 19.6 with 2, 33.1 with 4; T=512, 32 adapters: 21.1 with 1,
    23.8 with 2; T=384, 32 adapters, H=28672, N=14336: 75.1 with 1, 82.0 with 2.
    """
    if num_tokens > 256:
        return 1
    if num_tokens > 64:
        return 2
    return 4 if width <= 8192 else 3 if delta else 12


def _most_tokens(rank: int, buckets: int, elements: int = 0) -> int:
    """Up to how many tokens one launch is faster than two. `elements`: of A and B that all tokens
    would read if each had to read its own.

    It holds for K adapters per token too. One launch then takes as long as for K times the tokens.
    But two launches are two for each of the K columns of ids, so that both grow alike.

    Each cluster of eight tokens reads its adapter from the L2 cache, tiles of 64 tokens read it
    once. But clusters take tokens in any order, and decode rows beside a prompt, without loss.

    H200, T=256, R=128: 8 adapters 17.8 us in one, 12.4 in two; 64 adapters 39.5 and 48.1; 63 rows
    of 63 adapters and 193 of one 42.7 and 70.3; 2 adapters, H=28672, 44.0 and 19.8. T=512, R=16: 4
    adapters 7.6 us in one, 9.7 in two; shuffled, 32 adapters, 9.3 and 16.6; 64 rows of 64 adapters
    and a prompt of 448 tokens 14.5 and 24.3. Several buckets are two launches of parts that follow
    each other. Ranks 16 to 128, T=512, 32 adapters: 21.1 us in one, 35.2 in two; T=768, 64
    adapters, H=14336: 63.5 and 98.2.
    """
    if rank > 128:
        return 128
    if buckets > 1:
        return 768 if rank > 32 else MAX_DECODE_TOKENS
    if elements > _MOST_ELEMENTS:
        return most_unseated_tokens(rank)
    if rank > 64:
        return MAX_UNSEATED_TOKENS
    return 512 if rank > 32 else MAX_DECODE_TOKENS


def most_unseated_tokens(rank: int) -> int:
    """Up to how many tokens with raw ids, all of one range, are one launch and nothing besides,
    however wide A and B are."""
    return 128 if rank > 64 else MAX_UNSEATED_TOKENS


def _decode_config(
    num_tokens: int, width: int, rank: int, weight_bytes: int, delta: bool
) -> Config:
    # More copies on their way would keep others' A waiting. H100, T=64, 64 adapters of R=64: 30.0
    # us with 2, 35.2 with 4. Where a warp has six turns at most, all of its B comes at once: q, k
    # and v of Llama-3-8B, R=16, 64 adapters 18.7 us with 4, 17.9 with 6. R=128 comes in sections of
    # 64 ranks (`turn_ranks`).
    all_at_once = width <= 6 * 8 * 4 * 32
    most = 256 // (rank * weight_bytes)
    expand_stages = min(6 if all_at_once else 4, most) if rank <= 64 else 3
    # With one token few blocks have work, so that more clusters deal y's columns. H100, T=1, R=16,
    # H=N=4096: 4.5 us with 4, 5.7 with 2, 4.8 with 8. The same if there are many columns: T=64, 8
    # adapters of R=16, gate and up of 14336 columns: 14.9 us with 1, 11.1 with 2. Beside a product
    # 1 leaves it more multiprocessors to start on. H200, a layer's four launches: 21.7 us with 1,
    # 25.7 with 2.
    clusters = max(4 // max(1, num_tokens), 2 if width > 8192 and not delta else 1)
    # All of a warp's columns of A come at once up to H=8192. H100, T=64, 8 adapters of R=16,
    # H=14336: 6.7 us with 2 stages, 6.1 with 4.
    return Config(split=8, warps=4, stages=4, expand_stages=expand_stages, column_clusters=clusters)
