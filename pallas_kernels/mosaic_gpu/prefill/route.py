"""The route of a block's tokens: which they are, which adapter each has, and which distinct ones
there are.

XLA makes a table with one row of int32 words per block, once for all layers of a step as it merges
equal computations. Each block copies its row to shared memory before it does anything else:

    word      0 ..               rows ..   2 rows   2 rows + 1     2 rows + 2 ...
              adapters of rows   tokens    count    is scattered   the distinct adapters, then -1

Tokens are taken as they come, or, where their adapters change often, sorted by adapter: `order`.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.mosaic_gpu.chip import TILE
from pallas_kernels.mosaic_gpu.layouts import ROWS, Memory, Ref, interpreted, pad_to
from pallas_kernels.routing import Segments

# -1s behind a route's adapters: a kernel reads all places of a round, also where fewer are
# left, and asks for those of later rounds ahead of time.
_LOOK_AHEAD = 96
# Elements that TMA copies at once along an axis, at most.
_COPIED = 256


def may_sort(num_tokens: int) -> bool:
    """Whether `order` may be another one than that in which tokens come, from static shapes.

    Then the kernels have code for rows that do not lie side by side, which Pallas's interpreter
    cannot run.
    """
    return num_tokens > TILE and not interpreted()


def order(segments: Segments) -> Int[Array, " T"] | None:
    """The tokens in the order in which tiles take them; None for as they come.

    Runs of one adapter stay where they are: TMA copies whole tiles of them. Where there are many
    more runs than adapters, tiles of sorted tokens have far fewer adapters each, and copy rows one
    by one. No row's bits depend on the order.
    """
    num_tokens, ids = segments.num_tokens, segments.indices
    if not may_sort(num_tokens):
        return None
    runs = 1 + jnp.sum(ids[1:] != ids[:-1], dtype=jnp.int32)
    groups = jnp.sum(segments.group_adapters >= 0, dtype=jnp.int32)
    is_mixed = runs > 2 * groups + -(-num_tokens // TILE)
    return jnp.where(is_mixed, segments.rows, jnp.arange(num_tokens, dtype=jnp.int32))


def routes(
    segments: Segments, rows: int = TILE, tokens: Int[Array, " T"] | None = None
) -> Int[Array, "blocks W"]:
    """The table of routes: a row for every `rows` tokens, in the order of `tokens`."""
    places = jnp.arange(-(-segments.num_tokens // rows) * rows, dtype=jnp.int32)
    ids = segments.indices
    if tokens is None:
        tokens = places
    else:
        ids, tokens = ids[tokens], jnp.concatenate([tokens, places[segments.num_tokens :]])
    ids, tokens = pad_to(ids, 0, rows, -1).reshape(-1, rows), tokens.reshape(-1, rows)
    if segments.num_tokens <= rows:
        distinct = segments.group_adapters[None]
    else:
        token = jnp.arange(rows, dtype=jnp.int32)[None]
        is_before = (token < token.T)[None]
        first = (ids >= 0) & ~jnp.any((ids[:, :, None] == ids[:, None, :]) & is_before, axis=2)
        place = jnp.sum(first[:, None, :] & is_before, axis=2, dtype=jnp.int32)
        # Without the barrier XLA computes each place once per slot: 91 us with T=4096 and one slot.
        place = lax.optimization_barrier(jnp.where(first, place, rows))
        slot = jnp.arange(min(rows, segments.num_adapters), dtype=jnp.int32)
        here = place[:, None, :] == slot[None, :, None]
        distinct = jnp.max(jnp.where(here, ids[:, None, :], -1), axis=2)
    count = jnp.sum(distinct >= 0, axis=1, keepdims=True, dtype=jnp.int32)
    is_scattered = jnp.any(tokens != places.reshape(-1, rows), axis=1, keepdims=True)
    pad = route_words(segments, rows) - (2 * rows + 2 + distinct.shape[1])
    tail = jnp.full((ids.shape[0], pad), -1, jnp.int32)
    return jnp.concatenate(
        [ids, tokens, count, is_scattered.astype(jnp.int32), distinct, tail], axis=1
    )


def route_words(segments: Segments, rows: int) -> int:
    """Words of a route: TMA wants whole 128 bytes."""
    words = 2 * rows + 2 + min(rows, segments.num_tokens, segments.num_adapters) + _LOOK_AHEAD
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
        return self.words[2 * self.rows]

    def is_scattered(self) -> Bool[Array, ""]:
        """Whether the tokens are others than those of this place among all tokens."""
        return self.words[2 * self.rows + 1] > 0

    def adapter(self, first: Array, nth: int) -> Int[Array, ""]:
        """The distinct adapter number `first + nth`; -1 behind the last."""
        return self.words[2 * self.rows + 2 + first + nth]

    def rounds(self, stack: int) -> Int[Array, ""]:
        """Rounds in which `stack` adapters at a time are all of them."""
        return lax.div(self.count() + (stack - 1), jnp.int32(stack))


def row_mask(ids: Int[Array, " rows"], adapter: Array, columns: int) -> Bool[Array, "rows columns"]:
    """True in the rows of `adapter`; nowhere if that is -1."""
    adapter = jnp.where(adapter < 0, jnp.int32(-2), adapter)
    return lax.broadcast_in_dim(ids == adapter, (ids.shape[0], columns), (0,))
