"""Times the whole step of a Llama: without LoRA, without adapters in the batch, and with them."""

import collections
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from benchmarks.launches import Launch
from benchmarks.timing import COPY_RATE, loop_us
from jax_lora.adapters import Adapter, LoRAConfig, LoRAWeights
from jax_lora.bank import AdapterBank
from jax_lora.batch import AdapterBatch, use
from jax_lora.llama import KVCache, Llama, LlamaConfig, decode, prefill
from jax_lora.nn.apply import apply_lora
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import array_shapes, numbered_names, path_name, with_numbers
from jax_lora.serving.options import step_options
from pallas_kernels import make_segments

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
)
# What a machine without a GPU runs: every part of the benchmark, in seconds.
SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)

RANK = 16
MIXED_RANKS = (8, 8, 16, 16, 32, 64, 64, 128)
ONE_BUCKET = (48,) * 7  # of as many bytes: the ranks add up to the same
PROMPTS = len(MIXED_RANKS)  # of a prefill; also the adapters of the rows with several
PROJECTIONS = (r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj")
# What does not wait for each other runs side by side in a CUDA graph: LoRA beside the product that
# it is added to. XLA's default orders all launches of a step one behind the other.
SEGMENTS = {256: 10.0, 8192: 25.0}  # microseconds at most, by tokens
_SEGMENT_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and what its steps read: `batch` rows with `context` cached tokens each, or
    `prefill` tokens in all of eight prompts. `scan`: whether its layers are run by a scan.

    Raises:
      ValueError: a number is below 1, or `batch` or `prefill` is no multiple of eight.
    """

    config: LlamaConfig
    batch: int
    context: int
    prefill: int
    scan: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "context", "prefill"):
            value, unit = getattr(self, name), 1 if name == "context" else PROMPTS
            if value < 1 or value % unit:
                raise ValueError(f"{name} must be a positive multiple of {unit}, got {value}")

    @classmethod
    def of_this_machine(
        cls,
        layers: int | None = None,
        batch: int | None = None,
        context: int | None = None,
        prefill: int | None = None,
        *,
        scan: bool = True,
    ) -> "Shape":
        """Llama-3-8B's on a GPU, else a small one; None for its own numbers."""
        on_gpu = jax.default_backend() == "gpu"
        config = LLAMA_3_8B if on_gpu else SMALL
        if layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=layers)
        numbers = (64, 1024, 4096) if on_gpu else (16, 32, 64)
        given = (batch, context, prefill)
        rows, tokens, prompts = (own if it is None else it for own, it in zip(numbers, given))
        return cls(config, rows, tokens, prompts, scan)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a decode step reads."""
        config = self.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * self.batch * self.context * per_token


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Launches of one kernel in a step, and what they take together."""

    name: str
    launches: float
    us: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One step in steady state.

    Attributes:
      name: what it is.
      us: microseconds that it takes. host_us: that the host takes to start it, where it is one
        program; steps follow each other without a gap while that is less.
      target_us: microseconds at most; None where there is no target, or no GPU.
      target: in words.
      kernels: of a profile, the longest first; empty without.
    """

    name: str
    us: float
    host_us: float | None
    target_us: float | None
    target: str
    kernels: tuple[Kernel, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The time over the target: 1 or less is met."""
        return None if self.target_us is None else self.us / self.target_us

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}


@dataclasses.dataclass(frozen=True)
class Launches:
    """What one decode step of a compiled program launches; its longest path, where it chooses.

    Attributes:
      program: which one.
      launches: in all. custom_calls: of those, Pallas kernels, which are LoRA's.
      graphs: CUDA graphs that XLA captures. outside: launches outside of them.
    """

    program: str
    launches: int
    custom_calls: int
    graphs: int
    outside: int

    @classmethod
    def of_thunks(cls, program: str, thunks: str) -> "Launches":
        """Counts what XLA's dump lists: a launch per line, indented by what it lies in."""
        graphs = outside = 0
        graph_depth: int | None = None
        paths = {"": [0, 0]}  # launches and custom calls of each branch; "": of all paths
        branch, branch_depth = "", 0
        for line in thunks.splitlines():
            depth = len(line) - len(line.lstrip())
            if label := re.match(r" *(\w*branch\w*):", line):
                branch, branch_depth = label[1], depth
                continue
            if not (thunk := re.match(r" *\d+: (k\w+)", line)):
                continue
            branch = branch if depth > branch_depth else ""
            if graph_depth is not None and depth <= graph_depth:
                graph_depth = None
            if thunk[1] == "kCommandBuffer":
                graphs += graph_depth is None
                graph_depth = depth if graph_depth is None else graph_depth
            elif thunk[1] != "kConditional":
                counts = paths.setdefault(branch, [0, 0])
                counts[0] += 1
                counts[1] += thunk[1] == "kCustomCall"
                outside += graph_depth is None
        shared = paths.pop("")
        longest = max(paths.values(), default=[0, 0])
        launches, custom_calls = (n + m for n, m in zip(shared, longest))
        return cls(program, launches, custom_calls, graphs, outside)


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows. Bytes are those that a decode step without LoRA reads, at least."""

    device: str
    date: str
    shape: Shape
    weight_bytes: int
    rows: list[Row]
    launches: list[Launches]

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {**dataclasses.asdict(self), "cache_bytes": self.shape.cache_bytes, "rows": rows}


def run(shape: Shape, progress: Callable[[str], None], *, profile: bool = False) -> Report:
    """Times the steps, by the library's own model and bank.

    Weights, cache and adapters are random, in bfloat16. A step is one compiled program; steps are
    called back to back, each on the cache that the one before it gave back.

    Raises:
      ValueError: `profile` without a GPU.
    """
    if profile and not on_gpu():
        raise ValueError(f"a profile needs a GPU, JAX runs on {jax.default_backend()}")
    bench = _Bench(shape, progress, profile)
    bench.time_without_lora()
    bench.time_adapters_of_one_rank()
    bench.time_mixed_ranks()
    bench.time_launches()
    bench.time_segments()
    return bench.report()


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class _Bench:
    """The rows so far, and the weights that all models share."""

    def __init__(self, shape: Shape, progress: Callable[[str], None], profile: bool) -> None:
        progress(f"making a model of {shape.config.num_hidden_layers} layers")
        self.shape, self.progress, self.profile = shape, progress, profile
        self.graphdef, self.weights = nnx.split(random_model(shape))
        unread = self.weights["model"]["embed_tokens"]["embedding"].nbytes
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights)) - unread
        self.rows: list[Row] = []
        self.launches: list[Launches] = []
        self.base_us = self.base_prefill_us = 0.0

    def report(self) -> Report:
        device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
        return Report(device, date, self.shape, self.weight_bytes, self.rows, self.launches)

    def add(
        self,
        program: "Program",
        batch: AdapterBatch | None,
        name: str,
        target_us: Any,
        target: str,
    ) -> float:
        self.progress(f"timing {name}")
        us, host_us = program.time(batch)
        self.progress(f"{name} takes {us:,.0f} us")  # lest a run that is cut off has told nothing
        kernels = program.profile(batch) if self.profile else ()
        limit = target_us if on_gpu() else None
        self.rows.append(Row(name, us, host_us, limit, target, kernels))
        return us

    def compile(self, model: Llama, phase: str, batch: AdapterBatch | None) -> "Program":
        self.progress(f"compiling a {phase} step")
        return Program(model, self.shape, phase, batch)

    def add_launches(self, program: "Program", name: str) -> None:
        if program.thunks:
            self.launches.append(Launches.of_thunks(name, program.thunks))

    def time_without_lora(self) -> None:
        model = nnx.merge(self.graphdef, self.weights)
        step = self.compile(model, "decode", None)
        self.add_launches(step, "no LoRA")
        floor_us = 1e6 * (self.weight_bytes + self.shape.cache_bytes) / COPY_RATE
        target = f"1.3 x (weights + cache) / {COPY_RATE / 1e12:.2f} TB/s"
        self.base_us = self.add(step, None, "no LoRA", 1.3 * floor_us, target)
        del step  # and its cache
        step = self.compile(model, "prefill", None)
        self.base_prefill_us = self.add(step, None, f"{self.prefill}, no LoRA", None, "")

    @property
    def prefill(self) -> str:
        return f"prefill of {self.shape.prefill} tokens"

    def load(self, ranks: Sequence[int]) -> tuple[Llama, AdapterBank, list[str], int]:
        """A model, its bank, its adapters in the order of `ranks`, and their bytes."""
        self.progress(f"loading {len(ranks)} adapters")
        model = nnx.merge(self.graphdef, self.weights)
        return model, *load_random(model, ranks)

    def time_adapters_of_one_rank(self) -> None:
        batch = self.shape.batch
        model, bank, names, nbytes = self.load([RANK] * batch)
        none, some, each = (
            jax.device_put(bank.batch(rows))
            for rows in ([None] * batch, [names[i % PROMPTS] for i in range(batch)], names)
        )
        step = self.compile(model, "decode", none)
        self.add_launches(step, f"bucket {RANK}")
        self.add_no_adapter(step, none, f"bucket {RANK}")
        name = f"{PROMPTS} adapters of rank {RANK}"
        self.add(step, some, name, 1.08 * self.base_us, "1.08 x no LoRA")
        target_us = 1.10 * (self.base_us + 1e6 * nbytes / COPY_RATE)
        target = f"1.10 x (no LoRA + adapters / {COPY_RATE / 1e12:.2f} TB/s)"
        self.add(step, each, f"{batch} adapters of rank {RANK}", target_us, target)
        del step
        some = jax.device_put(bank.batch(names[:PROMPTS], phase="prefill"))
        step = self.compile(model, "prefill", some)
        target_us = 1.12 * self.base_prefill_us
        self.add(step, some, f"{self.prefill}, {name}", target_us, "1.12 x its no LoRA")

    def time_mixed_ranks(self) -> None:
        model, bank, names, _ = self.load(MIXED_RANKS)
        rows = [names[i % PROMPTS] for i in range(self.shape.batch)]
        none, mixed = (jax.device_put(bank.batch(r)) for r in ([None] * len(rows), rows))
        step = self.compile(model, "decode", none)
        buckets = f"buckets {', '.join(map(str, bank.slots))}"
        self.add_launches(step, buckets)
        self.add_no_adapter(step, none, buckets)
        ranks = ", ".join(map(str, MIXED_RANKS))
        name = f"{PROMPTS} adapters of ranks {ranks}"
        self.add(step, mixed, name, 1.12 * self.base_us, "1.12 x no LoRA")

    def add_no_adapter(self, step: "Program", none: AdapterBatch, buckets: str) -> None:
        name = f"no adapter in the batch, {buckets}"
        self.add(step, none, name, 1.01 * self.base_us, "1.01 x no LoRA")

    def time_launches(self) -> None:
        """Single calls: several buckets beside one, projections beside their bytes."""
        shape, config = self.shape, self.shape.config
        size = config.hidden_size
        attention = tuple(
            heads * config.head_dim
            for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        )
        mixed = f"{PROMPTS} adapters of ranks {', '.join(map(str, MIXED_RANKS))}"
        for tokens in (shape.batch, shape.prefill):
            one = Launch(tokens, size, (size,), ONE_BUCKET)
            name = f"one call of {tokens} tokens, {len(ONE_BUCKET)} adapters of rank "
            one_us = self.add_launch(f"{name}{ONE_BUCKET[0]}", one, None, "")
            launch = Launch(tokens, size, (size,), MIXED_RANKS)
            name = f"one call of {tokens} tokens, {mixed}"
            self.add_launch(name, launch, 1.15 * one_us, "1.15 x one bucket of the same bytes")
        ranks, empty = (RANK,) * PROMPTS, tuple(sorted({*MIXED_RANKS} - {RANK}))
        alone = Launch(shape.batch, size, (size,), ranks)
        name = f"one call of {shape.batch} tokens, {PROMPTS} adapters of rank {RANK}"
        alone_us = self.add_launch(name, alone, None, "")
        with_empty = dataclasses.replace(alone, empty=empty)
        target = f"0.3 us per bucket more than {alone_us:.2f}"
        name += f", {len(empty)} buckets without a token"
        self.add_launch(name, with_empty, alone_us + 0.3 * len(empty), target)
        for name, widths in (("q, k, v", attention), ("gate, up", (config.intermediate_size,) * 2)):
            launch = Launch(shape.batch, size, widths, ranks)
            name = f"one call of {name}, {PROMPTS} adapters of rank {RANK}"
            self.add_launch(name, launch, 1.05 * launch.floor_us + 3, "1.05 x floor + 3 us")

    def add_launch(self, name: str, launch: Launch, target_us: float | None, target: str) -> float:
        self.progress(f"timing {name}")
        us = launch.time()
        self.progress(f"{name} takes {us:,.2f} us")
        self.rows.append(Row(name, us, None, target_us if on_gpu() else None, target))
        return us

    def time_segments(self) -> None:
        for num_tokens, most in SEGMENTS.items():
            name = f"segments of {num_tokens} tokens"
            self.progress(f"timing {name}")
            us = _segments_us(num_tokens)
            target_us = most if on_gpu() else None
            self.rows.append(Row(name, us, None, target_us, f"{most:g} us"))


class Inputs:
    """What the steps of a phase read beside the model. Each step gives the cache back."""

    def __init__(self, shape: Shape, phase: str) -> None:
        self.cache, self.others = inputs_of(shape, phase)


class Program:
    """A compiled step: argmax of `decode`'s or `prefill`'s logits, on inputs that may be shared."""

    def __init__(
        self,
        model: Llama,
        shape: Shape,
        phase: str,
        batch: AdapterBatch | None,
        inputs: Inputs | None = None,
    ) -> None:
        # A list of arrays, since a call looks at each node of a tree.
        graphdef, state = nnx.split(model)
        self._arrays, treedef = jax.tree.flatten(state)
        read = decode if phase == "decode" else prefill

        def step(arrays: Any, cache: KVCache, batch: AdapterBatch | None, *inputs: Any) -> Any:
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))
            with use(batch):
                logits, after = read(model, cache, *inputs)
            # Each step decodes at the same position, so that all read the same bytes.
            after = dataclasses.replace(after, lengths=cache.lengths)
            return jnp.argmax(logits, axis=-1), after

        self._inputs = inputs or Inputs(shape, phase)
        given = self._inputs.cache, batch, *self._inputs.others
        lowered = jax.jit(step, donate_argnums=1).lower(self._arrays, *given)
        # XLA tells what it launches, and captures into CUDA graphs, in its dump alone.
        with tempfile.TemporaryDirectory() as folder:
            dump = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
            self._compiled = lowered.compile({**step_options(), **dump} if on_gpu() else None)
            self.thunks = "".join(
                file.read_text()
                for file in Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
            )

    def __call__(self, batch: AdapterBatch | None) -> jax.Array:
        given = self._inputs.cache, batch, *self._inputs.others
        tokens, self._inputs.cache = self._compiled(self._arrays, *given)
        return tokens

    def time(self, batch: AdapterBatch | None) -> tuple[float, float]:
        """As `steady_us`."""
        return steady_us(lambda: self(batch))

    def profile(self, batch: AdapterBatch | None) -> tuple[Kernel, ...]:
        return traced_kernels(lambda: self(batch))


def steady_us(step: Callable[[], jax.Array]) -> tuple[float, float]:
    """Microseconds of a step in steady state, and those that the host takes to start one."""

    def seconds(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(count):
            out = step()
        started = time.perf_counter()
        out.block_until_ready()
        return time.perf_counter() - start, (started - start) / count

    seconds(2)
    # Long enough for a host that is slower than the GPU, whose pace varies.
    count = max(3, min(100, round(0.2 / seconds(1)[0])))
    # The difference of two lengths leaves out what starting and ending take.
    runs = [(seconds(count), seconds(2 * count)) for _ in range(5)]
    us = statistics.median((long - short) / count for (short, _), (long, _) in runs) * 1e6
    return us, statistics.median(host for (_, host), _ in runs) * 1e6


class LaunchedKernel(NamedTuple):
    """One launch, by the clock of a trace."""

    device: str
    name: str
    start_ns: float
    end_ns: float


def launched_kernels(folder: Path) -> list[LaunchedKernel]:
    """What all GPUs ran in a trace of `jax.profiler` that was written into a folder."""
    [file] = folder.rglob("*.xplane.pb")
    return [
        LaunchedKernel(plane.name, event.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        if plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
        for event in line.events
    ]


def kernels_of(launched: Iterable[LaunchedKernel], steps: int) -> tuple[Kernel, ...]:
    """What each of so many steps launched in the mean, the longest first."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in launched:
        times[kernel.name].append((kernel.end_ns - kernel.start_ns) / 1e3)
    kernels = (Kernel(name, len(us) / steps, sum(us) / steps) for name, us in times.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.us))


def traced_kernels(step: Callable[[], object], steps: int = 3) -> tuple[Kernel, ...]:
    """What a step launches on all GPUs, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(step())
        return kernels_of(launched_kernels(Path(folder)), steps)


def random_array(
    shape: tuple[int, ...], dtype: Any, seed: int, sharding: Sharding | None = None
) -> jax.Array:
    make = jax.jit(_normal, static_argnums=(1, 2), out_shardings=sharding)
    return make(jax.random.key(seed), shape, jnp.dtype(dtype))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) > 2:  # of several layers or rows: one by one, as the bits take more than they do
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda own: _normal(own, shape[1:], dtype), keys)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[0] ** -0.5, dtype)


def random_model(
    shape: Shape, sharding_of: Callable[[Sequence[Any], int], Sharding] | None = None
) -> Llama:
    """A model whose weights were made where they lie: initialisers would go through float32.

    Args:
      sharding_of: of a weight, by its path and its number of axes.
    """
    model = nnx.eval_shape(
        lambda: Llama(shape.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), scan=shape.scan)
    )
    made = []
    for seed, (path, value) in enumerate(nnx.to_flat_state(nnx.state(model))):
        sharding = None if sharding_of is None else sharding_of(path, len(value.shape))
        made.append((path, value.replace(random_array(value.shape, value.dtype, seed, sharding))))
    nnx.update(model, nnx.from_flat_state(made))
    return model


def load_random(model: Llama, ranks: Sequence[int]) -> tuple[AdapterBank, list[str], int]:
    """Gives a model room for adapters of these ranks, and loads random ones.

    Returns:
      The bank, the adapters' names in the order of `ranks`, and the bytes of all.
    """
    slots = collections.Counter(ranks)
    apply_lora(model, slots=dict(slots), buckets=tuple(slots), target=PROJECTIONS)
    bank, adapters = AdapterBank(model), {rank: random_adapter(model, rank) for rank in slots}
    names = [f"{n}-of-rank-{rank}" for n, rank in enumerate(ranks)]
    for name, rank in zip(names, ranks):
        bank.load(name, adapters[rank])
    return bank, names, sum(adapters[rank].nbytes for rank in ranks)


def random_adapter(model: Llama, rank: int, seed: int = 0) -> Adapter:
    found = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, LoRALayer)}
    names = numbered_names(array_shapes(model), {path: m.lead for path, m in found.items()})
    layers = {
        name: module.matrix_shape()
        for path, module in found.items()
        for name in with_numbers(names[path_name(path)], module.lead).values()
    }
    size = rank * max(map(max, layers.values()))
    noise = np.random.default_rng((rank, seed)).normal(0, 0.02, size).astype(jnp.bfloat16)
    config = LoRAConfig(rank, 2.0 * rank)
    modules = {
        name: LoRAWeights(
            noise[: rank * h].reshape(rank, h), noise[: rank * n].reshape(n, rank),
            config.scale_of(name),
        )
        for name, (h, n) in layers.items()
    }  # fmt: skip
    return Adapter(config, modules)


def inputs_of(shape: Shape, phase: str) -> tuple[KVCache, tuple[jax.Array, ...]]:
    """A cache, and what else `decode` or `prefill` take."""
    config = shape.config
    if phase == "decode":
        rows, length, used = shape.batch, shape.context, shape.context - 1
    else:
        rows, length = PROMPTS, shape.prefill // PROMPTS
        used = length
    lengths = jnp.full(rows, used, jnp.int32)
    size = (rows, config.num_key_value_heads, length, config.head_dim)
    layers = config.num_hidden_layers
    keys, values = (
        random_array((layers, *size), jnp.bfloat16, part)
        if shape.scan
        else tuple(random_array(size, jnp.bfloat16, 2 * layer + part) for layer in range(layers))
        for part in range(2)
    )
    tokens_shape = (rows,) if phase == "decode" else (rows, length)
    tokens = jax.random.randint(jax.random.key(0), tokens_shape, 0, config.vocab_size)
    inputs = (tokens,) if phase == "decode" else (tokens, lengths.copy())  # the cache is donated
    return KVCache(keys, values, lengths), inputs


def _segments_us(num_tokens: int) -> float:
    """Microseconds of one `make_segments`, each waiting for the one before it."""
    calls = 16
    ids = jax.random.randint(jax.random.key(0), (num_tokens,), -1, _SEGMENT_SLOTS)

    def body(ids: jax.Array) -> jax.Array:
        for _ in range(calls):
            segments = make_segments(ids, _SEGMENT_SLOTS)
            leaves = segments.rows, segments.group_starts, segments.group_adapters
            # Always 0, but XLA can't know: none is negative where all slots have tokens.
            ids += sum(jnp.minimum(leaf[0], 0) for leaf in leaves)
        return ids

    return loop_us(body, ids, calls)
