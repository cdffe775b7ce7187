"""`jax-lora generate` and `inspect`, as a user calls them; `demo` is in test_demo.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from jax_lora import Adapter, LoRAConfig, LoRAWeights, save_peft
from jax_lora.cli import app
from jax_lora.demo.job import FOLDER, adapter_paths

BASE, ADAPTERS = str(FOLDER / "base"), adapter_paths()


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def save(path: Path, rank: int, **config: Any) -> Path:
    options = LoRAConfig(rank, 2.0 * rank, **config)
    modules = {
        f"layers.{n}.{name}": LoRAWeights(
            np.zeros((options.rank_of(name), 8), np.float32),
            np.zeros((16, options.rank_of(name)), np.float32),
            options.scale_of(name),
        )
        for n in range(3)
        for name in ("q_proj", "v_proj")
    }
    save_peft(Adapter(options, modules), path)
    return path


@pytest.mark.ci
def test_generate_answers_each_prompt_with_its_adapter() -> None:
    command = ["generate", "--base", BASE, "--max-new-tokens", 12]
    command += ["--adapter", f"u={ADAPTERS['upper']}", "--adapter", f"r={ADAPTERS['rot13']}"]
    command += ["--prompt", "u:window:", "--prompt", ":window:", "--prompt", "r:window:"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["completions"] == [
        {"adapter": "u", "prompt": "window:", "text": "WINDOW"},
        {"adapter": None, "prompt": "window:", "text": "window"},
        {"adapter": "r", "prompt": "window:", "text": "jvaqbj"},
    ]


def test_generate_prints_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_lora import generation

    texts = "\\[x^2\\]", "[/]", "a\\\\", "[bold]"
    found = [generation.Completion("a\\", "p\\", text) for text in texts]
    monkeypatch.setattr(generation, "complete", lambda *_, **__: found)
    result = run("generate", "--base", BASE, "--prompt", ":p")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"a\\: p\\{text}" for text in texts]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ":a", "--adapter", "x=/no/\\[/x]"], "no folder '/no/\\\\[/x]'"),
        (["--prompt", "x:hello"], "no --adapter is called 'x'; there are none"),
        (
            ["--prompt", "hello"],
            "--prompt NAME:text is the form, got 'hello'; to ask the base model, write ':hello'",
        ),
        (["--prompt", ":a", "--adapter", "x"], "--adapter NAME=DIR is the form, got 'x'"),
        (["--prompt", ":a", "--adapter", "x=1", "--adapter", "x=2"], "have the same name"),
        (["--prompt", ":a", "--adapter", "x=/no/such"], "no folder '/no/such'"),
        (["--prompt", ":a", "--base", "/no/such"], "there is no folder '/no/such'; give one, or"),
    ],
)
def test_generate_says_what_is_wrong_with_its_input(args: list[str], message: str) -> None:
    result = run("generate", "--base", BASE, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_inspect_describes_the_bundled_adapters() -> None:
    result = run("inspect", "--json", *ADAPTERS.values())
    assert result.exit_code == 0, result.output
    reports = {Path(r["path"]).name: r for r in json.loads(result.stdout)["adapters"]}
    assert reports.keys() == ADAPTERS.keys()
    alternate = reports["alternate"]["modules"][0]
    assert (alternate["rank"], alternate["scale"], alternate["bucket"]) == (160, 0.5, 160)
    assert (alternate["decode_kernel"], alternate["prefill_kernel"]) == ("sgmv", "sgmv")
    by_kind = {m["name"]: m for m in reports["consonants"]["modules"]}
    down = by_kind["model.layers.0.mlp.down_proj"]
    assert (down["rank"], down["scale"], down["bucket"], down["padding"]) == (40, 0.5, 64, 0.375)
    assert by_kind["model.layers.3.self_attn.v_proj"]["tier"] == "loop"
    for report in reports.values():
        assert report["nbytes"] == sum(m["nbytes"] for m in report["modules"])


@pytest.mark.parametrize(
    ("rank", "config", "expected"),
    [
        (4, {}, ["replays decode steps", "padded to 8: train with 8"]),
        (16, {}, ["replays decode steps", "nothing to change: rank 16 fills its bucket"]),
        (48, {}, ["no compiled kernel for padded rank 48", "padded to 64: train with 64"]),
        (128, {}, ["does not replay decode steps", "train with rank 64 or 32"]),
        (160, {}, ["above its BGMV limit of 128", "a bucket of 160"]),
        (8, {"rank_pattern": {"q_proj": 32}}, ["by one rank", "all modules share bucket 32"]),
    ],
)
def test_inspect_says_what_lorax_would_do_and_what_to_change(
    tmp_path: Path, rank: int, config: dict[str, Any], expected: list[str]
) -> None:
    result = run("inspect", save(tmp_path / "adapter", rank, **config))
    assert result.exit_code == 0, result.output
    for text in expected:
        assert text in result.stdout
    assert "q_proj x3" in result.stdout


def test_inspect_of_no_adapter_is_an_error(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stdout
    assert "1 of 1 adapters can't be read" in result.stderr


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "generate", "inspect", "convert"):
        assert command in result.stdout
    assert "bench" not in result.stdout


@pytest.mark.parametrize("args", [(), ("--help",), ("step", "--profile"), ("--peers", ".peers")])
def test_bench_names_the_command_that_replaced_it(args: tuple[str, ...]) -> None:
    result = run("bench", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "clone its repository and run `python -m benchmarks kernels`" in result.stderr


def test_no_escape_code_of_an_upload_reaches_the_terminal(tmp_path: Path) -> None:
    folder = save(tmp_path / "a\x1b[2Jb", 4)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "\\x1b[2Jb" in result.output
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "\x1b[2J\u202e\nAll right.": 1}))
    result = run("inspect", folder)
    assert result.exit_code == 2
    assert not {"\x1b", "\u202e"} & set(result.output)
    assert len(result.output.splitlines()) == 3  # the reason, a blank line, the error


def test_generate_escapes_codes_that_a_model_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_lora import generation

    found = [generation.Completion(None, "p", "a\x1b[2J\u202e\tb\nc")]
    monkeypatch.setattr(generation, "complete", lambda *_, **__: found)
    result = run("generate", "--base", BASE, "--prompt", ":p")
    assert "a\\x1b[2J\\u202e" in result.stdout and "b\nc" in result.stdout


def test_links_out_of_a_folder_need_an_option(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", 4)
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    refused = run("inspect", folder)
    assert refused.exit_code == 2 and "--allow-links" in refused.stdout
    assert run("inspect", folder, "--allow-links").exit_code == 0
    command = ["generate", "--base", BASE, "--prompt", "a:x", "--adapter", f"a={folder}"]
    assert "--allow-links" in run(*command).stderr
    assert "--allow-links" not in run(*command, "--allow-links").stderr


def test_compiled_programs_are_kept_where_help_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import jax

    from jax_lora.cli.programs import keep_programs

    names = "enable_compilation_cache compilation_cache_dir compilation_cache_max_size".split()
    names = [f"jax_{name}" for name in [*names, "persistent_cache_min_compile_time_secs"]]
    of_tests = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_compilation_cache_dir", None)
        before = {name: getattr(jax.config, name) for name in names}
        assert keep_programs() is None
        assert {name: getattr(jax.config, name) for name in names} == before
        jax.config.update("jax_enable_compilation_cache", True)
        assert keep_programs() == tmp_path / "jax-lora" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax-lora" / "programs")
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        assert keep_programs() is None
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        for name, value in of_tests.items():
            jax.config.update(name, value)
    assert "~/.cache/jax-lora/programs" in run("generate", "--help").stdout
