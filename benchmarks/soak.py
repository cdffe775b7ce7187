"""A long mixed load on the engine: broken adapters, replacements and cancellations throughout."""

import dataclasses
import gc
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.step import PROJECTIONS, Shape, random_adapter, random_model
from jax_lora.adapters import Adapter, LoRAWeights, save_peft
from jax_lora.bank import AdapterBank
from jax_lora.demo.job import counted_compilations
from jax_lora.nn.apply import apply_lora
from jax_lora.serving import (
    AdapterLimits,
    Answer,
    Engine,
    FinishReason,
    Generation,
    RequestError,
    SamplingParams,
    StepShape,
)

# One shape, so that a request has the same bits whatever the others do. There are blocks for a
# third of the rows at their whole length, so that blocks change hands all the time.
STEPS = StepShape(rows=16, max_length=96, chunk=16, lanes=(2,), block=16, blocks=32)

# What memory may be at the end over that halfway, each time when nobody asks anything. The device's
# is arrays of fixed sizes. The process has its answers too, and gaps between what it gave back.
DEVICE_GROWTH, HOST_GROWTH = 1.01, 1.05


@dataclasses.dataclass(frozen=True)
class Load:
    """What a soak does.

    Attributes:
      slots: of each bucket. ranks: of adapters, the least and the most, drawn by their logarithm.
      broken: the share of adapters that can't be loaded. cancelled: of requests.
      replaced: replacements of an adapter, per request.
      in_flight: requests at a time, at most.
    """

    adapters: int = 200
    requests: int = 2000
    slots: Mapping[int, int] = dataclasses.field(
        default_factory=lambda: {8: 3, 16: 3, 32: 3, 64: 3, 128: 2, 256: 2}
    )
    ranks: tuple[int, int] = (1, 256)
    broken: float = 0.05
    cancelled: float = 0.1
    replaced: float = 0.05
    in_flight: int = 64
    seed: int = 0


@dataclasses.dataclass
class Summary:
    """What came of it.

    Attributes:
      wrong: what should not be, in words.
      device_bytes, host_bytes: what is in use on the devices, and by the process; halfway and at
        the end.
    """

    device: str
    requests: int
    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    replacements: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    compilations: int = 0
    device_bytes: tuple[int, int] = (0, 0)
    host_bytes: tuple[int, int] = (0, 0)
    wrong: list[str] = dataclasses.field(default_factory=list)

    @property
    def grown(self) -> list[str]:
        """Memory that was not flat over the second half, in words."""
        judged = (
            ("the devices", self.device_bytes, DEVICE_GROWTH),
            ("the process", self.host_bytes, HOST_GROWTH),
        )
        return [
            f"{end:,} bytes of {what} at the end are {end / half - 1:.1%} more than the {half:,} "
            f"halfway; at most {most - 1:.0%} may be"
            for what, (half, end), most in judged
            if end > most * half
        ]

    @property
    def ok(self) -> bool:
        ended = self.answered + self.cancelled + self.failed
        is_right = not (self.wrong or self.grown or self.compilations)
        return is_right and ended == self.requests


class _Version(NamedTuple):
    """What makes an adapter. Nobody keeps its weights, which would count as the engine's memory."""

    rank: int
    seed: int


@dataclasses.dataclass
class _Asked:
    """A request; `versions` of its adapter are those that it may have begun with."""

    name: str | None
    prompt: list[int]
    params: SamplingParams
    generation: Generation
    first: int
    last: int | None = None


class _Soak:
    def __init__(self, load: Load, layers: int | None, folder: Path) -> None:
        self.load, self.folder = load, folder
        self.rng = np.random.default_rng(load.seed)
        self.model = random_model(Shape.of_this_machine(layers))
        apply_lora(
            self.model, slots=dict(load.slots), buckets=tuple(load.slots), target=PROJECTIONS
        )
        self.versions: dict[str, list[_Version | None]] = {}  # None for a broken one
        self.made = 0
        self.room = threading.Semaphore(load.in_flight)
        self.asked: list[_Asked] = []

    def run(self, progress: Callable[[str], None]) -> Summary:
        load = self.load
        summary = Summary(jax.devices()[0].device_kind, load.requests)
        limits = AdapterLimits(host_bytes=64 << 20)  # so that files are read again
        bank = AdapterBank(self.model)
        with Engine(self.model, bank, shape=STEPS, limits=limits) as engine:
            progress("compiling")
            engine.warmup()
            for n in range(load.adapters):
                self.add(engine, f"adapter {n}")
            progress(f"asking {load.requests} requests")
            start = time.perf_counter()
            with counted_compilations() as count:
                self.ask_all(engine, summary)
                summary.seconds = time.perf_counter() - start
                summary.compilations = count()
            progress("asking each alone")
            summary.steps = engine.steps
            self.check_all(engine, summary)
        return summary

    def ask_all(self, engine: Engine, summary: Summary) -> None:
        load, due = self.load, dict[int, Generation]()
        for n in range(load.requests):
            if n == load.requests // 2:
                halfway = self.idle_bytes()
            if self.rng.random() < load.replaced:
                summary.replacements += 1
                self.add(engine, str(self.rng.choice(list(self.versions))))
            if self.rng.random() < 0.02:  # a lull: all that run end
                self.wait()
            self.room.acquire()
            generation = self.ask(engine)
            if self.rng.random() < load.cancelled:
                due[n + int(self.rng.integers(0, 12))] = generation
            if (late := due.pop(n, None)) is not None:
                late.cancel()
        end = self.idle_bytes()
        summary.device_bytes = halfway[0], end[0]
        summary.host_bytes = halfway[1], end[1]

    def wait(self) -> None:
        for asked in self.asked:
            _outcome(asked.generation)

    def idle_bytes(self) -> tuple[int, int]:
        """What the devices and the process take when all that was asked has ended."""
        self.wait()
        gc.collect()
        return device_bytes(), host_bytes()

    def ask(self, engine: Engine) -> Generation:
        rng, names = self.rng, list(self.versions)
        popular = int(rng.zipf(1.5)) - 1
        name = names[popular] if popular < len(names) else None
        length = int(rng.integers(1, 60))
        prompt = rng.integers(0, self.model.config.vocab_size, length).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 33)),
            temperature=float(rng.choice([0.0, 0.0, 1.0])),
            top_p=float(rng.choice([1.0, 0.9])),
            seed=len(self.asked),
            stop_tokens=(),
        )
        generation = engine.submit(prompt, params, adapter=name)
        first = 0 if name is None else len(self.versions[name]) - 1
        asked = _Asked(name, prompt, params, generation, first)
        self.asked.append(asked)

        def end(_: Generation) -> None:
            asked.last = 0 if name is None else len(self.versions[name]) - 1
            self.room.release()

        generation.on_done(end)
        return generation

    def add(self, engine: Engine, name: str) -> None:
        """A new adapter of this name, in the place of the one before."""
        self.made += 1
        low, high = np.log(self.load.ranks)
        rank = int(np.exp(self.rng.uniform(low, high)) + 0.5)
        version = _Version(rank, self.made)
        adapter = random_adapter(self.model, *version)
        is_broken = self.rng.random() < self.load.broken
        versions = self.versions.setdefault(name, [])
        # Before the engine has it: a request may begin with it at once.
        versions.append(None if is_broken else version)
        source: Path | Adapter = adapter
        if self.rng.random() < 0.7:
            source = self.folder / f"{self.made}"
            save_peft(adapter, source)
        if is_broken:
            source = _break(source, int(self.rng.integers(4)))
        engine.add_adapter(name, source, replace=True)

    def check_all(self, engine: Engine, summary: Summary) -> None:
        order = sorted(range(len(self.asked)), key=lambda n: str(self.asked[n].name))
        here: _Version | None = None
        for n in order:
            asked = self.asked[n]
            found, reason = _outcome(asked.generation)
            versions: list[_Version | None] = [None]
            if asked.name is not None:
                versions = self.versions[asked.name][asked.first : (asked.last or 0) + 1]
            if found is None:
                summary.failed += 1
                if asked.name is None or None not in versions:
                    summary.wrong.append(f"request {n} of a sound adapter failed: {reason}")
                continue
            is_cancelled = found.finish_reason is FinishReason.cancelled
            summary.cancelled += is_cancelled
            summary.answered += not is_cancelled
            summary.tokens += len(found.tokens)
            if is_cancelled and not found.tokens:
                continue
            expected = []
            for version in versions:
                if asked.name is not None and version is None:
                    continue
                if version not in (here, None):
                    here = version
                    adapter = random_adapter(self.model, *version)
                    engine.add_adapter("alone", adapter, replace=True)
                name = None if version is None else "alone"
                expected.append(engine.submit(asked.prompt, asked.params, adapter=name).result())
            if not any(_begins(answer, found) for answer in expected):
                summary.wrong.append(f"request {n} with {asked.name!r} is not as it is alone")


def run(load: Load, progress: Callable[[str], None], *, layers: int | None = None) -> Summary:
    """Runs the load on a random model, and then each sound request alone.

    Args:
      layers: of the model: Llama-3-8B's on a GPU, else a small one; None for all.
    """
    folder = Path(tempfile.mkdtemp(prefix="jax-lora-soak-"))
    try:
        return _Soak(load, layers, folder).run(progress)
    finally:
        shutil.rmtree(folder)


def _break(source: Path | Adapter, way: int) -> Path | Adapter:
    """The adapter, such that it can't be loaded."""
    if isinstance(source, Adapter):
        spoilt = {
            name: LoRAWeights(np.full_like(w.a, np.nan), w.b, w.scale)
            for name, w in source.modules.items()
        }
        return Adapter(source.config, spoilt)
    weights, config = source / "adapter_model.safetensors", source / "adapter_config.json"
    if way == 0:
        weights.write_bytes(weights.read_bytes()[:-7])
    elif way == 1:
        config.unlink()
    elif way == 2:
        config.write_text(re.sub(r'"r": \d+', '"r": 999', config.read_text()))
    else:
        weights.write_bytes(b"\0" * 64)
    return source


def _outcome(generation: Generation) -> tuple[Answer | None, str]:
    """The answer, or why there is none."""
    try:
        return generation.result(), ""
    except RequestError as error:
        return None, str(error)


def _begins(whole: Answer, answer: Answer) -> bool:
    """Whether the answer is the whole one, or its beginning where it was cancelled."""
    size = len(answer.tokens)
    is_same = (whole.tokens[:size], whole.logprobs[:size]) == (answer.tokens, answer.logprobs)
    return is_same and (answer.finish_reason is FinishReason.cancelled or whole == answer)


def device_bytes() -> int:
    """What is in use on all devices: what their allocators say, or else the live arrays."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return sum(own["bytes_in_use"] for own in stats if own)
    return sum(array.nbytes for array in jax.live_arrays())


def host_bytes() -> int:
    """What the process takes of the memory; 0 where the system does not say."""
    resident = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(resident[1]) << 10 if resident else 0
