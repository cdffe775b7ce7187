"""The soak, small: what it finds wrong on this machine."""

import pytest

from benchmarks import soak


@pytest.mark.ci
def test_every_sound_request_is_as_it_is_alone():
    load = soak.Load(
        adapters=24,
        requests=120,
        slots={8: 1, 32: 2, 160: 1},
        ranks=(1, 160),
        broken=0.1,
        replaced=0.1,
        in_flight=24,
    )
    summary = soak.run(load, lambda text: None)
    assert summary.wrong == []
    assert summary.compilations == 0
    assert summary.answered + summary.cancelled + summary.failed == summary.requests == 120
    assert summary.failed and summary.cancelled and summary.replacements
    assert summary.device_bytes[1] <= 1.01 * summary.device_bytes[0]
    assert summary.ok
