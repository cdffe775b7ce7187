"""Times `y += (x A^T) B^T`: our kernels, XLA's forms, and the kernels of vLLM and SGLang."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.cases import Case
from benchmarks.peer_runs import Row, run_peers
from benchmarks.report import PEERS, Report, Result
from benchmarks.timing import (
    COPY_RATE,
    Loop,
    ceilings,
    copy_rate_here,
    rounds_of,
    sets_to_rotate,
    turn,
)
from benchmarks.turns import Turns
from pallas_kernels import LoRAPart, Segments, add_lora, add_lora_multi, make_segments

try:  # a comparison, where someone has installed it
    from tokamax import ragged_dot  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    ragged_dot = None

# y, x, and A and B of each bucket; a call gives the new y.
Set = tuple[jax.Array, ...]
LoRACall = Callable[..., jax.Array]
Rates = tuple[float | None, float | None]

ALONE = Turns(None)
_MAX_ERROR = 1e-2  # of bfloat16 results, relative, as the peers are checked
# XLA's forms take long to compile, so a program has one call of each set, and the host may add to
# its time. What is close to ours, by this factor, is timed once more with as many calls as ours.
_CLOSE = 2
# XLA's sgmv walks over the tiles one by one, each of which takes as many microseconds (H100).
_SGMV_TILE_US = 10
# Random numbers that arrays repeat: a prime, so that no two adapters are equal.
_NOISE = 4_194_301


def run(
    cases: Sequence[Case],
    peers: Path | None,
    progress: Callable[[str], None],
    *,
    name: str | None = None,
    save: Path | None = None,
    rates: Rates | None = None,
    turns: Turns = ALONE,
) -> Report:
    """Times the cases, the peers first, in a process of their own that then frees the GPU.

    Args:
      cases, name: what to time, and the name of that set of cases.
      peers: the folder that benchmarks/peers/fetch.sh made; None for ours and XLA alone.
      progress: takes a line for each step.
      save: a file that gets the report after each case, so that one that is cut off has told
        something.
      rates: what `rates_here` gave; None to measure them.
      turns: those of the processes that use this GPU too.

    Raises:
      FileNotFoundError: `peers` is no such folder.
      RuntimeError: the peers' process gave nothing.
    """
    rows = [{} for _ in cases] if peers is None else run_peers(cases, peers, progress, turns)
    with turns.shared():  # it starts the device
        on_gpu = jax.default_backend() == "gpu"
    copy_rate, matmul_rate = rates_here() if rates is None else rates
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    report = Report(name, device, date, copy_rate, matmul_rate, [])
    for case, row in zip(cases, rows):
        progress(f"timing {case.label}")
        try:
            times, notes = time_case(case, on_gpu, turns)
        except (RuntimeError, ValueError) as error:  # a wrong result, or none; others may be right
            report.failed.append(f"{case.label}: {' '.join(str(error).split())[:300]}")
            progress(f"failed {report.failed[-1]}")
        else:
            report.results.append(_result(case, times, notes, row, report))
            us = times.get("ours", times["xla"])
            progress(f"{case.label} takes {us:,.2f} us")
        if save is not None:
            report.save(save)
    return report


def _result(
    case: Case, times: dict[str, float], notes: list[str], row: Row, report: Report
) -> Result:
    by_peer = {peer: us for peer in PEERS if isinstance(us := row.get(peer), float)}
    notes += [f"{peer} {row[peer]}" for peer in PEERS if isinstance(row.get(peer), str)]
    floor, here = _floors(case, report.copy_rate, report.matmul_rate)
    ours, tokamax = times.get("ours"), times.get("tokamax")
    return Result(case, floor, here, ours, times["xla"], tokamax, by_peer, notes)


def rates_here() -> Rates:
    """Bytes and operations per second, as `ceilings`; None without a GPU."""
    return ceilings() if jax.default_backend() == "gpu" else (None, None)


def _floors(
    case: Case, copy_rate: float | None, matmul_rate: float | None
) -> tuple[float, float | None]:
    """At COPY_RATE, and at this device's own rate."""
    multiplied = matmul_rate or math.inf
    here = copy_rate and case.floor_us(multiplied, copy_rate_here(copy_rate))
    return case.floor_us(multiplied), here


# ------------------------------------------------------------------------------------- operands


@functools.lru_cache(8)
def _noise(scale: float) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(_NOISE, np.float32) * np.float32(scale)
    return values.astype(ml_dtypes.bfloat16)


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """The shapes of y, x, and each bucket's A and B."""
    stacks = [
        shape
        for rank, slots in case.slots.items()
        for shape in ((slots, rank, case.H), (slots, case.N, rank))
    ]
    return [(case.T, case.N), (case.T, case.H), *stacks]


def operands(case: Case) -> list[np.ndarray]:
    """Random bfloat16, made on the host: on a device each shape would be compiled for."""
    y_x_and_stacks = shapes_of(case)
    scales = [1.0, 1.0, *[case.H**-0.5, 1.0] * len(case.slots)]
    offsets = itertools.count(0, 1_000_003)  # else x would be y's numbers
    return [
        np.resize(np.roll(_noise(scale), offset), shape)
        for shape, scale, offset in zip(y_x_and_stacks, scales, offsets)
    ]


def count_of(case: Case) -> int:
    """Sets of weights that together exceed the L2 cache."""
    return sets_to_rotate(2 * sum(math.prod(shape) for shape in shapes_of(case)[2:]))


def expected(case: Case, given: Sequence[np.ndarray]) -> np.ndarray:
    """What a call gives of these operands, in float32, by NumPy."""
    y, x = (t.astype(np.float32) for t in given[:2])
    ids, stacks = case.ids(), itertools.batched(given[2:], 2)
    for (first, slots), (a, b) in zip(zip(case.first_slots.values(), case.slots.values()), stacks):
        for slot in np.unique(ids[(first <= ids) & (ids < first + slots)]):
            rows = ids == slot
            one_a, one_b = (t[slot - first].astype(np.float32) for t in (a, b))
            y[rows] += x[rows] @ one_a.T @ one_b.T
    return y


def check(name: str, got: jax.Array, want: np.ndarray) -> None:
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    if not error < _MAX_ERROR:
        raise RuntimeError(f"{name} is wrong: relative error {error:.1e}")


def segments_of(case: Case) -> Segments:
    """The tokens' adapters, for each bucket too where there are several."""
    slots = sum(case.slots.values())
    ranges = list(zip(case.first_slots.values(), case.slots.values()))

    def make(ids: jax.Array) -> Segments:
        segments = make_segments(ids, slots)
        return segments.split(ranges) if len(ranges) > 1 else segments

    return jax.jit(make)(jnp.asarray(case.ids()))


# ---------------------------------------------------------------------------------------- calls


def call_of(
    case: Case, segments: Segments, phase: str, implementation: Literal["xla"] | None = None
) -> LoRACall:
    """`add_lora`, or `add_lora_multi` for several buckets, by default by what it chooses itself."""
    firsts = tuple(case.first_slots.values())

    def call(y: jax.Array, x: jax.Array, *stacks: jax.Array) -> jax.Array:
        if len(firsts) == 1:
            a, b = stacks
            return add_lora(y, x, a, b, segments, phase=phase, implementation=implementation)
        parts = [
            LoRAPart(a, b, first_slot=first)
            for (a, b), first in zip(itertools.batched(stacks, 2), firsts)
        ]
        return add_lora_multi(y, x, parts, segments, phase=phase, implementation=implementation)

    return call


def _xla_phases(case: Case) -> list[str]:
    """The phases whose form of XLA may be the faster of the two: bgmv gathers each token's weights,
    so not for many; sgmv takes the tiles one by one, so not where bgmv gathers little."""
    if case.phase == "prefill":
        return ["prefill"]
    ranks = sum(n * rank for n, rank in zip(case.runs, case.adapter_ranks))
    gather_us = 1e6 * 2 * ranks * (case.H + case.N) / COPY_RATE
    loses = 2 * gather_us + 4 < _SGMV_TILE_US * case.D
    return ["decode"] if loses else ["decode", "prefill"]


def _others(case: Case, segments: Segments) -> dict[str, LoRACall]:
    """What ours is compared with in this process, by name."""
    calls = {f"xla, {phase}": call_of(case, segments, phase, "xla") for phase in _xla_phases(case)}
    if ragged_dot is not None and len(case.slots) == 1:
        calls["tokamax"] = _ragged_dots(segments, ragged_dot)
    return calls


def _ragged_dots(segments: Segments, dot: LoRACall) -> LoRACall:
    """Both halves as grouped products of the rows sorted by adapter; every token has one."""
    slots = jnp.arange(segments.num_adapters)
    sizes = jnp.sum(segments.indices == slots[:, None], axis=1, dtype=jnp.int32)
    rows = segments.rows

    def call(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        v = dot(x[rows], a.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)
        delta = dot(
            v.astype(b.dtype), b.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32
        )  # fmt: skip
        return (y.astype(jnp.float32)).at[rows].add(delta).astype(y.dtype)

    return call


class _Prepared:
    """A case whose programs are compiled and checked: what is left is to time them.

    "ours", by what `add_lora` chooses on a GPU; XLA's forms; "tokamax" where that is installed.
    """

    def __init__(self, case: Case, on_gpu: bool, given: list[np.ndarray], want: np.ndarray) -> None:
        segments = segments_of(case)
        self.sets: list[Set] = [
            tuple(jax.device_put(t) for t in given) for _ in range(count_of(case))
        ]
        self.calls = _others(case, segments)
        self.loops: dict[str, Loop] = {}
        self.notes: list[str] = []
        self.ours_is_xla = False
        if on_gpu:
            self._prepare_ours(call_of(case, segments, case.phase), want)
        for name, call in self.calls.items():
            loop = Loop(turn(call, 1), len(self.sets), turns=1)
            try:
                check(name, loop(self.sets)[0][0], want)  # of the program that is timed
            except NotImplementedError as lacking:
                self.notes.append(f"{name}: {lacking}")
            else:
                self.loops[name] = loop

    def _prepare_ours(self, call: LoRACall, want: np.ndarray) -> None:
        lowered = jax.jit(call).lower(*self.sets[0])
        check("ours", lowered.compile()(*self.sets[0]), want)
        self.loops["ours"] = self._in_turns(call)
        jax.block_until_ready(self.loops["ours"](self.sets))
        if "mosaic_gpu" not in lowered.as_text():
            self.ours_is_xla = True
            self.notes.append("ours is XLA's form, by default for so few tokens")

    def _in_turns(self, call: LoRACall) -> Loop:
        """So many calls in a turn of the loop that it adds nothing to them."""
        rounds = rounds_of(self.sets)
        return Loop(turn(call, rounds), rounds * len(self.sets))

    def times(self) -> dict[str, float]:
        """Microseconds by name; "xla" is the better of its forms."""
        times = {name: loop.us(self.sets) for name, loop in self.loops.items()}
        better = min((name for name in times if name.startswith("xla")), key=lambda n: times[n])
        times["xla"], self.calls["xla"] = times[better], self.calls[better]
        for name in ("xla", "tokamax"):
            if name in times and times[name] < _CLOSE * times.get("ours", 0):
                times[name] = self._in_turns(self.calls[name]).us(self.sets)
        if self.ours_is_xla:
            times["xla"] = min(times["xla"], times["ours"])
        return times


def time_case(case: Case, on_gpu: bool, turns: Turns = ALONE) -> tuple[dict[str, float], list[str]]:
    """Microseconds of "ours", "xla" and "tokamax", of those that ran, and notes."""
    given = operands(case)
    want = expected(case, given)
    with turns.shared():
        prepared = _Prepared(case, on_gpu, given, want)
    with turns.alone():
        return prepared.times(), prepared.notes
