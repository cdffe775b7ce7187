"""Times single calls of a step: mixed ranks, buckets without tokens, packed projections."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.bench.timing import COPY_RATE, loop_us
from pallas_kernels import LoRAPart, add_lora_multi, make_segments

# Weight sets are rotated so that together they exceed the L2 cache (50 MB) several times over.
_ROTATED_BYTES = 200_000_000
_CALLS = 64  # in a turn of the timed loop, which costs some 20 us itself (H100)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One `add_lora_multi`: projections of one x, with a part for each of them in each bucket.

    Attributes:
      tokens: T; each adapter has as many, up to one. In a decode they take turns, in a prefill
        (more than 256) each adapter's are a run.
      features: H. widths: N of each projection.
      ranks: of the adapters in the batch, each a bucket's.
      empty: buckets of which no adapter is in the batch.
    """

    tokens: int
    features: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    empty: tuple[int, ...] = ()

    @property
    def phase(self) -> str:
        return "decode" if self.tokens <= 256 else "prefill"

    @property
    def floor_us(self) -> float:
        """Bytes over COPY_RATE: each adapter and x once, y read and written."""
        weights = sum(self.ranks) * (len(self.widths) * self.features + sum(self.widths))
        activations = self.tokens * (self.features + 2 * sum(self.widths))
        return 1e6 * 2 * (weights + activations) / COPY_RATE

    def indices(self) -> dict[int, np.ndarray]:
        """By bucket the slot of each token, -1 for none."""
        token = np.arange(self.tokens)
        count = len(self.ranks)
        adapter = token % count if self.phase == "decode" else token * count // self.tokens
        slots: collections.Counter[int] = collections.Counter()
        lists = {
            rank: np.full(self.tokens, -1, np.int32) for rank in sorted({*self.ranks, *self.empty})
        }
        for n, rank in enumerate(self.ranks):
            lists[rank][adapter == n] = slots[rank]
            slots[rank] += 1
        return lists

    def time(self) -> float:
        """Microseconds of the call in steady state, with cold adapters."""
        lists = self.indices()
        slots = {rank: max(1, self.ranks.count(rank)) for rank in lists}
        segments = {rank: make_segments(ids, slots[rank]) for rank, ids in lists.items()}
        shapes = [
            ((count, rank, self.features), (count, width, rank))
            for rank, count in slots.items()
            for width in self.widths
        ]
        set_bytes = 2 * sum(np.prod(shape) for pair in shapes for shape in pair)
        on_gpu = jax.default_backend() == "gpu"
        sets = max(4, min(16, -(-_ROTATED_BYTES // int(set_bytes)))) if on_gpu else 1
        seeds = itertools.count()

        def normal(*shape: int) -> jax.Array:
            values = jax.random.normal(jax.random.key(next(seeds)), shape) * shape[-1] ** -0.5
            return values.astype(jnp.bfloat16)

        carry = [
            (
                tuple(normal(self.tokens, width) for width in self.widths),
                normal(self.tokens, self.features),
                [(normal(*a), normal(*b)) for a, b in shapes],
            )
            for _ in range(sets)
        ]
        offsets = np.cumsum([0, *self.widths[:-1]]).tolist()

        @jax.jit  # lowered once, however often it is called
        def once(
            ys: tuple[jax.Array, ...], x: jax.Array, stacks: list[tuple[jax.Array, jax.Array]]
        ) -> tuple[jax.Array, ...]:
            parts = [
                LoRAPart(*stacks[n * len(offsets) + i], segments[rank], y_offset=offset)
                for n, rank in enumerate(slots)
                for i, offset in enumerate(offsets)
            ]
            return add_lora_multi(ys, x, parts, phase=self.phase)

        rounds = -(-_CALLS // sets) if on_gpu else 1

        def body(carry: list[tuple[tuple[jax.Array, ...], jax.Array, object]]) -> object:
            for _ in range(rounds):
                # The barrier makes x depend on the loop, so that no half is hoisted out of it.
                carry = jax.lax.optimization_barrier(carry)
                carry = [(once(ys, x, stacks), x, stacks) for ys, x, stacks in carry]
            return carry

        return loop_us(body, carry, rounds * sets)
