"""Packages that import their names when one is used: the command line need not wait for JAX."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping


def lazy_names(
    package: str, gone: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, for the modules in it and the names of its `api`.

    `gone` says of names that it had what to write instead.
    """

    def load() -> dict[str, object]:
        names = vars(importlib.import_module(f"{package}.api"))
        mine = vars(sys.modules[package])
        mine.update({name: value for name, value in names.items() if not name.startswith("_")})
        return mine

    def getattr_(name: str) -> object:
        if gone and name in gone:
            raise AttributeError(f"{package}.{name} is gone: {gone[name]}")
        if name.isidentifier() and not name.startswith("_"):
            if importlib.util.find_spec(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
            if name in (mine := load()):
                return mine[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def dir_() -> list[str]:
        return sorted(load())

    return getattr_, dir_
