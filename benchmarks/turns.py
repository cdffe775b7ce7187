"""Processes that share a GPU take turns: many work on it together, or one times something alone."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


class Turns:
    """What processes that were given the same file agree by; without a file each is the only one.

    Who waits to be alone lets nobody else start to share, so that its turn comes.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Inside of this, others may use the GPU too."""
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside of this, no other is inside of `shared` or `alone`."""
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        if self.path is None:
            yield
            return
        with _opened(self.path) as lock:
            with _opened(self.path + ".gate") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(lock, kind)
            yield


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file, whose lock ends with it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield file
    finally:
        os.close(file)
