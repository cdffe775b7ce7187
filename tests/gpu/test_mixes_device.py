"""Several adapters per token on a Hopper GPU, and decode rows beside a prompt's chunk: every size
against float64, and the bits of rows.

PYTHONPATH=. python3 -m pytest tests/gpu/test_mixes_device.py -m gpu -o addopts= -n 8
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_cases import GradientCase
from mix_cases import (
    ChunkCase,
    check_chunk,
    check_chunk_bits,
    check_mix,
    check_mix_gradients,
    check_one_of_several,
    ids_and_weights,
)
from mosaic_cases import bits

import pallas_kernels as pk

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

CASES = [
    GradientCase(1, 4096, (4096,), ((16, 4),)),
    GradientCase(64, 4096, (4096, 1024, 1024), ((16, 8),)),
    GradientCase(64, 1024, (1024,), ((8, 3), (16, 3), (64, 2))),
    GradientCase(64, 1024, (512,), ((16, 4), (128, 4))),
    GradientCase(200, 1024, (512,), ((16, 40),)),
    GradientCase(700, 1024, (1024,), ((128, 4),)),
    GradientCase(1000, 1024, (1024,), ((32, 300),), "shuffled"),
    GradientCase(2000, 2048, (2048,), ((16, 8), (64, 3))),
    GradientCase(4096, 4096, (4096,), ((16, 32),)),
]


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: GradientCase, columns: int) -> None:
    check_mix(case, columns, sorted_once=True)
    if case.num_tokens <= 200:
        check_mix(case, columns, sorted_once=False)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_gradients_against_float64(case: GradientCase) -> None:
    check_mix_gradients(case)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_a_row_with_one_adapter_has_the_bits_of_plain_ids(case: GradientCase) -> None:
    check_one_of_several(case)


@pytest.mark.parametrize("num_tokens", [64, 3000])
def test_bits_of_a_row_do_not_depend_on_the_others(num_tokens: int) -> None:
    case = GradientCase(num_tokens, 1024, (1024,), ((16, 8), (64, 4)))
    z = case.arrays()
    ids, weights = ids_and_weights(case, 2)
    weights = np.nan_to_num(weights)
    order = np.random.default_rng(0).permutation(num_tokens)

    @jax.jit
    def run(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        mix = pk.make_mix(ids, weights, case.slots)
        return pk.lora_delta(x, z.parts, mix, 1024, implementation="mosaic_gpu")

    x = jnp.asarray(z.x)
    plain, again = run(x, ids, weights), run(x, ids, weights)
    shuffled = run(x[order], ids[order], weights[order])
    np.testing.assert_array_equal(bits(np.asarray(plain)), bits(np.asarray(again)))
    np.testing.assert_array_equal(bits(np.asarray(plain)[order]), bits(np.asarray(shuffled)))


SIXTEEN, SIXTY_FOUR, MIXED = ((16, 66),), ((64, 66),), ((16, 40), (64, 26))
HIGH = ((16, 40), (48, 16), (128, 10))
# 512 and 768 tokens are the most of one launch, of rank 64 and of several ranks; 513 and 769 are
# two launches.
CHUNKS = [
    *(ChunkCase(chunk, ranges, 64) for chunk in (448, 705) for ranges in (SIXTEEN, SIXTY_FOUR)),
    *(ChunkCase(chunk, ranges, 64) for chunk in (448, 704, 705) for ranges in (MIXED, HIGH)),
    ChunkCase(449, SIXTY_FOUR, 64),
    ChunkCase(448, SIXTY_FOUR, 65, rows_first=False),
    ChunkCase(705, MIXED, 65, rows_first=False),
]
# The chunk has the adapter of a decode row; of either rank.
SHARED = [ChunkCase(448, ((16, 65),), 7), ChunkCase(705, ((16, 40), (64, 25)), 60)]


@pytest.mark.parametrize("sorted_once", [True, False], ids=["segments", "ids"])
@pytest.mark.parametrize("case", CHUNKS + SHARED, ids=str)
def test_rows_beside_a_chunk(case: ChunkCase, sorted_once: bool) -> None:
    """Against float64, and the same bits whatever the neighbours: one program does both."""
    how = {"sorted_once": sorted_once, "implementation": "mosaic_gpu"}
    check_chunk(case, **how)
    check_chunk_bits(case, **how)
