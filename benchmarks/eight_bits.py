"""Decode and prefill with stacks in 8 bits beside the same in bfloat16, in one process.

    PYTHONPATH=. python benchmarks/eight_bits.py [--dtypes ...] [--cases T,D,r ...] [--stages N ...]
    PYTHONPATH=. python benchmarks/eight_bits.py --errors

Microseconds of `y += (x A^T) B^T` with H = N = 4096, inside of a jitted loop over weight sets that
together exceed the L2 cache, and each one's share of the time in bfloat16. `--stages` times other
numbers of copies of B beside the default. Each result is first held against float64.

`--errors` times nothing, and needs no GPU: it says how far B'A' is from BA in each dtype.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import pallas_kernels as pk
from benchmarks.cases import Case
from benchmarks.timing import Loop, rounds_of, sets_to_rotate, turn
from jax_lora.bank.eight_bits import error_of
from pallas_kernels.mosaic_gpu import Config
from pallas_kernels.mosaic_gpu.decode import decode_config
from pallas_kernels.mosaic_gpu.prefill import default_config
from pallas_kernels.stacks import EIGHT_BITS

_MAX_ERROR = 1e-2
_EIGHT_BITS = [dtype.name for dtype in EIGHT_BITS]
Call = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Run:
    """A case in one dtype, by one config; None for the default."""

    case: Case
    dtype: str
    config: Config | None = None

    @property
    def label(self) -> str:
        stages = "" if self.config is None else f", {self.config.expand_stages} copies of B"
        return f"{self.case.label} {self.dtype}{stages}"

    def operands(self, halves: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """A, B, and the scales."""
        if self.dtype != "bfloat16":
            return list(pk.quantised(*halves, dtype=self.dtype))
        ones = np.ones(self.case.L, np.float32)
        return [*(half.astype(ml_dtypes.bfloat16) for half in halves), ones]

    def call(self) -> Call:
        ids = jax.jit(pk.make_segments, static_argnums=1)(jnp.asarray(self.case.ids()), self.case.L)

        def call(
            y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scales: jax.Array
        ) -> jax.Array:
            named: Literal["mosaic_gpu"] | None = None if self.config is None else "mosaic_gpu"
            parts = [pk.LoRAPart(a, b, scales)]
            return pk.add_lora_multi(y, x, parts, ids, implementation=named, config=self.config)

        return call


def prepared(run: Run) -> tuple[Loop, Sequence[tuple[jax.Array, ...]]]:
    """What is to be timed, compiled, with a right result."""
    case, rng = run.case, np.random.default_rng(0)
    a = rng.standard_normal((case.L, case.r, case.H), np.float32) * np.float32(case.H**-0.5)
    b = rng.standard_normal((case.L, case.N, case.r), np.float32) * np.float32(case.r**-0.5)
    y, x = (
        rng.standard_normal((case.T, size), np.float32).astype(ml_dtypes.bfloat16)
        for size in (case.N, case.H)
    )
    stack, call = run.operands((a, b)), run.call()
    operands = [jnp.asarray(t) for t in (y, x, *stack)]
    error = _error(case, np.asarray(jax.jit(call)(*operands)), y, x, stack)
    if not error < _MAX_ERROR:
        raise RuntimeError(f"{run.label} is wrong: relative error {error:.1e}")
    print(f"{run.label}: relative error {error:.1e}", flush=True)
    count = sets_to_rotate(sum(t.nbytes for t in stack))
    sets = [tuple(map(jnp.copy, operands)) for _ in range(count)]
    loop = Loop(turn(call, rounds_of(sets)), len(sets) * rounds_of(sets))
    loop.compile(sets)
    return loop, sets


def _error(
    case: Case, got: np.ndarray, y: np.ndarray, x: np.ndarray, stack: Sequence[np.ndarray]
) -> float:
    """Relative error of a result, of the part that the adapters add, against float64."""
    (a, b, scales), want = stack, y.astype(np.float64)
    for t, slot in enumerate(case.ids()):
        v = a[slot].astype(np.float64) @ x[t].astype(np.float64) * scales[slot]
        want[t] += b[slot].astype(np.float64) @ v
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def runs_of(case: Case, dtypes: Sequence[str], stages: Sequence[int]) -> list[Run]:
    """The case in bfloat16, and in each dtype, also with other numbers of copies."""
    config = decode_config(case.T, case.N, case.r, features=case.H)
    if config.warps is None:  # two launches
        config = default_config(case.T, case.H, case.N, case.r, case.L)
    configs = [None, *(dataclasses.replace(config, expand_stages=n) for n in stages)]
    runs = itertools.starmap(Run, itertools.product([case], dtypes, configs))
    return [Run(case, "bfloat16"), *runs]


def print_errors() -> None:
    """The error of rounding random weights, and of such with one large weight in each row of A."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((16, 4096), (4096, 16)))
    for largest in (None, 8, 16, 32, 64):
        rows = a.copy()
        if largest is not None:
            rows[:, 0] = largest
        found = {name: error_of(rows, b, pk.quantised(rows, b, dtype=name)) for name in _EIGHT_BITS}
        what = "normal weights" if largest is None else f"one weight of a row {largest} times these"
        print(f"{what}: {', '.join(f'{name} {error:.3f}' for name, error in found.items())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="*", default=["64,64,64", "1024,64,64"], metavar="T,D,r")
    parser.add_argument("--stages", nargs="*", type=int, default=[])
    parser.add_argument("--dtypes", nargs="*", default=_EIGHT_BITS, choices=_EIGHT_BITS)
    parser.add_argument("--errors", action="store_true")
    given = parser.parse_args()
    if given.errors:
        print_errors()
        return
    sizes = [map(int, one.split(",")) for one in given.cases]
    cases = [Case(tokens, adapters, rank) for tokens, adapters, rank in sizes]
    runs = [run for case in cases for run in runs_of(case, given.dtypes, given.stages)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ready = list(pool.map(prepared, runs))
    print(jax.devices()[0].device_kind, time.strftime("%Y-%m-%d"))
    plain: dict[Case, float] = {}
    for run, (loop, sets) in zip(runs, ready):
        us = loop.us(sets)
        plain.setdefault(run.case, us)
        print(f"{run.label}: {us:.2f} us, {us / plain[run.case]:.2f} of bfloat16", flush=True)


if __name__ == "__main__":
    main()
