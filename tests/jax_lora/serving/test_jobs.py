"""Files of requests: each is answered once, also where the job is cut off and gone on with."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from jax_lora.cli import app
from jax_lora.demo import tasks
from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.serving.jobs import Job, run_job

ADAPTERS = adapter_paths()
ROOT = pathlib.Path(__file__).parents[3]
NAMES = ("upper", "sort", "twice", None)
WORDS = [word for word in tasks.EVERYDAY_WORDS if tasks.is_clear(word)][:16]


def write(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def asked(count):
    return [
        {"id": f"r{n}", "prompt": f"{WORDS[n % 16]}:", "adapter": NAMES[n % 4], "max_tokens": 20}
        for n in range(count)
    ]


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Cut(Exception):
    pass


@pytest.mark.slow
def test_a_job_that_is_cut_off_loses_and_repeats_nothing(tmp_path):
    requests = write(tmp_path / "requests.jsonl", asked(16))
    job = Job(
        FOLDER / "base",
        {name: ADAPTERS[name] for name in NAMES if name},
        requests,
        tmp_path / "answers",
        allow_links=True,
    )

    def cut(state):
        if state.answered == 5:
            raise Cut

    with pytest.raises(Cut):
        run_job(job, cut)
    before = answers(job.answers)
    assert len(before) == 5
    # As if it had been killed while it wrote, and one request had failed.
    text = job.answers.read_text()
    failed = {"index": 15, "request": "0", "error": "x"}
    job.answers.write_text(text + '{"index": 6, "requ')
    with pytest.raises(FileExistsError, match="has answers; resume, or give answers another"):
        run_job(job)
    told = []
    state = run_job(Job(**{**vars(job), "resume": True}), told.append)
    assert (told[0].answered, told[0].total) == (5, 16)
    assert (state.answered, state.failed, state.total) == (16, 0, 16)
    found = answers(job.answers)
    assert found[:5] == before
    assert sorted(answer["index"] for answer in found) == list(range(16))
    for answer in found:
        n = answer["index"]
        assert (answer["id"], answer["adapter"]) == (f"r{n}", NAMES[n % 4])
        assert answer["text"] == tasks.task_of(NAMES[n % 4]).complete(WORDS[n])
        assert answer["finish_reason"] == "stop"
    again = run_job(Job(**{**vars(job), "resume": True}))  # loads nothing
    assert (again.answered, again.tokens) == (16, 0)
    job.answers.write_text(job.answers.read_text() + json.dumps(failed) + "\n")
    with pytest.raises(ValueError, match="line 17: it answers another request than line 16"):
        run_job(Job(**{**vars(job), "resume": True}))


def killed_behind(command, path, lines, **options):
    """Runs the command, and kills it where the file has so many lines."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.ci
def test_a_command_that_is_killed_loses_and_repeats_nothing(tmp_path):
    # What is drawn runs long, so that the kill is in time.
    drawn = {"prompt": "a:", "temperature": 9.0, "max_tokens": 50}
    lines = asked(16) + [{**drawn, "id": f"r{n}", "seed": n} for n in range(16, 24)]
    requests = write(tmp_path / "r.jsonl", lines)
    path = tmp_path / "r.jsonl.answers"
    command = [sys.executable, "-c", "from jax_lora.cli import app; app()", "generate"]
    command += ["--base", str(FOLDER / "base")]
    for name in filter(None, NAMES):
        command += ["--adapter", f"{name}={ADAPTERS[name]}"]
    command += ["--requests", str(requests), "--allow-links"]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),  # lest the second start compile
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    killed_behind(command, path, 3, env=env)
    *whole, _ = path.read_text().split("\n")  # the last may have been cut
    assert 3 <= len(whole) < len(lines)
    again = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "24 of 24 answered" in again.stderr
    assert path.read_text().splitlines()[: len(whole)] == whole
    found = answers(path)
    assert sorted(answer["index"] for answer in found) == list(range(len(lines)))
    for answer in found:
        n = answer["index"]
        assert (answer["id"], answer["adapter"]) == (f"r{n}", lines[n].get("adapter"))
        if n < 16:
            assert answer["text"] == tasks.task_of(NAMES[n % 4]).complete(WORDS[n])


@pytest.mark.ci
def test_the_command_answers_a_file_and_tells_what_failed(tmp_path, monkeypatch):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name in ("upper", "sort"):
        (adapters / name).symlink_to(ADAPTERS[name])
    requests = write(tmp_path / "r.jsonl", [r for r in asked(6) if r["adapter"] != "twice"])
    command = ["generate", "--base", str(FOLDER / "base"), "--adapter", f"*={adapters}"]
    command += ["--requests", str(requests), "--allow-links"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "5 of 5 answered" in result.stderr
    found = answers(tmp_path / "r.jsonl.answers")
    assert {a["index"]: a["text"] for a in found} == {
        n: tasks.task_of(r["adapter"]).complete(r["prompt"][:-1])
        for n, r in enumerate(answers(requests))
    }
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "has answers; resume" in result.stderr
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0 and "5 of 5 answered" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no", "line 2: Expecting value"),
        ("3", "line 2: it must be an object with a prompt, got 3"),
        ('{"text": "a"}', "line 2: it must be an object with a prompt, got {'text': 'a'}"),
        ('{"prompt": "a", "n": 2}', r"line 2: it has \['n'\]; known are adapter, id, max_tokens"),
        ('{"prompt": "a", "adapter": "x"}', "line 2: no adapter is called 'x'; there are 'upper'"),
        ('{"prompt": "a", "top_p": 2}', r"line 2: top_p must lie in \(0, 1\], got 2"),
        ('{"prompt": "a", "max_tokens": 99}', "exceed the model's 64 positions"),
    ],
)
def test_bad_files_are_refused(tmp_path, line, message):
    requests = tmp_path / "r.jsonl"
    requests.write_text('{"prompt": "a"}\n' + line + "\n")
    adapters = {"upper": ADAPTERS["upper"]}
    with pytest.raises(ValueError, match=message):
        run_job(Job(FOLDER / "base", adapters, requests, tmp_path / "answers"))
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --prompt or --requests"),
        (["--prompt", ":a", "--requests", "x"], "give either --prompt or --requests"),
        (["--prompt", ":a", "--resume"], "--resume needs --requests"),
        (["--requests", "x", "--max-new-tokens", "3"], "each line of the file has a max_tokens"),
        (["--requests", "/no/such"], "/no/such"),
        (["--prompt", ":a", "--adapter", "*=/no/such"], "there are no adapters in it"),
    ],
)
def test_options_that_do_not_fit_are_refused(args, message):
    result = CliRunner().invoke(app, ["generate", "--base", str(FOLDER / "base"), *args])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
