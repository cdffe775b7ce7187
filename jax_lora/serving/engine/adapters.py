"""Adapters on demand: from the disk to the host, and from there to slots, in the background."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from jax_lora.adapters import Adapter, UploadLimits
from jax_lora.adapters.limits import check_count
from jax_lora.bank import AdapterBank, BankFullError, PreparedAdapter
from jax_lora.bank.publish import on_host
from jax_lora.bank.sites import some
from jax_lora.messages import printable, shown

Source = str | os.PathLike[str] | Adapter
Post = Callable[[Callable[[], None]], None]
Future = concurrent.futures.Future


@dataclasses.dataclass(frozen=True)
class AdapterLimits(UploadLimits):
    """What an engine takes from whoever uploads adapters, and what it keeps of them.

    Args:
      host_bytes: what the host keeps of adapters that it has read, as their slots hold them.

    The others are those of `UploadLimits`.
    """

    host_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("host_bytes", self.host_bytes)


def named(names: tuple[str, ...]) -> str:
    """What there is, for a message."""
    return f"there are {some(names)}"


class Held(NamedTuple):
    """An adapter in its slot: the id for a batch's `indices`, and what keeps it there."""

    slot: int
    lease: contextlib.ExitStack


class Waiting(NamedTuple):
    """What the requests do that use an adapter: the first that waits, the longest that runs.

    Attributes:
      first: the number of the first one that waits; None where none does.
      remaining: steps of the one that runs longest; None where none runs.
    """

    first: int | None
    remaining: int | None


class _Stage(Enum):
    READING = auto()
    READY = auto()  # on the host
    UPLOADING = auto()
    HELD = auto()  # in a slot, for the first request that runs


class _Source(NamedTuple):
    """Where an adapter comes from. Another version is another adapter of the same name."""

    version: int
    place: Source

    @property
    def key(self) -> tuple[str, int]:
        """What is read of it once: an `Adapter` that has several names, too."""
        is_array = isinstance(self.place, Adapter)
        return ("arrays", id(self.place)) if is_array else ("folder", self.version)


@dataclasses.dataclass(eq=False)
class _Load:
    """An adapter on its way to a slot.

    Attributes:
      source: None for one that the engine has no source of.
      victim: the adapter whose requests it waits for.
    """

    source: _Source | None
    stage: _Stage = _Stage.READING
    prepared: PreparedAdapter | None = None
    held: Held | None = None
    victim: str | None = None


class _HostCache:
    """Adapters that were read and checked, the least recently used first, of so many bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._kept: collections.OrderedDict[tuple[str, int], tuple[_Source, PreparedAdapter]] = (
            collections.OrderedDict()
        )

    def get(self, source: _Source) -> PreparedAdapter | None:
        if source.key not in self._kept:
            return None
        self._kept.move_to_end(source.key)
        return self._kept[source.key][1]

    def put(self, source: _Source, prepared: PreparedAdapter) -> None:
        if source.key in self._kept:
            return
        # With the source: while an Adapter lives, no other one has its id.
        self._kept[source.key] = source, prepared
        self._size += prepared.nbytes
        while self._size > self._limit:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._size -= dropped.nbytes

    def drop(self, source: _Source) -> None:
        if source.key in self._kept:
            self._size -= self._kept.pop(source.key)[1].nbytes


class AdapterDesk:
    """Has the adapters that requests want brought to slots.

    All but `add`, `remove`, `knows` and `close` is for the engine's loop alone. Other threads read
    and upload, and `post` has the loop take what they found.

    Where all slots of a bucket are leased, the adapter that is asked for and the longest waiting
    gets the slot whose requests end first: of that one, none is begun that came later.
    """

    def __init__(
        self,
        bank: AdapterBank,
        limits: AdapterLimits,
        post: Post,
        fail: Callable[[str, str], None],
    ) -> None:
        """`fail(name, reason)` ends the requests that wait for an adapter which can't be had."""
        self.limits, self._bank, self._post, self._fail = limits, bank, post, fail
        self._lock = threading.Lock()  # of the sources
        self._sources: dict[str, _Source] = {}
        self._versions = 0
        self._resident: dict[str, _Source] = {}  # those that the bank has
        self._cache = _HostCache(limits.host_bytes)
        self._loads: dict[str, _Load] = {}
        self._draining: dict[str, int] = {}  # since which request
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "jax-lora-read")
        self._uploader = concurrent.futures.ThreadPoolExecutor(1, "jax-lora-upload")

    # ------------------------------------------------------------------------------ for any thread

    def add(self, name: str, source: Source, *, replace: bool) -> None:
        """See `Engine.add_adapter`."""
        if not isinstance(source, str | os.PathLike | Adapter):
            raise TypeError(f"an adapter must be a folder or an Adapter, got {shown(source)}")
        self._bank.check_name(name)
        with self._lock:
            if not replace and self.knows(name):
                raise ValueError(f"there is an adapter {name!r}; give replace=True")
            self._versions += 1
            replaced = self._sources.get(name)
            self._sources[name] = _Source(self._versions, source)
        self._forget(replaced)

    def remove(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        with self._lock:
            if not self.knows(name):
                raise KeyError(f"no adapter {shown(name)}; {named(self.names)}")
            removed = self._sources.pop(name, None)
            self._resident.pop(name, None)
        self._forget(removed)
        with contextlib.suppress(KeyError):  # it is not in a slot
            self._bank.unload(name)

    def knows(self, name: str) -> bool:
        return name in self._sources or name in self._bank.names

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self._sources, *self._bank.names}))

    def close(self) -> None:
        """Ends the threads; what they have found is posted."""
        self._readers.shutdown(cancel_futures=True)
        self._uploader.shutdown(cancel_futures=True)

    # -------------------------------------------------------------------------- for the loop alone

    def take(self, name: str, arrival: int) -> Held | None:
        """The adapter for a request, if it is in a slot; else it is brought there."""
        load, source = self._loads.get(name), self._sources.get(name)
        if load is not None:
            if load.stage is not _Stage.HELD or load.source is not source:
                return None
            del self._loads[name]
            return load.held
        if arrival > self._draining.get(name, arrival):
            return None
        if source is None or self._resident.get(name) is source:
            if (held := self._hold(name)) is not None:
                return held
            self._resident.pop(name, None)
        self._begin(name)
        return None

    def is_coming(self, name: str) -> bool:
        """Whether it is on its way to a slot, so that `take` finds nothing."""
        load = self._loads.get(name)
        return load is not None and load.stage is not _Stage.HELD

    def fetch(self, name: str, arrival: int) -> None:
        """Has the adapter in a slot, and kept there, for a request that can't begin yet."""
        if name not in self._loads and (held := self.take(name, arrival)) is not None:
            self._loads[name] = _Load(self._sources.get(name), _Stage.HELD, held=held)

    def drop_idle(self, wanted: Mapping[str, Waiting]) -> None:
        """Forgets what is on its way for nobody, or of a source that was replaced or removed.

        Before requests take theirs: one that was to give way may go on.
        """
        for name in [n for n, load in self._loads.items() if self._is_idle(n, load, wanted)]:
            self._drop(name)

    def drop_all(self) -> None:
        """Gives back the slots that are kept for requests."""
        for name in list(self._loads):
            self._drop(name)

    def advance(self, wanted: Mapping[str, Waiting]) -> None:
        """Uploads what is on the host, in the order in which it was asked for."""
        ready = {n: load for n, load in self._loads.items() if load.stage is _Stage.READY}
        if not ready:
            return
        uploading = collections.Counter(
            _bucket(load) for load in self._loads.values() if load.stage is _Stage.UPLOADING
        )
        taken = uploading.copy()  # and by those before in the order
        rooms: dict[tuple[int, str | None, frozenset[str]], tuple[int, tuple[str, ...]]] = {}
        for name in sorted(ready, key=lambda name: wanted.get(name, _NOBODY).first or 0):
            load, bucket, prepared = ready[name], _bucket(ready[name]), ready[name].prepared
            assert prepared is not None
            # The same for all of a tenant, of whom hundreds may wait in each step.
            kind = bucket, self._bank.tenant(name), frozenset(prepared.adapter.full)
            if kind not in rooms:
                rooms[kind] = self._bank.room_of(name, prepared)
            room, later = rooms[kind]
            if room > taken[bucket]:
                taken[bucket] += 1
                if not uploading:
                    uploading[bucket] += 1
                    self._upload(name, load)
            elif load.victim is None or wanted.get(load.victim, _NOBODY).remaining is None:
                self._drain(name, load, later, wanted)

    @property
    def has_loads(self) -> bool:
        return bool(self._loads)

    @property
    def is_blocked(self) -> bool:
        """Whether an adapter waits for a slot, which others than the engine may give back."""
        return any(load.stage is _Stage.READY for load in self._loads.values())

    # ------------------------------------------------------------------------------------- private

    def _forget(self, source: _Source | None) -> None:
        """Has the loop drop what the host keeps of it, unless another name stands for it too."""
        if source is not None:
            self._post(lambda: None if self._is_named(source) else self._cache.drop(source))

    def _is_named(self, source: _Source) -> bool:
        with self._lock:
            return source.key in {known.key for known in self._sources.values()}

    def _is_idle(self, name: str, load: _Load, wanted: Mapping[str, Waiting]) -> bool:
        """Whether a load that nobody works at is for nobody, or of a source that was replaced."""
        if load.stage not in (_Stage.READY, _Stage.HELD):
            return False
        is_wanted = wanted.get(name, _NOBODY).first is not None
        return not is_wanted or load.source is not self._sources.get(name)

    def _drop(self, name: str) -> None:
        load = self._loads.pop(name)
        self._draining.pop(load.victim or "", None)
        if load.held is not None:
            load.held.lease.close()

    def _hold(self, name: str) -> Held | None:
        """A lease on an adapter that is in its slot."""
        with contextlib.ExitStack() as stack:
            try:
                batch = stack.enter_context(self._bank.batch([name]))
            except KeyError:
                return None
            return Held(int(np.ravel(batch.indices)[0]), stack.pop_all())

    def _begin(self, name: str) -> None:
        if (source := self._sources.get(name)) is None:
            self._fail(name, f"adapter {name!r} has left its slot, and the engine has no source")
            return
        load = self._loads[name] = _Load(source)
        if (prepared := self._cache.get(source)) is not None:
            load.stage, load.prepared = _Stage.READY, prepared
            return
        read = functools.partial(self._read, name, source.place)
        self._submit(self._readers, read, functools.partial(self._have_read, name, load))

    def _submit[T](
        self,
        pool: concurrent.futures.ThreadPoolExecutor,
        work: Callable[[], T],
        then: Callable[[Future[T]], None],
    ) -> None:
        """Has `work` done in the background, and `then` what came of it taken by the loop."""

        def tell(done: Future[T]) -> None:
            if not done.cancelled():  # the end of the threads has cancelled what had not begun
                self._post(lambda: then(done))

        pool.submit(work).add_done_callback(tell)

    def _read(self, name: str, place: Source) -> PreparedAdapter:
        limits = self.limits
        if not isinstance(place, Adapter):
            adapter = self._bank.read(name, place, limits=limits)
            return self._bank.prepare(name, adapter, is_own=True)
        limits.check(place.header)
        # The host keeps what it reads, and a device's arrays there would keep their memory.
        prepared = self._bank.prepare(name, on_host(place))
        if not (limits.allow_nonfinite or prepared.is_finite()):
            raise ValueError(
                "it has NaN or infinite weights, which spread through all they compute"
            )
        return prepared

    def _have_read(self, name: str, load: _Load, done: Future[PreparedAdapter]) -> None:
        if self._loads.get(name) is not load or self._has_failed(name, load, done):
            return
        load.stage, load.prepared = _Stage.READY, done.result()
        if load.source is not None and self._is_named(load.source):
            self._cache.put(load.source, load.prepared)

    def _upload(self, name: str, load: _Load) -> None:
        load.stage = _Stage.UPLOADING

        def work() -> Held | None:
            assert load.prepared is not None
            self._bank.load(name, load.prepared, replace=True)
            return self._hold(name)  # before another upload can evict it

        self._submit(self._uploader, work, functools.partial(self._have_uploaded, name, load))

    def _have_uploaded(self, name: str, load: _Load, done: Future[Held | None]) -> None:
        if isinstance(done.exception(), BankFullError):  # somebody else has taken the slot
            load.stage = _Stage.READY
            return
        if self._has_failed(name, load, done):
            return
        # Not before: in the meantime the one that gave its slot away would have taken it again.
        self._draining.pop(load.victim or "", None)
        load.victim, load.held = None, done.result()
        load.stage = _Stage.READY if load.held is None else _Stage.HELD
        if load.source is not None and load.source is self._sources.get(name):
            self._resident[name] = load.source
        elif name not in self._sources:  # it was removed meanwhile
            with contextlib.suppress(KeyError):
                self._bank.unload(name)

    def _has_failed[T](self, name: str, load: _Load, done: Future[T]) -> bool:
        """Ends the requests for an adapter that could not be had, unless it was replaced since."""
        if (error := done.exception()) is None:
            return False
        self._drop(name)
        if load.source is self._sources.get(name):
            self._fail(name, printable(f"adapter {name!r}: {error}", 1000))
        return True

    def _drain(
        self, name: str, load: _Load, candidates: Iterable[str], wanted: Mapping[str, Waiting]
    ) -> None:
        """Chooses whose slot the load gets: of those that run, the one that ends first."""
        self._draining.pop(load.victim or "", None)
        ends = {
            other: remaining
            for other in candidates
            if other not in self._draining
            and (remaining := wanted.get(other, _NOBODY).remaining) is not None
        }
        load.victim = min(ends, key=lambda other: (ends[other], other), default=None)
        if load.victim is None:
            return
        since = self._draining[load.victim] = wanted.get(name, _NOBODY).first or 0
        kept = self._loads.get(load.victim)
        if kept and kept.stage is _Stage.HELD and (wanted[load.victim].first or 0) > since:
            self._drop(load.victim)


def _bucket(load: _Load) -> int:
    assert load.prepared is not None
    return load.prepared.bucket


_NOBODY = Waiting(None, None)
