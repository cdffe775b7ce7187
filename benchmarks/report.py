"""What a run of `python -m benchmarks kernels` found, and whether it meets its targets."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.cases import MAX_ONE_LAUNCH, Case

PEERS = ("vllm", "csgmv", "sgl_v2")
# A time of a case with twice the tokens may be shorter by as much as two runs of one case differ.
_NOISE = 1.02
# What shuffled tokens may take, in times of the same tokens in runs; and up to how many tokens.
_SHUFFLED, _SHUFFLED_MANY, _SHUFFLED_TOKENS = 1.3, 2.0, 1024


@dataclasses.dataclass(frozen=True)
class Span:
    """Cases of which the geometric mean over the best peer is to be `aim` at least."""

    name: str
    least: int
    most: int
    aim: float


_PHASES = Span("decode", 1, MAX_ONE_LAUNCH, 1.8), Span("prefill", MAX_ONE_LAUNCH + 1, 1 << 30, 1.15)
_BETWEEN = (Span("65 <= T <= 3072", 65, 3072, 1.4),)
# By the name of a set of cases; the phases for others.
SPANS = {"grid": _BETWEEN, "sweep": _BETWEEN, "between": _BETWEEN}


@dataclasses.dataclass(frozen=True)
class Result:
    """Microseconds of one case; None where something did not run, with the reason in `notes`.

    `floor` is at COPY_RATE, the same for all devices, and `floor_here` at the device's own rate.
    """

    case: Case
    floor: float
    floor_here: float | None
    ours: float | None
    xla: float
    tokamax: float | None
    peers: dict[str, float]
    notes: list[str]

    @property
    def best_peer(self) -> float | None:
        return min(self.peers.values(), default=None)

    @property
    def speed_up(self) -> float | None:
        """Over the best peer."""
        return None if self.ours is None or self.best_peer is None else self.best_peer / self.ours

    @property
    def slower_than(self) -> list[str]:
        """The peers, and XLA's forms, that take less time than ours."""
        others = {"XLA": self.xla, **self.peers}
        return [name for name, us in others.items() if self.ours is not None and us < self.ours]


@dataclasses.dataclass(frozen=True)
class Mean:
    """The geometric mean of a span's speed-ups over the best peer, and the aim for it."""

    name: str
    cases: int
    speed_up: float
    aim: float

    @property
    def met(self) -> bool:
        return self.speed_up >= self.aim


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How many cases a target was held against, and what missed it, the worst first."""

    target: str
    cases: int
    missed: list[str]

    @property
    def met(self) -> bool:
        return not self.missed


class Held(NamedTuple):
    """A case held against a target: what it took, and what it may take."""

    target: str
    case: Case
    us: float
    most: float
    than: str  # what `most` is

    @property
    def over(self) -> float:
        return self.us / self.most

    def __str__(self) -> str:
        times = f"{self.us:.2f} us, {self.over:.2f} x {self.most:.2f}"
        return f"{self.case.label}: {times} ({self.than})"


def aim_us(tokens: int, floor: float) -> float:
    """The most that a case in runs or of a mix may take."""
    return 1.05 * floor + 3 if tokens <= MAX_ONE_LAUNCH else 1.08 * floor + 5


@dataclasses.dataclass(frozen=True)
class Report:
    """All cases of a run, of the set with that `name`, if it has one.

    Rates are bytes and operations per second, None without a GPU. `failed` says which cases gave a
    wrong result or none, and so are not among the results.
    """

    name: str | None
    device: str
    date: str
    copy_rate: float | None
    matmul_rate: float | None
    results: list[Result]
    failed: list[str] = dataclasses.field(default_factory=list)

    def aim(self, result: Result) -> float | None:
        """The most microseconds that a case may take: by its floor, or shuffled, by the same case
        in runs, None if that was not timed."""
        if not result.case.shuffle:
            return aim_us(result.case.T, result.floor)
        of_runs = {each.case: each.ours for each in self.results}.get(result.case.in_runs)
        few = result.case.T <= _SHUFFLED_TOKENS
        return None if of_runs is None else of_runs * (_SHUFFLED if few else _SHUFFLED_MANY)

    def met(self, result: Result) -> bool | None:
        aim = self.aim(result)
        return None if result.ours is None or aim is None else result.ours <= aim

    @property
    def means(self) -> list[Mean]:
        """For the spans with cases that ours and a peer ran."""
        means = []
        for span in SPANS.get(self.name or "", _PHASES):
            inside = [r for r in self.results if span.least <= r.case.T <= span.most]
            if ratios := [r.speed_up for r in inside if r.speed_up]:
                means.append(Mean(span.name, len(ratios), geometric_mean(ratios), span.aim))
        return means

    @property
    def verdicts(self) -> list[Verdict]:
        """Each target that cases were held against."""
        by_target: dict[str, list[Held]] = {}
        for held in self._held():
            by_target.setdefault(held.target, []).append(held)
        return [
            Verdict(target, len(cases), [str(held) for held in _over(cases)])
            for target, cases in by_target.items()
        ]

    def _held(self) -> Iterator[Held]:
        """Each timed case against each of its targets."""
        timed = {result.case: result.ours for result in self.results if result.ours is not None}
        for result in self.results:
            if (us := timed.get(result.case)) is None:
                continue
            if result.case.shuffle:
                yield from _against_runs(result.case, us, self.aim(result))
            else:
                yield from _against_floors(result, us)
            others = {"XLA": result.xla, **result.peers}
            best = min(others, key=lambda name: others[name])
            target = "no slower than the best of vLLM, SGLang and XLA"
            yield Held(target, result.case, us, others[best], best)
        yield from _against_double(timed)

    def to_dict(self) -> dict[str, Any]:
        results = [self._row(result) for result in self.results]
        means = [{**dataclasses.asdict(mean), "met": mean.met} for mean in self.means]
        verdicts = [{**dataclasses.asdict(each), "met": each.met} for each in self.verdicts]
        return {
            **dataclasses.asdict(self),
            "results": results,
            "means": means,
            "verdicts": verdicts,
        }

    def _row(self, result: Result) -> dict[str, Any]:
        names = "best_peer", "speed_up", "slower_than"
        derived = {name: getattr(result, name) for name in names}
        verdict = {"aim": self.aim(result), "met": self.met(result)}
        return {**dataclasses.asdict(result), "label": result.case.label, **derived, **verdict}

    def save(self, path: Path) -> None:
        """Writes `to_dict` as JSON: all of it, or nothing if the process ends meanwhile."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote.

        Raises:
          OSError: the file can't be read.
          ValueError: it is no such report.
        """
        try:
            given = json.loads(path.read_text())
            results = [_of_fields(Result, row) for row in given["results"]]
            results = [
                dataclasses.replace(r, case=_of_fields(Case, row["case"]))
                for r, row in zip(results, given["results"])
            ]
            return _of_fields(cls, {**given, "results": results})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            what = f"{type(error).__name__}: {str(error)!r:.200}"
            raise ValueError(f"{str(path)!r:.99} is no saved report of kernels: {what}") from None


def _against_floors(result: Result, us: float) -> Iterator[Held]:
    few = result.case.T <= MAX_ONE_LAUNCH
    least, tokens = ("1.05", "3 us up to") if few else ("1.08", "5 us beyond")
    for floor, which in ((result.floor, ""), (result.floor_here, " of this device")):
        if floor is not None:
            target = f"{least} x floor{which} + {tokens} T={MAX_ONE_LAUNCH}"
            most = aim_us(result.case.T, floor)
            yield Held(target, result.case, us, most, f"floor {floor:.2f}")


def _against_runs(case: Case, us: float, most: float | None) -> Iterator[Held]:
    few = case.T <= _SHUFFLED_TOKENS
    times, tokens = (_SHUFFLED, "up to") if few else (_SHUFFLED_MANY, "beyond")
    target = f"shuffled at most {times:g} x the same in runs {tokens} T={_SHUFFLED_TOKENS}"
    if most is not None:
        yield Held(target, case, us, most, f"{times:g} x {most / times:.2f} in runs")


def _against_double(timed: dict[Case, float]) -> Iterator[Held]:
    """Cases in equal runs against those of twice the tokens, and as many or more adapters."""
    for case, us in timed.items():
        for more, twice in timed.items():
            if more.T == 2 * case.T and more.D >= case.D and _family(case) == _family(more):
                target = "no slower than with twice the tokens"
                yield Held(
                    target, case, us, _NOISE * twice, f"{_NOISE} x that of T={more.T} D={more.D}"
                )


def _family(case: Case) -> object:
    """What a case has in common with those that differ in T and D; of uneven ones, itself."""
    if case.lengths or case.ranks or case.shuffle:
        return case
    return case.r, case.H, case.N, case.L


def _over(cases: list[Held]) -> list[Held]:
    """Those that take more than they may, the worst first."""
    return sorted((held for held in cases if held.us > held.most), key=lambda held: -held.over)


def _of_fields[C](cls: type[C], row: dict[str, Any]) -> C:
    return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def join(reports: Sequence[Report]) -> Report:
    """The cases of several reports in one, in their order; rates are the mean of theirs.

    Raises:
      ValueError: no report; reports of different devices, or of one case twice.
    """
    if not reports:
        raise ValueError("there must be at least one report to join")
    devices = sorted({report.device for report in reports})
    if len(devices) > 1:
        raise ValueError(f"reports of different devices can't be joined: {', '.join(devices):.200}")
    results = [result for report in reports for result in report.results]
    seen: set[Case] = set()
    for result in results:
        if result.case in seen:
            raise ValueError(f"{result.case.label} is in several of the reports")
        seen.add(result.case)
    names = {report.name for report in reports}
    return Report(
        names.pop() if len(names) == 1 else None,
        devices[0],
        max(report.date for report in reports),
        _mean([report.copy_rate for report in reports]),
        _mean([report.matmul_rate for report in reports]),
        results,
        [line for report in reports for line in report.failed],
    )


def _mean(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None
