"""`jax-lora serve --reserve`: what it takes, and the slots that come of it."""

import shutil
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from jax_lora.cli import app
from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.llama import Llama
from jax_lora.serving.server import run
from jax_lora.serving.server.reserve import Reserve
from jax_lora.serving.server.slots import planned_slots

BASE = str(FOLDER / "base")
RANKS = [4, 8, 12]  # of `folder`


@pytest.fixture
def folder(tmp_path):
    for name in ("upper", "reverse", "rot13"):
        shutil.copytree(adapter_paths()[name], tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("acme-=2", ("acme-", 2, None)),
        ("acme-=2:16", ("acme-", 2, 16)),
        ("a=b=3", ("a=b", 3, None)),
        ("a:1=3:8", ("a:1", 3, 8)),
    ],
)
def test_an_option_names_a_prefix_and_slots(option, meant):
    assert Reserve.parsed(option) == meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["acme"], "--reserve takes PREFIX=SLOTS or PREFIX=SLOTS:RANK, such as acme-=2 or"),
        (["=2"], "acme-=2:16, got '=2'"),
        (["acme-=0"], "acme-=2:16, got 'acme-=0'"),
        (["acme-=-1"], "got 'acme-=-1'"),
        (["acme-=2:"], "got 'acme-=2:'"),
        (["acme-=²"], "got 'acme-=²'"),
        (
            ["acme-=2:999"],
            "--reserve 'acme-' is for rank 999, but the server takes ranks up to 16;",
        ),
        (["acme-=3"], "keeps 3 slots of bucket 8, and with --slots 3 none is left for other"),
        (["acme-=2", "b=1:16"], "keeps 3 slots of bucket 16, and with --slots 3 none is left"),
        (["acme-=1", "acme-=1:16"], "two --reserve options keep slots of bucket 16 for 'acme-'"),
        (["acme-=1", "acme-fr=1"], "take prefixes of which none begins with another"),
        (["a/b=1"], "an adapter's name must be 1 to 255 characters without '/'"),
    ],
)
def test_what_can_not_be_is_told_before_the_model_is_read(options, message, folder, monkeypatch):
    monkeypatch.setattr(Llama, "from_pretrained", lambda *_, **__: pytest.fail("it is read"))
    reserve = [part for option in options for part in ("--reserve", option)]
    where = ["--base", BASE, "--adapters", str(folder), "--port", "0", "--slots", "3"]
    result = CliRunner().invoke(app, ["serve", *where, *reserve])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_it_needs_adapters():
    result = CliRunner().invoke(app, ["serve", "--base", BASE, "--reserve", "acme-=1"])
    assert result.exit_code == 2 and "give --adapters, too" in " ".join(result.stderr.split())


def test_what_is_kept_comes_on_top_of_what_there_is():
    def planned(*options, most=4, max_rank=None):
        return planned_slots(RANKS, most, max_rank, map(Reserve.parsed, options))

    assert planned() == ({8: 2, 16: 4}, {})
    assert planned("a=1") == ({8: 3, 16: 4}, {"a": {8: 1, 16: 1}})
    assert planned("a=1:3", "b=2:9") == ({8: 3, 16: 4}, {"a": {8: 1}, "b": {16: 2}})
    assert planned("a=2", "b=1") == ({8: 4, 16: 4}, {"a": {8: 2, 16: 2}, "b": {8: 1, 16: 1}})
    assert planned("a=1:20", max_rank=40) == ({8: 2, 16: 1, 48: 4}, {"a": {48: 1}})


def test_the_bank_of_the_server_keeps_them(folder, monkeypatch):
    engine = SimpleNamespace(warmup=lambda: None)
    made = []
    monkeypatch.setattr(run, "Engine", lambda _, bank, *__, **___: made.append(bank) or engine)
    sizes = run.Sizes(slots=2, reserve=(Reserve("acme-", 1, 16),))
    run.load(run.Model(BASE, adapters=folder, sizes=sizes), lambda text: None)
    [bank] = made
    assert bank.reservations == {"acme-": {16: 1}}
    assert {bucket: use.reserved for bucket, use in bank.usage().items()} == {8: 0, 16: 1}
