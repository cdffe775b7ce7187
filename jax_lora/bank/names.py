"""What adapters may be called."""

import re

# No separators, no control characters, not "." or "..": a name may end up in somebody's path.
_NAME = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f/\\]{1,255}")


def check_name(name: str) -> None:
    """Whether an adapter may be called so; else TypeError or ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {name!r:.300}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"an adapter's name must be 1 to 255 characters without '/', '\\' and control "
            f"characters, got {name!r:.300}"
        )
