"""Times a model's layers by `scan_layers`, by `jax.lax.scan` and one by one, in one process."""

import collections
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from unittest import mock

import jax
from flax import nnx

from benchmarks import step
from benchmarks.step import MIXED_RANKS, PROMPTS, RANK, Inputs, Program, Shape
from jax_lora.bank import AdapterBank
from jax_lora.batch import AdapterBatch
from jax_lora.models import llama

Form = Literal["scan_layers", "lax.scan", "one by one"]
FORMS: tuple[Form, ...] = ("scan_layers", "lax.scan", "one by one")
_COMPILED_AT_ONCE = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: its phase, the ranks of the loaded adapters (none: a model without LoRA), and how
    many of them its rows use in turn."""

    name: str
    phase: Literal["decode", "prefill"]
    ranks: tuple[int, ...] = ()
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """Microseconds of a step in each form, medians of all rounds; `most`: what the scan may take
    over the layers one by one, held on a GPU alone."""

    name: str
    us: dict[Form, float]
    on_gpu: bool
    most: float = 1.03

    @property
    def ratio(self) -> float:
        """The scan over the layers one by one."""
        return self.us["scan_layers"] / self.us["one by one"]

    @property
    def is_met(self) -> bool | None:
        return self.ratio <= self.most if self.on_gpu else None


@dataclasses.dataclass(frozen=True)
class Report:
    device: str
    date: str
    shape: Shape
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        rows = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows}


def cases_of(shape: Shape) -> list[Case]:
    rows, mixed = shape.batch, f"{PROMPTS} adapters of ranks {', '.join(map(str, MIXED_RANKS))}"
    some, prompts = f"{PROMPTS} adapters of rank {RANK}", f"prefill of {shape.prefill} tokens"
    each = (RANK,) * rows
    return [
        Case("no LoRA", "decode"),
        Case(f"no adapter in the batch, bucket {RANK}", "decode", each),
        Case(some, "decode", each, PROMPTS),
        Case(f"{rows} adapters of rank {RANK}", "decode", each, rows),
        Case(mixed, "decode", MIXED_RANKS, PROMPTS),
        Case(f"{prompts}, no LoRA", "prefill"),
        Case(f"{prompts}, {some}", "prefill", each, PROMPTS),
        Case(f"{prompts}, {mixed}", "prefill", MIXED_RANKS, PROMPTS),
    ]


def run(shape: Shape, progress: Callable[[str], None], *, rounds: int = 3) -> Report:
    """Times every case in every form, in turn, so that all see the same clocks of the GPU.

    The three forms compute the same. `jax.lax.scan` slices a layer's stacks out of those of all
    layers; `scan_layers` reads them in place.
    """
    steps: dict[tuple[str, Form], tuple[Program, AdapterBatch | None]] = {}
    for form in FORMS:
        with _plain_scan() if form == "lax.scan" else contextlib.nullcontext():
            found = _Model(dataclasses.replace(shape, scan=form != "one by one"), progress)
            steps |= {(name, form): made for name, made in found.compiled(form).items()}
    times = collections.defaultdict[tuple[str, Form], list[float]](list)
    for number in range(rounds):
        for (name, form), (program, batch) in steps.items():
            progress(f"round {number + 1} of {rounds}: {name}, {form}")
            us, _ = program.time(batch)
            progress(f"{us:,.0f} us")  # lest a run that is cut off has told nothing
            times[name, form].append(us)
    rows = [
        Row(name, {f: statistics.median(times[name, f]) for f in FORMS}, step.on_gpu())
        for name in dict.fromkeys(name for name, _ in steps)
    ]
    return Report(jax.devices()[0].device_kind, time.strftime("%Y-%m-%d"), shape, rows)


@contextlib.contextmanager
def _plain_scan() -> Iterator[None]:
    """The bundled model as it would be with JAX's own loop."""

    def scan[M: nnx.Module](body: Any, layers: M, carry: Any, xs: Any = None) -> Any:
        graphdef, state = nnx.split(layers)

        def turn(carry: Any, own: tuple[nnx.State, Any]) -> Any:
            return body(nnx.merge(graphdef, own[0]), carry, own[1])

        return jax.lax.scan(turn, carry, (state, xs))

    with mock.patch.object(llama, "scan_layers", scan):
        yield


class _Model:
    """The weights of a form, which its cases share."""

    def __init__(self, shape: Shape, progress: Callable[[str], None]) -> None:
        progress(f"making a model of {shape.config.num_hidden_layers} layers")
        self.shape, self.progress = shape, progress
        self.graphdef, self.weights = nnx.split(step.random_model(shape))
        self.inputs = {phase: Inputs(shape, phase) for phase in ("decode", "prefill")}
        self.banks: dict[tuple[int, ...], tuple[llama.Llama, AdapterBank, list[str]]] = {}

    def compiled(self, form: Form) -> dict[str, tuple[Program, AdapterBatch | None]]:
        """The programs of all cases with their batches; those of one model and phase are one."""
        cases = cases_of(self.shape)
        batches = {case.name: self._batch(case) for case in cases}
        one_of_each = {(case.phase, case.ranks): case for case in cases}

        def compile(case: Case) -> Program:
            self.progress(f"compiling {case.name}, {form}")
            model = self._loaded(case.ranks)[0] if case.ranks else self._base()
            given, batch = self.inputs[case.phase], batches[case.name]
            return Program(model, self.shape, case.phase, batch, given)

        with ThreadPoolExecutor(_COMPILED_AT_ONCE) as pool:
            programs = dict(zip(one_of_each, pool.map(compile, one_of_each.values())))
        return {c.name: (programs[c.phase, c.ranks], batches[c.name]) for c in cases}

    def _base(self) -> llama.Llama:
        return nnx.merge(self.graphdef, self.weights)

    def _batch(self, case: Case) -> AdapterBatch | None:
        if not case.ranks:
            return None
        _, bank, names = self._loaded(case.ranks)
        count = self.shape.batch if case.phase == "decode" else PROMPTS
        rows = [names[i % case.used] if case.used else None for i in range(count)]
        return jax.device_put(bank.batch(rows, phase=case.phase))

    def _loaded(self, ranks: tuple[int, ...]) -> tuple[llama.Llama, AdapterBank, list[str]]:
        if ranks not in self.banks:
            self.progress(f"loading {len(ranks)} adapters")
            model = self._base()
            bank, names, _ = step.load_random(model, ranks)
            self.banks[ranks] = model, bank, names
        return self.banks[ranks]
