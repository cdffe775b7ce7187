"""A kernel is traced and lowered once for all programs that launch it, and so compiled once."""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_lora import AdapterBatch, LoRADense, use
from pallas_kernels import LoRAPart, add_lora_multi
from pallas_kernels.mosaic_gpu.decode import kernel as decode
from pallas_kernels.mosaic_gpu.prefill import expand, shrink

H, RANGES = 256, ((16, 3),)


def kernels(text: str) -> list[str]:
    """By JAX's hashes, each of which the CUDA plugin compiles once."""
    return re.findall(r'kernel_hash = "([^"]*)"', text)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels whose bodies are traced or made, one after the other."""
    names: list[str] = []

    def count(module: types.ModuleType, name: str) -> None:
        body = getattr(module, name)

        def counted(*args: Any) -> None:
            names.append(module.__name__)
            body(*args)

        monkeypatch.setattr(module, name, counted)

    count(decode, "run_cluster")
    count(shrink, "_block_body")
    count(expand, "_block_body")
    return names


def make_layer() -> LoRADense:
    options = dict(slots=3, buckets=(16,), param_dtype=jnp.bfloat16)
    return LoRADense(H, H, **options, rngs=nnx.Rngs(0))


def lowered(phase: str, tokens: int, *, again: bool) -> list[str]:
    """The kernels of a program; of another one if `again`."""
    graphdef, state = nnx.split(nnx.eval_shape(make_layer))

    def step(state: nnx.State, x: jax.Array, batch: AdapterBatch) -> jax.Array:
        with use(batch):
            y = nnx.merge(graphdef, state)(x)
        return jnp.sin(y) if again else y

    x = jax.ShapeDtypeStruct((tokens, H), jnp.bfloat16)
    batch = AdapterBatch(jnp.zeros(tokens, jnp.int32), ranges=RANGES, phase=phase)
    traced = jax.jit(step).trace(state, x, batch)
    return kernels(traced.lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize(("phase", "tokens", "launches"), [("decode", 24, 1), ("prefill", 2056, 2)])
def test_programs_share_kernels(phase: str, tokens: int, launches: int, made: list[str]) -> None:
    first = lowered(phase, tokens, again=False)
    assert len(first) == len(made) == launches
    assert lowered(phase, tokens, again=True) == first
    assert len(made) == launches
    assert not {*lowered(phase, tokens + 64, again=True)} & {*first}
    assert len(made) == 2 * launches


@pytest.mark.ci
def test_like_projections_share_kernels() -> None:
    """Five parts for each of three ys: none of the ys is copied, and k and v are launched alike."""
    tokens, widths, ranks = 800, (512, H, H), (8, 16, 32, 64, 128)
    offsets = (0, 512, 512 + H)

    def add(ys: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        parts = [
            LoRAPart(jnp.zeros((2, r, H), x.dtype), jnp.zeros((2, n, r), x.dtype), None, 2 * i, y)
            for n, y in zip(widths, offsets)
            for i, r in enumerate(ranks)
        ]
        return add_lora_multi(ys, x, parts, ids, implementation="mosaic_gpu")

    ys = tuple(jax.ShapeDtypeStruct((tokens, n), jnp.bfloat16) for n in widths)
    x, ids = jax.ShapeDtypeStruct((tokens, H), jnp.bfloat16), jnp.zeros(tokens, jnp.int32)
    text = jax.jit(add).trace(ys, x, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len({*kernels(text)}) == len(kernels(text)) == 4
    assert not re.search(rf"concatenate.*{tokens}x{sum(widths)}xbf16", text)
