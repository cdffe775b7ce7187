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
from pallas_kernels.mosaic_gpu import Config
from pallas_kernels.mosaic_gpu.prefill import default_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

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
    EightBitCase(1, 4096, (Stack(8, 1, 4096),), "distinct", dtype="int8"),
    EightBitCase(64, 4096, (Stack(64, 64, 4096),), "distinct", dtype="int8"),
    EightBitCase(100, 1024, MANY, dtype="int8"),
]
PREFILLS = [
    EightBitCase(300, 1040, (Stack(8, 6, 1096),), "zipf"),
    EightBitCase(500, 4096, (Stack(16, 8, 4096),)),
    EightBitCase(700, 576, (Stack(48, 5, 1536),), "zipf", "float32"),
    EightBitCase(640, 1056, (Stack(96, 3, 1024),), "identical"),
    EightBitCase(1024, 4096, (Stack(64, 64, 4096),), "distinct"),
    EightBitCase(400, 14336, (Stack(272, 3, 1024),), "out_of_range"),
    EightBitCase(4096, 2048, (Stack(128, 4, 2048),), "zipf"),  # two tiles in a block
    EightBitCase(333, 1024, (Stack(512, 2, 1024),)),
    EightBitCase(900, 1024, MANY),
    EightBitCase(1024, 4096, (Stack(64, 64, 4096),), "distinct", dtype="int8"),
    EightBitCase(900, 1024, MANY, dtype="int8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: EightBitCase) -> None:
    check(case, None)


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill_against_float64(case: EightBitCase) -> None:
    """By two launches, also of so few tokens that one would do."""
    one = max(case.stacks, key=lambda stack: stack.rank)
    check(case, default_config(case.tokens, case.features, one.width, one.rank, one.slots))


def check(case: EightBitCase, config: Config | None) -> None:
    """In its order of tokens, and in others: a row's bits depend on itself alone."""
    (x, y), parts, ids = case.rows(), case.parts(), case.ids
    parts = jax.tree.map(jnp.asarray, parts)

    @jax.jit
    def run(y: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
        how: Any = {"implementation": "mosaic_gpu", "config": config}
        return pk.add_lora_multi(y, x, parts, ids, **how)

    new = np.asarray(run(y, x, ids))
    delta, used = parts_in_float64(x, case.parts(), ids, case.columns)
    want = y.astype(np.float64) + delta
    assert relative_error(new, want) < y_tolerance(case.y_dtype, "bfloat16")
    np.testing.assert_array_equal(bits(new)[~used], bits(y)[~used])
    for order in np.random.default_rng(0).permutation(case.tokens), np.argsort(ids, kind="stable"):
        moved = np.asarray(run(y[order], x[order], ids[order]))
        np.testing.assert_array_equal(bits(moved), bits(new[order]))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("config", [None, Config(split=2)], ids=["one launch", "two launches"])
def test_every_byte_is_widened_exactly(config: Config | None, rank: int, dtype: str) -> None:
    """Each column of A and of B: a token reads one column of A, and so one of B."""
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
    every = np.where(np.isnan(every), 0, every).astype(dtype)
    ones = np.eye(rank, 256, dtype=np.float32).astype(every.dtype)
    x, ids = np.eye(256, dtype=ml_dtypes.bfloat16), np.zeros(256, np.int32)
    how: Any = {"implementation": "mosaic_gpu", "scales": np.ones((1, rank), np.float32)}
    how["config"] = config

    def added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        y = jnp.zeros((256, b.shape[0]), jnp.float32)
        return np.asarray(pk.add_lora(y, x, a[None], b[None], ids, **how))

    all_of_a = np.broadcast_to(every, (rank, 256))
    one_each = np.tile(np.eye(rank, dtype=np.float32), (64 // rank, 1)).astype(every.dtype)
    wide = every.astype(np.float32)
    np.testing.assert_array_equal(added(all_of_a, one_each), np.tile(wide[:, None], (1, 64)))
    all_of_b = np.broadcast_to(every[:, None], (256, rank))
    np.testing.assert_array_equal(added(ones, all_of_b)[:rank], np.tile(wide[None], (rank, 1)))
