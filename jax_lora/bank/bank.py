"""`AdapterBank`: loads, evicts, trains and saves the adapters of a model."""

import dataclasses
import os
from collections.abc import Sequence

from flax import nnx

from jax_lora.adapters import (
    Adapter,
    LoRAConfig,
    Rename,
    UploadLimits,
    renamed,
    save_peft,
)
from jax_lora.bank import dora
from jax_lora.bank.checkpoint import Checkpoints
from jax_lora.bank.full import FullSlots
from jax_lora.bank.initial import new_adapter
from jax_lora.bank.merge import as_adapter, merged
from jax_lora.bank.mixes import NamedRow, row_names
from jax_lora.bank.sites import Site, find_sites
from jax_lora.bank.writer import PreparedAdapter, SlotWriter, read_slots
from jax_lora.batch import AdapterBatch, Lease, host_int32
from jax_lora.nn.names import path_name
from jax_lora.tokens import first_ids
from pallas_kernels.routing import static


class AdapterBank(Checkpoints):
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
    tuple of names, one per slice. The path may be that of a module around layers, whose names then
    begin with the name given.

    Where files have two names for a module, a model may have an attribute `peft_rename` too: a
    function from a name that an adapter has to the one in use here.

    Each layer of those that are stacked for a scan has a name of its own: `layers.7.q_proj` of the
    path `layers.q_proj`. Its number stands behind the highest module below the model all of whose
    arrays have the axis of layers. `peft_names` says otherwise with a `{}` for the number, as in
    `{"model.stack.layers": "model.layers.{}"}`.

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

    Several processes of `jax.distributed` may hold a model's stacks together. Each has a bank, and
    all load, create, save and merge the same in one order. Names, weights and slots agree on all,
    or the load fails on all and changes nothing. If a process dies, JAX ends the others,
    `heartbeat_timeout_seconds` of `jax.distributed.initialize` later.

    A plain optimizer's state belongs to slots: an adapter in a reused slot inherits the moments of
    the one before it. Wrap the optimizer in `jax_lora.training.per_adapter`.

    Args:
      model: what `apply_lora` prepared.
      adapters_per_row: how many adapters a row of a batch may have, each with a weight. With one,
        rows have no weights, and a step pays for none; with more, every batch has arrays of
        `[rows, adapters_per_row]`. So no mix of adapters and no weight compiles anything anew.

    Attributes:
      stepping: a re-entrant lock, `threading.RLock`; see above. A load in the thread that holds it
        raises RuntimeError. Clones of the model and its later banks have the same one.
      state: the live `nnx.State` of all stacks and scales, equal in structure to the first state of
        `nnx.split(model, (nnx.LoRAParam, jax_lora.LoRAScale), ...)`. A `jax.jit` loop over pure
        arrays takes it as an argument at each step and so sees every load; arrays taken out of it
        earlier are donated by the next load: JAX then calls them deleted.

    Raises:
      RuntimeError: in the child of a fork, here and in all methods; see `check_process`.
      TypeError: `adapters_per_row` is no int.
      ValueError: the model has no LoRA layers, its layers differ in buckets or slots or are stacked
        along axes that are not in front, or `peft_names` does not fit it; `adapters_per_row` is
        below 1.
    """

    def __init__(self, model: nnx.Module, *, adapters_per_row: int = 1) -> None:
        self._adapters_per_row = static("adapters_per_row", adapters_per_row)
        if self._adapters_per_row < 1:
            raise ValueError(f"adapters_per_row must be at least 1, got {adapters_per_row}")
        super().__init__(model)
        peft_names = getattr(model, "peft_names", {})
        paths = [path_name(path) for path, _ in nnx.iter_modules(model) if path]
        names = self._own_names()
        self._sites: dict[str, Site] = find_sites(self._layers, peft_names, names, paths)
        layers = list(self._layers.values())
        first = first_ids(self._slots.items())
        self._writers = {b: SlotWriter(b, first[b], layers) for b in self._slots}
        self._full = FullSlots(self._sites)
        self._take_over()
        dora.compile_norms(self._sites.values())

    # ------------------------------------------------------------------------ loading and evicting

    def load(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Adapter | PreparedAdapter,
        *,
        replace: bool = False,
        wait: float = 0,
        max_bytes: int | None = None,
        rename: Rename | None = None,
        allow_links: bool = False,
        allow_nonfinite: bool = False,
    ) -> float | None:
        """Puts an adapter into a slot, under `name`. Into stacks in 8 bits it is rounded.

        Args:
          name: any text without `/`, `\\` and control characters.
          adapter: a PEFT folder, or an `Adapter`. NumPy arrays are read before `load` returns.
            Where all are JAX's, on the stacks' one device, in their dtype and of the bucket's rank,
            they go there without the host, by one program for a bucket, which `warmup` or the first
            of them compiles. It reads them when the device comes to it, so copy before (`jnp.copy`)
            what another library goes on writing. Other arrays of JAX are copied to the host, where
            no rank compiles anything. Or what `prepare` made of one, which takes the least time.
          replace: take the place of the adapter of this name. Batches that lease the old one go
            on computing its weights.
          wait: seconds to wait for a slot where all are pinned, leased or reserved. Those who wait
            for the same kind of slot get one in the order of their calls. The thread may not hold
            what keeps the slots, such as the last reference to a batch. The adapter's weights are
            on the device meanwhile. For banks that one process holds.
          max_bytes, allow_links, allow_nonfinite: of a folder; as in `load_peft`. Its shapes are
            checked against the model before a tensor is read.
          rename: from the adapter's names of modules to the model's, as in `load_peft`.

        Returns:
          How far stacks in 8 bits are from the adapter, as `jax-lora inspect --eight-bits` says:
          the largest error of a module, `|B'A' - BA| / |BA|`. None if no module is in 8 bits.

        Raises:
          ValueError: the name is taken or malformed; the files are (see `load_peft`); a module is
            not in the model or has other shapes; experts differ in what they share there; the model
            lacks the bucket; the error in 8 bits is above a tenth.
          FileNotFoundError: files are missing.
          BankFullError: all slots of the bucket, or all full slots of a layer that the adapter has
            whole, are pinned, leased or reserved (`reserve`); and so they were for `wait` seconds.
          RuntimeError: the thread holds `stepping`; or another process does not load the same.

        In each case the bank is as it was.
        """
        with self._agreement.turn() as agree:
            wait = self._checked_wait(wait)
            self._check_name(name, replace)
            if not isinstance(adapter, PreparedAdapter):
                is_own = not isinstance(adapter, Adapter)
                if not isinstance(adapter, Adapter):
                    limits = UploadLimits(
                        max_bytes=max_bytes,
                        allow_links=allow_links,
                        allow_nonfinite=allow_nonfinite,
                    )
                    adapter = self.read(name, adapter, limits=limits, rename=rename)
                elif rename is not None:
                    adapter = renamed(adapter, rename)
                adapter = self.prepare(name, adapter, is_own=is_own)
            self._install(name, adapter, agree, replace=replace, wait=wait)
            return adapter.error

    def create(
        self,
        name: str,
        config: LoRAConfig,
        *,
        rngs: nnx.Rngs,
        replace: bool = False,
        wait: float = 0,
    ) -> None:
        """Puts a new adapter into a slot, to be trained: as PEFT initialises it, so that it adds 0.

        B is zero, and A uniform in ±1/sqrt(H) (kaiming uniform with a = sqrt(5)). In an embedding,
        A is zero, and B normal.
        Train by `nnx.LoRAParam` gradients of the whole stacks: those of adapters that a batch
        lacks are exactly zero. Momentum and weight decay of a plain optimizer still move these, and
        an adapter in a reused slot inherits the moments of the one before it:
        `jax_lora.training.per_adapter` makes an optimizer that does neither. `nnx.update` writes
        all slots: load nothing between `nnx.split` and the `nnx.update` that ends a training run.

        An optimizer that moves what has no gradient at all (`optax.yogi`, `optax.noisy_sgd`) also
        fills the columns between an adapter's rank and its bucket, which then count: `save` writes
        and `merge` folds them too. To stay at the rank, mask them, or multiply them with zero after
        each step.

        Args:
          name, replace, wait: as in `load`.
          config: `target_modules` says which of the model's LoRA layers it adapts, and
            `modules_to_save` which of those with full slots it has whole: the base's weights, to be
            trained.
          rngs: the stream `params` seeds it.

        Raises:
          TypeError: a `config` or `rngs` of another type.
          ValueError: `target_modules` names no layer; the stacks are in 8 bits.

        The others are those of `load`.
        """
        with self._agreement.turn() as agree:
            wait = self._checked_wait(wait)
            self._check_name(name, replace)
            adapter = new_adapter(name, config, rngs, self._sites)
            prepared = self.prepare(name, adapter, is_own=True)
            self._install(name, prepared, agree, replace=replace, wait=wait)

    # ------------------------------------------------------------------------------------- batches

    def batch(
        self,
        names_per_row: Sequence[NamedRow],
        lengths: Sequence[int] | None = None,
        phase: str = "decode",
    ) -> AdapterBatch:
        """The adapters of a batch, and a lease on them.

        Its arrays are NumPy's; `jax.device_put(batch)` places them, for a loop that wants to save
        each step the copy.

        Args:
          names_per_row: adapter of each row; None for the base model. A row of several adapters is
            `{name: weight}`, and gets the sum of what they add, each multiplied by its weight,
            which may be negative: PEFT's `add_weighted_adapter(combination_type="cat")`. A bank
            takes up to `adapters_per_row` of them; the weight of a name alone is 1.
          lengths: tokens of each row, if `x` is flat, `[T, H]`.
          phase: "decode" or "prefill", or "exact" (see `AdapterBatch`).

        Raises:
          KeyError: an adapter is not loaded.
          TypeError, ValueError: `names_per_row`, `lengths` or `phase` are malformed; a row has more
            adapters than `adapters_per_row`, or a weight that is not finite.
        """
        self._check_current()
        rows = row_names(names_per_row, self._adapters_per_row)
        distinct = rows.distinct
        row_lengths = None if lengths is None else host_int32("lengths", lengths)
        with self._lock:
            places = {name: self._entry(name) for name in distinct}
            dora.check_alone(places, rows.mixes)
            ids = {name: self._table.id(entry) for name, entry in places.items()}
            self._full.check_alone(ids, rows.mixes)
            indices, weights = rows.arrays(ids, self._adapters_per_row)
            lease = Lease(frozenset((e.bucket, e.slot) for e in places.values()))
            # NumPy leaves: a step's launch takes the kilobyte along; placing it here would be most
            # of the time that a batch takes.
            batch = AdapterBatch(
                indices,
                row_lengths,
                weights=weights,
                ranges=tuple(self._slots.items()),
                phase=phase,
                lease=lease,
                guard=self._guard,
            )
            self._table.touch(distinct)
            self._guard.leases.add(lease)
        return batch

    # ------------------------------------------------------------------------- getting weights out

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Writes an adapter, as it is now, to a folder that PEFT reads; see `save_peft`.

        PEFT does not read what experts share where it is written once, as one tensor for all.
        `load_peft`, SGLang and vLLM do.

        What is written computes what the adapter's rows do, so its rank is larger than the config's
        where training has filled columns behind that (see `create`). Out of stacks in 8 bits it
        writes float32, of these bytes: not the weights that were loaded.

        Where several processes hold the model, the first writes the folder, and the others wait.

        Raises:
          KeyError: it is not loaded.
          ValueError: see `save_peft`.
        """
        adapter = self._adapter(name, "save")
        with self._agreement.turn() as agree:
            if self._agreement.is_first:
                save_peft(adapter, path)
            agree(f"have saved {name!r}")

    def merge(self, name: str) -> nnx.State:
        """The model's base parameters, with an adapter folded into the kernels that it adapts.

        `nnx.update(plain_model, bank.merge(name))` makes a model without LoRA that computes what
        the adapter's rows do. Sums are float32, rounded once to the kernel's dtype.

        Raises:
          KeyError: it is not loaded.
          ValueError: it adapts a layer that shares its kernel with another.
        """
        return merged(self._model, self._adapter(name, "merge"), self._sites)

    # ------------------------------------------------------------------------------------- private

    def _adapter(self, name: str, purpose: str = "read") -> Adapter:
        """The adapter as it stands in the stacks, at the rank at which it stands there."""
        with self._agreement.turn() as agree, self.stepping, self._lock:
            entry = self._entry(name)
            agree(f"{purpose} {name!r} of slot {entry.slot} of bucket {entry.bucket}")
            sites = {module: self._sites[module] for module in sorted(entry.modules)}
            slots = read_slots(sites, entry)
            full = self._full.read(self._table.id(entry))
            return dataclasses.replace(as_adapter(entry, slots, sites), full=full)
