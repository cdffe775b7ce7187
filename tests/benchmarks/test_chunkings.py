"""The engine's log-probabilities in steps of other sizes, on the bundled model."""

import pytest

from benchmarks import chunkings


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_other_sizes_differ_by_rounding_alone(dtype: str) -> None:
    found = chunkings.run(dtype, lambda _: None, ("stars", "twice"), rounds=2)
    assert found.forced.shape == (3, 6 * 39)  # all but the first of 40 tokens
    assert found.forced.min() < -5  # tokens that the model would not choose
    if dtype == "float32":  # token for token
        assert found.differences.max() < 1e-4 and found.diverging == 0
    else:
        assert found.differences.max() < 1 and found.differences.mean() < 0.07
    assert f"{dtype:9}   234 tokens in 3 sizes of steps: mean" in found.line
    assert "of 6 requests diverge" in found.line
