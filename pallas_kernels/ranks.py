"""The rank rules of LoRAX: padding, tiers, jit-static buckets and the choice between bgmv and sgmv.

Pure Python, no device. Source: predibase/lorax, server/lorax_server/utils/punica.py.
"""

import enum
import itertools
import math
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

if TYPE_CHECKING:
    import jax

MIN_SGMV_RANK = 8
MIN_RANK_CUSTOM = 16
MAX_RANK_CUSTOM = 128
SGMV_BLOCK_SIZE = 16
BGMV_MAX_RANK = 128

DEFAULT_BUCKETS = (8, 16, 32, 64, 128)

Phase = Literal["decode", "prefill"]
Kernel = Literal["bgmv", "sgmv", "loop"]


class RankTier(enum.Enum):
    """Which of LoRAX's kernels a rank would run on."""

    LOOP = "loop"
    SGMV = "sgmv"
    CUSTOM = "custom"
    OVERSIZED = "oversized"


def _positive(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def rank_tier(rank: int) -> RankTier:
    """LOOP below 8, SGMV 8-15, CUSTOM 16-128, OVERSIZED above 128.

    Raises:
      ValueError: `rank` is below 1.
    """
    rank = _positive("rank", rank)
    if rank < MIN_SGMV_RANK:
        return RankTier.LOOP
    if rank < MIN_RANK_CUSTOM:
        return RankTier.SGMV
    return RankTier.CUSTOM if rank <= MAX_RANK_CUSTOM else RankTier.OVERSIZED


def padded_rank(rank: int, world_size: int = 1) -> int:
    """The rank that `rank` is zero-padded to, so that each of `world_size` shards can run a kernel.

    `8 * world_size` up to that value; above, the next multiple of 16 that is also a multiple of
    `8 * world_size`. LoRAX rounds to 16 alone, which leaves three shards of rank 32 with 32 / 3.

    Raises:
      ValueError: `rank` or `world_size` is below 1.
    """
    rank, world_size = _positive("rank", rank), _positive("world_size", world_size)
    least = MIN_SGMV_RANK * world_size
    if rank <= least:
        return least
    step = math.lcm(SGMV_BLOCK_SIZE, least)
    return -(-rank // step) * step


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """`buckets` as a tuple, or an error.

    Raises:
      ValueError: empty, not strictly ascending, or not multiples of 8.
    """
    checked = tuple(_positive("a bucket", b) for b in buckets)
    ascending = all(a < b for a, b in itertools.pairwise(checked))
    if not checked or not ascending or any(b % MIN_SGMV_RANK for b in checked):
        raise ValueError(f"buckets must be strictly ascending multiples of 8, got {checked}")
    return checked


def rank_bucket(rank: int, world_size: int = 1, buckets: Sequence[int] = DEFAULT_BUCKETS) -> int:
    """The jit-static rank that a stack is allocated with for adapters of `rank`.

    The smallest bucket that holds `padded_rank(rank, world_size)`; above the last bucket, the
    padded rank itself. Compiled code depends on buckets, never on a true rank.

    Raises:
      ValueError: `rank` or `world_size` is below 1, or `buckets` are not ascending multiples of 8.
    """
    padded = padded_rank(rank, world_size)
    return next((b for b in check_buckets(buckets) if b >= padded), padded)


def kernels_disabled() -> bool:
    """Whether `JAX_LORA_DISABLE_KERNELS=1` is set. Read at each call, so at each trace."""
    value = os.environ.get("JAX_LORA_DISABLE_KERNELS", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"JAX_LORA_DISABLE_KERNELS must be 0 or 1, got {value!r}")
    return value == "1"


def check_phase(phase: str) -> Phase:
    """`phase`, or a ValueError that lists the phases."""
    if phase in ("decode", "prefill"):
        return cast(Phase, phase)
    raise ValueError(f"phase must be 'decode' or 'prefill', got {phase!r}")


def select_kernel(rank: int, phase: str, world_size: int = 1) -> Kernel:
    """The kernel that serves adapters of `rank` in `phase`.

    Prefill is "sgmv". Decode is "bgmv" while the local rank (padded rank / world size) is at most
    `BGMV_MAX_RANK`, and "sgmv" beyond. "loop" where `JAX_LORA_DISABLE_KERNELS=1`.

    Raises:
      ValueError: `phase` is not "decode" or "prefill"; `rank` or `world_size` is below 1.
    """
    local_rank = padded_rank(rank, world_size) // world_size
    phase = check_phase(phase)
    if kernels_disabled():
        return "loop"
    return "bgmv" if phase == "decode" and local_rank <= BGMV_MAX_RANK else "sgmv"


def pad_rank[T: (np.ndarray, jax.Array)](t: T, dim: int, world_size: int = 1) -> T:
    """`t` with axis `dim` zero-padded to `padded_rank(t.shape[dim], world_size)`.

    A numpy array stays a numpy array.

    Raises:
      ValueError: `t` has no axis `dim`, or that axis is empty.
    """
    if not -t.ndim <= dim < t.ndim:
        raise ValueError(f"dim must name an axis of shape {t.shape}, got {dim}")
    rank = t.shape[dim]
    widths = [(0, 0)] * t.ndim
    widths[dim] = (0, padded_rank(rank, world_size) - rank)
    if isinstance(t, np.ndarray):
        return np.pad(t, widths)
    import jax.numpy as jnp  # what reads adapters' files alone need not wait for it

    return jnp.pad(t, widths)


def use_cutlass_shrink(rank: int) -> bool:
    """Whether LoRAX shrinks `rank` by its CUTLASS kernel, whose A is `[R, H]`: below 16."""
    return _positive("rank", rank) < MIN_RANK_CUSTOM


def orient_for_rank[T: (np.ndarray, jax.Array)](w: T, rank: int) -> T:
    """`w` as LoRAX stores it for `rank`: axes 0 and 1 swapped for ranks 16 to 128, else as is."""
    if MIN_RANK_CUSTOM <= _positive("rank", rank) <= MAX_RANK_CUSTOM:
        return w.swapaxes(0, 1)
    return w
