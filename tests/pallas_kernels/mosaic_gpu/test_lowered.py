"""A kernel is traced and lowered once for all programs that launch it, and so compiled once."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_lora import AdapterBatch, LoRADense, use
from pallas_kernels.mosaic_gpu.decode import kernel as decode
from pallas_kernels.mosaic_gpu.prefill import expand, shrink

H, RANGES = 256, ((16, 3),)


def kernels(text: str) -> list[str]:
    """By JAX's hashes, each of which the CUDA plugin compiles once."""
    return re.findall(r'kernel_hash = "([^"]*)"', text)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_programs_share_kernels(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    bodies = [(decode, "run_cluster"), (shrink, "_block_body"), (expand, "_block_body")]
    for module, name in bodies:

        def counted(*args: Any, body: Callable[..., None] = getattr(module, name)) -> None:
            made.append(body)
            body(*args)

        monkeypatch.setattr(module, name, counted)

    def lowered(tokens: int, *, again: bool) -> list[str]:
        layer = nnx.eval_shape(
            lambda: LoRADense(H, H, slots=3, buckets=(16,), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
        graphdef, state = nnx.split(layer)

        def step(state: nnx.State, x: jax.Array, batch: AdapterBatch) -> jax.Array:
            with use(batch):
                y = nnx.merge(graphdef, state)(x)
            return jnp.sin(y) if again else y

        x = jax.ShapeDtypeStruct((tokens, H), jnp.bfloat16)
        batch = AdapterBatch(jnp.zeros(tokens, jnp.int32), ranges=RANGES, phase=phase)
        traced = jax.jit(step).trace(state, x, batch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return kernels(text)

    tokens = {"decode": 24, "prefill": 2056}[phase]
    first = lowered(tokens, again=False)
    assert len(first) == len(made) == {"decode": 1, "prefill": 2}[phase]
    assert lowered(tokens, again=True) == first
    assert len(made) == len(first)
    assert not {*lowered(tokens + 64, again=True)} & {*first}
    assert len(made) == 2 * len(first)
