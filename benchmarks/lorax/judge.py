"""LoRAX's Triton ops beside ours on random cases; float64 judges both.

    benchmarks/lorax/fetch.sh && python3 -m benchmarks.lorax.judge .lorax [--cases 240]

In every case nothing outside the rows and columns that it names changes a byte, by either; and our
relative error is not above LoRAX's. A tie is 1 % of theirs, or an error of both below what float32
rounds in a sum of n terms, sqrt(n) / 2^24. Ours run natively where that is possible.
Exits with 1 if we lose one.
"""

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Op = Callable[..., object]

OPS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice",
       "sgmv_shrink", "sgmv_expand", "sgmv_expand_slice")  # fmt: skip


def draw(number: int) -> dict[str, Any]:
    """Case `number`: which op and with what; the tensors follow from it too."""
    rng = random.Random(number)
    op = OPS[number % len(OPS)]
    return dict(
        number=number,
        op=op,
        T=rng.choice([1, 2, 7, 16, 33, 64, 100, 150]),
        H=rng.choice([64, 256, 1000, 1024, 4096]),
        N=rng.choice([64, 96, 256, 1000, 1024, 2048]),
        R=rng.choice([8, 16, 32, 48, 64, 128]),
        L=rng.choice([1, 3, 8, 32]),
        dtype=rng.choice(["float16", "bfloat16"]),
        v_dtype=rng.choice(["float32", "weights"]),
        y_dtype=rng.choice(["float32", "weights"]),
        ids=rng.choice(["int32", "int64"]),
        four_dim=rng.random() < 0.5,
        add_inputs=rng.random() < 0.7,
        scaling=rng.choice([1.0, 0.5, 2.75]),
        offset=8 * rng.randrange(0, 20),
    )


def modules(folder: str) -> tuple[dict[str, Op], dict[str, Op]]:
    sys.path.insert(0, folder)
    # A launch cache for Triton 2, which says of itself that Triton 3 makes it superfluous.
    cache = types.ModuleType("libentry")
    cache.__dict__["libentry"] = lambda: lambda kernel: kernel
    sys.modules["lorax_server.utils.ops.libentry"] = cache
    theirs = {op: getattr(importlib.import_module(f"lorax_server.utils.ops.{op}"), op)
              for op in OPS}  # fmt: skip
    import interop

    return theirs, {op: getattr(interop, op) for op in OPS}


def on_best_path(op: Op, *arguments: object) -> str:
    """Calls it as `path=None` does; returns which path that was."""
    try:
        op(*arguments, path="native")
    except NotImplementedError:
        op(*arguments, path="dlpack")
        return "dlpack"
    return "native"


def judge(folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """Both relative errors of one case, and what is wrong with either."""
    import torch

    theirs, ours = modules(folder)
    op, t, r, slots = case["op"], case["T"], case["R"], case["L"]
    rng, dtype = random.Random(case["number"] + 10**6), getattr(torch, case["dtype"])
    torch.manual_seed(case["number"])
    shrink = "shrink" in op
    width = r if shrink else case["N"]
    depth = case["H"] if shrink else r
    weights = (torch.randn(slots, width, depth, device="cuda") / depth**0.5).to(dtype)
    given = weights.unsqueeze(1) if case["four_dim"] else weights
    in_dtype = dtype if shrink or case["v_dtype"] == "weights" else torch.float32
    inputs = torch.randn(t, depth, device="cuda").to(in_dtype)
    out_dtype = torch.float32 if shrink or case["y_dtype"] == "float32" else dtype
    offset = case["offset"] if "slice" in op else 0
    columns = slice(offset, offset + width)
    before = torch.randn(t, offset + width + (24 if "slice" in op else 0), device="cuda")
    before = before.to(out_dtype)

    id_dtype = getattr(torch, case["ids"])
    if op.startswith("sgmv"):
        cuts = sorted(rng.sample(range(1, t), min(t - 1, rng.randrange(0, 6))))
        starts, stops = [0, *cuts], [*cuts, t]
        per_segment = [rng.randrange(-1, slots) for _ in starts]
        lengths = [b - a for a, b in zip(starts, stops)]
        per_token = [i for i, n in zip(per_segment, lengths) for _ in range(n)]
        index = [torch.tensor(v, dtype=id_dtype, device="cuda")
                 for v in (starts, lengths, per_segment)]  # fmt: skip
        how = [*index, len(starts), max(lengths)]
    else:
        per_token = [rng.randrange(-1, slots) for _ in range(t)]
        how = [torch.tensor(per_token, dtype=id_dtype, device="cuda")]
    if shrink:
        how.append(case["scaling"])
    elif "slice" in op:
        how += [offset, width, case["add_inputs"]]
    else:
        how.append(case["add_inputs"])

    # In float64, with the rounding of v that both make (LoRAX's CAST_TYPE) left to either.
    ids = torch.tensor(per_token, device="cuda")
    used = ids >= 0
    delta = torch.einsum("tk,tnk->tn", inputs[used].double(), weights[ids[used]].double())
    keep = 1.0 if shrink or case["add_inputs"] else 0.0
    scale = case["scaling"] if shrink else 1.0
    want = before[used][:, columns].double() * keep + scale * delta

    result: dict[str, Any] = dict(case=case, problems=[])
    for name in ("theirs", "ours"):
        out = before.clone()
        if name == "theirs":
            theirs[op](inputs, given, out, *how)
        else:
            result["path"] = on_best_path(ours[op], inputs, given, out, *how)
        torch.cuda.synchronize()
        untouched = torch.ones_like(out, dtype=torch.bool)
        rows = used.nonzero().squeeze(1)
        untouched[rows, columns] = False
        if not torch.equal(out[untouched].view(torch.uint8), before[untouched].view(torch.uint8)):
            result["problems"].append(f"{name} changed what the case does not name")
        got = out[used][:, columns].double()
        norm = want.norm().item()
        result[name] = ((got - want).norm().item() / norm) if norm else 0.0
    noise = depth**0.5 / 2**24
    result["noise"] = noise
    if not result["ours"] <= max(result["theirs"] * 1.01, noise):
        result["problems"].append("ours has the larger error")
    return result


def work(argument: tuple[str, range]) -> list[dict[str, Any]]:
    folder, numbers = argument
    return [judge(folder, draw(number)) for number in numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what benchmarks/lorax/fetch.sh made")
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", help="write every case to this JSON file")
    args = parser.parse_args()
    shares = [(args.folder, range(w, args.cases, args.workers)) for w in range(args.workers)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        results = [result for share in pool.map(work, shares) for result in share]
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)
    by_op = collections.defaultdict(list)
    for result in results:
        by_op[result["case"]["op"]].append(result)
    print(f"{'op':18} cases  native  smaller error  tie  worst error: ours   theirs")
    for op in OPS:
        rows = by_op[op]
        better = sum(row["ours"] < row["theirs"] for row in rows)
        ties = sum(row["ours"] >= row["theirs"] and not row["problems"] for row in rows)
        native = sum(row["path"] == "native" for row in rows)
        ours, theirs = (max((row[k] for row in rows), default=0) for k in ("ours", "theirs"))
        counts = f"{len(rows):5} {native:7} {better:14} {ties:4}"
        print(f"{op:18} {counts} {ours:18.2e} {theirs:8.2e}")
    problems = [(row["case"], row["problems"]) for row in results if row["problems"]]
    for case, what in problems:
        print("PROBLEM", what, case)
    print(f"{len(results)} cases, {len(problems)} with problems")
    return 1 if problems or not results else 0


if __name__ == "__main__":
    sys.exit(main())
