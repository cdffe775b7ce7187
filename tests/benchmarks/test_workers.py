"""Processes that share a GPU: turns, and cases that several of them time."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.cases import Case
from benchmarks.report import Report
from benchmarks.turns import Turns

ROOT = Path(__file__).parents[2]


def test_many_share_and_one_is_alone(tmp_path: Path) -> None:
    """Threads stand for processes: each opens the file anew."""
    turns = Turns(str(tmp_path / "turns"))
    sharing = threading.Barrier(3, timeout=10)
    inside, seen = [0], []

    def share_then_alone() -> None:
        with turns.shared():
            sharing.wait()  # all three are inside
        with turns.alone():
            inside[0] += 1
            time.sleep(0.02)
            seen.append(inside[0])
            inside[0] -= 1

    threads = [threading.Thread(target=share_then_alone) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [1, 1, 1]


def test_who_waits_to_be_alone_is_let_in_before_others_share(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path / "turns"))
    order: list[str] = []

    def enter(name: str, alone: bool) -> None:
        with turns.alone() if alone else turns.shared():
            order.append(name)

    with turns.shared():
        waiting = threading.Thread(target=enter, args=("alone", True))
        waiting.start()
        time.sleep(0.1)
        late = threading.Thread(target=enter, args=("late", False))
        late.start()
        time.sleep(0.1)
        assert order == []
    waiting.join(timeout=10)
    late.join(timeout=10)
    assert order == ["alone", "late"]


def test_without_a_file_nobody_waits() -> None:
    turns = Turns(None)
    with turns.shared(), turns.alone():
        pass


def run(tmp_path: Path, cases: list[Case], *args: str) -> subprocess.CompletedProcess[str]:
    given = tmp_path / "cases.json"
    given.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    command = [sys.executable, "-m", "benchmarks", "kernels", "--cases", str(given), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.slow
def test_several_processes_make_one_report(tmp_path: Path) -> None:
    cases = [
        Case(300, 2, 8, 64, 64, 8, lengths=(299, 1), shuffle=True),
        Case(16, 2, 16, 64, 64, 4, ranks=(8, 16)),
        Case(8, 4, 16, 64, 128, 8),
    ]
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "peer_bench.py").write_text("""
import json, sys
assert sys.argv[5] == "--turns"
rows = [dict(vllm=float(case["T"])) for case in json.load(open(sys.argv[2]))]
json.dump(dict(rows=rows), open(sys.argv[4], "w"))""")
    saved = tmp_path / "report.json"
    args = ("--processes", "2", "--peers", str(peers), "--save", str(saved))
    done = run(tmp_path, cases, *args)
    assert done.returncode == 0, done.stderr
    assert "T=300 D=2 r=8 64x64 1-299 each shuffled" in done.stdout
    report = Report.load(saved)
    assert [result.case for result in report.results] == cases
    assert [result.peers for result in report.results] == [{"vllm": float(c.T)} for c in cases]
    assert all(result.xla > 0 for result in report.results)


@pytest.mark.slow
def test_a_process_that_fails_loses_its_own_cases_alone(tmp_path: Path) -> None:
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "peer_bench.py").write_text("""
import json, sys
[case] = json.load(open(sys.argv[2]))
if case["T"] == 8:
    sys.exit("no CUDA here")
json.dump(dict(rows=[{}]), open(sys.argv[4], "w"))""")
    cases = [Case(8, 4, 16, 64, 128, 8), Case(16, 4, 16, 64, 128, 8)]
    done = run(tmp_path, cases, "--processes", "2", "--peers", str(peers), "--json")
    assert done.returncode == 0, done.stderr
    assert "no CUDA here" in done.stderr
    assert "1 of 2 processes failed" in done.stderr
    assert [row["case"]["T"] for row in json.loads(done.stdout)["results"]] == [16]


@pytest.mark.slow
def test_a_process_and_what_it_started_end_with_the_one_that_started_it() -> None:
    code = """
import subprocess, sys, time
from benchmarks.workers import end_with_parent
end_with_parent()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(child, 0)  # it runs
        process.communicate()  # closes its input
    assert process.returncode == -signal.SIGKILL
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or is_dead(child):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} outlived the one that started it")


def is_dead(pid: int) -> bool:
    """Whether it has ended, though nobody asked for its status."""
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
