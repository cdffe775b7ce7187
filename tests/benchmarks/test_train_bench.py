"""The benchmark of a training step, without a GPU."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from benchmarks import step, train
from benchmarks.__main__ import app

SMALL = train.Shape(step.SMALL, 16)


@pytest.fixture(scope="module")
def base():
    return step.random_model(step.Shape(step.SMALL, 8, 1, 8))


@pytest.mark.slow
def test_the_command_times_what_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    options = ["--layers", "1", "--tokens", "16", "--ways", "frozen,ragged,one"]
    options += ["--save", str(file)]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    assert "publish takes the host" in result.output
    report = json.loads(file.read_text())
    assert [row["way"] for row in report["rows"]] == ["frozen", "ragged", "one"]
    assert all(row["ms"] > 0 and row["peak"] > 0 for row in report["rows"])
    frozen, ragged, one = report["rows"]
    assert (frozen["ratio"], frozen["adapters"], frozen["optimizer"]) == (1, 0, 0)
    hidden, inner, keys = 64, 128, 32
    per_rank = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner)
    assert ragged["adapters"] == 8 * one["adapters"]
    assert one["adapters"] == 4 * 16 * per_rank
    assert 2 * ragged["adapters"] <= ragged["optimizer"] < 2 * ragged["adapters"] + 100


@pytest.mark.slow
def test_ragged_dot_and_ours_train_alike(base) -> None:
    """By the same adapters, so that both time the same work."""
    ours, ragged = (train.Step(way, SMALL, base) for way in ("adapters", "ragged"))
    stacks = {path: leaf[...] for path, leaf in nnx.to_flat_state(ours.masters)}

    def same(path: tuple[str, ...]) -> jax.Array:
        half = np.swapaxes(stacks[*path[:-1], "stacks", 0, f"lora_{path[-1]}"], -1, -2)
        return half * {"a": 1, "b": 2}[path[-1]]  # the scale is 2

    flat = nnx.to_flat_state(ragged.masters)
    ragged.masters = nnx.from_flat_state([(path, v.replace(same(path))) for path, v in flat])
    losses = [float(one.lower().compile()(*one._arguments)[2]) for one in (ours, ragged)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    without = train.Step("one", SMALL, base)
    without.masters = jax.tree.map(np.zeros_like, without.masters)
    loss = float(without.lower().compile()(*without._arguments)[2])
    assert abs(loss - losses[0]) > 0.02


@pytest.mark.slow
def test_the_step_lowers_for_a_gpu_with_kernels(base) -> None:
    text = train.Step("adapters", train.Shape(step.SMALL, 512), base).lower("cuda").as_text()
    assert "mosaic_gpu" in text


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="tokens must be a positive multiple of 8, got 12"):
        train.Shape(step.SMALL, 12)
    with pytest.raises(
        ValueError, match="ways are frozen, adapters, mixed, exact, ragged, one, got all"
    ):
        train.run(SMALL, ["all"], lambda _: None)
    with pytest.raises(ValueError, match="a profile needs a GPU"):
        train.run(SMALL, [], lambda _: None, profile=True)


def test_the_products_of_llama_3_8b() -> None:
    shape = train.Shape(step.LLAMA_3_8B, 8192)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    assert shape.product_flops == 6 * 8192 * weights
