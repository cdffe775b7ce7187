"""Times how long a model's steps take to compile, and looks for copies in their loops."""

import dataclasses
import functools
import re
import resource
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jax_lora.batch import AdapterBatch, use
from jax_lora.llama import KVCache, Llama, LlamaConfig, decode, prefill
from jax_lora.nn.apply import apply_lora
from jax_lora.serving.options import step_options

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
SLOTS = {8: 7, 16: 5, 32: 3, 64: 2}  # as primes, no other array has their shapes
ROWS, PROMPT, CACHE = 4, 32, 256


@dataclasses.dataclass(frozen=True)
class Row:
    """A step: seconds until it was traced, lowered and compiled, and those of all CPU cores.

    Attributes:
      stacks: arrays as large as a layer's stacks that each turn of the scan makes, by HLO's shape.
        In the gradient: as large as those of all layers, unless it writes its own layer's.
      weights: the same of weights and cache.
    """

    name: str
    wall_s: float
    cpu_s: float
    stacks: list[str]
    weights: list[str]


def run(
    layers: int,
    progress: Callable[[str], None],
    *,
    scan: bool,
    config: LlamaConfig = SMOLLM2_135M,
    device: jax.Device | None = None,
) -> list[Row]:
    """Compiles prefill, decode, and the gradient of a prefill in the stacks; nothing is run.

    `device`: to compile for; None for JAX's default. It need not be there (`targets.h200`).
    """
    config = dataclasses.replace(config, num_hidden_layers=layers)
    steps = _Steps(config, scan, device)
    rows = []
    for name in ("prefill", "decode", "gradient"):
        progress(f"compiling {name}")
        start = _now()
        text = steps.compiled(name)
        wall_s, cpu_s = (after - before for after, before in zip(_now(), start))
        whole = name == "gradient"
        made = (made_in_loops(text, s, whole=whole) for s in (steps.stack_shapes, steps.shapes))
        rows.append(Row(name, wall_s, cpu_s, *(made if scan else ([], []))))
    return rows


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


class _Steps:
    """The steps of a model whose arrays are shapes alone."""

    def __init__(self, config: LlamaConfig, scan: bool, device: jax.Device | None = None) -> None:
        self._device = device

        def make() -> Llama:
            model = Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), scan=scan)
            apply_lora(model, slots=SLOTS, buckets=tuple(SLOTS))
            return model

        model = nnx.eval_shape(make)
        self.graphdef, *(self.stacks, self.rest) = nnx.split(model, nnx.LoRAParam, ...)
        self.cache = jax.eval_shape(lambda: make().init_cache(ROWS, CACHE))
        # Those of a layer alone, as the output layer, have no axis of layers.
        stacked = (tuple(leaf.shape) for leaf in jax.tree.leaves(self.stacks) if leaf.ndim > 3)
        self.stack_shapes = set(stacked)
        leaves = jax.tree.leaves((self.rest, self.cache))
        self.shapes = {s for leaf in leaves if len(s := tuple(leaf.shape)) > 2}

    def compiled(self, name: str) -> str:
        """The optimised HLO of a step."""
        rows, tokens = _ids(ROWS), _ids(ROWS, PROMPT)
        phase = "decode" if name == "decode" else "prefill"
        batch = AdapterBatch(rows, ranges=tuple(SLOTS.items()), phase=phase)
        merge = functools.partial(nnx.merge, self.graphdef)

        def step(
            stacks: nnx.State, rest: nnx.State, batch: AdapterBatch, cache: KVCache, *inputs: Array
        ) -> tuple[Array, KVCache]:
            with use(batch):
                return (decode if name == "decode" else prefill)(
                    merge(stacks, rest), cache, *inputs
                )

        def loss(stacks: nnx.State, rest: nnx.State, batch: AdapterBatch, tokens: Array) -> Array:
            with use(batch):
                return jnp.sum(jax.nn.log_softmax(merge(stacks, rest)(tokens))[..., 0])

        given = self.stacks, self.rest, batch
        if name == "gradient":
            lowered = jax.jit(jax.grad(loss)).lower(*self._placed((*given, tokens)))
        else:
            inputs = (rows,) if name == "decode" else (tokens, rows)
            arguments = self._placed((*given, self.cache, *inputs))
            lowered = jax.jit(step, donate_argnums=3).lower(*arguments)
        if self._device is None:
            options = step_options()
        else:  # which can't be asked what is fastest
            options = step_options(self._device.platform) | {"xla_gpu_autotune_level": 0}
        return lowered.compile(options).as_text() or ""

    def _placed[T](self, shapes: T) -> T:
        if self._device is None:
            return shapes
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        placed: T = jax.tree.map(lambda leaf: place(leaf.shape, leaf.dtype), shapes)
        return placed


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# ------------------------------------------------------------------------------ what a loop makes


Shape = tuple[int, ...]


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    line: str


def made_in_loops(hlo: str, shapes: set[Shape], *, whole: bool = False) -> list[str]:
    """The arrays that a compiled module's loops make, if they are as large as a layer's.

    Args:
      hlo: of the optimised module.
      shapes: those of arrays of all layers, `[layers, ...]`.
      whole: look for arrays of all layers alone, but not for those in which a turn writes its own
        layer's; else also for a layer's.

    Returns:
      Their shapes with the instruction that makes them, sorted; empty if none is made.
    """
    all_layers = {own for s in shapes for own in (s, (s[0] * s[1], *s[2:]))}
    sizes = {_sizes(s) for s in all_layers | (set() if whole else {s[1:] for s in shapes})}
    computations = _computations(hlo)
    found = set()
    for name in _in_loops(computations):
        for instruction in computations[name]:
            opcode = _what_it_does(instruction, computations)
            shape = tuple(map(int, re.findall(r"\d+", instruction.shape)))
            if opcode in _NOTHING or _sizes(shape) not in sizes:
                continue
            if not (whole and opcode == "dynamic-update-slice"):
                found.add(f"{instruction.shape} by {opcode}")
    return sorted(found)


def _sizes(shape: Shape) -> Shape:
    """The axes longer than 1, in any order."""
    return tuple(sorted(n for n in shape if n > 1))


# What makes no array: it names one, or calls what is looked at itself.
_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


def _computations(hlo: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            instructions = computations.setdefault(head[1], [])
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\S+|\(.*?\)) ([\w\-]+)\(", line):
            shape = re.sub(r"^\w+(\[[\d,]*\]).*", r"\1", found[1])
            instructions.append(_Instruction(shape, found[2], line))
    return computations


def _called(line: str) -> list[str]:
    names = re.findall(
        r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line
    )
    for some in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in some.split(",")]
    return names


def _in_loops(computations: dict[str, list[_Instruction]]) -> Iterator[str]:
    """The computations that loops run, but for what a fusion does in registers."""
    lines = [i for instructions in computations.values() for i in instructions]
    left = [name for i in lines if i.opcode == "while" for name in _called(i.line)]
    seen = set[str]()
    while left:
        if (name := left.pop()) in seen:
            continue
        seen.add(name)
        yield name
        left += [
            called
            for instruction in computations[name]
            if instruction.opcode != "fusion"
            for called in _called(instruction.line)
        ]


def _what_it_does(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> str:
    """Its opcode; of a fusion that ends by writing a slice of an array in its place, that."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    [name] = _called(instruction.line)
    *_, last = computations[name]
    if operand := re.search(r" bitcast\(%?([\w.\-]+)\)", last.line):
        last = next(i for i in computations[name] if re.search(rf"%?{operand[1]} = ", i.line))
    return last.opcode if last.opcode == "dynamic-update-slice" else "fusion"
