"""Times cases in several processes on one GPU: they prepare them together and time them in turns.

To lower, compile and check a case takes several times as long as to time it, and one core.

    python -m benchmarks.workers JOB.json        # what each process runs
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.kernels import rates_here, run
from benchmarks.peer_runs import script_of
from benchmarks.report import Report, join
from benchmarks.turns import Turns

_ROOT = Path(__file__).parents[1]
_POLL_S = 1.0


def run_in_processes(
    cases: Sequence[Case],
    peers: Path | None,
    progress: Callable[[str], None],
    processes: int,
    *,
    name: str | None = None,
    save: Path | None = None,
) -> Report:
    """`kernels.run` by so many processes. One that fails loses the rest of its own cases alone.

    Raises:
      FileNotFoundError: `peers` is no folder that benchmarks/peers/fetch.sh made.
      RuntimeError: none of them timed a case.
    """
    if peers is not None:
        script_of(peers)
    # Else this process would take most of the GPU's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    rates = rates_here()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        folder = Path(temporary)
        started: list[subprocess.Popen[bytes]] = []
        for nth in range(min(processes, len(cases))):
            job = {
                "cases": [dataclasses.asdict(case) for case in cases[nth::processes]],
                "name": name,
                "peers": None if peers is None else str(peers.resolve()),
                "rates": rates,
                "turns": str(folder / "turns"),
                "save": str(folder / f"part-{nth}.json"),
            }
            (folder / f"job-{nth}.json").write_text(json.dumps(job))
            command = [sys.executable, "-m", "benchmarks.workers", str(folder / f"job-{nth}.json")]
            process = subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, start_new_session=True
            )
            started.append(running.enter_context(process))
        for _ in _until_ended(started):
            report = _joined(folder, cases)
            if report is not None and save is not None:
                report.save(save)
    failed = sum(process.returncode != 0 for process in started)
    if failed:
        progress(f"{failed} of {len(started)} processes failed")
    if report is None:
        raise RuntimeError(f"no case was timed: {failed} of {len(started)} processes failed")
    return report


def _until_ended(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Once for a while until all have ended, and once then."""
    while any(process.poll() is None for process in processes):
        yield
        time.sleep(_POLL_S)
    yield


def _joined(folder: Path, cases: Sequence[Case]) -> Report | None:
    """What the processes timed so far, in the order of the cases."""
    parts = [Report.load(path) for path in sorted(folder.glob("part-*.json"))]
    if not parts:
        return None
    order = {case: nth for nth, case in enumerate(cases)}
    whole = join(parts)
    results = sorted(whole.results, key=lambda result: order[result.case])
    return dataclasses.replace(whole, results=results)


def end_with_parent() -> None:
    """Ends this process, and those that it started, when the end of its input says that the one
    that started it is gone: else they would use the GPU of what runs next."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(path: Path) -> None:
    end_with_parent()
    job = json.loads(path.read_text())
    run(
        [Case(**case) for case in job["cases"]],
        None if job["peers"] is None else Path(job["peers"]),
        lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
        name=job["name"],
        save=Path(job["save"]),
        rates=tuple(job["rates"]),
        turns=Turns(job["turns"]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
