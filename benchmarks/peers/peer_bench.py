"""Times vLLM's and SGLang's multi-LoRA kernels: y += scale * (x @ A[i].T) @ B[i].T, per call, in a CUDA graph.

Each case runs over several weight sets, together larger than the L2 cache, so the adapters come from device
memory as they do between two layers of a real model. Every result is checked against float32 first.

    python3 peer_bench.py [--cases cases.json] [--out peers.json]

`floor_us` is the fewest bytes the case must move (each adapter in use once, x once, y read and written) over the
copy bandwidth measured in the same run. Columns: vllm (lora_shrink + lora_expand), csgmv (SGLang's default),
sgl_v2 (SGLang's plan-driven backend), base_gemm (the dense projection the LoRA sits on, cuBLAS).
"""

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import stubs  # noqa: F401  (must come first)
import torch

DEV = "cuda"
Case = dict[str, int]
Set = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x, A, B, y
Call = Callable[[], object]
CASES = [
    dict(T=t, D=d, r=r, H=4096, N=4096, L=64)
    for r in (8, 16, 64, 128)
    for t, d in ((1, 1), (16, 16), (64, 64), (64, 8), (64, 1), (256, 64), (4096, 32), (4096, 1))
]
CASES += [
    dict(T=64, D=8, r=16, H=h, N=n, L=64) for h, n in ((4096, 14336), (14336, 4096), (2048, 2048))
]


def graph_us(fns: Sequence[Call], reps: int = 20) -> float:
    """Median microseconds per closure when all closures are replayed as one CUDA graph."""
    for fn in fns:
        fn()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for fn in fns:
            fn()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for fn in fns:
                fn()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(reps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(fns))
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    src = torch.empty(1 << 30, device=DEV, dtype=torch.uint8).random_()
    dst = torch.empty_like(src)
    return 2 * src.numel() / (graph_us([lambda: dst.copy_(src)]) * 1e-6)


def make(case: Case) -> tuple[list[Set], torch.Tensor]:
    adapter_bytes = 2 * case["L"] * case["r"] * (case["H"] + case["N"])
    sets = []
    for _ in range(max(4, min(16, -(-200_000_000 // adapter_bytes)))):
        a = (torch.randn(case["L"], case["r"], case["H"], device=DEV) / case["H"] ** 0.5).bfloat16()
        b = torch.randn(case["L"], case["N"], case["r"], device=DEV).bfloat16()
        x = torch.randn(case["T"], case["H"], device=DEV).bfloat16()
        y = torch.randn(case["T"], case["N"], device=DEV).bfloat16()
        sets.append((x, a, b, y))
    ids = (
        torch.randperm(case["L"], device=DEV)[: case["D"]]
        .repeat_interleave(case["T"] // case["D"])
        .to(torch.int32)
    )
    return sets, ids


def rel_error(fn: Call, tensors: Set, ids: torch.Tensor) -> float:
    x, a, b, y = tensors
    before, want = y.clone(), y.float().clone()
    for i in ids.unique().tolist():
        rows = ids == i
        want[rows] += (x[rows].float() @ a[i].float().T) @ b[i].float().T
    fn()
    torch.cuda.synchronize()
    error = ((y.float() - want).norm() / want.norm()).item()
    y.copy_(before)
    return error


def vllm(case: Case, sets: list[Set], ids: torch.Tensor) -> list[Call]:
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    meta = LoRAKernelMeta.make(case["L"], case["T"], DEV)
    meta.prepare_tensors(ids)
    args = meta.meta_args(case["T"], True)

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Call:
        v = torch.empty(1, case["T"], case["r"], device=DEV, dtype=torch.float32)
        return lambda: (
            _lora_shrink(x, [a], v, *args, 1.0),
            _lora_expand(v, [b], y, *args, 0, True),
        )

    return [one(*s) for s in sets]


def csgmv(case: Case, sets: list[Set], ids: torch.Tensor) -> list[Call]:
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import (
        chunked_sgmv_lora_expand_forward as expand,
    )
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import (
        chunked_sgmv_lora_shrink_forward as shrink,
    )
    from sglang.srt.lora.utils import LoRABatchInfo

    chunk = 128 if case["T"] >= 256 else 32 if case["T"] >= 64 else 16
    adapters, counts = torch.unique_consecutive(ids, return_counts=True)
    ptr, which = [0], []
    for adapter, count in zip(adapters.tolist(), counts.tolist()):
        while count > 0:
            step = min(chunk, count)
            ptr.append(ptr[-1] + step)
            which.append(adapter)
            count -= step

    def i32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=DEV, dtype=torch.int32)

    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(which),
        num_segments=len(which),
        max_len=chunk,
        seg_lens=None,
        seg_indptr=i32(ptr),
        weight_indices=i32(which),
        lora_ranks=i32([case["r"]] * case["L"]),
        scalings=torch.ones(case["L"], device=DEV),
        permutation=i32([*range(case["T"])]),
    )
    offsets = i32([0, case["N"]])

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Call:
        return lambda: expand(shrink(x, a, info, 1), b, info, offsets, case["N"], y)

    return [one(*s) for s in sets]


def sgl_v2(case: Case, sets: list[Set], ids: torch.Tensor) -> list[Call]:
    import sglang.srt.lora.dense.runner as runner_module
    from sglang.kernels.ops.lora.common.route_view import RouteView, RouteViewKind
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    def build_route(
        token_slots: torch.Tensor, *, max_loras: int, block_size: int, **_: object
    ) -> RouteView:
        """The aligned route, built on the host: routing is metadata, prepared once per step and not timed."""
        slots, pairs, buckets = token_slots.tolist(), [], []
        for slot in range(max_loras):
            rows = [t for t, s in enumerate(slots) if s == slot]
            for i in range(0, len(rows), block_size):
                block = rows[i : i + block_size]
                pairs += block + [len(slots)] * (block_size - len(block))
                buckets.append(slot)
        as_i32 = lambda v: torch.tensor(v, device=DEV, dtype=torch.int32)  # noqa: E731
        return RouteView(
            view=RouteViewKind.ALIGNED,
            block_size=block_size,
            token_slots=token_slots,
            group_ids=None,
            groups_per_slot=1,
            max_loras=max_loras,
            maybe_sorted_pair_ids=as_i32(pairs),
            maybe_block_bucket_ids=as_i32(buckets),
            maybe_num_pairs_post_padded=as_i32([len(pairs)]),
        )

    runner_module.build_route = build_route
    runner = runner_module.DenseLoraRunner(
        LoraWorkspace(), max_loras=case["L"], device=torch.device("cuda", 0)
    )
    runner.begin_batch(
        token_slots=ids,
        lora_ranks=torch.full((case["L"],), case["r"], device=DEV, dtype=torch.int32),
        scalings=torch.ones(case["L"], device=DEV),
        num_tokens=case["T"],
        graph_mode=False,
        phase=Phase.PREFILL if case["T"] > 256 else Phase.DECODE,
    )
    plan = runner.plan_for(
        DenseLoraKind.LINEAR, case["r"], case["H"], case["N"], num_tokens=case["T"]
    )
    if plan.needs_aligned_route:
        runner.route(plan.block_size)

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Call:
        return lambda: runner.run_b(
            runner.run_a(x, a, stack=1, plan=plan), b, y, offsets=(0, case["N"]), plan=plan
        )

    return [one(*s) for s in sets]


def product(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> Call:
    return lambda: torch.mm(x, w.T, out=y)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases")
    parser.add_argument("--out")
    args = parser.parse_args()
    cases = json.loads(Path(args.cases).read_text()) if args.cases else CASES
    bandwidth = copy_bandwidth()
    print(
        torch.cuda.get_device_name(),
        "torch",
        torch.__version__,
        f"copy {bandwidth / 1e9:.0f} GB/s",
        flush=True,
    )
    rows = []
    for case in cases:
        sets, ids = make(case)
        moved = 2 * (
            case["D"] * case["r"] * (case["H"] + case["N"])
            + case["T"] * (case["H"] + 2 * case["N"])
        )
        row: dict[str, object] = {**case, "floor_us": round(moved / bandwidth * 1e6, 2)}
        for peer in (vllm, csgmv, sgl_v2):
            try:
                fns = peer(case, sets, ids)
                error = rel_error(fns[0], sets[0], ids)
                row[peer.__name__] = (
                    round(graph_us(fns), 2) if error < 1e-2 else f"wrong: {error:.1e}"
                )
            except Exception as e:  # a peer that cannot run a case is a result
                row[peer.__name__] = f"fails: {type(e).__name__}"
                traceback.print_exc(limit=1)
        weights = [torch.randn(case["N"], case["H"], device=DEV).bfloat16() for _ in sets[:4]]
        us = graph_us([product(x, y, w) for (x, _, _, y), w in zip(sets, weights)])
        row["base_gemm"] = round(us, 2)
        print(json.dumps(row), flush=True)
        rows.append(row)
        del sets, weights
        torch.cuda.empty_cache()
    if args.out:
        report = dict(device=torch.cuda.get_device_name(), bandwidth=bandwidth, rows=rows)
        Path(args.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
