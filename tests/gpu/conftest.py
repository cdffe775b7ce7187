"""Runs on a bare machine too: no packages beside JAX, numpy and pytest, no settings elsewhere."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share the device
# Multicast groups of NVLink belong to the whole host, whose other programs they may disturb.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import pytest
from mosaic_cases import poison


@pytest.fixture
def poisoned() -> None:
    poison()
