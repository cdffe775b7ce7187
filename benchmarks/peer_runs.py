"""Runs benchmarks/peers/peer_bench.py, which times vLLM and SGLang, in a process of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.report import PEERS
from benchmarks.turns import Turns

Row = dict[str, object]  # microseconds of a peer by its name, or why there are none


def script_of(folder: Path) -> Path:
    """The script in a folder that benchmarks/peers/fetch.sh made.

    Raises:
      FileNotFoundError: it is not there.
    """
    script = folder / "peer_bench.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"{str(script)!r:.200} is missing; make the folder with benchmarks/peers/fetch.sh"
        )
    return script


def for_peers(case: Case) -> dict[str, object]:
    """A case as the script takes it. The peers pad all adapters of a stack to the largest rank."""
    return {
        **{name: getattr(case, name) for name in ("T", "H", "N", "r")},
        "ids": case.ids().tolist(),
        "ranks": [rank for rank, slots in case.slots.items() for _ in range(slots)],
    }


def run_peers(
    cases: Sequence[Case], folder: Path, progress: Callable[[str], None], turns: Turns
) -> list[dict[str, object]]:
    """A row for each case. Where the process ends too early, the rows that it wrote are kept.

    Raises:
      FileNotFoundError: `folder` is none that benchmarks/peers/fetch.sh made.
      RuntimeError: the process failed before it wrote a row.
    """
    script = script_of(folder)
    progress(f"timing {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary, "cases.json"), Path(temporary, "out.json")
        given.write_text(json.dumps([for_peers(case) for case in cases]))
        command = [sys.executable, str(script), "--cases", str(given), "--out", str(out)]
        command += [] if turns.path is None else ["--turns", turns.path]
        done = subprocess.run(command, capture_output=True, text=True)
        rows: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    if done.returncode:
        failed = f"{script} failed:\n{done.stderr[-2000:]}"
        if not rows:
            hint = "If the folder is older than this checkout, run benchmarks/peers/fetch.sh again."
            raise RuntimeError(f"{failed}\n{hint}")
        progress(f"{failed}\nThe peers ran {len(rows)} of {len(cases)} cases")
    missing: Row = {peer: "fails: its process ended before" for peer in PEERS}
    return [*rows, *[missing] * (len(cases) - len(rows))]
