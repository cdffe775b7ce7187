"""Whether two checkouts lower to the same kernels: the proof that a refactoring changed no bit.

    python benchmarks/same_kernels.py OLD NEW

OLD and NEW are folders of two checkouts. A grid of cases is lowered for Hopper with each, which
needs no GPU. Names, places in the source and the order of pure arithmetic do not count. What does:
every instruction with an effect (loads, stores, copies, barriers, branches, loops), its order, and
which values it works on. Exits with 1 if a case differs, and names the first instruction that does.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib import mosaic_gpu_dialect as dialect  # type: ignore[attr-defined]
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]

import pallas_kernels as pk
from pallas_kernels.mosaic_gpu.decode import (
    DecodePart,
    Seating,
    decode_config,
    decode_kernel,
    plan,
)

Shape = jax.ShapeDtypeStruct
_MOSAIC: Literal["mosaic_gpu"] = "mosaic_gpu"
# A function to lower, and the shapes of its arguments, in any tree.
Case = tuple[Callable[..., object], tuple[object, ...]]

# Operations without an effect. An inline instruction has one if it says so.
_PURE = re.compile(
    r"arith\.|math\.|builtin\.|index\.|vector\.|nvvm\.read|gpu\.(thread_id|block_|grid_|cluster_)|"
    r"memref\.(subview|reinterpret|extract|cast)|"
    r"llvm\.(mlir\.|ptrtoint|inttoptr|getelementptr|insertvalue|extractvalue|bitcast)"
)


def _key(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class _Flow:
    """A module's effects in order, each on values that are named by how they were computed."""

    def __init__(self, module: ir.Module) -> None:
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._visit(module.operation)

    def _visit(self, op: ir.Operation) -> None:
        name = op.name.removeprefix("stable_mosaic_gpu.")
        # Numbers in names count how many kernels the process has lowered before.
        facts = sorted((a, re.sub(r'_\d+"', '"', str(op.attributes[a]))) for a in op.attributes)
        operands = [self._names.get(hash(operand), "") for operand in op.operands]
        types = [str(result.type) for result in op.results]
        key = _key(name, facts, operands, types)
        is_pure = _PURE.match(name) or (
            name == "llvm.inline_asm" and "has_side_effects" not in dict(facts)
        )
        regions = list(op.regions)
        if regions or not is_pure:
            self.lines.append(f"{name} {facts} {operands} {types}")
            key = _key(key, len(self.lines))
        for n, result in enumerate(op.results):
            self._names[hash(result)] = _key(key, n)
        for block in itertools.chain(*regions):
            for n, argument in enumerate(block.arguments):
                self._names[hash(argument)] = _key(key, "argument", n)
            for inner in block.operations:
                self._visit(inner.operation)
        if regions:
            self.lines.append(f"end of {name}")


def effects(f: Callable[..., object], *shapes: object) -> list[str]:
    """The effects of all kernels in `f`, lowered for CUDA."""
    module = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compiler_ir()
    kernels: list[bytes] = []

    def see(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(
            op.attributes["call_target_name"]
        ):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            kernels.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(see)
    lines: list[str] = []
    for code in kernels:
        with make_ir_context() as context:
            dialect.register_dialect(context)
            context.allow_unregistered_dialects = True
            lines += _Flow(ir.Module.parse(code)).lines
    return lines


def _halves(tokens: int, rank: int, x_dtype: str, dtype: str) -> Iterator[tuple[str, Case]]:
    """The ops of one stack, of unsorted ids and sorted ones."""
    name, op = f"T{tokens}-r{rank}-{x_dtype}-{dtype}", _MOSAIC
    x, a = Shape((tokens, 1024), x_dtype), Shape((4, rank, 1024), dtype)
    b, y = Shape((4, 512, rank), dtype), Shape((tokens, 512), x_dtype)
    ids, v = Shape((tokens,), "int32"), Shape((tokens, rank), "float32")

    def add(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array) -> jax.Array:
        return pk.add_lora(y, x, a, b, pk.make_segments(ids, 4), implementation=op)

    yield f"shrink-{name}", (functools.partial(pk.bgmv_shrink, implementation=op), (x, a, ids))
    yield f"expand-{name}", (functools.partial(pk.bgmv_expand, implementation=op), (v, b, ids, y))
    yield f"both-{name}", (functools.partial(pk.add_lora, implementation=op), (y, x, a, b, ids))
    yield f"sorted-{name}", (add, (y, x, a, b, ids))


def _eight_bits(tokens: int, ranks: tuple[int, ...]) -> tuple[str, Case]:
    """A part of each rank with stacks in 8 bits, of sorted ids."""

    def add(
        y: jax.Array, x: jax.Array, ids: jax.Array,
        stacks: list[tuple[jax.Array, jax.Array, jax.Array]],
    ) -> jax.Array:  # fmt: skip
        parts = [pk.LoRAPart(a, b, scales, 4 * n) for n, (a, b, scales) in enumerate(stacks)]
        route = pk.make_segments(ids, 4 * len(parts))
        return pk.add_lora_multi(y, x, parts, route, implementation=_MOSAIC)

    dtype = "float8_e4m3fn"
    stacks = [
        (Shape((4, r, 1024), dtype), Shape((4, 512, r), dtype), Shape((4, r), "float32"))
        for r in ranks
    ]
    x, y = (Shape((tokens, size), "bfloat16") for size in (1024, 512))
    return f"eight-bits-T{tokens}-{ranks}", (add, (y, x, Shape((tokens,), "int32"), stacks))


def _ranges(
    tokens: int, widths: tuple[int, ...], ranks: tuple[int, ...], *, seated: bool, delta: bool,
    words: int = 1, dtype: str = "bfloat16", features: int = 1024,
) -> tuple[str, Case]:  # fmt: skip
    """The decode kernel with a range of ids for each rank, and a part of each for every y."""
    name = f"ranges-T{tokens}-{widths}-{ranks}-{features}-{dtype}-{seated=}-{delta=}-{words=}"

    def run(
        ys: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array,
        stacks: list[list[tuple[jax.Array, jax.Array]]],
    ) -> tuple[jax.Array, ...]:  # fmt: skip
        scales = jnp.ones(4 * len(ranks))
        offsets = list(itertools.accumulate(widths, initial=0))
        parts = tuple(
            DecodePart(a, b, scales, 4 * n, offset, 4 * n)
            for n, mine in enumerate(stacks)
            for (a, b), offset in zip(mine, offsets)
        )
        shape = tokens, sum(widths), max(ranks)
        config = decode_config(*shape, buckets=len(ranks), delta=delta)
        sizes = plan(ys, x, parts, config, add_inputs=not delta, seated=seated, id_words=words)
        if sizes is None:
            raise NotImplementedError(f"the decode kernel does not take {name}")
        given = tuple(Shape(y.shape, y.dtype) for y in ys) if delta else ys
        return decode_kernel(given, x, Seating.of(sizes).seat(ids) if seated else ids, parts, sizes)

    stacks = [
        [(Shape((4, r, features), dtype), Shape((4, w, r), dtype)) for w in widths] for r in ranks
    ]
    ids = Shape((tokens, words) if words > 1 else (tokens,), "int32")
    ys = tuple(Shape((tokens, width), dtype) for width in widths)
    return name, (run, (ys, Shape((tokens, features), dtype), ids, stacks))


def cases() -> Iterator[tuple[str, Case]]:
    """Both kinds of kernels: up to 256 tokens the decode kernel, above it shrink and expand."""
    grid = ((1, 8), (64, 16), (64, 64), (130, 128), (8, 272), (4, 512), (300, 16), (4096, 128))
    for tokens, rank in grid:
        yield from _halves(tokens, rank, "bfloat16", "bfloat16")
    yield from _halves(64, 16, "float16", "float16")
    yield from _halves(1000, 64, "float32", "bfloat16")
    for tokens, ranks in ((1, (8,)), (64, (64,)), (40, (8, 16, 128)), (2000, (8, 64))):
        yield _eight_bits(tokens, ranks)
    ways = (
        (False, False, 1),
        (False, False, 2),
        (False, True, 1),
        (True, False, 1),
        (True, True, 1),
    )
    shapes = (
        (64, (512,), (16,)), (40, (512, 256), (16, 128)), (64, (1024,), (8, 16, 32, 64, 128)),
        (9, (136,), (144,)), (200, (512,), (8,)),
    )  # fmt: skip
    for (seated, delta, words), shape in itertools.product(ways, shapes):
        yield _ranges(*shape, seated=seated, delta=delta, words=words)
    yield _ranges(64, (14336, 14336), (16,), seated=True, delta=True, features=4096)
    yield _ranges(64, (4096, 1024, 1024), (128,), seated=True, delta=True, features=4096)
    yield _ranges(64, (4096,), (64,), seated=True, delta=False, features=14336, dtype="float16")


def _lowered_by(checkout: pathlib.Path) -> dict[str, list[str]]:
    """The effects of each case, lowered by the code of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--here"]
    done = subprocess.run(
        command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--here"]:
        print(json.dumps({name: effects(f, *shapes) for name, (f, shapes) in cases()}))
        return 0
    if len(arguments) != 2:
        print(__doc__)
        return 2
    old, new = (_lowered_by(pathlib.Path(folder).resolve()) for folder in arguments)
    differ = [name for name in old if old[name] != new[name]]
    for name in differ:
        pairs = enumerate(itertools.zip_longest(old[name], new[name], fillvalue="nothing"))
        nth, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        print(f"{name}: effect {nth} of {len(old[name])}\n  was {before}\n  is  {after}")
    print(f"{len(old) - len(differ)} of {len(old)} cases are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
