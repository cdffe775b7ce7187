"""Cases, float64 oracle and tolerances of the Mosaic kernels' tests, on CPU and on a device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import pallas_kernels as pk

POPULARITIES = ("distinct", "uniform", "zipf", "identical", "none", "out_of_range")

# Relative error (Frobenius norm) against float64 that each op may have.
V_TOLERANCE = 1e-5  # x max(1, H / 16384)
Y_TOLERANCE = {"float16": 1e-3, "bfloat16": 4e-3}  # by the coarser of y's and the weights' dtypes


def v_tolerance(features: int) -> float:
    return V_TOLERANCE * max(1.0, features / 16384)


def y_tolerance(*dtypes: str) -> float:
    return max(Y_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def indices(popularity: str, num_tokens: int, num_adapters: int, seed: int = 0) -> np.ndarray:
    """Adapters of the tokens, in no order; the last slot is among them unless none is."""
    rng = np.random.default_rng(seed)
    if popularity == "lengths":  # of segments
        lengths = (0, 1, 15, 16, 17)
        return np.resize(np.repeat(np.arange(5), lengths), num_tokens).astype(np.int32)
    if popularity == "distinct":
        ids = rng.permutation(max(num_tokens, num_adapters))[:num_tokens] % num_adapters
    elif popularity == "uniform":
        ids = rng.integers(-1, num_adapters, num_tokens)
    elif popularity == "zipf":
        ids = np.minimum(rng.zipf(1.5, num_tokens) - 1, num_adapters - 1)
    elif popularity == "identical":
        ids = np.full(num_tokens, num_adapters - 1)
    elif popularity == "none":
        return np.full(num_tokens, -1, np.int32)
    else:
        ids = rng.integers(-1, num_adapters, num_tokens)
        ids[::3] = rng.choice([-7, num_adapters, 2**31 - 1, -(2**31)], len(ids[::3]))
        return ids.astype(np.int32)
    ids[0] = num_adapters - 1
    return ids.astype(np.int32)


def signed(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0):
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(scale)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    num_tokens: int
    features: int
    width: int
    rank: int
    num_adapters: int
    popularity: str = "uniform"
    x_dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    y_dtype: str = "bfloat16"
    y_offset: int = 0
    y_extra: int = 0
    seed: int = 0

    def __str__(self) -> str:
        shape = (
            f"T{self.num_tokens}-H{self.features}-N{self.width}-r{self.rank}-L{self.num_adapters}"
        )
        dtypes = "-".join(
            d.replace("float", "f") for d in (self.x_dtype, self.weight_dtype, self.y_dtype)
        )
        where = f"-o{self.y_offset}+{self.y_extra}" if self.y_offset or self.y_extra else ""
        return f"{shape}-{self.popularity}-{dtypes}{where}"

    def arrays(self) -> "Arrays":
        rng = np.random.default_rng(self.seed + 1)
        t, h, n, r, slots = (
            self.num_tokens, self.features, self.width, self.rank, self.num_adapters,
        )  # fmt: skip
        columns = n + self.y_offset + self.y_extra
        return Arrays(
            x=signed(rng, (t, h), self.x_dtype),
            a=signed(rng, (slots, r, h), self.weight_dtype, h**-0.5),
            b=signed(rng, (slots, n, r), self.weight_dtype, r**-0.5),
            y=signed(rng, (t, columns), self.y_dtype),
            v=signed(rng, (t, r), "float32"),
            scales=rng.uniform(0.5, 2.0, slots).astype(np.float32),
            ids=indices(self.popularity, t, slots, self.seed),
        )


@dataclasses.dataclass(frozen=True)
class Arrays:
    x: np.ndarray
    a: np.ndarray
    b: np.ndarray
    y: np.ndarray
    v: np.ndarray
    scales: np.ndarray
    ids: np.ndarray


def products(rows: np.ndarray, stack: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """rows[t] @ stack[ids[t]].T in float64, adapter by adapter; zeros where ids is no slot."""
    out = np.zeros((len(rows), stack.shape[1]))
    for i in np.unique(ids[(ids >= 0) & (ids < len(stack))]):
        mine = ids == i
        out[mine] = rows[mine].astype(np.float64) @ stack[i].astype(np.float64).T
    return out


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    got = np.asarray(got).astype(np.float64)
    norm = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / norm) if norm else float(np.abs(got).max(initial=0))


def typical(rows: np.ndarray, stack: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How large each of `products(rows, stack, ids)` is if its n terms have random signs: sqrt(n)
    times the root mean squares of both factors. Errors of a sum are held against it."""
    norms = np.linalg.norm(stack.astype(np.float64), axis=2)[np.maximum(ids, 0)]
    of_rows = np.linalg.norm(rows.astype(np.float64), axis=1)
    return of_rows[:, None] * norms / np.sqrt(rows.shape[1])


def bits(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    return values.view(np.uint8).reshape(*values.shape, values.dtype.itemsize)


def as_jax(arrays: Arrays) -> dict[str, jnp.ndarray]:
    return {f.name: jnp.asarray(getattr(arrays, f.name)) for f in dataclasses.fields(arrays)}


def poison() -> None:
    """Leaves NaNs where the next outputs are likely to be allocated."""
    jax.block_until_ready([jnp.full(2**k, jnp.nan) for k in (8, 12, 16, 20, 22)])


def of_integers(arrays: Arrays) -> Arrays:
    """The case with small integers, whose float32 sums are exact: every order of additions gives
    the same bits. The interpreter multiplies by numpy, whose order follows from the shapes.
    float32 x has 12 bits, more than a plane of bfloat16 holds."""

    def whole(values: np.ndarray, most: int, factor: float = 1.0) -> np.ndarray:
        numbers = np.clip(np.rint(values.astype(np.float64) * factor), -most, most)
        return numbers.astype(values.dtype)

    x = whole(arrays.x, 4095, 1000) if arrays.x.dtype == np.float32 else whole(arrays.x, 3)
    return dataclasses.replace(
        arrays,
        x=x,
        a=whole(arrays.a, 2, arrays.a.shape[2] ** 0.5),
        b=whole(arrays.b, 2, arrays.b.shape[2] ** 0.5),
        scales=np.maximum(whole(arrays.scales, 2), 1),
    )


def local_ids(ids: np.ndarray, part: pk.LoRAPart) -> np.ndarray:
    """The part's own ids, -1 for those of other ranges."""
    local = ids.astype(np.int64) - part.first_slot
    return np.where((local >= 0) & (local < part.slots), local, -1)


def parts_in_float64(
    x: np.ndarray, parts: Sequence[pk.LoRAPart], ids: np.ndarray, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """What parts add, of 8 bits too, and which elements they add to."""
    delta, used = np.zeros((len(x), columns)), np.zeros((len(x), columns), bool)
    for part in parts:
        a, b, scales = (np.asarray(z) for z in (part.lora_a, part.lora_b, part.scales))
        local, where = local_ids(ids, part), slice(part.y_offset, part.y_offset + b.shape[1])
        own = scales[part.scales_offset or 0 :][: part.num_scales].reshape(part.slots, -1)
        v = products(x, a, local) * own[np.maximum(local, 0)]
        delta[:, where] += products(v, b, local)
        used[:, where] |= (local >= 0)[:, None]
    return delta, used


def add_parts(y: Any, x: Any, parts: Any, ids: Any, *, delta: bool = False, **how: Any) -> Any:
    """`add_lora_multi`, or the sums of y and what `lora_delta` makes of its dtype."""
    if not delta:
        return pk.add_lora_multi(y, x, parts, ids, **how)
    ys = y if isinstance(y, tuple) else (y,)
    widths = tuple(one.shape[1] for one in ys)
    deltas = pk.lora_delta(x, parts, ids, widths, dtype=ys[0].dtype, **how)
    sums = tuple(jnp.asarray(one) + more for one, more in zip(ys, deltas))
    return sums if isinstance(y, tuple) else sums[0]
