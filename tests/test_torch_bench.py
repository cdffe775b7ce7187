"""`jax-lora bench torch` on a CPU: the same table, with what needs a GPU left out and named."""

import json

from typer.testing import CliRunner

from jax_lora import cli


def test_the_command_times_every_op_and_path(capfd):
    result = CliRunner().invoke(cli.app, ["bench", "torch", "--json"])
    assert result.exit_code == 0
    report = json.loads(capfd.readouterr().out)
    assert report["device"] == "cpu"
    rows = {(row["op"], row["path"]): row for row in report["rows"]}
    assert len(rows) == 9
    for (_, path), row in rows.items():
        assert row["device"] is None
        if path == "native":
            assert row["host"] is None
            assert row["note"] == "path='native' needs CUDA tensors, got cpu"
        else:
            assert row["host"] > 0


def test_without_torch_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["bench", "torch"])
    assert result.exit_code == 2
    assert "bench torch needs PyTorch: pip install 'jax-lora[torch]'" in result.output
