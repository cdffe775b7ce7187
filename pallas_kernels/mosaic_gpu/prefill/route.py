"""The route of a block's tokens: which they are, which adapter each has, and which distinct ones
there are.

XLA makes tables with one row of int32 words per route, once for all layers of a step
(`Segments.table`). A block copies its row to shared memory before it does anything else:

    word      0 ..               rows ..   2 rows          2 rows + _HEAD ...
              adapters of rows   tokens    six numbers     distinct adapters, then -1

The expand has a route for each tile, or for each portion of one (`Routes`), the shrink for each
round of a tile, which has only a few of the tile's adapters (`Rounds`). Tokens are taken as they
come, or, where their adapters change often, sorted by adapter: `order`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.mosaic_gpu.chip import TILE
from pallas_kernels.mosaic_gpu.layouts import ROWS, Memory, Ref, interpreted, pad_to
from pallas_kernels.routing import Segments, SlotRange, local_segments

# -1s behind a route's adapters: a kernel reads all places of a round, also where fewer are
# left, and asks for those of later rounds ahead of time.
_LOOK_AHEAD = 96
# Numbers between the tokens and the adapters of a route: `Route.count` to `Route.items`.
_HEAD = 6
# Where a portion's first step stands among these; its steps follow.
_FIRST_STEP = 3
# Elements that TMA copies at once along an axis, at most.
_COPIED = 256


def may_sort(num_tokens: int) -> bool:
    """Whether `order` may be another one than that in which tokens come, from static shapes.

    Then the kernels have code for rows that do not lie side by side, which Pallas's interpreter
    cannot run.
    """
    return num_tokens > TILE and not interpreted()


@dataclasses.dataclass(frozen=True)
class Order:
    """The tokens in the order in which tiles take them.

    Runs of one adapter stay where they are: TMA copies whole tiles of them. Where there are many
    more runs than adapters, tiles of sorted tokens have far fewer adapters each, and copy rows one
    by one. No row's bits depend on the order.
    """

    def make(self, segments: Segments) -> tuple[Int[Array, " T"]]:
        num_tokens, ids = segments.num_tokens, segments.indices
        runs = 1 + jnp.sum(ids[1:] != ids[:-1], dtype=jnp.int32)
        groups = jnp.sum(segments.group_adapters >= 0, dtype=jnp.int32)
        is_mixed = runs > 2 * groups + -(-num_tokens // TILE)
        return (jnp.where(is_mixed, segments.rows, jnp.arange(num_tokens, dtype=jnp.int32)),)


def order(segments: Segments, sorts: bool) -> Int[Array, " T"] | None:
    """`Order`, if `sorts`; None for as tokens come."""
    return segments.table(Order())[0] if sorts else None


@dataclasses.dataclass(frozen=True)
class RouteSize:
    """How large a route is: of `rows` tokens, with room for so many adapters."""

    rows: int
    adapters: int

    @property
    def words(self) -> int:
        """Words of a route: TMA wants whole 128 bytes."""
        return -(-(2 * self.rows + _HEAD + self.adapters) // 32) * 32

    @property
    def memory(self) -> Memory:
        """The shared memory of a route."""
        return plgpu.SMEM((self.words,), jnp.int32)

    @property
    def copies(self) -> int:
        """Copies of `Route.fetch`, each of which arrives at its barrier."""
        return -(-self.words // _COPIED)


def route_size(slots: int, rows: int) -> RouteSize:
    """The size of `Routes`."""
    return RouteSize(rows, min(rows, slots) + _LOOK_AHEAD)


class Portions(NamedTuple):
    """How blocks share the columns of a tile with many adapters, which would take one block long.

    Attributes:
      steps: in which a block takes its columns, one after the other. A portion has some of them.
      spare: rows of the table for portions, of all tiles together, besides each tile's first.
    """

    steps: int = 1
    spare: int = 0

    def deal(self, adapters: Int[Array, " tiles"]) -> tuple[Int[Array, " tiles"], ...]:
        """Steps of a portion, and portions, of tiles with so many adapters."""
        # The least work of a block, in products of an adapter in a step, for which the rows are
        # enough. A tile has two adapters where one prompt ends.
        limits = self.steps * jnp.left_shift(2, jnp.arange(8, dtype=jnp.int32))[:, None]
        steps = jnp.clip(limits // jnp.maximum(adapters, 1)[None], 1, self.steps)
        portions = (self.steps + steps - 1) // steps
        is_enough = jnp.sum(portions - 1, axis=1, dtype=jnp.int32) <= self.spare
        least = jnp.argmax(is_enough)
        return steps[least], portions[least]


_ONE_PORTION = Portions()


@dataclasses.dataclass(frozen=True)
class Routes:
    """The table of tiles' routes, and behind them those of `portions.spare` further portions.

    Attributes:
      slots: those of the adapters; ids count from the first one.
      rows: tokens of a tile.
      sorts: whether tiles take tokens in `Order`.
      portions: of tiles. They follow from all adapters, so that they are the same for all parts.
    """

    slots: SlotRange
    rows: int
    sorts: bool
    portions: Portions = _ONE_PORTION

    def make(self, segments: Segments) -> tuple[Int[Array, "routes W"]]:
        tokens = order(segments, self.sorts)
        table = _routes(local_segments(segments, self.slots), self.rows, tokens)
        if self.portions.spare:
            ids = segments.indices if tokens is None else segments.indices[tokens]
            table = _with_portions(table, _runs(ids, self.rows), self.rows, self.portions)
        return (table,)


def _runs(ids: Int[Array, " T"], rows: int) -> Int[Array, " tiles"]:
    """How often the adapter changes in each tile: at least as many as it has."""
    ids = pad_to(ids, 0, rows, -1).reshape(-1, rows)
    changes = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.sum(changes & (ids >= 0), axis=1, dtype=jnp.int32)


def _with_portions(
    table: Int[Array, "tiles W"], adapters: Int[Array, " tiles"], rows: int, portions: Portions
) -> Int[Array, "routes W"]:
    """The routes of tiles' first portions, then those of their others."""
    steps, count = portions.deal(adapters)
    tiles = table.shape[0]
    tile, nth, is_there = _one_by_one(count - 1, portions.spare)
    tile = jnp.concatenate([jnp.arange(tiles, dtype=jnp.int32), tile])
    first = jnp.concatenate([jnp.zeros(tiles, jnp.int32), nth + 1]) * steps[tile]
    is_there = jnp.concatenate([jnp.ones(tiles, bool), is_there])
    own = jnp.where(is_there, steps[tile], 0)
    head = 2 * rows + _FIRST_STEP
    return table[tile].at[:, head].set(first).at[:, head + 1].set(own)


class _Dealt(NamedTuple):
    """What each row of a table has: its tile, its number among the tile's, and whether there is
    one."""

    tile: Int[Array, " N"]
    nth: Int[Array, " N"]
    is_there: Bool[Array, " N"]


def _one_by_one(per_tile: Int[Array, " tiles"], most: int) -> _Dealt:
    """`most` rows, for as many of each tile as `per_tile` says, tile by tile."""
    tile = jnp.arange(per_tile.shape[0], dtype=jnp.int32)
    before = jnp.where(tile[None] < tile[:, None], per_tile[None], 0)
    starts = jnp.sum(before, axis=1, dtype=jnp.int32)
    n = jnp.arange(most, dtype=jnp.int32)
    tile = jnp.sum(starts[None] <= n[:, None], axis=1, dtype=jnp.int32) - 1
    return _Dealt(tile, n - starts[tile], n < jnp.sum(per_tile, dtype=jnp.int32))


def _routes(
    segments: Segments, rows: int, tokens: Int[Array, " T"] | None
) -> Int[Array, "tiles W"]:
    """A row for every `rows` tokens, in the order of `tokens`."""
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
        nth = jnp.sum(first[:, None, :] & is_before, axis=2, dtype=jnp.int32)
        # Without the barrier XLA computes each of these once per slot: 91 us with T=4096, one slot.
        nth = lax.optimization_barrier(jnp.where(first, nth, rows))
        slot = jnp.arange(min(rows, segments.num_adapters), dtype=jnp.int32)
        here = nth[:, None, :] == slot[None, :, None]
        distinct = jnp.max(jnp.where(here, ids[:, None, :], -1), axis=2)
    count = jnp.sum(distinct >= 0, axis=1, dtype=jnp.int32)
    is_scattered = jnp.any(tokens != places.reshape(-1, rows), axis=1).astype(jnp.int32)
    tile = jnp.arange(ids.shape[0], dtype=jnp.int32)
    zeros = jnp.zeros_like(tile)
    head = jnp.stack([count, is_scattered, tile, zeros, zeros, zeros], axis=1)
    pad = route_size(segments.num_adapters, rows).words - (2 * rows + _HEAD + distinct.shape[1])
    tail = jnp.full((ids.shape[0], pad), -1, jnp.int32)
    return jnp.concatenate([ids, tokens, head, distinct, tail], axis=1)


def moved(
    table: Int[Array, "routes W"], rows: int, first: Int[Array, ""] | None
) -> Int[Array, "routes W"]:
    """A table whose adapters stand in stacks of several layers, from `first` on, if not None."""
    if first is None:
        return table
    word = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    is_adapter = ((word < rows) | (word >= 2 * rows + _HEAD)) & (table >= 0)
    return jnp.where(is_adapter, table + first, table)


class PartRounds(NamedTuple):
    """What decides the rounds of a part of the shrink.

    Attributes:
      slots: those of its adapters.
      stack: adapters of a round.
      blocks: blocks that take a round, for different ranks.
    """

    slots: SlotRange
    stack: int
    blocks: int

    def size(self, rows: int) -> RouteSize:
        """The size of a round's route."""
        return RouteSize(rows, self.stack)

    def most(self, num_tokens: int, rows: int, ordered: int | None) -> int:
        """How many rounds there are at most, whatever the adapters of the tokens are. `ordered` is
        how many adapters all parts have, if tokens are in `Order`; None for as they come."""
        tiles = -(-num_tokens // rows)
        pairs = min(num_tokens, tiles * self.slots.slots)  # of a tile and an adapter that it has
        if ordered is not None:  # a run has a pair for each tile that it is in
            runs = 2 * min(num_tokens, ordered) + -(-num_tokens // TILE)
            pairs = min(pairs, runs + tiles)
        return tiles + pairs // self.stack


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The tables of rounds, part by part.

    Items are what blocks take: a round for some of the ranks. They count through all parts.

    Attributes:
      parts: of a shrink.
      rows: tokens of a tile.
      sorts: whether tiles take tokens in `Order`.
      every_tile: a tile has one round at least.
    """

    parts: tuple[PartRounds, ...]
    rows: int
    sorts: bool
    every_tile: bool

    def make(self, segments: Segments) -> tuple[Int[Array, "rounds W"], ...]:
        return _rounds(self, segments)


def _rounds(wanted: Rounds, segments: Segments) -> tuple[Int[Array, "rounds W"], ...]:
    rows, tokens = wanted.rows, order(segments, wanted.sorts)
    ordered = segments.num_adapters if wanted.sorts else None
    tables, first_item = [], jnp.zeros((), jnp.int32)
    for part in wanted.parts:
        table = _routes(local_segments(segments, part.slots), rows, tokens)
        count = table[:, 2 * rows]
        per_tile = -(-count // part.stack)
        if wanted.every_tile:
            per_tile = jnp.maximum(per_tile, 1)
        most = part.most(segments.num_tokens, rows, ordered)
        tile, nth, is_there = _one_by_one(per_tile, most)
        first = nth[:, None] * part.stack + jnp.arange(part.stack, dtype=jnp.int32)
        there = (first < count[tile][:, None]) & is_there[:, None]
        place = jnp.where(there, 2 * rows + _HEAD + first, 0)
        adapters = jnp.where(there, table[tile[:, None], place], -1)
        items = jnp.sum(per_tile, dtype=jnp.int32) * part.blocks
        head = [
            jnp.sum(there, axis=1, dtype=jnp.int32), table[tile, 2 * rows + 1], tile,
            (nth == 0).astype(jnp.int32), jnp.broadcast_to(first_item, tile.shape),
            jnp.broadcast_to(items, tile.shape),
        ]  # fmt: skip
        pad = part.size(rows).words - (2 * rows + _HEAD + part.stack)
        tail = jnp.full((most, pad), -1, jnp.int32)
        columns = [table[tile, : 2 * rows], jnp.stack(head, axis=1), adapters, tail]
        tables.append(jnp.concatenate(columns, axis=1))
        first_item += items
    return tuple(tables)


@dataclasses.dataclass(frozen=True)
class Route:
    """A block's route in shared memory, as `words` that hold `rows` tokens' adapters."""

    words: Ref
    rows: int

    def fetch(self, table: Ref, row: Array, barrier: Ref) -> None:
        """Starts to copy a row of the table from device memory."""
        size = self.words.shape[0]
        for first in range(0, size, _COPIED):
            here = pl.ds(first, min(_COPIED, size - first))
            plgpu.copy_gmem_to_smem(table.at[row, here], self.words.at[here], barrier)

    def ids(self) -> Int[Array, " rows"]:
        """Every row's adapter, in registers."""
        return plgpu.load(self.words.at[pl.ds(0, self.rows)], layout=ROWS)

    def id_of(self, row: Array) -> Int[Array, ""]:
        """The adapter of one row."""
        return self.words[row]

    def count(self) -> Int[Array, ""]:
        """How many distinct adapters the tokens have, or the round."""
        return self.words[2 * self.rows]

    def is_scattered(self) -> Bool[Array, ""]:
        """Whether the tokens are others than the consecutive ones from the tile's first row on, so
        that rows are copied one by one."""
        return self.words[2 * self.rows + 1] > 0

    def tile(self) -> Int[Array, ""]:
        """The number of the tile."""
        return self.words[2 * self.rows + 2]

    def is_first(self) -> Bool[Array, ""]:
        """Whether the round is the first one of its tile."""
        return self.words[2 * self.rows + 3] > 0

    def first_item(self) -> Int[Array, ""]:
        """Items of the parts before the round's."""
        return self.words[2 * self.rows + 4]

    def items(self) -> Int[Array, ""]:
        """Items of the round's part."""
        return self.words[2 * self.rows + 5]

    def first_step(self) -> Int[Array, ""]:
        """The first step of a portion."""
        return self.words[2 * self.rows + _FIRST_STEP]

    def steps(self) -> Int[Array, ""]:
        """Steps of a portion; 0 where the table has more rows than there are portions."""
        return self.words[2 * self.rows + _FIRST_STEP + 1]

    def adapter(self, first: Array | int, nth: int) -> Int[Array, ""]:
        """The distinct adapter number `first + nth`; -1 behind the last."""
        return self.words[2 * self.rows + _HEAD + first + nth]

    def rounds(self, stack: int) -> Int[Array, ""]:
        """Rounds in which `stack` adapters at a time are all of them."""
        return lax.div(self.count() + (stack - 1), jnp.int32(stack))


def row_mask(ids: Int[Array, " rows"], adapter: Array, columns: int) -> Bool[Array, "rows columns"]:
    """True in the rows of `adapter`; nowhere if that is -1."""
    adapter = jnp.where(adapter < 0, jnp.int32(-2), adapter)
    return lax.broadcast_in_dim(ids == adapter, (ids.shape[0], columns), (0,))
