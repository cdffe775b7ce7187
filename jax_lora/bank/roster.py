"""Which adapters a model holds, in which slots, and which of them must stay."""

import re
from collections.abc import Callable

from flax import nnx

from jax_lora.adapters import LoRAConfig
from jax_lora.bank.owner import StackOwner
from jax_lora.bank.slots import BankEvent, BucketUsage, Entry, SlotTable
from pallas_kernels.ranks import rank_bucket

# No separators, no control characters, not "." or "..": a name may end up in somebody's path.
_NAME = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/\\]{1,255}")


class Roster(StackOwner):
    """What a bank knows of names and slots, without their weights: the base of `AdapterBank`."""

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
        """Of each rank bucket: who is pinned, leased and idle, and how many slots are free."""
        with self._lock:
            leases = list(self._guard.leases)
            return {bucket: self._table.usage(bucket, leases) for bucket in self._slots}

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
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name must be a str, got {name!r:.300}")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"an adapter's name must be 1 to 255 characters without '/', '\\' and control "
                f"characters, got {name!r:.300}"
            )

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
