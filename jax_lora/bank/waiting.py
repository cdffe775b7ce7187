"""Loads that wait for a slot, in the order in which they came."""

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
        # The key of each, in the order in which they came. No lock: an exception of a signal
        # handler comes before or after a call of a dict's method, and so leaves nobody in here.
        self._places: dict[object, Hashable] = {}

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
        try:
            self._places[place] = key
            while True:
                is_late = time.monotonic() >= end
                # A late one tries once, and has the error's words.
                if is_late or self._is_first(place, key):
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
            self._places.pop(place, None)

    def _is_first(self, place: object, key: Hashable) -> bool:
        """Whether nobody of the key came before."""
        places = self._places.copy()
        return next(other for other, its in places.items() if its == key) is place


def checked_wait(wait: float) -> float:
    """Seconds to wait; an error for what is no such number."""
    seconds = finite_number(wait, "wait")
    if seconds < 0:
        raise ValueError(f"wait must be at least 0 seconds, got {wait}")
    return seconds
