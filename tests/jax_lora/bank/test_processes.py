"""Several processes hold a model together: they compute what one does, and load the same."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest

from jax_lora import load_peft

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
def test_a_process_that_is_killed_ends_the_others(start, tmp_path):
    """With a clear error, within a minute."""
    *others, killed = start("die", 4, tmp_path)
    assert killed.wait(timeout=200) == 9
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in others]
    assert time.monotonic() - began < 60
    for process, error in zip(others, errors):
        assert process.returncode != 0
        assert "Connection closed by peer" in error or "another task died" in error
