"""Times the steps of a stack of Llama-3-70B's layers on 1, 2, 4 and more GPUs, tensor-parallel."""

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import train
from benchmarks.step import (
    MIXED_RANKS,
    PROJECTIONS,
    PROMPTS,
    RANK,
    Shape,
    inputs_of,
    on_gpu,
    random_adapter,
    random_model,
    steady_us,
    traced_kernels,
)
from jax_lora.bank import AdapterBank
from jax_lora.batch import AdapterBatch, use
from jax_lora.llama import KVCache, Llama, LlamaConfig, decode, prefill
from jax_lora.nn.apply import apply_lora
from jax_lora.serving.options import step_options
from pallas_kernels import padded_rank

LLAMA_3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
)
# What a machine without a GPU runs: every part of the benchmark, on up to eight devices.
SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)
_FILLED = 0.7  # of one GPU's memory, by weights and cache
PHASES = ("decode", "prefill", "training")
# A decode or prefill step over the same without LoRA, at most, by GPUs; rank 16 and mixed ranks.
TARGETS = {1: (1.08, 1.10), 2: (1.10, 1.14)}
TRAINING_TARGET = 1.30
US_PER_LAYER = 20.0  # what LoRA may add from four GPUs on
_COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One step in steady state.

    Attributes:
      phase: of `PHASES`. adapters: which, in words.
      gpus: the world size.
      us: microseconds of a step. base_us: those of the step without LoRA.
      target_us: microseconds at most; None where there is no target, or no GPU.
      exchanges: the program's collectives, as it lists them: a scan's turn once. None: not counted.
      exchange_us: what they take in a step, of a profile; None without a GPU.
      error: the largest difference of a logit from one GPU's, over the largest logit; None where
        there are no logits.
    """

    phase: str
    adapters: str
    gpus: int
    us: float
    base_us: float
    target_us: float | None
    exchanges: dict[str, int] | None
    exchange_us: float | None
    error: float | None

    @property
    def lora_share(self) -> float:
        """What LoRA adds, over the step without."""
        return self.us / self.base_us - 1


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows. `fully_sharded`: whether ranks were divided too."""

    device: str
    date: str
    shape: Shape
    fully_sharded: bool
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def shape_of_this_machine(
    layers: int | None, batch: int | None, context: int | None, tokens: int | None
) -> Shape:
    """As many layers of Llama-3-70B as one GPU holds, else a small model; None for its own numbers.

    Raises:
      ValueError: as `Shape`.
    """
    config, numbers = (LLAMA_3_70B, (64, 1024, 4096)) if on_gpu() else (SMALL, (16, 32, 64))
    given = (batch, context, tokens)
    rows, cached, prompts = (own if it is None else it for own, it in zip(numbers, given))
    if layers is None:
        layers = _layers_that_fit(config, rows * cached) if on_gpu() else config.num_hidden_layers
    config = dataclasses.replace(config, num_hidden_layers=layers)
    return Shape(config, rows, cached, prompts)


def _layers_that_fit(config: LlamaConfig, cached_tokens: int) -> int:
    """How many layers one GPU holds, with their part of the cache."""
    hidden, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (config.num_attention_heads * config.head_dim + keys)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * keys * cached_tokens
    memory = jax.local_devices()[0].memory_stats() or {}
    room = _FILLED * memory["bytes_limit"] / 2 - 2 * hidden * config.vocab_size
    return max(1, min(config.num_hidden_layers, int(room / layer)))


def world_sizes(most: int | None) -> list[int]:
    """1, 2, 4 and so on, up to the devices that there are.

    Raises:
      ValueError: there are fewer than `most`.
    """
    there = len(jax.devices())
    if most is not None and not 1 <= most <= there:
        raise ValueError(f"--gpus must lie in 1 to {there}, the devices that there are, got {most}")
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= (most or there)]


def run(
    shape: Shape,
    sizes: Sequence[int],
    progress: Callable[[str], None],
    *,
    fully_sharded: bool,
    phases: Sequence[str] = PHASES,
) -> Report:
    """Times steps of each phase: without LoRA, with adapters of one rank, and of mixed ranks.

    Weights, cache and adapters are random, in bfloat16, and the same on each number of GPUs. A
    training step is that of `benchmarks.train`, of as many tokens as a prefill; it takes whole
    ranks alone.

    Raises:
      ValueError: an unknown phase, or training with ranks divided.
    """
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise ValueError(f"phases are {', '.join(PHASES)}, got {', '.join(unknown):.200}")
    if fully_sharded and "training" in phases:
        raise ValueError("--fully-sharded is timed in decode and prefill; leave training out")
    rows: list[Row] = []
    logits: dict[tuple[str, str], np.ndarray] = {}
    for size in sizes:
        mesh = jax.make_mesh((size,), ("tp",), axis_types=(AxisType.Auto,))
        bench = _OnMesh(mesh, shape, progress, fully_sharded, logits)
        rows += [bench.row(phase, name) for phase in phases for name in _adapters()]
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return Report(device, date, shape, fully_sharded, rows)


def _adapters() -> dict[str, tuple[int, ...]]:
    return {
        "no LoRA": (),
        f"{PROMPTS} of rank {RANK}": (RANK,) * PROMPTS,
        f"ranks {', '.join(map(str, MIXED_RANKS))}": MIXED_RANKS,
    }


class _OnMesh:
    """The weights on one number of GPUs.

    Args:
      logits: of each phase and name, on one GPU; the first to be timed tells them.
    """

    def __init__(
        self,
        mesh: Mesh,
        shape: Shape,
        progress: Callable[[str], None],
        fully_sharded: bool,
        logits: dict[tuple[str, str], np.ndarray],
    ) -> None:
        progress(f"making {shape.config.num_hidden_layers} layers on {mesh.size} GPUs")
        self.mesh, self.shape, self.progress = mesh, shape, progress
        self.fully_sharded, self.logits = fully_sharded, logits
        self.graphdef, self.weights = nnx.split(random_model(shape, self._of_weight))
        self.models: dict[str, tuple[Llama, dict[str, AdapterBatch]]] = {}
        self.base_us: dict[str, float] = {}

    def _of_weight(self, path: Sequence[Any], ndim: int) -> NamedSharding:
        """Attention and MLP: column-parallel, then row-parallel. The rest is whole, but the last
        layer."""
        ends: tuple[str | None, ...] = ()
        if path[-1] == "kernel":
            ends = ("tp", None) if path[-2] in ("o_proj", "down_proj") else (None, "tp")
        return NamedSharding(self.mesh, PartitionSpec(*[None] * (ndim - len(ends)), *ends))

    def row(self, phase: str, name: str) -> Row:
        what = f"{phase}, {name}, {self.mesh.size} GPUs"
        self.progress(f"compiling {what}")
        row = self._training(name) if phase == "training" else self._row(phase, name)
        self.progress(f"{what}: {row.us:,.0f} us, {row.lora_share:+.1%}")
        return row

    def _training(self, name: str) -> Row:
        way = dict(zip(_adapters(), ("frozen", "adapters", "mixed")))[name]
        shape = train.Shape(self.shape.config, self.shape.prefill)
        base = nnx.merge(self.graphdef, self.weights)
        us = train.Step(way, shape, base).row(profile=False).ms * 1e3
        base_us = self.base_us.setdefault("training", us)
        target_us = TRAINING_TARGET * base_us if way != "frozen" and on_gpu() else None
        return Row("training", name, self.mesh.size, us, base_us, target_us, None, None, None)

    def _model(self, name: str) -> tuple[Llama, dict[str, AdapterBatch]]:
        """A model, and its batches by phase; without adapters, none."""
        ranks = _adapters()[name]
        model = nnx.merge(self.graphdef, self.weights)
        if not ranks:
            return model, {}
        self.progress(f"loading {len(ranks)} adapters")
        world_size = self.mesh.size if self.fully_sharded else 1
        slots = collections.Counter(padded_rank(rank, world_size) for rank in sorted(ranks))
        apply_lora(
            model,
            slots=dict(slots),
            buckets=tuple(slots),
            target=PROJECTIONS,
            fully_sharded=self.fully_sharded,
        )
        bank = AdapterBank(model)
        adapters = {rank: random_adapter(model, rank) for rank in set(ranks)}
        for number, rank in enumerate(ranks):
            bank.load(f"{number}", adapters[rank])
        rows = [f"{row % len(ranks)}" for row in range(self.shape.batch)]
        decoded, read = bank.batch(rows), bank.batch(rows[:PROMPTS], phase="prefill")
        return model, jax.device_put({"decode": decoded, "prefill": read})

    def _row(self, phase: str, name: str) -> Row:
        model, batches = self.models[name] = self.models.get(name) or self._model(name)
        batch = batches.get(phase)
        step = _Step(model, self.shape, phase, batch, self.mesh)
        got = np.asarray(step(), np.float32)
        want = self.logits.setdefault((phase, name), got)
        us, _ = steady_us(step)
        base_us = self.base_us.setdefault(phase, us)
        return Row(
            phase=phase,
            adapters=name,
            gpus=self.mesh.size,
            us=us,
            base_us=base_us,
            target_us=_target_us(name, self.mesh.size, base_us, self.shape) if batch else None,
            exchanges=step.exchanges,
            exchange_us=step.exchange_us() if on_gpu() else None,
            error=float(np.abs(got - want).max() / np.abs(want).max()),
        )


def _target_us(name: str, gpus: int, base_us: float, shape: Shape) -> float | None:
    """What a decode or prefill step with the adapters `name` may take; None without a GPU."""
    if not on_gpu():
        return None
    if gpus not in TARGETS:
        return base_us + US_PER_LAYER * shape.config.num_hidden_layers
    one_rank, mixed = TARGETS[gpus]
    return base_us * (mixed if name.startswith("ranks") else one_rank)


_READS: dict[str, Callable[..., Any]] = {"decode": decode, "prefill": prefill}


class _Step:
    """A compiled step, called on the cache that the call before it gave back."""

    def __init__(
        self, model: Llama, shape: Shape, phase: str, batch: AdapterBatch | None, mesh: Mesh
    ) -> None:
        graphdef, state = nnx.split(model)
        self._arrays, treedef = jax.tree.flatten(state)
        self._batch, self._size, read = batch, mesh.size, _READS[phase]

        def step(arrays: Any, cache: KVCache, batch: AdapterBatch | None, *inputs: Any) -> Any:
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))
            with use(batch):
                logits, after = read(model, cache, *inputs)
            return logits, dataclasses.replace(after, lengths=cache.lengths)

        cache, inputs = inputs_of(shape, phase)
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tp"))
        whole = NamedSharding(mesh, PartitionSpec())
        keys, values = jax.device_put((cache.keys, cache.values), heads)
        lengths, self._inputs = jax.device_put((cache.lengths, inputs), whole)
        self._cache = KVCache(keys, values, lengths)
        of_cache = jax.tree.map(lambda array: array.sharding, self._cache)
        jitted = jax.jit(step, donate_argnums=1, out_shardings=(whole, of_cache))
        lowered = jitted.lower(self._arrays, self._cache, batch, *self._inputs)
        self._compiled = lowered.compile(step_options())
        found = re.findall(rf"{_COLLECTIVES}(?:-start)?\(", self._compiled.as_text() or "")
        self.exchanges = dict(collections.Counter(found))

    def __call__(self) -> jax.Array:
        logits, self._cache = self._compiled(self._arrays, self._cache, self._batch, *self._inputs)
        return logits

    def exchange_us(self) -> float:
        """What the collectives of a step take on one GPU."""
        kernels = [k for k in traced_kernels(self) if re.search(rf"nccl|{_COLLECTIVES}", k.name)]
        return sum(kernel.us for kernel in kernels) / self._size
