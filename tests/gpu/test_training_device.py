"""What training promises of bits, by the kernels on a Hopper GPU.

PYTHONPATH=. python3 -m pytest tests/gpu/test_training_device.py -m gpu -o addopts= -n 8
"""

import numpy as np
import pytest
from neighbours import Neighbours, check_exact, rows_of_two_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rank", [8, 16, 64, 128])
@pytest.mark.parametrize("own", [1, 64, 700], ids="{} tokens".format)
def test_an_adapters_gradients_keep_their_bits_beside_any_neighbours(own: int, rank: int) -> None:
    """Its tokens stay where they are: other places may fall into other tiles."""
    check_bits(Neighbours(1024, 512, 256, rank, "bfloat16"), own)


@pytest.mark.parametrize("own", [1, 16, 17, 40], ids="{} tokens".format)
def test_so_do_those_that_lanes_sum(own: int) -> None:
    """More than 16 tokens of an adapter are divided among the warps of a block."""
    check_bits(Neighbours(64, 8192, 8192, 8, "bfloat16", slots=64), own)


def check_bits(case: Neighbours, own: int) -> None:
    where = np.sort(np.random.default_rng(own).permutation(case.tokens)[:own])
    right = case.run(0, where, alone=True)
    assert all(value.any() for value in right.values())
    for seed in (0, 1, 2):
        found = case.run(seed, where)
        for name, value in right.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("rank", [16, 128])
def test_exact_rows_have_the_same_bits_in_batches_of_any_size(rank: int) -> None:
    case = rows_of_two_ranks(1000, 1024, 512, (8, rank), "bfloat16")
    check_exact(*case, sizes=(1, 8, 64, 300))
