"""Stacks in 8 bits on a Hopper GPU: every size against float64, every byte as it is, and bits.

PYTHONPATH=. python3 -m pytest tests/gpu/test_eight_bits_device.py -m gpu
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from eight_bit_cases import EightBitCase, Stack
from mosaic_cases import bits, parts_in_float64, relative_error, y_tolerance

import pallas_kernels as pk

pytestmark = pytest.mark.gpu

MANY = tuple(
    Stack(rank, 4, 1024, 4 * n, 1024 * column)
    for n, rank in enumerate((8, 16, 64))
    for column in range(2)
)
CASES = [
    EightBitCase(1, 4096, (Stack(8, 1, 4096),), "distinct"),
    EightBitCase(16, 4096, (Stack(16, 16, 4096),), "distinct"),
    EightBitCase(64, 4096, (Stack(64, 64, 4096),), "distinct"),
    EightBitCase(33, 576, (Stack(48, 5, 1536),), "zipf", "float32"),
    EightBitCase(7, 14336, (Stack(32, 3, 4096),), "identical"),
    EightBitCase(256, 4096, (Stack(128, 8, 4096),), "out_of_range"),
    EightBitCase(100, 1024, MANY),
    EightBitCase(2000, 1024, (Stack(64, 8, 1024),)),
]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Leaves NaNs where the next outputs are likely to be allocated."""
    jax.block_until_ready([jnp.full(2**k, jnp.nan) for k in (8, 12, 16, 20, 22)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: EightBitCase) -> None:
    """In its order of tokens, and in another: a row's bits depend on itself alone."""
    (x, y), parts, ids = case.rows(), case.parts(), case.ids
    parts = jax.tree.map(jnp.asarray, parts)

    @jax.jit
    def run(y: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
        return pk.add_lora_multi(y, x, parts, ids, implementation="mosaic_gpu")

    new = np.asarray(run(y, x, ids))
    delta, used = parts_in_float64(x, case.parts(), ids, case.columns)
    want = y.astype(np.float64) + delta
    assert relative_error(new, want) < y_tolerance(case.y_dtype, "bfloat16")
    np.testing.assert_array_equal(bits(new)[~used], bits(y)[~used])
    order = np.random.default_rng(0).permutation(case.tokens)
    shuffled = np.asarray(run(y[order], x[order], ids[order]))
    np.testing.assert_array_equal(bits(shuffled), bits(new[order]))


def test_every_byte_is_widened_exactly() -> None:
    """Each column of A and of B: a token reads one column of A, and so one of B."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.where(np.isnan(every), 0, every).astype(ml_dtypes.float8_e4m3fn)
    ones = np.eye(16, 256, dtype=np.float32).astype(every.dtype)
    x, ids = np.eye(256, dtype=ml_dtypes.bfloat16), np.zeros(256, np.int32)
    how: Any = {"implementation": "mosaic_gpu", "scales": np.ones((1, 16), np.float32)}

    def added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = jnp.zeros((256, b.shape[0]), jnp.float32)
        return np.asarray(pk.add_lora(y, x, a[None], b[None], ids, **how))

    all_of_a = np.broadcast_to(every, (16, 256))
    one_each = np.tile(np.eye(16, dtype=np.float32), (4, 1)).astype(every.dtype)
    wide = every.astype(np.float32)
    np.testing.assert_array_equal(added(all_of_a, one_each), np.tile(wide[:, None], (1, 64)))
    all_of_b = np.broadcast_to(every[:, None], (256, 16))
    np.testing.assert_array_equal(added(ones, all_of_b)[:16], np.tile(wide[None], (16, 1)))
