"""Regular expressions of PEFT's configs, matched in bounded time.

Whoever uploads an adapter writes its patterns, and `re` takes exponential time on some. Here an
expression maps the set of positions in a name where it may start to the set where it may end. A set
is an int with a bit for each position, so that a step over all of them is a few operations.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from jax_lora.messages import shown

MAX_PATTERNS = 8192
"""Most patterns or names of one kind in a config; some tools write one for each module."""

MAX_PATTERN = 512
"""Most characters of a pattern in `rank_pattern` and `alpha_pattern`."""

MAX_EXPRESSION = 8192
"""Most characters of an expression in `target_modules`; some tools list every module in one."""

MAX_EXPRESSIONS = 1 << 16
"""Most characters that the patterns with special characters of one kind have together."""

MAX_WORK = 1 << 22
"""Most steps of all patterns of a config over all modules of an adapter: about a second."""

_PLAIN = re.compile(r"(?:[\w.-]|\\[.-])*", re.ASCII)
_UNIT = re.compile(r"\\?.")
_TOKEN = re.compile(
    r"\\[dwsDWSbB]|\\[^\w\s]|\[\^?(?:\w(?:-\w)?|[._]|\\[dws.-])+\]|\(\?[:=!]|[()|.^$]|[*+?]\??"
    r"|\{\d{1,3}(?:,\d{0,3})?\}\??|[\w/ -]",
    re.ASCII,
)
_MAX_COUNT = 64  # of {m,n}
_ASCII = "".join(map(chr, range(128)))


class Name:
    """A module's name, and where its characters stand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 1 << len(text)
        self.after_dots = 1
        self.places: dict[str, int] = {}
        for i, char in enumerate(text):
            self.places[char] = self.places.get(char, 0) | 1 << i
        self.after_dots |= self.places.get(".", 0) << 1
        self._masks: dict[str, int] = {}
        self._edges: int | None = None

    def mask(self, chars: str) -> int:
        """The positions of all characters that are among `chars`."""
        if len(chars) == 1:
            return self.places.get(chars, 0)
        found = self._masks.get(chars)
        if found is None:
            found = sum(bits for char, bits in self.places.items() if char in chars)
            self._masks[chars] = found
        return found

    def edges(self) -> int:
        """The positions between a word character and another, or an end of the name."""
        if self._edges is None:
            word = sum(bits for char, bits in self.places.items() if char.isalnum() or char == "_")
            self._edges = word ^ word << 1
        return self._edges


class _Node(Protocol):
    @property
    def work(self) -> int: ...  # steps, each time that it runs

    @property
    def closure(self) -> int: ...  # steps, for each character of the name

    @property
    def repeats(self) -> bool: ...

    def run(self, name: Name, at: int) -> int: ...


@dataclass(frozen=True)
class _Chars:
    chars: str
    work = 1
    closure = 0
    repeats = False

    def run(self, name: Name, at: int) -> int:
        return (at & name.mask(self.chars)) << 1


@dataclass(frozen=True)
class _Run:
    """Any number of characters, none included."""

    chars: str
    work = 3
    closure = 0
    repeats = True

    def run(self, name: Name, at: int) -> int:
        # The carry runs from each start to the end of its row of fitting characters.
        mask = name.mask(self.chars)
        return at | ((at & mask) + mask) ^ mask


@dataclass(frozen=True)
class _Anchor:
    token: str
    work = 1
    closure = 0
    repeats = False

    def run(self, name: Name, at: int) -> int:
        match self.token:
            case "^":
                return at & 1
            case "$":
                return at & name.end
            case r"\b":
                return at & name.edges()
        return at & ~name.edges()


@dataclass(frozen=True)
class _Group:
    branches: tuple[tuple[_Node, ...], ...]
    work: int
    closure: int
    repeats: bool

    @classmethod
    def of(cls, branches: list[list[_Node]]) -> "_Group":
        nodes = [node for branch in branches for node in branch]
        return cls(
            tuple(map(tuple, branches)),
            1 + sum(node.work for node in nodes),
            sum(node.closure for node in nodes),
            any(node.repeats for node in nodes),
        )

    def run(self, name: Name, at: int) -> int:
        ends = 0
        for branch in self.branches:
            here = at
            for node in branch:
                if not here:
                    break
                here = node.run(name, here)
            ends |= here
        return ends


@dataclass(frozen=True)
class _Repeat:
    """`least` to `most` times; `most` None for any number."""

    node: _Node
    least: int
    most: int | None

    @property
    def work(self) -> int:
        return 1 + self.node.work * (self.least if self.most is None else self.most)

    @property
    def closure(self) -> int:
        times = self.least if self.most is None else self.most
        return self.node.closure * times + (self.node.work if self.most is None else 0)

    @property
    def repeats(self) -> bool:
        return self.most is None or self.node.repeats

    def run(self, name: Name, at: int) -> int:
        for _ in range(self.least):
            at = self.node.run(name, at)
        ends, rounds = at, 0
        while at and (self.most is None or rounds < self.most - self.least):
            at = self.node.run(name, at) & ~ends
            ends |= at
            rounds += 1
        return ends


@dataclass(frozen=True)
class _Ahead:
    """Look-ahead: the positions from which `node` matches, or doesn't."""

    node: _Node
    negative: bool
    work = 1
    repeats = True  # so that it is not repeated

    @property
    def closure(self) -> int:
        return self.node.work

    def run(self, name: Name, at: int) -> int:
        kept, rest = 0, at
        while rest:
            one = rest & -rest
            rest ^= one
            if bool(self.node.run(name, one)) != self.negative:
                kept |= one
        return kept


def expression(pattern: str, limit: int = MAX_EXPRESSION) -> _Node:
    """Parses a regular expression.

    Raises:
      ValueError: it is too long, malformed, or has syntax that can't be run in bounded time.
    """
    if len(pattern) > limit:
        raise ValueError(
            f"a pattern may have {limit} characters, got {len(pattern)}: {shown(pattern)}"
        )
    tokens = _TOKEN.findall(pattern)
    node: _Node | None = None
    if "".join(tokens) == pattern and _depth(tokens) <= 32:
        tokens.reverse()
        try:
            node = _parse(tokens)
        except (IndexError, re.error):
            node = None
    if node is None or tokens or node.work + node.closure > MAX_WORK:
        raise ValueError(
            f"the pattern {shown(pattern)} is malformed, or uses regular expression syntax that is "
            "not supported (look-behind, back-references, flags, nested repeats); write it with "
            "names, '.', classes, groups, '|', look-ahead and the repeats '* + ? {m,n}'"
        )
    return node


def _depth(tokens: list[str]) -> int:
    depth = deepest = 0
    for token in tokens:
        depth += (token[0] == "(") - (token == ")")
        deepest = max(deepest, depth)
    return deepest


def _parse(tokens: list[str]) -> _Node:
    """Pops one expression, up to a bracket, off the reversed tokens."""
    branches: list[list[_Node]] = [[]]
    while tokens and tokens[-1] != ")":
        token = tokens.pop()
        if token == "|":
            branches.append([])
            continue
        node: _Node
        if token[0] in "*+?{":
            raise IndexError  # a repeat of nothing
        if token[0] == "(":
            node = _parse(tokens)
            tokens.pop()
            if token in ("(?=", "(?!"):
                if node.closure:
                    raise IndexError  # look-ahead in look-ahead: any degree of the name's length
                node = _Ahead(node, negative=token == "(?!")
        elif token in ("^", "$", r"\b", r"\B"):
            node = _Anchor(token)
        else:
            node = _Chars(_matching(token))
        if tokens and tokens[-1][0] in "*+?{":
            node = _repeated(node, tokens.pop())
        branches[-1].append(node)
    return _Group.of(branches)


def _matching(token: str) -> str:
    if len(token) == 1 and token != ".":
        return token
    regex = re.compile(token)
    return "".join(filter(regex.fullmatch, _ASCII))


def _repeated(node: _Node, token: str) -> _Node:
    token = token if len(token) == 1 else token.removesuffix("?")  # lazy: the same matches
    if token[0] == "{":
        first, comma, last = token[1:-1].partition(",")
        least = int(first)
        most = int(last) if last else None if comma else least
    else:
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[token]
    counts = least, least if most is None else most
    if not 0 <= counts[0] <= counts[1] <= _MAX_COUNT or (node.repeats and counts[1] > 1):
        raise IndexError
    if most is None:
        if node.repeats:
            raise IndexError  # nested repeats would take polynomial time of any degree
        if isinstance(node, _Chars) and least <= 1:
            rest = _Run(node.chars)
            return rest if least == 0 else _Group.of([[node, rest]])
    return _Repeat(node, least, most)


@dataclass
class Expression:
    """A whole name's regular expression, as `re.fullmatch` takes it.

    Raises:
      ValueError: see `expression`.
    """

    pattern: str

    def __post_init__(self) -> None:
        self._node = expression(self.pattern)

    def work(self, length: int) -> int:
        """Steps that a name of this length takes."""
        return self._node.work + self._node.closure * length

    def matches(self, name: str) -> bool:
        place = Name(name)
        return bool(self._node.run(place, 1) & place.end)


@dataclass
class Names:
    """Names, or ends of names behind a dot."""

    names: frozenset[str]

    def work(self, length: int) -> int:
        return 1

    def matches(self, name: str) -> bool:
        return any(end in self.names for end in _ends(name))


def _ends(name: str) -> Iterable[str]:
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


@dataclass
class Patterns[T]:
    """Patterns of names, as PEFT's `get_pattern_key` takes them: the first that matches counts.

    A pattern matches a name if `re.match(rf"(.*\\.)?({pattern})$", name)` does.

    Raises:
      TypeError: a pattern is no string.
      ValueError: there are too many, or see `expression`.
    """

    values: Mapping[str, T]
    _plain: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict, init=False)
    _special: list[tuple[int, _Node]] = field(default_factory=list, init=False)
    _found: dict[str, T | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._ordered = tuple(self.values.values())
        special = 0
        for order, pattern in enumerate(self.values):
            if not isinstance(pattern, str):
                raise TypeError(f"a pattern must be a string, got {shown(pattern)}")
            if len(pattern) <= MAX_PATTERN and _PLAIN.fullmatch(pattern):  # nearly all are
                # A dot in them still is any character, but for an escaped one: the form says where.
                units = _UNIT.findall(pattern)
                anything = (i for i, unit in enumerate(units) if unit == ".")
                text = "".join(unit[-1] for unit in units)
                self._plain.setdefault((len(units), *anything), {}).setdefault(text, order)
                continue
            special += len(pattern)
            if special > MAX_EXPRESSIONS:
                raise ValueError(
                    f"patterns with special characters have over {MAX_EXPRESSIONS} characters "
                    "together; name modules instead"
                )
            self._special.append((order, expression(pattern, MAX_PATTERN)))

    def work(self, length: int) -> int:
        """Steps that a name of this length takes."""
        return 3 * len(self._plain) + sum(n.work + n.closure * length for _, n in self._special)

    def first(self, name: str) -> T | None:
        """The value of the first pattern that matches; None if none does."""
        if name not in self._found:
            order = self._order(name)
            self._found[name] = None if order is None else self._ordered[order]
        return self._found[name]

    def _order(self, name: str) -> int | None:
        best = len(self.values)
        if self._plain:
            ends = {len(end): end for end in _ends(name)}
            for (length, *anything), patterns in self._plain.items():
                if (end := ends.get(length)) is not None:
                    chars = list(end)
                    for i in anything:
                        chars[i] = "."
                    best = min(best, patterns.get("".join(chars), best))
        if self._special:
            place = Name(name)
            for order, node in self._special:
                if order > best:
                    break
                if node.run(place, place.after_dots) & place.end:
                    best = order
                    break
        return best if best < len(self.values) else None
