"""Which adapter has which slot: names, pins, leases, and the least recently used first."""

import collections
import dataclasses
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from jax_lora.adapters import LoRAConfig
from jax_lora.bank.reservations import Reservations, Shares
from jax_lora.bank.sites import some
from jax_lora.batch import Lease
from jax_lora.tokens import first_ids

# A bank knows of so many adapters why they are gone.
_MAX_GONE = 256


class _Serials:
    """Numbers of loads. All banks of the process share them: an optimizer's state may outlive the
    bank that it began with."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), 0

    def next(self) -> int:
        with self._lock:
            self._last += 1
            return self._last

    def skip(self, last: int) -> None:
        """Gives none up to `last` any more."""
        with self._lock:
            self._last = max(self._last, last)


SERIALS = _Serials()


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
    serial: int = dataclasses.field(default_factory=SERIALS.next)

    @property
    def rank(self) -> int:
        return max(map(self.config.rank_of, self.modules))


@dataclasses.dataclass(frozen=True)
class BucketUsage:
    """The slots of a rank bucket, as whoever runs a bank sees them.

    Attributes:
      slots: how many there are.
      room: those that loads could take now, for which none are reserved: free, or of idle adapters.
      free: those that hold no adapter and that no batch leases.
      reserved: those that are kept for tenants who do not use them now.
      pinned, leased, idle: the adapters, the least recently used first. One may be pinned and
        leased. An idle one is neither, so a load may evict it.
      hits: how often a batch found an adapter here. loads, evictions: of adapters. All since the
        bank was made.
    """

    slots: int
    room: int
    free: int
    reserved: int
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
        self.reservations = Reservations(slots)
        self._last: dict[tuple[int, int], str] = {}  # the name that a slot had last

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
        self._last[entry.bucket, entry.slot] = name
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
        here = self._bucket(bucket, leases)
        pinned = tuple(name for name, entry in here.entries.items() if entry.pinned)
        leased = tuple(name for name, entry in here.entries.items() if entry.slot in here.busy)
        idle = tuple(name for name in here.entries if name not in {*pinned, *leased})
        shares = self._shares(bucket, here)
        return BucketUsage(
            self._slots[bucket],
            self._room(None, here, shares),
            len(here.free),
            sum(map(shares.unused, shares.kept)),
            pinned,
            leased,
            idle,
            self._hits[bucket],
            self._loads[bucket],
            self._evictions[bucket],
        )

    def room(self, name: str, bucket: int, leases: Iterable[Lease]) -> tuple[int, tuple[str, ...]]:
        """How many slots loads of names like this one could take now, and whose they could take
        once these are idle: leased adapters."""
        here = self._bucket(bucket, leases)
        tenant, shares = self.reservations.tenant(name), self._shares(bucket, here)
        later = tuple(
            other
            for other, entry in here.entries.items()
            if entry.slot in here.busy
            and not entry.pinned
            and self._may_take(tenant, self.reservations.tenant(other), shares)
        )
        return self._room(tenant, here, shares), later

    def has_idle(self, bucket: int, name: str, leases: Iterable[Lease]) -> bool:
        """Whether the bucket has an adapter of this name that no batch leases, so that a load may
        take its slot."""
        entry = self.entries.get(name)
        if entry is None or entry.bucket != bucket:
            return False
        return (bucket, entry.slot) not in leased_slots(leases)

    def find(self, bucket: int, name: str, leases: Iterable[Lease]) -> tuple[int, str | None]:
        """A slot to write for an adapter of this name, and whom that evicts. Never a leased one.

        Raises:
          BankFullError: all slots of the bucket are pinned, leased or reserved for others.
        """
        here = self._bucket(bucket, leases)
        if name in here.entries and here.entries[name].slot not in here.busy:
            return here.entries[name].slot, None
        of, shares = self.reservations.tenant, self._shares(bucket, here)
        tenant = of(name)
        if here.free and shares.spare(tenant) > 0:
            return here.free[0], None
        movable = [
            other
            for other in here.idle
            if other != name and self._may_take(tenant, of(other), shares)
        ]
        if shares.unused(tenant):  # first it takes what is kept for it
            movable.sort(key=lambda other: of(other) == tenant)
        if movable:
            return here.entries[movable[0]].slot, movable[0]
        pinned = [other for other, entry in here.entries.items() if entry.pinned]
        kept = sum(shares.kept[other] for other in shares.kept if other != tenant)
        reserved = f", {kept} are reserved for others" if kept else ""
        raise BankFullError(
            f"no slot for {name!r}: of the {self._slots[bucket]} of bucket {bucket}, "
            f"{len(here.busy)} are leased by batches and {len(pinned)} pinned "
            f"({some(pinned)}){reserved}; drop batches, unpin, or give apply_lora more slots="
        )

    def may_evict(self, name: str, gone: Collection[str | None], leases: Iterable[Lease]) -> bool:
        """Whether an adapter may lose its slot to one of another tenant, beside those `gone`."""
        of, bucket = self.reservations.tenant, self.entries[name].bucket
        lost = sum(
            other in gone and entry.bucket == bucket and of(other) == of(name)
            for other, entry in self.entries.items()
        )
        shares = self._shares(bucket, self._bucket(bucket, leases))
        return shares.excess(of(name)) > lost

    def _bucket(self, bucket: int, leases: Iterable[Lease]) -> "_Bucket":
        entries = {name: e for name, e in self.entries.items() if e.bucket == bucket}
        busy = {slot for of, slot in leased_slots(leases) if of == bucket}
        taken = {entry.slot for entry in entries.values()}
        slots = range(self._slots[bucket])
        return _Bucket(entries, busy, [s for s in slots if s not in taken | busy], busy - taken)

    def _shares(self, bucket: int, here: "_Bucket") -> Shares:
        # Slots that batches lease alone, of the adapter that was there.
        orphans = (self._last.get((bucket, slot), "") for slot in here.orphans)
        return self.reservations.shares(bucket, [*here.entries, *orphans])

    def _may_take(self, tenant: str | None, other: str | None, shares: Shares) -> bool:
        return other == tenant or shares.excess(other) > 0

    def _room(self, tenant: str | None, here: "_Bucket", shares: Shares) -> int:
        idle = collections.Counter(map(self.reservations.tenant, here.idle))
        taken = sum(
            count if other == tenant else min(count, shares.excess(other))
            for other, count in idle.items()
        )
        return min(len(here.free), shares.spare(tenant)) + taken


class _Bucket(NamedTuple):
    """A bucket's slots.

    Attributes:
      entries: the adapters, the least recently used first.
      busy: slots that batches lease. free: that hold nothing. orphans: that are leased alone.
    """

    entries: dict[str, Entry]
    busy: set[int]
    free: list[int]
    orphans: set[int]

    @property
    def idle(self) -> list[str]:
        """Adapters that are neither pinned nor leased."""
        return [n for n, e in self.entries.items() if not e.pinned and e.slot not in self.busy]


def leased_slots(leases: Iterable[Lease]) -> set[tuple[int, int]]:
    """The slots `(bucket, slot)` that batches lease."""
    return {slot for lease in leases if lease.is_open for slot in lease.slots}
