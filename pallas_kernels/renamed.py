"""Names that are gone: using one is an error that names the new form."""

import functools
from collections.abc import Callable, Mapping
from typing import NoReturn


def removed_keywords[**P, T](**gone: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function that had more keywords; `gone` says of each what to write instead."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in gone.keys() & kwargs.keys():
                owner = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{owner} takes no {name}= any more: {gone[name]}")
            return function(*args, **kwargs)

        return call

    return decorate


def removed_names(module: str, gone: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module's `__getattr__`; `gone` says of each name what to write instead."""

    def getattr_(name: str) -> NoReturn:
        if name in gone:
            raise AttributeError(f"{module}.{name} is gone: {gone[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_
