"""The trainer's log-probabilities beside the sampler's, on the bundled model."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import agreement


@pytest.mark.slow
def test_trainer_and_sampler_agree_as_far_as_the_base_model_does(tmp_path: Path) -> None:
    found = [
        agreement.run(dtype, lambda _: None, ("stars", "twice"), rounds=2)
        for dtype in ("float32", "bfloat16")
    ]
    exact, rounded = found
    assert exact.sampled.size == rounded.trained.size == 3 * 2 * 17
    assert exact.sampled.min() < -5  # tokens that the model would not choose
    assert np.abs(exact.sampled - exact.trained).max() < 1e-4
    base, adapted = (rounded.difference(adapted=adapted) for adapted in (False, True))
    assert base.size == 34 and adapted.size == 68
    assert adapted.mean() < 3 * base.mean() and adapted.max() < 0.5
    agreement.draw(found, tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").stat().st_size > 10_000
    assert "bfloat16     68 tokens with an adapter: mean" in rounded.line


def test_both_phases_make_the_same_delta() -> None:
    assert agreement.delta_ulps() <= 2
