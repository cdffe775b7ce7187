"""What tests of kernels in interpret mode share."""

from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Kernels run by Pallas's interpreter, which finds no race."""
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def emulated() -> Iterator[None]:
    """For the decode kernel alone, whose emulator finds races by itself."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
