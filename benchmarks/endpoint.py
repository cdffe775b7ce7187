"""What HTTP costs: one closed loop of requests, on an engine and through a server before it."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import uvicorn
from tokenizers import Tokenizer, models

from benchmarks.serve import Trace, Workload
from benchmarks.step import PROJECTIONS, PROMPTS, RANK, Shape, random_adapter, random_model
from jax_lora.bank import AdapterBank
from jax_lora.nn.apply import apply_lora
from jax_lora.serving import Engine, Piece, SamplingParams, StepShape
from jax_lora.serving.server.app import Server
from jax_lora.serving.server.asking import Served
from jax_lora.serving.server.limits import Limits


class Question(NamedTuple):
    """Tokens for an adapter, and how many the answer has."""

    adapter: str
    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """All questions answered once, by one way.

    Attributes:
      first_ms: from asking to the first token; the median.
      step_ms: of the engine's steps, in the mean.
      http_ms: of processor time that the server's thread takes beside a step.
    """

    way: str
    tokens_per_s: float
    first_ms: float
    step_ms: float
    http_ms: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Turns of both ways."""

    device: str
    date: str
    layers: int
    requests: int
    streams: int
    turns: list[Turn]

    @property
    def lost(self) -> float:
        """The share of the engine's tokens per second that is lost through HTTP."""
        direct, http = (
            statistics.median(turn.tokens_per_s for turn in self.turns if turn.way == way)
            for way in ("engine", "HTTP")
        )
        return 1 - http / direct

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "lost": self.lost}


def run(layers: int | None, requests: int, turns: int, progress: Callable[[str], None]) -> Report:
    """Serves S-LoRA's lengths for 8 adapters of rank 16, with all rows of the engine in use.

    The client is another process. Ways take turns, because a machine changes its speed.
    """
    on_gpu = jax.default_backend() == "gpu"
    steps = StepShape(max_length=1024) if on_gpu else StepShape(rows=8, max_length=64, chunk=16)
    shape = Shape.of_this_machine(layers)
    progress(f"making a model of {shape.config.num_hidden_layers} layers")
    model = random_model(shape)
    apply_lora(model, slots=PROMPTS, buckets=(RANK,), target=PROJECTIONS)
    names = [f"adapter-{number}" for number in range(PROMPTS)]
    sources = {name: random_adapter(model, RANK, seed) for seed, name in enumerate(names)}
    vocabulary = shape.config.vocab_size
    engine = Engine(model, AdapterBank(model), _words(vocabulary), adapters=sources, shape=steps)
    with engine:
        progress("compiling")
        engine.warmup()
        questions = _questions(requests, names, vocabulary, engine.shape)
        _directly(engine, questions[: steps.rows])  # uploads the adapters
        found: list[Turn] = []
        with _served(engine) as (port, cpu_seconds):
            for _ in range(turns):
                found.append(_directly(engine, questions))
                found.append(_over_http(engine, questions, port, cpu_seconds))
                for turn in found[-2:]:  # lest a run that is cut off has told nothing
                    progress(f"{turn.way}: {turn.tokens_per_s:,.0f} tokens/s")
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return Report(device, date, shape.config.num_hidden_layers, requests, steps.rows, found)


def _words(vocabulary: int) -> Tokenizer:
    """Gives each token a word, so that answers have text of the usual length."""
    return Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocabulary)}, unk_token="w0"))


def _questions(
    requests: int, names: Sequence[str], vocabulary: int, shape: StepShape
) -> list[Question]:
    assert shape.max_length is not None
    load = Workload("HTTP", (RANK,), len(names), "uniform", "slora", shape.rows)
    trace = Trace.of(load, requests, shape.max_length, 0)
    rng = np.random.default_rng(0)
    numbers = zip(trace.adapters.tolist(), trace.prompts.tolist(), trace.answers.tolist())
    return [
        Question(names[adapter], rng.integers(0, vocabulary, prompt).tolist(), answer)
        for adapter, prompt, answer in numbers
    ]


def _directly(engine: Engine, questions: Sequence[Question]) -> Turn:
    room = threading.Semaphore(engine.shape.rows)
    first: list[float] = []
    generations = []
    steps, start = engine.steps, time.perf_counter()
    for question in questions:
        room.acquire()
        params = SamplingParams(max_tokens=question.max_tokens, stop_tokens=())
        generation = engine.submit(
            question.prompt, params, adapter=question.adapter, on_piece=_first_piece(first)
        )
        generation.on_done(lambda _: room.release())
        generations.append(generation)
    tokens = sum(len(generation.result().tokens) for generation in generations)
    seconds = time.perf_counter() - start
    step_ms = 1e3 * seconds / (engine.steps - steps)
    return Turn("engine", tokens / seconds, 1e3 * statistics.median(first), step_ms, 0.0)


def _first_piece(seconds: list[float]) -> Callable[[Piece], None]:
    """Adds the time from now to the first piece."""
    asked, is_first = time.perf_counter(), True

    def told(_: Piece) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            seconds.append(time.perf_counter() - asked)

    return told


@contextlib.contextmanager
def _served(engine: Engine) -> Iterator[tuple[int, Callable[[], float]]]:
    """The port of a server, and what says the processor time that its thread has taken."""
    server = Server(Served(engine, Path(), "base"), [], Limits())
    config = uvicorn.Config(server.app(), port=0, log_level="error", access_log=False)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    try:
        yield running.servers[0].sockets[0].getsockname()[1], lambda: time.clock_gettime(clock)
    finally:
        running.should_exit = True
        thread.join()


def _over_http(
    engine: Engine, questions: Sequence[Question], port: int, cpu_seconds: Callable[[], float]
) -> Turn:
    command = [sys.executable, "-m", "benchmarks.endpoint_client"]
    asked = json.dumps({"port": port, "streams": engine.shape.rows, "questions": questions})
    steps, cpu = engine.steps, cpu_seconds()
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the client has failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    count = engine.steps - steps
    return Turn(
        "HTTP",
        told["tokens"] / told["seconds"],
        1e3 * told["first_s"],
        1e3 * told["seconds"] / count,
        1e3 * (cpu_seconds() - cpu) / count,
    )
