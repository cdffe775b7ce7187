"""`jax-lora serve --eight-bits`: the option reaches the model that is served."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jax_lora.adapters import peft_header
from jax_lora.cli import app
from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.llama import Llama
from jax_lora.serving.server import run
from jax_lora.serving.text import bank_for


def test_the_option_reaches_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[run.Model] = []

    def load(model: run.Model, told: Any) -> None:
        asked.append(model)
        raise ValueError("enough")

    monkeypatch.setattr(run, "load", load)
    folders = ["--base", str(FOLDER / "base"), "--adapters", str(tmp_path)]
    given = [None, "int8", "float8_e4m3fn"]
    for dtype in given:
        options = ["--eight-bits", dtype] if dtype else []
        result = CliRunner().invoke(app, ["serve", *folders, "--port", "0", *options])
        assert "enough" in result.stderr
    assert [model.eight_bits for model in asked] == given


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_its_bank_has_stacks_in_8_bits(dtype: str) -> None:
    model = Llama.from_pretrained(FOLDER / "base", dtype=jnp.bfloat16, scan=False)
    path = adapter_paths()["upper"]
    bank = bank_for(model, [peft_header(path)], {8: 1}, dtype=dtype)
    error = bank.load("upper", path)
    assert error is not None and error < 0.1
