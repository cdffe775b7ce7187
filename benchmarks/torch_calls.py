"""Times the torch ops: what a call costs the host, and the GPU, by each path.

The report gives both the best and the median of the host's times. Beside them stand those of
y.add_(x) by torch alone, which tell how fast the host was.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import torch
import torch.utils.dlpack

import interop
import pallas_kernels

Path = Literal["native", "dlpack", "public", "torch"]
Call = Callable[[], object]

# Decode of 64 tokens by 8 adapters of rank 16, as in docs/performance.md.
_TOKENS, _ADAPTERS, _RANK, _FEATURES = 64, 8, 16, 4096
_OPS = ("bgmv_shrink", "bgmv_expand", "add_lora")
# "public" is what a caller without this package writes: JAX's and torch's public functions, and an
# addition to y in a new array. Nothing is updated in place there.
_PATHS: tuple[Path, ...] = ("native", "dlpack", "public")
_YARDSTICK: tuple[str, Path] = ("y.add_(x)", "torch")
# All calls take turns over seconds: a host that others share changes its speed within them, and
# what is measured in one go may fall into one slow phase.
_TURNS, _SECONDS = 10, 0.1
# Few calls at a time: JAX lets the host wait when 32 are under way.
_CALLS = 10


@dataclass(frozen=True)
class Row:
    """Microseconds of one op by one path: the host's best and median, and the device's.

    The host's are None where the path does not take the op, with the reason in `note`; the device's
    is None without a GPU too.
    """

    op: str
    path: Path
    host: float | None
    host_median: float | None
    device: float | None
    note: str | None


@dataclass(frozen=True)
class Report:
    """All rows, the versions of JAX and torch, and in words what was called."""

    device: str
    date: str
    jax: str
    torch: str
    shape: str
    rows: list[Row]


def run() -> Report:
    """Times each op by each path that takes it, in turns, and torch's own addition."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    calls: dict[tuple[str, Path], Call] = {}
    notes: dict[tuple[str, Path], str] = {}
    keys = [*itertools.product(_OPS, _PATHS), _YARDSTICK]
    for key in keys:
        call = _call(*key, device)
        try:
            call()
        except NotImplementedError as lacking:
            notes[key] = str(lacking)
        else:
            calls[key] = call
    times: dict[tuple[str, Path], list[float]] = {key: [] for key in calls}
    for _ in range(_TURNS):
        for key, call in calls.items():
            times[key] += _host_us(call)
    # Afterwards: once the profiler was on, launches cost the host more.
    device_us = {key: _device_us(call) for key, call in calls.items()} if on_gpu else {}
    rows = [
        # The best is what a call costs where nothing disturbs it, as Python's timeit advises.
        Row(
            *key,
            host=min(times[key]) if key in times else None,
            host_median=statistics.median(times[key]) if key in times else None,
            device=device_us.get(key),
            note=notes.get(key),
        )
        for key in keys
    ]
    return Report(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        date=time.strftime("%Y-%m-%d"),
        jax=jax.__version__,
        torch=torch.__version__,
        shape=f"T={_TOKENS} D={_ADAPTERS} r={_RANK} H=N={_FEATURES}, bfloat16",
        rows=rows,
    )


def _call(op: str, path: Path, device: torch.device) -> Call:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    x, y = normal(_TOKENS, _FEATURES), normal(_TOKENS, _FEATURES)
    if path == "torch":
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


def _host_us(call: Call) -> list[float]:
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


def _device_us(call: Call) -> float:
    """Sum of the durations of the kernels and copies of a call, whoever launched them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    total: float = sum(event.self_device_time_total for event in profile.key_averages())
    return total / _CALLS
