"""Tiles of a backward pass: up to 64 tokens of one adapter each.

The tokens are sorted by adapter, and each adapter's are cut into tiles, from its first one on. So
an adapter's tiles, and the order of the sums over them, do not depend on a batch's other tokens. No
tile mixes adapters: what another adapter's tokens hold, NaN included, never meets it.

    rows       0 1 2 7 8 | 3 4 5 6 | 9         tokens, sorted: of adapter 0, of 2, of none
    tiles      0 0 0 0 0 | 1 1 1 1 | 2         (here of up to five tokens)

XLA makes the table of tiles once for all layers of a step, as it merges equal computations.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.mosaic_gpu.backward.rows import fetch_rows, put_rows, wait_for_rows
from pallas_kernels.mosaic_gpu.backward.squares import SIDE, Squares
from pallas_kernels.mosaic_gpu.layouts import Ref
from pallas_kernels.routing import Segments

_DEAD = -2  # the adapter of a tile without tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a batch.

    Attributes:
      table: of each tile its adapter, -1 for none, -2 behind the last tile; where its tokens start
        in `rows`; how many there are; the first of them; and whether 64 follow each other.
      rows: the tokens, sorted by adapter.
      group_adapters: the adapters in use, then -1.
      group_tiles: how many tiles each group has.
    """

    table: Int[Array, "tiles 5"]
    rows: Int[Array, " T"]
    group_adapters: Int[Array, " G"]
    group_tiles: Int[Array, " G"]

    @property
    def count(self) -> int:
        """Tiles, at most."""
        return self.table.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens, and the groups that they make at most."""
        return self.rows.shape[0], self.group_adapters.shape[0]

    @property
    def sparse(self) -> bool:
        """Whether a tile has half of its rows at most, if all adapters have as many tokens."""
        return 2 * self.rows.shape[0] <= SIDE * self.group_adapters.shape[0]

    @classmethod
    def of(cls, segments: Segments) -> "Tiles":
        """The tiles of sorted tokens; those without an adapter come last."""
        tokens = segments.num_tokens
        starts = jnp.append(segments.group_starts, jnp.int32(tokens))
        per_group = -(-jnp.diff(starts) // SIDE)
        ends = jnp.cumsum(per_group, dtype=jnp.int32)
        most = min(tokens, tokens // SIDE + per_group.shape[0])
        tile = jnp.arange(most, dtype=jnp.int32)
        group = jnp.sum(ends[None] <= tile[:, None], axis=1, dtype=jnp.int32)
        live = tile < ends[-1]
        group = jnp.minimum(group, per_group.shape[0] - 1)
        start = starts[group] + (tile - (ends - per_group)[group]) * SIDE
        start = jnp.where(live, start, 0)
        count = jnp.where(live, jnp.minimum(starts[group + 1] - start, SIDE), 0)
        first = segments.rows[start]
        last = segments.rows[start + jnp.maximum(count - 1, 0)]
        is_box = (count == SIDE) & (last - first == SIDE - 1)
        adapters = jnp.append(segments.group_adapters, jnp.int32(-1))[group]
        adapters = jnp.where(live, adapters, _DEAD)
        table = jnp.stack([adapters, start, count, first, is_box.astype(jnp.int32)], axis=1)
        return cls(table, segments.rows, segments.group_adapters, per_group[:-1])

    def reading(self, count: int) -> "Tiles":
        """The same tiles, for arrays of so many rows: token n reads row n % count of them."""
        if count == self.rows.shape[0]:
            return self
        last = self.table[:, 1] + jnp.maximum(self.table[:, 2] - 1, 0)
        rows = self.rows % count
        first = self.table[:, 3] % count
        is_box = (self.table[:, 4] > 0) & (rows[last] - first == SIDE - 1)
        table = self.table.at[:, 3].set(first).at[:, 4].set(is_box.astype(jnp.int32))
        return dataclasses.replace(self, table=table, rows=rows)

    def slot_tiles(self, slots: Int[Array, " S"], shared: int = 1) -> Int[Array, "S 2"]:
        """The first tile of each of these slots, and how many tiles it has; none for -1. Or those
        of the `shared` slots that start with each, whose tiles follow each other."""
        groups, slots = self.group_adapters[None], slots[:, None]
        before = (groups >= 0) & (groups < slots)
        mine = (slots >= 0) & (groups >= slots) & (groups - slots < shared)
        chosen = jnp.stack([before, mine], axis=2)
        return jnp.sum(
            jnp.where(chosen, self.group_tiles[None, :, None], 0), axis=1, dtype=jnp.int32
        )

    def slot_tokens(self, slots: Int[Array, " S"]) -> Int[Array, "S 3"]:
        """The first row of the tiles of each of these slots, where its tokens start in `rows`, and
        how many there are; none for -1."""
        first, count = self.slot_tiles(slots).T
        start = self.table[jnp.minimum(first, self.count - 1), 1]
        last = self.table[jnp.clip(first + count - 1, 0, self.count - 1)]
        tokens = jnp.where(count > 0, last[:, 1] + last[:, 2] - start, 0)
        return jnp.stack([first * SIDE, start, tokens], axis=1)

    def tokens(self) -> Int[Array, " rows"]:
        """The token of each row of the tiles; that of a tile's last row behind it."""
        nth = jnp.minimum(jnp.arange(SIDE, dtype=jnp.int32)[None], self.table[:, 2:3] - 1)
        return self.rows[jnp.maximum(self.table[:, 1:2] + nth, 0).reshape(-1)]

    def is_token(self) -> Bool[Array, " rows"]:
        """Whether each row of the tiles is a token."""
        nth = jnp.arange(SIDE, dtype=jnp.int32)[None]
        return (nth < self.table[:, 2:3]).reshape(-1)

    def adapters(self) -> Int[Array, " rows"]:
        """The adapter of each row of the tiles."""
        return jnp.repeat(self.table[:, 0], SIDE)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, as numbers in registers that all threads of a block share; as in `Tiles.table`."""

    adapter: Int[Array, ""]
    start: Int[Array, ""]
    count: Int[Array, ""]
    first: Int[Array, ""]
    is_box: Bool[Array, ""]

    @classmethod
    def read(cls, table: Ref, nth: Array | int) -> "Tile":
        adapter, start, count, first, is_box = (table[nth, i] for i in range(5))
        return cls(adapter, start, count, first, is_box > 0)


class Loaded(NamedTuple):
    """Barriers, one for each stage of a ring: that a tile's squares came at once; and, for Pallas's
    interpreter alone, that they came row by row."""

    box: Ref
    rows: Ref


def loaded_barriers(stages: int, count: int) -> Loaded:
    """The barriers to ask for, where a stage has `count` squares of a tile."""
    return Loaded(
        plgpu.Barrier(num_barriers=stages, num_arrivals=count),
        plgpu.Barrier(num_barriers=stages, num_arrivals=count * SIDE),
    )


@dataclasses.dataclass(frozen=True)
class Gathered:
    """An array `[T, columns]` whose rows a kernel takes tile by tile.

    Attributes:
      array: in device memory.
      rows: the sorted tokens, in device memory.
      memory: squares, `[stages, count]` of them.
      loaded: their barriers.
    """

    array: Ref
    rows: Ref
    memory: Squares
    loaded: Loaded

    @property
    def count(self) -> int:
        return self.memory.tiles.shape[1]

    def fetch(self, tile: Tile, column: Array, slot: Array) -> None:
        """Starts to copy a tile's squares from `column` on. Behind the tile's last token come zeros
        (in Pallas's interpreter that token again), and never rows of another adapter."""

        def box() -> None:
            for j in range(self.count):
                plgpu.copy_gmem_to_smem(
                    self.array.at[pl.ds(tile.first, SIDE), pl.ds(column + j * SIDE, SIDE)],
                    self.memory.rows.at[slot, j],
                    self.loaded.box.at[slot],
                )

        def row_by_row() -> None:
            where = tile.start, tile.count, column
            fetch_rows(self.array, self.rows, where, self.memory, slot, self.loaded.rows)

        pl.when(tile.is_box)(box)
        pl.when(~tile.is_box)(row_by_row)

    def wait(self, tile: Tile, slot: Array) -> None:
        """Waits until the squares are here. For rows that lanes copied it counts groups of copies.
        So each step must close one: `take_steps` does, if `close` is `close_fetched`."""
        pl.when(tile.is_box)(lambda: plgpu.barrier_wait(self.loaded.box.at[slot]))
        pending = self.memory.tiles.shape[0] - 2  # groups of steps that may be on their way
        pl.when(~tile.is_box)(lambda: wait_for_rows(pending, self.loaded.rows.at[slot]))


def put_tile(square: Ref, array: Ref, rows: Ref, tile: Tile, column: Array) -> None:
    """Starts to copy a tile's square, one of `Squares.rows`, to its tokens' rows of `array`."""
    box = array.at[pl.ds(tile.first, SIDE), pl.ds(column, SIDE)]
    pl.when(tile.is_box)(lambda: plgpu.copy_smem_to_gmem(square, box))
    pl.when(~tile.is_box)(lambda: put_rows(square, array, rows, tile.start, tile.count, column))
