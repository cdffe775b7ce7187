"""Times LoRA of experts, by the shapes of FlashInfer's benchmark: `python -m benchmarks.experts`.

FlashInfer's `benchmarks/bench_bgmv_moe.py` (commit fb28d72) takes 8 adapters, 128 experts of which
each token has 2, and rank 32. Microseconds of `y[t] += sum_k w[t, k] B[i] A[i] x[t]`, where i is
the id of the pair of the token's slot and its kth expert, in a jitted loop over cold weights. The
ids are sorted in each call, as each layer has a router of its own.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.timing import COPY_RATE, Loop, sets_to_rotate, turn
from pallas_kernels import LoRAPart, expert_indices, lora_delta, make_segments, reference

# y, x, A, B, the pairs' ids `[T, K]` and their weights.
Operands = tuple[Array, Array, Array, Array, Array, Array]
_MAX_ERROR = 1e-2  # of bfloat16 results, relative


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

    def ids(self) -> Array:
        rng = np.random.default_rng(self.tokens)
        slots = rng.integers(0, self.slots, self.tokens).astype(np.int32)
        experts = rng.integers(0, self.experts, (self.tokens, self.top)).astype(np.int32)
        return expert_indices(jnp.asarray(slots), jnp.asarray(experts), self.experts)

    def floor_us(self) -> float:
        """Bytes over COPY_RATE: each A and B in use once, x once, y read and written."""
        used = sum(len(np.unique(self.ids() // (self.pairs // held))) for held in self.halves)
        numbers = used * self.rank * self.features + 3 * self.tokens * self.features
        return 2e6 * numbers / COPY_RATE

    def sets(self) -> list[Operands]:
        """Operands that together exceed the L2 cache."""
        count = sets_to_rotate(2 * sum(self.halves) * self.rank * self.features)
        return [self._operands(seed) for seed in range(count)]

    def _operands(self, seed: int) -> Operands:
        keys = jax.random.split(jax.random.key(seed), 5)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
            return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)

        of_a, of_b = self.halves
        a = normal(keys[2], (of_a, self.rank, self.features), self.features**-0.5)
        b = normal(keys[3], (of_b, self.features, self.rank), 1.0)
        y, x = (normal(key, (self.tokens, self.features), 1.0) for key in keys[:2])
        weights = jax.nn.softmax(jax.random.normal(keys[4], (self.tokens, self.top)), axis=-1)
        return y, x, a, b, self.ids(), weights


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


def _turned(operands: Operands) -> Operands:
    y, x, a, b, *rest = operands
    return y, x, a.swapaxes(1, 2), b.swapaxes(1, 2), *rest  # type: ignore[return-value]


WAYS: dict[str, Callable[..., Array]] = {
    "mix": as_mix,
    "pairs": as_pairs,
    "ragged_dot": by_ragged_dot,
}


def time_of(case: ExpertsCase, way: str, sets: list[Operands]) -> float:
    """Microseconds of a call.

    Raises:
      RuntimeError: the result is wrong, or the device has not the memory.
    """
    call, is_ragged = WAYS[way], way == "ragged_dot"
    sets = [_turned(each) for each in sets] if is_ragged else sets
    _check(way, case, jax.jit(call)(*sets[0]))
    # Some calls of it take milliseconds.
    return Loop(turn(call, 1), len(sets), turns=8 if is_ragged else None).us(sets)


def _check(way: str, case: ExpertsCase, got: Array) -> None:
    """RuntimeError where a result, of the first set, is far from float64."""
    y, x, a, b, ids, weights = (np.asarray(t) for t in case._operands(0))
    rows = slice(0, 64)
    own, local = np.unique(ids[rows], return_inverse=True)
    local = local.reshape(ids[rows].shape)
    a, b = (t[own // (case.pairs // len(t))] for t in (a, b))
    want = reference.mix(y[rows], x[rows], a, b, local, weights[rows])
    error = np.linalg.norm(np.asarray(got[rows], np.float64) - want) / np.linalg.norm(want)
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
        floor, sets = case.floor_us(), case.sets()
        print(f"{case!s:20} {floor:8.1f} {1.08 * floor + 5:8.1f}", end="", flush=True)
        for way in ways:
            try:
                print(f" {time_of(case, way, sets):11.1f}", end="", flush=True)
            except RuntimeError as error:
                print(f" failed: {' '.join(str(error).split())[:200]}", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
