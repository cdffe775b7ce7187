"""Attention over blocks on a GPU: right, without NaN of others, the same bits in any place."""

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import CASES, PagedCase

from pallas_kernels.mosaic_gpu.paged import paged_attention

pytestmark = pytest.mark.gpu

MANY = PagedCase((0, 300, 7, 1000) * 8, (1024, 900, 8, 1017) * 8, heads=8, head_dim=128, block=32)


@pytest.mark.parametrize("case", [*CASES, MANY], ids=str)
def test_rows_see_their_own_positions_alone(case: PagedCase) -> None:
    case.check(np.asarray(paged_attention(*case.arrays(), scale=0.1), np.float64))


def test_a_row_has_the_same_bits_in_another_place_beside_others() -> None:
    q, keys, values, tables, firsts, lengths = MANY.arrays()
    one = paged_attention(q, keys, values, tables, firsts, lengths, scale=0.1)
    order = np.random.default_rng(0).permutation(32)
    cut = jnp.where(jnp.arange(32) < 16, lengths, jnp.minimum(lengths, firsts + 1))
    q, tables, firsts, cut = (array[order] for array in (q, tables, firsts, cut))
    other = paged_attention(q, keys, values, tables, firsts, cut, scale=0.1)
    same = order < 16
    np.testing.assert_array_equal(np.asarray(other, "f4")[same], np.asarray(one, "f4")[order[same]])
