"""What bounds each kernel, by a GPU's counters: `python -m benchmarks.counters`.

Nsight Compute's `ncu` profiles one `add_lora` of each case, or one forward and backward. It replays
each launch some times with the caches flushed before, so operands and code come cold from device
memory, and times are longer than those of `python -m benchmarks kernels`. The clocks are left as
they are. A line for each launch says:

    time; bytes of device memory and of L2, per second and in per cent of the peak; L2's hits;
    per cent of the peak of the L1 caches, of the multiprocessors, and of their tensor cores;
    how much of the time a multiprocessor has work; warps in flight, and room for them;
    the grid, registers and shared memory, and what limits the blocks of a multiprocessor;
    the two reasons for which warps wait the longest, in per cent of their time;
    the part that is the busiest, or "latency" where none reaches 60 % of its peak.

A kernel of rank 48 is launched before each case, and tells the cases apart in what `ncu` lists.
"""

import argparse
import collections
import csv
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import eight_bits, gradients
from benchmarks.cases import Case, grid
from benchmarks.kernels import call_of, operands, segments_of
from pallas_kernels import Segments, add_lora, make_segments

_ROOT = Path(__file__).parents[1]
_MARK_RANK = 48  # none of the cases has it
MARK = Case(1, 1, _MARK_RANK, 256, 256, L=1)
_BUSY = 60.0  # per cent of a peak, from which on a part of the GPU is what bounds a kernel
_SECTOR = 32  # bytes
_CASES_OF_A_RUN = 4  # of ncu
_GRACE_S = 20.0  # for the case that runs when the time is over
# `ncu` sees no kernels inside of CUDA graphs as their own. XLA's products are not what is profiled.
_XLA_FLAGS = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"

# ---------------------------------------------------------------------------------------- metrics

_STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle"),
    *("long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction"),
    *("not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
_LIMITS = ("barriers", "blocks", "registers", "shared_mem", "warps")
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_LIMIT = "launch__occupancy_limit_{}"
_TIME = "gpu__time_duration.sum"
_READ, _WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_SECTORS, _SM_SECTORS = "lts__t_sectors.sum", "lts__t_sectors_srcunit_tex.sum"
_L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
_L2_HITS, _L2_READ_HITS = "lts__t_sector_hit_rate.pct", "lts__t_sector_op_read_hit_rate.pct"
_L1 = "l1tex__throughput.avg.pct_of_peak_sustained_active"
_SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
_TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
_ACTIVE, _ELAPSED = "sm__cycles_active.avg", "sm__cycles_elapsed.max"
_WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
_MOST_WARPS = "sm__maximum_warps_per_active_cycle_pct"
_GRID, _REGISTERS = "launch__grid_size", "launch__registers_per_thread"
_SHARED = "launch__shared_mem_per_block_dynamic"
METRICS = (
    *(_TIME, _READ, _WRITTEN, _DRAM, _SECTORS, _SM_SECTORS, _L2, _L2_HITS, _L2_READ_HITS, _L1),
    *(_SM, _TENSOR, _ACTIVE, _ELAPSED, _WARPS, _MOST_WARPS, _GRID, _REGISTERS, _SHARED),
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    *("launch__block_size", "launch__cluster_size", "launch__waves_per_multiprocessor"),
    *(_LIMIT.format(name) for name in _LIMITS),
    *(_STALL.format(name) for name in _STALLS),
)
# What a unit is in seconds or bytes; others are left as they are.
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3}
_UNITS |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch; `counters` by the name of their metric, in seconds, bytes and per cent.
    One that `ncu` could not read is missing there, and nan in what is derived of it."""

    kernel: str
    counters: dict[str, float]

    def __getitem__(self, metric: str) -> float:
        return self.counters.get(metric, math.nan)

    @property
    def is_mark(self) -> bool:
        return re.search(rf"_r{_MARK_RANK}(?!\d)", self.kernel) is not None

    @property
    def active(self) -> float:
        """Per cent of the time in which a multiprocessor has work, on average."""
        return 100 * self[_ACTIVE] / self[_ELAPSED]

    @property
    def busy(self) -> dict[str, float]:
        """Per cent of the peak of each part of the GPU, over the whole time."""
        l1 = self[_L1] * self.active / 100
        return {"dram": self[_DRAM], "l2": self[_L2], "l1": l1, "tensor": self[_TENSOR],
                "sm": self[_SM]}  # fmt: skip

    @property
    def bound(self) -> str:
        """The part that is the busiest; "latency" where none is busy, "?" where nothing is known.

        What counts as a multiprocessor's throughput has that of its tensor cores in it, so these
        come first where both are equal.
        """
        known = {part: share for part, share in self.busy.items() if not math.isnan(share)}
        most = max(known, key=lambda part: known[part], default="?")
        return "latency" if known and known[most] < _BUSY else most

    @property
    def limit(self) -> tuple[float, str]:
        """How many blocks a multiprocessor has room for, and what limits them."""
        return min((self.counters.get(_LIMIT.format(n), math.inf), n) for n in _LIMITS)

    @property
    def stalls(self) -> dict[str, float]:
        """Per cent of their time for which warps wait for each reason, the longest first. In these
        "selected" is no wait: a warp's instruction is issued."""
        found = {name: self.counters.get(_STALL.format(name), 0.0) for name in _STALLS}
        total = sum(found.values()) or math.nan
        shares = {name: 100 * value / total for name, value in found.items() if value}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def derived(self) -> dict[str, Any]:
        """What the line says, and more."""
        seconds = self[_TIME]
        return {
            "us": 1e6 * seconds,
            "dram_tb_s": (self[_READ] + self[_WRITTEN]) / seconds / 1e12,
            "l2_tb_s": _SECTOR * self[_SECTORS] / seconds / 1e12,
            "l2_of_sm_tb_s": _SECTOR * self[_SM_SECTORS] / seconds / 1e12,
            "busy": self.busy,
            "sm_active": self.active,
            "blocks_per_sm": self.limit,
            "stalls": self.stalls,
            "bound": self.bound,
        }

    @property
    def line(self) -> str:
        got, busy = self.derived(), self.busy
        blocks, limit = self.limit
        waits = [(name, share) for name, share in self.stalls.items() if name != "selected"]
        return "  ".join([
            f"{self.kernel.partition('_mosaic_gpu')[0]:26} {got['us']:7.2f} us",
            f"dram {got['dram_tb_s']:.2f} TB/s {busy['dram']:.0f} %",
            f"l2 {got['l2_tb_s']:.2f} TB/s (SMs {got['l2_of_sm_tb_s']:.2f}) {busy['l2']:.0f} %"
            f" hits {self[_L2_HITS]:.0f} %",
            f"l1 {busy['l1']:.0f} %  sm {busy['sm']:.0f} %  tensor {busy['tensor']:.0f} %",
            f"SMs active {self.active:.0f} %",
            f"warps {self[_WARPS]:.0f} of {self[_MOST_WARPS]:.0f} %",
            f"{self[_GRID]:.0f} blocks, {blocks:.0f}/SM by {limit}, {self[_REGISTERS]:.0f} regs,"
            f" {self[_SHARED] / 1e3:.0f} KB",
            "waits: " + ", ".join(f"{name} {share:.0f} %" for name, share in waits[:2]),
            f"=> {self.bound}",
        ])  # fmt: skip


def launches_of(log: str) -> list[Launch]:
    """The launches that `ncu --csv --page raw` lists: a row of names, one of units, and one for
    each launch. Lines before and between them are the profiler's own."""
    lines = log.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    rows = list(csv.reader(line for line in lines[first:] if line.startswith('"')))
    if len(rows) < 2:
        return []
    names, units, *launches = rows
    kernel = names.index("Kernel Name")
    found = []
    for row in launches:
        counters = {}
        for name, unit, text in zip(names, units, row):
            value = _number(text)
            if "__" in name and value is not None:
                counters[name] = value * _UNITS.get(unit.partition("/")[0], 1.0)
        found.append(Launch(row[kernel], counters))
    return found


def _number(text: str) -> float | None:
    """With commas between thousands; None for "n/a" and the like."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def by_case(launches: Sequence[Launch]) -> list[list[Launch]]:
    """The launches behind each marking one; an item first for those before all of them."""
    found: list[list[Launch]] = [[]]
    for launch in launches:
        if launch.is_mark:
            found.append([])
        else:
            found[-1].append(launch)
    return found


# ------------------------------------------------------------------------------------------ cases

What = Literal["add_lora", "bfloat16", "int8", "float8_e4m3fn", "gradients"]
_DTYPES: tuple[What, ...] = ("bfloat16", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Profiled:
    """One call: `add_lora`; the same of one part with stacks in either dtype; or forward and
    backward.

    Raises:
      ValueError: no such call, or the rank is that of the marking launches.
    """

    case: Case | gradients.Case
    what: What = "add_lora"

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"what must be one of {get_args(What)}, got {self.what!r:.60}")
        ranks = self.case.adapter_ranks if isinstance(self.case, Case) else (self.case.r,)
        if _MARK_RANK in ranks:
            raise ValueError(f"no case may have rank {_MARK_RANK}: {self.case.label}")

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Profiled":
        """Takes the fields of a case, and "what" unless that is the default."""
        fields = {**given}
        what = fields.pop("what", "add_lora")
        return cls(gradients.Case(**fields) if what == "gradients" else Case(**fields), what)

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, **dataclasses.asdict(self.case)}

    @property
    def label(self) -> str:
        return self.case.label + ("" if self.what == "add_lora" else f" {self.what}")


# Old misses of the aim, and what lost to a peer: docs/lab/2026-11.md, "From 65 to 4096 tokens".
_MISSED = [Case(64, 1, 64), Case(64, 1, 128), Case(64, 8, 256, L=16)]
_MISSED += [Case(4096, 1, 128), Case(4096, 8, 256, L=16), Case(4096, 8, 512, L=16)]
_LOST = (
    "T=65 D=64 r=128 28672x28672",
    "T=128 D=2 r=128 14336x28672",
    "T=256 D=32 r=64 28672x14336",
    "T=256 D=64 r=128 8192x28672 1-75 each shuffled",
    "T=512 D=8 r=64 2048x14336 shuffled",
    "T=512 D=64 r=128 1-449 each",
    "T=1024 D=32 r=128 28672x2048 8-260 each shuffled",
    "T=1024 D=64 r=16/32/64/128 2048x4096",
    "T=1536 D=32 r=16/32/64/128 14336x14336",
    "T=3072 D=32 r=16/32/64/128 28672x14336",
    "T=3072 D=64 r=16/32/64/128 8192x8192",
    "T=3072 D=64 r=16/32/64/128 14336x2048",
    "T=4096 D=16 r=128 14336x8192 76-1215 each shuffled",
    "T=4096 D=64 r=128 4096x2048 14-886 each shuffled",
)
_GRADIENTS = [
    gradients.Case(64, 64, 8, 8192, 8192, "zipf"),
    gradients.Case(1024, 32, 8, 14336, 4096),
    gradients.Case(1024, 2, 128, 14336, 4096, "shuffled"),
    gradients.Case(16384, 8, 16, order="shuffled"),
]
_DRAWN = dict.fromkeys(case for seed in (0, 1) for case in grid(seed, 120))
GROUPS = {
    "missed": [Profiled(case) for case in _MISSED],
    "bits": [Profiled(Case(64, 64, 64), dtype) for dtype in _DTYPES],
    "gradients": [Profiled(case, "gradients") for case in _GRADIENTS],
    "peers": [Profiled(case) for case in _DRAWN if case.label in _LOST],
}
_DEFAULT = [*GROUPS]


def cases_of(names: str) -> list[Profiled]:
    """The cases of GROUPS' names and of JSON files, which commas separate.

    Raises:
      FileNotFoundError: neither a group nor a file.
      ValueError: a file is no list of cases, or a case can't be.
    """
    found = []
    for name in names.split(","):
        path = Path(name)
        if name in GROUPS:
            found += GROUPS[name]
        elif path.is_file():
            try:
                found += [Profiled.of(case) for case in json.loads(path.read_text())]
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{name!r:.99} must be a JSON list of cases: {error}") from None
        else:
            raise FileNotFoundError(f"cases must be {', '.join(GROUPS)} or files, got {name!r:.99}")
    return found


# --------------------------------------------------------------------------------- what is profiled

Step = tuple[Callable[..., Any], list[np.ndarray]]


def step_of(profiled: Profiled) -> Step:
    """What is to be compiled, and its operands on the host."""
    case = profiled.case
    if isinstance(case, gradients.Case):
        return _gradients_of(case)
    if profiled.what == "add_lora":
        return call_of(case, segments_of(case), case.phase), operands(case)
    run = eight_bits.Run(case, profiled.what)
    y, x, a, b = operands(case)
    return run.call(), [y, x, *run.operands((a.astype(np.float32), b.astype(np.float32)))]


def _gradients_of(case: gradients.Case) -> Step:
    y, x, a, b = operands(Case(case.T, case.D, case.r, case.H, case.N, L=case.slots))
    ids = jnp.asarray(case.ids())
    segments: Segments = jax.jit(make_segments, static_argnums=1)(ids, case.slots)

    def step(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x, a, b: add_lora(y, x, a, b, segments), x, a, b)
        return out, *pull(dy)

    return step, [y, x, a, b, np.roll(y, 1)]


def _compiled(profiled: Profiled) -> Step:
    step, given = step_of(profiled)
    return jax.jit(step).lower(*given).compile(), given


def _run(step: Step) -> None:
    compiled, given = step
    jax.block_until_ready(compiled(*map(jax.device_put, given)))


def run_all(profiled: Sequence[Profiled], end: float) -> dict[str, Any]:
    """Runs each case once behind a marking launch, and starts none after `end`, a `time.time()`.

    Returns the device, how many cases were "started", and by their numbers what "failed".
    """
    marking = jax.jit(call_of(MARK, segments_of(MARK), MARK.phase)), operands(MARK)
    failed: dict[int, str] = {}
    started = 0
    for one in profiled:
        if time.time() > end:
            break
        _run(marking)
        try:
            _run(_compiled(one))
        except Exception as reason:  # others may run
            failed[started] = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        started += 1
    device = jax.devices()[0].device_kind
    return {"device": device, "started": started, "failed": failed}


def child(path: Path) -> None:
    """What `ncu` starts. It ends, come what may, before the one that waits for it gives up: only
    then does `ncu` list what it has."""
    job = json.loads(path.read_text())
    over = threading.Timer(job["end"] - time.time() + _GRACE_S, os._exit, [0])
    over.daemon = True
    over.start()
    done = run_all([Profiled.of(case) for case in job["cases"]], job["end"])
    Path(job["done"]).write_text(json.dumps(done))


# ---------------------------------------------------------------------------------------- profiler


@dataclasses.dataclass(frozen=True)
class Result:
    """A case's launches; `note`: why it has none, or what is wrong."""

    profiled: Profiled
    launches: list[Launch]
    note: str = ""

    @property
    def lines(self) -> list[str]:
        head = self.profiled.label + (f": {self.note}" if self.note else "")
        return [head, *(f"  {launch.line}" for launch in self.launches)]

    def to_dict(self) -> dict[str, Any]:
        kernels = [
            {"kernel": one.kernel, **one.derived(), "counters": one.counters}
            for one in self.launches
        ]
        label = self.profiled.label
        whole = {"label": label, **self.profiled.to_dict(), "note": self.note, "launches": kernels}
        return _without_nan(whole)


def _without_nan(value: Any) -> Any:
    """None for each number that JSON has not."""
    match value:
        case dict():
            return {key: _without_nan(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_nan(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value


def ncu_command(
    ncu: str, metrics: Sequence[str], kernels: str, caches: str, log: Path, job: Path
) -> list[str]:
    """`ncu` of a process that runs the job, with its own lines and the table of launches in `log`.

    `caches` are flushed before each replay ("all"), or left as they are ("none").
    """
    return [
        *(ncu, "--clock-control", "none", "--cache-control", caches),
        *("--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
        *("--kernel-name", f"regex:{kernels}", "--metrics", ",".join(metrics)),
        # Where the profiled process ends by a signal, Python says what it was at.
        *(sys.executable, "-X", "faulthandler", "-m", "benchmarks.counters", "--child", str(job)),
    ]


def unknown_metrics(log: str) -> set[str]:
    """Those that `ncu` says it has not on this GPU."""
    found = set(re.findall(r"Failed to find metric (\S+)", log))
    for names in re.findall(r"Failed to access the following \d+ metrics: (.+)", log):
        found.update(name.strip() for name in names.split(","))
    return found


def profile(
    profiled: Sequence[Profiled],
    end: float,
    *,
    ncu: str,
    kernels: str = "lora",
    caches: str = "all",
) -> tuple[str, list[Result]]:
    """The device, and each case's launches of kernels whose names hold `kernels`, by one run of
    `ncu`; by a second one where it lacks some of the metrics.

    Raises:
      RuntimeError: `ncu` listed no launch; with the end of what it said.
    """
    metrics = [*METRICS]
    for _ in range(2):
        log, done = _profiled_once(profiled, end, ncu, metrics, kernels, caches)
        launches = launches_of(log)
        lacking = unknown_metrics(log).intersection(metrics)
        if launches or not lacking:
            break
        print(f"ncu lacks {', '.join(sorted(lacking))}", flush=True)
        metrics = [name for name in metrics if name not in lacking]
    if not launches:
        tail = "\n".join(log.splitlines()[-25:]) or "nothing"
        raise RuntimeError(f"ncu listed no launch. It said:\n{tail}")
    errors = [line for line in log.splitlines() if line.startswith("==ERROR==")]
    if errors:  # it may have ended early; the launches that it lists are right
        print(*errors[:10], sep="\n", flush=True)
    before, *behind = by_case(launches)
    if before:
        names = ", ".join(sorted({launch.kernel for launch in before}))
        print(f"{len(before)} launches before the first case, of {names:.300}", flush=True)
    failed = done.get("failed", {})
    results = []
    for n, one in enumerate(profiled):
        mine = behind[n] if n < len(behind) else []
        missing = "no kernel" if n < len(behind) else "not started"
        results.append(Result(one, mine, failed.get(str(n), "" if mine else missing)))
    return done.get("device", "?"), results


def _profiled_once(
    profiled: Sequence[Profiled],
    end: float,
    ncu: str,
    metrics: Sequence[str],
    kernels: str,
    caches: str,
) -> tuple[str, dict[str, Any]]:
    """What `ncu` wrote, and what the process that it ran told."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        log, job, done = (Path(temporary) / name for name in ("log", "job.json", "done.json"))
        cases = [one.to_dict() for one in profiled]
        job.write_text(json.dumps({"cases": cases, "end": end, "done": str(done)}))
        command = ncu_command(ncu, metrics, kernels, caches, log, job)
        with subprocess.Popen(
            command, cwd=_ROOT, env=environment, start_new_session=True
        ) as process:
            try:
                process.wait(max(0.0, end - time.time()) + 2 * _GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        said = log.read_text(errors="replace") if log.exists() else ""
        said += f"\nncu ended with status {process.wait()}"
        return said, json.loads(done.read_text()) if done.exists() else {}


# -------------------------------------------------------------------------------------------- main


def find_ncu(name: str) -> str:
    """The program's path; of `ncu` also where it installs itself.

    Raises:
      FileNotFoundError: there is none.
    """
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    found = shutil.which(name) or (str(installed[-1]) if name == "ncu" and installed else None)
    if found is None:
        raise FileNotFoundError(f"Nsight Compute's {name!r:.99} is not on the PATH: give --ncu")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    several = f"of {', '.join(GROUPS)} and JSON files, with commas"
    parser.add_argument("--cases", nargs="*", default=_DEFAULT, help=several)
    parser.add_argument("--out", type=Path, help="a JSON file for all counters")
    parser.add_argument("--seconds", type=float, default=120, help="after which no case starts")
    parser.add_argument("--ncu", default="ncu", help="the profiler")
    parser.add_argument("--kernels", default="lora", help="a pattern of the names to profile")
    parser.add_argument(
        "--caches", choices=["all", "none"], default="all", help="flushed before each replay"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.child is not None:
        child(given.child)
        return 0
    end = time.time() + given.seconds
    try:
        runs, ncu = [cases_of(names) for names in given.cases], find_ncu(given.ncu)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results: list[Result] = []
    failures = 0
    # One that ends the process takes what `ncu` has of all its cases: those are then run alone.
    waiting = collections.deque(
        batch for profiled in runs for batch in itertools.batched(profiled, _CASES_OF_A_RUN)
    )
    while waiting:
        batch = waiting.popleft()
        if time.time() >= end:
            print(f"not started: {', '.join(one.label for one in batch)}", flush=True)
            continue
        try:
            device, found = profile(batch, end, ncu=ncu, kernels=given.kernels, caches=given.caches)
        except RuntimeError as error:
            print(f"{', '.join(one.label for one in batch)}: {error}", flush=True)
            waiting += [(one,) for one in batch] if len(batch) > 1 else []
            failures += len(batch) == 1
            continue
        print(f"{device}, jax {jax.__version__}, caches flushed: {given.caches}")
        print(*(line for result in found for line in result.lines), sep="\n", flush=True)
        results += found
        if given.out is not None:
            report = {"device": device, "date": time.strftime("%Y-%m-%d"), "caches": given.caches}
            cases = [result.to_dict() for result in results]
            given.out.write_text(json.dumps({**report, "cases": cases}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
