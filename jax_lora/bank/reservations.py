"""Slots that are kept for tenants: the adapters whose names begin alike."""

import collections
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jax_lora.bank.names import check_name
from jax_lora.messages import shown


class Reservations:
    """How many slots of each bucket are kept for whom. The bank holds its lock.

    Attributes:
      kept: slots of each bucket, by the prefix of names.
    """

    def __init__(self, slots: Mapping[int, int]) -> None:
        self._slots = dict(slots)
        self.kept: dict[str, dict[int, int]] = {}

    def tenant(self, name: str) -> str | None:
        """The prefix under which an adapter's slots are kept; None where none are."""
        return next((prefix for prefix in self.kept if name.startswith(prefix)), None)

    def put(self, prefix: str, slots: Mapping[int, int]) -> None:
        """See `AdapterBank.reserve`."""
        check_name(prefix)
        if not isinstance(slots, Mapping) or not all(
            type(number) is int for pair in slots.items() for number in pair
        ):
            raise TypeError(f"slots must map buckets to numbers of slots, got {shown(slots)}")
        others = {other: own for other, own in self.kept.items() if other != prefix}
        for other in others:
            if other.startswith(prefix) or prefix.startswith(other):
                raise ValueError(
                    f"slots are reserved for {shown(other)}, and a name may begin with that and "
                    f"with {shown(prefix)}; take prefixes of which none begins with another"
                )
        for bucket, count in slots.items():
            if bucket not in self._slots or count < 0:
                raise ValueError(
                    f"slots must name buckets of {[*self._slots]} and at least 0 slots of each, "
                    f"got {bucket}: {count}"
                )
            taken = sum(own.get(bucket, 0) for own in others.values())
            if taken + count > self._slots[bucket]:
                raise ValueError(
                    f"{count} slots of bucket {bucket} for {shown(prefix)} and {taken} reserved "
                    f"for others exceed its {self._slots[bucket]}; reserve fewer, or give "
                    "apply_lora more slots="
                )
        self.kept = others
        if own := {bucket: count for bucket, count in slots.items() if count}:
            self.kept[prefix] = own

    def shares(self, bucket: int, names: Iterable[str]) -> "Shares":
        """`names`: the adapters that hold the bucket's slots, one for each slot."""
        kept = {prefix: own.get(bucket, 0) for prefix, own in self.kept.items()}
        used = collections.Counter(map(self.tenant, names))
        return Shares(self._slots[bucket], kept, used)


class Shares(NamedTuple):
    """Who has how many slots of a bucket, and who may have more.

    Whoever has fewer than are kept for it can always get those: the slots that others have, and
    those that are kept, never exceed the bucket's. An older load may have broken this before the
    reservation was made; then no other load makes it worse.
    """

    slots: int
    kept: Mapping[str, int]
    used: Mapping[str | None, int]

    def unused(self, tenant: str | None) -> int:
        """How many of the slots that are kept for a tenant it does not use."""
        return 0 if tenant is None else max(0, self.kept[tenant] - self.used.get(tenant, 0))

    def spare(self, tenant: str | None) -> int:
        """How many slots more the tenant may take, if so many are free."""
        own = self.unused(tenant)
        others = sum(self.unused(other) for other in self.kept if other != tenant)
        return max(own, self.slots - sum(self.used.values()) - others)

    def excess(self, tenant: str | None) -> int:
        """How many of a tenant's slots others may take."""
        kept = 0 if tenant is None else self.kept[tenant]
        return max(0, self.used.get(tenant, 0) - kept)
