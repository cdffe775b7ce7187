"""Adapters in and out of stacks in 8 bits, and how far these are from what they hold."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jax_lora.adapters import LoRAWeights
from jax_lora.adapters.types import SharedHalf
from pallas_kernels.eight_bits import Quantised, quantised

# What a module adds may differ from the adapter's own by so much of its norm. Rounding both halves
# of random weights makes some 0.01 in int8, and 0.04 in float8_e4m3fn. More says that ranks of the
# adapter cancel each other; in int8 also that a few weights are far larger than others beside them.
MAX_ERROR = 0.1


class InEightBits(NamedTuple):
    """Those of an adapter's modules that are in 8 bits, and the error of each; see `error_of`."""

    modules: Mapping[str, Quantised]
    errors: Mapping[str, float]

    @property
    def worst(self) -> str | None:
        """The module with the largest error; None if no module is in 8 bits."""
        return max(self.errors, key=lambda module: self.errors[module], default=None)

    @property
    def largest(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def is_taken(self) -> bool:
        """Whether a bank takes it so."""
        return self.largest <= MAX_ERROR


def in_eight_bits(
    name: str, modules: Mapping[str, LoRAWeights], dtypes: Mapping[str, np.dtype]
) -> InEightBits:
    """Modules of an adapter as stacks in 8 bits hold them, each in its own of the `dtypes`.

    Raises:
      ValueError: a module's error is above `MAX_ERROR`.
    """
    held = measured(modules, dtypes)
    if (worst := held.worst) is not None and not held.is_taken:
        raise ValueError(
            f"adapter {name!r}: {dtypes[worst]} changes what {worst} adds by "
            f"{held.largest:.1%}, and at most {MAX_ERROR:.0%} are taken; give apply_lora "
            "dtype=jnp.bfloat16 for it"
        )
    return held


def measured(modules: Mapping[str, LoRAWeights], dtypes: Mapping[str, np.dtype]) -> InEightBits:
    """Modules in 8 bits, whatever their errors, which are infinite where weights are not finite."""
    inside, errors = {}, {}
    for module, weights in modules.items():
        a, b = (np.asarray(half).astype(np.float32, copy=False) for half in (weights.a, weights.b))
        with np.errstate(all="ignore"):
            held = quantised(a, b, dtype=dtypes[module])
            errors[module] = float(np.nan_to_num(error_of(a, b, held), nan=np.inf))
        inside[module] = held._replace(scales=held.scales * np.float32(weights.scale))
    return InEightBits(inside, errors)


def error_of(a: np.ndarray, b: np.ndarray, held: Quantised) -> float:
    """`|B' A' - B A| / |B A|` in Frobenius norms, where `B' A'` is held for `B A`; 0 if both are 0.

    By products of ranks alone: `|X Y|^2` is the trace of `(X^T X) (Y Y^T)`, and the difference is
    `[B' - B, B'] [A; A' - A]`.
    """
    largest = np.max(np.abs(a), axis=-1) / np.max(np.abs(held.lora_a.astype(np.float32)), axis=-1)
    wide_a, wide_b = _halves(held, np.where(np.isfinite(largest), largest, 1))
    change = np.concatenate([wide_b - b, wide_b], axis=1), np.concatenate([a, wide_a - a])
    norm = _norm(b, a)
    return _norm(*change) / norm if norm else float(norm)


def _norm(b: np.ndarray, a: np.ndarray) -> float:
    square = np.sum((b.T @ b).astype(np.float64) * (a @ a.T).astype(np.float64))
    return float(np.sqrt(np.maximum(square, 0.0)))


def _halves(held: Quantised, of_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B, float32, whose product is held, where each row of A has so much of its scale."""
    of_b = held.scales / of_a
    wide = held.lora_a.astype(np.float32), held.lora_b.astype(np.float32)
    return wide[0] * of_a[..., None], wide[1] * of_b[..., None, :]


def unscaled(
    a: np.ndarray, b: np.ndarray, own: np.ndarray, shared: SharedHalf | None
) -> tuple[np.ndarray, np.ndarray]:
    """A and B, float32, out of stacks in 8 bits with factors of their own, `[R]`. Which of both was
    the larger is not known there: their rows and columns are so as well, but for a half that is
    `shared` with other experts, which is the same whatever the factors are."""
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    if shared is not None:
        return (wide_a, wide_b * own) if shared == "A" else (wide_a * own[:, None], wide_b)
    root = np.sqrt(np.abs(own))
    return _halves(Quantised(a, b, own), np.where(root > 0, root, np.float32(1)))
