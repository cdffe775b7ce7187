"""How the benchmarks take time, and the rates that they hold it against."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The copy rate that floors are computed with, so that tables of different runs compare: that of
# torch's copy of 1 GB on an H100 80GB. A run's own rate is reported beside it.
COPY_RATE = 2.40e12
# What `ceilings` measures on an H100.
_H100_COPIES = 3.00e12

# Weight sets are rotated so that together they exceed the L2 cache (50 MB) several times over.
_ROTATED_BYTES = 200_000_000
# Calls in one turn of a timed loop, and in all its turns.
_CALLS, _LOOPED_CALLS = 64, 512
# From this many seconds a loop on, what the host adds to it is nothing.
_LONG_LOOP = 0.1


def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), operations per second of a GEMM."""
    source = jnp.zeros(1 << 28, jnp.float32) + 1
    copied = loop_us(lambda c: (jax.lax.optimization_barrier(c[0]) + 1,), (source,), 1)
    del source
    size = 8192
    left = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16)
    product = loop_us(lambda c: (jnp.tanh(c[0] @ c[1]), c[1]), (left, weights), 1)
    return 2 * 2**30 / copied * 1e6, 2 * size**3 / product * 1e6


def copy_rate_here(copied: float) -> float:
    """What COPY_RATE is for a device on which `ceilings` measures `copied`."""
    return copied / _H100_COPIES * COPY_RATE


def sets_to_rotate(set_bytes: int, least: int = 4, most: int = 16) -> int:
    """How many sets of so many bytes of weights a timed loop goes through; one without a GPU."""
    if jax.default_backend() != "gpu":
        return 1
    return max(least, min(most, -(-_ROTATED_BYTES // set_bytes)))


def rounds_of(sets: Sequence[Any]) -> int:
    """How often a turn of the timed loop goes through the sets."""
    return -(-_CALLS // len(sets)) if jax.default_backend() == "gpu" else 1


def turn(call: Callable[..., Any], rounds: int) -> Callable[..., Any]:
    """body(sets, *given): of each set (y, x, ...) y becomes `call(y, x, ..., *given)`, `rounds`
    times."""
    once = jax.jit(call)  # lowered once, however often it is called

    def body(sets: Any, *given: Any) -> Any:
        for _ in range(rounds):
            # The barrier makes x depend on the loop, so that no half is hoisted out of it.
            sets = jax.lax.optimization_barrier(sets)
            sets = [(once(*each, *given), *each[1:]) for each in sets]
        return sets

    return body


class Loop:
    """carry = body(carry, *given), several turns in one compiled program that is called back to
    back; `calls`: of what is timed, in a body; `turns`: None for as many as 512 calls take.

    The turns are known when XLA compiles, and the host does not wait for one program before it
    starts the next: so the GPU waits for no host. Asked after each turn whether to go on, as a loop
    of unknown length is, it waited 45 us a turn (H100), which the graphs that peers are timed in do
    not.
    """

    def __init__(self, body: Callable[..., Any], calls: int, turns: int | None = None) -> None:
        if turns is None:
            turns = max(1, _LOOPED_CALLS // calls) if jax.default_backend() == "gpu" else 1

        def run(carry: Any, *given: Any) -> Any:
            return jax.lax.fori_loop(0, turns, lambda _, carry: body(carry, *given), carry)

        self._jitted = jax.jit(run, donate_argnums=0)
        self._run: Callable[..., Any] = self._jitted
        self._calls = turns * calls

    def __call__(self, carry: Any, *given: Any) -> Any:
        """What all turns make of the carry."""
        return self._run(_copied(carry), *given)

    def compile(self, carry: Any, *given: Any) -> None:
        """Compiles the program for such arrays, without running it."""
        self._run = self._jitted.lower(carry, *given).compile()

    def us(self, carry: Any, *given: Any, least_ms: float = 20) -> float:
        """Median microseconds of one call."""
        carry = _copied(carry)

        def seconds(count: int) -> float:
            nonlocal carry
            start = time.perf_counter()
            for _ in range(count):
                carry = self._run(carry, *given)
            jax.block_until_ready(carry)
            return time.perf_counter() - start

        seconds(1)
        once = seconds(1)
        if once > _LONG_LOOP:
            return statistics.median([once, seconds(1), seconds(1)]) / self._calls * 1e6
        count = math.ceil(least_ms / 1e3 / max(once, 1e-6))
        repeats = 7 if count > 1 else 3
        # The difference of two lengths leaves out what starting and ending take.
        times = [(seconds(2 * count) - seconds(count)) / count for _ in range(repeats)]
        # Where other work on a CPU hides the difference, the whole: too long rather than negative.
        whole = seconds(2 * count) / (2 * count)
        return (median if (median := statistics.median(times)) > 0 else whole) / self._calls * 1e6


def _copied(carry: Any) -> Any:
    """A copy, whose memory a loop may take."""
    return jax.tree.map(jnp.copy, carry)


def loop_us(body: Callable[[Any], Any], carry: Any, calls: int) -> float:
    """Median microseconds of one of the `calls` in `body`, looped inside one compiled program."""
    return Loop(body, calls).us(carry)
