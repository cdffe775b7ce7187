"""Serves traces of requests by the engine: throughput, first token, time between tokens."""

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from benchmarks.step import PROJECTIONS, Shape, random_adapter, random_model
from jax_lora.adapters import Adapter
from jax_lora.bank import AdapterBank
from jax_lora.models.llama import Llama
from jax_lora.nn.apply import apply_lora
from jax_lora.serving import Engine, SamplingParams, StepShape
from pallas_kernels import padded_rank

Popularity = Literal["distinct", "uniform", "zipf", "identical", "power", "base"]

DISTINCT = 50  # adapters behind the names, all on the host
FEW, MANY = 5, 2000  # names
MANY_OF_FEW = 0.95  # of the tokens per second with few names those with many should be, at least
# An adapter's first token may come so many milliseconds later if the host has it and no slot.
LATER_MS = {8: 30.0, 16: 30.0, 64: 60.0}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A trace: requests, each with its adapter and lengths.

    Attributes:
      ranks: of the adapters, in turns. names: how many adapters requests ask for.
      popularity: whom they ask for; "base" for nobody.
      lengths: "punica": of its text generation; "slora": uniform in [8, 512).
      in_flight: requests at a time.
    """

    name: str
    ranks: tuple[int, ...]
    names: int
    popularity: Popularity
    lengths: Literal["punica", "slora"]
    in_flight: int

    @property
    def family(self) -> str:
        """Whose it is."""
        return self.name.split(",")[0]


def workloads(in_flight: int, counts: Sequence[int], only: str = "") -> list[Workload]:
    """Those of Punica (arXiv 2310.18547) and of S-LoRA (arXiv 2311.03285), beside the base.

    Args:
      in_flight: of S-LoRA's. counts: its numbers of adapters.
      only: of those beside the base, the ones whose name has this.

    Raises:
      ValueError: none has.
    """
    punica: list[tuple[Popularity, int]] = [
        ("base", 0),
        ("identical", 1),
        ("uniform", math.ceil(math.sqrt(32))),
        ("zipf", 32),
        ("distinct", 1 << 30),
    ]
    found = [Workload(f"Punica, {p}", (16,), names, p, "punica", 32) for p, names in punica]
    found.append(Workload("S-LoRA, base", (8,), 0, "base", "slora", in_flight))
    for ranks in ((8,), (64, 32, 16, 8)):
        for count in counts:
            name = f"S-LoRA, {count} adapters of rank {', '.join(map(str, ranks))}"
            found.append(Workload(name, ranks, count, "power", "slora", in_flight))
    chosen = [load for load in found if load.popularity == "base" or only in load.name]
    families = {load.family for load in chosen if load.popularity != "base"}
    if not families:
        raise ValueError(f"no workload is called {only!r:.99}; there are {[w.name for w in found]}")
    return [load for load in chosen if load.family in families]


def steps_here() -> StepShape:
    """64 rows of 2048 tokens; on a machine without a GPU what it takes in seconds."""
    if jax.default_backend() == "gpu":
        return StepShape(max_length=2048)
    return StepShape(rows=8, max_length=64, chunk=16, lanes=(0, 2), block=16)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What is asked, in order: prompt and answer lengths, and the number of the adapter or -1."""

    prompts: np.ndarray
    answers: np.ndarray
    adapters: np.ndarray

    @classmethod
    def of(cls, load: Workload, requests: int, max_length: int, seed: int) -> "Trace":
        """Lengths beyond `max_length` together are cut."""
        rng = np.random.default_rng(seed)
        if load.lengths == "punica":
            prompts = np.minimum(18 * rng.lognormal(0.0, 0.8, requests) - 1, max_length - 2)
            prompts = np.maximum(prompts, 1).astype(int)
            totals = np.maximum(prompts + 2, rng.integers(0, max_length, requests))
            answers = np.minimum(totals, max_length) - prompts
        else:
            most = min(512, max_length // 2)
            prompts, answers = rng.integers(min(8, most - 1), most, (2, requests))
        return cls(prompts, answers, _adapters(load, requests, rng))


def _adapters(load: Workload, requests: int, rng: np.random.Generator) -> np.ndarray:
    if load.popularity == "base":
        return np.full(requests, -1)
    if load.popularity == "distinct":
        return np.arange(requests)
    numbers = np.arange(load.names)
    # Zipf's of Punica: each is asked for 1.5 times as often as the next. The power law of S-LoRA
    # has the exponent 1.
    shares = {"zipf": 1.5**-numbers, "power": 1 / (1 + numbers)}.get(
        load.popularity, np.ones(load.names)
    )
    return rng.choice(load.names, requests, p=shares / shares.sum())


@dataclasses.dataclass(frozen=True)
class Row:
    """How a workload was served. Times are milliseconds, each at the median and the 99th percent.

    Attributes:
      tokens_per_s: of answers. total_per_s: of prompts too.
      first_ms: from asking to the first token. next_ms: between two tokens of an answer.
      of_base: tokens per second over those of the base model in the same workload.
      loads: uploads of adapters. step_ms: of all steps, in the mean.
    """

    name: str
    requests: int
    tokens_per_s: float
    total_per_s: float
    first_ms: tuple[float, float]
    next_ms: tuple[float, float]
    step_ms: float
    loads: int
    of_base: float | None = None


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """How long the first token of a lone request takes, in milliseconds, at the median.

    Attributes:
      on_device_ms: with its adapter in a slot. from_host_ms: with the adapter in the host's cache
        alone.
    """

    rank: int
    on_device_ms: float
    from_host_ms: float

    @property
    def later_ms(self) -> float:
        return self.from_host_ms - self.on_device_ms

    @property
    def most_ms(self) -> float:
        """How much later it may come."""
        return LATER_MS[self.rank]

    @property
    def is_met(self) -> bool:
        return self.later_ms <= self.most_ms


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a workload of many names has of the tokens per second with few, `share` of them.

    Attributes:
      few: names. least: that the share should be.
    """

    name: str
    few: int
    share: float
    least: float

    @property
    def is_met(self) -> bool:
        return self.share >= self.least


@dataclasses.dataclass(frozen=True)
class Report:
    """What was served.

    Attributes:
      is_judged: whether aims are held against it; those are for a GPU.
      first_tokens: of the ranks that have an aim and a bucket.
    """

    device: str
    date: str
    shape: StepShape
    warmup_s: float
    seed: int
    is_judged: bool
    rows: list[Row]
    first_tokens: list[FirstToken]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @property
    def kept(self) -> list[Kept]:
        """For each workload with many names beside which there is the one with few."""
        by_name = {row.name: row.tokens_per_s for row in self.rows}
        few, many = (f"S-LoRA, {names} adapters " for names in (FEW, MANY))
        return [
            Kept(name, FEW, tokens / by_name[other], MANY_OF_FEW)
            for name, tokens in by_name.items()
            if name.startswith(many) and (other := name.replace(many, few)) in by_name
        ]


@dataclasses.dataclass(frozen=True)
class Options:
    """How workloads are run.

    Attributes:
      layers: of the model; None for all. slots: of each bucket. steps: sizes of steps.
      turns: first tokens of each rank, of which the median counts.
    """

    layers: int | None = None
    requests: int = 500
    slots: int = 64
    seed: int = 0
    steps: StepShape = dataclasses.field(default_factory=StepShape)
    turns: int = 21


def run(loads: Sequence[Workload], options: Options, progress: Callable[[str], None]) -> Report:
    """Serves each workload in a closed loop, by an engine of a random model and random adapters."""
    shape = Shape.of_this_machine(options.layers)
    progress(f"making a model of {shape.config.num_hidden_layers} layers")
    model = random_model(shape)
    ranks = sorted({rank for load in loads for rank in load.ranks})
    buckets = tuple(dict.fromkeys(map(padded_rank, ranks)))
    apply_lora(model, slots=options.slots, buckets=buckets, target=PROJECTIONS)
    bank = AdapterBank(model)
    rows: list[Row] = []
    with Engine(model, bank, shape=options.steps) as engine:
        progress("compiling")
        start = time.perf_counter()
        engine.warmup()
        warmup_s = time.perf_counter() - start
        progress(f"compiled in {warmup_s:.0f} s")
        bench = _Bench(engine, model, options)
        for load in loads:
            row = bench.serve(load)
            base = next((r for r in rows if r.name == f"{load.family}, base"), None)
            if base is not None and load.popularity != "base":
                row = dataclasses.replace(row, of_base=row.tokens_per_s / base.tokens_per_s)
            rows.append(row)
            progress(f"{row.name}: {row.tokens_per_s:,.0f} tokens/s")  # lest a cut-off run is mute
        progress("asking for first tokens")
        first_tokens = [bench.first_token(rank) for rank in LATER_MS if rank in ranks]
        shape_of_steps = engine.shape
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    on_gpu = jax.default_backend() == "gpu"
    return Report(device, date, shape_of_steps, warmup_s, options.seed, on_gpu, rows, first_tokens)


class _Bench:
    """An engine, and the adapters that names stand for."""

    def __init__(self, engine: Engine, model: Llama, options: Options) -> None:
        self.engine, self.model, self.options = engine, model, options
        self.adapters: dict[tuple[int, int], Adapter] = {}
        self.named: set[str] = set()

    @property
    def uploads(self) -> int:
        assert self.engine.bank is not None
        return sum(use.loads for use in self.engine.bank.usage().values())

    def name(self, load: Workload, number: int) -> str | None:
        """The name of an adapter, whose source the engine has from now on."""
        if number < 0:
            return None
        rank, which = load.ranks[number % len(load.ranks)], number % DISTINCT
        if (rank, which) not in self.adapters:
            self.adapters[rank, which] = random_adapter(self.model, rank, which)
        name = f"{load.name} {number}"
        if name not in self.named:
            self.named.add(name)
            self.engine.add_adapter(name, self.adapters[rank, which])
        return name

    def serve(self, load: Workload) -> Row:
        engine, options = self.engine, self.options
        assert engine.shape.max_length is not None
        trace = Trace.of(load, options.requests, engine.shape.max_length, options.seed)
        self.named.clear()
        names = [self.name(load, number) for number in trace.adapters.tolist()]
        rng = np.random.default_rng(options.seed)
        room, threads = threading.Semaphore(load.in_flight), []
        clocks = [_Clock() for _ in names]
        steps, loads, start = engine.steps, self.uploads, time.perf_counter()
        for name, prompt, answer, clock in zip(names, trace.prompts, trace.answers, clocks):
            room.acquire()
            tokens = rng.integers(0, self.model.config.vocab_size, prompt)
            params = SamplingParams(max_tokens=int(answer), stop_tokens=())
            clock.begin = time.perf_counter()
            generation = engine.submit(tokens, params, adapter=name, on_piece=clock.tick)
            generation.on_done(lambda _: room.release())
            threads.append(generation)
        for generation in threads:
            generation.result()
        seconds = time.perf_counter() - start
        for name in self.named:
            engine.remove_adapter(name)
        first = [clock.times[0] - clock.begin for clock in clocks]
        gaps = [gap for clock in clocks for gap in np.diff(clock.times).tolist()]
        made = int(trace.answers.sum())
        return Row(
            load.name,
            len(names),
            made / seconds,
            (made + int(trace.prompts.sum())) / seconds,
            _percentiles(first),
            _percentiles(gaps),
            1e3 * seconds / max(engine.steps - steps, 1),
            self.uploads - loads,
        )

    def first_token(self, rank: int) -> FirstToken:
        """Asks alone, in turns: with the adapter in its slot, and after it has left that."""
        engine, bank, name = self.engine, self.engine.bank, f"first of rank {rank}"
        assert bank is not None and engine.shape.max_length is not None
        prompt = [*range(1, min(64, engine.shape.max_length // 2) + 1)]
        params = SamplingParams(max_tokens=1, stop_tokens=())

        def ask() -> float:
            start = time.perf_counter()
            engine.submit(prompt, params, adapter=name).result()
            return 1e3 * (time.perf_counter() - start)

        engine.add_adapter(name, random_adapter(self.model, rank))
        ask()  # has it read and checked
        on_device, from_host = [], []
        for _ in range(self.options.turns):
            on_device.append(ask())
            bank.unload(name)
            from_host.append(ask())
        engine.remove_adapter(name)
        return FirstToken(rank, statistics.median(on_device), statistics.median(from_host))


class _Clock:
    """When a request was asked, and when its tokens came."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.times: list[float] = []

    def tick(self, _: object) -> None:
        self.times.append(time.perf_counter())


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """In milliseconds, the median and the 99th percent."""
    if not seconds:
        return 0.0, 0.0
    return 1e3 * statistics.median(seconds), 1e3 * float(np.percentile(seconds, 99))
