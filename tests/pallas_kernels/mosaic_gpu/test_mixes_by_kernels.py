"""Several adapters per token by the Mosaic kernels: emulated, interpreted, and lowered for CUDA."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gradient_cases import GradientCase
from mix_cases import (
    ChunkCase,
    check_chunk,
    check_chunk_bits,
    check_mix,
    check_mix_gradients,
    check_one_of_several,
)

import pallas_kernels as pk
from pallas_kernels.mosaic_gpu import Config

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
BUCKETS = GradientCase(21, 128, (72, 64), ((8, 3), (16, 2)), "shuffled")


@pytest.mark.parametrize("sorted_once", [False, True])
@pytest.mark.parametrize("columns", [2, pytest.param(4, marks=pytest.mark.ci)])
def test_one_launch_for_few_tokens(columns: int, sorted_once: bool, emulated: None) -> None:
    check_mix(BUCKETS, columns, DECODE, sorted_once=sorted_once)


@pytest.mark.ci
def test_one_launch_of_more_rows_than_tokens_may_be(emulated: None) -> None:
    check_mix(GradientCase(530, 64, (64,), ((8, 40),), "shuffled"), 2, DECODE, sorted_once=True)


@pytest.mark.ci
def test_a_row_with_one_adapter_has_the_bits_of_plain_ids(emulated: None) -> None:
    check_one_of_several(dataclasses.replace(BUCKETS, order="gaps"), DECODE)


CHUNK = ChunkCase(13, ((8, 4), (16, 3)), 5, rows=5, features=128, width=72)


@pytest.mark.parametrize("sorted_once", [True, pytest.param(False, marks=pytest.mark.ci)])
def test_decode_rows_beside_a_chunk(sorted_once: bool, emulated: None) -> None:
    how = {"implementation": "mosaic_gpu", "config": DECODE}
    check_chunk(CHUNK, sorted_once=sorted_once, **how)


@pytest.mark.ci
def test_decode_rows_beside_a_chunk_keep_their_bits(emulated: None) -> None:
    check_chunk_bits(CHUNK, sorted_once=True, implementation="mosaic_gpu", config=DECODE)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GradientCase(9, 64, (64,), ((16, 3),), "shuffled"), marks=pytest.mark.ci),
        pytest.param(GradientCase(80, 128, (64, 72), ((8, 2), (16, 2))), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_launches_for_many_tokens(case: GradientCase, interpreted: None) -> None:
    check_mix(case, 2, sorted_once=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GradientCase(9, 64, (64,), ((8, 3),), "gaps"), marks=pytest.mark.ci),
        pytest.param(GradientCase(70, 64, (64,), ((8, 2), (16, 2))), marks=pytest.mark.ci),
        pytest.param(GradientCase(70, 128, (64, 72), ((8, 2), (16, 2))), marks=pytest.mark.slow),
        pytest.param(GradientCase(130, 64, (64,), ((16, 1),)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_against_float64(case: GradientCase, interpreted: None) -> None:
    check_mix_gradients(case)


@pytest.mark.ci
@pytest.mark.parametrize(("num_tokens", "columns"), [(1, 2), (64, 4), (1024, 2), (1025, 2)])
def test_every_size_lowers(num_tokens: int, columns: int) -> None:
    """Forward and backward have no more launches than those of plain ids."""
    of = jax.ShapeDtypeStruct
    a, b = of((8, 16, 1024), jnp.bfloat16), of((8, 512, 16), jnp.bfloat16)
    x, y = of((num_tokens, 1024), jnp.bfloat16), of((num_tokens, 512), jnp.bfloat16)
    ids, weights = of((num_tokens, columns), jnp.int32), of((num_tokens, columns), jnp.float32)

    def names_in(f: Any) -> set[str]:
        text = jax.jit(f).trace(y, x, a, b, weights, ids)
        return {*re.findall(r"lora_?\w*_r\d+", text.lower(lowering_platforms=("cuda",)).as_text())}

    def forward(y: Any, x: Any, a: Any, b: Any, weights: Any, ids: Any) -> Any:
        mix = pk.make_mix(ids, weights, 8)
        return pk.add_lora(y, x, a, b, mix, implementation="mosaic_gpu")

    def backward(y: Any, *operands: Any) -> Any:
        *floats, ids = operands
        return jax.vjp(lambda *floats: forward(y, *floats, ids), *floats)[1](y)

    few = num_tokens <= 1024 and num_tokens * columns <= 2048
    assert names_in(forward) == ({"lora_r16"} if few else {"lora_shrink_r16", "lora_expand_r16"})
    assert names_in(backward) == {"lora_narrow_r16", "lora_wide_r16", "lora_outer_r16"}


@pytest.mark.ci
def test_ranks_up_to_128_are_one_launch_of_decode() -> None:
    """64 rows of 4 adapters, as without mixes."""
    of, ranks = jax.ShapeDtypeStruct, (16, 128)
    stacks = [(of((4, r, 256), jnp.bfloat16), of((4, 128, r), jnp.bfloat16)) for r in ranks]

    @jax.jit
    def delta(x: Any, stacks: Any, weights: Any, ids: Any) -> Any:
        parts = [pk.LoRAPart(a, b, first_slot=4 * n) for n, (a, b) in enumerate(stacks)]
        return pk.lora_delta(x, parts, ids, 128, weights=weights, implementation="mosaic_gpu")

    x, ids = of((64, 256), jnp.bfloat16), of((64, 4), jnp.int32)
    traced = delta.trace(x, stacks, of((64, 4), jnp.float32), ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"lora_?\w*_r\d+", text)) == {"lora_r16_r128"}
