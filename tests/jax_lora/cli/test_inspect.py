"""`jax-lora inspect` of folders that hold many adapters."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file
from tiny import make_adapter, make_bank
from typer.testing import CliRunner

from jax_lora import Adapter, FullModule, TrainedTokens, save_peft
from jax_lora.cli import app


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def save(path: Path, rank: int) -> Path:
    save_peft(make_adapter(0, rank), path)
    return path


def test_inspect_reports_each_folder_below_and_the_bad_ones_in_their_place(tmp_path: Path) -> None:
    save(tmp_path / "a", 4)
    save(tmp_path / "a" / "checkpoint-5", 8)
    broken = save(tmp_path / "b" / "broken", 4)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    dora = save(tmp_path / "b" / "dora", 4)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (tmp_path / "b" / "mlx").mkdir()
    (tmp_path / "b" / "mlx" / "adapters.safetensors").write_bytes(b"")
    save(tmp_path / "c", 16)
    save(tmp_path / ".trash", 16)
    (tmp_path / "docs").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    result = run("inspect", "--json", tmp_path, tmp_path / "none")
    assert result.exit_code == 2
    assert "4 of 7 adapters can't be read" in result.stderr
    reports = json.loads(result.stdout)["adapters"]
    right = ["a", "a/checkpoint-5", "b/broken", "b/dora", "b/mlx", "c", "none"]
    assert [Path(r["path"]).relative_to(tmp_path).as_posix() for r in reports] == right
    reasons = {Path(r["path"]).name: r["error"] for r in reports if "error" in r}
    assert reasons.keys() == {"broken", "dora", "mlx", "none"}
    for name, reason in {
        "broken": "is truncated or not a safetensors file",
        "dora": "down has no magnitude, but the config says DoRA",
        "mlx": "is an adapter of mlx-lm; `jax-lora convert",
        "none": "no folder",
    }.items():
        assert reason in reasons[name]
    assert [r["rank"] for r in reports if "rank" in r] == [4, 8, 16]
    text = run("inspect", tmp_path)
    assert text.exit_code == 2
    places = [text.stdout.index(f"/{name}: ") for name in right[:-1]]
    assert places == sorted(places)
    assert text.stdout.count("can't be read: ") == 3 and text.stdout.count("up x1") == 3


def test_inspect_walks_a_bounded_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_lora import inspection

    monkeypatch.setattr(inspection, "MAX_FOLDERS", 3)
    save(tmp_path / "a", 4)
    save(tmp_path / "b", 4)
    assert run("inspect", tmp_path).exit_code == 0
    save(tmp_path / "c", 4)
    result = run("inspect", tmp_path)
    assert result.exit_code == 2 and "holds more than 3 folders" in result.stderr


def test_inspect_tells_what_each_device_of_a_mesh_holds(tmp_path: Path) -> None:
    features = {"layers.0.q_proj": (64, 128), "layers.0.o_proj": (128, 64)}
    save_peft(make_adapter(0, 20, features=features), tmp_path)
    result = run("inspect", "--json", "--mesh", "tp=8", tmp_path)
    assert result.exit_code == 0, result.output
    [report] = json.loads(result.stdout)["adapters"]
    whole = 4 * 32 * ((64 + 128 / 8) + (128 / 8 + 64))
    wholly = 4 * 64 * 2 * (64 + 128) / 8
    assert report["mesh"] == [
        f"each of 8 devices holds {whole / 1e6:.2f} MB, in bucket 32",
        f"each of 8 devices with fully_sharded {wholly / 1e6:.2f} MB, in bucket 64",
    ]
    assert "Mesh: each of 8 devices" in run("inspect", "--mesh", "tp=8", tmp_path).stdout
    assert (
        "--mesh takes tp=N, such as tp=2, got 'dp=2'"
        in run("inspect", "--mesh", "dp=2", ".").stderr
    )


def test_inspect_shows_embeddings_and_whole_weights(tmp_path: Path) -> None:
    own = make_adapter(0, 4, features={"up": (4, 6), "embed": (9, 4)}, embeddings=("embed",))
    score = FullModule(np.ones((3, 500), np.float32), np.ones(3, np.float32))
    tokens = {"wte": TrainedTokens((3, 1), np.ones((2, 4), np.float32))}
    save_peft(Adapter(own.config, own.modules, {"score": score}, tokens), tmp_path)
    [report] = json.loads(run("inspect", "--json", tmp_path).stdout)["adapters"]
    assert report["full"] == [
        {"name": "score", "is_tokens": False, "shape": [3, 500], "has_bias": True, "nbytes": 6012},
        {"name": "wte", "is_tokens": True, "shape": [2, 4], "has_bias": False, "nbytes": 32},
    ]
    assert {m["name"]: m["is_embedding"] for m in report["modules"]} == {"up": False, "embed": True}
    assert report["nbytes"] == 4 * (4 * 10 + 4 * 13 + 1503 + 8)
    text = run("inspect", tmp_path).stdout
    assert "embed (embedding) x1" in text
    assert "Whole: score, 3 x 500 and bias, 0.01 MB, takes a full slot" in text
    assert "Tokens: wte, 2 x 4, 0.00 MB, takes a full slot" in text


def test_inspect_says_how_far_8_bits_are(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 8)
    result = run("inspect", "--eight-bits", "--json", folder)
    reports = json.loads(result.stdout)["adapters"][0]["eight_bits"]
    assert reports.keys() == {"int8", "float8_e4m3fn"}
    text = run("inspect", "--eight-bits", folder).stdout
    for dtype, report in reports.items():
        _, bank = make_bank(dtype=dtype)
        error = bank.load("a", folder)
        assert report["largest"] == max(report["errors"].values()) == error
        assert report["errors"].keys() == {"up", "down"} and report["is_taken"]
        line = f"8 bits: {dtype} changes what {report['module']} adds by {error:.1%}, others less"
        assert line in text
    assert json.loads(run("inspect", "--json", folder).stdout)["adapters"][0]["eight_bits"] is None
    weights = folder / "adapter_model.safetensors"
    copy = {"base_model.model.lm_head.base_layer.weight": np.ones((9, 4), np.float32)}
    save_file(load_file(weights) | copy, weights)
    assert run("inspect", "--eight-bits", folder).stdout == text  # of the base, so none to round
    save_peft(make_adapter(0, 4, features={"wte": (9, 4)}, embeddings=("wte",)), tmp_path / "b")
    text = run("inspect", "--eight-bits", tmp_path / "b").stdout
    assert "8 bits: int8 holds no embedding, and there is no other module" in text
