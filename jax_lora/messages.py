"""Text from uploaded files in messages: bounded, in one line, without control characters.

Whoever uploads an adapter chooses its names and values, and messages with them reach terminals and
logs. Escape codes can rewrite a terminal, line feeds forge lines of a log, and marks of direction
show a text backwards.
"""

import re
import reprlib
from os import PathLike

# Controls but for tab and line feed, line separators, marks of direction, surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str | PathLike[str], limit: int = 300) -> str:
    """The text with all that is not printable escaped, cut in the middle to `limit` characters."""
    text = _cut(str(text), limit)
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _cut("".join(escaped), limit)


def shown(value: object, limit: int = 100) -> str:
    """The `repr` of a value, cut in the middle to `limit` characters; nested values are cut too."""
    # A repr escapes what is not printable; what another type's may leave, `printable` does.
    return printable(_Repr(limit).repr(value), limit)


def without_controls(text: str) -> str:
    """The text as it is, but for escaped codes that move a terminal's cursor or turn its text."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


class _Repr(reprlib.Repr):
    def __init__(self, limit: int) -> None:
        super().__init__(maxlevel=4, maxstring=limit, maxlong=limit, maxother=limit)
