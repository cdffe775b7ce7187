"""Times `y += (x A^T) B^T`: our kernels, XLA's forms, and the kernels of vLLM and SGLang."""

import dataclasses
import json
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

from jax_lora.bench.timing import COPY_RATE, ceilings, loop_us
from pallas_kernels import Segments, add_lora, make_segments

try:  # a comparison, where someone has installed it
    from tokamax import ragged_dot  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    ragged_dot = None

PEERS = ("vllm", "csgmv", "sgl_v2")

# Weight sets are rotated so that together they exceed the L2 cache (50 MB) several times over.
_ROTATED_BYTES = 200_000_000
# Calls in one turn of the timed loop: a turn costs some 20 us itself (H100), which the graphs that
# peers are timed in do not have.
_CALLS = 64
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

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "label": self.case.label, "best_peer": self.best_peer}


@dataclasses.dataclass(frozen=True)
class Report:
    """All cases of a run. Rates in bytes and operations per second, None without a GPU."""

    device: str
    date: str
    copy_rate: float | None
    matmul_rate: float | None
    results: list[Result]

    def to_dict(self) -> dict[str, Any]:
        results = [result.to_dict() for result in self.results]
        return {**dataclasses.asdict(self), "results": results}


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
      FileNotFoundError: `peers` is not a folder that tests/peers/fetch.sh made.
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
        xla = min(times[name] for name in ("bgmv", "sgmv") if name in times)
        ours, tokamax = times.get("mosaic_gpu"), times.get("tokamax")
        results.append(Result(case, floor, ours, xla, tokamax, by_peer, notes))
    device = jax.devices()[0].device_kind
    return Report(device, time.strftime("%Y-%m-%d"), copy_rate, matmul_rate, results)


def _run_peers(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    script = folder / "peer_bench.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script} is missing; make the folder with tests/peers/fetch.sh")
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary, "cases.json"), Path(temporary, "out.json")
        given.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        command = [sys.executable, str(script), "--cases", str(given), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return rows


def _make(case: Case) -> tuple[list[Any], np.ndarray]:
    """Weight sets (y, x, a, b) of random data, and the tokens' adapters."""
    adapter_bytes = 2 * case.L * case.r * (case.H + case.N)
    if jax.default_backend() == "gpu":
        count = max(4, min(16, -(-_ROTATED_BYTES // adapter_bytes)))
    else:
        count = 1
    shapes: list[tuple[int, ...]] = [(case.T, case.N), (case.T, case.H)]
    shapes += [(case.L, case.r, case.H), (case.L, case.N, case.r)]
    scales = (1, 1, case.H**-0.5, 1)
    keys = jax.random.split(jax.random.key(0), (count, 4))
    sets = [
        tuple(
            (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
            for key, shape, scale in zip(row, shapes, scales)
        )
        for row in keys
    ]
    used = np.random.default_rng(0).permutation(case.L)[: case.D].astype(np.int32)
    return sets, np.repeat(used, case.T // case.D)


def _time_case(case: Case, on_gpu: bool) -> tuple[dict[str, float], list[str]]:
    """Microseconds by form: "mosaic_gpu" where it runs, XLA's "bgmv" and "sgmv", "tokamax" where
    that is installed."""
    sets, ids = _make(case)
    segments = make_segments(ids, case.L)
    y, x, a, b = (t.astype(jnp.float32) for t in sets[0])
    expected = add_lora(y, x, a, b, segments, phase="prefill", implementation="xla")
    forms = {"bgmv": ("xla", "decode"), "sgmv": ("xla", "prefill")}
    if case.T > 256:
        del forms["bgmv"]  # it would gather the weights of each of thousands of tokens
    if on_gpu:
        forms = {"mosaic_gpu": ("mosaic_gpu", case.phase), **forms}
    calls = {name: _add_lora(segments, *form) for name, form in forms.items()}
    if ragged_dot is not None:
        calls["tokamax"] = _ragged_dots(segments, ragged_dot)
    times, notes = {}, []
    rounds = -(-_CALLS // len(sets)) if on_gpu else 1
    for name, call in calls.items():
        try:
            error = _relative_error(jax.jit(call)(*sets[0]), expected)
        except NotImplementedError as lacking:
            notes.append(f"{name}: {lacking}" if name == "tokamax" else str(lacking))
            continue
        if not error < _MAX_ERROR:
            raise RuntimeError(f"{name} is wrong at {case}: relative error {error:.1e}")

        once = jax.jit(call)  # lowered once, however often it is called

        def body(carry: Any, once: Any = once) -> Any:
            for _ in range(rounds):
                # The barrier makes x depend on the loop, so that no half is hoisted out of it.
                carry = jax.lax.optimization_barrier(carry)
                carry = [(once(y, x, a, b), x, a, b) for y, x, a, b in carry]
            return carry

        times[name] = loop_us(body, sets, rounds * len(sets))
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


def _relative_error(got: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def plot(report: Report, path: Path) -> None:
    """Two pictures in one file: time against the floor, and speed-up over the best peer.

    Raises:
      ValueError: matplotlib is not installed, or it does not know the file's ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'jax-lora[plot]'") from None
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
    compared = [
        (row, result.best_peer / result.ours)
        for row, result in zip(rows, report.results)
        if result.ours is not None and result.best_peer is not None
    ]
    if compared:
        right.barh(*zip(*compared), color=["C2" if ratio >= 1 else "C3" for _, ratio in compared])
    right.axvline(1, color="black", linewidth=1)
    right.set(xlabel="speed-up over the best of vLLM and SGLang")
    figure.suptitle(f"y += (x Aᵀ) Bᵀ in bfloat16 on {report.device}, {report.date}")
    figure.savefig(path, dpi=120)
