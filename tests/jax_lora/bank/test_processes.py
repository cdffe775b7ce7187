"""Several processes hold a model together: they compute what one does, and load the same."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest
from flax import nnx
from meshes import assert_equal

from jax_lora import Adapter, AdapterBank, LoRAConfig, apply_lora, load_peft
from jax_lora.bank import agreement

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start():
    """Starts processes that know each other. None outlives its test."""
    started = []

    def all_of(act, count, folder):
        started.extend(_started(act, count, folder))
        return started

    yield all_of
    for process in started:
        process.kill()
        process.communicate()


def _started(act, count, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, processes.__file__, act]
    return [
        subprocess.Popen(
            [*command, *map(str, (process, count, port, folder))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def results(started):
    """What each of them printed, parsed."""
    done = [process.communicate(timeout=300) for process in started]
    for process, (_, stderr) in zip(started, done):
        assert process.returncode == 0, stderr[-3000:]
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in done]


@pytest.mark.ci
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(count, start, tmp_path):
    names = results(start("same", count, tmp_path))
    model, bank = processes.model_and_bank()
    want, wanted_names = processes.loads_and_steps(model, bank, None, tmp_path / "one")
    assert names == [wanted_names] * count
    got = [np.load(tmp_path / f"{process}.npz") for process in range(count)]
    for one in got:
        for key in ("first", "second", "gradients"):
            np.testing.assert_allclose(one[key], want[key], 1e-5, 1e-5)
    merged = np.concatenate([one["merged"] for one in got], axis=1)
    np.testing.assert_allclose(merged, want["merged"], 1e-5, 1e-5)
    saved, alone = (load_peft(tmp_path / name).modules for name in ("saved", "one"))
    for name, weights in alone.items():
        np.testing.assert_array_equal(saved[name].a, weights.a)
        np.testing.assert_array_equal(saved[name].b, weights.b)


@pytest.mark.ci
def test_a_load_that_processes_do_not_agree_on_fails_on_all(start, tmp_path):
    first, second = results(start("disagree", 2, tmp_path))
    names, weights, file, save = zip(first[:4], second[:4])
    for errors in (names, weights):
        assert all(
            e.startswith("RuntimeError: process ") and "nothing is changed" in e for e in errors
        )
    assert "load 'b' " in names[0]
    assert "load 'c' " in names[0]
    assert "process 1 failed to load 'b' " in file[0]
    assert "FileNotFoundError: " in file[0]
    assert file[1].startswith("FileNotFoundError")
    assert "process 1 failed to save 'a' " in save[0]
    assert save[1].startswith("KeyError")
    assert first[4:] == second[4:] == ["b", "a"]


@pytest.mark.ci
def test_processes_save_and_restore_a_checkpoint_together(start, tmp_path):
    """What one process saved, too; and one restores what they did."""
    _, bank = processes.filled()
    bank.save_checkpoint(tmp_path / "alone")
    first, second = results(start("checkpoint", 2, tmp_path))
    for found in (first, second):
        for name in ("saved", "alone"):
            names, places, is_reserved = found[name]
            assert names == ["b", "a"] and is_reserved
            assert [(bucket, slot, pinned) for bucket, slot, _, pinned in places] == [
                (8, 1, True),
                (512, 0, False),
            ]
    assert first["saved"] == second["saved"] == first["before"]
    again, other = processes.model_and_bank(buckets=processes.LARGE)
    other.restore_checkpoint(tmp_path / "saved")
    assert processes.places(other) == first["saved"]
    for name in ("b", "a"):
        restored = other._adapter(name).modules
        for module, weights in bank._adapter(name).modules.items():
            np.testing.assert_array_equal(restored[module].a, weights.a)
            np.testing.assert_array_equal(restored[module].b, weights.b)
    for process in range(2):
        y = np.load(tmp_path / f"{process}.npy")
        np.testing.assert_allclose(
            y, processes.rows(again, other, processes.CHECKPOINT), 1e-5, 1e-5
        )

    damaged = r"ValueError: .*is no checkpoint of a bank, or is damaged: "
    told = {
        "own": ["none", r"ValueError: processes \[1\] have the bank, and a checkpoint is written"],
        "there": [r"FileExistsError: \S*saved is there already; give another folder"] * 2,
        "others": [rf"RuntimeError: process {n} is about to save .*nothing is" for n in (0, 1)],
        "missing": [r"FileNotFoundError: there is no folder \S*nowhere"] * 2,
        "names": [damaged] * 2,
        "shards": [damaged] * 2,
        "one of two": ["FileNotFoundError: process 1 failed to restore", "FileNotFoundError: the"],
    }
    for what, patterns in told.items():
        for found, pattern in zip((first, second), patterns):
            assert re.match(pattern, found[what]), (what, found[what])


@pytest.mark.ci
def test_a_llama_of_two_processes_equals_one(start, tmp_path):
    """Logits and the gradients of all stacks, gathered; adapters of ranks 3, 16 and 40."""
    results(start("llama", 2, tmp_path))
    want = processes.of_llama()
    for process in range(2):
        with np.load(tmp_path / f"{process}.npz") as got:
            assert_equal([got[name] for name in got.files], want)


@pytest.mark.ci
@pytest.mark.parametrize(
    "act, count", [pytest.param("die", 4, marks=pytest.mark.slow), ("steps", 2)]
)
def test_a_process_that_is_killed_ends_the_others(act, count, start, tmp_path):
    """With a clear error, within a minute; between two steps, and amid steps."""
    *others, killed = start(act, count, tmp_path)
    if act == "steps":
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("*.ready"))) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        assert all(process.poll() is None for process in others)
        killed.kill()
        assert killed.wait(timeout=10) == -signal.SIGKILL
    else:
        assert killed.wait(timeout=200) == 9
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in others]
    assert time.monotonic() - began < 60
    for process, error in zip(others, errors):
        assert process.returncode != 0
        assert "Connection closed by peer" in error or "another task died" in error


class Service:
    """JAX's coordination service, for threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_delete(self, key):
        del self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


@pytest.fixture
def turns(monkeypatch):
    """What two processes come to: the error of each, or None. Their service has it as `values`."""
    service, of_thread = Service(), threading.local()
    monkeypatch.setattr(agreement, "_client", lambda: service)
    monkeypatch.setattr(jax, "process_index", lambda: of_thread.process)
    devices = [SimpleNamespace(process_index=process) for process in (0, 1)]
    arrays = [SimpleNamespace(sharding=SimpleNamespace(device_set=devices))]
    both = [agreement.Agreement(arrays) for _ in range(2)]
    for one in both:
        one._bank = 0

    def come(*acts):
        errors = [None, None]

        def run(process):
            of_thread.process = process
            try:
                with both[process].turn() as agree:
                    acts[process](agree)
            except (RuntimeError, KeyError, ValueError, OSError) as error:
                errors[process] = f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=run, args=(n,)) for n, act in enumerate(acts) if act]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    come.values = service.values
    return come


def failing(agree, error=KeyError):
    raise error("no\x1b[2J adapter")


def test_processes_agree_or_fail_together(turns, monkeypatch):
    for claim in ("load 'a'", "load 'b'", "load 'c'"):
        assert turns(lambda agree, c=claim: agree(c), lambda agree, c=claim: agree(c)) == [None] * 2
    assert len(turns.values) <= 3  # of the last turn, and what one has not yet forgotten
    first, second = turns(lambda agree: agree("load 'a'"), lambda agree: agree("load 'b'"))
    others = "process {} is about to load '{}', but process {} to load '{}'; nothing is changed"
    assert first == f"RuntimeError: {others.format(0, 'a', 1, 'b')}"
    assert second == f"RuntimeError: {others.format(1, 'b', 0, 'a')}"
    first, second = turns(lambda agree: agree("load 'a'"), failing)
    assert first.startswith("RuntimeError: process 1 failed to load 'a': KeyError: ")
    assert "\x1b" not in first
    assert second.startswith("KeyError")
    for kind in (ValueError, FileNotFoundError):  # which callers catch, and on all processes then
        first, second = turns(
            lambda agree: agree("load 'a'"), lambda agree, kind=kind: failing(agree, kind)
        )
        assert first.startswith(f"{kind.__name__}: process 1 failed to load 'a': {kind.__name__}: ")
        assert second.startswith(kind.__name__)
    monkeypatch.setattr(agreement, "TIMEOUT_S", 0.01)
    first, _ = turns(lambda agree: agree("load 'a'"), None)
    assert first.startswith("RuntimeError: process 1 did not come to load 'a' within 0.01 s; all ")


def test_a_bank_of_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(agreement, "_client", lambda: pytest.fail("it asks"))
    _, bank = processes.model_and_bank()
    bank.load("a", processes.adapter(0, 4))
    assert bank.names == ("a",)


def test_what_reads_base_weights_takes_one_process(monkeypatch):
    """DoRA, and copies of an output layer: they would wait for each other's shards."""
    model = processes.Wide(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8,), dora=True)
    bank = AdapterBank(model)
    plain = processes.adapter(0, 4)
    modules = {
        name: dataclasses.replace(weights, magnitude=np.ones(weights.b.shape[0], np.float32))
        for name, weights in plain.modules.items()
    }
    adapter = Adapter(dataclasses.replace(plain.config, dora=True), modules)
    bank.load("one", adapter)
    monkeypatch.setattr(bank._agreement, "_members", [0, 1])
    with pytest.raises(ValueError, match=r"'two' has DoRA, whole .* one process holds, not 2"):
        bank._check_header("two", adapter.header)
    with pytest.raises(ValueError, match=r"up has a copy of its base weight, .* not 2"):
        bank._base_weight("up")
    monkeypatch.setattr(agreement, "_client", Service)
    for call in (
        lambda: bank.load("three", plain, wait=2),
        lambda: bank.create("three", LoRAConfig(4, 4), rngs=nnx.Rngs(0), wait=2),
        lambda: bank.publish("three", "one", wait=2),
    ):
        with pytest.raises(ValueError, match=r"wait=2 is given, which takes .* one process holds"):
            call()
