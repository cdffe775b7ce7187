"""A bank's adapters, names and pins, to a folder and back in another process."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jax_lora.adapters import FullModule, LoRAConfig
from jax_lora.adapters.files import JsonObject
from jax_lora.bank.checkpoint_files import on_host, read_arrays, read_said, write_files
from jax_lora.bank.full import FullPlace
from jax_lora.bank.publish import copied_slot
from jax_lora.bank.reader import AdapterReader
from jax_lora.bank.reservations import Reservations
from jax_lora.bank.sites import some
from jax_lora.bank.slots import SERIALS, Entry
from jax_lora.bank.writer import SlotOfLayer
from jax_lora.messages import printable

_FORMAT = 1


class _Saved(NamedTuple):
    """An adapter of a checkpoint.

    Attributes:
      full_slots: as in `FullPlace`. full: the modules that are in them.
    """

    name: str
    entry: Entry
    full_slots: list[int]
    full: list[str]


class _Weights(NamedTuple):
    values: list[SlotOfLayer]
    full: list[FullModule]


class Checkpoints(AdapterReader):
    """What saves and restores a whole bank: a base of `AdapterBank`."""

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Writes all adapters with their names, slots, pins and reservations, by Orbax.

            bank.save_checkpoint("checkpoints/1000")        # in one process
            bank.restore_checkpoint("checkpoints/1000")     # in another, of the same model

        What the slots hold is written as it is, to the bit, that of adapters in training too. Steps
        and loads of other threads wait meanwhile. The base model is not part of it.

        Where several processes hold the model, all save the same, into one folder that all of them
        see. Each writes its shards, of which it first makes a copy on its devices.

        Args:
          path: of a folder that is not there yet. It appears when all is written.

        Raises:
          FileExistsError: it is there.
          ValueError: process 0 of several does not have the bank; Orbax needs it.
          RuntimeError: another process does not save the same. Nothing is written then.
        """
        folder = Path(path).absolute()
        with self._agreement.turn() as agree:
            if 0 not in self._agreement.processes:
                raise ValueError(
                    f"processes {[*self._agreement.processes]} have the bank, and a checkpoint is "
                    "written where process 0 has it too; save each adapter by bank.save"
                )
            if folder.exists():
                raise FileExistsError(f"{printable(path)} is there already; give another folder")
            with self.stepping, self._lock:
                self._check_current()
                said = self._said()
                tree: dict[str, PyTree] = {"format": np.int32(_FORMAT)}
                for n, entry in enumerate(self._table.entries.values()):
                    writer = self._writers[entry.bucket]
                    values = on_host(copied_slot(writer, entry.slot, writer))
                    full = self._full.read(self._table.id(entry)).values()
                    tree[str(n)] = [values, [module.arrays for module in full]]
            agree(f"save {_summary(said)} into {printable(folder)}")
            write_files(folder, said, tree, self._agreement)

    def restore_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Puts the adapters of `save_checkpoint` into their slots, with their names and pins.

        The order of their last use and the reservations come back too. Adapters keep the numbers by
        which an optimizer knows them: the state that was saved together with the bank fits. A state
        of `per_adapter` that has trained others in this process does not; make a new one.

        Where several processes hold the model, all restore the same. Each reads its shards, and
        nothing is changed before all have read theirs. Other processes than those that saved may
        have the model, in other shards.

        Args:
          path: of the folder.

        Raises:
          FileNotFoundError: there is no folder.
          ValueError: the bank has adapters, or batches that lease slots; the model's LoRA layers,
            buckets, slots or dtypes are others, or what experts share; the files are no checkpoint,
            or damaged, in this or in another process. Nothing is changed then.
          RuntimeError: as `load`.
        """
        folder = Path(path).absolute()
        with self._agreement.turn() as agree:
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {printable(path)}")
            self._check_empty()
            said = self._read(path, lambda: read_said(folder))
            self._check_same(path, said)
            saved = self._read(path, lambda: self._entries(said))
            reservations = self._read(path, lambda: self._reservations(said))
            weights = self._read(path, lambda: self._weights(folder, saved))

            def commit() -> None:
                self._check_empty()
                agree(f"restore {_summary(said)} of {printable(folder)}")
                self._put(saved, weights)
                self._table.reservations = reservations

            self._write(commit)
        self._tell()

    # ------------------------------------------------------------------------------------- private

    def _put(self, saved: list[_Saved], weights: list[_Weights]) -> None:
        """Fills the slots, and then gives them their names."""
        for one, own in zip(saved, weights):
            id_ = self._table.id(one.entry)
            full = dict(zip(one.full, own.full))
            placed = self._full.place(one.name, full, is_own=True)
            place = FullPlace(one.full_slots, [])
            try:
                writer = self._writers[one.entry.bucket]
                writer.write(one.entry.slot, writer.place(own.values), place.slots)
                self._full.put(id_, place, placed)
            finally:
                self._guard.writes += 1
        for one in saved:
            pinned = one.entry.pinned
            self._table.put(one.name, one.entry)
            one.entry.pinned = pinned
        SERIALS.skip(max((one.entry.serial for one in saved), default=0))

    def _said(self) -> JsonObject:
        """All but the weights, the adapter used last at the end."""
        full = self._full
        return {
            "format": _FORMAT,
            "model": self._described(),
            "reservations": self._table.reservations.kept,
            "adapters": [
                {
                    "name": name,
                    "bucket": entry.bucket,
                    "slot": entry.slot,
                    "config": dataclasses.asdict(entry.config),
                    "modules": sorted(entry.modules),
                    "pinned": entry.pinned,
                    "serial": entry.serial,
                    "full_slots": full.slots_of(self._table.id(entry)),
                    "full": [*full.read(self._table.id(entry))],
                }
                for name, entry in self._table.entries.items()
            ],
        }

    def _described(self) -> dict[str, str]:
        """What a model must have in common with the one that was saved, each by what it is."""
        sites = {
            name: f"{[*site.features]} as number {site.nth} {[*site.index]} of its layer"
            for name, site in self._sites.items()
        }
        slots = {
            f"bucket {bucket}": f"{count} slots" for bucket, count in sorted(self._slots.items())
        }
        full = {
            f"full slots of {name}": str(len(room.slots)) for name, room in self._full.rooms.items()
        }
        dtypes = {
            f"arrays of bucket {bucket}": ", ".join(
                sorted({str(a.dtype) for _, arrays in writer.layout.shapes for a in arrays})
            )
            for bucket, writer in self._writers.items()
        }
        shared = {
            f"experts of {path}": f"share {half}"
            for path, layer in self._layers.items()
            if (half := layer.stacks[0].shape.shared)
        }
        return {**slots, **dtypes, **full, **shared, **sites}

    def _check_same(self, path: str | os.PathLike[str], said: JsonObject) -> None:
        mine, theirs = self._described(), said.get("model")
        if said.get("format") != _FORMAT or not isinstance(theirs, dict):
            raise ValueError(
                f"{printable(path)} is a checkpoint of format {said.get('format')!r:.40}; this "
                f"version reads {_FORMAT}"
            )
        if odd := [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]:
            differ = (
                f"{key}: {theirs.get(key, 'none')} there, {mine.get(key, 'none')} here"
                for key in odd
            )
            raise ValueError(
                f"{printable(path)} is of a bank of another model; give apply_lora the same "
                f"arguments. They differ in {some(differ, lambda text: printable(text, 200))}"
            )

    def _check_empty(self) -> None:
        with self._lock:
            self._check_current()
            names = [*self._table.entries]
            leased = sum(lease.is_open and bool(lease.slots) for lease in self._guard.leases)
        if names or leased:
            raise ValueError(
                f"a checkpoint is restored into a bank without adapters; it has {some(names)}, and "
                f"{leased} batches lease slots: unload the adapters, and drop the batches"
            )

    def _read[T](self, path: str | os.PathLike[str], work: Callable[[], T]) -> T:
        """What `work` reads of a checkpoint; ValueError where that is none, or damaged."""
        try:
            return work()
        except Exception as error:  # Orbax raises whatever its libraries do
            why = printable(f"{type(error).__name__}: {error}", 500)
            raise ValueError(
                f"{printable(path)} is no checkpoint of a bank, or is damaged: {why}"
            ) from error

    def _entries(self, said: JsonObject) -> list[_Saved]:
        found, taken = [], set()
        for one in said["adapters"]:
            config, modules = LoRAConfig(**one["config"]), frozenset(one["modules"])
            pinned, serial = bool(one["pinned"]), int(one["serial"])
            name, full, bucket, slot = one["name"], one["full"], one["bucket"], one["slot"]
            self.check_name(name)
            if not modules <= self._sites.keys() or not {*full} <= self._full.rooms.keys():
                raise ValueError(f"{name!r} has modules that the model lacks")
            if (bucket, slot) in taken or not 0 <= slot < self._slots[bucket]:
                raise ValueError(f"{name!r} has slot {slot} of bucket {bucket}")
            taken.add((bucket, slot))
            entry = Entry(bucket, slot, config, modules, pinned, serial)
            found.append(_Saved(name, entry, one["full_slots"], full))
        return found

    def _reservations(self, said: JsonObject) -> Reservations:
        reservations = Reservations(self._slots)
        for prefix, own in said["reservations"].items():
            reservations.put(prefix, {int(bucket): count for bucket, count in own.items()})
        return reservations

    def _weights(self, folder: Path, saved: list[_Saved]) -> list[_Weights]:
        shapes: dict[str, PyTree] = {"format": jax.ShapeDtypeStruct((), np.int32)}
        for n, one in enumerate(saved):
            values = self._writers[one.entry.bucket].layout.shapes
            rooms = (self._full.rooms[module].slots[0].variables for module in one.full)
            full = [[v.get_value() for v in variables] for variables in rooms]
            shapes[str(n)] = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                [values, full],
            )
        tree = read_arrays(folder, shapes)
        for (path, wanted), array in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(tree), strict=True
        ):
            if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is {array.dtype} {[*array.shape]} and should be "
                    f"{wanted.dtype} {[*wanted.shape]}"
                )
        return [
            _Weights(
                [(scales, list(arrays)) for scales, arrays in tree[str(n)][0]],
                [FullModule(*arrays) for arrays in tree[str(n)][1]],
            )
            for n in range(len(saved))
        ]


def _summary(said: JsonObject) -> str:
    """What processes compare of a checkpoint: its names, and by a hash all the rest."""
    names = [one["name"] for one in said["adapters"]]
    seen = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8)
    return f"a checkpoint of {some(names)} ({seen.hexdigest()})"
