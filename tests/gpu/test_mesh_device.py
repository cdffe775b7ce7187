"""A Llama divided over two Hopper GPUs: what one GPU computes, and float64; which kernels ran.

PYTHONPATH=. python3 -m pytest tests/gpu/test_mesh_device.py -m gpu -o addopts= -n 8
"""

from collections.abc import Iterator

import jax
import pytest
from mesh_cases import FORMS, MeshCase, check_gradients, check_logits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("two_gpus")]

RAN = {"bfloat16": "mosaic_gpu", "float32": "xla"}  # kernels take no float32 weights
CASES = [MeshCase(form, dtype) for dtype in RAN for form in FORMS]


@pytest.fixture(scope="module")
def two_gpus() -> None:
    if (count := len(jax.devices())) < 2:
        pytest.skip(f"needs two GPUs, JAX sees {count}")


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """XLA multiplies float32 with 10 bits of mantissa by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_gpu_and_of_float64(case: MeshCase) -> None:
    check_gradients(case, RAN[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_one_gpu_and_of_float64(case: MeshCase) -> None:
    """Those of a prefill, and of decode steps behind it."""
    check_logits(case, RAN[case.dtype])
