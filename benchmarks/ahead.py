"""Compiles cases in several processes, so that the one that times them finds it done.

What compiles takes most of a run otherwise, and the GPU waits. JAX's results go to its cache on
disk and those of the peers' Triton kernels to Triton's. Nothing is timed meanwhile. A process that
fails costs time alone: what it did not compile is compiled when it is timed.

    python -m benchmarks.ahead CASES.json        # what each process runs
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks.cases import Case, cases_of
from benchmarks.peer_runs import for_peers, script_of

_ROOT = Path(__file__).parents[1]
_LIMIT_S = 240
# XLA's choices between kernels are not kept: those made beside other processes may be bad ones.
_CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_persistent_cache_enable_xla_caches": "none",
}


@contextlib.contextmanager
def compiled_ahead(
    cases: Sequence[Case],
    peers: Path | None,
    processes: int,
    progress: Callable[[str], None],
) -> Iterator[None]:
    """Compiles the cases for ours and XLA in so many processes, and in as many for the peers; what
    runs inside of the `with` finds the results."""
    if processes < 1:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = {"jax_compilation_cache_dir": str(Path(folder, "jax")), **_CACHE}
        commands = list(_commands(cases, peers, processes, Path(folder)))
        env = {name.upper(): str(value) for name, value in settings.items()}
        env = {**os.environ, **env, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        progress(f"compiling {len(cases)} cases in {len(commands)} processes")
        with ThreadPoolExecutor(len(commands)) as threads:
            for failed in threads.map(lambda command: _run(command, env), commands):
                if failed is not None:
                    progress(f"one of them failed: {failed}")
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


def _commands(
    cases: Sequence[Case], peers: Path | None, processes: int, folder: Path
) -> Iterator[list[str]]:
    """What each process runs, with the cases that it takes."""
    for nth in range(min(processes, len(cases))):
        some = cases[nth::processes]
        ours = folder / f"cases-{nth}.json"
        ours.write_text(json.dumps([dataclasses.asdict(case) for case in some]))
        yield [sys.executable, "-m", "benchmarks.ahead", str(ours)]
        if peers is not None:
            theirs = folder / f"peers-{nth}.json"
            theirs.write_text(json.dumps([for_peers(case) for case in some]))
            yield [
                sys.executable,
                str(script_of(peers).resolve()),
                "--cases",
                str(theirs),
                "--once",
            ]


def _run(command: list[str], env: dict[str, str]) -> str | None:
    """The end of what a command that fails says; None of one that does not."""
    try:
        done = subprocess.run(
            command, env=env, cwd=_ROOT, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {_LIMIT_S} s"
    return done.stderr[-1000:] if done.returncode else None


if __name__ == "__main__":
    from benchmarks.kernels import compile_case

    for each in cases_of(sys.argv[1]):
        compile_case(each)
