"""Attention over blocks of keys and values: against float64, with NaN in all that nobody sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import CASES, PagedCase

from pallas_kernels.mosaic_gpu.paged import lacks_paged_attention, paged_attention


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_see_their_own_positions_alone(interpreted: None, case: PagedCase) -> None:
    case.check(np.asarray(paged_attention(*case.arrays(), scale=0.1), np.float64))


def test_a_row_has_the_same_bits_in_another_place_beside_others(interpreted: None) -> None:
    case = PagedCase((0, 3), (70, 20), heads=1)
    q, keys, values, tables, firsts, lengths = case.arrays()
    one = paged_attention(q, keys, values, tables, firsts, lengths, scale=0.1)
    turned = (array[::-1] for array in (q, tables, firsts, lengths.at[0].set(9)))
    q, tables, firsts, lengths = turned
    other = paged_attention(q, keys, values, tables, firsts, lengths, scale=0.1)
    np.testing.assert_array_equal(np.asarray(other[0], "f4"), np.asarray(one[1], "f4"))
    assert (np.asarray(other[1], "f4") != np.asarray(one[0], "f4")).any()


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_it_lowers_for_cuda(block: int, head_dim: int, dtype: jnp.dtype) -> None:
    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    number = jax.ShapeDtypeStruct((64,), jnp.int32)
    table = jax.ShapeDtypeStruct((64, 33), jnp.int32)
    pages = of(640, 8, block, head_dim)
    run = jax.jit(lambda *arrays: paged_attention(*arrays, scale=0.1))
    traced = run.trace(of(64, 8, 4, head_dim), pages, pages, table, number, number)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_it_lacks_is_told() -> None:
    bf16 = jnp.dtype(jnp.bfloat16)
    assert lacks_paged_attention(4, 128, 32, bf16) is None
    for sizes, why in (
        ((4, 128, 32, jnp.dtype(jnp.float32)), "keys of float32"),
        ((4, 96, 32, bf16), "heads of 96 features"),
        ((4, 128, 24, bf16), "blocks of 24 tokens"),
        ((65, 128, 32, bf16), "65 query heads for one of keys"),
    ):
        assert why in (lacks_paged_attention(*sizes) or "")
    case = PagedCase((0,), (4,), block=4)
    with pytest.raises(ValueError, match="paged_attention lacks blocks of 4 tokens"):
        paged_attention(*case.arrays(), scale=0.1)
