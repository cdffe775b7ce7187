"""Times of rows with several adapters: `python -m benchmarks.mixes`.

Microseconds of one `lora_delta` and the addition that follows, in a jitted loop over cold weights:
without mixes, with up to K adapters per token of which each has one, and with K of each.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Loop, rounds_of, sets_to_rotate, turn
from pallas_kernels import LoRAPart, Mix, Segments, lora_delta, make_mix, make_segments


@dataclasses.dataclass(frozen=True)
class MixCase:
    """T tokens with adapters of one rank; `columns` of a mix, None for plain ids, of which each
    token uses `used`."""

    tokens: int
    adapters: int
    rank: int
    columns: int | None
    used: int
    features: int = 4096

    def __str__(self) -> str:
        how = "plain" if self.columns is None else f"K={self.columns}, {self.used} used"
        return f"T={self.tokens} L={self.adapters} r={self.rank} {how}"

    def ids(self) -> Segments | Mix:
        token = np.arange(self.tokens)
        turns = token if self.tokens <= 256 else token * self.adapters // self.tokens
        if self.columns is None:
            return make_segments(turns % self.adapters, self.adapters)
        ids = np.full((self.tokens, self.columns), -1, np.int32)
        for n in range(self.used):
            ids[:, n] = (turns + n) % self.adapters
        return make_mix(ids, np.full(ids.shape, 0.5), self.adapters)

    def time(self) -> float:
        """Microseconds of a call."""
        ids, seeds = self.ids(), itertools.count()

        def normal(*shape: int) -> jax.Array:
            values = jax.random.normal(jax.random.key(next(seeds)), shape) * shape[-1] ** -0.5
            return values.astype(jnp.bfloat16)

        size, count = self.features, sets_to_rotate(4 * self.adapters * self.rank * self.features)
        sets = [
            (
                normal(self.tokens, size),
                normal(self.tokens, size),
                normal(self.adapters, self.rank, size),
                normal(self.adapters, size, self.rank),
            )
            for _ in range(count)
        ]

        def call(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, ids: object) -> jax.Array:
            assert isinstance(ids, Segments | Mix)
            return y + lora_delta(x, [LoRAPart(a, b)], ids, size)

        rounds = rounds_of(sets)
        return Loop(turn(call, rounds), rounds * len(sets)).us(sets, ids)


def cases() -> Iterator[MixCase]:
    sizes = (
        *((16, 16, r) for r in (16, 64)),
        (32, 8, 16),
        *((64, 8, r) for r in (8, 16, 64)),
        (64, 64, 16),
        (256, 8, 16),
        (4096, 8, 16),
    )
    for size in sizes:
        yield MixCase(*size, columns=None, used=1)
        for columns in (2, 4):
            yield MixCase(*size, columns=columns, used=1)
            yield MixCase(*size, columns=columns, used=columns)


if __name__ == "__main__":
    for case in cases():
        print(f"{case!s:40} {case.time():8.2f} us", flush=True)
