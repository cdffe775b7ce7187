"""Times `y += (x A^T) B^T`: our kernels, XLA's forms, and the kernels of vLLM and SGLang."""

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    COPY_RATE,
    ceilings,
    loop_us,
    rounds_of,
    sets_to_rotate,
    turn,
)
from pallas_kernels import Segments, add_lora, make_segments
from pallas_kernels.dispatch import prefers_xla

try:  # a comparison, where someone has installed it
    from tokamax import ragged_dot  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    ragged_dot = None

PEERS = ("vllm", "csgmv", "sgl_v2")
# What the geometric mean over the best peer is to be, by phase.
AIMS = {"decode": 1.8, "prefill": 1.15}

# Each call in a turn takes time to compile: one round of the sets does where it is this long.
_LONG_TURN_US = 2000
_MAX_ERROR = 1e-2  # of bfloat16 results, relative, as the peers are checked


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens that use D of L adapters of rank r, in runs of equal length."""

    T: int
    D: int
    r: int
    H: int = 4096
    N: int = 4096
    L: int = 64

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be an int of at least 1, got {value!r}")
        if self.T < self.D or self.L < self.D or self.T % self.D:
            raise ValueError(f"D must divide T and be at most L, got {self}")

    @property
    def phase(self) -> str:
        return "decode" if self.T <= 256 else "prefill"

    @property
    def label(self) -> str:
        shape = "" if (self.H, self.N) == (4096, 4096) else f" {self.H}x{self.N}"
        return f"T={self.T} D={self.D} r={self.r}{shape}"

    def floor_us(self, matmul_rate: float) -> float:
        """The least microseconds: of each half, bytes at COPY_RATE or operations at `matmul_rate`.

        Bytes: each adapter in use once, x once, y read and written.
        """
        shrink = 2 * (self.D * self.r * self.H + self.T * self.H)
        expand = 2 * (self.D * self.r * self.N + 2 * self.T * self.N)
        operations = [2 * self.T * self.r * features for features in (self.H, self.N)]
        halves = zip((shrink, expand), operations)
        return 1e6 * sum(max(b / COPY_RATE, ops / matmul_rate) for b, ops in halves)


_MIXES = ((1, 1), (16, 16), (64, 64), (64, 8), (64, 1), (256, 64), (4096, 32), (4096, 1))
_SHAPES = ((4096, 14336), (14336, 4096), (2048, 2048))
CASES = [Case(t, d, r) for r in (8, 16, 64, 128) for t, d in _MIXES]
CASES += [Case(64, 8, 16, h, n) for h, n in _SHAPES]
# Ranks and tokens beyond those; of the ranks, 16 slots exceed the L2 cache as it is.
_LARGE = [Case(t, 8, r, L=16) for r in (256, 512) for t in (64, 4096)]
_LARGE += [Case(8192, 32, 16), Case(8192, 1, 128)]
_BETWEEN = (
    *((256, 8, 128), (512, 4, 16), (512, 32, 16), (512, 8, 64)),
    *((1024, 8, 16), (1024, 64, 64), (2048, 8, 16)),
)
# What `--cases` takes by name. On 2026-11-28 peers won two of those in between.
SETS = {"large": _LARGE, "between": [Case(*mix) for mix in _BETWEEN]}


@dataclasses.dataclass(frozen=True)
class Result:
    """Microseconds of one case; None where something did not run, with the reason in `notes`."""

    case: Case
    floor: float
    ours: float | None
    xla: float
    tokamax: float | None
    peers: dict[str, float]
    notes: list[str]

    @property
    def best_peer(self) -> float | None:
        return min(self.peers.values(), default=None)

    @property
    def aim(self) -> float:
        return 1.05 * self.floor + 3

    @property
    def met(self) -> bool | None:
        return None if self.ours is None else self.ours <= self.aim

    @property
    def speed_up(self) -> float | None:
        """Over the best peer."""
        return None if self.ours is None or self.best_peer is None else self.best_peer / self.ours

    @property
    def slower_than(self) -> list[str]:
        """The peers, and XLA's forms, that take less time than ours."""
        others = {"XLA": self.xla, **self.peers}
        return [name for name, us in others.items() if self.ours is not None and us < self.ours]

    def to_dict(self) -> dict[str, Any]:
        names = "best_peer", "aim", "met", "speed_up", "slower_than"
        verdicts = {name: getattr(self, name) for name in names}
        return {**dataclasses.asdict(self), "label": self.case.label, **verdicts}


@dataclasses.dataclass(frozen=True)
class Mean:
    """The geometric mean of a phase's speed-ups over the best peer, and the aim for it."""

    phase: str
    cases: int
    speed_up: float
    aim: float

    @property
    def met(self) -> bool:
        return self.speed_up >= self.aim


@dataclasses.dataclass(frozen=True)
class Report:
    """All cases of a run. Rates in bytes and operations per second, None without a GPU."""

    device: str
    date: str
    copy_rate: float | None
    matmul_rate: float | None
    results: list[Result]

    @property
    def means(self) -> list[Mean]:
        """For the phases with cases that ours and a peer ran."""
        means = []
        for phase, aim in AIMS.items():
            ratios = [r.speed_up for r in self.results if r.case.phase == phase and r.speed_up]
            if ratios:
                means.append(Mean(phase, len(ratios), geometric_mean(ratios), aim))
        return means

    def to_dict(self) -> dict[str, Any]:
        results = [result.to_dict() for result in self.results]
        means = [{**dataclasses.asdict(mean), "met": mean.met} for mean in self.means]
        return {**dataclasses.asdict(self), "results": results, "means": means}


def cases_of(name: str | None) -> list[Case]:
    """CASES for None, one of SETS by its name, else what `read_cases` reads from that file."""
    if name is None:
        return CASES
    return SETS[name] if name in SETS else read_cases(Path(name))


def read_cases(path: Path) -> list[Case]:
    """Cases from a JSON list of objects with T, D, r and, unless 4096, 4096, 64, H, N, L.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is malformed or a case can't be.
    """
    try:
        return [Case(**case) for case in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must be a JSON list of objects like {CASES[0]}: {error}"
        ) from None


def run(cases: Sequence[Case], peers: Path | None, progress: Callable[[str], None]) -> Report:
    """Times the cases, the peers first, in a process of their own that then frees the GPU.

    Raises:
      FileNotFoundError: `peers` is not a folder that benchmarks/peers/fetch.sh made.
      RuntimeError: a result of ours is wrong, or the peers' process failed.
    """
    measured: list[dict[str, Any]] = [{} for _ in cases]
    if peers is not None:
        progress(f"timing {', '.join(PEERS)}")
        measured = _run_peers(cases, peers)
    on_gpu = jax.default_backend() == "gpu"
    copy_rate, matmul_rate = ceilings() if on_gpu else (None, None)
    results = []
    for case, row in zip(cases, measured):
        progress(f"timing {case.label}")
        times, notes = _time_case(case, on_gpu)
        by_peer = {peer: row[peer] for peer in PEERS if isinstance(row.get(peer), float)}
        notes += [f"{peer} {row[peer]}" for peer in PEERS if isinstance(row.get(peer), str)]
        floor = case.floor_us(matmul_rate or float("inf"))
        ours, tokamax = times.get("ours"), times.get("tokamax")
        # Lest a run that is cut off has told nothing.
        progress(f"{case.label} takes {times['xla' if ours is None else 'ours']:,.2f} us")
        results.append(Result(case, floor, ours, times["xla"], tokamax, by_peer, notes))
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return Report(device, date, copy_rate, matmul_rate, results)


def _run_peers(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    script = folder / "peer_bench.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"{script} is missing; make the folder with benchmarks/peers/fetch.sh"
        )
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary, "cases.json"), Path(temporary, "out.json")
        given.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        command = [sys.executable, str(script), "--cases", str(given), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return rows


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def weight_sets(case: Case) -> list[Any]:
    """(y, x, a, b) of random data, as often as it takes to exceed the L2 cache."""
    count = sets_to_rotate(2 * case.L * case.r * (case.H + case.N))
    shapes: list[tuple[int, ...]] = [(case.T, case.N), (case.T, case.H)]
    shapes += [(case.L, case.r, case.H), (case.L, case.N, case.r)]
    scales = (1, 1, case.H**-0.5, 1)
    keys = jax.random.split(jax.random.key(0), (count, 4))
    return [
        tuple(
            (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
            for key, shape, scale in zip(row, shapes, scales)
        )
        for row in keys
    ]


def segments_of(case: Case) -> Segments:
    """The tokens' adapters."""
    used = np.random.default_rng(0).permutation(case.L)[: case.D].astype(np.int32)
    return make_segments(np.repeat(used, case.T // case.D), case.L)


def expected(case: Case, sets: list[Any], segments: Segments) -> jax.Array:
    """What a call gives of the first set, in float32."""
    y, x, a, b = (t.astype(jnp.float32) for t in sets[0])
    return add_lora(y, x, a, b, segments, phase="prefill", implementation="xla")


def check(name: str, case: Case, got: jax.Array, want: jax.Array) -> None:
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    if not error < _MAX_ERROR:
        raise RuntimeError(f"{name} is wrong at {case}: relative error {error:.1e}")


def _time_case(case: Case, on_gpu: bool) -> tuple[dict[str, float], list[str]]:
    """Microseconds by form: "ours" on a GPU, by default the kernels, "xla" by the better of its two
    forms, "tokamax" where that is installed."""
    sets, segments = weight_sets(case), segments_of(case)
    want = expected(case, sets, segments)
    calls = {"xla, sgmv": _add_lora(segments, "xla", "prefill")}
    if case.phase == "decode":  # else it would gather the weights of each of thousands of tokens
        calls["xla, bgmv"] = _add_lora(segments, "xla", "decode")
    forms = list(calls)
    by_xla = prefers_xla(case.T, case.r, case.phase)
    if on_gpu and not by_xla:
        calls["ours"] = _add_lora(segments, "mosaic_gpu", case.phase)
    if ragged_dot is not None:
        calls["tokamax"] = _ragged_dots(segments, ragged_dot)
    rounds, times, notes = rounds_of(sets), {}, []

    def us(call: Callable[..., Any], rounds: int) -> float:
        return loop_us(turn(call, rounds), sets, rounds * len(sets))

    for name, call in calls.items():
        try:
            check(name, case, jax.jit(call)(*sets[0]), want)
        except NotImplementedError as lacking:
            notes.append(f"{name}: {lacking}" if name == "tokamax" else str(lacking))
            continue
        times[name] = us(call, rounds if name == "ours" else 1)
    better = min(forms, key=lambda form: times[form])
    times["xla"], calls["xla"] = times[better], calls[better]
    for name in ("xla", "tokamax"):
        if name in times and rounds > 1 and times[name] * len(sets) < _LONG_TURN_US:
            times[name] = us(calls[name], rounds)
    if on_gpu and by_xla:
        times["ours"] = times["xla" if better == "xla, bgmv" else "xla, bgmv"]
        notes.append("ours is XLA's form, by default for so few tokens")
    return times, notes


def _add_lora(segments: Segments, implementation: Any, phase: str) -> Callable[..., jax.Array]:
    def call(y: Any, x: Any, a: Any, b: Any) -> jax.Array:
        return add_lora(y, x, a, b, segments, phase=phase, implementation=implementation)

    return call


def _ragged_dots(segments: Segments, dot: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Both halves as grouped products of the rows sorted by adapter; every token has one."""
    slots = jnp.arange(segments.num_adapters)
    sizes = jnp.sum(segments.indices == slots[:, None], axis=1, dtype=jnp.int32)
    rows = segments.rows

    def call(y: Any, x: Any, a: Any, b: Any) -> jax.Array:
        v = dot(x[rows], a.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)
        delta = dot(
            v.astype(b.dtype), b.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32
        )  # fmt: skip
        return (y.astype(jnp.float32)).at[rows].add(delta).astype(y.dtype)

    return call


def check_plot(path: Path) -> None:
    """Whether `plot` can write there, as a run may take minutes.

    Raises:
      ValueError: matplotlib is not installed, or does not know the file's ending, or there is no
        such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"plot {str(path)!r} must end with one of .{', .'.join(endings)}")
    if not path.parent.is_dir():
        raise ValueError(f"plot {str(path)!r}: there is no folder {str(path.parent)!r}")


def plot(report: Report, path: Path) -> None:
    """Two pictures in one file: time against the floor, and speed-up over the best peer.

    Raises:
      ValueError: `check_plot` does.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    labels = [result.case.label for result in report.results]
    rows = np.arange(len(labels))
    figure = Figure(figsize=(13, 1.5 + 0.26 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    series: dict[str, list[float | None]] = {
        "floor": [result.floor for result in report.results],
        "jax-lora": [result.ours for result in report.results],
        "XLA": [result.xla for result in report.results],
        "tokamax": [result.tokamax for result in report.results],
        **{p: [result.peers.get(p) for result in report.results] for p in PEERS},
    }
    for (name, values), marker in zip(series.items(), "|osPv^D"):
        points = [(v, row) for v, row in zip(values, rows) if v is not None]
        if points:
            left.plot(*zip(*points), marker, label=name, markersize=12 if name == "floor" else 5)
    left.set(xscale="log", xlabel="microseconds per call", yticks=rows, yticklabels=labels)
    left.invert_yaxis()
    left.legend()
    compared = [(row, r.speed_up) for row, r in zip(rows, report.results) if r.speed_up]
    if compared:
        right.barh(*zip(*compared), color=["C2" if ratio >= 1 else "C3" for _, ratio in compared])
    right.axvline(1, color="black", linewidth=1)
    right.set(xlabel="speed-up over the best of vLLM and SGLang")
    figure.suptitle(f"y += (x Aᵀ) Bᵀ in bfloat16 on {report.device}, {report.date}")
    figure.savefig(path, dpi=120)
