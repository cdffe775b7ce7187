"""Times a training step of a Llama: frozen, with adapters, and as others train theirs."""

import collections
import contextlib
import contextvars
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from benchmarks.step import (
    LLAMA_3_8B,
    MIXED_RANKS,
    PROJECTIONS,
    RANK,
    SMALL,
    Kernel,
    random_adapter,
    random_array,
    random_model,
    traced_kernels,
)
from benchmarks.step import Shape as StepShape
from jax_lora.bank import AdapterBank
from jax_lora.bank.trainees import Trainees, Turns
from jax_lora.batch import AdapterBatch, use
from jax_lora.models.config import LlamaConfig
from jax_lora.models.llama import Attention, DecoderLayer, Llama
from jax_lora.models.rope import rotate, waves
from jax_lora.nn.apply import apply_lora
from jax_lora.nn.scan import scan_layers
from jax_lora.nn.stacks import LoRAScale
from jax_lora.serving.options import step_options
from jax_lora.training import per_adapter

ROWS = len(MIXED_RANKS)  # sequences, and adapters: one each
# At most so many times the frozen step, and so many bytes more than adapters and optimizer take.
TARGETS = {"adapters": 1.25, "mixed": 1.35}
MORE_BYTES = 2e9
WAYS = {
    "frozen": "no LoRA, the gradient of the embedding's output",
    "adapters": f"{ROWS} adapters of rank {RANK}",
    "mixed": f"{ROWS} adapters of ranks {', '.join(map(str, MIXED_RANKS))}",
    "exact": f"{ROWS} adapters of rank {RANK} in the phase exact",
    "ragged": f"{ROWS} adapters of rank {RANK}: a sort and two ragged_dot, as SkyRL-tx",
    "one": f"one adapter of rank {RANK} in plain jax.numpy",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and the tokens of a step, in eight rows.

    Raises:
      ValueError: `tokens` is no positive multiple of eight.
    """

    config: LlamaConfig
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < ROWS or self.tokens % ROWS:
            raise ValueError(f"tokens must be a positive multiple of {ROWS}, got {self.tokens}")

    @classmethod
    def of_this_machine(cls, layers: int | None = None, tokens: int | None = None) -> "Shape":
        """Llama-3-8B's on a GPU, else a small one; None for its own numbers."""
        on_gpu = jax.default_backend() == "gpu"
        config = LLAMA_3_8B if on_gpu else SMALL
        if layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=layers)
        return cls(config, (8192 if on_gpu else 64) if tokens is None else tokens)

    @property
    def product_flops(self) -> float:
        """What the frozen step's products with weights take: forward, forward again, and
        backward."""
        config = self.config
        attention = config.num_attention_heads + config.num_key_value_heads
        layer = 2 * attention * config.head_dim + 3 * config.intermediate_size
        weights = config.num_hidden_layers * layer + config.vocab_size
        return 6.0 * self.tokens * weights * config.hidden_size


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
      ms: of a step. peak: bytes at most, by XLA's own analysis.
      adapters, optimizer: bytes of what is trained, and of the optimizer's state.
      kernels: of a profile, the longest first.
    """

    way: str
    ms: float
    peak: int
    adapters: int
    optimizer: int
    kernels: tuple[Kernel, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows; `publish_us`: what a copy of an adapter takes the host, and until it is there."""

    device: str
    date: str
    shape: Shape
    rows: list[Row]
    publish_us: tuple[float, float] | None

    def ratio(self, row: Row) -> float | None:
        """Over the frozen step, if that was timed."""
        frozen = next((other for other in self.rows if other.way == "frozen"), None)
        return None if frozen is None else row.ms / frozen.ms

    def more_bytes(self, row: Row) -> int | None:
        """More than the frozen step's, the adapters and the optimizer's state take."""
        frozen = next((other for other in self.rows if other.way == "frozen"), None)
        return None if frozen is None else row.peak - frozen.peak - row.adapters - row.optimizer

    def to_dict(self) -> dict[str, object]:
        rows = [
            {**dataclasses.asdict(r), "ratio": self.ratio(r), "more_bytes": self.more_bytes(r)}
            for r in self.rows
        ]
        return {**dataclasses.asdict(self), "rows": rows}


# ------------------------------------------------------------------------------- how others do it


class _Route(NamedTuple):
    """Tokens sorted by adapter: their order, the way back, and how many each adapter has."""

    order: Array
    back: Array
    sizes: Array


_route: contextvars.ContextVar[_Route] = contextvars.ContextVar("route")


@contextlib.contextmanager
def _routed(ids: Array, num_adapters: int) -> collections.abc.Iterator[None]:
    order = jnp.argsort(ids)
    token = _route.set(_Route(order, jnp.argsort(order), jnp.bincount(ids, length=num_adapters)))
    yield
    _route.reset(token)


class _Ragged(nnx.Linear):
    """Adapters by `ragged_dot` over sorted tokens."""

    a: nnx.LoRAParam[Array]  # [L, H, R]
    b: nnx.LoRAParam[Array]  # [L, R, N]

    def __call__(self, x: Array, out_sharding: None = None) -> Array:
        y, route = super().__call__(x), _route.get()
        rows = x.reshape(-1, x.shape[-1])[route.order]
        v = jax.lax.ragged_dot(rows, self.a[...], route.sizes)
        delta = jax.lax.ragged_dot(v, self.b[...], route.sizes)[route.back]
        return y + delta.reshape(y.shape)


class _One(nnx.Linear):
    """One adapter, in two products."""

    a: nnx.LoRAParam[Array]  # [H, R]
    b: nnx.LoRAParam[Array]  # [R, N]

    def __call__(self, x: Array, out_sharding: None = None) -> Array:
        return super().__call__(x) + (x @ self.a[...]) @ self.b[...]


def _add_adapters(model: Llama, kind: type[_Ragged] | type[_One]) -> None:
    """Makes the projections of all layers `kind`, with random adapters."""
    slots = (ROWS,) if kind is _Ragged else ()
    layers = cast(DecoderLayer, model.model.layers)
    for seed, (_, module) in enumerate(nnx.iter_modules(layers)):
        if type(module) is nnx.Linear:
            lead = module.kernel.shape[0]
            sizes = (
                (lead, *slots, module.in_features, RANK),
                (lead, *slots, RANK, module.out_features),
            )
            module.__class__ = kind
            for nth, (name, size) in enumerate(zip("ab", sizes)):
                array = random_array(size, jnp.bfloat16, 2 * seed + nth)
                setattr(module, name, nnx.LoRAParam(array))


# ---------------------------------------------------------------------------------------- the step


def _attend(attention: Attention, x: Array, rope: tuple[Array, Array]) -> Array:
    """Fused and causal, without a cache."""
    q, k, v = attention._heads(x)
    q, k = rotate(q, rope), rotate(k, rope)
    kind: Literal["cudnn", "xla"] = "cudnn" if jax.default_backend() == "gpu" else "xla"
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)
    return attention.o_proj(out.reshape(*x.shape[:2], -1))


def _loss(model: Llama, embedded: Array, targets: Array) -> Array:
    """Mean cross entropy. Each layer, and each row's logits, are made again when going back."""
    config = model.config
    positions = jnp.arange(embedded.shape[1], dtype=jnp.int32)[None]
    rope = waves(config.attention_kinds[0].rope, config.head_dim, positions, embedded.shape[1])

    def turn(layer: DecoderLayer, x: Array, _: None) -> tuple[Array, None]:
        graphdef, state = nnx.split(layer)

        def run(state: nnx.State, x: Array) -> Array:
            layer = nnx.merge(graphdef, state)
            x = x + _attend(layer.self_attn, layer.input_layernorm(x), rope)
            out: Array = x + layer.mlp(layer.post_attention_layernorm(x))
            return out

        return jax.checkpoint(run, prevent_cse=False)(state, x), None

    hidden, _ = scan_layers(turn, cast(DecoderLayer, model.model.layers), embedded)

    def row_loss(row: tuple[Array, Array]) -> Array:
        logits = model.logits(model.model.norm(row[0])).astype(jnp.float32)
        losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, row[1])
        return losses.mean()

    return jax.lax.map(jax.checkpoint(row_loss), (hidden, targets)).mean()


class Step:
    """The compiled step of one way, and what it is called with.

    Masters of the adapters and the optimizer's moments are float32, and the model computes with
    their bfloat16, as the kernels take it.
    """

    def __init__(self, way: str, shape: Shape, base: Llama) -> None:
        self.way, self.is_ours = way, way in ("adapters", "mixed", "exact")
        model = nnx.clone(base)
        self.ranks = MIXED_RANKS if way == "mixed" else (RANK,) * ROWS
        slots = collections.Counter(self.ranks)
        if self.is_ours:
            apply_lora(model, slots=dict(slots), buckets=tuple(slots), target=PROJECTIONS)
            _fill(model)
        elif way in ("ragged", "one"):
            _add_adapters(model, _Ragged if way == "ragged" else _One)
        self.graphdef, *(lora, self.rest) = nnx.split(model, nnx.LoRAParam, ...)
        self.masters = jax.tree.map(lambda t: t.astype(jnp.float32), lora)
        adamw = optax.adamw(1e-4)
        self.tx = per_adapter(adamw) if self.is_ours else adamw
        self.state = () if way == "frozen" else jax.jit(self.tx.init)(self.masters)
        ranges = tuple(slots.items())
        ids = np.arange(ROWS, dtype=np.int32)
        phase = "exact" if way == "exact" else "prefill"
        self.batch = AdapterBatch(ids, ranges=ranges, phase=phase) if self.is_ours else None
        ones = {bucket: np.ones(n, np.int32) for bucket, n in ranges}
        self.trainees = Trainees(
            {bucket: Turns(one, one.astype(np.float32)) for bucket, one in ones.items()}
        )
        length = shape.tokens // ROWS
        self.tokens = jax.random.randint(
            jax.random.key(0), (ROWS, length), 0, shape.config.vocab_size
        )

    @property
    def _arguments(self) -> tuple[PyTree, ...]:
        return self.masters, self.state, self.rest, self.batch, self.trainees, self.tokens

    def _run(
        self,
        masters: PyTree,
        state: PyTree,
        rest: PyTree,
        batch: AdapterBatch | None,
        trainees: Trainees,
        tokens: Array,
    ) -> tuple[PyTree, PyTree, Array]:
        """Updated masters (the gradient of the embedding's output, if frozen), state and loss."""
        rows, length = tokens.shape

        def loss(masters: PyTree, embedded: Array | None) -> Array:
            lora = jax.tree.map(lambda t: t.astype(jnp.bfloat16), masters)
            model = nnx.merge(self.graphdef, lora, rest)
            if embedded is None:
                embedded = model.model.embed_tokens(tokens)
            ids = jnp.repeat(jnp.arange(rows), length)
            with use(batch), _routed(ids, rows):
                return _loss(model, embedded, jnp.roll(tokens, -1, axis=1))

        if self.way == "frozen":
            embedded = nnx.merge(self.graphdef, masters, rest).model.embed_tokens(tokens)
            value, gradient = jax.value_and_grad(loss, argnums=1)(masters, embedded)
            return gradient, state, value
        value, gradients = jax.value_and_grad(loss)(masters, None)
        extra = {"trainees": trainees} if self.is_ours else {}
        updates, state = self.tx.update(gradients, state, masters, **extra)
        return optax.apply_updates(masters, updates), state, value

    def lower(self, *platforms: str) -> jax.stages.Lowered:
        """The step for a platform, which need not be there; by default, for where JAX runs."""
        donated = () if self.way == "frozen" else (0, 1)
        with jax.numpy_dtype_promotion("standard"):  # neither optax nor JAX's attention is strict
            traced = jax.jit(self._run, donate_argnums=donated).trace(*self._arguments)
            return traced.lower(lowering_platforms=platforms) if platforms else traced.lower()

    def row(self, *, profile: bool, repeats: int = 5) -> Row:
        """Compiles and times it.

        Raises:
          ArithmeticError: the loss is not finite.
        """
        adapters, optimizer = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tree in (self.masters, self.state)
        )
        compiled = self.lower().compile(step_options())

        def step() -> Array:
            masters, self.state, loss = compiled(*self._arguments)
            self.masters = self.masters if self.way == "frozen" else masters
            value: Array = jax.block_until_ready((masters, loss))[1]
            return value

        seconds = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            value = step()
            seconds.append(time.perf_counter() - start)
        if not np.isfinite(float(value)):
            raise ArithmeticError(f"the loss of {self.way} is {float(value)}")
        kernels = traced_kernels(step) if profile else ()
        ms = statistics.median(seconds[2:]) * 1e3
        return Row(self.way, ms, _peak(compiled), adapters, optimizer, kernels)


def _peak(compiled: jax.stages.Compiled) -> int:
    """Bytes of what a program takes, makes and gives back, at most."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + made)


def _fill(model: Llama) -> None:
    """Random adapters of scale 2 in all slots."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    made = [
        (path, value.replace(random_array(value.shape, value.dtype, seed, value[...].sharding)))
        for seed, (path, value) in enumerate(parameters)
    ]
    nnx.update(model, nnx.from_flat_state(made))
    scales = nnx.to_flat_state(nnx.state(model, LoRAScale))
    twos = [(path, value.replace(jnp.full_like(value[...], 2))) for path, value in scales]
    nnx.update(model, nnx.from_flat_state(twos))


def publish_us(base: Llama, repeats: int = 50) -> tuple[float, float]:
    """Microseconds that `publish` takes the host, and until the copy is there: medians."""
    model = nnx.clone(base)
    apply_lora(model, slots=3, buckets=(RANK,), target=PROJECTIONS)
    bank = AdapterBank(model)
    bank.load("training", random_adapter(model, RANK))
    times = []
    for _ in range(repeats + 3):
        jax.block_until_ready(jax.tree.leaves(bank.state))
        start = time.perf_counter()
        bank.publish("policy", "training")
        host = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(bank.state))
        times.append((host - start, time.perf_counter() - start))
    hosts, wholes = zip(*times[3:])
    return statistics.median(hosts) * 1e6, statistics.median(wholes) * 1e6


def run(
    shape: Shape,
    ways: Sequence[str],
    progress: Callable[[str], None],
    *,
    publish: bool = True,
    profile: bool = False,
) -> Report:
    """Times the ways one after another, by random bfloat16 weights.

    Raises:
      ValueError: an unknown way, or a profile without a GPU.
    """
    if profile and jax.default_backend() != "gpu":
        raise ValueError(f"a profile needs a GPU, JAX runs on {jax.default_backend()}")
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways are {', '.join(WAYS)}, got {', '.join(unknown):.200}")
    layers = shape.config.num_hidden_layers
    progress(f"making a model of {layers} layers")
    base = random_model(StepShape(shape.config, ROWS, 1, ROWS))
    rows = []
    for way in ways:
        progress(f"compiling and timing {WAYS[way]}")
        rows.append(Step(way, shape, base).row(profile=profile))
        progress(f"it takes {rows[-1].ms:,.1f} ms")  # lest a run that is cut off has told nothing
    if publish:
        progress("timing publish")
    copied = publish_us(base) if publish else None
    device, date = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d")
    return Report(device, date, shape, rows, copied)
