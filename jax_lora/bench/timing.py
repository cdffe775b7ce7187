"""How the benchmarks take time, and the rates that they hold it against."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The copy rate that floors are computed with, so that tables of different runs compare: measured by
# tests/peers/peer_bench.py on an H100 80GB. A run's own rate is reported beside it.
COPY_RATE = 2.40e12


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
