"""Loads that wait for a slot, in the order in which they came."""

import collections
import threading
import time
from collections.abc import Callable, Hashable

from jax_lora.adapters import finite_number
from jax_lora.bank.slots import BankFullError

# Batches give slots back when Python forgets them, which tells nobody.
_TURN_S = 0.005


class SlotQueue:
    """Who waits for a slot. For any thread.

    Those of one key want slots of one kind, and take them in turn. Those of different keys do not
    wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[Hashable, collections.deque[object]] = {}

    def run(self, key: Hashable, seconds: float, load: Callable[[], None]) -> None:
        """`load()`; where that finds no slot, again until it does, for so many seconds.

        Raises:
          BankFullError: there was no slot in that time.
          Exception: what else `load` raises, at once.
        """
        if not seconds:
            load()
            return
        end, place = time.monotonic() + seconds, object()
        with self._lock:
            queue = self._queues.setdefault(key, collections.deque())
            queue.append(place)
        try:
            while True:
                is_late = time.monotonic() >= end
                if queue[0] is place or is_late:  # a late one tries once, and has the error's words
                    try:
                        load()
                        return
                    except BankFullError as error:
                        if is_late:
                            raise BankFullError(
                                f"{error}; the load has waited {seconds:g} s"
                            ) from None
                time.sleep(_TURN_S)
        finally:
            with self._lock:
                queue.remove(place)
                if not queue:
                    del self._queues[key]


def checked_wait(wait: float) -> float:
    """Seconds to wait; an error for what is no such number."""
    seconds = finite_number(wait, "wait")
    if seconds < 0:
        raise ValueError(f"wait must be at least 0 seconds, got {wait}")
    return seconds
