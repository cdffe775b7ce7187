"""`jax-lora serve` as a process of its own, which can be asked, stopped and killed."""

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from jax_lora.demo import job

_SERVING = re.compile(r"serving .* at (http://\S+),")


class ServerProcess:
    """A server at a free port, from `start` to `stop` or `kill`; it may be started again.

    Args:
      options: of `jax-lora serve`, but for `--port`.
      programs: the folder in which JAX keeps compiled programs between starts.
      seconds: in which it must have started.

    Raises:
      RuntimeError: by `start`: it ended, or said nothing in time. The message holds its output.
    """

    KEY = "secret"
    HEADERS: Mapping[str, str] = {"Authorization": f"Bearer {KEY}"}

    def __init__(self, options: Sequence[str], programs: Path, seconds: float = 300) -> None:
        self._options, self._programs, self._seconds = options, programs, seconds
        self.url = ""
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        """Returns when it answers."""
        environment = {
            **os.environ,
            "JAX_LORA_API_KEYS": self.KEY,
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self._programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", "from jax_lora.cli import app; app()", "serve"]
        self._process = subprocess.Popen(
            [*command, "--port", "0", *self._options],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(told,), daemon=True)
        self._reader.start()
        try:
            while (line := told.get(timeout=self._seconds)) is not None:
                if found := _SERVING.match(line):
                    self.url = found[1]
                    return
        except queue.Empty:
            self.kill()
        raise RuntimeError(f"the server has not started: {' | '.join(self.lines)!r:.2000}")

    def _read(self, told: queue.SimpleQueue[str | None]) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                self.lines.append(line.rstrip())
                told.put(line)
        told.put(None)

    def stop(self) -> None:
        """Asks it to end; see `wait`."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """Its exit status, when it has ended. Raises subprocess.TimeoutExpired if it does not."""
        status = self._process.wait(seconds)
        self._reader.join()
        return status

    def kill(self) -> None:
        """Ends it at once, by SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def metric(self, name: str) -> float:
        """A number of `/metrics`, such as `jax_lora_steps_total`."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        [value] = re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(value)


def demo_server(root: Path) -> ServerProcess:
    """A server of the bundled model, of which `root` gets a copy.

    It has the adapters upper, reverse and rot13 for two slots of each rank, and 8 rows for which 40
    requests may wait. One slot of rank 16 is kept for rot13. Clients may load `.later/sort`; `link`
    is sort too, but leads out of the folder.
    """
    adapters = job.FOLDER / "adapters"
    shutil.copytree(job.FOLDER / "base", root / "base")
    for name in ("upper", "reverse", "rot13"):
        shutil.copytree(adapters / name, root / "adapters" / name)
    for place in (root, root / "adapters" / ".later"):
        shutil.copytree(adapters / "sort", place / "sort")
    (root / "adapters" / "link").symlink_to(root / "sort")
    options = ["--base", str(root / "base"), "--adapters", str(root / "adapters")]
    options += ["--name", "demo", "--slots", "2", "--rows", "8", "--max-waiting", "40"]
    options += ["--reserve", "rot=1:16"]
    return ServerProcess([*options, "--max-body", "4000"], root / "programs")
