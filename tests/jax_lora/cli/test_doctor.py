"""`jax-lora doctor`, `--version`, completion, and what the commands wait for."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import Result
from typer.testing import CliRunner

from jax_lora.cli import app, doctor
from jax_lora.demo.job import adapter_paths
from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import chip

ROOT = Path(__file__).parents[3]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def found(status: int) -> Any:
    result = run("doctor", "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "no driver")


@pytest.mark.parametrize(
    ("args", "not_loaded"),
    [
        (["--help"], {"jax", "jaxlib", "numpy", "flax", "torch"}),
        (["generate", "--help"], {"jax", "jaxlib", "numpy", "flax", "torch"}),
        (["inspect", str(adapter_paths()["upper"])], {"jax", "jaxlib", "flax", "torch"}),
    ],
)
def test_commands_import_what_they_need(args: list[str], not_loaded: set[str]) -> None:
    code = (
        "import sys; from jax_lora.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print('loaded:', *sys.modules)"
    )
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = {*done.stdout.rpartition("loaded: ")[2].split()}
    assert "jax_lora.cli" in loaded
    assert not loaded & not_loaded


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"jax-lora {metadata.version('jax-lora')}\n")


def test_completion_is_offered() -> None:
    assert "--install-completion" in run("--help").stdout


def test_doctor_on_a_cpu() -> None:
    report = found(0)
    assert report["backend"] == "cpu" and report["capability"] is None
    assert report["problems"] == [] and 0 < report["error"] < 5e-3
    assert report["versions"]["jax"] == metadata.version("jax")
    assert [form["weights"] for form in report["forms"]] == ["bfloat16", "float16", "float32"]
    assert {(form["runs_as"], form["why"]) for form in report["forms"]} == {
        ("XLA", "JAX has no GPU here")
    }
    assert report["programs"] == jax.config.jax_compilation_cache_dir  # the tests have set it
    text = run("doctor").stdout
    assert "Nothing to mend." in text
    assert re.search(r"bfloat16 +XLA +JAX has no GPU here", text)


def test_doctor_on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: chip.CAPABILITY)
    forms = {form["weights"]: form for form in found(0)["forms"]}
    assert forms["bfloat16"]["runs_as"] == forms["float16"]["runs_as"] == "kernels"
    assert forms["float32"]["runs_as"] == "XLA"
    assert "lack float32 weights" in forms["float32"]["why"]


def test_doctor_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: "8.0")
    monkeypatch.setattr(dispatch, "warn_other_gpu", lambda capability: None)
    for form in found(0)["forms"]:
        assert form["runs_as"] == "XLA"
        assert form["why"] == "the GPU has compute capability 8.0; the kernels need 9.0"


@pytest.mark.parametrize(
    ("platforms", "mend"),
    [("", "pip install 'jax-lora[cuda13]'"), ("cpu", "JAX_PLATFORMS=cpu keeps JAX from it")],
)
def test_a_gpu_that_jax_does_not_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platforms: str, mend: str
) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    [problem] = found(1)["problems"]
    assert problem.startswith("this machine has an NVIDIA GPU, but") and mend in problem
    result = run("doctor")
    assert result.exit_code == 1
    assert f"to mend: {problem}" in result.stdout and "Nothing to mend" not in result.stdout


def test_kernels_that_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "1")
    monkeypatch.setattr(dispatch, "warn_loop", lambda: None)
    report = found(1)
    assert {form["runs_as"] for form in report["forms"]} == {"loop"}
    assert report["problems"] == [
        "LoRA is slow: JAX_LORA_DISABLE_KERNELS=1 is set; unset it for speed"
    ]


def test_a_setting_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "2")
    report = found(1)
    assert report["problems"] == [
        "a small batch fails: JAX_LORA_DISABLE_KERNELS must be 0 or 1, got '2'"
    ]
    assert report["backend"] == "cpu" and report["error"] is None


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (AssertionError(), "there is no such backend"),  # as JAX fails without its CUDA plugin
        (
            RuntimeError("Unable to initialize\n backend 'tpu'"),
            "Unable to initialize backend 'tpu'",
        ),
    ],
)
def test_a_backend_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    def fail() -> None:
        raise failure

    monkeypatch.setattr("jax.devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    mend = "unset JAX_PLATFORMS=cuda, or install jax-lora[cuda13] for a GPU"
    sentence = f"JAX can't start: {reason}; {mend}"
    report = found(1)
    assert report["problems"] == [sentence] and report["backend"] is None
    for command in (["demo"], ["generate", "--base", "base", "--prompt", ":a"]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"error: {sentence}" in result.stderr


def test_a_full_memory_is_an_error_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_lora import generation

    def complete(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(generation, "complete", complete)
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes"
    result = run("generate", "--base", "base", "--prompt", ":a")
    assert result.exit_code == 2
    assert "the device's memory is full: give --dtype bfloat16" in result.stderr
    assert message in result.stderr
    message = "anything else"
    result = run("generate", "--base", "base", "--prompt", ":a")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


def test_a_place_that_holds_no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(doctor, "place_of_programs", lambda: file / "programs")
    [problem] = found(1)["problems"]
    assert str(file / "programs") in problem and "JAX_COMPILATION_CACHE_DIR" in problem


def test_a_batch_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_error_of_a_batch", lambda: float("nan"))
    [problem] = found(1)["problems"]
    assert "a small batch is wrong by nan" in problem
