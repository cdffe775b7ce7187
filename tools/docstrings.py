"""Docstrings as the site shows them: `::` at the end of a line opens code in reStructuredText, and
Markdown shows both colons."""

import re
from typing import override

import griffe


class OneColon(griffe.Extension):
    @override
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
