"""The Mosaic kernels on a Hopper GPU: every case of the contract against float64.

PYTHONPATH=. python3 -m pytest tests/gpu -m gpu -n 8
"""

import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_cases import (
    POPULARITIES,
    Arrays,
    Case,
    as_jax,
    bits,
    products,
    relative_error,
    v_tolerance,
    y_tolerance,
)

from pallas_kernels import LoRAPart, make_segments, mosaic_gpu

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


def poison() -> None:
    """Leaves NaNs where the next outputs are likely to be allocated."""
    jax.block_until_ready([jnp.full(2**k, jnp.nan) for k in (8, 12, 16, 20, 22)])


def shrink(arrays: dict[str, Any], config: Any = None) -> np.ndarray:
    @jax.jit
    def run(x: Any, a: Any, scales: Any, ids: Any) -> Any:
        return mosaic_gpu.shrink(x, a, make_segments(ids, a.shape[0]), scales, config=config)

    poison()
    return np.asarray(run(arrays["x"], arrays["a"], arrays["scales"], arrays["ids"]))


def expand(
    arrays: dict[str, Any], y_offset: int, add_inputs: bool = True, config: Any = None
) -> np.ndarray:
    @jax.jit
    def run(v: Any, b: Any, y: Any, ids: Any) -> Any:
        return mosaic_gpu.expand(
            v, b, make_segments(ids, b.shape[0]), y, y_offset,
            add_inputs=add_inputs, config=config,
        )  # fmt: skip

    poison()
    return np.asarray(run(arrays["v"], arrays["b"], arrays["y"], arrays["ids"]))


def add_lora(arrays: dict[str, Any], y_offset: int, config: Any = None) -> np.ndarray:
    @jax.jit
    def run(y: Any, x: Any, a: Any, b: Any, scales: Any, ids: Any) -> Any:
        part = LoRAPart(a, b, make_segments(ids, a.shape[0]), scales, y_offset)
        return mosaic_gpu.add_lora_multi(y, x, (part,), config=config)

    poison()
    order = ("y", "x", "a", "b", "scales", "ids")
    return np.asarray(run(*(arrays[name] for name in order)))


def check(case: Case, record: Any) -> None:
    arrays = case.arrays()
    device = as_jax(arrays)
    ids = np.where((arrays.ids >= 0) & (arrays.ids < case.num_adapters), arrays.ids, -1)
    columns = slice(case.y_offset, case.y_offset + case.width)
    scale = arrays.scales[np.maximum(ids, 0)][:, None].astype(np.float64)

    v = shrink(device)
    want_v = products(arrays.x, arrays.a, ids) * scale
    assert v.dtype == np.float32
    record("shrink", case, error := relative_error(v, want_v))
    assert error < v_tolerance(case.features)
    assert not bits(v)[ids < 0].any()  # exact zeros

    tolerance = y_tolerance(case.y_dtype, case.weight_dtype)
    if case.weight_dtype == "float16" and case.y_dtype == "float32":
        tolerance = y_tolerance("float16")

    def check_y(op: str, y: np.ndarray, delta: np.ndarray, add_inputs: bool = True) -> None:
        want = arrays.y.astype(np.float64)
        want[:, columns] = want[:, columns] * add_inputs + delta
        used = ids >= 0
        assert y.dtype == arrays.y.dtype
        np.testing.assert_array_equal(bits(y)[~used], bits(arrays.y)[~used])
        outside = np.ones(y.shape[1], bool)
        outside[columns] = False
        np.testing.assert_array_equal(bits(y)[:, outside], bits(arrays.y)[:, outside])
        if used.any():
            record(op, case, error := relative_error(y[used][:, columns], want[used][:, columns]))
            assert error < tolerance
            size = np.abs(want[used][:, columns]).max()
            assert np.abs(y[used].astype(np.float64) - want[used]).max() < 16 * tolerance * size

    half_v = arrays.v.astype(arrays.b.dtype)
    want_delta = products(half_v, arrays.b, ids)
    check_y("expand", expand(device, case.y_offset), want_delta)
    check_y("expand=", expand(device, case.y_offset, add_inputs=False), want_delta, False)
    want_delta = np.zeros_like(want_delta) + products(want_v, arrays.b, ids)
    check_y("add_lora", add_lora(device, case.y_offset), want_delta)


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
                 (4096, 11008), (29568, 64), (64, 128256), (131072, 64), (1000, 1000))
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, record: Any) -> None:
    check(case, record)


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
    before = as_jax(Arrays(clean.x, clean.a, clean.b, clean.y, clean.v, clean.scales, ids))
    after = as_jax(Arrays(x, a, b, y, v, clean.scales, ids))
    for run in (
        shrink,
        functools.partial(expand, y_offset=0),
        functools.partial(add_lora, y_offset=0),
    ):
        clean_out, out = run(before), run(after)
        np.testing.assert_array_equal(bits(out)[rest], bits(clean_out)[rest])
        if run is not shrink:
            np.testing.assert_array_equal(bits(out)[unused], bits(y)[unused])
        assert np.isnan(out[bad].astype(np.float32)).all()


@pytest.mark.parametrize("rank", [8, 16, 64, 128, 272])
@pytest.mark.parametrize("sizes", [(64, 32), (300, 64), (300, 7)], ids=str)
def test_a_row_depends_on_itself_alone(rank: int, sizes: tuple[int, int]) -> None:
    """Other rows, their order and their number change no bit, in one config; nor does a rerun."""
    many, few = sizes
    case = Case(many, 1024, 192, rank, 6)
    arrays = case.arrays()
    config = mosaic_gpu.default_config(many, 1024, 192, rank, 6)
    order = np.random.default_rng(5).permutation(many)[:few]
    picked = Arrays(
        arrays.x[order], arrays.a, arrays.b, arrays.y[order], arrays.v[order], arrays.scales,
        arrays.ids[order],
    )  # fmt: skip
    for run in (
        shrink,
        functools.partial(expand, y_offset=0),
        functools.partial(add_lora, y_offset=0),
    ):
        whole = run(as_jax(arrays), config=config)
        np.testing.assert_array_equal(bits(whole), bits(run(as_jax(arrays), config=config)))
        np.testing.assert_array_equal(bits(whole)[order], bits(run(as_jax(picked), config=config)))


@pytest.mark.parametrize("num_tokens", [1, 64, 300])
@pytest.mark.parametrize("offsets", [(0, 0), (0, 128), (0, 64), (0, 8)], ids=str)
def test_parts(num_tokens: int, offsets: tuple[int, int]) -> None:
    """Buckets and slices in one call, disjoint, equal and overlapping; one rounding."""
    ranks, width = ((8, 16, 64, 128, 32) if offsets == (0, 0) else (8, 16, 128)), 128
    cases = [Case(num_tokens, 512, width, r, 4, seed=r) for r in ranks]
    arrays = [case.arrays() for case in cases]
    x = arrays[0].x
    y = Case(num_tokens, 64, 2 * width + 64, 16, 1).arrays().y
    parts = [(z.a, z.b, z.ids, z.scales, o) for o in dict.fromkeys(offsets) for z in arrays]

    @jax.jit
    def run(y: Any, x: Any, stacks: Any) -> Any:
        built = tuple(
            LoRAPart(a, b, make_segments(ids, 4), scales, part[4])
            for (a, b, ids, scales), part in zip(stacks, parts)
        )
        return mosaic_gpu.add_lora_multi(y, x, built)

    stacks = [tuple(jnp.asarray(z) for z in part[:4]) for part in parts]
    poison()
    out = np.asarray(run(jnp.asarray(y), jnp.asarray(x), stacks))
    want, used = y.astype(np.float64), np.zeros(y.shape, bool)
    for a, b, ids, scales, offset in parts:
        columns = slice(offset, offset + width)
        v = products(x, a, ids) * scales[np.maximum(ids, 0)][:, None]
        want[:, columns] += products(v, b, ids)
        used[:, columns] |= (ids >= 0)[:, None]
    np.testing.assert_array_equal(bits(out)[~used], bits(y)[~used])
    assert relative_error(out[used], want[used]) < y_tolerance("bfloat16")
