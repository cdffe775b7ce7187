"""Runs on a bare machine too: no packages beside JAX, numpy and pytest, no settings elsewhere."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share the device

import pytest
from mosaic_cases import poison


@pytest.fixture
def poisoned() -> None:
    poison()
