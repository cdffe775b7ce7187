"""Reading adapters' files for a model: what does not fit it is refused before it is read."""

import os

import numpy as np

from jax_lora.adapters import Adapter, AdapterHeader, Rename, load_peft, peft_header
from jax_lora.bank import dora
from jax_lora.bank.roster import Roster
from jax_lora.bank.sites import Site, check_fit
from jax_lora.bank.tokens import check_tokens


class AdapterReader(Roster):
    """What a bank reads from the disk, before any slot is touched: a base of `AdapterBank`."""

    _sites: dict[str, Site]  # by PEFT's names

    def read(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        rename: Rename | None = None,
        allow_links: bool = False,
        allow_nonfinite: bool = False,
    ) -> Adapter:
        """What `load` would put into a slot, for one that comes later. No slot changes.

        Arguments and errors are those of `load`.
        """

        def check(header: AdapterHeader) -> None:
            self._check_header(name, header)

        return load_peft(
            path,
            check=check,
            base_weight=self._base_weight,
            max_bytes=max_bytes,
            rename=rename,
            allow_links=allow_links,
            allow_nonfinite=allow_nonfinite,
        )

    def check(self, name: str, adapter: Adapter) -> int:
        """Whether the model has room for an adapter; the bucket that it goes to.

        Raises:
          ValueError: a module is not in the model or has other shapes; the model lacks the bucket.
        """
        return self._check_header(name, adapter.header)

    def check_folder(
        self, name: str, path: str | os.PathLike[str], *, allow_links: bool = False
    ) -> int:
        """What `check` says of a PEFT folder, by its config and the headers of its files alone.

        Raises:
          FileNotFoundError, ValueError: as `load`, but for what only weights can tell.
        """
        return self._check_header(name, peft_header(path, allow_links=allow_links))

    def _check_header(self, name: str, header: AdapterHeader) -> int:
        """The bucket of an adapter, before its weights are read, if the model has room for it."""
        check_fit(name, header, self._sites)
        check_tokens(name, header, self._sites)
        features = {m: (s.in_features, s.out_features) for m, s in header.modules.items()}
        dora.check_room(name, header.config.dora, features, self._sites)
        return self._bucket_for(name, header.rank)

    def _base_weight(self, module: str) -> np.ndarray:
        """The model's own weight of a PEFT module, as PEFT stores it."""
        if module not in self._sites:
            raise ValueError(
                f"the files have a copy of the base model's weight of {module}, which has no LoRA "
                "in this model to be compared with; name it in apply_lora's target, or save the "
                "adapter with save_pretrained(path, save_embedding_layers=False)"
            )
        if self._agreement.is_shared:  # not all processes may come to read it
            raise ValueError(
                f"the adapter has a copy of the base model's weight of {module}, which several "
                "processes hold together; save it with save_embedding_layers=False"
            )
        return np.asarray(self._sites[module].base_weight())
