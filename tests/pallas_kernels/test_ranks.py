"""The rank rules, as properties and as LoRAX's own table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk

RANKS = st.integers(1, 4096)
WORLDS = st.integers(1, 16)
BUCKETS = st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True).map(
    lambda multiples: tuple(8 * m for m in sorted(multiples))
)


@given(RANKS)
def test_tiers_follow_the_limits(rank):
    tier = pk.rank_tier(rank)
    assert tier is (
        pk.RankTier.LOOP
        if rank < 8
        else pk.RankTier.SGMV
        if rank < 16
        else pk.RankTier.CUSTOM
        if rank <= 128
        else pk.RankTier.OVERSIZED
    )
    assert pk.use_cutlass_shrink(rank) == (tier in (pk.RankTier.LOOP, pk.RankTier.SGMV))


@given(RANKS, WORLDS)
def test_padded_rank_is_the_least_that_every_shard_can_run(rank, world_size):
    least = 8 * world_size
    padded = pk.padded_rank(rank, world_size)
    if rank <= least:
        assert padded == least
    else:
        fits = (n for n in range(rank, 10**6) if n % 16 == 0 and n % least == 0)
        assert padded == next(fits)
    assert pk.padded_rank(padded, world_size) == padded


@given(RANKS, WORLDS, BUCKETS)
def test_bucket_is_the_smallest_that_holds_the_padded_rank(rank, world_size, buckets):
    padded = pk.padded_rank(rank, world_size)
    bucket = pk.rank_bucket(rank, world_size, buckets)
    assert bucket == min((b for b in buckets if b >= padded), default=padded)


@given(RANKS, WORLDS, st.sampled_from(["decode", "prefill"]))
def test_kernel_follows_phase_and_local_rank(rank, world_size, phase):
    local_rank = pk.padded_rank(rank, world_size) // world_size
    wanted = "bgmv" if phase == "decode" and local_rank <= 128 else "sgmv"
    assert pk.select_kernel(rank, phase, world_size) == wanted


@pytest.mark.parametrize(
    ("rank", "world_size", "padded", "bucket"),
    [
        (1, 1, 8, 8),
        (8, 1, 8, 8),
        (9, 1, 16, 16),
        (16, 1, 16, 16),
        (17, 1, 32, 32),
        (33, 1, 48, 64),
        (100, 1, 112, 128),
        (130, 1, 144, 144),
        (4, 2, 16, 16),
        (17, 2, 32, 32),
        (4, 8, 64, 64),
        (32, 3, 48, 64),  # LoRAX: 32, of which a third is no rank
    ],
)
def test_known_ranks(rank, world_size, padded, bucket):
    assert pk.padded_rank(rank, world_size) == padded
    assert pk.rank_bucket(rank, world_size) == bucket


@pytest.mark.parametrize(("value", "kernel"), [("1", "loop"), ("0", "bgmv"), ("", "bgmv")])
def test_environment_switches_kernels_off(monkeypatch, value, kernel):
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", value)
    assert pk.select_kernel(16, "decode") == kernel


def test_environment_is_read_at_each_call(monkeypatch):
    monkeypatch.delenv("JAX_LORA_DISABLE_KERNELS", raising=False)
    assert pk.select_kernel(16, "prefill") == "sgmv"
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "1")
    assert pk.select_kernel(16, "prefill") == "loop"
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        pk.select_kernel(16, "prefill")


@given(st.integers(1, 40), st.integers(0, 2), st.integers(1, 3), st.booleans())
def test_pad_rank_appends_zeros(rank, dim, world_size, from_the_end):
    shape = [2, 3, 4]
    shape[dim] = rank
    t = np.random.default_rng(rank).normal(size=shape).astype(np.float32)
    padded = pk.pad_rank(t, dim - 3 if from_the_end else dim, world_size)
    shape[dim] = pk.padded_rank(rank, world_size)
    assert isinstance(padded, np.ndarray) and padded.dtype == t.dtype
    assert list(padded.shape) == shape
    kept, added = np.split(padded, [rank], axis=dim)
    np.testing.assert_array_equal(kept, t)
    assert not added.any()


def test_pad_rank_under_jit_equals_numpy():
    t = np.random.default_rng(0).normal(size=(2, 5)).astype(jnp.bfloat16)
    padded = jax.jit(lambda t: pk.pad_rank(t, 1))(t)
    assert padded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(padded, pk.pad_rank(t, 1))


@settings(deadline=None)
@given(st.integers(1, 300))
def test_orientation_swaps_the_custom_tier_alone(rank):
    w = np.arange(6).reshape(2, 3)
    swapped = pk.rank_tier(rank) is pk.RankTier.CUSTOM
    np.testing.assert_array_equal(pk.orient_for_rank(w, rank), w.T if swapped else w)
    np.testing.assert_array_equal(pk.orient_for_rank(jnp.asarray(w), rank), w.T if swapped else w)


T = np.ones((4, 0, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pk.rank_tier(0), ValueError, "rank must be at least 1, got 0"),
        (lambda: pk.rank_tier(8.0), TypeError, "rank must be an int, got 8.0"),
        (lambda: pk.padded_rank(-3), ValueError, "rank must be at least 1, got -3"),
        (lambda: pk.padded_rank(8, 0), ValueError, "world_size must be at least 1, got 0"),
        (lambda: pk.rank_bucket(8, buckets=()), ValueError, r"multiples of 8, got \(\)"),
        (lambda: pk.rank_bucket(8, buckets=(16, 8)), ValueError, r"ascending .* got \(16, 8\)"),
        (lambda: pk.rank_bucket(8, buckets=(8, 8)), ValueError, r"got \(8, 8\)"),
        (lambda: pk.rank_bucket(8, buckets=(12,)), ValueError, r"got \(12,\)"),
        (lambda: pk.select_kernel(8, "train"), ValueError, "'decode' or 'prefill', got 'train'"),
        (lambda: pk.select_kernel(0, "decode"), ValueError, "rank must be at least 1, got 0"),
        (lambda: pk.pad_rank(T, 3), ValueError, r"axis of shape \(4, 0, 2\), got 3"),
        (lambda: pk.pad_rank(T, 1), ValueError, "rank must be at least 1, got 0"),
        (lambda: pk.orient_for_rank(T, 0), ValueError, "rank must be at least 1, got 0"),
        (lambda: pk.use_cutlass_shrink(0), ValueError, "rank must be at least 1, got 0"),
    ],
)
def test_errors_name_the_values(call, error, message):
    with pytest.raises(error, match=message):
        call()
