"""The traces of the serving workloads, and that a small one is served."""

import numpy as np
import pytest

from benchmarks import engine_steps, serve
from benchmarks.step import SMALL, Shape
from jax_lora.serving import StepShape


def trace(name, requests=4000, max_length=2048, seed=0):
    [load] = [w for w in serve.workloads(64, [5, 100]) if w.name == name]
    return serve.Trace.of(load, requests, max_length, seed)


def test_workloads_stand_beside_the_base_of_their_family():
    found = serve.workloads(64, [5, 100])
    assert [load.name for load in found if load.popularity == "base"] == [
        "Punica, base",
        "S-LoRA, base",
    ]
    assert len(found) == 5 + 1 + 4
    only = serve.workloads(64, [5, 100], "rank 8")
    assert [load.name for load in only] == [
        "S-LoRA, base",
        "S-LoRA, 5 adapters of rank 8",
        "S-LoRA, 100 adapters of rank 8",
    ]
    with pytest.raises(ValueError, match="no workload is called 'x'; there are"):
        serve.workloads(64, [5], "x")


def test_lengths():
    punica, slora = trace("Punica, zipf"), trace("S-LoRA, 5 adapters of rank 8")
    totals = punica.prompts + punica.answers
    assert punica.prompts.min() >= 1 and punica.answers.min() >= 2 and totals.max() <= 2048
    assert abs(np.median(punica.prompts) - 17) <= 1  # exp(N(0, 0.8)) x 18 - 1
    assert abs(totals.mean() - 1024) < 30
    for lengths in (slora.prompts, slora.answers):
        assert lengths.min() == 8 and lengths.max() == 511
        assert abs(lengths.mean() - 259.5) < 8
    short = trace("Punica, zipf", max_length=64)
    assert (short.prompts + short.answers).max() <= 64


def test_popularity():
    assert (trace("Punica, base").adapters == -1).all()
    assert (trace("Punica, identical").adapters == 0).all()
    assert len({*trace("Punica, distinct").adapters.tolist()}) == 4000
    counts = np.bincount(trace("Punica, zipf").adapters)
    assert 1.3 < counts[0] / counts[1] < 1.7 and 1.3 < counts[1] / counts[2] < 1.7
    counts = np.bincount(trace("S-LoRA, 100 adapters of rank 8").adapters)
    assert 1.7 < counts[0] / counts[1] < 2.4 and 3 < counts[0] / counts[3] < 5.5
    counts = np.bincount(trace("Punica, uniform").adapters)
    assert len(counts) == 6 and counts.max() < 1.2 * counts.min()
    assert (trace("Punica, zipf").adapters == trace("Punica, zipf").adapters).all()
    assert (trace("Punica, zipf").adapters != trace("Punica, zipf", seed=1).adapters).any()


@pytest.mark.slow
def test_a_small_workload_is_served():
    steps = StepShape(rows=4, max_length=32, chunk=16, lanes=(1,), block=16)
    options = serve.Options(requests=12, slots=2, steps=steps)
    report = serve.run(serve.workloads(4, [3], "rank 8"), options, lambda text: None)
    base, ours = report.rows
    assert base.of_base is None and base.loads == 0
    assert ours.of_base == ours.tokens_per_s / base.tokens_per_s
    assert 3 <= ours.loads <= 12 and ours.requests == 12
    assert all(0 < median <= high for median, high in (ours.first_ms, ours.next_ms))


@pytest.mark.slow
def test_steps_are_timed():
    report = engine_steps.run(Shape(SMALL, 8, 16, 64), lambda text: None)
    assert len(report.rows) == 6 and all(row.us > 0 for row in report.rows)
    assert [row.target for row in report.rows][3:5] == [
        "95% of no LoRA's tokens/s",
        "88% of no LoRA's tokens/s",
    ]
