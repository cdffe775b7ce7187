"""Times the torch ops: what a call costs the host, and the GPU, by each path.

Of the host both the best and the median are given, and beside them those of y.add_(x) by torch
alone: how fast the host was.

python -m interop.bench [--json]        (or: jax-lora bench torch)
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import torch
import torch.utils.dlpack

import interop
import pallas_kernels

# Decode of 64 tokens by 8 adapters of rank 16, as in docs/performance.md.
_TOKENS, _ADAPTERS, _RANK, _FEATURES = 64, 8, 16, 4096
_OPS = ("bgmv_shrink", "bgmv_expand", "add_lora")
# "public" is what a caller without this package writes: JAX's and torch's public functions, and an
# addition to y in a new array. Nothing is updated in place there.
_PATHS = ("native", "dlpack", "public")
_YARDSTICK = ("y.add_(x)", "torch")
# In turns, over seconds: a host that others share changes its speed within them, and what is
# measured in one go may fall into one slow phase.
_TURNS, _SECONDS = 10, 0.1
# Few calls at a time: JAX lets the host wait when 32 are under way.
_CALLS = 10


def run() -> dict[str, Any]:
    """Microseconds per op and path; None where a path does not take the op, with the reason."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    rows: list[dict[str, Any]] = []
    able: list[tuple[dict[str, Any], Callable[[], object], list[float]]] = []
    for op, path in [*itertools.product(_OPS, _PATHS), _YARDSTICK]:
        call = _call(op, path, device)
        rows.append(dict(op=op, path=path, host=None, host_median=None, device=None, note=None))
        try:
            call()
        except NotImplementedError as lacking:
            rows[-1]["note"] = str(lacking)
        else:
            able.append((rows[-1], call, []))
    for _ in range(_TURNS):
        for _, call, times in able:
            times += _host_us(call)
    for row, _, times in able:
        # The best is what a call costs where nothing disturbs it, as Python's timeit advises.
        row.update(host=min(times), host_median=statistics.median(times))
    # Afterwards: once the profiler was on, launches cost the host more.
    if on_gpu:
        for row, call, _ in able:
            row["device"] = _device_us(call)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    versions = dict(jax=jax.__version__, torch=torch.__version__)
    return dict(device=name, date=time.strftime("%Y-%m-%d"), **versions, rows=rows)


def _call(op: str, path: Any, device: torch.device) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    x, y = normal(_TOKENS, _FEATURES), normal(_TOKENS, _FEATURES)
    if (op, path) == _YARDSTICK:
        return lambda: y.add_(x)
    a, b = normal(_ADAPTERS, _RANK, _FEATURES) / _FEATURES, normal(_ADAPTERS, _FEATURES, _RANK)
    v = torch.zeros(_TOKENS, _RANK, device=device)
    ids = torch.arange(_TOKENS, dtype=torch.int32, device=device) % _ADAPTERS
    if path == "public":
        arrays: dict[str, tuple[torch.Tensor, ...]] = {
            "bgmv_shrink": (x, a, ids),
            "bgmv_expand": (v, b, ids, y),
            "add_lora": (y, x, a, b, ids),
        }
        function = jax.jit(getattr(pallas_kernels, op))
        return lambda: torch.utils.dlpack.from_dlpack(
            function(*(jax.dlpack.from_dlpack(t, copy=False) for t in arrays[op]))
        )
    if op == "bgmv_shrink":
        return lambda: interop.bgmv_shrink(x, a, v, ids, path=path)
    if op == "bgmv_expand":
        return lambda: interop.bgmv_expand(v, b, y, ids, path=path)
    return lambda: interop.add_lora(y, x, a, b, ids, path=path)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_us(call: Callable[[], object]) -> list[float]:
    """What the calling thread spends on a call that nothing waits for, in each of some runs."""
    times: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < stop:
        _synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter() - start) / _CALLS * 1e6)
    _synchronize()
    return times


def _device_us(call: Callable[[], object]) -> float:
    """Sum of the durations of the kernels and copies of a call, whoever launched them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    total: float = sum(event.self_device_time_total for event in profile.key_averages())
    return total / _CALLS


def main() -> None:
    parser = argparse.ArgumentParser(prog="jax-lora bench torch", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    report = run() if not parser.parse_args().json else None
    if report is None:
        sys.stdout.write(json.dumps(run(), indent=2) + "\n")
        return
    shape = f"T={_TOKENS} D={_ADAPTERS} r={_RANK} H=N={_FEATURES}, bfloat16"
    print(f"{shape}; microseconds per call")
    print(f"{'op':12} {'path':8} {'host best':>11} {'host median':>11} {'device':>8}")
    for row in report["rows"]:
        times = (row[key] for key in ("host", "host_median", "device"))
        best, median, gpu = ("-" if t is None else f"{t:.1f}" for t in times)
        print(f"{row['op']:12} {row['path']:8} {best:>11} {median:>11} {gpu:>8}")
    for note in dict.fromkeys(row["note"] for row in report["rows"] if row["note"]):
        print(note)
    print(f"{report['device']}, {report['date']}, jax {report['jax']}, torch {report['torch']}")


if __name__ == "__main__":
    main()
