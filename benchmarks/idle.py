"""How long the GPU waits in the engine's own loop: sampling, stop checks and answers' texts too."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models

from benchmarks.step import (
    LLAMA_3_8B,
    PROMPTS,
    RANK,
    SMALL,
    Kernel,
    LaunchedKernel,
    Shape,
    kernels_of,
    launched_kernels,
    load_random,
    random_model,
)
from jax_lora.serving import Engine, Generation, SamplingParams, StepShape

AIM = 0.02


@dataclasses.dataclass(frozen=True)
class Load:
    """What runs while it is looked at.

    Attributes:
      rows: requests, all of which decode. prompt: tokens of each.
      steps: that are judged. profiled: steps of the profile.
      spare: tokens that answers have besides, as requests start one after the other.
    """

    rows: int
    prompt: int
    steps: int
    profiled: int
    spare: int

    @classmethod
    def of_this_machine(cls) -> "Load":
        """64 rows and 500 steps on a GPU, else a few."""
        if jax.default_backend() == "gpu":
            return cls(rows=64, prompt=256, steps=500, profiled=20, spare=268)
        return cls(rows=8, prompt=8, steps=10, profiled=4, spare=46)

    @property
    def answer(self) -> int:
        return self.steps + self.spare


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the engine's loop does with the GPU.

    Attributes:
      steps: that were judged, one behind the other. step_ms: of these, while they were traced.
      untraced_ms: of as many steps before, which nobody traced.
      idle: the share of the time in which no kernel ran, from the first to the last of the trace;
        None without a GPU.
      profiled: steps of the profile. kernels: that these launch, the longest first.
    """

    device: str
    rows: int
    steps: int
    step_ms: float
    untraced_ms: float
    idle: float | None
    profiled: int
    kernels: tuple[Kernel, ...]

    @property
    def is_met(self) -> bool | None:
        """Whether the GPU idles as little as it should; None without one."""
        return None if self.idle is None else self.idle <= AIM


def idle_share(launched: Iterable[LaunchedKernel]) -> float | None:
    """The share of the time in which none of them runs; None if there are none.

    On several GPUs that of the one that idles most. Kernels of several streams may overlap. Copies
    from and to the host are no work of the GPU.
    """
    by_device: dict[str, list[tuple[float, float]]] = {}
    for kernel in launched:
        if not kernel.name.startswith(("MemcpyD2H", "MemcpyH2D")):
            by_device.setdefault(kernel.device, []).append((kernel.start_ns, kernel.end_ns))
    return max(map(_idle, by_device.values()), default=None)


def _idle(intervals: list[tuple[float, float]]) -> float:
    intervals.sort()
    begin, end, busy = intervals[0][0], intervals[0][0], 0.0
    for start, stop in intervals:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return 1 - busy / (end - begin) if end > begin else 0.0


def run(layers: int | None, progress: Callable[[str], None], load: Load | None = None) -> Profile:
    """Looks at an engine of 8 adapters of rank 16 while all of its rows decode.

    Half of the requests are greedy, the others draw with top-p. All have a stop text and a stop
    token that never come.
    """
    load = load or Load.of_this_machine()
    config = LLAMA_3_8B if jax.default_backend() == "gpu" else SMALL
    shape = Shape.of_this_machine(layers, load.rows)
    progress(f"making a model of {shape.config.num_hidden_layers} layers")
    model = random_model(shape)
    bank, names, _ = load_random(model, (RANK,) * PROMPTS)
    length = load.prompt + load.answer
    steps = StepShape(rows=load.rows, max_length=length, contexts=(length,), lanes=(0, 4), chunk=64)
    with Engine(model, bank, _tokenizer(config.vocab_size), shape=steps) as engine:
        progress("compiling")
        engine.warmup()
        progress(f"timing {load.steps} steps")
        _, untraced_ms = _decode(engine, names, load, load.steps, contextlib.nullcontext())
        with _traced([]):
            pass  # the first start takes long
        progress(f"tracing {load.steps} steps")
        launched: list[LaunchedKernel] = []
        judged, step_ms = _decode(engine, names, load, load.steps, _traced(launched))
        idle = idle_share(launched)
        progress(f"tracing {load.profiled} steps")
        launched = []
        profiled, _ = _decode(engine, names, load, load.profiled, _traced(launched))
    device, kernels = jax.devices()[0].device_kind, kernels_of(launched, profiled)
    return Profile(device, load.rows, judged, step_ms, untraced_ms, idle, profiled, kernels)


def _decode(
    engine: Engine,
    names: list[str],
    load: Load,
    steps: int,
    watched: contextlib.AbstractContextManager[None],
) -> tuple[int, float]:
    """Steps that were watched, about so many, and milliseconds of one: all rows decode in them."""
    asked: list[Generation] = []
    for n in range(load.rows):
        params = SamplingParams(
            max_tokens=load.answer,
            temperature=float(n % 2),
            top_p=0.9,
            seed=n,
            stop=("never",),
            stop_tokens=(engine.config.vocab_size,),
        )
        prompt = [(n + k) % engine.config.vocab_size for k in range(load.prompt)]
        asked.append(engine.submit(prompt, params, adapter=names[n % len(names)]))
    for generation in asked:
        next(iter(generation))
    with watched:
        begin, start = engine.steps, time.perf_counter()
        while engine.steps < begin + steps and engine.num_open == load.rows:
            time.sleep(0.001)
        done, seconds = engine.steps - begin, time.perf_counter() - start
    for generation in asked:
        generation.cancel()
    for generation in asked:
        generation.result()
    return done, 1e3 * seconds / max(done, 1)


@contextlib.contextmanager
def _traced(launched: list[LaunchedKernel]) -> Iterator[None]:
    """Adds what the GPUs run meanwhile. The host's own calls are not traced: that slows them."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield
        launched += launched_kernels(Path(folder))


def _tokenizer(size: int) -> Tokenizer:
    """A word for each token."""
    tokenizer = Tokenizer(models.WordLevel({f"{n} ": n for n in range(size)}, "0 "))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
