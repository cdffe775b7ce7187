"""Adapters as stacks in 8 bits hold them: a scale for each rank column of each adapter."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, Float, Shaped

from pallas_kernels.stacks import EIGHT_BITS, EIGHT_BITS_NAMES


class Quantised(NamedTuple):
    """`(scales * (x @ lora_a^T)) @ lora_b^T`, as a `LoRAPart` computes it.

    Attributes:
      lora_a: `[*L, R, H]` and lora_b: `[*L, N, R]`, both of one dtype of 8 bits.
      scales: `[*L, R]` float32.
    """

    lora_a: Shaped[np.ndarray, "*L R H"]
    lora_b: Shaped[np.ndarray, "*L N R"]
    scales: Float[np.ndarray, "*L R"]


def quantised(
    lora_a: np.ndarray,
    lora_b: np.ndarray,
    scales: float | np.ndarray = 1.0,
    dtype: DTypeLike = "float8_e4m3fn",
) -> Quantised:
    """Adapters in 8 bits, for `LoRAPart(*quantised(lora_a, lora_b, scales))`.

    Each row of A, and each column of B, is divided by what makes its largest element the dtype's
    largest number. One scale for each rank column holds both, times the adapter's own. Elements are
    rounded to the nearest, ties to even. Those of int8 are so at most 1/254 of the largest of their
    row or column away; those of float8_e4m3fn a sixteenth of themselves, or 2^-18 of that largest.

    Args:
      lora_a: `[*L, R, H]`, finite; of the host.
      lora_b: `[*L, N, R]`.
      scales: a number, or `[*L]`.
      dtype: "int8" (127 is its largest number), or "float8_e4m3fn" (448).

    Raises:
      ValueError: another `dtype`.
    """
    held = jnp.dtype(dtype)
    if held not in EIGHT_BITS:
        raise ValueError(f"stacks in 8 bits are {EIGHT_BITS_NAMES}, not {held}; give one as dtype=")
    (a, of_a), (b, of_b) = _divided(lora_a, -1, held), _divided(lora_b, -2, held)
    own = np.asarray(scales, np.float64)[..., None]
    return Quantised(a, b, (own * of_a * of_b).astype(np.float32))


def _divided(weights: np.ndarray, axis: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`weights` in `dtype`, and what each line along the axis was divided by, float64."""
    wide = np.asarray(weights).astype(np.float32, copy=False)
    largest = np.float32(EIGHT_BITS[dtype])
    divisor = np.max(np.abs(wide), axis=axis, keepdims=True) / largest
    divisor = np.where(divisor > 0, divisor, np.float32(1))
    # A subnormal divisor is so coarse that a quotient may be above the largest number.
    quotient = np.clip(wide / divisor, -largest, largest)
    whole = np.rint(quotient) if dtype == np.int8 else quotient
    return whole.astype(dtype), np.squeeze(divisor, axis).astype(np.float64)
