"""The oracles: what each op means, in a few lines of float64 numpy. For tests, not for speed."""

import numpy as np


def _as_float64(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(a).astype(np.float64) for a in arrays)


def shrink(
    x: np.ndarray, lora_a: np.ndarray, indices: np.ndarray, scale: float | np.ndarray = 1.0
) -> np.ndarray:
    """v[t] = scale * lora_a[i] @ x[t] for a slot i = indices[t], else 0.

    `scale` may be `[L]` or, with one for each rank column, `[L, R]`.
    """
    x, lora_a, scales = _as_float64(x, lora_a, np.asarray(scale))
    if scales.ndim == 0:
        scales = np.broadcast_to(scales, len(lora_a))
    v = np.zeros((len(x), lora_a.shape[1]))
    for t, i in enumerate(indices):
        if 0 <= i < len(lora_a):
            v[t] = scales[i] * (lora_a[i] @ x[t])
    return v


def expand(
    v: np.ndarray,
    lora_b: np.ndarray,
    indices: np.ndarray,
    y: np.ndarray,
    y_offset: int = 0,
    *,
    add_inputs: bool = True,
) -> np.ndarray:
    """y[t, y_offset:][:N] (+)= lora_b[i] @ v[t] where i = indices[t] is a slot; else y as it is."""
    v, lora_b, y = _as_float64(v, lora_b, y)
    out, columns = y.copy(), slice(y_offset, y_offset + lora_b.shape[1])
    for t, i in enumerate(indices):
        if 0 <= i < len(lora_b):
            out[t, columns] = lora_b[i] @ v[t] + (y[t, columns] if add_inputs else 0.0)
    return out


def mix(
    y: np.ndarray,
    x: np.ndarray,
    lora_a: np.ndarray,
    lora_b: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
    scale: float | np.ndarray = 1.0,
) -> np.ndarray:
    """y[t] += weights[t, k] * scale[i] * lora_b[i] @ lora_a[i] @ x[t] for all k where
    i = indices[t, k] is a slot. Adapters may share A, or B: see `LoRAPart`."""
    (out,) = _as_float64(y)
    slots = max(len(lora_a), len(lora_b))
    lora_a, lora_b = (np.repeat(stack, slots // len(stack), axis=0) for stack in (lora_a, lora_b))
    for ids, factors in zip(indices.T, weights.T):
        v = shrink(x, lora_a, ids, scale) * factors.astype(np.float64)[:, None]
        out = expand(v, lora_b, ids, out)
    return out
