"""README, the site and the notebooks: each block of Python runs, `jax-lora` takes each command
that they show, and the troubleshooting page and the code have the same errors."""

import ast
import functools
import json
import pathlib
import re
import shlex

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import nnx
from safetensors.numpy import save_file
from typer.testing import CliRunner

from jax_lora import Adapter, LoRAConfig, LoRAWeights, cli, save_peft
from jax_lora.demo.job import FOLDER

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCES = re.compile(r"^## ([^\n]*)$|^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language, each with the heading that it stands under."""
    heading, found = "", []
    for title, kind, text in FENCES.findall(PAGES[page]):
        if title:
            heading = title
        elif kind == language:
            found.append((heading, text))
    return found


# --------------------------------------------------------------------------------- blocks of Python


class Net(nnx.Module):
    """The reader's own model."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.q_proj, self.v_proj = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.v_proj(nnx.gelu(self.q_proj(x)))


def step_of(model: Net, cache: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = model(cache[tokens])
    return y, cache + 1


def write_adapters(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for name, rank in (("french", 8), ("legal", 40)):
        config = LoRAConfig(rank, 2.0 * rank)
        modules = {}
        for module in ("q_proj", "v_proj"):
            a, b = (rng.normal(size=s).astype(np.float32) / 64 for s in ((rank, 64), (64, rank)))
            modules[module] = LoRAWeights(a, b, config.scale_of(module))
        save_peft(Adapter(config, modules), folder / name)


def model_and_rows() -> dict[str, object]:
    return {
        "functools": functools,
        "jax": jax,
        "nnx": nnx,
        "model": Net(),
        "base": Net(),  # as it was before `apply_lora`
        "x": np.ones((4, 64), np.float32),
        "target": np.zeros((4, 64), np.float32),
        "model_step": step_of,
        "cache": jnp.ones((9, 64)),
        "tokens": np.arange(4),
    }


def stacks() -> dict[str, object]:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)

    return {
        "x": draw(8, 64), "y": draw(8, 64), "ids": jnp.asarray([0, 3, -1, 1, 2, 0, 3, 1]),
        "lora_a": draw(4, 16, 64), "lora_b": draw(4, 64, 16), "scales": draw(4),
        "a16": draw(4, 16, 64), "b16": draw(4, 64, 16), "scales16": draw(4),
        "a64": draw(2, 64, 64), "b64": draw(2, 64, 64), "scales64": draw(2),
    }  # fmt: skip


def tensors() -> dict[str, object]:
    import torch

    linear = torch.nn.Linear(64, 64)
    ids = torch.tensor([0, 3, -1, 1], dtype=torch.int32)
    a, b = torch.randn(4, 16, 64), torch.randn(4, 64, 16, requires_grad=True)
    return {
        "x": torch.randn(4, 64), "y": torch.randn(4, 64), "buffer": torch.zeros(4, 16),
        "lora_a": a, "lora_b": b, "token_lora_indices": ids, "ids": ids, "scale": 0.5,
        "base": linear, "loss": torch.sum,
    }  # fmt: skip


def bundled() -> dict[str, object]:
    adapters = FOLDER / "adapters"
    return {"base": FOLDER / "base", "adapters": adapters, "upper": adapters / "upper"}


def language_model() -> dict[str, object]:
    pathlib.Path("llama").symlink_to(FOLDER / "base")
    return {}


# What a page takes as given, or from a heading on.
GIVEN = {
    ("README.md", ""): model_and_rows,
    ("README.md", "From PyTorch"): tensors,
    ("docs/index.md", ""): model_and_rows,
    ("docs/guides/loop.md", ""): model_and_rows,
    ("docs/guides/loop.md", "With the ops alone"): stacks,
    ("docs/guides/training.md", ""): model_and_rows,
    ("docs/guides/serving.md", ""): bundled,
    ("docs/scaling.md", ""): language_model,
    ("docs/torch.md", ""): tensors,
}
# `tests/jax_lora/bank/test_processes.py` does what it shows, in several processes.
NOT_RUN = {("docs/scaling.md", "Several hosts")}
# Other projects, of which `tests/peers` runs what it shows.
NOT_RUN |= {
    ("docs/guides/frameworks.md", name)
    for name in ("qwix and Tunix", "Bonsai", "MaxText", "SkyRL-tx", "sglang-jax")
}


@pytest.mark.ci
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_blocks_of_python_run(page: str, tmp_path: pathlib.Path, monkeypatch) -> None:
    write_adapters(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    given = {heading: make for (name, heading), make in GIVEN.items() if name == page}
    with jax.numpy_dtype_promotion("standard"):  # as the reader has it
        for heading, text in [("", ""), *blocks(page, "python")]:
            names |= given.pop(heading, dict)()
            code = compile(text, f"{page}, {heading or 'top'}", "exec")
            if (page, heading) not in NOT_RUN:
                exec(code, names)
    assert not given  # a heading that the page has no more


def test_pages_are_found() -> None:
    """The runner would run nothing if fences were written in another way."""
    assert sum(len(blocks(page, "python")) for page in PAGES) > 15
    assert all(text.count("```") % 2 == 0 for text in PAGES.values())
    languages = {kind for text in PAGES.values() for title, kind, _ in FENCES.findall(text)}
    assert languages <= {"", "python"}


def test_tests_that_pages_name_are_there() -> None:
    pages = PAGES["docs/adapters.md"] + PAGES["docs/scaling.md"]
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", pages))
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there = {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    assert len(named) > 15 and named <= there, sorted(named - there)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_have_pictures_and_end_in_an_assertion(path: pathlib.Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    sources = ["".join(cell["source"]) for cell in cells]
    assert any("plt.show()" in source for source in sources)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(sources[-1])))


# --------------------------------------------------------------------------------- commands, errors


def commands() -> list[str]:
    uv = r"uv run --no-dev (?:--extra \w+ )?"
    shell = re.compile(rf"^(?:.*&& )?(?:{uv})?(jax-lora .*)$", re.MULTILINE)
    texts = [text for page in PAGES for _, text in blocks(page, "")]
    lines = [line for text in texts for line in shell.findall(text.replace("\\\n", " "))]
    return sorted({line.partition("  #")[0].strip() for line in lines})


@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command: str) -> None:
    """The parser takes them; nothing runs."""
    _, *args = shlex.split(command)
    group = typer.main.get_command(cli.app)
    if args == ["--version"]:
        return
    name, found, rest = group.resolve_command(click.Context(group), args)
    assert found is not None
    found.make_context(name, rest).close()


# What else runs of these: `.ci/release` the demo, tests of the server `serve`, and those of meshes
# `--mesh`, which takes several devices.
RUN_ELSEWHERE = re.compile(r"jax-lora (demo|serve|--version|generate .*--mesh)\b")


def write_folders_of_commands() -> None:
    """The model, adapters and requests that the pages name."""
    given = pathlib.Path("llama"), pathlib.Path("french"), pathlib.Path("german")
    names = FOLDER / "base", FOLDER / "adapters/upper", FOLDER / "adapters/reverse"
    for link, folder in zip(given, names):
        link.symlink_to(folder)
    pathlib.Path("adapters").symlink_to(FOLDER / "adapters")
    requests = ({"prompt": "window:", "adapter": name} for name in ("upper", "reverse", None))
    pathlib.Path("requests.jsonl").write_text("".join(json.dumps(r) + "\n" for r in requests))
    mlx = pathlib.Path("mlx/adapters")
    mlx.mkdir(parents=True)
    (mlx / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}})
    )
    layer = "model.layers.0.self_attn.q_proj"
    halves = {"lora_a": np.ones((64, 4), np.float32), "lora_b": np.ones((4, 64), np.float32)}
    save_file({f"{layer}.{half}": t for half, t in halves.items()}, mlx / "adapters.safetensors")


@pytest.mark.ci
@pytest.mark.parametrize("command", [c for c in commands() if not RUN_ELSEWHERE.match(c)])
def test_commands_run(command: str, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folders_of_commands()
    _, *args = shlex.split(command)
    if args[0] == "convert":  # to a new folder
        pathlib.Path("french").unlink()
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    assert result.stdout or args[0] == "generate"


def test_each_option_of_the_command_line_says_what_it_does() -> None:
    shown = [
        (name, option.name, option.help)
        for name, command in typer.main.get_command(cli.app).commands.items()
        for option in command.params
        if name != "bench"  # hidden: it says where the benchmarks are
    ]
    assert len(shown) > 20
    assert not [what for what in shown if not what[-1]]


@functools.cache
def modules() -> dict[pathlib.Path, ast.Module]:
    packages = ("jax_lora", "pallas_kernels", "interop")
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {path: ast.parse(path.read_text()) for path in paths}


def listed() -> list[list[str]]:
    """The parts of each error that the troubleshooting page lists, between its values."""
    cells = re.findall(
        r"^\| (`.*?`) ?(?:\(.*?\) )?\|", PAGES["docs/troubleshooting.md"], re.MULTILINE
    )
    errors = [error.strip("` ") for cell in cells for error in cell.split("<br>")]
    return [[part.strip() for part in error.split("...")] for error in errors]


def test_errors_of_the_troubleshooting_page_are_in_the_code() -> None:
    texts = {
        node.value
        for module in modules().values()
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    errors = listed()
    assert len(errors) > 200
    assert len(set(map(tuple, errors))) == len(errors), "an error stands on the page twice"
    for parts in errors:
        assert all(any(part in text for text in texts) for part in parts), parts


def wording(message: ast.expr) -> str:
    """What a message says, with a space for each value."""
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(wording, parts))
        case ast.BinOp(left=left, right=right):
            return wording(left) + wording(right)
    return " "


def raised() -> dict[str, str]:
    """Where an error or a warning of the user's doing is made, and what it says.

    An `AttributeError` is Python's own protocol, and what the emulator of a GPU refuses is code of
    this project. A message that holds no word here is made elsewhere; the page lists those too.
    """
    said = {}
    for path, module in modules().items():
        for node in ast.walk(module):
            match node:
                case ast.Raise(exc=ast.Call(func=kind, args=[message, *_])):
                    own = ast.unparse(kind) == "AttributeError" or path.name == "emulator.py"
                case ast.Call(func=ast.Attribute(attr="warn"), args=[message, *_]):
                    own = False
                case _:
                    continue
            text = wording(message)
            if not own and re.search(r"[a-z]{4}", text):
                said[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return said


def test_errors_of_the_code_are_on_the_troubleshooting_page() -> None:
    patterns = [re.compile(".*".join(map(re.escape, parts)), re.DOTALL) for parts in listed()]
    errors = raised()
    assert len(errors) > 400
    missing = [
        f"{where}: {text}"
        for where, text in errors.items()
        if not any(pattern.search(text) for pattern in patterns)
    ]
    assert not missing, "\n".join(missing)
