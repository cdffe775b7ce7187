"""Times LoRA of experts, by the shapes of FlashInfer's benchmark: `python -m benchmarks.experts`.

FlashInfer's `benchmarks/bench_bgmv_moe.py` (commit fb28d72) takes 8 adapters, 128 experts of which
each token has 2, and rank 32. Microseconds of `y[t] += sum_k w[t, k] B[i] A[i] x[t]`, where i is
the id of the pair of the token's slot and its kth expert, in a jitted loop over cold weights. The
ids are sorted in each call, as each layer has a router of its own. Calls take turns over batches
with ids of their own, so that what they read is more than the L2 cache holds.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.timing import COPY_RATE, Loop, sets_to_rotate
from pallas_kernels import LoRAPart, expert_indices, lora_delta, make_segments, reference

_MAX_ERROR = 1e-2  # of bfloat16 results, relative
# One token takes 128 batches, which read 100 MB. A program of more calls compiles for long.
_MOST_BATCHES = 128
# `ragged_dot` reads all adapters in each call, whatever the ids are.
_RAGGED_BATCHES = 4


class Bank(NamedTuple):
    """A `[slots * experts, R, H]` and B `[slots * experts, N, R]`, or one for each slot."""

    a: Array
    b: Array


class Batch(NamedTuple):
    """y, x, the pairs' ids `[T, K]` and their weights."""

    y: Array
    x: Array
    ids: Array
    weights: Array


@dataclasses.dataclass(frozen=True)
class ExpertsCase:
    """T tokens of `features`, each with `top` of `experts`, and one of `slots` adapters. All
    experts of an adapter may have one A, or one B, the half that is `shared`."""

    tokens: int
    features: int
    experts: int = 128
    top: int = 2
    slots: int = 8
    rank: int = 32
    shared: str = ""

    def __str__(self) -> str:
        return f"T={self.tokens} H=N={self.features}"

    @property
    def pairs(self) -> int:
        return self.slots * self.experts

    @property
    def halves(self) -> tuple[int, int]:
        """How many A, and how many B."""
        of_a, of_b = (self.slots if half == self.shared else self.pairs for half in "AB")
        return of_a, of_b

    def slots_and_experts(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The slot of each token `[T]`, and its experts `[T, K]`; int32."""
        rng = np.random.default_rng((self.tokens, seed))
        slots = rng.integers(0, self.slots, self.tokens, np.int32)
        return slots, rng.integers(0, self.experts, (self.tokens, self.top), np.int32)

    def ids(self, seed: int = 0) -> Array:
        slots, experts = self.slots_and_experts(seed)
        return expert_indices(jnp.asarray(slots), jnp.asarray(experts), self.experts)

    def floor_us(self) -> float:
        """Bytes over COPY_RATE: each A and B in use once, x once, y read and written."""
        used = sum(len(np.unique(self.ids() // (self.pairs // held))) for held in self.halves)
        numbers = used * self.rank * self.features + 3 * self.tokens * self.features
        return 2e6 * numbers / COPY_RATE

    def batches(self) -> list[Batch]:
        """As many as together read more than the L2 cache holds. They take the banks in turn."""
        used = sum(min(held, self.tokens * self.top) for held in self.halves)
        size = 2 * used * self.rank * self.features
        return [self.batch(seed) for seed in range(sets_to_rotate(size, most=_MOST_BATCHES))]

    def batch(self, seed: int) -> Batch:
        keys = jax.random.split(jax.random.key(seed), 3)
        y, x = (_normal(key, (self.tokens, self.features), 1.0) for key in keys[:2])
        weights = jax.nn.softmax(jax.random.normal(keys[2], (self.tokens, self.top)), axis=-1)
        return Batch(y, x, self.ids(seed), weights)

    def banks(self) -> list[Bank]:
        """Several, so that few ids come twice while the L2 cache may still hold their adapters."""
        (of_a, of_b), shape = self.halves, (self.rank, self.features)
        size = 2 * (of_a + of_b) * self.rank * self.features
        made = []
        for seed in range(sets_to_rotate(size)):
            key_a, key_b = jax.random.split(jax.random.key(1000 + seed))
            a = _normal(key_a, (of_a, *shape), self.features**-0.5)
            made.append(Bank(a, _normal(key_b, (of_b, *shape[::-1]), 1.0)))
        return made


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)


def as_mix(y: Array, x: Array, a: Array, b: Array, ids: Array, weights: Array) -> Array:
    """A token's experts as several adapters of it: x is gathered for none."""
    return y + lora_delta(x, [LoRAPart(a, b)], ids, y.shape[1], weights=weights, dtype=y.dtype)


def _sorted(ids: Array) -> tuple[Array, Array]:
    """The pairs in the order of their ids: each one's number, and its token."""
    order = jnp.argsort(ids.reshape(-1))
    return order, order // ids.shape[1]


def _summed(y: Array, pairs: Array, order: Array, weights: Array) -> Array:
    """y plus what the pairs, which stand in `order`, add with their weights."""
    own = pairs[jnp.argsort(order)].reshape(*weights.shape, -1).astype(jnp.float32)
    total = jnp.sum(own * weights[..., None], axis=1)
    return (y.astype(jnp.float32) + total).astype(y.dtype)


def as_pairs(y: Array, x: Array, a: Array, b: Array, ids: Array, weights: Array) -> Array:
    """Each pair as a token, in the order of ids, as a layer of experts has them."""
    order, tokens = _sorted(ids)
    part = LoRAPart(a, b)
    segments = make_segments(ids.reshape(-1)[order], part.slots)
    delta = lora_delta(x[tokens], [part], segments, y.shape[1])
    return _summed(y, delta, order, weights)


def by_ragged_dot(y: Array, x: Array, a: Array, b: Array, ids: Array, weights: Array) -> Array:
    """`jax.lax.ragged_dot` of both halves; A is `[L, H, R]` and B `[L, R, N]`, as it wants them."""
    order, tokens = _sorted(ids)
    of_a, of_b = (
        jnp.bincount(ids.reshape(-1) // shared, length=len(t)).astype(jnp.int32)
        for t, shared in zip((a, b), LoRAPart(a, b).sharing)
    )
    v = jax.lax.ragged_dot(x[tokens], a, of_a, preferred_element_type=jnp.float32)
    delta = jax.lax.ragged_dot(v.astype(b.dtype), b, of_b)
    return _summed(y, delta, order, weights)


def _turned(bank: Bank) -> Bank:
    return Bank(*(t.swapaxes(1, 2) for t in bank))


WAYS: dict[str, Callable[..., Array]] = {
    "mix": as_mix,
    "pairs": as_pairs,
    "ragged_dot": by_ragged_dot,
}


def time_of(case: ExpertsCase, way: str, batches: list[Batch], banks: list[Bank]) -> float:
    """Microseconds of a call.

    Raises:
      RuntimeError: the result is wrong, or the device has not the memory.
    """
    call, is_ragged = jax.jit(WAYS[way]), way == "ragged_dot"
    given = [_turned(bank) for bank in banks] if is_ragged else banks
    if is_ragged:
        batches = batches[:_RAGGED_BATCHES]

    def add(batch: Batch, bank: Bank) -> Array:
        return call(batch.y, batch.x, *bank, batch.ids, batch.weights)

    for batch, bank, own in list(zip(batches, itertools.cycle(given), itertools.cycle(banks)))[:2]:
        check(way, case, batch, own, np.asarray(add(batch, bank)))

    def body(ys: list[Array], batches: list[Batch], banks: list[Bank]) -> list[Array]:
        # The barrier makes x depend on the loop, so that no half is hoisted out of it.
        ys, batches, banks = jax.lax.optimization_barrier((ys, batches, banks))
        parts = zip(ys, batches, itertools.cycle(banks))
        return [add(batch._replace(y=y), bank) for y, batch, bank in parts]

    # Some calls of it take milliseconds.
    loop = Loop(body, len(batches), turns=8 if is_ragged else None)
    return loop.us([batch.y for batch in batches], batches, given)


def check(way: str, case: ExpertsCase, batch: Batch, bank: Bank, got: np.ndarray) -> None:
    """RuntimeError where rows of a result are far from float64."""
    rows = slice(None, None, max(1, case.tokens // 64))
    y, x, ids, weights = (np.asarray(t[rows]) for t in batch)
    own, local = np.unique(ids, return_inverse=True)
    a, b = (np.asarray(t[own // (case.pairs // len(t))]) for t in bank)
    want = reference.mix(y, x, a, b, local.reshape(ids.shape), weights)
    error = np.linalg.norm(got[rows].astype(np.float64) - want) / np.linalg.norm(want)
    if not error < _MAX_ERROR:
        raise RuntimeError(f"{way} is wrong: relative error {error:.1e}")


def cases(features: int, shared: str = "") -> Iterator[ExpertsCase]:
    for tokens in (1, 4, 8, 32, 256, 512, 1024):
        yield ExpertsCase(tokens, features, shared=shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", type=int, default=3072, help="H and N; FlashInfer: 2688 too")
    parser.add_argument(
        "--shared", choices=["", "A", "B"], default="", help="by an adapter's experts"
    )
    parser.add_argument("--ways", default=",".join(WAYS), help="which to time")
    given = parser.parse_args()
    ways = given.ways.split(",")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, microseconds")
    print(f"{'case':20} {'floor':>8} {'target':>8}", *(f"{way:>11}" for way in ways))
    for case in cases(given.features, given.shared):
        floor, batches, banks = case.floor_us(), case.batches(), case.banks()
        print(f"{case!s:20} {floor:8.1f} {1.08 * floor + 5:8.1f}", end="", flush=True)
        for way in ways:
            try:
                print(f" {time_of(case, way, batches, banks):11.1f}", end="", flush=True)
            except RuntimeError as error:
                print(f" failed: {' '.join(str(error).split())[:200]}", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
