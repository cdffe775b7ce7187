"""The Mosaic kernels on a Hopper GPU: every case of the contract against float64.

PYTHONPATH=. python3 -m pytest tests/gpu -m gpu -n 8
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mosaic_cases import (
    POPULARITIES,
    Y_TOLERANCE,
    Arrays,
    Case,
    add_parts,
    as_jax,
    bits,
    parts_in_float64,
    poison,
    products,
    relative_error,
    typical,
    v_tolerance,
    y_tolerance,
)

import pallas_kernels as pk
from benchmarks.compiling import made_in_loops
from jax_lora import AdapterBank, LoRAConfig, apply_lora, use
from pallas_kernels import LoRAPart, make_segments, ops
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import Config, backend
from pallas_kernels.mosaic_gpu.prefill import default_config

pytestmark = pytest.mark.gpu


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Appends a measured error to the file named by LORA_ERRORS, for the table of worst errors."""

    def write(op: str, case: Case, error: float) -> None:
        if path := os.environ.get("LORA_ERRORS"):
            with open(path, "a") as file:
                line = dict(op=op, case=str(case), x=case.x_dtype, weights=case.weight_dtype,
                            y=case.y_dtype, error=error)  # fmt: skip
                file.write(json.dumps(line) + "\n")

    return write


@functools.partial(jax.jit, static_argnames=("y_offset", "config", "names"))
def run_ops(arrays: dict[str, Any], y_offset: int, config: Any, names: tuple[str, ...]) -> Any:
    """One program per shape, as compiling is what these tests wait for."""
    z = arrays
    segments = make_segments(z["ids"], z["a"].shape[0])
    t, (slots, rank, features) = z["x"].shape[0], z["a"].shape
    two_launches = default_config(t, features, z["b"].shape[1], rank, slots)
    parts = (LoRAPart(z["a"], z["b"], z["scales"], 0, y_offset),)
    outs = []
    for full_name in names:
        name = op_of(full_name)
        route = z["ids"] if full_name.endswith(OF_IDS) else segments
        call = Call(
            name, "mosaic_gpu", ("bgmv",), y_offset, name == "expand",
            widths=(z["y"].shape[1],), dtype=z["y"].dtype,
            config=two_launches if full_name.endswith(IN_TWO) else config,
        )  # fmt: skip
        if name.startswith("shrink"):
            v = z["v"] if name == "shrink+" else None
            outs.append(backend.shrink(call, v, z["x"], z["a"], route, z["scales"]))
        elif name == "add_lora":
            outs += backend.add_lora(call, (z["y"],), z["x"], parts, route)
        elif name == "lora_delta":
            outs += backend.lora_delta(call, z["x"], parts, route)
        else:
            outs.append(backend.expand(call, z["v"], z["b"], route, z["y"]))
    return outs


IN_TWO = " in two launches"
OF_IDS = " of ids"  # among which the kernel finds its tokens, not XLA
OPS = ("shrink", "shrink+", "expand", "expand=", "add_lora", "lora_delta")
IN_PLACE = ("shrink", "expand", "add_lora")


def op_of(name: str) -> str:
    return name.removesuffix(IN_TWO).removesuffix(OF_IDS)


def run(
    arrays: Arrays, y_offset: int = 0, config: Any = None, names: tuple[str, ...] = IN_PLACE
) -> list[np.ndarray]:
    poison()
    return [np.asarray(out) for out in run_ops(as_jax(arrays), y_offset, config, names)]


def check(case: Case, record: Any, config: Any = None, names: tuple[str, ...] = OPS) -> None:
    arrays = case.arrays()
    ids = np.where((arrays.ids >= 0) & (arrays.ids < case.num_adapters), arrays.ids, -1)
    columns = slice(case.y_offset, case.y_offset + case.width)
    scale = arrays.scales[np.maximum(ids, 0)][:, None].astype(np.float64)
    want_v = products(arrays.x, arrays.a, ids) * scale
    half_v = arrays.v.astype(arrays.b.dtype)
    deltas = {
        "expand": products(half_v, arrays.b, ids),
        "add_lora": products(want_v, arrays.b, ids),
    }
    deltas["expand="], deltas["lora_delta"] = deltas["expand"], deltas["add_lora"]
    # The size of a sum of terms with random signs, by which errors may grow with its length.
    typical_v = typical(arrays.x, arrays.a, ids) * scale
    typical_delta = {
        "expand": typical(half_v, arrays.b, ids), "add_lora": typical(want_v, arrays.b, ids),
    }  # fmt: skip
    typical_delta["expand="] = typical_delta["expand"]
    typical_delta["lora_delta"] = typical_delta["add_lora"]
    tolerance = y_tolerance(case.y_dtype, case.weight_dtype)
    if case.weight_dtype == "float16" and case.y_dtype == "float32":
        tolerance = y_tolerance("float16")
    used = ids >= 0
    for op, out in zip(names, run(arrays, case.y_offset, config, names)):
        name = op_of(op)
        if name.startswith("shrink"):
            before = arrays.v.astype(np.float64) * (name == "shrink+")
            want = (before + want_v)[used]
            assert out.dtype == np.float32
            record(op, case, error := relative_error(out[used], want))
            assert error < v_tolerance(case.features)
            # Four times the norm's, as wgmma rounds towards zero: large sums are off by more.
            bound = 4 * v_tolerance(case.features) * (np.abs(before) + typical_v)[used]
            assert (np.abs(out[used] - want) <= bound).all()
            kept = arrays.v if name == "shrink+" else np.zeros_like(out)
            np.testing.assert_array_equal(bits(out)[~used], bits(kept)[~used])
            continue
        before = arrays.y if name != "lora_delta" else np.full_like(arrays.y, -0.0)
        want = before.astype(np.float64)
        want[:, columns] = want[:, columns] * (name != "expand=") + deltas[name]
        assert out.dtype == arrays.y.dtype
        np.testing.assert_array_equal(bits(out)[~used], bits(before)[~used])
        outside = np.ones(out.shape[1], bool)
        outside[columns] = False
        np.testing.assert_array_equal(bits(out)[:, outside], bits(before)[:, outside])
        if used.any():
            got, want = out[used][:, columns], want[used][:, columns]
            record(op, case, error := relative_error(got, want))
            assert error < tolerance
            rounding = Y_TOLERANCE.get(case.y_dtype, 0) * np.abs(want)
            bound = rounding + 8 * tolerance * typical_delta[name][used]
            assert (np.abs(got.astype(np.float64) - want) <= bound).all()


TOKENS = (1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 256, 1000, 4096, 8192)
BUCKETS = (8, 16, 32, 64, 128)
MANY = (48, 80, 96, 112, *range(144, 513, 16))

CASES = [
    Case(t, 1024, 1152, r, 5, POPULARITIES[(i + j) % 3], seed=i)
    for i, t in enumerate(TOKENS)
    for j, r in enumerate(BUCKETS)
]
CASES += [Case(t, 512, 256, r, 4, seed=r) for r in MANY for t in (17, 200)]
CASES += [Case(t, 256, 320, r, 64, p) for p in POPULARITIES for t in (64, 200) for r in (8, 16, 64)]
CASES += [
    Case(37, h, n, 16, 3)
    for h, n in ((64, 64), (72, 72), (104, 88), (3424, 4096), (4096, 3424), (11008, 4096),
                 (4096, 11008), (29568, 64), (64, 262144), (131072, 64), (1000, 1000))
]  # fmt: skip
CASES += [
    Case(t, 320, 192, r, 4, "uniform", x, w, y)
    for w in ("bfloat16", "float16")
    for x, y in (("bfloat16", "float32"), ("float16", "float16"), ("float32", "bfloat16"),
                 ("float32", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16"))
    for t, r in ((5, 16), (100, 8), (65, 64))
]  # fmt: skip
CASES += [
    Case(t, 128, 128, r, 3, y_offset=offset, y_extra=extra)
    for t, r in ((3, 8), (70, 16), (130, 64))
    for offset, extra in ((0, 64), (64, 0), (8, 16), (24, 40), (256, 640))
]


CASES += [Case(t, 512, 256, r, 5, "lengths") for t in (49, 300) for r in (8, 16, 128)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, record: Any) -> None:
    names = OPS
    if case.num_tokens <= 256:  # others take two launches as it is
        names += tuple(f"{op}{IN_TWO}" for op in IN_PLACE)
    check(case, record, names=names)


DECODE = Config(split=8, warps=4, stages=2, expand_stages=4)
DECODE_CASES = [
    (Case(t, 1024, 1152, r, 5, POPULARITIES[(i + j) % 3], seed=i), change)
    for i, (t, change) in enumerate(
        (
            (1, dict(column_clusters=4)), (2, dict(split=1)), (7, dict(split=2)),
            (33, dict(split=4)), (64, dict(warps=8)), (65, dict(warps=16)),
            (128, dict(column_clusters=2)),
            (129, dict(warps=8, split=4)), (256, dict(stages=1, expand_stages=1)),
        )
    )
    for j, r in enumerate((8, 16, 64, 128))
]  # fmt: skip
DECODE_CASES += [(Case(64, 512, 256, r, 4, seed=r), {}) for r in (32, 48, 80, 112, 160, 368)]
DECODE_CASES += [
    (Case(64, 4096, 4096, r, 64, p), {}) for p in POPULARITIES for r in (8, 16, 64, 128)
]
DECODE_CASES += [
    (Case(40, h, n, r, 3), dict(stages=3, expand_stages=6))
    for h, n in ((64, 64), (104, 88), (11008, 4096), (64, 262144), (131072, 64), (4096, 28672))
    for r in (16, 64)
]


@pytest.mark.parametrize(("case", "change"), DECODE_CASES, ids=str)
def test_decode_against_float64(case: Case, change: dict[str, int], record: Any) -> None:
    names = "shrink+", "expand", "add_lora", f"add_lora{OF_IDS}", f"lora_delta{OF_IDS}"
    check(case, record, dataclasses.replace(DECODE, **change), names)


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [8, 16, 48, 128, 256, 512])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
def test_two_tiles_share_what_a_block_loads(
    rank: int, split: int, x_dtype: str, record: Any
) -> None:
    case = Case(300, 2048, 200, rank, 4, "zipf", x_dtype)
    one = Config(split=split, expand_columns=2)
    two = dataclasses.replace(one, row_tiles=2, expand_row_tiles=2)
    check(case, record, two, IN_PLACE)
    for a, b in zip(run(case.arrays(), config=one), run(case.arrays(), config=two)):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("rank", "change"), [
    (8, dict(expand_columns=4)), (16, dict(expand_columns=8, expand_stack=4)),
    (128, dict(expand_columns=3, expand_row_tiles=2)),
])  # fmt: skip
def test_tiles_with_many_adapters_are_cut_and_keep_their_bits(
    rank: int, change: dict[str, int], shuffled: bool
) -> None:
    """Decode rows beside a prompt; shuffled, all of them are sorted."""
    given = Case(600, 512, 1160, rank, 64, "distinct").arrays()
    ids = np.concatenate([np.arange(64), np.full(536, 7)]).astype(np.int32)
    ids[70:140:7] = -1
    order = np.random.default_rng(1).permutation(ids)
    arrays = dataclasses.replace(given, ids=order if shuffled else ids)
    config = Config(split=2, block_n=32, **change)
    cut = run(arrays, config=config)
    whole = run(arrays, config=dataclasses.replace(config, expand_columns=1))
    for op, got, want in zip(IN_PLACE, cut, whole):
        np.testing.assert_array_equal(bits(got), bits(want), err_msg=op)
    want = arrays.y.astype(np.float64)
    want += products(arrays.v.astype(arrays.b.dtype), arrays.b, arrays.ids)
    got = cut[list(IN_PLACE).index("expand")]
    assert relative_error(got, want) < y_tolerance("bfloat16")


@pytest.mark.parametrize("rank", [8, 16, 64, 256])
@pytest.mark.parametrize("num_tokens", [64, 200])
def test_nothing_leaks(rank: int, num_tokens: int) -> None:
    """NaN in unused slots, in a row of -1 or in another row reaches no output."""
    case = Case(num_tokens, 256, 192, rank, 8)
    clean = case.arrays()
    ids = np.where(clean.ids == 3, 4, clean.ids).astype(np.int32)
    a, b, x, y, v = (np.array(z) for z in (clean.a, clean.b, clean.x, clean.y, clean.v))
    a[3], b[3] = np.nan, np.nan
    unused = np.flatnonzero(ids < 0)
    x[unused], v[unused] = np.nan, np.inf
    bad = int(np.flatnonzero(ids >= 0)[0])
    x[bad], v[bad] = np.nan, np.nan
    y[unused[0]], y[unused[1]] = np.nan, -0.0
    rest = (ids >= 0) & (np.arange(num_tokens) != bad)
    before = Arrays(clean.x, clean.a, clean.b, clean.y, clean.v, clean.scales, ids)
    after = Arrays(x, a, b, y, v, clean.scales, ids)
    for op, clean_out, out in zip(IN_PLACE, run(before), run(after)):
        np.testing.assert_array_equal(bits(out)[rest], bits(clean_out)[rest])
        if op != "shrink":
            np.testing.assert_array_equal(bits(out)[unused], bits(y)[unused])
        assert np.isnan(out[bad].astype(np.float32)).all()


@pytest.mark.parametrize("rank", [8, 16, 64, 128, 272])
@pytest.mark.parametrize("sizes", [(64, 32), (300, 64), (300, 7)], ids=str)
def test_a_row_depends_on_itself_alone(rank: int, sizes: tuple[int, int]) -> None:
    """Other rows, their order and their number change no bit, in one config; nor does a rerun."""
    many, few = sizes
    case = Case(many, 1024, 192, rank, 6)
    arrays = case.arrays()
    configs = [default_config(many, 1024, 192, rank, 6)]
    if many <= 256:
        configs.append(DECODE)
    order = np.random.default_rng(5).permutation(many)[:few]
    picked = Arrays(
        arrays.x[order], arrays.a, arrays.b, arrays.y[order], arrays.v[order], arrays.scales,
        arrays.ids[order],
    )  # fmt: skip
    for config in configs:
        whole, again = run(arrays, config=config), run(arrays, config=config)
        for one, two, few_rows in zip(whole, again, run(picked, config=config)):
            np.testing.assert_array_equal(bits(one), bits(two))
            np.testing.assert_array_equal(bits(one)[order], bits(few_rows))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A range of four slots for each rank, whose adapters add to all spans of columns."""

    num_tokens: int
    ranks: tuple[int, ...]
    widths: tuple[int, ...] = (320,)  # of the ys
    spans: tuple[tuple[int, int], ...] = ((0, 128),)
    y_dtype: str = "bfloat16"
    config: Config | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else "-two launches"
        return (
            f"T{self.num_tokens}-r{self.ranks}-y{self.widths}-{self.spans}-{self.y_dtype}{config}"
        )

    @property
    def num_slots(self) -> int:
        return 5 * len(self.ranks)

    def parts(self) -> list[LoRAPart]:
        """Ranges in descending order, with a slot between them that is no part's; all scales are in
        one array."""
        arrays = [Case(1, 512, max(s[1] for s in self.spans), r, 4, seed=r) for r in self.ranks]
        arrays = [case.arrays() for case in arrays]
        scales = np.concatenate([z.scales for z in arrays])
        last = len(arrays) - 1
        return [
            LoRAPart(z.a, z.b[:, : stop - start], scales, 5 * (last - n), start, 4 * n)
            for start, stop in self.spans
            for n, z in enumerate(arrays)
        ]

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(whole, x, ids): the ys side by side; ids below, between and behind the ranges."""
        case = Case(self.num_tokens, 512, sum(self.widths), 8, 1, y_dtype=self.y_dtype).arrays()
        ids = np.random.default_rng(0).integers(-1, self.num_slots + 1, self.num_tokens)
        ids[0] = 3
        return case.y, case.x, ids.astype(np.int32)


EVERY_BUCKET = (8, 16, 64, 128, 32)
QKV = dict(widths=(512, 128, 128), spans=((0, 512), (512, 640), (640, 768)))
SPANS = (((0, 128), (128, 256)), ((0, 128), (64, 192)), ((0, 128), (8, 136)))
BUCKET_CASES = [
    Buckets(t, EVERY_BUCKET, config=c) for t in (1, 64, 300) for c in (None, Config(split=4))
]
BUCKET_CASES += [
    Buckets(t, (8, 128), spans=spans, config=config)
    for t in (1, 64, 300) for spans in SPANS for config in (None, Config(split=4))
]  # fmt: skip
BUCKET_CASES += [
    Buckets(t, r, **QKV) for t in (1, 64, 130, 300) for r in ((16,), EVERY_BUCKET, (128,))
]
BUCKET_CASES += [
    Buckets(t, (8, 64), y_dtype=y_dtype, **QKV)
    for t in (64, 300)
    for y_dtype in ("float32", "float16")
]
# A part from one y into the next, beside others of its range.
BUCKET_CASES += [
    Buckets(t, (16, 64), (72, 64, 200), ((0, 72), (136, 336), (40, 160))) for t in (13, 300)
]
# So many tokens that a block of the shrink takes part after part.
BUCKET_CASES += [
    Buckets(4096, EVERY_BUCKET), Buckets(4096, (8, 128), spans=((0, 128), (64, 192))),
]  # fmt: skip


@dataclasses.dataclass
class PartsCall:
    """A case's buckets and slices in one call."""

    case: Buckets

    def __post_init__(self) -> None:
        self.whole, self.x, self.ids = self.case.operands()
        self.parts = self.case.parts()

    def run(self, name: str, route: str) -> np.ndarray:
        """What the op gives, the ys side by side. `route`: how the ids are given."""
        call = jax.jit(functools.partial(self._call, name, route))
        ys = tuple(
            jnp.asarray(y) for y in np.split(self.whole, np.cumsum(self.case.widths)[:-1], axis=1)
        )
        stacks = [(part.lora_a, part.lora_b) for part in self.parts]
        operands = jax.tree.map(jnp.asarray, (self.x, stacks, self.parts[0].scales, self.ids))
        poison()
        outs = call(ys, *operands)
        assert [y.shape[1] for y in outs] == list(self.case.widths)
        return np.concatenate([np.asarray(y) for y in outs], axis=1)

    def _call(
        self, name: str, route: str, ys: Any, x: Any, stacks: Any, scales: Any, ids: Any
    ) -> Any:
        parts = [
            dataclasses.replace(part, lora_a=a, lora_b=b, scales=scales)
            for part, (a, b) in zip(self.parts, stacks)
        ]
        if route != "ids":
            ids = make_segments(ids, self.case.num_slots)
        if route == "split":
            ids = ids.split(sorted({(part.first_slot, 4) for part in parts}))
        how = dict(implementation="mosaic_gpu", config=self.case.config)
        if name == "add_lora_multi":
            return pk.add_lora_multi(ys, x, parts, ids, **how)
        if name == "add_in_step":
            return ops.add_in_step(ys, x, parts, ids, phase="decode")
        return pk.lora_delta(x, parts, ids, self.case.widths, dtype=self.case.y_dtype, **how)


@pytest.mark.parametrize("case", BUCKET_CASES, ids=str)
def test_parts(case: Buckets) -> None:
    """Buckets and slices in one call: in place, as what is to be added, and as layers call it."""
    of = PartsCall(case)
    want, used = parts_in_float64(of.x, of.parts, of.ids, of.whole.shape[1])
    tolerance = y_tolerance(case.y_dtype, "bfloat16")
    y, delta = of.run("add_lora_multi", "segments"), of.run("lora_delta", "segments")
    assert y.dtype == delta.dtype == of.whole.dtype
    np.testing.assert_array_equal(bits(y)[~used], bits(of.whole)[~used])
    np.testing.assert_array_equal(bits(delta)[~used], bits(np.full_like(of.whole, -0.0))[~used])
    assert relative_error(y[used], (of.whole + want)[used]) < tolerance
    assert relative_error(delta[used], want[used]) < tolerance
    if case.config is None:
        at_once = backend.makes_delta_at_once(
            jnp.asarray(of.x), tuple(of.parts), case.widths, of.whole.dtype
        )
        most = 1024 if max(case.ranks) <= 32 else 768 if len(case.ranks) > 1 else 256
        assert at_once == (case.num_tokens <= most)
        added = (of.whole.astype(np.float32) + delta.astype(np.float32)).astype(of.whole.dtype)
        layer = of.run("add_in_step", "segments")
        np.testing.assert_array_equal(bits(layer), bits(added if at_once else y))


def test_runs_that_many_adapters_of_another_part_allow() -> None:
    """As in test_rows.py: all tiles have all nine adapters, whose runs the other part's cut."""
    pairs = np.stack([np.tile(np.arange(9), 5), 9 + np.arange(45)], axis=1).reshape(5, 18)
    ids = np.pad(pairs, ((0, 0), (0, 46)), constant_values=-1).reshape(320).astype(np.int32)
    z = Case(320, 512, 128, 16, 54).arrays()
    parts = [
        LoRAPart(z.a[start:stop], z.b[start:stop], z.scales[start:stop], start)
        for start, stop in ((0, 9), (9, 54))
    ]
    poison()
    how = dict(phase="prefill", implementation="mosaic_gpu", config=Config(split=4, stack=2))
    y = np.asarray(pk.add_lora_multi(z.y, z.x, parts, jnp.asarray(ids), **how))
    want, used = parts_in_float64(z.x, parts, ids, 128)
    assert relative_error(y[used], (z.y + want)[used]) < y_tolerance("bfloat16", "bfloat16")
    np.testing.assert_array_equal(bits(y)[~used], bits(z.y)[~used])


# A test of its own, since to compile all ways of many parts takes minutes.
@pytest.mark.parametrize("route", ["split", "ids"])
@pytest.mark.parametrize("case", BUCKET_CASES, ids=str)
def test_how_ids_are_given_changes_no_bit(case: Buckets, route: str) -> None:
    of = PartsCall(case)
    names = ["add_lora_multi", "lora_delta"] + ["add_in_step"] * (case.config is None)
    for name in names:
        np.testing.assert_array_equal(
            bits(of.run(name, route)), bits(of.run(name, "segments")), err_msg=name
        )


# ------------------------------------------------------- transformations, through the public ops


def ops_of(z: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Each op as a function of the arrays it is differentiated in."""
    segments = make_segments(z["ids"], z["a"].shape[0])
    how = dict(implementation=implementation)
    return {
        "bgmv_shrink": lambda w: pk.bgmv_shrink(w["x"], w["a"], z["ids"], scale=0.5, **how),
        "sgmv_shrink": lambda w: pk.sgmv_shrink(w["x"], w["a"], segments, scale=0.5, **how),
        "bgmv_expand": lambda w: pk.bgmv_expand(w["v"], w["b"], z["ids"], w["y"], **how),
        "sgmv_expand": lambda w: pk.sgmv_expand(w["v"], w["b"], segments, w["y"], **how),
        "add_lora": lambda w: pk.add_lora(
            w["y"], w["x"], w["a"], w["b"], z["ids"], scales=w["scales"], **how
        ),
    }


@pytest.mark.parametrize("num_tokens", [9, 64, 300])
def test_gradients_are_those_of_xla(num_tokens: int) -> None:
    arrays = Case(num_tokens, 256, 192, 16, 5).arrays()
    ids = np.where(arrays.ids == 2, 1, arrays.ids).astype(np.int32)
    z = as_jax(dataclasses.replace(arrays, ids=ids))

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(z: dict[str, Any], implementation: str) -> Any:
        weights = {name: z[name] for name in ("x", "a", "b", "y", "v", "scales")}

        def loss(op: Any) -> Any:
            return lambda w: jnp.sum(jnp.sin(op(w).astype(jnp.float32)))

        return {name: jax.grad(loss(op))(weights) for name, op in ops_of(z, implementation).items()}

    ours, xla = gradients(z, "mosaic_gpu"), gradients(z, "xla")
    for op, of_op in ours.items():
        for name, got in of_op.items():
            want = np.asarray(xla[op][name]).astype(np.float64)
            assert relative_error(np.asarray(got), want) < 8e-3, (op, name)  # bfloat16 gradients
        for name in ("a", "b", "scales"):  # adapter 2 is in no row
            assert not np.asarray(of_op[name][2]).astype(np.float32).any(), (op, name)


@pytest.mark.parametrize("num_tokens", [20, 300])  # one launch, and two
@pytest.mark.parametrize("delta", [False, True], ids=["in place", "delta"])
def test_vmap_scan_and_fori_loop_change_nothing(delta: bool, num_tokens: int) -> None:
    z = as_jax(Case(num_tokens, 256, 192, 16, 5).arrays())
    part = LoRAPart(z["a"], z["b"], z["scales"])

    def call(y: Any, x: Any) -> Any:
        return add_parts(y, x, [part], z["ids"], delta=delta, implementation="mosaic_gpu")

    twice = np.asarray(call(call(z["y"], z["x"]), z["x"]))
    stacked = jnp.stack([z["x"], z["x"] * 2])
    mapped = jax.jit(jax.vmap(call, in_axes=(None, 0)))(z["y"], stacked)
    scanned = jax.jit(
        lambda y, x: jax.lax.scan(lambda y, x: (call(y, x), None), y, jnp.stack([x, x]))[0]
    )(z["y"], z["x"])
    looped = jax.jit(
        lambda y, x: jax.lax.fori_loop(0, 2, lambda _, y: call(y, x), y)
    )(z["y"], z["x"])  # fmt: skip
    ys = jnp.stack([z["y"], z["y"] * 2])
    sliced = jax.jit(  # slices ys, stacks what the call makes, and uses y again
        lambda ys, x: jax.lax.scan(lambda x, y: (x, (call(y, x), y + 1)), x, ys)[1]
    )(ys, z["x"])
    for made, more, y in zip(*sliced, ys):
        np.testing.assert_array_equal(bits(made), bits(call(y, z["x"])))
        np.testing.assert_array_equal(bits(more), bits(y + 1))
    np.testing.assert_array_equal(bits(mapped[0]), bits(call(z["y"], z["x"])))
    np.testing.assert_array_equal(bits(mapped[1]), bits(call(z["y"], z["x"] * 2)))
    np.testing.assert_array_equal(bits(scanned), bits(twice))
    np.testing.assert_array_equal(bits(looped), bits(twice))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_scan_over_layers_copies_no_stacks(phase: str) -> None:
    """XLA passes a layer's slice of all stacks by its address; in gradients too."""
    layers, slots, rank, size = 6, 16, 16, 1024
    num_tokens = 64 if phase == "decode" else 300
    keys = iter(jax.random.split(jax.random.key(0), 4))
    ids = jax.random.randint(next(keys), num_tokens, -1, slots)
    x = jax.random.normal(next(keys), (num_tokens, size), jnp.bfloat16)
    a = jax.random.normal(next(keys), (layers, slots, rank, size), jnp.bfloat16) / 32
    b = jax.random.normal(next(keys), (layers, slots, size, rank), jnp.bfloat16) / 4
    segments = make_segments(ids, slots)

    def layer(x: Any, a: Any, b: Any) -> Any:
        how = dict(phase=phase, implementation="mosaic_gpu")
        return x + pk.lora_delta(x, [LoRAPart(a, b)], segments, size, **how)

    def step(x: Any, a: Any, b: Any) -> Any:
        return jax.lax.scan(lambda x, stacks: (layer(x, *stacks), None), x, (a, b))[0]

    compiled = jax.jit(step).lower(x, a, b).compile()
    want, one = x, jax.jit(layer)
    for n in range(layers):
        want = one(want, a[n], b[n])
    np.testing.assert_array_equal(bits(np.asarray(compiled(x, a, b))), bits(np.asarray(want)))
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(step(*args).astype(jnp.float32)), (1, 2)))
    shapes = {a.shape, b.shape}
    assert made_in_loops(compiled.as_text(), shapes) == []
    assert made_in_loops(gradients.lower(x, a, b).compile().as_text(), shapes, whole=True) == []


def test_gradients_of_a_layer_are_those_of_xla() -> None:
    """The same program on the CPU runs XLA's form."""
    model = nnx.Sequential(
        nnx.Linear(256, 192, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    )
    apply_lora(model, slots=3, buckets=(16,), dtype=jnp.bfloat16)
    bank = AdapterBank(model)
    for name in ("used", "absent"):
        bank.create(name, LoRAConfig(rank=16, alpha=8), rngs=nnx.Rngs(1))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    keys = iter(jax.random.split(jax.random.key(2), 8))
    lora = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape, p.dtype) * 0.1, lora)
    x = jax.random.normal(jax.random.key(3), (20, 256), jnp.bfloat16)
    batch = bank.batch(["used", None] * 10)

    def loss(lora: Any, rest: Any, x: Any, batch: Any) -> Any:
        with use(batch):
            y = nnx.merge(graphdef, lora, rest)(x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    step = jax.jit(jax.grad(loss))
    args = lora, rest, x
    absent = int(bank.batch(["absent"]).indices[0])
    module = step.lower(*args, batch).as_text()
    assert "lora_r16" in module
    got = jax.tree.leaves(step(*args, batch))
    on_cpu = jax.device_put(args, jax.devices("cpu")[0])
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.tree.leaves(step(*on_cpu, batch))
    for a, b in zip(got, want):
        wide = np.asarray(b).astype(np.float64)
        assert relative_error(np.asarray(a), wide) < 8e-3
        assert not np.asarray(a[absent]).astype(np.float32).any()
