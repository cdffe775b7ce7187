"""What the device tests run on two GPUs, on two devices of a CPU."""

import numpy as np
import pytest
from llama_in_float64 import Float64Llama
from marks import in_ci, on_request
from mesh_cases import (
    LOGITS,
    ROWS,
    MeshCase,
    adapters,
    check_gradients,
    check_logits,
    logits_in_float64,
    model_of,
    of_steps,
)
from mosaic_cases import relative_error


@pytest.mark.ci
def test_rows_without_their_adapter_would_be_far_off() -> None:
    right, model = logits_in_float64("float32", True), model_of("float32", True)
    base = of_steps(Float64Llama(model, adapters("float32"), [None] * len(ROWS)))
    for step, row in np.ndindex(*base.shape[:2]):
        moved = relative_error(base[step, row], right[step, row])
        assert moved == 0 if ROWS[row] is None else moved > 5 * max(LOGITS.values())


@pytest.mark.parametrize(
    "case",
    [
        in_ci(MeshCase("tensor parallel", "float32")),
        on_request(MeshCase("tensor parallel", "bfloat16")),
        on_request(MeshCase("fully sharded", "bfloat16")),
        on_request(MeshCase("data parallel", "float32")),
    ],
    ids=str,
)
def test_logits_are_those_of_one_device_and_of_float64(case: MeshCase) -> None:
    check_logits(case, "xla")


@pytest.mark.parametrize(
    "case",
    [
        on_request(MeshCase("tensor parallel", "bfloat16")),
        on_request(MeshCase("fully sharded", "float32")),
        on_request(MeshCase("data parallel", "float32")),
    ],
    ids=str,
)
def test_gradients_are_those_of_one_device_and_of_float64(case: MeshCase) -> None:
    check_gradients(case, "xla")
