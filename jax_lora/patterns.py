"""PEFT's rank and alpha patterns, matched in bounded time.

Whoever uploads an adapter writes its patterns, and `re` takes exponential time on some. Here a
pattern is a function from the positions in a name where it may start to those where it may end: at
most (length of the pattern) x (length of the name) x (length of the longest match) steps.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

MAX_PATTERNS = 8192
"""Most patterns of one kind in a config; tools that choose ranks write one for each module."""

type _Step = Callable[[str, set[int]], set[int]]

_PLAIN = re.compile(r"[\w.-]*", re.ASCII)
_TOKEN = re.compile(
    r"\\[dwsDWS]|\\[^\w\s]|\[\^?(?:\w(?:-\w)?|[._]|\\[dws.-])+\]|\(\?:|[()|.^$]|[*+?]\??|[\w/ -]",
    re.ASCII,
)


def first_match[T](patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches, as PEFT's `get_pattern_key` chooses it."""
    for pattern, value in patterns.items():
        tail, matches = matcher(pattern)
        if module.endswith(tail) and matches(module):
            return value
    return default


@lru_cache(maxsize=2 * MAX_PATTERNS)
def matcher(pattern: str) -> tuple[str, Callable[[str], bool]]:
    """A suffix of all names that match, and `name -> re.match(rf"(.*\\.)?({pattern})$", name)`."""
    if not isinstance(pattern, str) or len(pattern) > 512:
        raise ValueError(
            f"a pattern must be a string of at most 512 characters, got {pattern!r:.100}"
        )
    if _PLAIN.fullmatch(pattern):  # nearly all are; a dot in them still is any character
        return pattern.rpartition(".")[2], lambda name: _ends_with(name, pattern)
    tokens = _TOKEN.findall(pattern)
    step: _Step | None = None
    if "".join(tokens) == pattern and pattern.count("(") <= 32:  # they nest
        tokens.reverse()
        try:
            step, _ = _parse(tokens)
        except (IndexError, re.error):
            step = None
    if step is None or tokens:
        raise ValueError(
            f"the pattern {pattern!r} is malformed, or uses regular expression syntax that is not "
            "supported (look-around, back-references, flags, counted or nested repeats); write it "
            "with names, '.', classes, groups, '|' and '* + ?'"
        )
    whole = step
    return (
        "",
        lambda name: len(name) in whole(name, {0, *(m.end() for m in re.finditer(r"\.", name))}),
    )


def _ends_with(name: str, plain: str) -> bool:
    start = len(name) - len(plain)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(p in (".", c) for p, c in zip(plain, name[start:], strict=True))


def _parse(tokens: list[str]) -> tuple[_Step, bool]:
    """Pops one pattern, up to a bracket, off the reversed tokens; also, whether it repeats."""
    branches: list[list[_Step]] = [[]]
    any_repeats = False
    while tokens and tokens[-1] != ")":
        token, repeats = tokens.pop(), False
        if token == "|":
            branches.append([])
            continue
        if token in ("(", "(?:"):
            step, repeats = _parse(tokens)
            tokens.pop()
        elif token in ("^", "$"):
            step = _anchor(token)
        else:
            step = _character(re.compile(token))
        if tokens and tokens[-1][0] in "*+?":
            kind = tokens.pop()[0]
            if kind != "?" and repeats:
                raise IndexError  # nested repeats would take polynomial time of any degree
            step, repeats = _repeat(step, kind), repeats or kind != "?"
        branches[-1].append(step)
        any_repeats |= repeats

    def run(name: str, at: set[int]) -> set[int]:
        ends: set[int] = set()
        for branch in branches:
            here = at
            for step in branch:
                here = step(name, here)
            ends |= here
        return ends

    return run, any_repeats


def _character(regex: re.Pattern[str]) -> _Step:
    return lambda name, at: {i + 1 for i in at if i < len(name) and regex.match(name, i)}


def _anchor(token: str) -> _Step:
    return lambda name, at: at & {0 if token == "^" else len(name)}


def _repeat(step: _Step, kind: str) -> _Step:
    def run(name: str, at: set[int]) -> set[int]:
        ends = set(at) if kind != "+" else set()
        while at := step(name, at) - ends:
            ends |= at
            if kind == "?":
                break
        return ends

    return run
