"""Which adapter each token uses: ids, ranges of slots, and the tokens sorted by adapter.

Field names follow Punica's SGMV (arXiv 2310.18547): a segment, here a group, is the run of tokens
that use one adapter.
"""

import contextvars
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int


def static(name: str, value: SupportsIndex) -> int:
    """`value`, or a TypeError if it is no int that is known when JAX traces."""
    try:
        return operator.index(value)
    except (TypeError, jax.errors.JAXTypeError):
        raise TypeError(f"{name} must be a static int, got {value!r}") from None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Group tiles of at most `block` rows: tile i serves rows[start[i]:stop[i]] by adapter[i].

    Entries from `count` on are empty.
    """

    adapter: Int[Array, " tiles"]
    start: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]
    count: Int[Array, ""]


class SlotRange(NamedTuple):
    """The slots `[first, first + slots)` of a model: those of one rank bucket."""

    first: int
    slots: int

    @property
    def stop(self) -> int:
        return self.first + self.slots

    def holds(self, ids: Int[Array, " T"]) -> Bool[Array, " T"]:
        """Whether each id is one of these slots."""
        return (ids >= self.first) & (ids < self.stop)

    def local(self, ids: Int[Array, " T"]) -> Int[Array, " T"]:
        """Ids that count from the range's first slot; -1 for those of other ranges."""
        return jnp.where(self.holds(ids), ids - self.first, -1)


class Table(Protocol):
    """Arrays that kernels read and that follow from a step's `Segments` alone.

    It is static and hashable: equal ones make equal arrays.
    """

    def make(self, segments: "Segments") -> tuple[Array, ...]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Which adapter each token uses, and the tokens of each adapter. A pytree of int32 arrays.

    With `G = min(T, num_adapters)` the shapes are static, whatever the batch holds:

    Attributes:
      indices: `[T]`, adapter of each token, -1 for none.
      rows: `[T]`, token numbers sorted (stably) by adapter; tokens without one come last.
      group_adapters: `[G]`, the distinct adapters in use, ascending; -1 behind the last.
      group_starts: `[G + 1]`, group g is rows[group_starts[g]:group_starts[g + 1]].
      num_adapters: slots of the stacks that this describes (static).
      ranges: what `split` was given (static), and `parts`: the tokens of each of these.
      made: what `with_tables` made (static), and `tables`: the arrays of each of these.
    """

    indices: Int[Array, " T"]
    rows: Int[Array, " T"]
    group_adapters: Int[Array, " G"]
    group_starts: Int[Array, " G+1"]
    num_adapters: int = dataclasses.field(metadata={"static": True})
    ranges: tuple[SlotRange, ...] = dataclasses.field(default=(), metadata={"static": True})
    parts: tuple["Segments", ...] = ()
    made: tuple[Table, ...] = dataclasses.field(default=(), metadata={"static": True})
    tables: tuple[tuple[Array, ...], ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.indices.shape[-1]

    def split(self, ranges: Iterable[tuple[int, int]]) -> "Segments":
        """The same, with the tokens of each range `(first, slots)` sorted apart for all layers.

        Parts of these ranges then sort nothing themselves.
        """
        named = tuple(SlotRange(*slots) for slots in ranges)
        parts = tuple(_make(slots.local(self.indices), slots.slots) for slots in named)
        return dataclasses.replace(self, ranges=named, parts=parts)

    def table(self, table: Table) -> tuple[Array, ...]:
        """What `table` makes of these tokens.

        All layers of a step share it, as XLA merges equal computations. But it does not move them
        out of a loop: for that see `with_tables`.
        """
        if table in self.made:
            return self.tables[self.made.index(table)]
        if (asked := _asked_tables.get()) is not None:
            asked[table] = None
        return table.make(self)

    def with_tables(self, turn: Callable[[], object]) -> "Segments":
        """The same, with the tables that `turn` asks for. JAX traces it once and drops the result.

        For a loop over layers: its turns then read the tables, which are made once before it. H200,
        Llama-3-8B's decode step, 64 rows: tables made in each turn took 20 us of a layer's 315.
        """
        return self.with_made(_tables_of(turn))

    def with_made(self, asked: Iterable[Table]) -> "Segments":
        """The same, with these tables."""
        made = tuple(table for table in asked if table not in self.made)
        tables = tuple(table.make(self) for table in made)
        return dataclasses.replace(self, made=self.made + made, tables=self.tables + tables)

    @property
    def group_sizes(self) -> Int[Array, " G"]:
        """Tokens of each group; 0 behind the last."""
        return jnp.diff(self.group_starts)

    def tiles(self, block: int) -> Tiles:
        """The tile map: every group cut into tiles of at most `block` rows, in order."""
        groups = self.group_adapters.shape[0]
        per_group = -(-self.group_sizes // block)
        ends = jnp.cumsum(per_group)
        tile = jnp.arange(self.num_tokens // block + groups, dtype=jnp.int32)
        # Counted: jnp.searchsorted fails in a shard_map over some of a mesh's axes (JAX 0.11.2).
        group = _count(ends[None] <= tile[:, None])
        live = group < groups
        group = jnp.minimum(group, groups - 1)
        nth = tile - (ends - per_group)[group]
        start = self.group_starts[group] + nth * block
        stop = jnp.minimum(start + block, self.group_starts[group + 1])
        return Tiles(
            adapter=jnp.where(live, self.group_adapters[group], -1),
            start=jnp.where(live, start, 0),
            stop=jnp.where(live, stop, 0),
            count=jnp.sum(per_group, dtype=jnp.int32),
        )


_asked_tables: contextvars.ContextVar[dict[Table, None] | None] = contextvars.ContextVar(
    "lora_asked_tables", default=None
)
# Part of the keys of JAX's caches.
_trace_anew = jax.make_user_context(None)


def tables_alone() -> bool:
    """Whether JAX traces a turn for its tables alone, and what else it computes is dropped."""
    return _asked_tables.get() is not None


def _tables_of(turn: Callable[[], object]) -> list[Table]:
    """The tables that `turn` asks for."""
    asked: dict[Table, None] = {}
    token = _asked_tables.set(asked)
    try:
        with _trace_anew(object()):  # what JAX has traced before would not ask again
            jax.eval_shape(turn)
    finally:
        _asked_tables.reset(token)
    return list(asked)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WideIndices:
    """64-bit ids, which JAX lacks by default, as `[T, 2]` words of int32, the low one first."""

    words: Int[Array, "T 2"]

    def narrow(self) -> Int[Array, " T"]:
        """int32 ids; those that do not fit become -1."""
        return self._or(-1)

    def nearest(self) -> Int[Array, " T"]:
        """int32 numbers; the nearest for those that do not fit."""
        return self._or(jnp.where(self.words[:, 1] < 0, jnp.int32(-(2**31)), jnp.int32(2**31 - 1)))

    def _or(self, other: ArrayLike) -> Int[Array, " T"]:
        """int32 numbers; `other` for those that do not fit."""
        low, high = self.words[:, 0], self.words[:, 1]
        return jnp.where(high == low >> 31, low, jnp.asarray(other, jnp.int32))


# The adapters of tokens, as ops pass them on: sorted, or unchecked ids.
TokenIds = Segments | Int[Array, " T"] | WideIndices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mix:
    """Up to K adapters of each token, each with a weight. A pytree; `make_mix` makes it.

    What a token's adapters add is multiplied by their weights and summed. An adapter that a token
    has twice counts with the sum of its weights.

    Attributes:
      columns: for each n below K, the nth adapter of each token, -1 for none.
      weights: `[T, K]` float32. The weight of an entry without adapter is not used.
      entries: what `as_tokens` returns, sorted, if the columns are.
    """

    columns: tuple[TokenIds, ...]
    weights: Float[Array, "T K"]
    entries: Segments | None = None

    @property
    def num_tokens(self) -> int:
        return self.weights.shape[0]

    def split(self, ranges: Iterable[tuple[int, int]]) -> "Mix":
        """As `Segments.split`."""
        named = tuple(ranges)
        columns = (c.split(named) if isinstance(c, Segments) else c for c in self.columns)
        return dataclasses.replace(self, columns=tuple(columns))

    def with_tables(self, turn: Callable[[], object]) -> "Mix":
        """As `Segments.with_tables`. Tables of columns that a turn does not read cost nothing."""
        asked = _tables_of(turn)
        columns = (c.with_made(asked) if isinstance(c, Segments) else c for c in self.columns)
        entries = None if self.entries is None else self.entries.with_made(asked)
        return dataclasses.replace(self, columns=tuple(columns), entries=entries)

    def as_tokens(self) -> TokenIds:
        """All entries as tokens: number `n * T + t` is token t's nth."""
        if self.entries is not None:
            return self.entries
        return jnp.concatenate([ids_of(column) for column in self.columns])

    def flat_weights(self) -> Float[Array, " KT"]:
        """The weights of `as_tokens`."""
        return self.weights.T.reshape(-1)


# What ops take that know several adapters of a token too.
AnyIds = TokenIds | Mix


class Column(NamedTuple):
    """One adapter of each token, and what its share is multiplied by; None for 1."""

    token_ids: TokenIds
    weights: Float[Array, " T"] | None


def columns_of(ids: AnyIds) -> list[Column]:
    """The columns of a mix; of plain ids the only one."""
    if not isinstance(ids, Mix):
        return [Column(ids, None)]
    return [Column(one, ids.weights[:, n]) for n, one in enumerate(ids.columns)]


def ids_of(token_ids: TokenIds) -> Int[Array, " T"]:
    """The id of each token; it may lie outside of all slots."""
    if isinstance(token_ids, WideIndices):
        return token_ids.narrow()
    return token_ids.indices if isinstance(token_ids, Segments) else token_ids


def local_segments(token_ids: TokenIds, slots: SlotRange) -> Segments:
    """The tokens of the adapters of one range, sorted; ids count from its first slot.

    Without `Segments.split` each call sorts them, which XLA does once for equal ones.
    """
    if isinstance(token_ids, Segments):
        if slots == (0, token_ids.num_adapters):
            return token_ids
        if slots in token_ids.ranges:
            return token_ids.parts[token_ids.ranges.index(slots)]
    return _make(slots.local(ids_of(token_ids)), slots.slots)


def slots_in_use(token_ids: TokenIds, slots: SlotRange, most: int) -> Int[Array, " most"]:
    """The first `most` slots of a range that tokens use, counted from its first one, ascending;
    then -1."""
    used = local_segments(token_ids, slots).group_adapters[:most]
    return jnp.pad(used, (0, most - used.shape[0]), constant_values=-1)


def num_tokens_of(token_ids: TokenIds) -> int:
    if isinstance(token_ids, Segments):
        return token_ids.num_tokens
    return (token_ids.words if isinstance(token_ids, WideIndices) else token_ids).shape[0]


def checked_indices(indices: ArrayLike, num_adapters: int) -> Int[Array, " T"]:
    """`indices` as int32 with everything outside `[0, num_adapters)` turned into -1.

    Host arrays are compared before they are narrowed, so that an int64 id beyond int32 cannot wrap
    around to another adapter.
    """
    if not isinstance(indices, jax.Array):
        indices = np.asarray(indices)
        if indices.size == 0 and indices.dtype == np.float64:  # an empty list
            indices = indices.astype(np.int32)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.ndim != 1:
        also = "; several adapters per token, [T, K], need weights [T, K]" * (indices.ndim == 2)
        raise ValueError(f"indices must have shape [T], got {list(indices.shape)}{also}")
    if isinstance(indices, np.ndarray):
        in_range = (indices >= 0) & (indices < num_adapters)
        return jnp.asarray(np.where(in_range, indices.astype(np.int32), np.int32(-1)))
    if indices.dtype.itemsize < 4:  # num_adapters may not fit
        indices = indices.astype(jnp.int32)
    valid = indices >= 0
    if num_adapters <= jnp.iinfo(indices.dtype).max:
        valid &= indices < jnp.asarray(num_adapters, indices.dtype)
    return jnp.where(valid, indices, jnp.asarray(-1).astype(indices.dtype)).astype(jnp.int32)


def expert_indices(
    indices: Int[Array, " T"], experts: Int[Array, "T K"], num_experts: int
) -> Int[Array, "T K"]:
    """The ids of the adapters of experts: `indices[t] * num_experts + experts[t, k]`, -1 for none.

    Those of the pairs of a token and an expert, for stacks `[slots * num_experts, R, H]`. In a
    call each pair is a token of its own.

    Args:
      indices: `[T]` int32, the slot of each token's adapter; a negative number is none, and so is
        one so large that its ids would leave int32.
      experts: `[T, K]` int32, the experts that the token is sent to. One outside of
        `[0, num_experts)` has no adapter.
      num_experts: of the layer.

    Raises:
      TypeError: `num_experts` is no static int.
    """
    num_experts = static("num_experts", num_experts)
    slots = indices[:, None]
    last = 2**31 // max(1, num_experts) - 1  # behind it, an id would wrap around to another slot's
    is_slot = (slots >= 0) & (slots <= last)
    is_pair = is_slot & (experts >= 0) & (experts < num_experts)
    return jnp.where(is_pair, slots * num_experts + experts, -1)


def make_segments(indices: ArrayLike, num_adapters: int) -> Segments:
    """Sorts the tokens of a step by adapter.

    Works inside jit; shapes are static. Ids outside `[-1, num_adapters)` count as -1.

    Args:
      indices: `[T]` integers, the adapter of each token, -1 for none.
      num_adapters: `L`, the slots of the stacks.

    Raises:
      TypeError: `indices` are not integers, or `num_adapters` is no static int.
      ValueError: `indices` are not one-dimensional, or `num_adapters` is below 1.
    """
    num_adapters = static("num_adapters", num_adapters)
    if num_adapters < 1:
        raise ValueError(f"num_adapters must be at least 1, got {num_adapters}")
    return _sort(checked_indices(indices, num_adapters), num_adapters)


def unsorted_mix(indices: ArrayLike, weights: ArrayLike) -> Mix:
    """The mix of `[T, K]` ids, which are not checked yet.

    Raises:
      TypeError: `indices` are not integers, or `weights` no real numbers.
      ValueError: `indices` are not `[T, K]` with a K of at least 1, `weights` are not as many, or
        a weight in a NumPy array is NaN or infinite.
    """
    ids = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"with weights, indices must have shape [T, K] with K >= 1, got {list(ids.shape)}"
        )
    check_weights(weights, ids.shape)
    columns = tuple(ids[:, n] for n in range(ids.shape[1]))
    return Mix(columns, jnp.asarray(weights).astype(jnp.float32))  # type: ignore[arg-type]


def check_weights(weights: ArrayLike, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless weights are finite real numbers of this shape. Values of
    device arrays are not read."""
    array = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"weights must be real numbers, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(
            f"weights must have the shape of indices, {list(shape)}, got {list(array.shape)}"
        )
    if not isinstance(array, np.ndarray):
        return
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"weights must be finite, but that of row {row}, column {column} is "
            f"{array[row, column]}"
        )


def make_mix(indices: ArrayLike, weights: ArrayLike, num_adapters: int) -> Mix:
    """`make_segments` of tokens that have several adapters, each with a weight.

    Works inside jit; shapes are static.

    Args:
      indices: `[T, K]` integers, the adapters of each token, -1 for none.
      weights: `[T, K]` real numbers, what is multiplied with what each of them adds. They may be
        negative. Those of entries without adapter are not used.
      num_adapters: `L`, the slots of the stacks.

    Raises: as `make_segments`; TypeError where `weights` are no real numbers; ValueError where
    these are not `[T, K]`, or one in a NumPy array is NaN or infinite.
    """
    mix = unsorted_mix(indices, weights)
    columns = tuple(make_segments(ids_of(one), num_adapters) for one in mix.columns)
    ids = jnp.concatenate([column.indices for column in columns])
    return Mix(columns, mix.weights, make_segments(ids, num_adapters))


_make = jax.jit(make_segments, static_argnums=1)

# Tokens that are compared with each other in pairs; slots that all of them are compared with.
_CHUNK = 256


# Outside of a trace one program, not one for each of some fifty steps.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _sort(indices: Int[Array, " T"], num_adapters: int) -> Segments:
    """Sorted where there are many slots, lest work and memory grow with them; counted where few."""
    return (_counted if num_adapters <= _CHUNK else _sorted)(indices, num_adapters)


def _sorted(indices: Int[Array, " T"], num_adapters: int) -> Segments:
    num_tokens = indices.shape[0]
    groups = min(num_tokens, num_adapters)
    key = jnp.where(indices < 0, num_adapters, indices)
    rows = jnp.argsort(key, stable=True).astype(jnp.int32)
    key = key[rows]
    is_first = jnp.concatenate([jnp.ones(min(num_tokens, 1), bool), key[1:] != key[:-1]])
    # Group number of each first row; the others, and the group of tokens without adapter when all
    # slots are in use, land outside and are dropped.
    group = jnp.where(is_first, jnp.cumsum(is_first, dtype=jnp.int32) - 1, groups + 1)
    covered = jnp.sum(indices >= 0, dtype=jnp.int32)
    starts = jnp.full(groups + 1, covered, jnp.int32)
    starts = starts.at[group].set(jnp.arange(num_tokens, dtype=jnp.int32), mode="drop")
    adapters = jnp.full(groups, num_adapters, jnp.int32).at[group].set(key, mode="drop")
    return Segments(
        indices=indices,
        rows=rows,
        group_adapters=jnp.where(adapters < num_adapters, adapters, -1),
        group_starts=jnp.minimum(starts, covered),
        num_adapters=num_adapters,
    )


def _counted(indices: Int[Array, " T"], num_adapters: int) -> Segments:
    """By counting: on a GPU, few kernels that compare take less than the many of a sort."""
    num_tokens = indices.shape[0]
    groups = min(num_tokens, num_adapters)
    key = jnp.where(indices < 0, num_adapters, indices)
    # For each slot up to L: how many tokens have an adapter below it, and how many such adapters.
    slot = jnp.arange(num_adapters + 1, dtype=jnp.int32)
    tokens_below = _count(key[None] < slot[:, None])
    is_used = tokens_below[1:] > tokens_below[:-1]
    used_below = _count(is_used[None] & (slot[None, :-1] < slot[:, None]))
    # The adapter of group g is the last slot below which at most g are in use.
    group = jnp.arange(groups + 1, dtype=jnp.int32)[:, None]
    is_reached = used_below[None] <= group
    is_adapter = is_reached & (group < used_below[-1])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = (
        jnp.zeros_like(token)
        .at[_places(key, slot, tokens_below)]
        .set(token, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)
    )
    return Segments(
        indices=indices,
        rows=rows,
        group_adapters=jnp.max(jnp.where(is_adapter, slot[None], -1)[:groups], axis=1),
        group_starts=jnp.max(jnp.where(is_reached, tokens_below[None], 0), axis=1),
        num_adapters=num_adapters,
    )


def _places(
    key: Int[Array, " T"], slot: Int[Array, " L+1"], tokens_below: Int[Array, " L+1"]
) -> Int[Array, " T"]:
    """Where a stable sort puts each token: behind lower keys, earlier chunks, its chunk's own."""
    num_chunks = -(-key.shape[0] // _CHUNK)
    padding = num_chunks * _CHUNK - key.shape[0]
    chunks = jnp.pad(key, (0, padding), constant_values=slot.shape[0] - 1)
    chunks = chunks.reshape(num_chunks, _CHUNK)
    nth = jnp.arange(_CHUNK, dtype=jnp.int32)[None]
    is_before = (chunks[:, None, :] == chunks[:, :, None]) & (nth < nth.T)[None]
    behind = tokens_below[None]
    if num_chunks > 1:
        chunk = jnp.arange(num_chunks, dtype=jnp.int32)
        counts = _count(chunks[:, None, :] == slot[None, :, None])
        is_earlier = (chunk[None] < chunk[:, None])[:, :, None]
        behind += jnp.sum(jnp.where(is_earlier, counts[None], 0), axis=1, dtype=jnp.int32)
    behind = jnp.broadcast_to(behind, (num_chunks, *slot.shape))
    places = jnp.take_along_axis(behind, chunks, axis=1, mode="promise_in_bounds")
    return (places + _count(is_before)).reshape(-1)[: key.shape[0]]


def _count(found: Array) -> Array:
    return jnp.sum(found, axis=-1, dtype=jnp.int32)


def segments_from_lengths(
    starts: ArrayLike,
    lengths: ArrayLike,
    adapters: ArrayLike,
    num_tokens: int,
    num_adapters: int,
) -> Segments:
    """Segments in LoRAX's form: segment s is tokens starts[s] to starts[s] + lengths[s].

    Works inside jit. Tokens that no segment covers count as -1. Segments may come in any order.

    Args:
      starts: `[S]` integers, first token of each segment (LoRAX's `b_seq_start_loc`).
      lengths: `[S]` integers, tokens of each segment (`seq_len_tensor`); 0 is allowed.
      adapters: `[S]` integers, adapter of each segment, -1 for none (`lora_indices_tensor`).
      num_tokens: `T`.
      num_adapters: `L`.

    Raises:
      TypeError: an array is not of integers, or a size no static int.
      ValueError: the shapes differ, or host arrays hold a segment outside `[0, num_tokens)` or two
        that overlap. Values of device arrays are not read: there a segment is clipped to the
        tokens, and ends at the latest where the next one starts.
    """
    named = {"starts": starts, "lengths": lengths, "adapters": adapters}
    arrays: dict[str, Any] = {
        k: v if isinstance(v, jax.Array) else np.asarray(v) for k, v in named.items()
    }
    for name, array in arrays.items():
        if not (jnp.issubdtype(array.dtype, jnp.integer) or array.size == 0):
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        if array.ndim != 1 or array.shape != arrays["starts"].shape:
            shapes = {k: list(v.shape) for k, v in arrays.items()}
            raise ValueError(f"starts, lengths and adapters must share one shape [S], got {shapes}")
    num_tokens = static("num_tokens", num_tokens)
    num_adapters = static("num_adapters", num_adapters)
    if num_tokens < 0 or num_adapters < 1:
        raise ValueError(
            f"need num_tokens >= 0 and num_adapters >= 1, got {num_tokens} and {num_adapters}"
        )
    if all(isinstance(arrays[k], np.ndarray) for k in ("starts", "lengths")):
        _check_host_segments(arrays["starts"], arrays["lengths"], num_tokens)
    adapter_of = checked_indices(arrays["adapters"], num_adapters)
    if adapter_of.shape[0] == 0:
        return _sort(jnp.full(num_tokens, -1, jnp.int32), num_adapters)
    start, length = (nearest_int32(arrays[k]) for k in ("starts", "lengths"))
    length = jnp.maximum(length, 0)  # else the next sum may wrap around
    length = jnp.minimum(jnp.where(start < 0, length + start, length), num_tokens)
    start = jnp.clip(start, 0, num_tokens)
    start = jnp.where(length > 0, start, num_tokens)  # empty segments hide no other
    order = jnp.argsort(start)
    start, length, adapter_of = start[order], length[order], adapter_of[order]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(start, token, side="right").astype(jnp.int32) - 1
    covered = (segment >= 0) & (token - start[segment] < length[segment])
    return _sort(jnp.where(covered, adapter_of[segment], -1), num_adapters)


def nearest_int32(values: Array | np.ndarray) -> Int[Array, " S"]:
    """`values` as int32; the nearest for those that do not fit."""
    bounds, wide = jnp.iinfo(np.int32), jnp.iinfo(values.dtype)
    clip = np.clip if isinstance(values, np.ndarray) else jnp.clip
    least, most = max(bounds.min, wide.min), min(bounds.max, wide.max)
    return jnp.asarray(clip(values, least, most).astype(np.int32))


def _check_host_segments(starts: np.ndarray, lengths: np.ndarray, num_tokens: int) -> None:
    spans = sorted((int(s), int(s) + int(n)) for s, n in zip(starts, lengths) if n)
    for s, n in zip(starts.tolist(), lengths.tolist()):
        if s < 0 or n < 0 or s + n > num_tokens:
            raise ValueError(f"segment of {n} tokens at {s} leaves the {num_tokens} tokens")
    for (a, a_stop), (b, b_stop) in itertools.pairwise(spans):
        if b < a_stop:
            raise ValueError(f"segments [{a}, {a_stop}) and [{b}, {b_stop}) overlap")
