"""Processes that hold a model's stacks together: they load the same, or nothing."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax._src import distributed  # jax.distributed's client; there is no public getter
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jaxtyping import Array

from jax_lora.adapters import Adapter
from jax_lora.messages import printable

# As long as the slowest process may read an adapter. One that has died ends the others sooner.
TIMEOUT_S = 300

Agree = Callable[[str], None]

# Whoever catches one of these goes on, and so must do on all processes.
_OF_INPUT: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, FileNotFoundError, FileExistsError)
}

_numbers = itertools.count()  # of the banks that several processes have: the same in each of them


class Agreement:
    """What the processes of `jax.distributed` say to each other before a bank changes.

    They say it through JAX's coordination service, and so exchange nothing between devices, whose
    order the steps of another thread would disturb. The processes must load in one order.

    Args:
      arrays: the bank's. Their devices tell which processes have it.
    """

    def __init__(self, arrays: Iterable[Array]) -> None:
        devices: list[jax.Device] = [d for array in arrays for d in array.sharding.device_set]
        self._members = sorted({device.process_index for device in devices})
        self._bank = next(_numbers) if self.is_shared else 0
        self._turn = 0
        self._said: list[str] = []  # keys that the service still holds

    @property
    def processes(self) -> tuple[int, ...]:
        """Those that have the bank."""
        return tuple(self._members)

    @property
    def name(self) -> str:
        """The turn's name. It is the same in all processes, and no other turn has it."""
        return f"jax_lora/bank/{self._bank}/{self._turn}"

    @property
    def is_shared(self) -> bool:
        """Whether several processes have the bank."""
        return len(self._members) > 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of those that have the bank."""
        return not self.is_shared or jax.process_index() == self._members[0]

    def check_alone(self, what: str) -> None:
        """ValueError where several processes have the bank, for what each would do by itself: read
        the base model's weights, of which it has shards, or wait for a slot."""
        if self.is_shared:
            raise ValueError(
                f"{what}, which takes a model that one process holds, not {len(self._members)}"
            )

    @contextlib.contextmanager
    def turn(self) -> Iterator[Agree]:
        """A block that each process runs, and changes nothing in before it calls what it gets.

        That takes what the process is about to do, and returns once all are about to do the same.

        Raises:
          RuntimeError: in that call, where another process is about to do something else, or did
            not come.
          Exception: in that call, where another process has failed before its own: of the same
            kind as there, if that is an error of the caller's input; else RuntimeError.
        """
        if not self.is_shared:
            yield lambda claim: None
            return
        self._turn += 1
        has_spoken = False

        def agree(claim: str) -> None:
            nonlocal has_spoken
            has_spoken = True
            self._say({"does": claim})
            self._compare(claim)

        try:
            yield agree
        except BaseException as error:
            if not has_spoken:
                kind = type(error).__name__
                self._say({"fails": printable(f"{kind}: {error}"), "kind": kind})
            raise

    def _key(self, process: int) -> str:
        return f"{self.name}/{process}"

    def _say(self, what: dict[str, str]) -> None:
        self._said.append(self._key(jax.process_index()))
        _client().key_value_set(self._said[-1], json.dumps(what))

    def _compare(self, claim: str) -> None:
        for process in self._members:
            try:
                heard = _client().blocking_key_value_get(self._key(process), 1000 * TIMEOUT_S)
            except jax.errors.JaxRuntimeError as error:
                raise RuntimeError(
                    f"process {process} did not come to {claim} within {TIMEOUT_S} s; all "
                    "processes of a bank load, save and merge the same in one order"
                ) from error
            other = json.loads(heard)
            if "fails" in other:
                kind = _OF_INPUT.get(other["kind"], RuntimeError)
                raise kind(f"process {process} failed to {claim}: {other['fails']}")
            if other["does"] != claim:
                raise RuntimeError(
                    f"process {jax.process_index()} is about to {claim}, but process {process} to "
                    f"{other['does']}; nothing is changed"
                )
        # All have spoken in this turn, so all have heard what was said in those before it.
        for key in self._said[:-1]:
            _client().key_value_delete(key)
        del self._said[:-1]


def _client() -> _jax.DistributedRuntimeClient:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("several processes have the bank; call jax.distributed.initialize first")
    return client


def digest(adapter: Adapter) -> str:
    """Tells adapters of other weights apart."""
    seen = hashlib.blake2b(digest_size=8)
    for name, weights in sorted(adapter.modules.items()):
        seen.update(f"{name} {weights.scale} {weights.a.shape} {weights.b.shape}".encode())
        for array in (weights.a, weights.b):
            seen.update(np.ascontiguousarray(array).view(np.uint8))
    return seen.hexdigest()
