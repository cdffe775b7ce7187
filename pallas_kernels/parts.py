"""One LoRA among several that one call adds: a rank bucket of one output slice."""

from typing import Any, NamedTuple


class LoRAPart(NamedTuple):
    """Adds `scales * (x @ A^T) @ B^T` to columns `[y_offset, y_offset + N)` of `y`.

    Attributes:
      lora_a: `[L, R, H]` (or `[L, 1, R, H]`), down-projections.
      lora_b: `[L, N, R]` (or `[L, 1, N, R]`), up-projections.
      indices: `[T]` integers, the adapter of each token, -1 for none; or the `Segments` of them.
      scales: a scalar, `[L]`, or None for 1.
      y_offset: first column of `y` that the part adds to (static).
    """

    lora_a: Any
    lora_b: Any
    indices: Any
    scales: Any = None
    y_offset: int = 0
