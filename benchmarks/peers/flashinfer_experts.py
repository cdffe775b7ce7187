"""Times LoRA of experts by FlashInfer's kernels and by ours.

    SOURCE=<a clone of FlashInfer> benchmarks/peers/fetch_flashinfer.sh .peers
    PYTHONPATH=.peers:. XLA_PYTHON_CLIENT_PREALLOCATE=false \\
        python3 benchmarks/peers/flashinfer_experts.py --seconds 540

Cases, batches and banks are those of `benchmarks/experts.py`, as FlashInfer's own benchmark has
them. Each line has microseconds of one projection, A and B, over batches that together read more
than the L2 cache holds. All results are checked against float64 first.

    floor, aim        each A and B in use once, x once, y read and written; 1.08 x floor + 5
    mix, pairs        ours, in a jitted loop: y + delta, bfloat16. Sorting the ids is included
    ragged_dot        the same by `jax.lax.ragged_dot`
    kernels           FlashInfer's shrink and expand alone, in a CUDA graph as all of its times
    delta             what its benchmark times: v and delta are zeroed first, as both kernels add.
                      delta is float32, v bfloat16, and no y is read
    flashinfer        then y += delta, bfloat16: the same work as ours

FlashInfer's kernels take the pairs unsorted, as int64, which are made before. Its launches go to
stream 0, which no CUDA graph captures; here they go to the stream of the caller.
"""

import argparse
import ctypes
import functools
import hashlib
import itertools
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import stubs  # noqa: F401  (must come before peers)
import torch
from peer_bench import graph_us

from benchmarks import experts
from benchmarks.experts import Bank, Batch, ExpertsCase
from interop import to_torch

DEVICE = "cuda"
SOURCE = Path(__file__).with_suffix(".cu")
# FlashInfer's own flags, as far as they concern these kernels.
NVCC = "nvcc -O3 -std=c++17 -use_fast_math -DNDEBUG --expt-relaxed-constexpr -shared"
NVCC += " -Xcompiler -fPIC -gencode=arch=compute_90a,code=sm_90a"
NVCC += " -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16"
PEER_WAYS = ("kernels", "delta", "flashinfer")
WAYS = ("mix", "pairs", *PEER_WAYS, "ragged_dot")
Times = dict[str, Callable[[], float]]


@functools.cache
def library(peers: Path) -> ctypes.CDLL:
    """FlashInfer's kernels, which nvcc compiles in some ten seconds where nobody has yet."""
    headers = peers / "flashinfer"
    read = [SOURCE, *sorted(path for path in headers.rglob("*") if path.is_file())]
    named = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:12]
    made = (peers / f"flashinfer_experts_{named}.so").resolve()
    if not made.exists():
        includes = [f"-I{headers}/{name}" for name in ("csrc/bgmv_moe", "include")]
        compiled = subprocess.run(
            [*NVCC.split(), *includes, str(SOURCE), "-o", str(made)], capture_output=True, text=True
        )
        if compiled.returncode:
            raise RuntimeError(f"nvcc: {compiled.stderr[-1000:]}")
    return ctypes.CDLL(str(made))


class Call:
    """FlashInfer's kernels for one batch; each method is one of the ways in PEER_WAYS."""

    def __init__(
        self, case: ExpertsCase, seed: int, batch: Batch, bank: Bank, library: ctypes.CDLL
    ) -> None:
        self.case, self.library = case, library
        slots, chosen = (
            torch.tensor(t, device=DEVICE).long() for t in case.slots_and_experts(seed)
        )
        tokens = torch.arange(case.tokens, device=DEVICE).repeat_interleave(case.top)
        pairs, self.y = len(tokens), to_torch(batch.y).clone()
        self.v = torch.zeros(pairs, case.rank, device=DEVICE, dtype=torch.bfloat16)
        self.summed = torch.zeros(case.tokens, case.features, device=DEVICE)
        x, weights = to_torch(batch.x), to_torch(batch.weights)
        a, b = (self._pointers(to_torch(stack)) for stack in bank)
        starts = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        stride = case.experts * case.rank * case.features
        counts = (pairs, case.experts, case.tokens, stride)
        ids = (tokens, chosen.reshape(-1), slots)
        self.shrink = (self.v, x, a, *ids, *counts)
        self.expand = (self.summed, self.v, b, *ids, weights, starts, *counts)

    def _pointers(self, stack: torch.Tensor) -> torch.Tensor:
        """Where the first slot's adapter of each expert is."""
        each = torch.arange(self.case.experts, device=DEVICE)
        return stack.data_ptr() + each * stack[0].nbytes

    def _launch(self, name: str, *given: torch.Tensor | int) -> None:
        of_c = (
            ctypes.c_void_p(one.data_ptr())
            if isinstance(one, torch.Tensor)
            else ctypes.c_int64(one)
            for one in given
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, name)(stream, self.case.features, self.case.rank, *of_c)
        if error:
            raise RuntimeError(f"{name} of {self.case}: CUDA error {error} (-1: not compiled)")

    def kernels(self) -> None:
        self._launch("shrink", *self.shrink)
        self._launch("expand", *self.expand)

    def delta(self) -> None:
        self.v.zero_()
        self.summed.zero_()
        self.kernels()

    def flashinfer(self) -> None:
        self.delta()
        self.y.add_(self.summed)


def peer_times(case: ExpertsCase, batches: list[Batch], banks: list[Bank], peers: Path) -> Times:
    """How to time each of PEER_WAYS, after the result was right."""
    both = list(zip(batches, itertools.cycle(banks)))
    calls = [Call(case, seed, *each, library(peers)) for seed, each in enumerate(both)]
    for call, each in list(zip(calls, both))[:2]:
        call.flashinfer()
        experts.check("flashinfer", case, *each, call.y.float().cpu().numpy())
    return {
        way: functools.partial(graph_us, [getattr(call, way) for call in calls])
        for way in PEER_WAYS
    }


def measure(case: ExpertsCase, banks: list[Bank], peers: Path, ways: list[str]) -> None:
    """Prints the line of a case, and below it why a time is missing."""
    floor, batches = case.floor_us(), case.batches()
    print(f"{case!s:20} {floor:8.1f} {1.08 * floor + 5:8.1f}", end="", flush=True)
    timed: Times = {
        way: functools.partial(experts.time_of, case, way, batches, banks) for way in experts.WAYS
    }
    failed: dict[str, Exception] = {}
    if set(ways) & set(PEER_WAYS):
        try:
            timed |= peer_times(case, batches, banks, peers)
        except Exception as error:
            failed["FlashInfer"] = error
    for way in ways:
        took = "-"
        if way in timed:
            try:
                took = f"{timed[way]():.1f}"
            except Exception as error:
                failed[way] = error
        print(f" {took:>11}", end="", flush=True)
    print(flush=True)
    for name, reason in failed.items():
        text = " ".join(str(reason).split())
        print(f"    {name}: {type(reason).__name__}: {text[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", default="3072,2688", help="H and N")
    parser.add_argument("--ways", default=",".join(WAYS), help="which to time")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="what was fetched")
    parser.add_argument("--seconds", type=float, default=540, help="no case starts later")
    parser.add_argument("--compile", action="store_true", help="only compile FlashInfer's kernels")
    given = parser.parse_args()
    started = time.monotonic()
    if given.compile:
        print(library(given.peers))
        return
    ways = given.ways.split(",")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, torch {torch.__version__}, microseconds")
    print(f"{'case':20} {'floor':>8} {'aim':>8}", *(f"{way:>11}" for way in ways), flush=True)
    for features in map(int, given.features.split(",")):
        banks: list[Bank] = []
        for case in experts.cases(features):
            if time.monotonic() - started > given.seconds:
                print(f"{case}: not run, {given.seconds:.0f} s are over", flush=True)
                continue
            try:
                banks = banks or case.banks()
                measure(case, banks, given.peers, ways)
            except Exception as error:
                print(f"{case}: {type(error).__name__}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
