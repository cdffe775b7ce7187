"""Cases and float64 oracle of the gradients' tests, on CPU and on a device."""

import dataclasses
from typing import Any

import numpy as np
from mosaic_cases import local_ids, signed

import pallas_kernels as pk

ORDERS = ("runs", "zipf", "shuffled", "distinct", "identical", "none", "gaps")
# Relative error (Frobenius norm) against float64, by dtype: dv, v and the gradient are rounded.
TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3}


def ids_in(order: str, num_tokens: int, slots: int, seed: int = 0) -> np.ndarray:
    """Ids of tokens, the last slot among them unless none is."""
    rng = np.random.default_rng(seed)
    if order == "none":
        return np.full(num_tokens, -1, np.int32)
    if order == "identical":
        return np.full(num_tokens, slots - 1, np.int32)
    if order == "distinct":
        return (slots - 1 - np.arange(num_tokens) % slots).astype(np.int32)
    if order == "gaps":  # of no adapter, or outside of all slots, between short runs
        ids = np.repeat(rng.integers(-1, slots + 1, num_tokens), 5)[:num_tokens]
        ids[-1] = slots - 1
        return ids.astype(np.int32)
    if order == "runs":
        return np.sort(slots - 1 - np.arange(num_tokens) % slots).astype(np.int32)
    ids = np.minimum(rng.zipf(1.5, num_tokens) - 1, slots - 1)
    ids[0] = slots - 1
    return (rng.permutation(ids) if order == "shuffled" else np.sort(ids)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class GradientCase:
    """`ranges` are `(rank, slots)`; each has a part for each of `widths`, side by side in y."""

    num_tokens: int
    features: int
    widths: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    order: str = "runs"
    dtype: str = "bfloat16"
    seed: int = 0

    def __str__(self) -> str:
        widths = "+".join(map(str, self.widths))
        ranges = "+".join(f"r{rank}x{slots}" for rank, slots in self.ranges)
        return f"T{self.num_tokens}-H{self.features}-N{widths}-{ranges}-{self.order}-{self.dtype}"

    @property
    def slots(self) -> int:
        return sum(slots for _, slots in self.ranges)

    def arrays(self) -> "GradientArrays":
        rng = np.random.default_rng(self.seed + 1)
        parts, first = [], 0
        for rank, slots in self.ranges:
            offset = 0
            for width in self.widths:
                a = signed(rng, (slots, rank, self.features), self.dtype, self.features**-0.5)
                b = signed(rng, (slots, width, rank), self.dtype, rank**-0.5)
                scales = rng.uniform(0.5, 2.0, slots).astype(np.float32)
                parts.append(pk.LoRAPart(a, b, scales, first, offset))
                offset += width
            first += slots
        return GradientArrays(
            x=signed(rng, (self.num_tokens, self.features), self.dtype),
            dy=signed(rng, (self.num_tokens, sum(self.widths)), self.dtype),
            parts=tuple(parts),
            ids=ids_in(self.order, self.num_tokens, self.slots, self.seed),
        )


@dataclasses.dataclass(frozen=True)
class GradientArrays:
    x: np.ndarray
    dy: np.ndarray
    parts: tuple[pk.LoRAPart, ...]
    ids: np.ndarray


def in_float64(z: GradientArrays) -> dict[str, np.ndarray]:
    """Every gradient, by name."""
    x, dy = z.x.astype(np.float64), z.dy.astype(np.float64)
    found: dict[str, Any] = {"dx": np.zeros_like(x)}
    for n, part in enumerate(z.parts):
        given = part.lora_a, part.lora_b, part.scales
        a, b, scales = (np.asarray(t).astype(np.float64) for t in given)
        da, db, ds = np.zeros_like(a), np.zeros_like(b), np.zeros_like(scales)
        local = local_ids(z.ids, part)
        for i in np.unique(local[local >= 0]):
            mine = local == i
            dys = dy[mine][:, part.y_offset :][:, : b.shape[1]]
            u, dv = x[mine] @ a[i].T, dys @ b[i]
            found["dx"][mine] += scales[i] * dv @ a[i]
            da[i], db[i] = scales[i] * dv.T @ x[mine], scales[i] * dys.T @ u
            ds[i] = np.sum(u * dv)
        found |= {f"dA{n}": da, f"dB{n}": db, f"ds{n}": ds}
    return found


def by_name(dx: Any, parts: tuple[pk.LoRAPart, ...]) -> dict[str, np.ndarray]:
    """What a backend's `add_lora_grad` returns, as `in_float64` names it."""
    found = {"dx": dx}
    for n, part in enumerate(parts):
        found |= {f"dA{n}": part.lora_a, f"dB{n}": part.lora_b, f"ds{n}": part.scales}
    return {name: np.asarray(value) for name, value in found.items()}


def with_nan(z: GradientArrays, slot: int) -> GradientArrays:
    """The same, with NaN in the tokens of one slot."""
    x, dy = z.x.copy(), z.dy.copy()
    x[z.ids == slot], dy[z.ids == slot] = np.nan, np.nan
    return dataclasses.replace(z, x=x, dy=dy)


def tolerance(name: str, dtype: str) -> float:
    """Of a gradient: those of scales are sums of many roundings' errors, which cancel less."""
    return TOLERANCE[dtype] * (4 if name.startswith("ds") else 1)
