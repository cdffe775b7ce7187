"""The fused kernel's work list: tokens in chunks of few, and which adapters each chunk has."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# -1s behind a chunk's adapters: a stack reads up to 8 of them.
LOOK_AHEAD = 8


def in_order(ids: tuple[Int[Array, " T"], ...]) -> Int[Array, " T"]:
    """The tokens, those with the same adapters side by side, else as they come; last those without.

    Unlike `Segments.rows`, which sorts by adapter, this leaves runs of tokens where they are, which
    TMA copies at once. All are compared with all: for so few tokens less work than sorting.
    """
    same = functools.reduce(jnp.logical_and, [i[:, None] == i for i in ids])
    token = jnp.arange(ids[0].shape[0], dtype=jnp.int32)
    used = functools.reduce(jnp.logical_or, [i >= 0 for i in ids])
    first = jnp.min(jnp.where(same, token, token.size), axis=1)
    first = jnp.where(used, first, token.size)
    before = (first < first[:, None]) | ((first == first[:, None]) & (token < token[:, None]))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(place == token[:, None], token, 0), axis=1, dtype=jnp.int32)


def wgmma_columns(tokens: int) -> int:
    """wgmma's N for a chunk of `tokens`."""
    return max(8, -(-tokens // 8) * 8)


class Route(NamedTuple):
    """Where a chunk's route holds what, for P parts: the token row of each of wgmma's columns, then
    per part the place of its adapter in the list of them (-1: none), the length of that list, the
    list, and whether all `tokens` rows have an adapter. Last the first row of the tiles of 8 rows
    that the columns are, or -1 where the rows are not consecutive, or not so aligned; and the
    column of the first row."""

    tokens: int
    parts: int

    @property
    def columns(self) -> int:
        return wgmma_columns(self.tokens)

    def place(self, part: Any) -> Any:
        return self.columns * (1 + part)

    def count(self, part: int) -> int:
        return self.columns * (1 + self.parts) + part

    def adapters(self, part: int) -> int:
        first = self.columns * (1 + self.parts) + self.parts
        return first + part * (self.tokens + LOOK_AHEAD)

    def full(self, part: int) -> int:
        return self.adapters(self.parts) + part

    @property
    def run(self) -> int:
        return self.full(self.parts)

    @property
    def shift(self) -> int:
        return self.run + 1

    @property
    def width(self) -> int:
        return -(-(self.shift + 1) // 32) * 32


def chunk_routes(
    rows: Int[Array, " T"], ids: tuple[Int[Array, " T"], ...], tokens: int, tiles: bool
) -> Int[Array, "chunks W"]:
    """The `Route` of each chunk of `tokens` consecutive entries of `rows`; ids per part.

    `tiles` says whether tiles of 8 rows may be copied (`whole_tiles`).
    """
    spot = Route(tokens, len(ids))
    chunks = -(-rows.shape[0] // tokens)

    def chunked(values: Array) -> Array:
        pad = chunks * tokens - values.shape[0]
        return jnp.pad(values, (0, pad), constant_values=-1).reshape(chunks, tokens)

    def wide(values: Array, width: int) -> Array:
        pad = width - values.shape[1]
        return jnp.pad(values, ((0, 0), (0, pad)), constant_values=-1)

    row, nth = chunked(rows), jnp.arange(tokens, dtype=jnp.int32)
    first = row[:, :1]
    run = jnp.all(row == first + nth, axis=1, keepdims=True) & (first >= 0)
    if not tiles:
        run, shift = jnp.zeros_like(run), jnp.zeros_like(first)
    elif tokens % 8:
        run &= first % 8 + tokens <= 8
        shift = jnp.where(run, first % 8, 0)
    else:
        run &= first % 8 == 0
        shift = jnp.zeros_like(first)
    base = jnp.where(run, first - first % 8, -1)

    def in_columns(values: Array) -> Array:
        source = jnp.arange(spot.columns, dtype=jnp.int32) - shift
        values = jnp.take_along_axis(values, jnp.clip(source, 0, tokens - 1), axis=1)
        return jnp.where((source >= 0) & (source < tokens), values, -1)

    fields, counts, lists, full = [in_columns(row)], [], [], []
    earlier = jnp.tril(jnp.ones((tokens, tokens), bool), -1)
    upto = jnp.tril(jnp.ones((tokens, tokens), bool))
    for part_ids in ids:
        id_ = chunked(part_ids[rows])
        same = id_[:, :, None] == id_[:, None, :]
        new = (id_ >= 0) & ~jnp.any(same & earlier, axis=2)
        # The place of a new adapter counts the new ones up to it; a later row has its first row's.
        place = jnp.sum(new[:, None, :] & upto, axis=2, dtype=jnp.int32) - 1
        place = jnp.max(jnp.where(same & new[:, None, :], place[:, None, :], -1), axis=2)
        place = jnp.where(id_ >= 0, place, -1)
        listed = jnp.max(jnp.where(place[:, None, :] == nth[:, None], id_[:, None, :], -1), axis=2)
        fields.append(in_columns(place))
        counts.append(jnp.sum(new, axis=1, keepdims=True, dtype=jnp.int32))
        lists.append(wide(listed, tokens + LOOK_AHEAD))
        full.append(jnp.all(id_ >= 0, axis=1, keepdims=True).astype(jnp.int32))
    fields = [*fields, *counts, *lists, *full, base, shift]
    return wide(jnp.concatenate(fields, axis=1), spot.width)
