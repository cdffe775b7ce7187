"""Times forward and backward of `y + lora(x)`, with gradients for x, A and B."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import COPY_RATE, Loop, sets_to_rotate
from benchmarks.turns import Turns
from pallas_kernels import LoRAPart, Segments, add_lora, lora_gradients, make_segments
from pallas_kernels.dispatch import Implementation

ALONE = Turns(None)
# Others may be faster than ours by so much: those that compute as much, and one adapter alone.
_LEEWAY = {"xla": 1.0, "ragged": 1.0, "dense": 1.15}
_MAX_ERROR = 1e-2  # of a bfloat16 gradient beside that of XLA's form, relative


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens, of which D adapters of rank r have runs of equal length or of lengths after Zipf,
    or lie in any order; `L` slots, D if that is 0."""

    T: int
    D: int
    r: int
    H: int = 4096
    N: int = 4096
    order: str = "runs"
    L: int = 0

    @property
    def slots(self) -> int:
        return self.L or self.D

    @property
    def label(self) -> str:
        shape = "" if (self.H, self.N) == (4096, 4096) else f" {self.H}x{self.N}"
        slots = f" of {self.L}" if self.L else ""
        return f"T={self.T} D={self.D}{slots} r={self.r}{shape} {self.order}"

    @property
    def floor_us(self) -> float:
        """x read twice, y and dy once; y' and dx written; of adapters in use, A and B read twice,
        and their gradients written."""
        of_tokens = 2 * self.T * (3 * self.H + 3 * self.N)
        of_adapters = 2 * 3 * self.D * self.r * (self.H + self.N)
        return (of_tokens + of_adapters) / COPY_RATE * 1e6

    @property
    def written_zeros_us(self) -> float:
        """What the zeros of slots without a token take, in whole stacks of gradients."""
        return 2 * (self.slots - self.D) * self.r * (self.H + self.N) / COPY_RATE * 1e6

    @property
    def aim_us(self) -> float:
        return self._factor * (self.floor_us + self.written_zeros_us) + 20

    @property
    def compact_aim_us(self) -> float:
        """That of compact gradients, which have no such zeros."""
        return self._factor * self.floor_us + 20

    @property
    def _factor(self) -> float:
        return 2.0 if self.order == "shuffled" else 1.5

    def ids(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        if self.order == "runs":
            return np.sort(np.arange(self.T) % self.D).astype(np.int32)
        ids = np.minimum(rng.zipf(1.5, self.T) - 1, self.D - 1).astype(np.int32)
        ids[: self.D] = np.arange(self.D)
        return rng.permutation(ids) if self.order == "shuffled" else np.sort(ids)


_FIRST = [
    Case(8192, 8, 16),
    Case(64, 8, 16),
    Case(1024, 8, 16),
    Case(8192, 8, 16, order="zipf"),
    Case(8192, 8, 16, order="shuffled"),
    Case(8192, 8, 64),
    Case(8192, 32, 16),
    Case(8192, 8, 128),
    Case(64, 64, 16),
    Case(1024, 64, 64),
    Case(8192, 1, 16),
    Case(8192, 8, 128, L=64),
]
_MORE = [
    *(Case(t, d, r) for t in (64, 256, 4096, 16384) for d in (1, 8, 64) for r in (8, 16, 128)),
    *(Case(8192, 8, 16, h, n) for h, n in ((5120, 5120), (8192, 8192), (4096, 14336))),
    *(Case(t, 8, 16, 14336, 4096) for t in (64, 2048, 8192)),
    *(Case(t, 8, 16, order=o) for t in (1024, 4096) for o in ("zipf", "shuffled")),
    *(Case(t, 8, r, L=64) for t in (512, 8192) for r in (16, 128)),
]
CASES = _FIRST + [case for case in _MORE if case not in _FIRST]


_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
_RANKS = (8, 16, 32, 64, 128)
_SHAPES = [(h, h) for h in (4096, 5120, 8192, 14336)] + [(4096, 14336), (14336, 4096)]
_MOST_VALUES = 16384 * (4096 + 14336)  # T (H + N); more would fill the memory that processes share


def sample(count: int, seed: int) -> list[Case]:
    """`count` cases drawn by `seed` from all that the aims are for, with each number of tokens as
    often. About a quarter has free slots, which compact gradients leave out.

    Raises:
      ValueError: `count` is not within 1 to 1000, or `seed` is negative.
    """
    if not 1 <= count <= 1000 or seed < 0:
        raise ValueError(f"a sample has 1 to 1000 cases and a seed from 0, got {count}, {seed}")
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(_TOKENS).tolist()
    cases: dict[Case, None] = {}
    while len(cases) < count:
        t = tokens[len(cases) % len(tokens)]
        shapes = [one for one in _SHAPES if t * sum(one) <= _MOST_VALUES]
        h, n = shapes[rng.integers(len(shapes))]
        d, r = int(rng.choice(_ADAPTERS)), int(rng.choice(_RANKS))
        order = str(rng.choice(["runs", "zipf", "shuffled"]))
        slots = 64 if len(cases) % 4 == 0 and d < 64 else 0
        cases[Case(t, d, r, h, n, order, slots)] = None
    return list(cases)


def cases_of(given: str | None, seed: int = 0) -> list[Case]:
    """All cases; the first few; `sample:40` for 40 that `seed` draws; or those of a JSON file."""
    if given is None:
        return CASES
    if given == "first":
        return _FIRST
    if found := re.fullmatch(r"sample:(\d{1,4})", given):
        return sample(int(found[1]), seed)
    return [Case(**case) for case in json.loads(Path(given).read_text())]


Step = Callable[..., Any]  # (y, x, a, b, dy, route) -> y', dx, da, db


def _step(forward: Callable[..., Any]) -> Step:
    def step(y: Any, x: Any, a: Any, b: Any, dy: Any, route: Any) -> Any:
        out, pull = jax.vjp(lambda x, a, b: forward(y, x, a, b, route), x, a, b)
        return out, *pull(dy)

    return step


def _ours(implementation: Implementation | None) -> Step:
    def forward(y: Any, x: Any, a: Any, b: Any, route: Any) -> Any:
        return add_lora(y, x, a, b, route[0], implementation=implementation)

    return _step(forward)


def _ragged(y: Any, x: Any, a: Any, b: Any, route: tuple[Segments, Any, Any, Any, Any]) -> Any:
    """Sorted tokens, and a `ragged_dot` for each half. Its weights are `[L, H, R]`, `[L, R, N]`."""
    _, order, back, sizes, _ = route
    v = jax.lax.ragged_dot(x[order], a, sizes)
    return y + jax.lax.ragged_dot(v, b, sizes)[back]


def _dense(y: Any, x: Any, a: Any, b: Any, _: Any) -> Any:
    return y + (x @ a[0].T) @ b[0].T


def _compact(y: Any, x: Any, a: Any, b: Any, dy: Any, route: Any) -> Any:
    """As ours, but with gradients of as many slots as there is room for."""
    part, used = LoRAPart(a, b), route[4].shape[0]
    out = add_lora(y, x, a, b, route[0])
    dx, [gradient] = lora_gradients(dy, x, [part], route[0], compact=used)
    return out, dx, gradient.lora_a, gradient.lora_b


_STEPS = {
    "ours": _ours(None),
    "compact": _compact,
    "xla": _ours("xla"),
    "ragged": _step(_ragged),
    "dense": _step(_dense),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Microseconds of each way; `error`: the largest of ours beside XLA's form, by gradient."""

    case: Case
    us: dict[str, float]
    error: dict[str, float]
    notes: list[str]

    @property
    def wrong(self) -> dict[str, float]:
        return {name: error for name, error in self.error.items() if not error < _MAX_ERROR}

    @property
    def verdict(self) -> str:
        if "ours" not in self.us:
            return "failed"
        slower = [
            name for name, leeway in _LEEWAY.items()
            if self.us.get(name, math.inf) * leeway < self.us["ours"]
        ]  # fmt: skip
        words = ["met" if self.us["ours"] <= self.case.aim_us else "missed"]
        if "compact" in self.us:
            is_met = self.us["compact"] <= self.case.compact_aim_us
            words.append(f"compact {'met' if is_met else 'missed'}")
        words += [f"slower than {name}" for name in slower]
        return ", ".join(words + ([f"WRONG {self.wrong}"] if self.wrong else []) + self.notes)

    @property
    def line(self) -> str:
        times = "  ".join(f"{name} {us:7.1f}" for name, us in self.us.items())
        case = self.case
        sizes = f"floor {case.floor_us:6.1f}  aim {case.aim_us:6.1f}"
        if "compact" in self.us:
            sizes += f" (compact {case.compact_aim_us:.1f})"
        return f"{case.label:34} {sizes}  {times}  {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "label": self.case.label,
            "verdict": self.verdict,
            "floor": self.case.floor_us,
            "aim": self.case.aim_us,
            "compact_aim": self.case.compact_aim_us,
        }


def _sets(case: Case) -> list[tuple[jax.Array, ...]]:
    """Operands and room for gradients, together larger than the L2 cache."""
    t, d, r, h, n = case.T, case.slots, case.r, case.H, case.N
    shapes = [(t, n), (t, h), (d, r, h), (d, n, r), (t, n)]
    factors = [1.0, 1.0, h**-0.5, r**-0.5, 1.0]
    set_bytes = 2 * sum(int(np.prod(shape)) for shape in [*shapes, *shapes[1:4]])
    made = []
    for n in range(sets_to_rotate(set_bytes, least=2)):
        keys = jax.random.split(jax.random.key(n), len(shapes))
        arrays = [
            (jax.random.normal(key, shape) * factor).astype(jnp.bfloat16)
            for key, shape, factor in zip(keys, shapes, factors)
        ]
        made.append((*arrays, *(jnp.zeros(shape, jnp.bfloat16) for shape in shapes[1:4])))
    return made


def _route(case: Case) -> tuple[Any, ...]:
    ids = case.ids()
    order = np.argsort(ids, kind="stable")
    sizes = np.bincount(ids, minlength=case.slots).astype(np.int32)
    segments = make_segments(jnp.asarray(ids), case.slots)
    places = jnp.asarray(np.argsort(order))
    return segments, jnp.asarray(order), places, jnp.asarray(sizes), jnp.arange(case.D)


def _loop(step: Step, sets: list[tuple[jax.Array, ...]], route: Any, turns: int | None) -> Loop:
    """A compiled loop of one step for each of the sets."""
    once = jax.jit(step)  # lowered once, however often it is called

    def body(sets: Any, route: Any) -> Any:
        sets = jax.lax.optimization_barrier(sets)
        done = []
        for y, x, a, b, dy, *_ in sets:
            y, *gradients = once(y, x, a, b, dy, route)
            done.append((y, x, a, b, dy, *gradients))
        return done

    loop = Loop(body, len(sets), turns=turns)
    loop.compile(sets, route)
    return loop


_OURS_AND_XLA: tuple[Implementation | None, ...] = (None, "xla")


def _errors(case: Case, sets: list[tuple[jax.Array, ...]], route: Any) -> dict[str, float]:
    operands = sets[0][:5]
    ours, xla = (jax.jit(_ours(way))(*operands, route) for way in _OURS_AND_XLA)
    found = {}
    for name, got, want in zip(("y", "dx", "dA", "dB"), ours, xla):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        found[name] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    return found


def measure(case: Case, ways: tuple[str, ...], turns: Turns = ALONE) -> Result:
    """Times one case in each of the `ways`; what does not run is a note."""
    us: dict[str, float] = {}
    error: dict[str, float] = {}
    notes: list[str] = []
    loops: dict[str, tuple[Loop, list[tuple[jax.Array, ...]]]] = {}
    with turns.shared():
        sets, route = _sets(case), _route(case)
        try:
            error = _errors(case, sets, route)
        except Exception as reason:
            notes.append(f"no errors measured: {str(reason)[:300]!r}")
        for way in ways:
            if way == "compact" and case.slots == case.D:
                continue
            given = _swapped(sets) if way == "ragged" else sets
            if way == "compact":
                given = [(*one[:6], *(t[: case.D] for t in one[6:])) for one in sets]
            slow = way in ("xla", "ragged") and case.T > 64
            try:
                loops[way] = _loop(_STEPS[way], given, route, 2 if slow else None), given
            except Exception as reason:
                notes.append(f"{way}: {str(reason)[:300]!r}")
    with turns.alone():
        for way, (loop, given) in loops.items():
            try:
                us[way] = loop.us(given, route)
            except Exception as reason:  # of memory, as a rule, which processes share
                notes.append(f"{way}: {str(reason)[:300]!r}")
    return Result(case, us, error, notes)


def _swapped(sets: list[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
    """The sets with weights, and room for their gradients, as `ragged_dot` takes them."""
    turned = (2, 3, 6, 7)
    return [
        tuple(t.swapaxes(1, 2) if i in turned else t for i, t in enumerate(one)) for one in sets
    ]


def run(
    cases: list[Case], ways: tuple[str, ...], seconds: float, out: Path, turns: Turns = ALONE
) -> None:
    """Measures case after case, and starts none after so many seconds. Each result is printed, and
    added to `out`, a file of JSON lines, as it comes."""
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            return
        result = measure(case, ways, turns)
        with out.open("a") as file:
            file.write(json.dumps(result.to_dict()) + "\n")
        print(result.line, flush=True)


def run_in_processes(
    cases: list[Case], ways: tuple[str, ...], seconds: float, out: Path, processes: int
) -> None:
    """`run` by so many processes: they prepare cases together, and time them in turns."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for nth in range(processes):
            job = Path(folder) / f"{nth}.json"
            mine = [dataclasses.asdict(case) for case in cases[nth::processes]]
            job.write_text(json.dumps([mine, ways, seconds, str(out), f"{folder}/turns"]))
            command = [sys.executable, "-m", "benchmarks.gradients", str(job)]
            started.append(subprocess.Popen(command, env=environment))
        failed = sum(process.wait() != 0 for process in started)
    if failed:
        raise RuntimeError(f"{failed} of {processes} processes failed; what they timed is in {out}")


def main(path: Path) -> None:
    cases, ways, seconds, out, turns = json.loads(path.read_text())
    run([Case(**case) for case in cases], tuple(ways), seconds, Path(out), Turns(turns))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
