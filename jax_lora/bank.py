"""The host's side of a model with LoRA layers: names, slots, pins, leases and the LRU order."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_lora.adapters import (
    Adapter,
    AdapterHeader,
    LoRAConfig,
    LoRAWeights,
    load_peft,
    save_peft,
)
from jax_lora.batch import AdapterBatch, Guard, Lease, host_int32
from jax_lora.layers import LoRALayer, LoRAScale, LoRAStack, Matrices, path_name
from jax_lora.process import check_process, undivided
from pallas_kernels.ranks import rank_bucket

# No separators, no control characters, not "." or "..": a name may end up in somebody's path.
_NAME = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/\\]{1,255}")


# Of a layer, for one bucket: scales, and the variables that hold its stacks, or their arrays; or
# what a slot is to hold: scales, and A and B of each stack.
_OfLayer = tuple[Any, list[Any]]


# The bank of each layer, by the layer's id: a bank that lives keeps its layers alive.
_BANKS: weakref.WeakValueDictionary[int, "AdapterBank"] = weakref.WeakValueDictionary()


# Of so many adapters that were loaded, a bank knows why they are not any more.
_MAX_GONE = 256


class BankFullError(RuntimeError):
    """Every slot of a bucket is pinned or leased, so nothing may be evicted."""


@dataclasses.dataclass
class _Entry:
    """A loaded adapter: where it lives, and what the stacks don't tell of it."""

    bucket: int
    slot: int
    config: LoRAConfig
    modules: frozenset[str]
    pinned: bool = False

    @property
    def rank(self) -> int:
        return max(map(self.config.rank_of, self.modules))


@dataclasses.dataclass(frozen=True)
class _Site:
    """One PEFT module: an output slice of a layer, with its stack in each bucket."""

    layer: LoRALayer
    stacks: Mapping[int, LoRAStack]

    @property
    def features(self) -> tuple[int, int]:
        return next(iter(self.stacks.values())).shape.features

    def matrices(self, bucket: int) -> tuple[Matrices, Matrices]:
        return self.layer.matrices(self.stacks[bucket])

    @property
    def columns(self) -> slice:
        y_offset = next(iter(self.stacks.values())).y_offset
        return slice(y_offset, y_offset + self.features[1])


class AdapterBank:
    """Loads, evicts, trains and saves the adapters of a model that `apply_lora` prepared.

    A model has one bank, as two would give the same slots away. A new one starts empty and takes
    over: calls of the one before it raise RuntimeError, and what its batches lease stays leased.

    Example::

        apply_lora(model, slots=4, buckets=(16, 64))
        bank = AdapterBank(model)
        bank.load("french", "adapters/french")
        batch = bank.batch(["french", None, "french"])
        with jax_lora.use(batch):        # inside the jitted function
            y = model(x)                 # rows 0 and 2 speak French

    An adapter goes into the bucket of its largest rank. A load into a full bucket evicts the least
    recently used adapter that is neither pinned nor leased by a batch. Once the bank is built,
    neither loads nor batches compile anything: stacks change in place, by one compiled update per
    bucket that donates the old ones.

    PEFT's module names are the NNX paths joined by dots. A model says otherwise by an attribute
    `peft_names`: a mapping from such a path to PEFT's name or, for a layer with `slices`, to a
    tuple of names, one per slice.

    Threads may share a bank. A load donates the stacks that it writes, so a step must not read them
    meanwhile. Where one thread loads while another steps, hold `bank.stepping` around the step::

        with bank.stepping:              # loads wait until the call returns, not for the device
            y = step(bank.state, rest, x, batch)

    So must `nnx.jit` steps, which read the model's variables and write them back. Without it, a
    step may find deleted arrays, which is JAX's RuntimeError, and `nnx.jit` may write back what was
    there before the load.

    A load either happens or does not: no exception of a signal handler (Ctrl-C, an alarm) divides
    it, nor does a failure of the device before its last operation. If that fails, and has consumed
    the stacks, RuntimeError says that they are lost; a step then finds deleted arrays, never
    another adapter's.

    An optimizer's state belongs to slots, not to adapters: an adapter in a reused slot inherits the
    moments of the one before it. Make a new optimizer state, or zero that slot's, before training.

    Attributes:
      stepping: a re-entrant lock, `threading.RLock`; see above. A load in the thread that holds it
        raises RuntimeError. Clones of the model and its later banks have the same one.
      state: the live `nnx.State` of all stacks and scales, equal in structure to the first state of
        `nnx.split(model, (nnx.LoRAParam, jax_lora.LoRAScale), ...)`. A `jax.jit` loop over pure
        arrays takes it as an argument at each step and so sees every load; arrays taken out of it
        earlier are donated by the next load: JAX then calls them deleted.

    Raises:
      RuntimeError: in the child of a fork, here and in all methods; see `check_process`.
      ValueError: the model has no LoRA layers, its layers differ in buckets or slots or are stacked
        by `nnx.vmap`, or `peft_names` does not fit it.
    """

    def __init__(self, model: nnx.Module) -> None:
        check_process()
        layers = {
            path_name(path): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, LoRALayer)
        }
        if not layers:
            raise ValueError("the model has no LoRA layers; call jax_lora.apply_lora(model) first")
        self._model = model
        self._layers = list(layers.values())
        self._slots = _common_slots(layers)
        for name, layer in layers.items():
            _check_unstacked(name, layer)
        self._sites = _sites(layers, getattr(model, "peft_names", {}))
        self.state = nnx.from_flat_state(
            [
                ((*path, name), value)
                for path, module in nnx.iter_modules(model)
                if isinstance(module, LoRAStack | LoRALayer)
                for name, value in vars(module).items()
                if isinstance(value, nnx.LoRAParam | LoRAScale)
            ]
        )
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._gone: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._lock = threading.RLock()  # of what the host knows; taken after `stepping`
        self._writers = {bucket: self._compile_writer(bucket) for bucket in self._slots}
        self._is_current = True
        self._guard = undivided(self._take_over)

    def _take_over(self) -> Guard:
        """Ends the banks that had the layers before, and keeps what their batches lease."""
        before = self._banks_before()
        first = self._layers[0]
        if before:
            guard = before[0]._guard
        else:
            guard = next((g for layer in self._layers if (g := layer.guard)), Guard())
            if not guard.claim(first):
                # A copy of a model that has a bank: from now on another model, with its own arrays,
                # as `nnx.clone` shares them and a load would delete both.
                guard = Guard()
                for _, variable in nnx.to_flat_state(self.state):
                    variable.set_value(jnp.copy(variable.get_value()))
        guard.claim(first)
        for bank in before:
            with bank._lock:
                bank._is_current = False
                guard.leases.update(bank._guard.leases)
        for layer in self._layers:
            if layer.guard is not guard:
                layer.guard = guard
        _BANKS.update((id(layer), self) for layer in self._layers)
        return guard

    def _banks_before(self) -> list["AdapterBank"]:
        there = (_BANKS.get(id(layer)) for layer in self._layers)
        return list(dict.fromkeys(bank for bank in there if bank is not None))

    @property
    def stepping(self) -> Any:
        return self._guard.lock

    # ------------------------------------------------------------------------------- what is there

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, the least recently used first."""
        with self._lock:
            return tuple(self._entries)

    @property
    def slots(self) -> dict[int, int]:
        """Slots of each rank bucket."""
        return dict(self._slots)

    def config(self, name: str) -> LoRAConfig:
        """Ranks and scales of a loaded adapter. KeyError if it is not loaded."""
        return self._entry(name).config

    def rank(self, name: str) -> int:
        """The largest true rank of a loaded adapter's modules. KeyError if it is not loaded."""
        return self._entry(name).rank

    def bucket(self, name: str) -> int:
        """The rank bucket that a loaded adapter lives in. KeyError if it is not loaded."""
        return self._entry(name).bucket

    # ------------------------------------------------------------------------ loading and evicting

    def load(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Adapter,
        *,
        replace: bool = False,
        max_bytes: int | None = None,
        allow_links: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Puts an adapter into a slot, under `name`.

        Args:
          name: any text without `/`, `\\` and control characters.
          adapter: a PEFT folder, or an `Adapter`, whose arrays are read before `load` returns.
          replace: take the place of the adapter of this name. Batches that lease the old one go
            on computing its weights.
          max_bytes, allow_links, allow_nonfinite: of a folder; as in `load_peft`. Its shapes are
            checked against the model before a tensor is read.

        Raises:
          ValueError: the name is taken or malformed; the files are (see `load_peft`); a module is
            not in the model or has other shapes; the model lacks the bucket.
          FileNotFoundError: files are missing.
          BankFullError: all slots of the bucket are pinned or leased.
          RuntimeError: the thread holds `stepping`.
          In each case the bank is as it was.
        """
        self._check_name(name, replace)
        if not isinstance(adapter, Adapter):
            adapter = load_peft(
                adapter,
                check=functools.partial(self._check_header, name),
                base_weight=self._base_weight,
                max_bytes=max_bytes,
                allow_links=allow_links,
                allow_nonfinite=allow_nonfinite,
            )
        self._install(name, adapter, replace)

    def create(
        self, name: str, config: LoRAConfig, *, rngs: nnx.Rngs, replace: bool = False
    ) -> None:
        """Puts a new adapter into a slot, to be trained: A as PEFT initialises it, B zero.

        A is uniform in ±1/sqrt(H), which is PEFT's default (kaiming uniform with a = sqrt(5)).
        Train by `nnx.LoRAParam` gradients of the whole stacks: those of adapters that a batch
        lacks are exactly zero. Momentum and weight decay still move an adapter with zero gradient,
        so give them a mask, or train the adapters of one optimizer together. An adapter in a reused
        slot inherits the optimizer's moments of the one before it: make a new optimizer state, or
        zero that slot's. `nnx.update` writes all slots: load nothing between `nnx.split` and the
        `nnx.update` that ends a training run.

        An optimizer that moves what has no gradient at all (`optax.yogi`, `optax.noisy_sgd`) also
        fills the columns between an adapter's rank and its bucket, which then count: `save` writes
        and `merge` folds them too. To stay at the rank, mask them, or multiply them with zero after
        each step.

        Args:
          name: as in `load`.
          config: `target_modules` says which of the model's LoRA layers it adapts.
          rngs: the stream `params` seeds it.

        Raises: as `load`; TypeError for a `config` or `rngs` of another type; ValueError if
          `target_modules` names no layer.
        """
        self._check_name(name, replace)
        for what, value, kind in (("config", config, LoRAConfig), ("rngs", rngs, nnx.Rngs)):
            if not isinstance(value, kind):
                raise TypeError(f"{what} must be {kind.__name__}, got {type(value).__name__}")
        # NumPy's generator, as JAX's would compile for each rank.
        generator = np.random.default_rng(np.asarray(jax.random.key_data(rngs.params())))
        modules = {}
        for module in filter(config.targets, self._sites):
            (in_features, out_features), dtype = self._sites[module].features, self._dtype(module)
            shape, bound = (config.rank_of(module), in_features), 1 / math.sqrt(in_features)
            a = generator.uniform(-bound, bound, shape).astype(dtype)
            b = np.zeros((out_features, shape[0]), dtype)
            modules[module] = LoRAWeights(a, b, config.scale_of(module))
        if not modules:
            raise ValueError(
                f"target_modules={config.target_modules!r:.300} names none of "
                f"{_some(self._sites, str)}"
            )
        self._install(name, Adapter(config, modules), replace)

    def unload(self, name: str) -> None:
        """Forgets an adapter, pinned or not. Batches that lease it go on computing its weights.

        Raises:
          KeyError: it is not loaded.
        """
        with self._lock:
            self._entry(name)
            self._forget(name, "unloaded")

    def pin(self, name: str) -> None:
        """Keeps an adapter from being evicted. KeyError if it is not loaded."""
        with self._lock:
            self._entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Undoes `pin`. KeyError if it is not loaded."""
        with self._lock:
            self._entry(name).pinned = False

    # ------------------------------------------------------------------------------------- batches

    def batch(
        self,
        names_per_row: Sequence[str | None],
        lengths: Sequence[int] | None = None,
        phase: str = "decode",
    ) -> AdapterBatch:
        """The adapters of a batch, and a lease on them.

        Its arrays are NumPy's; `jax.device_put(batch)` places them, for a loop that wants to save
        each step the copy.

        Args:
          names_per_row: adapter of each row; None for the base model.
          lengths: tokens of each row, if `x` is flat, `[T, H]`.
          phase: "decode" or "prefill".

        Raises:
          KeyError: an adapter is not loaded.
          TypeError, ValueError: `names_per_row`, `lengths` or `phase` are malformed.
        """
        self._check_current()
        distinct = _distinct(names_per_row)
        order = {bucket: k for k, bucket in enumerate(self._slots)}
        indices = np.full((len(order), len(names_per_row)), -1, np.int32)
        row_lengths = None if lengths is None else host_int32("lengths", lengths)
        with self._lock:
            places = {}
            for name in distinct:
                entry = self._entry(name)
                places[name] = entry.bucket, entry.slot
            for row, row_name in enumerate(names_per_row):
                if row_name is not None:
                    bucket, slot = places[row_name]
                    indices[order[bucket], row] = slot
            lease = Lease(frozenset(places.values()))
            # NumPy leaves: a step's launch takes the kilobyte along; placing it here would be most
            # of the time that a batch takes.
            batch = AdapterBatch(
                indices,
                row_lengths,
                buckets=tuple(order),
                phase=phase,
                lease=lease,
                guard=self._guard,
            )
            for name in distinct:
                self._entries.move_to_end(name)
            self._guard.leases.add(lease)
        return batch

    # ------------------------------------------------------------------------- getting weights out

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Writes an adapter, as it is now, to a folder that PEFT reads.

        What is written computes what the adapter's rows do, so its rank is larger than the config's
        where training has filled columns behind that (see `create`).

        Raises:
          KeyError: it is not loaded.
          ValueError: see `save_peft`.
        """
        save_peft(self._adapter(name), path)

    def merge(self, name: str) -> nnx.State:
        """The model's base parameters, with an adapter folded into the kernels that it adapts.

        `nnx.update(plain_model, bank.merge(name))` makes a model without LoRA that computes what
        the adapter's rows do. Sums are float32, rounded once to the kernel's dtype.

        Raises:
          KeyError: it is not loaded.
          ValueError: it adapts a layer that shares its kernel with another.
        """
        by_layer: dict[int, list[tuple[_Site, LoRAWeights]]] = {}
        for peft_name, weights in self._adapter(name).modules.items():
            site = self._sites[peft_name]
            by_layer.setdefault(id(site.layer), []).append((site, weights))
        modules = dict(nnx.iter_modules(self._model))
        holders = collections.Counter(
            id(variable) for module in modules.values() for variable in vars(module).values()
        )
        base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
        merged = dict(nnx.to_flat_state(nnx.clone(nnx.state(self._model, base))))
        for path, module in modules.items():
            if id(module) not in by_layer:
                continue
            layer: Any = module
            if holders[id(layer.kernel)] > 1:
                raise ValueError(f"{path_name(path)} shares its kernel with another layer")
            matrix = layer.kernel_matrix().astype(jnp.float32)
            for site, weights in by_layer[id(module)]:
                a, b = (jnp.asarray(t).astype(jnp.float32) for t in (weights.a, weights.b))
                delta = jnp.matmul(a.T, b.T, precision=jax.lax.Precision.HIGHEST)
                matrix = matrix.at[:, site.columns].add(delta * weights.scale)
            merged[*path, "kernel"].set_value(
                layer.kernel_tensor(matrix).astype(layer.kernel.dtype)
            )
        return nnx.from_flat_state(merged)

    # ------------------------------------------------------------------------------------- private

    def _check_name(self, name: str, replace: bool) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name must be a str, got {name!r:.300}")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"an adapter's name must be 1 to 255 characters without '/', '\\' and control "
                f"characters, got {name!r:.300}"
            )
        if name in self._entries and not replace:
            raise ValueError(f"adapter {name!r} is loaded; unload it first, or give replace=True")

    def _check_current(self) -> None:
        check_process()
        if not self._is_current:
            raise RuntimeError("another AdapterBank of this model has taken over its slots")

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            self._check_current()
            if isinstance(name, str) and name in self._entries:
                return self._entries[name]
            gone = self._gone.get(name) if isinstance(name, str) else None
            why = "" if gone is None else f" ({gone})"
            raise KeyError(f"no adapter {name!r:.300}{why}; loaded: {_some(self._entries)}")

    def _forget(self, name: str, why: str) -> None:
        del self._entries[name]
        self._gone[name] = why
        self._gone.move_to_end(name)
        if len(self._gone) > _MAX_GONE:
            self._gone.popitem(last=False)

    def _write(self, commit: Callable[[], None]) -> None:
        """`commit()`, with both locks, and not divided by what signal handlers raise."""
        if self.stepping._is_owned():
            raise RuntimeError(
                "this thread holds bank.stepping, so nothing can be loaded: a load deletes the "
                "arrays that the step reads; load outside of the block"
            )

        def locked() -> None:
            with self.stepping, self._lock:
                self._check_current()
                commit()

        undivided(locked)

    def _dtype(self, module: str) -> Any:
        site = self._sites[module]
        return site.matrices(next(iter(site.stacks)))[0].variable.dtype

    def _check_header(self, name: str, header: AdapterHeader) -> None:
        """Whether the model has room for an adapter, before its weights are read."""
        features = {m: (s.in_features, s.out_features) for m, s in header.modules.items()}
        self._check_fit(name, features)
        self._bucket_for(name, header.rank)

    def _bucket_for(self, name: str, rank: int) -> int:
        bucket = rank_bucket(rank, buckets=tuple(self._slots))
        if bucket not in self._slots:
            raise ValueError(
                f"adapter {name!r} has rank {rank} and needs bucket {bucket}; the model has "
                f"buckets={tuple(self._slots)}: give apply_lora buckets= that hold it"
            )
        return bucket

    def _base_weight(self, module: str) -> np.ndarray:
        """The model's own weight of a PEFT module, `[N, H]`."""
        site = self._sites[module]
        return np.asarray(site.layer.kernel_matrix()[:, site.columns]).T

    def _install(self, name: str, adapter: Adapter, replace: bool) -> None:
        features = {
            module: (weights.a.shape[1], weights.b.shape[0])
            for module, weights in adapter.modules.items()
        }
        self._check_fit(name, features)
        bucket = self._bucket_for(name, adapter.rank)
        # On the device before anything changes: what follows allocates nothing to speak of.
        values = jax.block_until_ready(jax.device_put(self._values(name, adapter, bucket)))
        modules = frozenset(adapter.modules)

        def commit() -> None:
            self._check_name(name, replace)  # another thread may have taken it
            slot, evicted = self._find_slot(bucket, name)
            self._write_slot(bucket, slot, values)
            if evicted is not None:
                self._forget(evicted, f"evicted by the load of {name!r}")
            old = self._entries.pop(name, None)
            pinned = old is not None and old.pinned
            self._entries[name] = _Entry(bucket, slot, adapter.config, modules, pinned)
            self._gone.pop(name, None)

        self._write(commit)

    def _write_slot(self, bucket: int, slot: int, values: list[_OfLayer]) -> None:
        variables = self._variables(bucket)
        arrays = _arrays_of(variables)
        try:
            updated = self._writers[bucket](arrays, np.int32(slot), values)
        except Exception as error:
            if any(array.is_deleted() for array in jax.tree.leaves(arrays)):
                raise RuntimeError(
                    f"the stacks of bucket {bucket} are lost: the device failed while it wrote "
                    "them, or a step kept arrays from before a load; build the model and its bank "
                    "anew, and step under `with bank.stepping`"
                ) from error
            raise
        finally:
            self._guard.writes += 1
        jax.tree.map(lambda v, new: v.set_value(new), variables, updated, is_leaf=_is_variable)

    def _check_fit(self, name: str, features: Mapping[str, tuple[int, int]]) -> None:
        unknown = sorted(set(features) - set(self._sites))
        if unknown:
            raise ValueError(
                f"adapter {name!r} adapts modules without LoRA in this model: "
                f"{_some(unknown, str)}; it has {_some(self._sites, str)}"
            )
        for module, (inputs, outputs) in features.items():
            in_features, out_features = self._sites[module].features
            if (inputs, outputs) != (in_features, out_features):
                raise ValueError(
                    f"adapter {name!r}: {module} maps {in_features} to {out_features} features, "
                    f"but the adapter's lora_A has {inputs} and its lora_B {outputs}"
                )

    def _values(self, name: str, adapter: Adapter, bucket: int) -> list[_OfLayer]:
        """Whole slots: zeros behind the rank and where it adapts nothing."""
        by_layer: dict[int, _OfLayer] = {}
        for module, site in self._sites.items():
            weights = adapter.modules.get(module)
            slot = self._slot_values(name, module, weights, site.matrices(bucket))
            scales, slots = by_layer.setdefault(id(site.layer), ([], []))
            scales.append(0.0 if weights is None else weights.scale)
            slots.extend(slot)
        return [
            (np.array(scales, np.float32), slots)
            for scales, slots in (by_layer[id(layer)] for layer in self._layers)
        ]

    def _slot_values(
        self,
        name: str,
        module: str,
        weights: LoRAWeights | None,
        matrices: tuple[Matrices, Matrices],
    ) -> tuple[np.ndarray, np.ndarray]:
        dtype = matrices[0].variable.dtype
        slots = [of.shape[1:] for of in matrices]
        if weights is None:
            return np.zeros(slots[0], dtype), np.zeros(slots[1], dtype)
        with np.errstate(over="ignore"):
            a, b = (t.astype(dtype, copy=False) for t in (weights.a, weights.b))
        for new, old in (a, weights.a), (b, weights.b):
            if new.dtype != old.dtype and np.any(np.isinf(new) & ~np.isinf(old)):
                raise ValueError(
                    f"adapter {name!r}: weights of {module} overflow the stacks' {dtype}; give "
                    "apply_lora another dtype="
                )
        # Always copies: JAX reads them later, or for ever, and the caller may go on writing his.
        a_slot, b_slot = (np.zeros(slot, dtype) for slot in slots)
        a_slot[: weights.rank], b_slot[:, : weights.rank] = a, b
        return a_slot, b_slot

    def _find_slot(self, bucket: int, name: str) -> tuple[int, str | None]:
        """A slot to write, and whom that evicts. Never a leased one."""
        leased = {slot for lease in self._guard.leases if lease.is_open for slot in lease.slots}
        here = {other: e for other, e in self._entries.items() if e.bucket == bucket}
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
            f"({_some(pinned)}); drop batches, unpin, or give apply_lora "
            "more slots="
        )

    def _compile_writer(self, bucket: int) -> Any:
        arrays = _arrays_of(self._variables(bucket))
        stacks = [[s for s in layer.stacks if s.bucket == bucket] for layer in self._layers]
        firsts = [np.array([s.shape.scales_offset for s in some], np.int32) for some in stacks]
        matrices = [_matrices(layer, bucket) for layer in self._layers]

        def write_slot(
            arrays: list[_OfLayer], slot: jax.Array, values: list[_OfLayer]
        ) -> list[_OfLayer]:
            written = []
            for (scales, held), (new_scales, new), first, some in zip(
                arrays, values, firsts, matrices
            ):
                scales = scales.at[first + slot].set(new_scales)
                for n, (of, value) in enumerate(zip(some, new)):
                    place = n % len(held)  # a flat variable holds all of them
                    held[place] = of.set_slot(held[place], slot, value)
                written.append((scales, held))
            return written

        values = [
            (
                jax.ShapeDtypeStruct(first.shape, jnp.float32),
                [jax.ShapeDtypeStruct(of.shape[1:], of.variable.dtype) for of in some],
            )
            for first, some in zip(firsts, matrices)
        ]
        write = jax.jit(write_slot, donate_argnums=0)
        return write.lower(arrays, jax.ShapeDtypeStruct((), jnp.int32), values).compile()

    def _variables(self, bucket: int) -> list[_OfLayer]:
        """Of each layer its scales, and what holds A and B of its stacks of a bucket."""
        return [
            (
                layer.scales,
                list({id(of.variable): of.variable for of in _matrices(layer, bucket)}.values()),
            )
            for layer in self._layers
        ]

    def _adapter(self, name: str) -> Adapter:
        """The adapter as it stands in the stacks, at the rank at which it stands there."""
        with self.stepping, self._lock:
            entry = self._entry(name)
            slots, slot = {}, np.int32(entry.slot)
            for module in sorted(entry.modules):
                matrices = self._sites[module].matrices(entry.bucket)
                # Slots are fetched whole, as a slice by the true rank would compile for each rank,
                # but alone: what NumPy sees of a stack on the CPU could not be updated in place.
                a, b = (np.asarray(of.slot(of.variable.get_value(), slot)) for of in matrices)
                slots[module] = a, b
        ranks = {
            module: max(entry.config.rank_of(module), _rank_of(a, b))
            for module, (a, b) in slots.items()
        }
        config = _widened(entry.config, ranks)
        modules = {
            module: LoRAWeights(a[: ranks[module]], b[:, : ranks[module]], config.scale_of(module))
            for module, (a, b) in slots.items()
        }
        return Adapter(config, modules)


def guard_of(model: nnx.Module) -> Guard:
    """What the banks of the model share, those to come too; a guard of nothing if it has no LoRA.

    For code that steps while other threads load and does not know the bank::

        guard = guard_of(model)
        with guard.lock:                       # each step
            if guard.writes != seen:
                seen, arrays = guard.writes, [variable.get_value() for variable in variables]
            y = step(arrays, x, batch)
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoRALayer) and module.guard is not None:
            return module.guard
    return Guard()


def _rank_of(a: np.ndarray, b: np.ndarray) -> int:
    """The rank of whole slots: behind it, each column is zero in A or in B."""
    live = np.flatnonzero((a != 0).any(axis=1) & (b != 0).any(axis=0))
    return int(live[-1]) + 1 if live.size else 0


def _widened(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """`config` with these ranks, and the scales that it has."""
    if all(config.rank_of(module) == rank for module, rank in ranks.items()):
        return config
    # The first pattern that matches counts, and a name also matches longer ones that end in it.
    order = sorted(ranks, key=len, reverse=True)
    alphas = {
        module: config.scale_of(module)
        * (math.sqrt(ranks[module]) if config.rslora else ranks[module])
        for module in order
    }
    return dataclasses.replace(
        config,
        rank_pattern={re.escape(module): ranks[module] for module in order},
        alpha_pattern={re.escape(module): alphas[module] for module in order},
    )


def _some(names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The names, or the first of many."""
    shown = [f"{show(name):.80}" for name in names]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return (", ".join(shown[:8]) or "none") + more


def _check_unstacked(name: str, layer: LoRALayer) -> None:
    for stack in layer.stacks:
        for of in layer.matrices(stack):
            shape = of.variable.get_value().shape
            is_one = shape == of.shape if of.first is None else len(shape) == 1
            if not is_one:
                raise ValueError(
                    f"{name}: its stacks are {list(shape)} and should be {list(of.shape)}; layers "
                    "stacked by nnx.vmap or for a scan are not covered yet"
                )


def _matrices(layer: LoRALayer, bucket: int) -> list[Matrices]:
    """A and B of each of a layer's stacks of a bucket."""
    return [of for s in layer.stacks if s.bucket == bucket for of in layer.matrices(s)]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _arrays_of(variables: list[_OfLayer]) -> Any:
    return jax.tree.map(lambda v: v.get_value(), variables, is_leaf=_is_variable)


def _distinct(names_per_row: Sequence[str | None]) -> list[str]:
    """The names in it, in order, each once."""
    if isinstance(names_per_row, Sequence) and not isinstance(names_per_row, str):
        with contextlib.suppress(TypeError):  # what can't be hashed is no name
            distinct = [name for name in dict.fromkeys(names_per_row) if name is not None]
            if all(isinstance(name, str) for name in distinct):
                return distinct
    raise TypeError(f"names_per_row must be a list of names and None, got {names_per_row!r:.300}")


def _common_slots(layers: Mapping[str, LoRALayer]) -> dict[int, int]:
    by_layer = {
        name: {stack.bucket: stack.slots for stack in layer.stacks}
        for name, layer in layers.items()
    }
    first, slots = next(iter(by_layer.items()))
    for name, other in by_layer.items():
        if other != slots:
            raise ValueError(
                f"all layers must have the same slots per bucket: {first} has {slots}, {name} has "
                f"{other}"
            )
    return slots


def _sites(layers: Mapping[str, LoRALayer], peft_names: Mapping[str, Any]) -> dict[str, _Site]:
    unknown = sorted(set(peft_names) - set(layers))
    if unknown:
        raise ValueError(f"peft_names has paths without a LoRA layer: {', '.join(unknown)}")
    sites: dict[str, _Site] = {}
    for path, layer in layers.items():
        count = len(layer.slices)
        names = peft_names.get(path, path if count == 1 else [f"{path}.{i}" for i in range(count)])
        names = [names] if isinstance(names, str) else list(names)
        if len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has {count} slices, peft_names gives {names}")
        for i, name in enumerate(names):
            if name in sites:
                raise ValueError(f"two layers or slices are called {name!r} by peft_names")
            stacks = list(layer.stacks)[i::count]
            sites[name] = _Site(layer, {stack.bucket: stack for stack in stacks})
    return sites
