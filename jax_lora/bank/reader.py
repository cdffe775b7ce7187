"""Reading adapters' files for a model: what does not fit it is refused before it is read."""

import os

from jax_lora.adapters import Adapter, AdapterHeader, Rename, load_peft, peft_header
from jax_lora.bank.publish import Publisher


class AdapterReader(Publisher):
    """What a bank reads from the disk, before any slot is touched: a base of `AdapterBank`."""

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
