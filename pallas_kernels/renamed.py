"""Names that are gone: using one is an error that names the new form."""

import functools
from collections.abc import Callable


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
