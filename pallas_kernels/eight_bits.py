"""Adapters as stacks in 8 bits hold them: a scale for each rank column of each adapter."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pallas_kernels.stacks import EIGHT_BITS

_LARGEST = np.float32(448)  # that a byte holds


class Quantised(NamedTuple):
    """`(scales * (x @ lora_a^T)) @ lora_b^T`, as a `LoRAPart` computes it.

    Attributes:
      lora_a: `[*L, R, H]` and lora_b: `[*L, N, R]`, float8_e4m3fn.
      scales: `[*L, R]` float32.
    """

    lora_a: Float[np.ndarray, "*L R H"]
    lora_b: Float[np.ndarray, "*L N R"]
    scales: Float[np.ndarray, "*L R"]


def quantised(
    lora_a: np.ndarray, lora_b: np.ndarray, scales: float | np.ndarray = 1.0
) -> Quantised:
    """Adapters in 8 bits, for `LoRAPart(*quantised(lora_a, lora_b, scales))`.

    Each row of A, and each column of B, is divided by what makes its largest element 448. One scale
    for each rank column holds both, times the adapter's own. Elements are rounded to the nearest;
    those below 2^-19 of the largest of their row or column become zero or as little as that.

    Args:
      lora_a: `[*L, R, H]`, finite; of the host.
      lora_b: `[*L, N, R]`.
      scales: a number, or `[*L]`.
    """
    (a, of_a), (b, of_b) = _divided(lora_a, -1), _divided(lora_b, -2)
    own = np.asarray(scales, np.float64)[..., None]
    return Quantised(a, b, (own * of_a * of_b).astype(np.float32))


def _divided(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """`weights` in 8 bits, and what each line along the axis was divided by, float64."""
    wide = np.asarray(weights).astype(np.float32, copy=False)
    divisor = np.max(np.abs(wide), axis=axis, keepdims=True) / _LARGEST
    divisor = np.where(divisor > 0, divisor, np.float32(1))
    return (wide / divisor).astype(EIGHT_BITS), np.squeeze(divisor, axis).astype(np.float64)
