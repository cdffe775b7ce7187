"""The folder of adapters: which are there, and which a client may have loaded."""

import os
from collections.abc import Iterator
from pathlib import Path

from jax_lora.messages import shown
from jax_lora.serving.engine import Engine
from jax_lora.serving.server.errors import ApiError, without_places


def folder_adapters(root: Path) -> dict[str, Path]:
    """The adapters right below a folder, by name. Links that leave it are not among them."""
    return {folder.name: folder for folder in _below(root.resolve())}


def _below(root: Path) -> Iterator[Path]:
    for config in sorted(root.glob("[!.]*/adapter_config.json")):
        if config.resolve().is_relative_to(root):
            yield config.parent


class AdapterFolder:
    """Loads and unloads an engine's adapters, from below one folder alone."""

    def __init__(self, engine: Engine, root: Path | None, base_name: str) -> None:
        self._engine, self._base_name = engine, base_name
        self._root = None if root is None else root.resolve()

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Reads and checks an adapter, and gives requests its name.

        Raises:
          ApiError: 400, the path leaves the folder, or the adapter is malformed or does not fit
            the model's slots; 404, there is none; 409, the name is taken.
        """
        folder = self._inside(path)
        names = self._engine.adapters
        if name == self._base_name or (name in names and not replace):
            raise ApiError(409, f"the name {shown(name)} is taken", param="lora_name")
        bank = self._engine.bank
        if bank is None:
            raise ApiError(400, "the server has no slots for adapters")
        try:
            bank.check_name(name)
            bank.prepare(name, bank.read(name, folder, limits=self._engine.limits))
            self._engine.add_adapter(name, folder, replace=replace)
        except FileNotFoundError as error:
            raise ApiError(404, self._told(error), param="lora_path") from None
        except (ValueError, TypeError, OSError) as error:
            raise ApiError(400, self._told(error), param="lora_path") from None

    def unload(self, name: str) -> None:
        """Forgets an adapter. Raises ApiError 404 where there is none of this name."""
        try:
            self._engine.remove_adapter(name)
        except KeyError:
            message = f"there is no adapter {shown(name)}"
            raise ApiError(404, message, param="lora_name") from None

    def _told(self, error: Exception) -> str:
        return without_places(error, self._root)

    def _inside(self, path: str) -> Path:
        if self._root is None:
            raise ApiError(400, "the server was started without a folder of adapters")
        try:
            found = Path(os.path.realpath(self._root / path))
        except (ValueError, OSError):  # such as a zero byte
            found = self._root
        if found == self._root or not found.is_relative_to(self._root):
            raise ApiError(
                400,
                f"lora_path must lead to a folder below the server's, got {shown(path)}",
                param="lora_path",
            )
        if not found.is_dir():
            raise ApiError(404, f"there is no folder {shown(path)}", param="lora_path")
        return found
