"""Which adapter each row of a batch uses, as the layers see it."""

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, cast

import jax
import jax.extend.core
import numpy as np
from jax.sharding import NamedSharding

from jax_lora.tokens import (
    Rows,
    concrete,
    first_ids,
    has_traced_order,
    sorted_shards,
    sorted_tokens,
    spread,
)
from pallas_kernels.ranks import check_buckets, check_phase
from pallas_kernels.renamed import removed_keywords
from pallas_kernels.routing import Mix, Segments, check_weights, static


class Lease:
    """Keeps slots from being given to another adapter while it lives and is open."""

    def __init__(self, slots: frozenset[tuple[int, int]]) -> None:
        self.slots = slots
        self.is_open = True

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a lease that the bank doesn't know would keep nothing

    def __reduce__(self) -> Any:
        raise TypeError("a batch that leases adapters can't be pickled; make one where it is used")


_LOST = Lease(frozenset())
_LOST.is_open = False


class Lock(Protocol):
    """A re-entrant lock, as `threading.RLock` makes it."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def _is_owned(self) -> bool:
        """Whether this thread holds it."""


class Guard:
    """Stands for the stacks of a model: what its banks, layers and batches have in common.

    A static attribute of the layers, so that clones and what is split and merged share it, and part
    of a batch's treedef. It refers to no bank, as jit keeps both for ever.

    Attributes:
      lock: held while a bank writes the stacks. Whoever reads them for a step holds it until the
        step's call returns.
      writes: how often a bank has written them.
    """

    def __init__(self) -> None:
        # Its `with` is C, which no signal's exception divides. The stubs lack `_is_owned`.
        self.lock = cast(Lock, threading.RLock())
        self.writes = 0
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._owner: weakref.ref[object] | None = None

    def claim(self, layer: object) -> bool:
        """Whether the guard is of this layer's model, and not of one that it was copied from."""
        if self._owner is None or self._owner() is None:
            self._owner = weakref.ref(layer)
        return self._owner() is layer

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()  # in another process, its stacks are others


class _LeaseRef:
    """A lease inside a treedef. All are equal, so that a new lease never retraces anything, and
    none owns its lease, because jit keeps the treedefs of its first call for ever."""

    def __init__(self, lease: Lease | None) -> None:
        self._ref = None if lease is None else weakref.ref(lease)

    def lease(self) -> Lease | None:
        """None where there never was one; an ended one where it is gone."""
        return None if self._ref is None else self._ref() or _LOST

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LeaseRef)

    def __hash__(self) -> int:
        return hash(_LeaseRef)


@jax.tree_util.register_pytree_node_class
class AdapterBatch:
    """The adapter of each of `B` rows: a pytree that `jit` takes as an argument.

    `AdapterBank.batch` makes it. It leases its adapters while it, or a copy of it
    (`jax.device_put`, `jax.tree.map`), is referenced; used as a context manager, until the block
    ends. From then on its use is an error. What a compiled function returns is no copy: keep the
    batch that went in. Nor do rows put together from several batches keep more than one's lease.

    Ids count through all slots of the model, bucket after bucket: with ranges `((16, 4), (64, 2))`
    ids 0 to 3 are the slots of bucket 16, and 4 and 5 those of bucket 64. Layers take from `ranges`
    which ids are those of their stacks.

    Row b of `x` `[B, H]` or `[B, S, H]` uses `indices[b]`; with `lengths`, the rows are laid out
    flat, `lengths[b]` tokens of row b after those of row b - 1, in `x` of `[T, H]`; tokens behind
    the last row have no adapter. Lengths that sum to more than T are an error where their values
    are known; inside a compiled function, which does not know them, rows end at T.

    With `weights`, a row has up to K adapters, the sum of whose shares, each multiplied by its
    weight, is added to the row.

    Attributes:
      indices: `[B]` int32, the id of each row's adapter, or -1. With weights `[B, K]`.
      weights: `[B, K]` float32, or None. Those of entries without adapter are not used.
      lengths: `[B]` int32 tokens of each row, or None.
      ranges: `(bucket, slots)` of each rank bucket of the model, in the order of ids (static).
      phase: "decode" or "prefill" (static). Or "exact": a token's delta then has the same bits in a
        batch of any size, as where a decode step samples what a training step reads. 64 tokens are
        computed at a time, by one program: a batch of fewer takes as long as one of 64, and one of
        more takes its share of 64 by turns. Gradients are computed as ever.
      guard: of the bank that made it (static). Layers of another bank's model refuse the batch.
        None, for a batch made by hand, is any model's.

    NumPy arrays are copied, as a step reads them after its call has returned.

    Raises:
      TypeError: `indices` or `lengths` are not integers, or `weights` no real numbers.
      ValueError: `indices` are not `[B]`, or with weights `[B, K]`; `weights` have another shape,
        or one in a NumPy array is NaN or infinite; `lengths` are not `[B]`, `ranges` can't be, or
        an unknown phase.
    """

    @removed_keywords(
        buckets="indices are [B] ids that count through the slots of all buckets; give "
        "ranges=((bucket, slots), ...)"
    )
    def __init__(
        self,
        indices: Any,
        lengths: Any = None,
        *,
        weights: jax.Array | np.ndarray | None = None,
        ranges: Sequence[tuple[int, int]],
        phase: str = "decode",
        lease: Lease | None = None,
        guard: Guard | None = None,
    ) -> None:
        indices, lengths = _own(indices), _own(lengths)
        self.indices, self.lengths, self._lease, self.guard = indices, lengths, lease, guard
        self.ranges = _check_ranges(ranges)
        self.phase = phase if phase == "exact" else check_phase(phase)
        for name, array in (("indices", indices), ("lengths", lengths)):
            dtype = getattr(array, "dtype", type(array))
            if array is not None and getattr(dtype, "kind", "") not in ("i", "u"):
                raise TypeError(f"{name} must be an array of integers, got {dtype}")
        if indices.ndim != (1 if weights is None else 2):
            shape = "[B]" if weights is None else "[B, K] beside weights"
            raise ValueError(f"indices must have shape {shape}, got {list(indices.shape)}")
        if lengths is not None and lengths.shape != indices.shape[:1]:
            raise ValueError(
                f"lengths must have shape {list(indices.shape[:1])}, got {list(lengths.shape)}"
            )
        if weights is not None:
            check_weights(weights, indices.shape)
        self.weights = _own(weights)
        self._segments: list[tuple[Any, tuple[Any, ...], Segments | Mix]] = []

    def tree_flatten(self) -> tuple[tuple[Any, Any, Any], tuple[Any, ...]]:
        lease, is_traced = self._lease, isinstance(self.indices, jax.core.Tracer)
        is_concrete = isinstance(self.indices, jax.Array | np.ndarray) and not is_traced
        if is_concrete and lease is not None and not lease.is_open:
            raise RuntimeError(
                "this batch's `with` block has ended, or a compiled function returned it: nothing "
                "keeps its adapters in their slots; ask the bank for a new one"
            )
        # A tree of tracers may be that of a function's output. JAX uses it again for each call, so
        # it must not carry the lease of the first one.
        ref = _LeaseRef(_LOST if is_traced else lease)
        leaves = self.indices, self.lengths, self.weights
        return leaves, (self.ranges, self.phase, self.guard, ref)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], leaves: Sequence[Any]) -> Self:
        # No checks: JAX unflattens with leaves that are no arrays.
        batch = object.__new__(cls)
        batch.indices, batch.lengths, batch.weights = leaves
        batch.ranges, batch.phase, batch.guard, ref = aux
        batch._lease, batch._segments = ref.lease(), []
        return batch

    def with_phase(self, phase: str) -> "AdapterBatch":
        """The same rows, each now one token (`lengths` are dropped for "decode"), on one lease."""
        lengths = None if phase == "decode" else self.lengths
        return AdapterBatch(
            self.indices,
            lengths,
            weights=self.weights,
            ranges=self.ranges,
            phase=phase,
            lease=self._lease,
            guard=self.guard,
        )

    def with_weights(self, weights: jax.Array | np.ndarray) -> "AdapterBatch":
        """The same rows and adapters with other weights, on one lease: to train weights.

        Raises: as `AdapterBatch`; ValueError if the batch has none.
        """
        if self.weights is None:
            raise ValueError(
                "the batch has one adapter per row, without a weight; make it by a bank with "
                "AdapterBank(model, adapters_per_row=2)"
            )
        return AdapterBatch(
            self.indices,
            self.lengths,
            weights=weights,
            ranges=self.ranges,
            phase=self.phase,
            lease=self._lease,
            guard=self.guard,
        )

    def check_guard(self, guard: Guard | None, layer: str) -> None:
        """Raises ValueError if the batch is of another bank than the layer's."""
        if None not in (self.guard, guard) and self.guard is not guard:
            raise ValueError(
                f"the batch is of another AdapterBank than the {layer} that it is given to; make "
                "it with the bank of this model (and split a model after its bank is built)"
            )

    def _untraced(self) -> "AdapterBatch":
        """Itself; with the values behind its tracers where they are known.

        They are where `jax.grad` runs without `jit`. Its tracers are new in each step. As keys of
        JAX's caches they would have everything compiled anew in each step.
        """
        leaves = [concrete(leaf) for leaf in (self.indices, self.lengths)]
        if not isinstance(self.indices, jax.core.Tracer) or leaves[0] is None:
            return self
        if self.lengths is not None and leaves[1] is None:
            return self
        batch = object.__new__(type(self))
        batch.__dict__.update(self.__dict__, _segments=[])
        batch.indices, batch.lengths = leaves  # weights may have gradients
        if batch._lease is _LOST:
            batch._lease = None  # whoever began the trace holds it
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.is_open = False

    def __repr__(self) -> str:
        rows = "?" if not hasattr(self.indices, "shape") else self.indices.shape[-1]
        return f"AdapterBatch({rows} rows, ranges={self.ranges}, phase={self.phase!r})"

    @property
    def num_slots(self) -> int:
        """Slots of all buckets."""
        return sum(slots for _, slots in self.ranges)

    def first_slots(self, slots: Mapping[int, int]) -> dict[int, int]:
        """The id of each bucket's first slot, for a layer with these `{bucket: slots}`.

        Raises:
          ValueError: the layer's buckets or slots are not those of the batch's model.
        """
        if dict(self.ranges) != slots:
            raise ValueError(
                f"the layer has slots {dict(slots)}, but the batch is of a model with "
                f"{dict(self.ranges)}"
            )
        return first_ids(self.ranges)

    def sorted_for(
        self, lead: tuple[int, ...], sharding: NamedSharding | None = None
    ) -> "AdapterBatch":
        """The same batch, its tokens sorted for an `x` of shape `[*lead, H]`, also in the loops
        that this trace is about to begin: else each would sort them in each turn.

        Raises:
          ValueError: the rows do not spread over `lead`.
        """
        return self.with_segments(lead, self.segments(lead, sharding), sharding)

    def with_segments(
        self,
        lead: tuple[int, ...],
        segments: Segments | Mix,
        sharding: NamedSharding | None = None,
    ) -> "AdapterBatch":
        """The same batch, with what `segments(lead, sharding)` is to return."""
        batch = object.__new__(type(self))
        batch.__dict__.update(self.__dict__)
        batch._segments = [(None, (lead, sharding, jax.tree.structure(self)), segments)]
        return batch

    def with_tables(self, lead: tuple[int, ...], turn: Callable[[], object]) -> "AdapterBatch":
        """What `sorted_for(lead)` returned, also with the tables that kernels ask for in `turn` of
        the loop (`Segments.with_tables`)."""
        return self.with_segments(lead, self.segments(lead).with_tables(turn))

    def segments(
        self, lead: tuple[int, ...], sharding: NamedSharding | None = None
    ) -> Segments | Mix:
        """The tokens of an `x` of shape `[*lead, H]`, sorted by adapter; with weights a `Mix`.

        Sorted once per trace and shared by all layers that ask for the same shape.

        Args:
          sharding: how tokens `[*lead]` are divided over a mesh, if so. The result is then, shard
            by shard along the first axis of each array, the `Segments` of the shard's tokens.

        Raises:
          ValueError: the rows do not spread over `lead`.
        """
        tree = jax.tree.structure(self)  # an ended lease is an error here too
        key = (lead, sharding, tree)
        # A sort made inside one trace (a scan's body, say) must not leak into another.
        trace = jax.extend.core.get_opaque_trace_state(convention="nnx")
        self._segments = [known for known in self._segments if known[0] in (None, trace)]
        for _, known_key, segments in self._segments:
            if known_key == key:
                return segments
        tokens = spread(Rows(self.indices, self.lengths, self.weights), lead)
        if sharding is None:
            segments = sorted_tokens(tokens, self.ranges)
        else:
            segments = sorted_shards(tokens, self.ranges, sharding)
        is_constant = has_traced_order(segments) and not isinstance(self.indices, jax.core.Tracer)
        if is_constant and self is current():
            raise RuntimeError(
                "jax_lora.use was entered outside of the function that is being compiled; give "
                "that function the batch as an argument and enter use inside it, or jit the whole "
                "step"
            )
        self._segments.append((trace, key, segments))
        return segments


_ambient: contextvars.ContextVar[AdapterBatch | None] = contextvars.ContextVar(
    "jax_lora_batch", default=None
)
# Part of the keys of JAX's caches: a function that was traced under one batch, or under none, must
# not serve another. A batch is a key of its own if what is traced keeps some of it: its tracers, or
# the segments of `with_segments`. The key is a weak reference, because the caches last. All other
# batches share one key.
_cache_key = jax.make_user_context(None)


@contextlib.contextmanager
def use(batch: AdapterBatch | None) -> Iterator[None]:
    """Every LoRA layer called inside the block uses `batch`; for models that know no adapters.

        @jax.jit
        def step(state, x, batch):
            with jax_lora.use(batch):
                return nnx.merge(graphdef, state)(x)

    Enter it inside the jitted function, whose argument the batch is: what is ambient is read while
    tracing, so a function that is compiled (or scanned, or rematerialised) inside the block, but
    not the block with it, would be compiled for this one batch; that is a RuntimeError. None
    switches adapters off. Don't `await` or `yield` inside the block.

    Raises:
      TypeError: `batch` is no AdapterBatch.
    """
    if not isinstance(batch, AdapterBatch | None):
        raise TypeError(f"use takes an AdapterBatch, got {type(batch).__name__}")
    if batch is not None:
        batch = batch._untraced()
    token = _ambient.set(batch)
    try:
        is_kept = batch is not None and (
            any(isinstance(leaf, jax.core.Tracer) for leaf in (batch.indices, batch.weights))
            or any(trace is None for trace, *_ in batch._segments)
        )
        with _cache_key(weakref.ref(batch) if is_kept else batch is not None or None):
            yield
    finally:
        _ambient.reset(token)


def of_any_batch[**P, R](op: Callable[P, R]) -> Callable[P, R]:
    """`op`, which knows of a batch by its arguments alone.

    What it has jitted is then traced once: inside of `use` JAX traces anew for each batch, and to
    trace and lower kernels takes most of the time in which a step is compiled.
    """

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _cache_key(None):
            return op(*args, **kwargs)

    return call


def current() -> AdapterBatch | None:
    """The batch of the innermost `use`, or None."""
    return _ambient.get()


def _own(array: Any) -> Any:
    """`array`, or a copy that nobody can write if it is NumPy's."""
    if not isinstance(array, np.ndarray):
        return array
    array = array.copy()
    array.flags.writeable = False
    return array


def _check_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """`ranges` as a tuple of pairs, or an error."""
    try:
        checked = tuple((static("a bucket", b), static("slots", n)) for b, n in ranges)
    except ValueError:
        raise ValueError(f"ranges must be pairs (bucket, slots), got {ranges!r:.300}") from None
    check_buckets([bucket for bucket, _ in checked])
    if any(n < 1 for _, n in checked):
        raise ValueError(f"each bucket must have at least 1 slot, got ranges={checked}")
    return checked


def host_int32(name: str, values: Sequence[int]) -> np.ndarray:
    """`values` as an int32 vector; a TypeError or ValueError where they are none."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1 or (array < 0).any() or (array > np.iinfo(np.int32).max).any():
        raise ValueError(
            f"{name} must be a list of non-negative int32, got {array.tolist()!r:.300}"
        )
    return array.astype(np.int32)
