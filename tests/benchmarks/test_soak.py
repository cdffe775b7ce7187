"""The soak, small: what it finds wrong on this machine."""

import dataclasses

import jax
import numpy as np
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
    assert summary.grown == [] and min(*summary.device_bytes, *summary.host_bytes) > 0
    assert summary.ok


def test_memory_that_grows_is_judged():
    flat = {"device_bytes": (1000, 1010), "host_bytes": (1000, 1050)}
    summary = soak.Summary("device", 3, answered=1, cancelled=1, failed=1, **flat)
    assert summary.ok and summary.grown == []
    on_device = dataclasses.replace(summary, device_bytes=(1000, 1011))
    assert not on_device.ok
    assert on_device.grown == [
        "1,011 bytes of the devices at the end are 1.1% more than the 1,000 halfway; at most 1% "
        "may be"
    ]
    on_host = dataclasses.replace(summary, host_bytes=(1000, 1051))
    assert not on_host.ok and "1,051 bytes of the process" in on_host.grown[0]
    assert dataclasses.replace(summary, host_bytes=(2000, 1000)).ok
    assert not dataclasses.replace(summary, failed=0).ok
    assert not dataclasses.replace(summary, compilations=1).ok


def test_the_devices_say_what_is_in_use(monkeypatch):
    class Gpu:
        def memory_stats(self):
            return {"bytes_in_use": 300, "peak_bytes_in_use": 900}

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(), Gpu()])
    assert soak.device_bytes() == 600
    monkeypatch.undo()
    before = soak.device_bytes()
    kept = jax.device_put(np.zeros(1000, np.float32))  # a CPU has no statistics
    assert soak.device_bytes() == before + kept.nbytes
