"""The route of a block's tokens: which adapter each has, and which distinct ones there are.

XLA makes a table with one row of int32 words per block, once for all layers of a step as it merges
equal computations. Each block copies its row to shared memory before it does anything else:

    word      0 .. rows - 1          rows        rows + 1 ...
              adapter of each row    count       the distinct adapters, then -1
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.mosaic_gpu.chip import TILE
from pallas_kernels.mosaic_gpu.layouts import ROWS, Memory, Ref, pad_to
from pallas_kernels.routing import Segments

# -1s behind a route's adapters: a kernel reads all places of a round, also where fewer are
# left, and asks for those of later rounds ahead of time.
_LOOK_AHEAD = 96
# Elements that TMA copies at once along an axis, at most.
_COPIED = 256


def routes(
    segments: Segments, rows: int = TILE, place: Int[Array, ""] | None = None
) -> Int[Array, "blocks W"]:
    """The table of routes: a row for every `rows` consecutive tokens.

    `place` is where adapter 0 stands in the stacks, if they are those of several layers.
    """
    ids = pad_to(segments.indices, 0, rows, -1).reshape(-1, rows)
    if segments.num_tokens <= rows:
        distinct = segments.group_adapters[None]
    else:
        token = jnp.arange(rows, dtype=jnp.int32)[None]
        is_before = (token < token.T)[None]
        first = (ids >= 0) & ~jnp.any((ids[:, :, None] == ids[:, None, :]) & is_before, axis=2)
        nth = jnp.sum(first[:, None, :] & is_before, axis=2, dtype=jnp.int32)
        # Without the barrier XLA computes each of these once per slot: 91 us with T=4096, one slot.
        nth = lax.optimization_barrier(jnp.where(first, nth, rows))
        slot = jnp.arange(min(rows, segments.num_adapters), dtype=jnp.int32)
        here = nth[:, None, :] == slot[None, :, None]
        distinct = jnp.max(jnp.where(here, ids[:, None, :], -1), axis=2)
    count = jnp.sum(distinct >= 0, axis=1, keepdims=True, dtype=jnp.int32)
    pad = route_words(segments, rows) - (rows + 1 + distinct.shape[1])
    if place is not None:
        # Last, so that XLA makes the rest once for all layers of a loop.
        ids, distinct = (jnp.where(z < 0, -1, z + place) for z in (ids, distinct))
    tail = jnp.full((ids.shape[0], pad), -1, jnp.int32)
    return jnp.concatenate([ids, count, distinct, tail], axis=1)


def route_words(segments: Segments, rows: int) -> int:
    """Words of a route: TMA wants whole 128 bytes."""
    words = rows + 1 + min(rows, segments.num_tokens, segments.num_adapters) + _LOOK_AHEAD
    return -(-words // 32) * 32


def route_memory(segments: Segments, rows: int) -> Memory:
    """The shared memory of a block's route."""
    return plgpu.SMEM((route_words(segments, rows),), jnp.int32)


def route_copies(segments: Segments, rows: int) -> int:
    """Copies of `Route.fetch`, each of which arrives at its barrier."""
    return -(-route_words(segments, rows) // _COPIED)


@dataclasses.dataclass(frozen=True)
class Route:
    """A block's route in shared memory, as `words` that hold `rows` tokens' adapters."""

    words: Ref
    rows: int

    def fetch(self, table: Ref, block: Array, barrier: Ref) -> None:
        """Starts to copy the route of `block` from the table in device memory."""
        size = self.words.shape[0]
        for first in range(0, size, _COPIED):
            here = pl.ds(first, min(_COPIED, size - first))
            plgpu.copy_gmem_to_smem(table.at[block, here], self.words.at[here], barrier)

    def ids(self) -> Int[Array, " rows"]:
        """Every row's adapter, in registers."""
        return plgpu.load(self.words.at[pl.ds(0, self.rows)], layout=ROWS)

    def id_of(self, row: Array) -> Int[Array, ""]:
        """The adapter of one row."""
        return self.words[row]

    def count(self) -> Int[Array, ""]:
        """How many distinct adapters the tokens have."""
        return self.words[self.rows]

    def adapter(self, first: Array, nth: int) -> Int[Array, ""]:
        """The distinct adapter number `first + nth`; -1 behind the last."""
        return self.words[self.rows + 1 + first + nth]

    def rounds(self, stack: int) -> Int[Array, ""]:
        """Rounds in which `stack` adapters at a time are all of them."""
        return lax.div(self.count() + (stack - 1), jnp.int32(stack))


def row_mask(ids: Int[Array, " rows"], adapter: Array, columns: int) -> Bool[Array, "rows columns"]:
    """True in the rows of `adapter`; nowhere if that is -1."""
    adapter = jnp.where(adapter < 0, jnp.int32(-2), adapter)
    return lax.broadcast_in_dim(ids == adapter, (ids.shape[0], columns), (0,))
