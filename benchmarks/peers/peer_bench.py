"""Times vLLM's and SGLang's multi-LoRA kernels: y += (x @ A[i].T) @ B[i].T, per call, in a CUDA graph.

Each case runs over several weight sets, together larger than the L2 cache, so the adapters come from device
memory as they do between two layers of a real model. Every result is checked against float32 first.

    python3 peer_bench.py --cases cases.json --out peers.json

benchmarks/peer_runs.py writes the cases: T, H, N, `r`, the adapter of each token in `ids`, the rank of each slot
in `ranks`. Adapters of smaller rank than r are padded with zeros, as vLLM and SGLang pad them; SGLang's kernels
read their own rank alone. Peers: vllm (lora_shrink + lora_expand), csgmv (SGLang's default), sgl_v2 (SGLang's
plan-driven backend). Where SGLang may choose between two chunk sizes or two phases, the faster counts.
"""

import argparse
import functools
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import stubs  # noqa: F401  (must come first)
import torch
from turns import Turns  # type: ignore[import-not-found]

DEV = "cuda"
Case = dict[str, int]
Set = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x, A, B, y
Call = Callable[[], object]


class Tokens:
    """The adapter of each token, and the rank of each slot."""

    def __init__(self, ids: list[int], ranks: list[int]) -> None:
        self.ids, self.ranks = (
            torch.tensor(v, device=DEV, dtype=torch.int32) for v in (ids, ranks)
        )
        self.slots = len(ranks)
        self.adapters = len(set(ids))


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


def make(case: Case, tokens: Tokens) -> list[Set]:
    """As many sets as exceed the L2 cache."""
    slots = tokens.slots
    adapter_bytes = 2 * int(tokens.ranks.sum()) * (case["H"] + case["N"])
    live = torch.arange(case["r"], device=DEV) < tokens.ranks[:, None]
    sets = []
    for _ in range(max(4, min(16, -(-200_000_000 // adapter_bytes)))):
        a = (torch.randn(slots, case["r"], case["H"], device=DEV) / case["H"] ** 0.5).bfloat16()
        b = torch.randn(slots, case["N"], case["r"], device=DEV).bfloat16()
        a.masked_fill_(~live[:, :, None], 0)
        b.masked_fill_(~live[:, None, :], 0)
        x = torch.randn(case["T"], case["H"], device=DEV).bfloat16()
        y = torch.randn(case["T"], case["N"], device=DEV).bfloat16()
        sets.append((x, a, b, y))
    return sets


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


def vllm(case: Case, sets: list[Set], tokens: Tokens) -> list[Call]:
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    meta = LoRAKernelMeta.make(tokens.slots, case["T"], DEV)
    meta.prepare_tensors(tokens.ids)
    args = meta.meta_args(case["T"], True)

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Call:
        v = torch.empty(1, case["T"], case["r"], device=DEV, dtype=torch.float32)
        return lambda: (
            _lora_shrink(x, [a], v, *args, 1.0),
            _lora_expand(v, [b], y, *args, 0, True),
        )

    return [one(*s) for s in sets]


def forget_vllm() -> None:
    """Drops the weights that vLLM keeps by their address, else they would fill the memory."""
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


def csgmv(case: Case, sets: list[Set], tokens: Tokens, chunk: int) -> list[Call]:
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import (
        chunked_sgmv_lora_expand_forward as expand,
    )
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import (
        chunked_sgmv_lora_shrink_forward as shrink,
    )
    from sglang.srt.lora.utils import LoRABatchInfo

    # SGLang sorts the tokens by adapter and cuts each adapter's into chunks.
    order = torch.argsort(tokens.ids, stable=True)
    adapters, counts = torch.unique_consecutive(tokens.ids[order], return_counts=True)
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
        lora_ranks=tokens.ranks,
        scalings=torch.ones(tokens.slots, device=DEV),
        permutation=order.to(torch.int32),
    )
    offsets = i32([0, case["N"]])

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> Call:
        return lambda: expand(shrink(x, a, info, 1), b, info, offsets, case["N"], y)

    return [one(*s) for s in sets]


def sgl_v2(case: Case, sets: list[Set], tokens: Tokens, phase: str) -> list[Call]:
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
        LoraWorkspace(), max_loras=tokens.slots, device=torch.device("cuda", 0)
    )
    runner.begin_batch(
        token_slots=tokens.ids,
        lora_ranks=tokens.ranks,
        scalings=torch.ones(tokens.slots, device=DEV),
        num_tokens=case["T"],
        graph_mode=False,
        phase=Phase(phase),
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


def variants(case: Case, tokens: Tokens) -> dict[str, list[Callable[[list[Set]], list[Call]]]]:
    """What each peer may run. SGLang's chunk follows from T, and is 16 unless a user allows more: for short runs
    that may be the faster. A step of 65 to 1024 tokens may be a decode or hold a chunk of a prompt."""
    count = case["T"]
    chunk = 128 if count >= 256 else 32 if count >= 64 else 16
    chunks = [chunk, *[16] * (chunk > 16 and count < chunk * tokens.adapters)]
    phases = ["decode"] * (count <= 1024) + ["prefill"] * (count > 64)
    return {
        "vllm": [functools.partial(vllm, case, tokens=tokens)],
        "csgmv": [functools.partial(csgmv, case, tokens=tokens, chunk=size) for size in chunks],
        "sgl_v2": [functools.partial(sgl_v2, case, tokens=tokens, phase=name) for name in phases],
    }


def prepare(
    runs: list[Callable[[list[Set]], list[Call]]], sets: list[Set], ids: torch.Tensor
) -> list[list[Call]] | str:
    """What of these gives the right result, its kernels compiled; or why nothing does."""
    ready, reason = [], ""
    for run in runs:
        try:
            fns = run(sets)
            error = rel_error(fns[0], sets[0], ids)
            if error < 1e-2:
                ready.append(fns)
            else:
                reason = f"wrong: {error:.1e}"
        except Exception as e:  # a peer that cannot run a case is a result
            reason = f"fails: {type(e).__name__}"
            traceback.print_exc(limit=1)
    torch.cuda.synchronize()
    return ready or reason


def fastest(ready: list[list[Call]] | str) -> float | str:
    """Microseconds of the fastest, or why there are none."""
    if isinstance(ready, str):
        return ready
    try:
        return min(round(graph_us(fns), 2) for fns in ready)
    except Exception as e:
        traceback.print_exc(limit=1)
        return f"fails: {type(e).__name__}"


def time_case(case: Case, tokens: Tokens, turns: Turns) -> dict[str, float | str]:
    with turns.shared():
        sets = make(case, tokens)
        runs = variants(case, tokens)
        ready = {peer: prepare(runs[peer], sets, tokens.ids) for peer in runs}
    with turns.alone():
        row = {peer: fastest(ready[peer]) for peer in ready}
        torch.cuda.synchronize()
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--turns", help="file by which processes on this GPU take turns")
    args = parser.parse_args()
    turns = Turns(args.turns)
    with turns.shared():
        torch.cuda.init()
    rows: list[dict[str, float | str]] = []
    for case in json.loads(Path(args.cases).read_text()):
        tokens = Tokens(case.pop("ids"), case.pop("ranks"))
        row = time_case(case, tokens, turns)
        print(json.dumps({**case, **row}), flush=True)
        rows.append(row)
        Path(args.out).write_text(
            json.dumps(dict(rows=rows))
        )  # so far: a later case may end the process
        with turns.shared():
            forget_vllm()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
