"""`jax-lora bench torch` on a CPU: the same table, with what needs a GPU left out and named."""

import json
import sys

import pytest
from typer.testing import CliRunner

from interop import bench
from jax_lora import cli

OPS = ("bgmv_shrink", "bgmv_expand", "add_lora")
ROWS = [
    *((op, path) for op in OPS for path in ("native", "dlpack", "public")),
    ("y.add_(x)", "torch"),
]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)


def test_the_command_times_every_op_and_path(capfd):
    result = CliRunner().invoke(cli.app, ["bench", "torch", "--json"])
    assert result.exit_code == 0
    report = json.loads(capfd.readouterr().out)
    assert list(report) == ["device", "date", "jax", "torch", "rows"]
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
    rows = bench.run()["rows"]
    able = [(op, path) for op, path in ROWS if path != "native"]
    assert turns == able * 3
    hosts = {(row["op"], row["path"]): (row["host"], row["host_median"]) for row in rows}
    assert [hosts[key] for key in able] == [(100 * n + 1, 100 * n + 7.5) for n in range(7)]
    assert {hosts[op, "native"] for op in OPS} == {(None, None)}


def test_the_yardstick_is_torchs_addition_in_place():
    call = bench._call("y.add_(x)", "torch", bench.torch.device("cpu"))
    y = call()
    before = y.clone()
    assert y.shape == (64, 4096) and y.dtype == bench.torch.bfloat16
    assert call() is y
    assert not bench.torch.equal(y, before)


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


def test_the_table(monkeypatch, capsys):
    def row(op, path, *times, note=None):
        host, host_median, device = times
        return dict(op=op, path=path, host=host, host_median=host_median, device=device, note=note)

    rows = [
        row("bgmv_shrink", "native", None, None, None, note="not here"),
        row("bgmv_expand", "native", None, None, None, note="not here"),
        row("add_lora", "public", 563.04, 12345.67, 5.71),
        row("y.add_(x)", "torch", 5.7, 7.4, None),
    ]
    versions = dict(device="a GPU", date="2026-01-02", jax="1", torch="2")
    monkeypatch.setattr(bench, "run", lambda: dict(**versions, rows=rows))
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench.main()
    assert capsys.readouterr().out == (
        "T=64 D=8 r=16 H=N=4096, bfloat16; microseconds per call\n"
        "op           path       host best host median   device\n"
        "bgmv_shrink  native             -           -        -\n"
        "bgmv_expand  native             -           -        -\n"
        "add_lora     public         563.0     12345.7      5.7\n"
        "y.add_(x)    torch            5.7         7.4        -\n"
        "not here\n"
        "a GPU, 2026-01-02, jax 1, torch 2\n"
    )


def test_without_torch_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["bench", "torch"])
    assert result.exit_code == 2
    assert "bench torch needs PyTorch: pip install 'jax-lora[torch]'" in result.output
