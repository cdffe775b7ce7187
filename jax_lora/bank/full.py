"""Which adapters have a layer's full slots, and their whole weights."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jax_lora.adapters import FullModule
from jax_lora.bank.sites import Site, some
from jax_lora.bank.slots import BankFullError, SlotTable, leased_slots
from jax_lora.bank.writer import as_stored, home_of
from jax_lora.batch import Lease
from jax_lora.nn.full import FullRoom


class FullPlace(NamedTuple):
    """Where the whole weights of an adapter go.

    Attributes:
      slots: the full slot in each layer that has some, -1 for none, in the order of layers.
      evicted: adapters that lose theirs, and so their places.
    """

    slots: list[int]
    evicted: list[str]


class FullSlots:
    """The full slots of a model's layers. Not for several threads at once: the bank holds its lock.

    Attributes:
      rooms: of the layers that have some, by PEFT's name.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.rooms: dict[str, FullRoom] = {
            name: site.layer.full for name, site in sites.items() if hasattr(site.layer, "full")
        }
        # What the tables say: those of a bank before may serve leased adapters still.
        self._tables = {n: np.array(room.table.get_value()) for n, room in self.rooms.items()}

    def find(
        self,
        name: str,
        modules: Iterable[str],
        table: SlotTable,
        evicted: str | None,
        leases: Iterable[Lease],
    ) -> FullPlace:
        """A full slot in each of the layers `modules`, for an adapter of this name.

        Args:
          evicted: who loses a slot of the bucket to it.

        Raises:
          BankFullError: all full slots of a layer are pinned or leased.
        """
        open_leases = [lease for lease in leases if lease.is_open]
        own = table.reservations.tenant(name)
        leased = {table.id_of(*place) for place in leased_slots(open_leases)}
        gone = {name, evicted}
        slots = dict.fromkeys(self.rooms, -1)
        for module in modules:
            ids = self._tables[module]
            busy = {int(ids[i]) for i in leased}
            held = {
                int(ids[table.id(entry)]): other
                for other, entry in table.entries.items()
                if other not in gone
            }
            count = len(self.rooms[module].slots)
            usable = [n for n in range(count) if n not in busy]
            free = [n for n in usable if n not in held]
            movable = [n for n in held if n in usable and not table.entries[held[n]].pinned]
            movable = [
                n
                for n in movable
                if table.reservations.tenant(held[n]) == own
                or table.may_evict(held[n], gone, open_leases)
            ]
            if not (free or movable):
                raise BankFullError(
                    f"no full slot of {module} for {name!r}: of its {count}, {count - len(usable)} "
                    "are leased by batches and the others pinned or in reserved slots; drop "
                    "batches, unpin, or give apply_lora more full_slots="
                )
            slots[module] = free[0] if free else movable[0]
            if not free:
                gone.add(held[movable[0]])
        moved = [other for other in table.entries if other in gone - {name, evicted}]
        return FullPlace(list(slots.values()), moved)

    def later(
        self, name: str, modules: Collection[str], table: SlotTable, leases: Collection[Lease]
    ) -> tuple[str, ...]:
        """Leased adapters whose full slots of `modules` one of this name could take once they are
        idle."""
        busy = leased_slots(leases)
        tenant = table.reservations.tenant
        return tuple(
            other
            for other, entry in table.entries.items()
            if (entry.bucket, entry.slot) in busy
            and not entry.pinned
            and any(self._tables[module][table.id(entry)] >= 0 for module in modules)
            and (tenant(other) == tenant(name) or table.may_evict(other, (), leases))
        )

    def check_alone(self, ids: Mapping[str, int], mixes: Iterable[Mapping[str, float]]) -> None:
        """ValueError if an adapter with whole weights shares a row, or has a weight there."""
        whole = {name for name, n in ids.items() if any(t[n] >= 0 for t in self._tables.values())}
        for n, row in enumerate(mixes):
            if (mine := whole & row.keys()) and (len(row) > 1 or row[next(iter(mine))] != 1):
                raise ValueError(
                    f"row {n}: {some(sorted(mine))} has whole weights, which take the place of the "
                    "base model's; it takes a row of its own, with weight 1"
                )

    def check_none(self, name: str, id_: int) -> None:
        """ValueError if an adapter, which has this id, has whole weights."""
        if any(table[id_] >= 0 for table in self._tables.values()):
            raise ValueError(
                f"adapter {name!r} has whole weights (modules_to_save), which publish does not "
                "copy; save it and load the folder"
            )

    def place(
        self, name: str, whole: Mapping[str, FullModule], *, is_own: bool
    ) -> dict[str, list[Array]]:
        """An adapter's whole weights on the device. Copies what is the caller's.

        Raises:
          ValueError: weights overflow the slots' dtype.
        """
        placed = {}
        for module, full in whole.items():
            variables = self.rooms[module].slots[0].variables
            dtype = variables[0].dtype
            stored = as_stored(name, module, full.arrays, dtype)
            arrays = stored if is_own else [np.array(array) for array in stored]
            homes = [home_of(variable.get_value()) for variable in variables]
            placed[module] = jax.device_put(arrays, homes)
        return placed

    def put(self, id_: int, place: FullPlace, weights: Mapping[str, list[Array]]) -> None:
        """Gives an id its full slots, whose weights are on the device."""
        for (module, room), slot in zip(self.rooms.items(), place.slots):
            self._tables[module][id_] = slot
            if slot >= 0:
                for variable, new in zip(room.slots[slot].variables, weights[module], strict=True):
                    variable.set_value(new)

    def slots_of(self, id_: int) -> list[int]:
        """The full slots that an id has, as in `FullPlace`."""
        return [int(table[id_]) for table in self._tables.values()]

    def read(self, id_: int) -> dict[str, FullModule]:
        """The whole weights that an id has."""
        found = {}
        for module, room in self.rooms.items():
            if (slot := int(self._tables[module][id_])) >= 0:
                arrays = [np.array(v.get_value()) for v in room.slots[slot].variables]
                found[module] = FullModule(*arrays)
        return found
