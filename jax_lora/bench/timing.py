"""How the benchmarks take time, and the rates that they hold it against."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The copy rate that floors are computed with, so that tables of different runs compare: measured by
# tests/peers/peer_bench.py on an H100 80GB. A run's own rate is reported beside it.
COPY_RATE = 2.40e12

# Weight sets are rotated so that together they exceed the L2 cache (50 MB) several times over.
_ROTATED_BYTES = 200_000_000
# Calls in one turn of the timed loop: a turn costs some 20 us itself (H100), which the graphs that
# peers are timed in do not have.
_CALLS = 64


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


def sets_to_rotate(set_bytes: int) -> int:
    """How many sets of so many bytes of weights a timed loop goes through; one without a GPU."""
    if jax.default_backend() != "gpu":
        return 1
    return max(4, min(16, -(-_ROTATED_BYTES // set_bytes)))


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


def looped(body: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted `loop(count, carry, *given)`: carry = body(carry, *given), `count` times."""

    def loop(count: jax.Array, carry: Any, *given: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, carry: body(carry, *given), carry)

    return jax.jit(loop)


def loop_us(body: Callable[[Any], Any], carry: Any, calls: int) -> float:
    """Median microseconds of one of the `calls` in `body`, looped inside one compiled program."""
    return time_loop(looped(body), calls, carry)


def time_loop(loop: Callable[..., Any], calls: int, *operands: Any, least_ms: float = 20) -> float:
    """`loop_us` of what `looped` gave, called with `operands`: its carry and what else it takes."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(jnp.int32(count), *operands))
        return time.perf_counter() - start

    seconds(2)
    count = max(1, min(20_000, round(3 * least_ms / 1e3 / max(seconds(3), 1e-6))))
    # The difference of two lengths leaves out what a call costs the host.
    times = [(seconds(2 * count) - seconds(count)) / count / calls for _ in range(7)]
    # Where other work on a CPU hides the difference, the whole: too long rather than negative.
    whole = seconds(2 * count) / (2 * count) / calls
    return (median if (median := statistics.median(times)) > 0 else whole) * 1e6
