"""`python -m benchmarks mesh` without a GPU: the CPU's devices, targets, the table."""

import json

import jax
import pytest
from typer.testing import CliRunner

from benchmarks import mesh, step, tables
from benchmarks.__main__ import app

SHAPE = step.Shape(mesh.SMALL, 16, 8, 16)


@pytest.mark.slow
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_two_devices_compute_what_one_does(
    fully_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "_adapters", lambda: {"no LoRA": (), "ranks 8, 24": (8, 24)})
    phases = ("decode", "prefill", *["training"] * (not fully_sharded))
    options = ["--gpus", "2", "--layers", "1", "--context", "8", "--prefill", "16", "--json"]
    options += ["--phases", ",".join(phases), *["--fully-sharded"] * fully_sharded]
    result = CliRunner().invoke(app, ["mesh", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    named = [(row["gpus"], row["adapters"], row["phase"]) for row in rows]
    adapters = ("no LoRA", "ranks 8, 24")
    assert named == [(g, name, phase) for g in (1, 2) for phase in phases for name in adapters]
    steps = [row for row in rows if row["phase"] != "training"]
    assert all(row["error"] < 0.05 for row in steps)
    assert all(row["target_us"] is row["exchange_us"] is None for row in rows)
    small = {"all-gather": 1 + 5, "reduce-scatter": 2} if fully_sharded else {"all-gather": 1}
    assert [row["exchanges"] for row in steps[:4]] == [{}] * 4
    assert steps[-1]["exchanges"] == {"all-reduce": 2, **small}


def test_phases_that_are_not_timed_are_refused() -> None:
    for phases, fully_sharded, message in (
        (["decode", "all"], False, "phases are decode, prefill, training, got all"),
        (["training"], True, "--fully-sharded is timed in decode and prefill"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh.run(SHAPE, [1], print, fully_sharded=fully_sharded, phases=phases)


def test_world_sizes_are_those_of_the_devices() -> None:
    assert mesh.world_sizes(None) == [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    assert mesh.world_sizes(3) == [1, 2]
    with pytest.raises(ValueError, match=r"--gpus must lie in 1 to \d+, .* got 99"):
        mesh.world_sizes(99)


def test_a_gpu_holds_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer has 1.71 GB of weights and 0.27 GB of cache; the two vocabularies have 4.2 GB."""

    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 100 * 10**9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert mesh._layers_that_fit(mesh.LLAMA_3_70B, 64 * 1024) == int((70 - 4.2) / 1.98)
    assert mesh._layers_that_fit(mesh.SMALL, 512) == mesh.SMALL.num_hidden_layers


def test_decode_and_prefill_have_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    one_rank, mixed = list(mesh._adapters())[1:]
    assert mesh._target_us(one_rank, 1, 100.0, SHAPE) is None
    monkeypatch.setattr(mesh, "on_gpu", lambda: True)
    found = [
        mesh._target_us(name, n, 100.0, SHAPE) for n in (1, 2, 4) for name in (one_rank, mixed)
    ]
    assert found == pytest.approx([108, 110, 110, 114, 140, 140])


def test_the_table_says_what_is_met_and_missed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        mesh.Row("decode", name, 2, us, 100.0, target_us, {"all-reduce": 2}, 25.0, 1e-3)
        for name, us, target_us in (("a", 105.0, 110.0), ("b", 120.0, 110.0), ("c", 90.0, None))
    ]
    rows.append(mesh.Row("training", "a", 2, 125.0, 100.0, 130.0, None, None, None))
    rows.append(mesh.Row("prefill", "a", 1, 109.0, 100.0, 108.0, {}, None, 1e-3))
    tables.print_mesh(mesh.Report("H200", "2026-01-01", SHAPE, False, rows))
    lines = capsys.readouterr().out.splitlines()
    assert "5.0%" in lines[1] and "10.0%" in lines[1] and "met" in lines[1]
    assert "23.8%, 2 all-reduce" in lines[1]
    assert "20.0%" in lines[2] and "missed" in lines[2]
    assert "met" not in lines[3] and "missed" not in lines[3]
    assert lines[4].split()[-4:] == ["30.0%", "met", "-", "-"]
    assert lines[5].split()[-5:] == ["9.0%", "8.0%", "missed", "none", "1.0e-03"]
    assert lines[6].startswith("H200, 2026-01-01; microseconds of 2 layers; ranks whole.")
