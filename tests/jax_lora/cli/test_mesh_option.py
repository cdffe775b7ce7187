"""`jax-lora generate --mesh`: the devices of a CPU answer what one does."""

import json
from pathlib import Path

import jax
import pytest
from click.testing import Result
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from typer.testing import CliRunner

from jax_lora.cli import app
from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.llama import Llama

BASE, ADAPTERS = str(FOLDER / "base"), adapter_paths()


def generate(mesh: str, *args: str) -> Result:
    return CliRunner().invoke(app, ["generate", "--base", BASE, "--mesh", mesh, *args])


@pytest.mark.ci
def test_two_devices_answer_what_one_does() -> None:
    options = ["--adapter", f"u={ADAPTERS['upper']}", "--adapter", f"r={ADAPTERS['rot13']}"]
    options += ["--prompt", "u:window:", "--prompt", ":window:", "--prompt", "r:window:"]
    result = generate("tp=2", *options, "--max-new-tokens", "12", "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)["completions"]
    assert [answer["text"] for answer in answers] == ["WINDOW", "window", "jvaqbj"]


@pytest.mark.slow
def test_two_devices_answer_a_file_of_requests(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    asked = [{"prompt": "window:", "adapter": name, "max_tokens": 12} for name in ("u", "r")]
    file.write_text("".join(f"{json.dumps(one)}\n" for one in asked))
    options = ["--adapter", f"u={ADAPTERS['upper']}", "--adapter", f"r={ADAPTERS['rot13']}"]
    result = generate("tp=2", *options, "--requests", str(file))
    assert result.exit_code == 0, result.output
    lines = map(json.loads, (tmp_path / "r.jsonl.answers").read_text().splitlines())
    assert {line["adapter"]: line["text"] for line in lines} == {"u": "WINDOW", "r": "jvaqbj"}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tp=99", "--mesh tp=99 asks for 99 devices, but JAX has"),
        ("tp=4", "num_key_value_heads=2 does not divide over tp=4"),
        ("tp=0", "--mesh takes tp=N, such as tp=2, got 'tp=0'"),
        ("2", "--mesh takes tp=N, such as tp=2, got '2'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh: str, message: str) -> None:
    result = generate(mesh, "--prompt", ":x")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_model_is_read_onto_the_mesh_that_is_set() -> None:
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = Llama.from_pretrained(Path(BASE))
    specs = {
        path[-2:]: v.get_value().sharding.spec for path, v in nnx.to_flat_state(nnx.state(model))
    }
    assert specs["q_proj", "kernel"] == specs["up_proj", "kernel"] == P(None, None, "tp")
    assert specs["o_proj", "kernel"] == specs["down_proj", "kernel"] == P(None, "tp", None)
    assert specs["lm_head", "kernel"] == P(None, "tp")
    assert not any(specs["embed_tokens", "embedding"])
