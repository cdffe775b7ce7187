"""Cases, float64 oracle and tolerances of the Mosaic kernels' tests, on CPU and on a device."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import LoRAPart, StackView

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


def in_one_array(parts: Sequence[LoRAPart], align: int = 64) -> list[LoRAPart]:
    """The parts as views into one flat array of all stacks, with NaN between them."""
    flat, views = [], []
    for stack in (np.asarray(stack) for part in parts for stack in (part.lora_a, part.lora_b)):
        views.append((sum(map(len, flat)), stack.shape))
        gap = np.full(align - stack.size % align, np.nan, stack.dtype)
        flat += [stack.reshape(-1), gap]
    array = jnp.asarray(np.concatenate(flat))
    stacks = itertools.batched((StackView(array, *view) for view in views), 2)
    return [part._replace(lora_a=a, lora_b=b) for part, (a, b) in zip(parts, stacks)]
