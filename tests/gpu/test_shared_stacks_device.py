"""Experts that share A or B on a Hopper GPU: every size against float64, and the bits of their own.

PYTHONPATH=. python3 -m pytest tests/gpu/test_shared_stacks_device.py -m gpu
"""

from typing import Any

import pytest
from sharing_cases import SHARED, SharingCase, check_sharing, check_sharing_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

SIZES = [
    dict(tokens=1, features=4096, width=4096, rank=32, slots=8, experts=128),
    dict(tokens=64, features=3072, width=1024, rank=32, slots=8, experts=64),
    dict(tokens=200, features=1024, width=1032, rank=8),
    dict(tokens=100, features=1024, width=512, rank=128, dtype="float16"),
    dict(tokens=1000, features=1024, width=512, rank=16, slots=2, experts=16),
    dict(tokens=2000, features=2048, width=1024, rank=64, slots=4, experts=32),
    dict(tokens=4096, features=1024, width=1032, rank=8, slots=8, experts=2),
    dict(tokens=4096, features=2048, width=512, rank=256),
]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size: dict[str, Any], shared: str) -> None:
    case = SharingCase(shared=shared, **size)
    for delta in (False, True):
        check_sharing(case, sorted_once=delta, delta=delta, implementation="mosaic_gpu")


@pytest.mark.parametrize("shared", ["A", "B", "A, B"])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_gradients_against_float64(size: dict[str, Any], shared: str) -> None:
    check_sharing_gradients(SharingCase(shared=shared, **size))


@pytest.mark.parametrize("shared", ["A", "B"])
def test_gradients_of_several_layers(shared: str) -> None:
    check_sharing_gradients(SharingCase(200, 1024, 512, 16, shared), of_layers=True)
