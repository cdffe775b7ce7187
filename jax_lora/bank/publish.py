"""Slots filled from what is on a device already, without the host."""

import dataclasses
import functools
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jax_lora.adapters import Adapter, AdapterHeader, LoRAConfig, LoRAWeights
from jax_lora.bank import dora
from jax_lora.bank.agreement import Agree, digest
from jax_lora.bank.full import FullSlots
from jax_lora.bank.roster import Roster
from jax_lora.bank.shared import check_ranks, is_one
from jax_lora.bank.sites import Site, check_fit, check_same
from jax_lora.bank.slots import BankFullError, Entry
from jax_lora.bank.tokens import check_tokens
from jax_lora.bank.waiting import SlotQueue, checked_wait
from jax_lora.bank.writer import (
    Layout,
    OfLayers,
    PreparedAdapter,
    SlotOfLayer,
    SlotValues,
    SlotWriter,
    home_of,
    places_of,
)
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.stacks import get_scales, get_slot

Half = np.ndarray | Array  # A or B of a module


def stays_on_device(adapter: Adapter, bucket: int, sites: Mapping[str, Site]) -> bool:
    """Whether `values_on_device` takes an adapter: A and B alone, as the stacks have them.

    Each must be on the stacks' one device, in their dtype, and of the bucket's rank. JAX would
    compile a program for each other rank.
    """
    if adapter.config.dora or adapter.full or adapter.tokens:
        return False
    return all(
        isinstance(half, jax.Array) and _is_slot_of(variable.get_value(), size[1:], half)
        for module, weights in adapter.modules.items()
        for stack in [sites[module].stacks[bucket]]
        for variable, size, half in zip(stack.variables, stack.shape.sizes, (weights.a, weights.b))
    ) and is_one(adapter.modules, sites)


def _is_slot_of(stack: Array, size: tuple[int, ...], half: Array) -> bool:
    return (
        (half.shape, half.dtype) == (size, stack.dtype)
        and home_of(half) == home_of(stack)  # jit compiles for each home
        and half.sharding.device_set == stack.sharding.device_set
        and len(stack.sharding.device_set) == 1
    )


def on_host(adapter: Adapter) -> Adapter:
    """The adapter with NumPy's A and B; itself where it has no others."""
    halves = {module: (weights.a, weights.b) for module, weights in adapter.modules.items()}
    if not any(isinstance(half, jax.Array) for both in halves.values() for half in both):
        return adapter
    fetched = jax.device_get(halves)  # all at a time
    modules = {
        module: dataclasses.replace(weights, a=fetched[module][0], b=fetched[module][1])
        for module, weights in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)


def values_on_device(
    adapted: Mapping[str, LoRAWeights],
    writer: SlotWriter,
    sites: Mapping[str, Site],
    layers: list[LoRALayer],
) -> list[SlotOfLayer]:
    """What `slot_values` makes, of an adapter that `stays_on_device`; one program for a bucket."""
    by_layer: dict[int, list[tuple[Site, LoRAWeights]]] = {}
    for module, weights in adapted.items():
        by_layer.setdefault(id(sites[module].layer), []).append((sites[module], weights))
    zeros: dict[tuple[tuple[int, ...], np.dtype], Array] = {}
    values: list[tuple[np.ndarray, list[list[Half]]]] = []
    for layer, (scales, arrays) in zip(layers, writer.layout.shapes):
        halves: dict[tuple[int, tuple[int, ...]], Half] = {}
        own_scales = np.zeros(scales.shape, scales.dtype)
        parts: list[list[Half]] = []
        for site, weights in by_layer.get(id(layer), []):
            own_scales[*site.index, site.nth] = weights.scale
            for n, (place, half) in enumerate(zip(site.places, (weights.a, weights.b))):
                halves[2 * site.nth + n, place] = half
        for number, array in enumerate(arrays):
            key = array.shape[-2:], array.dtype
            if key not in zeros:
                zeros[key] = jax.device_put(np.zeros(*key), array.sharding)
            places = np.ndindex(*array.shape[:-2])
            parts.append([halves.get((number, place), zeros[key]) for place in places])
        values.append((own_scales, parts))
    assembled = _assembled([parts for _, parts in values], writer.layout)
    return [(scales, list(arrays)) for (scales, _), arrays in zip(values, assembled)]


@functools.partial(jax.jit, static_argnames="layout")
def _assembled(parts: list[list[list[Half]]], layout: Layout) -> list[list[Array]]:
    """The arrays of a slot, out of those of each layer that is stacked in them."""
    return [
        [jnp.stack(some).reshape(array.shape) for some, array in zip(own, arrays)]
        for own, (_, arrays) in zip(parts, layout.shapes)
    ]


def _padded(array: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """`array` in the front of zeros of another shape."""
    return jnp.pad(array.astype(dtype), [(0, size - own) for own, size in zip(array.shape, shape)])


def _check_cast(dtypes: set[np.dtype], dtype: np.dtype) -> None:
    if dtype == jnp.float16 and dtypes != {dtype}:
        raise ValueError(
            f"an adapter of {', '.join(sorted(map(str, dtypes)))} on a device may overflow the "
            "stacks' float16, which only the host could tell; cast it before, or give apply_lora "
            "another dtype="
        )


def compile_copies(writer: SlotWriter, sites: Mapping[str, Site], layers: list[LoRALayer]) -> None:
    """Compiles what copies and reads slots of a bucket, and fills them from the device."""
    slot = np.int32(0)
    writer.place(copied_slot(writer, 0, writer))
    writer.compile_copy()
    if all(len(a.sharding.device_set) == 1 for _, stacks in writer.arrays for a in stacks):
        writer.place(values_on_device({}, writer, sites, layers))
    for _, arrays in writer.arrays:
        for array in arrays:
            get_slot(array, slot)
    for layer in layers if writer.is_eight_bits else ():
        for stack in layer.stacks:
            get_scales(layer.scales.get_value(), stack.shape, slot)


def copied_slot(source: SlotWriter, slot: int, target: SlotWriter) -> list[SlotOfLayer]:
    """A slot of `source`, as one of `target` holds it: zeros behind the rank, in its dtype.

    Raises:
      ValueError: weights may overflow the dtype of `target`.
    """
    return _copied(source.arrays, np.int32(slot), source.layout, target.layout)


@functools.partial(jax.jit, static_argnames=("source", "target"))
def _copied(arrays: OfLayers, slot: Array, source: Layout, target: Layout) -> list[SlotOfLayer]:
    copied: list[SlotOfLayer] = []
    places = zip(source.firsts, source.columns)
    for (scales, stacks), place, (_, held), (_, wanted) in zip(
        arrays, places, source.shapes, target.shapes
    ):
        if len(stacks) != len(wanted):
            raise ValueError(
                "one of the two models has room for DoRA and the other has none; give both "
                "apply_lora(dora=True), or none"
            )
        halves = []
        for stack, own, shape in zip(stacks, held, wanted):
            _check_cast({stack.dtype}, shape.dtype)  # once for two layouts, as JAX traces once
            half = get_slot(stack, slot).reshape(own.shape)
            halves.append(_padded(half, shape.shape, shape.dtype))
        own_scales = scales[..., places_of(slot, *place)]
        copied.append((own_scales, list[np.ndarray | Array](halves)))
    return copied


class Filling(NamedTuple):
    """What a slot of a bucket is to hold, on the device, and what the stacks don't tell of it.

    Attributes:
      full: the whole weights that go into full slots, by module.
    """

    bucket: int
    values: SlotValues
    config: LoRAConfig
    modules: frozenset[str]
    full: Mapping[str, list[Array]]


class Publisher(Roster):
    """What fills the slots of a bank: the base of `AdapterBank`, which makes what it needs."""

    _writers: dict[int, SlotWriter]
    _full: FullSlots

    def __init__(self, model: nnx.Module) -> None:
        super().__init__(model)
        self._alike: weakref.WeakSet[Publisher] = weakref.WeakSet([self])
        self._queue = SlotQueue()

    def publish(
        self, name: str, source: str, *, bank: "Publisher | None" = None, wait: float = 0
    ) -> None:
        """Serves a copy of an adapter under `name`, as it is now, while its training goes on.

            bank.publish("policy", "policy in training")
            serving.publish("policy", "policy", bank=training)     # of another model's bank

        The copy is made on the device. It takes the place of the adapter of this name: in its slot,
        or in another one where a batch leases that. Requests under way so go on with the old
        version, and the next batch that names it has the new one. `source` keeps its slot.

        Neither the host nor the caller waits for the device. `warmup` compiles the copies within a
        bank. The first one from another bank compiles a small program for its two buckets.

        Args:
          name: of the copy, as in `load`; loaded or not.
          source: the adapter to copy, of another name where it is one of this bank.
          bank: which has `source`; None for this one. Its model must have the same LoRA layers.
            The copy has this model's dtype, and a bucket that holds all of the source's.
          wait: as in `load`. The copy is made before the wait, and `source` keeps its slot in it.

        Raises:
          KeyError: `source` is not loaded.
          TypeError: `bank` is none.
          ValueError: `name` is malformed or that of the source; the models differ, one has
            stacks in 8 bits, or this one lacks the bucket; weights may overflow its dtype; the
            source has whole weights.
          BankFullError: all slots of the bucket but the source's are pinned, leased or reserved;
            and so they were for `wait` seconds.
          RuntimeError: as in `load`.

        In each case the bank is as it was; `source` alone counts as used.
        """
        other = self if bank is None else bank
        if not isinstance(other, Publisher):
            raise TypeError(f"bank must be an AdapterBank, got {type(bank).__name__}")
        with self._agreement.turn() as agree:
            wait = self._checked_wait(wait)
            self._check_name(name, replace=True)
            if other is self and name == source:
                raise ValueError(f"publish {name!r} under another name than that of its training")
            for each in (self, other):
                if any(writer.is_eight_bits for writer in each._writers.values()):
                    raise ValueError(
                        f"publish copies {source!r} as it stands, which stacks in 8 bits are not "
                        f"for; save it by its bank, and load the folder as {name!r}"
                    )
            lease, (entry,) = other._lease([source])  # lest the copy take its slot
            try:
                filling = self._copy(name, source, other, entry, waits=wait > 0)
                what = f"publish {source!r} as {name!r}"
                self._fill(
                    name,
                    filling,
                    lambda where: agree(f"{what} {where}"),
                    replace=True,
                    wait=wait,
                )
            finally:
                lease.is_open = False

    def room_of(self, name: str, prepared: PreparedAdapter) -> tuple[int, tuple[str, ...]]:
        """What `room` says, for this adapter: its whole weights need full slots, too."""
        modules = prepared.adapter.full
        with self._lock:
            leases = list(self._guard.leases)
            room, later = self._table.room(name, prepared.bucket, leases)
            if room and modules:
                try:
                    self._full.find(name, modules, self._table, None, leases)
                except BankFullError:
                    return 0, self._full.later(name, modules, self._table, leases)
            return room, later

    def _copy(
        self, name: str, source: str, other: "Publisher", entry: Entry, *, waits: bool
    ) -> "Filling":
        """What a slot is to hold for a copy of `source`, which `other` has as `entry`.

        As it is now, also where the load `waits`; else the write itself reads the slot.
        """
        other._full.check_none(source, other._table.id(entry))
        if other not in self._alike:
            check_same(self._sites, other._sites)
            self._alike.add(other)
        if other is self and not waits:
            return Filling(entry.bucket, entry.slot, entry.config, entry.modules, {})
        bucket = self._bucket_for(name, entry.bucket)
        with other.stepping:
            writer = other._writers[entry.bucket]
            values = copied_slot(writer, entry.slot, self._writers[bucket])
        return Filling(bucket, values, entry.config, entry.modules, {})

    def _checked_wait(self, wait: float) -> float:
        """Seconds to wait for a slot.

        Raises:
          TypeError, ValueError: it is no such number; or several processes have the bank, and
            would find a slot at different times.
        """
        if (seconds := checked_wait(wait)) > 0:
            self._agreement.check_alone(f"wait={seconds:g} is given")
        return seconds

    def _check_header(self, name: str, header: AdapterHeader) -> int:
        """The bucket of an adapter, before its weights are read, if the model has room for it."""
        check_fit(name, header, self._sites)
        check_ranks(name, {m: shape.rank for m, shape in header.modules.items()}, self._sites)
        check_tokens(name, header, self._sites)
        features = {m: (s.in_features, s.out_features) for m, s in header.modules.items()}
        dora.check_room(name, header.config.dora, features, self._sites)
        if header.config.dora or header.full or header.tokens:
            self._agreement.check_alone(f"{name!r} has DoRA, whole weights or trained tokens")
        return self._bucket_for(name, header.rank)

    def _base_weight(self, module: str) -> np.ndarray:
        """The model's own weight of a PEFT module, as PEFT stores it."""
        if module not in self._sites:
            raise ValueError(
                f"the files have a copy of the base model's weight of {module}, which has no LoRA "
                "in this model to be compared with; name it in apply_lora's target, or save the "
                "adapter with save_pretrained(path, save_embedding_layers=False)"
            )
        self._agreement.check_alone(f"{module} has a copy of its base weight")
        return np.asarray(self._sites[module].base_weight())

    def _install(
        self, name: str, prepared: PreparedAdapter, agree: Agree, *, replace: bool, wait: float
    ) -> None:
        if prepared.guard is not self._guard:
            raise ValueError(f"adapter {name!r} was prepared for another model")
        adapter, bucket, is_own = prepared.adapter, prepared.bucket, prepared.is_own
        # On the device before anything changes: what follows allocates nothing to speak of.
        placed = jax.block_until_ready(self._writers[bucket].place(prepared.values))
        full = jax.block_until_ready(self._full.place(name, adapter.full, is_own=is_own))
        filling = Filling(bucket, placed, adapter.config, frozenset(adapter.modules), full)
        what = f"load {name!r} ({digest(adapter) if self._agreement.is_shared else ''})"
        self._fill(
            name, filling, lambda where: agree(f"{what} {where}"), replace=replace, wait=wait
        )

    def _fill(
        self, name: str, filling: "Filling", agree: Agree, *, replace: bool, wait: float
    ) -> None:
        """Writes what a slot is to hold, which is on the device, and gives it the name."""
        bucket, values, config, modules, full = filling

        def commit() -> None:
            self._check_name(name, replace)  # another thread may have taken it
            leases = list(self._guard.leases)
            slot, evicted = self._table.find(bucket, name, leases)
            place = self._full.find(name, full, self._table, evicted, leases)
            agree(f"into slot {slot} of bucket {bucket}, evicting {evicted!r}")
            try:
                self._writers[bucket].write(slot, values, place.slots)
                self._full.put(self._table.id_of(bucket, slot), place, full)
            finally:
                self._guard.writes += 1
            for other in (evicted, *place.evicted):
                if other is not None:
                    self._table.forget(other, evicted_by=name)
            self._table.put(name, Entry(bucket, slot, config, modules))

        with self._lock:
            # Nobody who waits stands before a load into the slot of its own adapter.
            is_own = self._table.has_idle(bucket, name, list(self._guard.leases))
            tenant = self._table.reservations.tenant(name)
            kind = bucket, tenant, bool(full), name if is_own else None
        self._queue.run(kind, wait, lambda: self._write(commit))
        self._tell()
