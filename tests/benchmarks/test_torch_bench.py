"""`python -m benchmarks torch` on a CPU: the same table; what needs a GPU is named."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import tables
from benchmarks import torch_calls as bench
from benchmarks.__main__ import app

OPS = ("bgmv_shrink", "bgmv_expand", "add_lora")
ROWS = [
    *((op, path) for op in OPS for path in ("native", "dlpack", "public")),
    ("y.add_(x)", "torch"),
]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.slow
def test_the_command_times_every_op_and_path(on_cpu):
    result = CliRunner().invoke(app, ["torch", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert list(report) == ["device", "date", "jax", "torch", "shape", "rows"]
    assert report["device"] == "cpu"
    assert [(row["op"], row["path"]) for row in report["rows"]] == ROWS
    for row in report["rows"]:
        assert list(row) == ["op", "path", "host", "host_median", "device", "note"]
        assert row["device"] is None
        if row["path"] == "native":
            assert row["host"] is row["host_median"] is None
            assert row["note"] == "path='native' needs CUDA tensors, got cpu"
        else:
            assert 0 < row["host"] <= row["host_median"]
            assert row["note"] is None


def test_all_take_turns_and_the_best_and_the_median_are_of_all_turns(monkeypatch, on_cpu):
    turns = []

    def call_of(op, path, device):
        def call():
            if path == "native":
                raise NotImplementedError("no")
            return op, path

        return call

    def host_us(call):
        turns.append(call())
        turn, place = divmod(len(turns) - 1, 7)
        return [100.0 * place + t for t in ([9, 8, 7], [1], [6, 90])[turn]]

    monkeypatch.setattr(bench, "_call", call_of)
    monkeypatch.setattr(bench, "_host_us", host_us)
    monkeypatch.setattr(bench, "_TURNS", 3)
    rows = bench.run().rows
    able = [(op, path) for op, path in ROWS if path != "native"]
    assert turns == able * 3
    hosts = {(row.op, row.path): (row.host, row.host_median) for row in rows}
    assert [hosts[key] for key in able] == [(100 * n + 1, 100 * n + 7.5) for n in range(7)]
    assert {hosts[op, "native"] for op in OPS} == {(None, None)}


def test_the_yardstick_is_torchs_addition_in_place():
    call = bench._call("y.add_(x)", "torch", torch.device("cpu"))
    y = call()
    before = y.clone()
    assert y.shape == (64, 4096) and y.dtype == torch.bfloat16
    assert call() is y
    assert not torch.equal(y, before)


def test_a_turn_measures_at_least_one_run_and_until_its_time_is_over(monkeypatch, on_cpu):
    now, calls = [0.0], []

    def call():
        calls.append(None)
        now[0] += 2e-6 if len(calls) <= 10 else 5e-6

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "_SECONDS", 0)
    assert bench._host_us(call) == pytest.approx([2])
    monkeypatch.setattr(bench, "_SECONDS", 120e-6)
    assert bench._host_us(call) == pytest.approx([5, 5, 5])


def test_the_table(capsys):
    rows = [
        bench.Row("bgmv_shrink", "native", None, None, None, "not here"),
        bench.Row("bgmv_expand", "native", None, None, None, "not here"),
        bench.Row("add_lora", "public", 563.04, 12345.67, 5.71, None),
        bench.Row("y.add_(x)", "torch", 5.7, 7.4, None, None),
    ]
    tables.print_torch(bench.Report("a GPU", "2026-01-02", "1", "2", "64 tokens", rows))
    assert capsys.readouterr().out == (
        "64 tokens; microseconds per call\n"
        "op           path       host best host median   device\n"
        "bgmv_shrink  native             -           -        -\n"
        "bgmv_expand  native             -           -        -\n"
        "add_lora     public         563.0     12345.7      5.7\n"
        "y.add_(x)    torch            5.7         7.4        -\n"
        "not here\n"
        "a GPU, 2026-01-02, jax 1, torch 2\n"
    )


def test_without_torch_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["torch"])
    assert result.exit_code == 2
    assert "this benchmark needs PyTorch: pip install torch" in result.stderr
