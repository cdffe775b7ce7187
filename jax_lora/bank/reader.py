"""Reading and preparing adapters for a model: what does not fit it is refused before it is read."""

import os
from collections.abc import Callable

import jax
from flax import nnx

from jax_lora.adapters import Adapter, AdapterHeader, Rename, UploadLimits, renamed
from jax_lora.bank import dora
from jax_lora.bank.eight_bits import in_eight_bits
from jax_lora.bank.publish import (
    Publisher,
    compile_copies,
    on_host,
    stays_on_device,
    values_on_device,
)
from jax_lora.bank.shared import check_values
from jax_lora.bank.tokens import with_whole_tokens
from jax_lora.bank.writer import PreparedAdapter, slot_values


class AdapterReader(Publisher):
    """What a bank does with an adapter before any slot is touched: a base of `AdapterBank`."""

    def warmup(self) -> None:
        """Compiles what the bank runs besides loads from the host, so that none of it does later.

        That is `publish` within the bank, `create`, `save`, `save_checkpoint`, and loads of arrays
        that are on the device. No slot changes. `Engine.warmup` does this too.

        Raises:
          RuntimeError: another bank of the model has taken over.
        """
        with self.stepping, self._lock:
            self._check_current()
            for writer in self._writers.values():
                compile_copies(writer, self._sites, list(self._layers.values()))
        jax.random.key_data(nnx.Rngs(0).params())  # what `create` asks its `rngs` for

    def read(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        limits: UploadLimits | None = None,
        rename: Rename | None = None,
    ) -> Adapter:
        """What `load` would put into a slot, for one that comes later. No slot changes.

        Arguments and errors are those of `load`; `limits` has the bounds.
        """

        def check(header: AdapterHeader) -> None:
            self._check_header(name, header)

        limits = limits or UploadLimits()
        rename = rename or self._rename
        return limits.read(path, check=check, base_weight=self._base_weight, rename=rename)

    def prepare(self, name: str, adapter: Adapter, *, is_own: bool = False) -> PreparedAdapter:
        """An adapter as its slot will hold it, for `load`. No slot changes.

        Args:
          name: what messages call it.
          is_own: nobody writes the adapter's arrays any more, so they need not be copied.

        Raises:
          ValueError: as `load`.
        """
        adapter = renamed(adapter, self._rename)
        bucket = self._check_header(name, adapter.header)
        adapter = with_whole_tokens(adapter, self._sites)
        layers, writer = list(self._layers.values()), self._writers[bucket]
        if not stays_on_device(adapter, bucket, self._sites):
            adapter = on_host(adapter)
        check_values(name, adapter.modules, self._sites)
        small = {m: w for m, w in adapter.modules.items() if self._sites[m].is_eight_bits}
        held = in_eight_bits(name, small, {m: self._sites[m].dtype for m in small})
        if not small and stays_on_device(adapter, bucket, self._sites):
            values = values_on_device(adapter.modules, writer, self._sites, layers)
        else:
            values = slot_values(
                name, adapter, writer, self._sites, layers, is_own=is_own, held=held.modules
            )
        if adapter.config.dora:
            dora.put_rescale(values, adapter, self._sites, layers)
        error = held.largest if small else None
        return PreparedAdapter(adapter, bucket, values, is_own, self._guard, error)

    def check(self, name: str, adapter: Adapter) -> int:
        """Whether the model has room for an adapter; the bucket that it goes to.

        Raises:
          ValueError: a module is not in the model or has other shapes; the model lacks the bucket.
        """
        return self._check_header(name, renamed(adapter, self._rename).header)

    def check_folder(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        limits: UploadLimits | None = None,
        allow_links: bool = False,
    ) -> int:
        """What `check` says of a PEFT folder, by its config and the headers of its files alone.

        Raises:
          FileNotFoundError, ValueError: as `load`, but for what only weights can tell; or it
            exceeds `limits`.
        """
        limits = limits or UploadLimits(allow_links=allow_links)
        return self._check_header(name, limits.header(path, rename=self._rename))

    @property
    def _rename(self) -> Callable[[str], str] | None:
        """The model's own `peft_rename`, for modules that files have two names for."""
        found: Callable[[str], str] | None = getattr(self._model, "peft_rename", None)
        return found
