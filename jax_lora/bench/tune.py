"""Makes a tuning table: tries a few configs for each class of shapes and keeps those that gain."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_lora.bench import kernels
from jax_lora.bench.kernels import Case, geometric_mean
from jax_lora.bench.timing import Loop, rounds_of, turn
from pallas_kernels import Segments, add_lora
from pallas_kernels.mosaic_gpu.config import Config, decode_config, default_config
from pallas_kernels.mosaic_gpu.tuning import ORDER_FIELDS, ShapeClass, read

# Ranks of the bench's cases that are tuned unless others are asked for, by tokens.
_RANKS = {1: (16,), 16: (16,), 64: (8, 16, 64, 128), 256: (16, 64, 128), 4096: (16, 64, 128)}
CASES = [case for case in kernels.CASES if case.r in _RANKS[case.T]]

Fields = dict[str, Any]
Timer = Callable[[Case, Config], float]

# What is tried: one field after the other, with what was best of those before it.
_TRIED: dict[str, dict[str, tuple[int | None, ...]]] = {
    "decode": {
        "warps": (4, 8, None),  # None: two launches
        "split": (4, 8),
        "column_clusters": (1, 2, 4),
        "expand_stages": (1, 2, 3, 4, 6),
        "stages": (1, 2, 3),
    },
    "prefill": {
        "split": (1, 2, 4, 8),
        "row_tiles": (1, 2),
        "expand_row_tiles": (1, 2),
        "block_n": (32, 64, 128),
        "expand_stack": (1, 2),
        "expand_stages": (1, 2, 4),
        "expand_columns": (1, 2, 4, 8),
        "stages": (2, 4, 6),
        "stack": (1, 2),
        "rank_block": (64, 128),
    },
}
# What a class gains at least for an entry, and what one of its cases loses at most; what a field
# gains at least, lest it be one without effect.
_LEAST_GAIN, _LEAST_STEP = 1.03, 1.01
_LEAST_MS = 10  # of a measurement


class Measured(NamedTuple):
    """Microseconds of a case."""

    case: str
    default_us: float
    us: float


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A class of shapes: the fields that gained (none: the default stays), what its cases take, and
    what did not run."""

    shape: ShapeClass
    fields: Fields
    measured: list[Measured]
    notes: list[str]

    @property
    def changes_bits(self) -> bool:
        return not ORDER_FIELDS.isdisjoint(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """An entry of a table."""
        return {
            **self.shape._asdict(),
            "config": self.fields,
            "changes_bits": self.changes_bits,
            "date": time.strftime("%Y-%m-%d"),
            "measured": [m._asdict() for m in self.measured],
        }


def run(
    cases: Sequence[Case],
    path: Path,
    progress: Callable[[str], None],
    *,
    change_bits: bool = False,
    timer: Timer | None = None,
) -> list[Tuned]:
    """Tunes the cases' classes of shapes, and writes the table at `path` after each.

    What adapters a batch uses is not static, so a class has one config for all its cases. Entries
    that the table has for other classes stay. `change_bits`: tries other orders of summation too.
    `timer` gives microseconds, and raises for a config that does not run or is wrong.

    Raises:
      ValueError: there is no GPU; or what is at `path` is no tuning table, or another GPU's.
      OSError: `path` can't be written.
    """
    timer = timer or gpu_timer()
    device = jax.devices()[0].device_kind
    entries = _entries(path, device)

    def write() -> None:
        table = {"device": device, "jax": jax.__version__, "entries": list(entries.values())}
        path.write_text(json.dumps(table, indent=1) + "\n")

    write()  # a path that can't be written is told before minutes have passed
    classes: dict[ShapeClass, list[Case]] = {}
    for case in cases:
        classes.setdefault(ShapeClass.of(case.T, case.H, case.N, case.r), []).append(case)
    results = []
    for shape, members in classes.items():
        results.append(tuned := _tune(shape, members, timer, progress, change_bits))
        entries.pop(shape, None)
        if tuned.fields:
            entries[shape] = tuned.to_dict()
        write()
    return results


def _entries(path: Path, device: str) -> dict[ShapeClass, dict[str, Any]]:
    """Of the table at `path`, if there is one."""
    if not path.exists():
        return {}
    shapes, table = read(path, Config), json.loads(path.read_text())
    if table.get("device") != device:
        raise ValueError(f"{path} is a table of {table.get('device')!r}, this is {device!r}")
    return dict(zip(shapes, table["entries"]))


def _tune(
    shape: ShapeClass,
    cases: list[Case],
    timer: Timer,
    progress: Callable[[str], None],
    change_bits: bool,
) -> Tuned:
    label = "; ".join(case.label for case in cases)
    notes: list[str] = []

    def times(fields: Fields) -> list[float]:
        us = [timer(case, config_of(case, fields)) for case in cases]
        progress(f"{label}: {', '.join(f'{t:.2f}' for t in us)} us with {described(fields)}")
        return us

    try:
        default_us = times({})
    except NotImplementedError as lacking:
        return Tuned(shape, {}, [], [f"{label}: {lacking}"])
    best: Fields = {}
    best_ratio, seen = 1.0, {config_of(cases[0], {})}
    for name, values in _TRIED[cases[0].phase].items():
        if name in ORDER_FIELDS and not change_bits:
            continue
        for fields in [{**best, name: value} for value in values]:
            config = config_of(cases[0], fields)
            if config in seen:
                continue
            seen.add(config)
            try:
                ratio = _ratio(times(fields), default_us)
            except Exception as error:  # whatever it is, this config is not one to choose
                notes.append(f"{label}: {described(fields)}: {str(error)[:200]}")
                progress(notes[-1])
                continue
            if ratio * _LEAST_STEP < best_ratio:
                best, best_ratio = fields, ratio
    us = default_us
    if best:  # the least of many measurements is too low, so both once more
        us, default_us = times(best), times({})
        if _ratio(us, default_us) > 1 / _LEAST_GAIN:
            best, us = {}, default_us
    measured = [Measured(case.label, *pair) for case, *pair in zip(cases, default_us, us)]
    return Tuned(shape, best, measured, notes)


def _ratio(us: Sequence[float], default_us: Sequence[float]) -> float:
    """Of times to the default's, in the geometric mean; infinite where a case loses too much."""
    ratios = [a / b for a, b in zip(us, default_us)]
    return float("inf") if max(ratios) > _LEAST_GAIN else geometric_mean(ratios)


def described(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "the default"


def config_of(case: Case, fields: Fields) -> Config:
    """What a table that changes `fields` gives a case."""
    shape = case.T, case.H, case.N, case.r
    if case.phase == "decode":
        config = dataclasses.replace(decode_config(*shape, tuned=False), **fields)
        if config.warps is not None:
            return config
        fields = {}  # the two launches of few tokens have no entries
    return dataclasses.replace(default_config(*shape, case.L, tuned=False), **fields)


def gpu_timer() -> Timer:
    """Times as `bench` does, and checks first.

    Raises:
      ValueError: JAX does not run on a GPU.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(f"tuning needs a GPU, JAX runs on {jax.default_backend()}")
    return CheckedTimer()


class CheckedTimer:
    """Microseconds of a case with a config. The first config of a case is checked against float32,
    others against the first: equal bits where they sum in the same order.

    Cases that differ in the adapters in use alone share programs and weights.

    Raises:
      RuntimeError: a result is wrong.
    """

    def __init__(self) -> None:
        self._shape: Case | None = None
        self._sets: list[Any] = []
        self._loops: dict[Config, Loop] = {}
        self._first: dict[Case, tuple[Config, jax.Array]] = {}

    def __call__(self, case: Case, config: Config) -> float:
        shape = dataclasses.replace(case, D=1)
        if shape != self._shape:
            self._shape, self._sets, self._loops = shape, kernels.weight_sets(case), {}
        sets, segments = self._sets, kernels.segments_of(case)
        rounds, call = rounds_of(sets), _call(config, case.phase)
        if config not in self._loops:
            self._loops[config] = Loop(turn(call, rounds), rounds * len(sets))
        loop = self._loops[config]
        y = loop(sets, segments)[0][0]
        if case not in self._first:
            once = jax.jit(call)(*sets[0], segments)
            kernels.check("mosaic_gpu", case, once, kernels.expected(case, sets, segments))
            self._first[case] = config, y
        first, want = self._first[case]
        kernels.check(str(config), case, y, want.astype(jnp.float32))
        same_order = all(getattr(config, n) == getattr(first, n) for n in ORDER_FIELDS)
        if same_order and not jnp.array_equal(y, want):
            raise RuntimeError(f"{config} gives other bits than {first} at {case}")
        return loop.us(sets, segments, least_ms=_LEAST_MS)


def _call(config: Config, phase: str) -> Callable[..., jax.Array]:
    def call(y: Any, x: Any, a: Any, b: Any, segments: Segments) -> jax.Array:
        how: Any = dict(implementation="mosaic_gpu", config=config)
        return add_lora(y, x, a, b, segments, phase=phase, **how)

    return call
