"""Times a frozen projection with LoRA, forward and backward, by LoRAFusion's kernels and by ours.

    benchmarks/peers/fetch_lorafusion.sh .peers
    PYTHONPATH=.peers:. XLA_PYTHON_CLIENT_PREALLOCATE=false \\
        python3 benchmarks/peers/lorafusion_layers.py --processes 6

LoRAFusion's kernels multiply by the frozen weights too, so both sides do: y = x W^T + lora(x) and
the gradients of x, A and B, without dropout. Shapes are those of its kernel benchmark: features of
4096, 5120 and 8192, rank 16, 2048 to 8192 tokens; one adapter, and four in runs of equal length,
which are all that its multi-LoRA kernels take. Its forms with TMA need descriptors that Triton 3.6
no longer has; it then takes its other forms itself. A GPU that it was not tuned for gets the sizes
that it has for an H100.

Each row is a line of JSON. Its times are microseconds over several sets of weights, together larger
than the L2 cache: torch's and LoRAFusion's of calls in one CUDA graph, without autograd's host
time; ours in a jitted loop.

    torch_frozen, jax_frozen    y = x W^T and dx = dy W alone
    torch                       LoRA by torch's products, for each adapter on its own
    lorafusion, ours            the whole layer
    floor                       of y + lora(x) and its gradients alone

`wrong` has relative differences from float32 above 1e-2, of y, dx, dA and dB.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import stubs  # must come before peers
import torch
from peer_bench import graph_us

from benchmarks import gradients
from benchmarks.timing import Loop, sets_to_rotate
from benchmarks.turns import Turns
from interop import to_jax, to_torch
from pallas_kernels import Segments, add_lora, make_segments

DEVICE, RANK, TURNS, MOST_ADAPTERS, MOST_WRONG = "cuda", 16, 8, 4, 1e-2
RESULTS = ("y", "dx", "dA", "dB")
Outputs = Sequence[torch.Tensor]
Call = Callable[[], Outputs]


class Case(NamedTuple):
    T: int
    D: int
    H: int

    @property
    def floor_us(self) -> float:
        return gradients.Case(*self[:2], RANK, self.H, self.H).floor_us

    @property
    def runs(self) -> list[slice]:
        size = self.T // self.D
        return [slice(n * size, (n + 1) * size) for n in range(self.D)]


CASES = [Case(t, d, h) for h in (4096, 5120, 8192) for t in (2048, 4096, 8192) for d in (1, 4)]
CASES.append(Case(8192, 8, 4096))  # which LoRAFusion has not


class Set(NamedTuple):
    """W `[N, H]`, x, A `[D, R, H]`, B `[D, N, R]` and dy."""

    w: torch.Tensor
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    dy: torch.Tensor


def make_sets(case: Case) -> list[Set]:
    t, d, h = case
    shapes = ((h, h), (t, h), (d, RANK, h), (d, h, RANK), (t, h))
    factors = (h**-0.5, 1.0, h**-0.5, RANK**-0.5, 1.0)
    return [
        Set(
            *(
                (torch.randn(shape, device=DEVICE) * factor).bfloat16()
                for shape, factor in zip(shapes, factors)
            )
        )
        for _ in range(sets_to_rotate(2 * (h * h + 4 * t * h)))
    ]


# ------------------------------------------------------------------------------------------- torch


def torch_frozen(case: Case, s: Set) -> Call:
    return lambda: (s.x @ s.w.T, s.dy @ s.w)


def by_torch(case: Case, s: Set) -> Call:
    def layer() -> Outputs:
        y, dx = s.x @ s.w.T, s.dy @ s.w
        da, db = torch.empty_like(s.a), torch.empty_like(s.b)
        for n, run in enumerate(case.runs):
            x, dy, a, b = s.x[run], s.dy[run], s.a[n], s.b[n]
            v, dv = x @ a.T, dy @ b
            y[run].addmm_(v, b.T)
            dx[run].addmm_(dv, a)
            torch.mm(dv.T, x, out=da[n])
            torch.mm(dy.T, v, out=db[n])
        return y, dx, da, db

    return layer


@functools.cache
def lorafusion() -> tuple[Any, Any]:
    """Its modules of one and of several adapters, without the packages of its trainer."""
    for name in ("loguru", "megatron", "megatron.core", "tabulate", "mypy_extensions"):
        stubs.put(name)
    ops = "lorafusion.ops.triton_ops"
    stubs.put(f"{ops}.tma_utils", HAS_TMA_DESC=False)
    stubs.put(f"{ops}.fused_lora_xw_sb_tma")
    stubs.put(f"{ops}.fused_lora_dyw_dsa_tma")
    warnings.filterwarnings("ignore", "LORAFUSION_FORWARD_USE_TMA")
    from lorafusion.ops import lora_v1, multi_lora
    from lorafusion.ops.triton_ops import config

    config.HARDWARE_CONFIGS.setdefault(config.get_device_short_name(), config.H100_CONFIG)
    return lora_v1, multi_lora


def by_lorafusion(case: Case, s: Set) -> Call:
    one, several = lorafusion()
    if case.D > MOST_ADAPTERS:
        raise ValueError(f"{case.D} adapters, it takes {MOST_ADAPTERS}")
    if case.D == 1:
        mask = torch.ones((), dtype=torch.bool, device=DEVICE).expand_as(s.x)  # it asks for a shape

        def layer() -> Outputs:
            y, _, x, v = one._fused_linear_lora_forward(s.x, s.w, s.a[0], s.b[0], 1.0, 0.0, 0)
            dx, da, db, _ = one._fused_linear_lora_backward(
                s.dy, s.w, s.a[0], s.b[0], v, x, 1.0, 0.0, mask, 0
            )
            return y, dx, da[None], db[None]

        return layer
    lengths = [case.T // case.D] * case.D
    made = several.prepare_multi_lora_batch_info(
        lengths, list(range(case.D)), [RANK] * case.D, [0.0] * case.D, [1.0] * case.D,
        several.get_lora_kernel_config("fused_multi_lora_block_size_m"),
    )  # fmt: skip
    if made.padded_seq_len_list != lengths:
        raise ValueError(f"runs of {lengths[0]} tokens, it pads them to whole blocks")
    of_batch = (
        "seq_len_list", "padded_seq_len_list", "block_to_lookup_table", "block_to_dropout_p",
        "block_to_alpha", "enable_dropout", "max_r",
    )  # fmt: skip
    common = {name: getattr(made, name) for name in of_batch}
    common |= dict(lora_a_list=list(s.a), lora_b_list=list(s.b))

    def layers() -> Outputs:
        y, mask, x, v, v_at, b_at = several._fused_linear_multi_lora_forward(
            s.x, s.w, same_dropout_p_value=0.0, seed=0, **common
        )
        dx, da, db, _ = several._fused_linear_multi_lora_backward(
            s.dy, s.w, s_ptrs_list=v_at, b_ptrs_list=b_at, s_list=v, masked_scaled_x=x,
            dropout_mask=mask, **common,
        )  # fmt: skip
        return y, dx, torch.stack(da), torch.stack(db)

    return layers


def reference(case: Case, s: Set) -> Outputs:
    return by_torch(case, Set(*(t.float() for t in s)))()


# --------------------------------------------------------------------------------------------- JAX


def jax_frozen(w: jax.Array, x: jax.Array, a: Any, b: Any, dy: jax.Array, _: Segments) -> Any:
    return x @ w.T, dy @ w


def ours(
    w: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, dy: jax.Array, rows: Segments
) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, a, b: add_lora(x @ w.T, x, a, b, rows), x, a, b)
    return y, *pull(dy)


def jax_loop(step: Callable[..., Any], sets: list[Any], rows: Segments) -> tuple[Loop, list[Any]]:
    """A compiled loop, and what it starts with: the sets with room for results."""
    once = jax.jit(step)
    shapes = jax.eval_shape(once, *sets[0], rows)
    carry = [(*one, *(jnp.zeros(r.shape, r.dtype) for r in shapes)) for one in sets]

    def body(carry: Any, rows: Segments) -> Any:
        carry = jax.lax.optimization_barrier(carry)
        return [(*one[:5], *once(*one[:5], rows)) for one in carry]

    loop = Loop(body, len(sets), turns=TURNS)
    loop.compile(carry, rows)
    return loop, carry


# ------------------------------------------------------------------------------------------ timing


def differences(results: Outputs, want: Outputs) -> dict[str, float]:
    found = {}
    for name, got, expected in zip(RESULTS, results, want):
        error = float((got.float() - expected).norm() / expected.norm())
        if not error < MOST_WRONG:
            found[name] = error
    return found


def measure(case: Case, turns: Turns) -> dict[str, Any]:
    """The row of a case; what does not run says why in its place."""
    row: dict[str, Any] = {**case._asdict(), "floor": round(case.floor_us, 1)}
    wrong: dict[str, dict[str, float]] = {}
    timed: dict[str, Callable[[], float]] = {}
    with turns.shared():
        sets = make_sets(case)
        want = reference(case, sets[0])
        for make in (torch_frozen, by_torch, by_lorafusion):
            name = make.__name__.removeprefix("by_")
            try:
                calls = [make(case, one) for one in sets]
                results = calls[0]()
                if len(results) == len(want):
                    wrong[name] = differences(results, want)
                timed[name] = functools.partial(graph_us, calls)
            except Exception as error:
                row[name] = f"{type(error).__name__}: {error}"[:200]
        ids = torch.arange(case.D, device=DEVICE).repeat_interleave(case.T // case.D)
        rows = make_segments(to_jax(ids.int()), case.D)
        arrays = [tuple(map(to_jax, one)) for one in sets]
        found = [to_torch(t) for t in jax.jit(ours)(*arrays[0], rows)]
        wrong["ours"] = differences(found, want)
        del found, want
        for step in (jax_frozen, ours):
            loop, carry = jax_loop(step, arrays, rows)
            timed[step.__name__] = functools.partial(loop.us, carry, rows)
    with turns.alone():
        for name, call in timed.items():
            try:
                row[name] = round(call(), 1)
            except Exception as error:
                row[name] = f"{type(error).__name__}: {error}"[:200]
    return {**row, "wrong": {name: errors for name, errors in wrong.items() if errors}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1, help="prepare cases together")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--turns", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv[:1], "--turns", f"{folder}/turns", "--part"]
            parts = [f"{n}/{given.processes}" for n in range(given.processes)]
            started = [subprocess.Popen([*command, part]) for part in parts]
            sys.exit(max(process.wait() for process in started))
    nth, of = map(int, given.part.split("/"))
    for case in CASES[nth::of]:
        print(json.dumps(measure(case, Turns(given.turns))), flush=True)


if __name__ == "__main__":
    main()
