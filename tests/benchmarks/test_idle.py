"""The share of time in which a GPU idles, and the engine that is looked at."""

import dataclasses
import json
import types

import jax
import pytest
from typer.testing import CliRunner

from benchmarks import engine_steps, idle, step
from benchmarks.__main__ import app
from benchmarks.step import Kernel, LaunchedKernel, kernels_of, launched_kernels


def launched(*spans, device="/device:GPU:0", name="gemm"):
    return [LaunchedKernel(device, name, start, end) for start, end in spans]


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(10, 20)], 0.0),
        ([(0, 10), (10, 30)], 0.0),
        ([(0, 10), (20, 40)], 0.25),
        ([(20, 40), (0, 10)], 0.25),  # streams are listed one behind the other
        ([(0, 30), (10, 20), (25, 40), (50, 100)], 0.1),  # they overlap
        ([(0, 100), (10, 20), (30, 40)], 0.0),
        ([(5, 5)], 0.0),
    ],
)
def test_the_share_in_which_nothing_runs(spans, share):
    assert idle.idle_share(launched(*spans)) == pytest.approx(share)


def test_copies_to_the_host_are_no_work_and_the_gpu_that_idles_most_counts():
    assert idle.idle_share([]) is None
    work = launched((0, 10), (30, 40))
    copies = launched((10, 30), name="MemcpyD2H") + launched((40, 90), name="MemcpyH2D")
    assert idle.idle_share(work + copies) == pytest.approx(0.5)
    assert idle.idle_share(work + launched((10, 30), name="MemcpyD2D")) == 0
    other = launched((0, 10), (40, 50), device="/device:GPU:1")
    assert idle.idle_share(work + other) == pytest.approx(0.6)


def test_kernels_of_steps_in_the_mean():
    spans = launched((0, 2000), (5000, 9000)) + launched((9000, 29000), name="copy")
    assert kernels_of(spans, 2) == (Kernel("copy", 0.5, 10.0), Kernel("gemm", 1.0, 3.0))


def test_what_the_gpus_ran_is_read_from_a_trace(tmp_path, monkeypatch):
    def line(name, *events):
        made = [
            types.SimpleNamespace(name=n, start_ns=start, duration_ns=duration)
            for n, start, duration in events
        ]
        return types.SimpleNamespace(name=name, events=made)

    def plane(name, *lines):
        return types.SimpleNamespace(name=name, lines=lines)

    planes = [
        plane("/host:CPU", line("Stream #1", ("python", 0, 9))),
        plane(
            "/device:GPU:0",
            line("Stream #20(Compute)", ("gemm", 5, 3), ("copy", 9, 1)),
            line("XLA Ops", ("gemm", 5, 3)),
        ),
    ]
    data = types.SimpleNamespace(from_file=lambda file: types.SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", data)
    (tmp_path / "host.xplane.pb").touch()
    device = "/device:GPU:0"
    assert launched_kernels(tmp_path) == [
        LaunchedKernel(device, "gemm", 5, 8),
        LaunchedKernel(device, "copy", 9, 10),
    ]


def test_the_aim():
    profile = idle.Profile("device", 64, 500, 8.0, 7.9, 0.02, 20, ())
    assert profile.is_met
    assert dataclasses.replace(profile, idle=0.021).is_met is False
    assert dataclasses.replace(profile, idle=None).is_met is None


def test_the_command_says_whether_the_aim_is_met(monkeypatch):
    shape = step.Shape.of_this_machine()
    report = step.Report(
        "H200", "2026-01-01", shape, 1, [step.Row("no LoRA", 9.0, 1.0, 10, "")], []
    )
    profile = idle.Profile("H200", 64, 500, 8.4, 8.2, 0.0312, 20, (Kernel("gemm", 128.0, 90.0),))
    monkeypatch.setattr(engine_steps, "run", lambda *_: report)
    monkeypatch.setattr(idle, "run", lambda *_: profile)
    told = CliRunner().invoke(app, ["engine", "--profile"])
    assert told.exit_code == 0, told.output
    said = " ".join(told.stdout.split())
    assert "the GPU idles 3.12% of them, at most 2% should be: missed." in said
    assert "128 launches of a step, 90 us together, in the mean of 20 steps" in said
    assert "8.40 ms while it is traced, and 8.20 else" in said
    told = CliRunner().invoke(app, ["engine", "--profile", "--json"])
    assert json.loads(told.stdout)["profile"]["idle"] == 0.0312
    told = CliRunner().invoke(app, ["engine", "--json"])
    assert "profile" not in json.loads(told.stdout)


@pytest.mark.ci
def test_an_engine_is_traced():
    load = idle.Load(rows=8, prompt=4, steps=6, profiled=3, spare=60)
    found = idle.run(1, lambda text: None, load)
    assert 1 <= found.steps <= 12 and 1 <= found.profiled <= 9
    assert found.step_ms > 0 < found.untraced_ms
    if jax.default_backend() != "gpu":
        assert found.idle is None and found.is_met is None and found.kernels == ()
