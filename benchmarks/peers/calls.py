"""Times `interop.vllm` and `interop.sglang` beside the Triton functions that they stand in for.

    benchmarks/peers/fetch.sh .peers
    PYTHONPATH=.peers:. XLA_PYTHON_CLIENT_PREALLOCATE=false python3 benchmarks/peers/calls.py

Shapes are those of the peers' own benchmarks (vLLM: benchmarks/kernels/benchmark_lora.py, of its
defaults rank 16, 4 adapters and 4096 features; SGLang: the cases of its lora_csgmv benchmark), and
a decode step. Up to 1024 tokens a time is that of a call in a CUDA graph over several sets of
weights, which together exceed the L2 cache; beyond, of ten calls in a row. Results are compared
before they are timed, and with `--check` not timed.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import stubs  # noqa: F401  (must come first)
import torch
from peer_bench import forget_vllm, graph_us
from sglang.kernels.ops.lora.dense import chunked_sgmv_expand, chunked_sgmv_shrink
from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

from interop import capture, sglang, vllm

Call = Callable[[], torch.Tensor]
WIDTHS = {1: (4096,), 2: (14336, 14336), 3: (4096, 1024, 1024)}


class Case(NamedTuple):
    tokens: int
    adapters: int
    rank: int
    slices: int
    features: int = 4096

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    def ids(self) -> torch.Tensor:
        return torch.arange(self.tokens, device="cuda", dtype=torch.int32) % self.adapters


VLLM = [Case(t, 4, 16, s) for s in (1, 3) for t in (1, 16, 64, 256, 512, 1024, 4096)]
SGLANG = [
    Case(64, 8, 16, 1), Case(64, 8, 16, 3), Case(256, 8, 16, 3), Case(512, 8, 64, 1),
    Case(1024, 8, 32, 2), Case(2048, 16, 64, 1), Case(4096, 8, 32, 1), Case(8192, 16, 64, 1),
]  # fmt: skip


def of_vllm(case: Case) -> dict[str, tuple[Call, Call]]:
    """Each of vLLM's functions as theirs and as ours, on tensors of one layer."""
    meta = LoRAKernelMeta.make(case.adapters, case.tokens, "cuda")
    meta.prepare_tensors(case.ids())
    args = meta.meta_args(case.tokens, True)
    widths = WIDTHS[case.slices]
    x, y = case.normal(case.tokens, case.features), case.normal(case.tokens, sum(widths))
    a = [case.normal(case.adapters, case.rank, case.features, scale=0.02) for _ in widths]
    b = [case.normal(case.adapters, n, case.rank) for n in widths]
    v = torch.randn(case.slices, case.tokens, case.rank, device="cuda")
    others = args[0], args[5], 1.0

    def shrink(op: Callable[..., Any]) -> Call:
        return lambda: (op(x, a, v, *args, 1.0), v)[1]

    def expand(op: Callable[..., Any]) -> Call:
        return lambda: (op(v, b, y, *args, 0, True), y)[1]

    def both() -> torch.Tensor:
        _lora_shrink(x, a, v, *args, 1.0)
        _lora_expand(v, b, y, *args, 0, True)
        return y

    return {
        "shrink": (shrink(_lora_shrink), shrink(vllm.lora_shrink)),
        "expand": (expand(_lora_expand), expand(vllm.lora_expand)),
        "linear": (both, lambda: (vllm.add_lora_linear(y, x, a, b, *others), y)[1]),
    }


@functools.lru_cache(maxsize=1)
def batch_info(case: Case) -> Any:
    """SGLang's metadata of a batch: one object for all sets, as for all layers of a step."""
    ids = case.ids()
    order = torch.argsort(ids, stable=True)
    chunk = 128 if case.tokens >= 256 else 32 if case.tokens >= 64 else 16
    segments = [group.split(chunk) for group in ids[order].split(case.tokens // case.adapters)]
    flat = [segment for group in segments for segment in group]
    ends = torch.tensor([0, *map(len, flat)], device="cuda").cumsum(0).int()
    from sglang.srt.lora.utils import LoRABatchInfo

    return LoRABatchInfo(
        use_cuda_graph=False, bs=len(flat), num_segments=len(flat), max_len=chunk, seg_lens=None,
        seg_indptr=ends, weight_indices=torch.stack([segment[0] for segment in flat]),
        lora_ranks=torch.full_like(ids[: case.adapters], case.rank),
        scalings=torch.ones(case.adapters, device="cuda"), permutation=order.int(),
    )  # fmt: skip


def of_sglang(case: Case) -> dict[str, tuple[Call, Call]]:
    """Each of SGLang's functions as theirs and as ours, on tensors of one layer."""
    info = batch_info(case)
    widths = WIDTHS[case.slices]
    on_cpu = torch.tensor([0, *widths]).cumsum(0).int()
    x, y = case.normal(case.tokens, case.features), case.normal(case.tokens, sum(widths))
    a = case.normal(case.adapters, case.slices * case.rank, case.features, scale=0.02)
    b = case.normal(case.adapters, sum(widths), case.rank)
    v = case.normal(case.tokens, case.slices * case.rank)
    offsets = on_cpu.cuda()

    def shrink(op: Callable[..., Any]) -> Call:
        return lambda: op(x, a, info, case.slices)

    def expand(op: Callable[..., Any]) -> Call:
        return lambda: op(v, b, info, offsets, max(widths), y, on_cpu)

    theirs = (
        chunked_sgmv_shrink.chunked_sgmv_lora_shrink_forward,
        chunked_sgmv_expand.chunked_sgmv_lora_expand_forward,
    )
    mine = sglang.chunked_sgmv_lora_shrink_forward, sglang.chunked_sgmv_lora_expand_forward
    return {
        "shrink": (shrink(theirs[0]), shrink(mine[0])),
        "expand": (expand(theirs[1]), expand(mine[1])),
    }


def eager_us(fns: list[Call]) -> float:
    """Microseconds per call of ten in a row, without a graph."""
    for fn in fns:
        fn()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            for fn in fns:
                fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (10 * len(fns)))
    return sorted(times)[3]


def difference(theirs: Call, mine: Call) -> float:
    """Relative difference of what they add to zeros."""
    results = []
    for call in (theirs, mine):
        call().zero_()  # what an expand adds to
        results.append(call().float())
    return float((results[0] - results[1]).norm() / results[0].norm())


def main(check: bool) -> None:
    for name, cases, make in (("vllm", VLLM, of_vllm), ("sglang", SGLANG, of_sglang)):
        for case in cases:
            nbytes = 2 * case.adapters * case.rank * (case.features + sum(WIDTHS[case.slices]))
            rotated = 1 if check else max(4, min(16, 200_000_000 // nbytes))
            sets = [make(case) for _ in range(rotated)]
            timed = graph_us if case.tokens <= capture.MOST_TOKENS else eager_us
            for op in sets[0]:
                row = {"peer": name, "op": op, **case._asdict()}
                row["differ"] = difference(*sets[0][op])
                for n, whose in enumerate(() if check else ("theirs", "ours")):
                    row[whose] = round(timed([one[op][n] for one in sets]), 1)
                print(json.dumps(row), flush=True)
            del sets
            forget_vllm()  # what it keeps by the addresses of weights that are gone
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main("--check" in sys.argv)
