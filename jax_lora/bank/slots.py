"""Which adapter has which slot: names, pins, leases, and the least recently used first."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from jax_lora.adapters import LoRAConfig
from jax_lora.bank.sites import some
from jax_lora.batch import Lease
from jax_lora.tokens import first_ids

# A bank knows of so many adapters why they are gone.
_MAX_GONE = 256

# Shared by all banks of the process: an optimizer's state may outlive the bank that it began with.
_SERIALS = itertools.count(1)


class BankFullError(RuntimeError):
    """Every slot of a bucket is pinned or leased, so nothing may be evicted."""


@dataclasses.dataclass
class Entry:
    """A loaded adapter: where it lives, and what the stacks don't tell of it.

    Attributes:
      serial: a number that no other load has, by which an optimizer knows its own state of it.
    """

    bucket: int
    slot: int
    config: LoRAConfig
    modules: frozenset[str]
    pinned: bool = False
    serial: int = dataclasses.field(default_factory=lambda: next(_SERIALS))

    @property
    def rank(self) -> int:
        return max(map(self.config.rank_of, self.modules))


@dataclasses.dataclass(frozen=True)
class BucketUsage:
    """The slots of a rank bucket, as whoever runs a bank sees them.

    Attributes:
      slots: how many there are.
      room: those that a load could take now: free, or of an idle adapter.
      free: those that hold no adapter and that no batch leases.
      pinned, leased, idle: the adapters, the least recently used first. One may be pinned and
        leased. An idle one is neither, so a load may evict it.
      hits: how often a batch found an adapter here. loads, evictions: of adapters. All since the
        bank was made.
    """

    slots: int
    room: int
    free: int
    pinned: tuple[str, ...]
    leased: tuple[str, ...]
    idle: tuple[str, ...]
    hits: int
    loads: int
    evictions: int


class BankEvent(NamedTuple):
    """What became of an adapter."""

    kind: Literal["loaded", "evicted", "unloaded"]
    name: str
    bucket: int


class SlotTable:
    """The adapters that are loaded. Not for several threads at once: the bank holds its lock."""

    def __init__(self, slots: Mapping[int, int]) -> None:
        self._slots = dict(slots)
        self._first_ids = first_ids(slots.items())
        self._hits, self._loads, self._evictions = (collections.Counter[int]() for _ in range(3))
        self.events: list[BankEvent] = []  # for the bank to tell
        self._gone: collections.OrderedDict[str, str] = collections.OrderedDict()
        self.entries: collections.OrderedDict[str, Entry] = collections.OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """KeyError if no adapter of this name is loaded; it says so if one was."""
        if isinstance(name, str) and name in self.entries:
            return self.entries[name]
        gone = self._gone.get(name) if isinstance(name, str) else None
        why = "" if gone is None else f" ({gone})"
        raise KeyError(f"no adapter {name!r:.300}{why}; loaded: {some(self.entries)}")

    def id(self, entry: Entry) -> int:
        """What a batch's `indices` call the adapter: its slot among those of all buckets."""
        return self.id_of(entry.bucket, entry.slot)

    def id_of(self, bucket: int, slot: int) -> int:
        """The id of a slot."""
        return self._first_ids[bucket] + slot

    def touch(self, names: Iterable[str]) -> None:
        """They are the most recently used, the last of them above all."""
        for name in names:
            self.entries.move_to_end(name)
            self._hits[self.entries[name].bucket] += 1

    def put(self, name: str, entry: Entry) -> None:
        """Names a slot that holds the adapter. One of the same name gives way, but stays pinned."""
        old = self.entries.pop(name, None)
        entry.pinned = old is not None and old.pinned
        self.entries[name] = entry
        self._gone.pop(name, None)
        self._loads[entry.bucket] += 1
        self.events.append(BankEvent("loaded", name, entry.bucket))

    def forget(self, name: str, evicted_by: str | None = None) -> None:
        """Takes out an adapter that is evicted by the load of another one, or unloaded."""
        bucket = self.entries.pop(name).bucket
        self._evictions[bucket] += evicted_by is not None
        self.events.append(BankEvent("evicted" if evicted_by else "unloaded", name, bucket))
        why = f"evicted by the load of {evicted_by!r}" if evicted_by else "unloaded"
        self._gone[name] = why
        self._gone.move_to_end(name)
        if len(self._gone) > _MAX_GONE:
            self._gone.popitem(last=False)

    def usage(self, bucket: int, leases: Iterable[Lease]) -> BucketUsage:
        """Who has the bucket's slots."""
        busy = _leased(leases)
        here = {name: e for name, e in self.entries.items() if e.bucket == bucket}
        taken = {entry.slot for entry in here.values()}
        slots = range(self._slots[bucket])
        free = sum(slot not in taken and (bucket, slot) not in busy for slot in slots)
        pinned = tuple(name for name, entry in here.items() if entry.pinned)
        leased = tuple(name for name, entry in here.items() if (bucket, entry.slot) in busy)
        idle = tuple(name for name in here if name not in {*pinned, *leased})
        return BucketUsage(
            len(slots),
            free + len(idle),
            free,
            pinned,
            leased,
            idle,
            self._hits[bucket],
            self._loads[bucket],
            self._evictions[bucket],
        )

    def find(self, bucket: int, name: str, leases: Iterable[Lease]) -> tuple[int, str | None]:
        """A slot to write for an adapter of this name, and whom that evicts. Never a leased one.

        Raises:
          BankFullError: all slots of the bucket are pinned or leased.
        """
        leased = _leased(leases)
        here = {other: e for other, e in self.entries.items() if e.bucket == bucket}
        usable = [s for s in range(self._slots[bucket]) if (bucket, s) not in leased]
        taken = {entry.slot for entry in here.values()}
        if name in here and here[name].slot in usable:
            return here[name].slot, None
        for slot in usable:
            if slot not in taken:
                return slot, None
        for other, entry in here.items():
            if entry.slot in usable and not entry.pinned and other != name:
                return entry.slot, other
        pinned = [other for other, entry in here.items() if entry.pinned]
        raise BankFullError(
            f"no slot for {name!r}: of the {self._slots[bucket]} of bucket {bucket}, "
            f"{self._slots[bucket] - len(usable)} are leased by batches and {len(pinned)} pinned "
            f"({some(pinned)}); drop batches, unpin, or give apply_lora more slots="
        )


def _leased(leases: Iterable[Lease]) -> set[tuple[int, int]]:
    """The slots `(bucket, slot)` that batches lease."""
    return {slot for lease in leases if lease.is_open for slot in lease.slots}
