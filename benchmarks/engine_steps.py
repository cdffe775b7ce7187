"""Times the engine's own steps: sampling, blocks and all, beside the same without LoRA."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from benchmarks.step import (
    MIXED_RANKS,
    PROMPTS,
    RANK,
    Report,
    Row,
    Shape,
    load_random,
    random_model,
)
from benchmarks.timing import COPY_RATE
from jax_lora.models.pages import blocks_of
from jax_lora.serving import StepShape
from jax_lora.serving.engine.engine import Stepper
from jax_lora.serving.engine.step import Inputs, no_work


def run(shape: Shape, progress: Callable[[str], None], only: str = "") -> Report:
    """Times decode steps of `shape.batch` rows with `shape.context` cached tokens each.

    Weights and adapters are random, in bfloat16. The host launches steps as the engine does, with
    inputs of its own for each.

    Args:
      only: of the rows behind the first, those whose name has one of these texts, between commas.
    """
    bench = _Bench(shape, progress, only)
    bench.time_without_lora()
    bench.time_ranks((RANK,) * PROMPTS, f"{PROMPTS} adapters of rank {RANK}", 0.95)
    ranks = ", ".join(map(str, MIXED_RANKS))
    bench.time_ranks(MIXED_RANKS, f"{PROMPTS} adapters of ranks {ranks}", 0.88)
    bench.time_ranks((RANK,) * shape.batch, f"{shape.batch} adapters of rank {RANK}", None)
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return Report(device, date, shape, bench.weight_bytes, bench.rows, [])


class _Bench:
    def __init__(self, shape: Shape, progress: Callable[[str], None], only: str) -> None:
        self.only = only.split(",")
        progress(f"making a model of {shape.config.num_hidden_layers} layers")
        self.shape, self.progress = shape, progress
        self.graphdef, self.weights = nnx.split(random_model(shape))
        unread = self.weights["model"]["embed_tokens"]["embedding"].nbytes
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights)) - unread
        self.rows: list[Row] = []
        self.base_us = 0.0
        chunk = 64 if shape.batch == 64 else 8
        self.steps = StepShape(
            rows=shape.batch, max_length=shape.context, contexts=(shape.context,), chunk=chunk
        ).resolved(shape.config)

    def time_without_lora(self) -> None:
        floor_us = 1e6 * (self.weight_bytes + self.shape.cache_bytes) / COPY_RATE
        target = f"1.3 x (weights + cache) / {COPY_RATE / 1e12:.2f} TB/s"
        model = nnx.merge(self.graphdef, self.weights)
        stepper = Stepper(model, None, self.steps)
        self.base_us = self.add("no LoRA", stepper, [-1], 0, 1.3 * floor_us, target)
        if stepper.in_place and self.wants(name := "no LoRA, blocks gathered"):
            self.add(name, Stepper(model, None, self.steps, in_place=False), [-1], 0, None, "")
        for lanes in self.steps.lanes[1:]:
            name = f"no LoRA, and {lanes * self.steps.chunk} tokens of prompts"
            if self.wants(name):
                self.add(name, stepper, [-1], lanes, None, "")

    def wants(self, name: str) -> bool:
        return any(text in name for text in self.only)

    def time_ranks(self, ranks: Sequence[int], name: str, share: float | None) -> None:
        """`share`: of the tokens per second without LoRA, at least; None where bytes bound them."""
        if not self.wants(name):
            return
        self.progress(f"loading {name}")
        model = nnx.merge(self.graphdef, self.weights)
        bank, names, nbytes = load_random(model, ranks)
        ids = bank.batch(names)
        if share is None:
            target_us = 1.05 * (self.base_us + 1e6 * nbytes / COPY_RATE)
            target = f"1.05 x (no LoRA + adapters / {COPY_RATE / 1e12:.2f} TB/s)"
        else:
            target_us, target = self.base_us / share, f"{share:.0%} of no LoRA's tokens/s"
        slots_of_rows = np.asarray(ids.indices).tolist()
        self.add(name, Stepper(model, bank, self.steps), slots_of_rows, 0, target_us, target)

    def add(
        self,
        name: str,
        stepper: Stepper,
        adapters: list[int],
        lanes: int,
        target_us: float | None,
        target: str,
    ) -> float:
        """`adapters`: ids, which rows take in turns."""
        self.progress(f"compiling and timing {name}")
        us, host_us = _time(stepper, self.inputs(adapters, lanes))
        self.progress(f"{name} takes {us:,.0f} us")  # lest a run that is cut off has told nothing
        limit = target_us if jax.default_backend() == "gpu" else None
        self.rows.append(Row(name, us, host_us, limit, target))
        return us

    def inputs(self, adapters: list[int], num_lanes: int) -> Inputs[np.ndarray]:
        """Each row decodes its last token; lanes read the first chunks of some rows again."""
        steps, vocabulary = self.steps, self.shape.config.vocab_size
        width = blocks_of(self.shape.context, steps.block)
        inputs = no_work(steps.rows, num_lanes, steps.chunk, width, vocabulary)
        mixed = np.random.default_rng(0).permutation(steps.rows * width)
        inputs.rows.tables[:] = mixed.reshape(steps.rows, width)
        inputs.rows.starts[:] = self.shape.context - 1
        inputs.rows.counts[:] = 1
        inputs.sources[:] = np.arange(steps.rows)
        inputs.adapters[:] = np.resize(adapters, steps.rows)
        inputs.owners[:] = np.arange(num_lanes)
        inputs.lanes.tables[:] = inputs.rows.tables[:num_lanes]
        inputs.lanes.counts[:] = steps.chunk
        return inputs


def _time(stepper: Stepper, inputs: Inputs[np.ndarray]) -> tuple[float, float]:
    """Microseconds of a step in steady state, and those that the host takes to launch one."""

    def seconds(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(count):
            outputs = stepper.run(inputs)
        launched = time.perf_counter()
        outputs.tokens.block_until_ready()
        return time.perf_counter() - start, (launched - start) / count

    seconds(2)
    count = max(3, min(100, round(0.2 / seconds(1)[0])))
    # The difference of two lengths leaves out what starting and ending take.
    runs = [(seconds(count), seconds(2 * count)) for _ in range(5)]
    us = statistics.median((long - short) / count for (short, _), (long, _) in runs) * 1e6
    return us, statistics.median(host for (_, host), _ in runs) * 1e6
