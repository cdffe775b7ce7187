"""A small Llama with adapters of mixed ranks, whole or divided over two devices, and in float64.

The device tests run these cases on GPUs, and others on the devices of a CPU.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from llama_in_float64 import Float64Llama, Halves, halves_of
from meshes import mesh_of
from mosaic_cases import relative_error, signed
from tiny import make_adapter

from jax_lora import Adapter, AdapterBank, AdapterBatch, apply_lora, use
from jax_lora.llama import KVCache, Llama, LlamaConfig, decode, prefill
from jax_lora.models.parallel import placing
from jax_lora.serving.options import step_options
from jax_lora.sharding import put

# Halves of all widths are 64 or more, which is the least that kernels take.
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
RANKS = {"1": 1, "3": 3, "16": 16, "40": 40, "160": 160, "idle": 8}  # no row has the last one
# Divided over two devices they are ranks 8 and 80, which kernels take too.
BUCKETS, SLOTS = (16, 160), {16: 4, 160: 2}
ROWS = ["160", "3", None, "16", "40", "1", "160", None]
LENGTHS = np.array([40, 33, 17, 40, 1, 25, 8, 39], np.int32)
PROMPT, STEPS = 40, 3  # 320 tokens are a prefill by tiles
SIZE = PROMPT + STEPS
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (len(ROWS), SIZE), np.int32)
COTANGENT = signed(np.random.default_rng(1), (*LENGTHS.shape, PROMPT, 256), "bfloat16")


class Form(NamedTuple):
    """How a Llama lies on two devices.

    `q_proj` and `o_proj` say which axes of A and of B are divided: those of docs/scaling.md. A scan
    copies stacks whose ranks are divided, so that page has such layers one by one.
    """

    axis: str
    q_proj: tuple[int | None, int | None]
    o_proj: tuple[int | None, int | None]
    fully_sharded: bool = False
    scan: bool = True


FORMS = {
    "tensor parallel": Form("tp", (None, -2), (-1, None)),
    "fully sharded": Form("tp", (-2, -2), (-1, -1), fully_sharded=True, scan=False),
    "data parallel": Form("dp", (None, None), (None, None)),
}
# Relative error (Frobenius norm) against float64, and of two devices against one, of a row's logits
# and of an adapter's gradient in one matrix. On a CPU: 1.4e-2, 1e-6; 3.1e-2, 2e-6.
LOGITS = {"bfloat16": 2.5e-2, "float32": 1e-5}
GRADIENTS = {"bfloat16": 6e-2, "float32": 1e-5}


def model_of(dtype: str, scan: bool) -> Llama:
    """With embeddings of about 1, beside which layers add little: else small errors would grow."""
    model = Llama(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0), scan=scan)
    embedding = model.model.embed_tokens.embedding
    embedding.set_value(embedding.get_value() * 16)
    return model


@dataclasses.dataclass(frozen=True)
class MeshCase:
    """A form on two devices, in a dtype; or its layers on one device, without a mesh."""

    form: str
    dtype: str
    devices: int = 2

    def __str__(self) -> str:
        return f"{self.form}, {self.dtype}"

    @property
    def scan(self) -> bool:
        return FORMS[self.form].scan

    @property
    def on_one(self) -> "MeshCase":
        """Forms that are alike on one device have one case there."""
        form = next(name for name, form in FORMS.items() if form.scan == self.scan)
        return MeshCase(form, self.dtype, devices=1)

    @property
    def options(self) -> dict[str, Any]:
        """Those of `jax.jit`. The ops' loops in float32, in one CUDA graph with the loop over
        layers, end with "Recorded commands are not empty" on two GPUs (jaxlib 0.11.2)."""
        return {"compiler_options": step_options()} if self.dtype == "bfloat16" else {}

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        sizes = {FORMS[self.form].axis: self.devices}
        return None if self.devices == 1 else mesh_of(AxisType.Auto, **sizes)

    def sharding(self, *ends: str | None, ndim: int) -> NamedSharding | None:
        """The last axes over those axes of the mesh, where it has them."""
        if self.mesh is None:
            return None
        own = [axis if axis in self.mesh.axis_names else None for axis in ends]
        return NamedSharding(self.mesh, P(*[None] * (ndim - len(own)), *own))

    def of_rows(self, array: np.ndarray) -> jax.Array:
        """What each row has, `[B]` or `[B, S]`: where the row is."""
        sharding = self.sharding("dp", *[None] * (array.ndim - 1), ndim=array.ndim)
        return jnp.asarray(array) if sharding is None else put(array, sharding)

    def cache_sharding(self, model: Llama) -> KVCache | None:
        """Keys and values `[..., B, heads, T, D]`: by rows and heads."""
        cache = jax.eval_shape(lambda: model.init_cache(len(ROWS), SIZE))
        ends = ("dp", "tp", None, None)
        of = functools.partial(jax.tree.map, lambda t: self.sharding(*ends, ndim=t.ndim))
        lengths = self.sharding("dp", ndim=1)
        return None if lengths is None else KVCache(of(cache.keys), of(cache.values), lengths)

    def model_and_bank(self) -> tuple[Llama, AdapterBank]:
        model, mesh = model_of(self.dtype, self.scan), self.mesh
        if mesh is not None:
            with jax.set_mesh(mesh):
                place = placing(CONFIG)
            for path, variable in nnx.to_flat_state(nnx.state(model)):
                value = variable.get_value()
                whole = put(value, NamedSharding(mesh, P()))
                variable.set_value(place(path, value) if "tp" in mesh.axis_names else whole)
        how: dict[str, Any] = {"slots": SLOTS, "buckets": BUCKETS, "target": ".*_proj"}
        apply_lora(model, **how, fully_sharded=mesh is not None and FORMS[self.form].fully_sharded)
        bank = AdapterBank(model)
        for name, adapter in adapters(self.dtype).items():
            bank.load(name, adapter)
        return model, bank


@functools.cache
def adapters(dtype: str) -> dict[str, Adapter]:
    """What they add is about half as large as what they add to."""
    config, head = CONFIG, CONFIG.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {f"self_attn.{n}_proj": (width, keys) for n in "kv"}
    sizes |= {"self_attn.q_proj": (width, queries), "self_attn.o_proj": (queries, width)}
    sizes |= {"mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner)}
    sizes |= {"mlp.down_proj": (inner, width)}
    features = {
        f"model.layers.{layer}.{name}": size
        for layer in range(config.num_hidden_layers)
        for name, size in sizes.items()
    }
    how: dict[str, Any] = {"features": features, "dtype": jnp.dtype(dtype)}
    return {name: make_adapter(r, r, alpha=0.5 * r, **how) for name, r in RANKS.items()}


# ---------------------------------------------------------------------------------- what is run


def compiled(step: Callable[..., Any], *arguments: Any, **how: Any) -> tuple[Any, set[str]]:
    """A compiled step, and the implementations of the ops that its program calls."""
    lowered = jax.jit(step, **how).lower(*arguments)
    return lowered.compile(), implementations(lowered.as_text())


def implementations(text: str) -> set[str]:
    """Those of a lowered program: the functions that it calls have them in their names."""
    return {*re.findall(r"call @\w+?_(mosaic_gpu|xla|loop)(?:_\d+)?\(", text)}


class Steps:
    """A model's steps, as functions of pure arrays."""

    def __init__(self, case: MeshCase) -> None:
        self.case = case
        self.model, self.bank = case.model_and_bank()
        self.graphdef, self.lora, self.rest = nnx.split(self.model, nnx.LoRAParam, ...)

    def _prefill(self, batch: AdapterBatch, tokens: jax.Array, lengths: jax.Array, *state: Any):
        model = nnx.merge(self.graphdef, *state)
        with use(batch):
            return prefill(model, model.init_cache(len(ROWS), SIZE), tokens, lengths)

    def _decode(self, cache: KVCache, batch: AdapterBatch, tokens: jax.Array, *state: Any):
        with use(batch):
            return decode(nnx.merge(self.graphdef, *state), cache, tokens)

    def _loss(self, lora: Any, rest: Any, batch: AdapterBatch, *operands: jax.Array) -> jax.Array:
        tokens, cotangent = operands
        with use(batch):
            logits = nnx.merge(self.graphdef, lora, rest)(tokens)
        return jnp.sum(logits.astype(jnp.float32) * cotangent.astype(jnp.float32))

    def divided(self, projection: str) -> tuple[int | None, ...]:
        """Which axis of A and of B is divided over the devices, in the first layer."""
        layers = self.model.model.layers
        layer = layers if self.case.scan else layers[0]
        return tuple(
            axis_of_shards(variable.get_value())
            for variable in getattr(layer.self_attn, projection).stacks[0].variables
        )

    def logits(self) -> tuple[np.ndarray, set[str]]:
        """`[1 + STEPS, B, V]` of a prefill and of decode steps, and what ran."""
        state, of_rows = (self.lora, self.rest), self.case.of_rows
        how = self.case.options | {"out_shardings": (None, self.case.cache_sharding(self.model))}
        batch = self.bank.batch(ROWS, phase="prefill")
        given = batch, of_rows(TOKENS[:, :PROMPT]), of_rows(LENGTHS), *state
        step, ran = compiled(self._prefill, *given, **how)
        (logits, cache), decoding = step(*given), None
        found, batch = [logits], self.bank.batch(ROWS)
        for n in range(STEPS):
            tokens = of_rows(TOKENS[np.arange(len(ROWS)), LENGTHS + n])
            given = cache, batch, tokens, *state
            if decoding is None:
                decoding, more = compiled(self._decode, *given, donate_argnums=0, **how)
                ran |= more
            logits, cache = decoding(*given)
            found.append(logits)
        return np.stack([np.float64(one) for one in found]), ran

    def gradients(self) -> tuple[dict[str, Halves], set[str]]:
        """Those of `sum(COTANGENT * logits)`, by the adapter's name, and what ran."""
        of_rows, batch = self.case.of_rows, self.bank.batch(ROWS, phase="prefill")
        given = self.lora, self.rest, batch, of_rows(TOKENS[:, :PROMPT]), of_rows(COTANGENT)
        step, ran = compiled(jax.grad(self._loss), *given, **self.case.options)
        nnx.update(self.model, step(*given))  # in place of the weights, as the bank reads these
        return {name: halves_of(self.bank._adapter(name)) for name in RANKS}, ran


def axis_of_shards(array: jax.Array) -> int | None:
    """The axis over which two devices divide an array; None if each has all of it."""
    one, other = array.addressable_shards
    assert one.device != other.device and one.data.shape == other.data.shape
    axes = [n for n, size in enumerate(array.shape) if one.data.shape[n] < size]
    return axes[0] - array.ndim if axes else None


# ---------------------------------------------------------------------------------- what is right


@functools.cache
def in_float64(dtype: str, scan: bool) -> Float64Llama:
    return Float64Llama(model_of(dtype, scan), adapters(dtype), ROWS)


@functools.cache
def logits_in_float64(dtype: str, scan: bool) -> np.ndarray:
    return of_steps(in_float64(dtype, scan))


def of_steps(model: Float64Llama) -> np.ndarray:
    """As `Steps.logits`: a row's decode tokens follow its prompt."""
    rows, places = np.arange(len(ROWS)), LENGTHS + np.arange(-1, STEPS)[:, None]
    return model.logits(TOKENS)[rows, places]


@functools.cache
def logits_on_one(case: MeshCase) -> np.ndarray:
    return Steps(case).logits()[0]


def check_logits(case: MeshCase, implementation: str) -> None:
    """Two devices, one device and float64 agree in each row of a prefill and of decode steps."""
    steps, form = Steps(case), FORMS[case.form]
    assert (steps.divided("q_proj"), steps.divided("o_proj")) == (form.q_proj, form.o_proj)
    two, ran = steps.logits()
    assert ran == {implementation}
    one, right = logits_on_one(case.on_one), logits_in_float64(case.dtype, case.scan)
    for name, got, want in (("two", two, right), ("one", one, right), ("both", two, one)):
        for step, row in np.ndindex(*want.shape[:2]):
            error = relative_error(got[step, row], want[step, row])
            assert error < LOGITS[case.dtype], (name, step, ROWS[row], error)


@functools.cache
def gradients_on_one(case: MeshCase) -> dict[str, Halves]:
    return Steps(case).gradients()[0]


@functools.cache
def gradients_in_float64(dtype: str, scan: bool) -> dict[str, Halves]:
    return in_float64(dtype, scan).gradients(TOKENS[:, :PROMPT], COTANGENT)


def check_gradients(case: MeshCase, implementation: str) -> None:
    """Two devices, one device and float64 agree in each A and B of each adapter."""
    two, ran = Steps(case).gradients()
    assert ran == {implementation}
    one, right = gradients_on_one(case.on_one), gradients_in_float64(case.dtype, case.scan)
    assert two.keys() == one.keys() == right.keys()
    for what, got, want in (("two", two, right), ("one", one, right), ("both", two, one)):
        for adapter, module in itertools.product(want, want["1"]):
            for half, mine, its in zip("AB", got[adapter][module], want[adapter][module]):
                assert mine.shape == its.shape, "ranks beyond the adapter's have gradients"
                error = relative_error(mine, its)
                where = what, adapter, module, half, error
                assert error < GRADIENTS[case.dtype], where
                assert mine.any() == its.any() == (adapter != "idle"), where
