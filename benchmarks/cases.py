"""What the kernels are timed on: how many tokens, whose they are, and the adapters' shapes."""

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.timing import COPY_RATE

MAX_ONE_LAUNCH = 256  # tokens of a decode; more are a prefill


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens that use D of L adapters of rank r.

    Attributes:
      T, D, r: the tokens, the adapters in use, and the largest of their ranks.
      H, N: features of x and of y.
      L: slots, shared out among the buckets.
      lengths: tokens of each adapter in use; empty for equal ones, up to one.
      shuffle: whether the tokens stand in random order; else those of each adapter are a run.
      ranks: of each adapter in use, of which each value is a bucket; empty where all are r.

    Raises:
      ValueError: a case that can't be.
    """

    T: int
    D: int
    r: int
    H: int = 4096
    N: int = 4096
    L: int = 64
    lengths: tuple[int, ...] = ()
    shuffle: bool = False
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("T", "D", "r", "H", "N", "L"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r:.60}")
        if type(self.shuffle) is not bool:
            raise ValueError(f"shuffle must be true or false, got {self.shuffle!r:.60}")
        if self.T < self.D or self.L < self.D:
            raise ValueError(f"D={self.D} must be at most T={self.T} and L={self.L}")
        for name in ("lengths", "ranks"):
            self._check_list(name)
        if self.lengths and sum(self.lengths) != self.T:
            raise ValueError(f"lengths must sum to T={self.T}, they sum to {sum(self.lengths)}")
        if self.ranks and max(self.ranks) != self.r:
            raise ValueError(f"r={self.r} must be the largest of ranks, {max(self.ranks)}")

    def _check_list(self, name: str) -> None:
        given = getattr(self, name)
        if not isinstance(given, list | tuple) or any(type(n) is not int or n < 1 for n in given):
            raise ValueError(f"{name} must be a list of ints of at least 1, got {given!r:.60}")
        if given and len(given) != self.D:
            raise ValueError(f"{name} must hold D={self.D} ints, got {len(given)}")
        object.__setattr__(self, name, tuple(given))  # a list in JSON

    @property
    def phase(self) -> str:
        return "decode" if self.T <= MAX_ONE_LAUNCH else "prefill"

    @property
    def label(self) -> str:
        ranks = "/".join(map(str, sorted({*self.adapter_ranks})))
        words = [f"T={self.T} D={self.D} r={ranks}"]
        if (self.H, self.N) != (4096, 4096):
            words.append(f"{self.H}x{self.N}")
        if self.lengths:
            words.append(f"{min(self.lengths)}-{max(self.lengths)} each")
        return " ".join([*words, *["shuffled"] * self.shuffle])

    @property
    def runs(self) -> tuple[int, ...]:
        """Tokens of each adapter in use."""
        each, more = divmod(self.T, self.D)
        return self.lengths or tuple(each + (n < more) for n in range(self.D))

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """The rank of each adapter in use."""
        return self.ranks or (self.r,) * self.D

    @property
    def slots(self) -> dict[int, int]:
        """Slots of each bucket by rank, in the order of ids: equal shares of L, or as many as are
        in use."""
        used = collections.Counter(self.adapter_ranks)
        return {rank: max(self.L // len(used), used[rank]) for rank in sorted(used)}

    @property
    def first_slots(self) -> dict[int, int]:
        """The id of each bucket's first slot, by rank."""
        return dict(zip(self.slots, itertools.accumulate(self.slots.values(), initial=0)))

    @property
    def in_runs(self) -> "Case":
        """The same tokens, those of each adapter as a run."""
        return dataclasses.replace(self, shuffle=False)

    def ids(self) -> np.ndarray:
        """The adapter of each token."""
        rng = np.random.default_rng(0)
        first = self.first_slots
        free = {rank: iter(first[rank] + rng.permutation(n)) for rank, n in self.slots.items()}
        used = np.array([next(free[rank]) for rank in self.adapter_ranks], np.int32)
        ids = np.repeat(used, self.runs)
        return rng.permutation(ids) if self.shuffle else ids

    def floor_us(self, matmul_rate: float, copy_rate: float = COPY_RATE) -> float:
        """The least microseconds: of each half, bytes at `copy_rate` or operations at
        `matmul_rate`.

        Bytes: each adapter in use once, at its own rank; x once; y read and written.
        """
        ranks = sum(self.adapter_ranks)
        moved = (
            2 * (ranks * self.H + self.T * self.H),
            2 * (ranks * self.N + 2 * self.T * self.N),
        )
        products = sum(n * rank for n, rank in zip(self.runs, self.adapter_ranks))
        operations = (2 * products * self.H, 2 * products * self.N)
        halves = zip(moved, operations)
        return 1e6 * sum(max(b / copy_rate, ops / matmul_rate) for b, ops in halves)


# ------------------------------------------------------------------------------- sets with a name

_MIXES = ((1, 1), (16, 16), (64, 64), (64, 8), (64, 1), (256, 64), (4096, 32), (4096, 1))
_SHAPES = ((4096, 14336), (14336, 4096), (2048, 2048))
CASES = [Case(t, d, r) for r in (8, 16, 64, 128) for t, d in _MIXES]
CASES += [Case(64, 8, 16, h, n) for h, n in _SHAPES]
# Ranks and tokens beyond those; of the ranks, 16 slots exceed the L2 cache as it is.
_LARGE = [Case(t, 8, r, L=16) for r in (256, 512) for t in (64, 4096)]
_LARGE += [Case(8192, 32, 16), Case(8192, 1, 128)]
# On 2026-11-28 peers won two of these.
_BETWEEN = (
    *((256, 8, 128), (512, 4, 16), (512, 32, 16), (512, 8, 64)),
    *((1024, 8, 16), (1024, 64, 64), (2048, 8, 16)),
)
# Powers of two, what lies between them, and both sides of where the kernels change.
_SWEEP = (
    *(1, 2, 4, 8, 16, 32, 48, 64, 65, 96, 128, 130, 192, 256, 257, 384, 512, 514),
    *(768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
)
SETS = {
    "large": _LARGE,
    "between": [Case(*mix) for mix in _BETWEEN],
    "sweep": [Case(t, min(t, d), r) for d, r in ((8, 16), (64, 64)) for t in _SWEEP],
}

# The grid: what large decode batches, chunks of prompts and short prompts are made of.
TOKENS = (65, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (16, 32, 64, 128)
FEATURES = (2048, 4096, 8192, 14336, 28672)


def zipf(tokens: int, adapters: int) -> tuple[int, ...]:
    """Lengths that fall as 1/k from the first adapter on; each has a token."""
    weights = 1 / np.arange(1, adapters + 1)
    lengths = 1 + np.floor((tokens - adapters) * weights / weights.sum()).astype(int)
    lengths[0] += tokens - lengths.sum()
    return tuple(lengths.tolist())


def _corners() -> list[Case]:
    ends = [(values[0], values[-1]) for values in (TOKENS, ADAPTERS, RANKS, FEATURES, FEATURES)]
    return [Case(t, d, r, h, n) for t, d, r, h, n in itertools.product(*ends)]


def _steps() -> list[Case]:
    """What a serving step with chunked prefill holds, and mixed ranks."""
    decode = (1,) * 63
    cases = [
        Case(64 + chunk, 64, r, lengths=(*decode, chunk + 1))  # the last adapter decodes too
        for chunk in (192, 448, 1984)
        for r in (16, 64, 128)
    ]
    for r in (16, 64):
        cases += _both(Case(512, 32, r))
    cases.append(Case(256, 8, 128, ranks=RANKS * 2))
    cases.append(Case(512, 64, 128, lengths=(*decode, 449), ranks=RANKS * 16))
    cases.append(Case(2048, 16, 128, lengths=zipf(2048, 16), ranks=RANKS * 4))
    return cases + _both(Case(512, 32, 128, ranks=RANKS * 8))


def _both(case: Case) -> list[Case]:
    """In runs, and the same shuffled."""
    return [case, dataclasses.replace(case, shuffle=True)]


def _draw(rng: np.random.Generator, tokens: int) -> list[Case]:
    """One case of the grid; a shuffled one with the same in runs."""

    def pick(values: Sequence[int]) -> int:
        return int(rng.choice(values))

    form = rng.choice(("equal", "equal", "zipf", "shuffled", "shuffled zipf", "ranks"))
    adapters = pick(ADAPTERS if form == "equal" else ADAPTERS[1:])
    ranks = tuple(pick(RANKS) for _ in range(adapters)) if form == "ranks" else ()
    r = max(ranks) if ranks else pick(RANKS)
    lengths = zipf(tokens, adapters) if "zipf" in form else ()
    case = Case(tokens, adapters, r, pick(FEATURES), pick(FEATURES), lengths=lengths, ranks=ranks)
    return _both(case) if "shuffled" in form else [case]


def grid(seed: int, count: int) -> list[Case]:
    """`count` cases: all corners of the grid, the mixes of serving steps, and others drawn from the
    grid by `seed`.

    Raises:
      ValueError: `count` holds less than the corners and the mixes, or `seed` is negative.
    """
    cases = dict.fromkeys(_corners() + _steps())
    if not len(cases) <= count <= 1000:
        raise ValueError(f"the grid has from {len(cases)} to 1000 cases, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)
    tokens = itertools.cycle(rng.permutation(TOKENS).tolist())  # so that each is drawn as often
    while len(cases) < count:
        drawn = _draw(rng, next(tokens))
        if len(cases) + len({*drawn} - {*cases}) <= count:
            cases.update(dict.fromkeys(drawn))
    return list(cases)


def name_of(cases: str | None) -> str | None:
    """The name of a set of cases, of the grid too; None for a file, and for CASES."""
    name = (cases or "").partition(":")[0]
    return name if name == "grid" or cases in SETS else None


def cases_of(cases: str | None, seed: int | None = None) -> list[Case]:
    """CASES for None, 120 of `grid` for "grid" and 200 for "grid:200", those of SETS by name, else
    what that file holds.

    Raises:
      OSError: no such file, or none that can be read.
      ValueError: the file is malformed, or a case can't be; a seed for another set than the grid;
        a number of cases or a seed that is out of range.
    """
    if name_of(cases) == "grid":
        found = re.fullmatch(r"grid(?::(\d{1,9}))?", cases or "")
        if found is None:
            raise ValueError(
                f"the grid is named grid, or grid:200 for 200 cases, got {cases!r:.60}"
            )
        return grid(0 if seed is None else seed, int(found[1] or 120))
    if seed is not None:
        raise ValueError(f"a seed is for the cases named grid, got cases {cases!r:.60}")
    if cases is None:
        return CASES
    return SETS[cases] if cases in SETS else _read(Path(cases))


def _read(path: Path) -> list[Case]:
    if not path.exists():
        names = ", ".join(["grid", *SETS])
        raise FileNotFoundError(
            f"cases must be one of {names}, or a file; there is no {str(path)!r:.99}"
        )
    try:
        return [Case(**case) for case in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        example = '{"T": 64, "D": 8, "r": 16}'
        raise ValueError(
            f"{str(path)!r:.99} must be a JSON list of objects like {example}: {str(error)!r:.200}"
        ) from None


def part_of(cases: Sequence[Case], part: str) -> list[Case]:
    """The part "k/n" of the cases. A shuffled case is in the same part as the same in runs.

    Raises:
      ValueError: `part` is no such fraction, or holds no case.
    """
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", part)
    nth, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= nth <= parts:
        raise ValueError(f"part must be K/N with K from 1 to N, such as 1/2, got {part!r:.60}")
    together: dict[Case, list[Case]] = {}
    for case in cases:
        together.setdefault(case.in_runs, []).append(case)
    chosen = [case for group in list(together.values())[nth - 1 :: parts] for case in group]
    if not chosen:
        raise ValueError(f"part {part} of {len(cases)} cases holds none")
    return chosen
