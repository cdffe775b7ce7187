"""Times single calls of a step: mixed ranks, buckets without tokens, packed projections."""

import collections
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import COPY_RATE, loop_us, rounds_of, sets_to_rotate, turn
from pallas_kernels import LoRAPart, add_lora_multi, make_segments


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

    def slots(self) -> dict[int, int]:
        """Slots of each bucket, in the order of ids."""
        return {rank: max(1, self.ranks.count(rank)) for rank in sorted({*self.ranks, *self.empty})}

    def first_slots(self) -> dict[int, int]:
        """The id of each bucket's first slot."""
        slots = self.slots()
        return dict(zip(slots, itertools.accumulate(slots.values(), initial=0)))

    def indices(self) -> np.ndarray:
        """The id of each token."""
        token = np.arange(self.tokens)
        count = len(self.ranks)
        adapter = token % count if self.phase == "decode" else token * count // self.tokens
        taken = collections.Counter(self.first_slots())
        ids = np.full(self.tokens, -1, np.int32)
        for n, rank in enumerate(self.ranks):
            ids[adapter == n] = taken[rank]
            taken[rank] += 1
        return ids

    def time(self) -> float:
        """Microseconds of the call in steady state, with cold adapters."""
        slots, first_slots = self.slots(), self.first_slots()
        segments = make_segments(self.indices(), sum(slots.values()))
        segments = segments.split((first_slots[rank], n) for rank, n in slots.items())
        shapes = [
            ((count, rank, self.features), (count, width, rank))
            for rank, count in slots.items()
            for width in self.widths
        ]
        set_bytes = 2 * sum(math.prod(shape) for pair in shapes for shape in pair)
        seeds = itertools.count()

        def normal(*shape: int) -> jax.Array:
            values = jax.random.normal(jax.random.key(next(seeds)), shape) * shape[-1] ** -0.5
            return values.astype(jnp.bfloat16)

        sets = [
            (
                tuple(normal(self.tokens, width) for width in self.widths),
                normal(self.tokens, self.features),
                [(normal(*a), normal(*b)) for a, b in shapes],
            )
            for _ in range(sets_to_rotate(set_bytes))
        ]
        offsets = np.cumsum([0, *self.widths[:-1]]).tolist()

        def call(
            ys: tuple[jax.Array, ...], x: jax.Array, stacks: list[tuple[jax.Array, jax.Array]]
        ) -> tuple[jax.Array, ...]:
            parts = [
                LoRAPart(
                    *stacks[n * len(offsets) + i], first_slot=first_slots[rank], y_offset=offset
                )
                for n, rank in enumerate(slots)
                for i, offset in enumerate(offsets)
            ]
            return add_lora_multi(ys, x, parts, segments, phase=self.phase)

        rounds = rounds_of(sets)
        return loop_us(turn(call, rounds), sets, rounds * len(sets))
