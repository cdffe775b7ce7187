"""What tests of kernels in interpret mode share."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.backward import config, few, narrow_few, outer_few, wide_few


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


@pytest.fixture
def by_lanes_always(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lanes sum the gradients of every size. Gives which of the three kernels did so."""
    monkeypatch.setattr(config, "_LEAST_SQUARES", 0)
    monkeypatch.setattr(config, "_MOST_OF_GROUP", 1 << 20)
    ran, launch = list[str](), few.launch

    def noting(name: str, *others: Any) -> list[jax.Array]:
        ran.append(name.split("_")[1])
        return launch(name, *others)

    for module in (narrow_few, wide_few, outer_few):
        monkeypatch.setattr(module, "launch", noting)
    jax.clear_caches()  # programs of the same shapes by squares
    yield ran
    jax.clear_caches()
