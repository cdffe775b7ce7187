"""What threads, signals and forks ask of code that changes a model in place."""

import _thread
import os
import sys
import threading
from collections.abc import Callable

_started_before_fork = False
_is_orphan = False


def _before_fork() -> None:
    global _started_before_fork
    # Whether JAX has started its threads; there is no public getter. This module imports no JAX.
    bridge = sys.modules.get("jax._src.xla_bridge")
    _started_before_fork = bridge is not None and bridge.backends_are_initialized()


def _after_fork() -> None:
    global _is_orphan
    _is_orphan = _is_orphan or _started_before_fork


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def check_process() -> None:
    """Refuses to run where JAX would wait for ever: in the child of a fork.

    Raises:
      RuntimeError: this process was forked from one that had used JAX.
    """
    if _is_orphan:
        raise RuntimeError(
            "this process was forked from one that had used JAX, whose threads a fork does not "
            "copy, so JAX would hang here; start workers by multiprocessing's 'spawn' or "
            "'forkserver'"
        )


class _Call[T]:
    """A call that another thread makes, at most once."""

    result: T

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.claim = threading.Lock()  # whoever takes it runs the work, or gives it up
        self.ended = threading.Lock()
        self.ended.acquire()
        self.has_ended = False
        self.error: BaseException | None = None

    def run(self) -> None:
        if not self.claim.acquire(blocking=False):
            return
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.has_ended = True
        self.ended.release()

    def wait(self) -> BaseException | None:
        """Waits to the end, whatever signals say; returns the last exception of theirs."""
        interrupt = None
        while not self.has_ended:
            try:
                self.ended.acquire()
            except BaseException as error:
                interrupt = error
        return interrupt


def undivided[T](work: Callable[[], T]) -> T:
    """`work()`, which no signal's exception divides: it runs to its end, or not at all.

    Python runs signal handlers in the main thread, between any two bytecodes; debuggers and time
    limits interrupt other threads too. So a thread that nobody else knows does the work. An
    exception such as KeyboardInterrupt goes to the caller after the work has ended. `work` must not
    need locks that the caller holds.
    """
    call = _Call(work)
    try:
        # Bare locks and a bare thread. `Event.wait` and `Thread.start` are Python: an exception
        # inside of them could leave a lock taken, or become "release unlocked lock".
        _thread.start_new_thread(call.run, ())
        call.ended.acquire()
    except BaseException as interrupt:
        if call.claim.acquire(blocking=False):
            raise  # not begun, and now it never will
        raise (call.wait() or interrupt) from None
    if call.error is not None:
        try:
            raise call.error
        finally:
            call.error = None  # it refers to its frames, and they to the call
    return call.result
