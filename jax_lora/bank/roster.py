"""Which adapters a model holds, in which slots, and which of them must stay."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import nnx

from jax_lora.adapters import LoRAConfig
from jax_lora.bank.names import check_name
from jax_lora.bank.owner import StackOwner
from jax_lora.bank.sites import Site, check_trained
from jax_lora.bank.slots import BankEvent, BucketUsage, Entry, SlotTable
from jax_lora.bank.trainees import Trainees, Turns, checked_rates
from jax_lora.batch import Lease
from jax_lora.messages import shown
from pallas_kernels.ranks import rank_bucket


class Roster(StackOwner):
    """What a bank knows of names and slots, without their weights: the base of `AdapterBank`."""

    _sites: dict[str, Site]

    def __init__(self, model: nnx.Module) -> None:
        super().__init__(model)
        self._table = SlotTable(self._slots)
        self._watchers: list[Callable[[BankEvent], None]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, the least recently used first."""
        with self._lock:
            return tuple(self._table.entries)

    @property
    def slots(self) -> dict[int, int]:
        """Slots of each rank bucket."""
        return dict(self._slots)

    def usage(self) -> dict[int, BucketUsage]:
        """For each rank bucket: who is pinned, leased and idle, and how many slots are free."""
        with self._lock:
            leases = list(self._guard.leases)
            return {bucket: self._table.usage(bucket, leases) for bucket in self._slots}

    def room(self, name: str, bucket: int) -> tuple[int, tuple[str, ...]]:
        """What a load of this name finds in a bucket.

        Returns:
          How many slots loads of names of its tenant could take now, and the leased adapters whose
          slots they could take once these are idle.
        """
        with self._lock:
            return self._table.room(name, bucket, list(self._guard.leases))

    def reserve(self, prefix: str, slots: Mapping[int, int]) -> None:
        """Keeps slots for a tenant: for the adapters whose names begin with `prefix`.

            bank.reserve("acme-", {16: 2, 64: 1})

        Whatever others do, the tenant can have so many adapters of each bucket in slots at a time:
        loads of other names neither take a free slot that is kept for it, nor evict one of its
        adapters while it has no more than are kept. It may use more where others leave some, and
        these others may evict. Its own loads evict its own adapters and those of whoever has more
        than are kept for them, the least recently used first.

        Nothing is evicted now. Adapters that stand in the way go as the tenant loads its own; while
        these are pinned or leased, such a load finds no slot. Where several processes hold the
        model, all reserve the same.

        Args:
          prefix: of names, as in `load`; none may begin with another one's.
          slots: how many of each bucket, in the place of those before; none or 0 for no more.

        Raises:
          TypeError: `prefix` or `slots` are malformed.
          ValueError: so are they; a prefix begins with another; or all reservations together exceed
            a bucket's slots. All stay as they were.
        """
        with self._lock:
            self._check_current()
            self._table.reservations.put(prefix, slots)

    @property
    def reservations(self) -> dict[str, dict[int, int]]:
        """The slots of each bucket that are kept, by the prefix of names."""
        with self._lock:
            return {prefix: dict(own) for prefix, own in self._table.reservations.kept.items()}

    def tenant(self, name: str) -> str | None:
        """The prefix of `reserve` that a name begins with; None where there is none."""
        with self._lock:
            return self._table.reservations.tenant(name)

    def watch(self, callback: Callable[[BankEvent], None]) -> None:
        """Has `callback` told of each adapter that is loaded, evicted or unloaded from now on.

        It is called in the thread that did so, when that is done: it may use the bank.
        """
        with self._lock:
            self._watchers.append(callback)

    def config(self, name: str) -> LoRAConfig:
        """Ranks and scales of a loaded adapter. KeyError if it is not loaded."""
        return self._entry(name).config

    def rank(self, name: str) -> int:
        """The largest true rank of a loaded adapter's modules. KeyError if it is not loaded."""
        return self._entry(name).rank

    def bucket(self, name: str) -> int:
        """The rank bucket that a loaded adapter lives in. KeyError if it is not loaded."""
        return self._entry(name).bucket

    def unload(self, name: str) -> None:
        """Forgets an adapter, pinned or not. Batches that lease it go on computing its weights.

        Raises:
          KeyError: it is not loaded.
        """
        with self._lock:
            self._entry(name)
            self._table.forget(name)
        self._tell()

    def pin(self, name: str) -> None:
        """Keeps an adapter from being evicted. KeyError if it is not loaded."""
        with self._lock:
            self._entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Undoes `pin`. KeyError if it is not loaded."""
        with self._lock:
            self._entry(name).pinned = False

    def trainees(self, names: Sequence[str], rates: Mapping[str, float] | None = None) -> Trainees:
        """The adapters that a training step moves, for `jax_lora.training.per_adapter`.

        Make it again where adapters join or leave: it costs microseconds and compiles nothing.

        Args:
          names: loaded adapters. A batch may use others too: the step leaves those as they are.
          rates: what an adapter's updates are multiplied with, by name; 1 for those not in it.
            Where the optimizer ends with its learning rate, this scales that rate.

        Raises:
          KeyError: an adapter is not loaded.
          TypeError: `names` or `rates` are malformed.
          ValueError: so are they; an adapter uses DoRA: a step would hold its magnitude; or it has
            stacks in 8 bits, which have no gradients.
        """
        is_list = isinstance(names, Sequence) and not isinstance(names, str)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be a list of adapters' names, got {shown(names)}")
        by_name = checked_rates(names, rates or {})
        by_bucket = {
            bucket: Turns(np.zeros(slots, np.int32), np.zeros(slots, np.float32))
            for bucket, slots in self._slots.items()
        }
        lease, entries = self._lease(list(by_name))
        if dora := [name for name, entry in zip(by_name, entries) if entry.config.dora]:
            raise ValueError(
                f"{shown(dora)} use DoRA, which is not trained here: a step would move A and B, "
                "and not the magnitude; train them with PEFT"
            )
        for name, entry in zip(by_name, entries):
            small = sorted(entry.modules & self._eight_bits.keys())
            check_trained(name, (self._eight_bits[module] for module in small))
        for name, entry in zip(by_name, entries):
            turns = by_bucket[entry.bucket]
            turns.serials[entry.slot], turns.rates[entry.slot] = entry.serial, by_name[name]
        return Trainees(by_bucket, lease)

    @functools.cached_property
    def _eight_bits(self) -> dict[str, np.dtype]:
        """The dtypes of the modules in 8 bits. A training loop asks for them in each step."""
        return {m: site.dtype for m, site in self._sites.items() if site.is_eight_bits}

    def _lease(self, names: Sequence[str]) -> tuple[Lease, list[Entry]]:
        """Where adapters are, and a lease on them. KeyError if one is not loaded."""
        with self._lock:
            entries = [self._entry(name) for name in names]
            lease = Lease(frozenset((entry.bucket, entry.slot) for entry in entries))
            self._table.touch(names)
            self._guard.leases.add(lease)
        return lease, entries

    def _tell(self) -> None:
        """Tells the watchers what has happened."""
        with self._lock:
            events, self._table.events = self._table.events, []
            watchers = tuple(self._watchers)
        for event in events:
            for watcher in watchers:
                watcher(event)

    def _entry(self, name: str) -> Entry:
        with self._lock:
            self._check_current()
            return self._table.entry(name)

    def check_name(self, name: str) -> None:
        """Whether an adapter may be called so; else TypeError or ValueError."""
        check_name(name)

    def _check_name(self, name: str, replace: bool) -> None:
        self.check_name(name)
        if name in self._table and not replace:
            raise ValueError(f"adapter {name!r} is loaded; unload it first, or give replace=True")

    def _bucket_for(self, name: str, rank: int) -> int:
        bucket = rank_bucket(rank, buckets=tuple(self._slots))
        if bucket not in self._slots:
            raise ValueError(
                f"adapter {name!r} has rank {rank} and needs bucket {bucket}; the model has "
                f"buckets={tuple(self._slots)}: give apply_lora buckets= that hold it"
            )
        return bucket
