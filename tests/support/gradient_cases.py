"""Cases and float64 oracle of the gradients' tests, on CPU and on a device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mosaic_cases import local_ids, relative_error, signed

import pallas_kernels as pk
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import backend
from pallas_kernels.stacks import LayerStacks

ORDERS = ("runs", "zipf", "shuffled", "distinct", "identical", "none", "gaps")
# Relative error (Frobenius norm) against float64, by dtype: dv, v and the gradient are rounded. Of
# float32 also against the same sums in another order.
TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}


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


def in_layers(z: GradientArrays) -> GradientArrays:
    """The same case, whose one part is that of the second of two layers; the first holds NaN."""
    [part] = z.parts
    whole = [np.stack([np.full_like(t, np.nan), t]) for t in (part.lora_a, part.lora_b)]
    scales = np.stack([np.zeros_like(part.scales), part.scales])
    layers = LayerStacks(*map(jnp.asarray, (*whole, scales)), layer=jnp.int32(1))
    a, b, own = layers.own()
    placed = dataclasses.replace(
        part, lora_a=a, lora_b=b, scales=own, scales_offset=0, layers=layers
    )
    return dataclasses.replace(z, parts=(placed,))


def tolerance(name: str, dtype: str) -> float:
    """A gradient's. That of a scale is one sum of terms of either sign. It may be small beside them
    by chance, and their errors, those of float32, are then large beside it."""
    return TOLERANCE[dtype] * (4 if name.startswith("ds") else 1)


def check_half(op: str, z: GradientArrays) -> None:
    """The gradients of a "shrink", an "expand" that adds, or one that overwrites, "expand=", of a
    case with one part, by the kernels."""
    x, dy, (part,), ids = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts, z.ids))
    (slots, rank, _), tokens = part.lora_a.shape, len(z.ids)
    a, b = np.asarray(part.lora_a, np.float64), np.asarray(part.lora_b, np.float64)
    mine = (np.arange(slots)[:, None] == z.ids).astype(np.float64)  # [slots, tokens]
    v = np.random.default_rng(5).normal(size=(tokens, rank)).astype(np.float32)
    call = Call(op, "mosaic_gpu", ("sgmv",), add_inputs=op != "expand=")
    want: tuple[np.ndarray, ...]
    if op == "shrink":
        run = functools.partial(backend.shrink_grad, call)
        got = jax.jit(run)(jnp.asarray(v), x, part.lora_a, ids, part.scales)
        du, scales = np.float64(v), np.asarray(part.scales, np.float64)
        u = np.einsum("lt,th,lrh->ltr", mine, np.float64(z.x), a, optimize=True)
        want = (
            np.einsum("lt,l,tr,lrh->th", mine, scales, du, a, optimize=True),
            np.einsum("lt,l,tr,th->lrh", mine, scales, du, np.float64(z.x), optimize=True),
            np.einsum("ltr,tr->l", u, du),
        )
    else:
        run = functools.partial(backend.expand_grad, call)
        got = jax.jit(run)(dy, jnp.asarray(v), part.lora_b, ids)
        rounded = np.asarray(jnp.asarray(v).astype(dy.dtype), np.float64)
        overwritten = mine.any(0)[:, None] & (op == "expand=")
        want = (
            np.einsum("lt,tn,lnr->tr", mine, np.float64(z.dy), b, optimize=True),
            np.einsum("lt,tn,tr->lnr", mine, np.float64(z.dy), rounded, optimize=True),
            np.where(overwritten, 0.0, np.float64(z.dy)),
        )
    for one, right in zip(got, want):
        assert relative_error(np.asarray(one), right) < 4e-3
        assert not np.asarray(one)[right == 0].any()


def check_compact(implementation: Any) -> None:
    """Compact gradients of two ranges, in each of which a slot has no token."""
    case = GradientCase(12, 64, (64,), ((16, 3), (8, 4)))
    z = case.arrays()
    ids = np.where(z.ids == 1, 5, np.where(z.ids == 6, 0, z.ids))  # slots 1 and 6 have no token
    want = in_float64(dataclasses.replace(z, ids=ids))
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    dx, found = pk.lora_gradients(dy, x, parts, ids, compact=4, implementation=implementation)
    assert relative_error(dx, want["dx"]) < tolerance("dx", case.dtype)
    for n, (gradient, slots) in enumerate(zip(found, ([0, 2, -1, -1], [0, 1, 2, -1]))):
        np.testing.assert_array_equal(gradient.slots, slots)
        arrays = {"dA": gradient.lora_a, "dB": gradient.lora_b, "ds": gradient.scales}
        for name, got in arrays.items():
            used = int(gradient.in_use)
            rows = want[f"{name}{n}"][slots[:used]]
            assert got.shape == (len(slots), *rows.shape[1:])
            assert relative_error(got[:used], rows) < tolerance(name, case.dtype), (name, n)
            assert not np.asarray(got)[used:].any()
