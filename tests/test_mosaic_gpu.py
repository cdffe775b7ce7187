"""The Mosaic kernels without a GPU: interpreted with race detection, and lowered for CUDA.

tests/gpu holds the same cases on a device, where clusters exchange sums; here, where peers' shared
memory does not exist, partial sums go through device memory and XLA adds them.
"""

import collections
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_cases import (
    POPULARITIES,
    Arrays,
    Case,
    as_jax,
    bits,
    in_one_array,
    indices,
    products,
    relative_error,
    v_tolerance,
    y_tolerance,
)

import pallas_kernels as pk
from pallas_kernels import mosaic_gpu, ops
from pallas_kernels.mosaic_gpu import decode_plan, lanes, tiles
from pallas_kernels.mosaic_gpu.decode_tokens import seating
from pallas_kernels.mosaic_gpu.expand import expand_kernel
from pallas_kernels.mosaic_gpu.shrink import ShrinkPart, shrink_kernel
from pallas_kernels.segments import WideIndices

# The interpreter fills shared memory with NaN; numpy says so where a stack is not full.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def interpreted() -> Iterator[None]:
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def emulated() -> Iterator[None]:
    """For the decode kernel alone, whose emulator finds races by itself."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def shrink(z: dict[str, Any], config: Any = None) -> np.ndarray:
    segments = pk.make_segments(z["ids"], z["a"].shape[0])
    return np.asarray(
        jax.jit(functools.partial(mosaic_gpu.shrink, config=config))(
            z["x"], z["a"], segments, z["scales"]
        )
    )


def expand(z: dict[str, Any], y_offset: int = 0, config: Any = None) -> np.ndarray:
    return np.asarray(
        pk.bgmv_expand_slice(
            z["v"], z["b"], z["ids"], z["y"], y_offset, z["b"].shape[1],
            implementation="mosaic_gpu", config=config,
        )
    )  # fmt: skip


def add_lora(
    z: dict[str, Any],
    y_offset: int = 0,
    config: Any = None,
    *,
    fuse: bool = False,
    seated: bool = False,
) -> np.ndarray:
    """Of raw ids, whose tokens the decode kernel finds, or `seated` by XLA."""
    ids = pk.make_segments(z["ids"], z["a"].shape[0]) if seated else z["ids"]
    part = pk.LoRAPart(z["a"], z["b"], ids, z["scales"], y_offset)
    return np.asarray(
        pk.add_lora_multi(
            z["y"], z["x"], (part,), implementation="mosaic_gpu", fuse=fuse, config=config
        )
    )


# The emulated kernels take seconds for what a device test does too.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TWO = mosaic_gpu.Config(split=2)  # launches
DECODE = mosaic_gpu.Config(split=2, warps=4, stages=2, expand_stages=2)
WAYS = pytest.mark.parametrize(
    ("config", "fuse"),
    [(DECODE, False), (DECODE, True), (TWO, False)],
    ids=["one launch", "fused", "two launches"],
)
TINY = [
    Case(9, 72, 80, 8, 3, "uniform"),
    slow(Case(5, 256, 64, 16, 4, "distinct")),
    slow(Case(70, 128, 96, 16, 3, "zipf")),
    Case(130, 64, 64, 32, 2, "identical"),
    slow(Case(66, 64, 64, 16, 3, "none")),
    Case(1, 128, 64, 64, 2, "identical"),
    Case(10, 64, 64, 48, 3, "out_of_range"),
    slow(Case(7, 384, 72, 272, 2, "uniform")),
    Case(3, 128, 64, 16, 2, "uniform", "float32", "bfloat16", "float32"),
    Case(9, 64, 64, 8, 2, "uniform", "float32", "float16", "float16"),
    Case(4, 64, 64, 16, 2, "uniform", "float16", "bfloat16", "bfloat16"),
    slow(Case(4, 64, 64, 16, 2, "uniform", "bfloat16", "float16", "bfloat16")),
    Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_interpreted_against_float64(case: Case, interpreted: None) -> None:
    arrays = case.arrays()
    z = as_jax(arrays)
    ids = np.where((arrays.ids >= 0) & (arrays.ids < case.num_adapters), arrays.ids, -1)
    used, columns = ids >= 0, slice(case.y_offset, case.y_offset + case.width)
    want_v = products(arrays.x, arrays.a, ids) * arrays.scales[np.maximum(ids, 0)][:, None]

    v = shrink(z)
    assert relative_error(v, want_v) < v_tolerance(case.features)
    assert not bits(v)[~used].any()
    for y, delta in (
        (expand(z, case.y_offset), products(arrays.v.astype(arrays.b.dtype), arrays.b, ids)),
        (add_lora(z, case.y_offset, TWO), products(want_v, arrays.b, ids)),
    ):
        want = arrays.y.astype(np.float64)
        want[:, columns] += delta
        assert relative_error(y, want) < y_tolerance(case.y_dtype, case.weight_dtype)
        np.testing.assert_array_equal(bits(y)[~used], bits(arrays.y)[~used])
        outside = np.ones(y.shape[1], bool)
        outside[columns] = False
        np.testing.assert_array_equal(bits(y)[:, outside], bits(arrays.y)[:, outside])


def test_a_v_that_is_not_float32_is_cast_too(interpreted: None) -> None:
    z = as_jax(Case(3, 64, 64, 16, 2).arrays())
    z["v"] = z["v"].astype(jnp.float16)
    want = products(np.asarray(z["v"]), np.asarray(z["b"]), np.asarray(z["ids"]))
    got = expand(z)
    assert relative_error(got, np.asarray(z["y"]).astype(np.float64) + want) < y_tolerance(
        "bfloat16"
    )


@WAYS
def test_nothing_leaks(config: Any, fuse: bool, request: pytest.FixtureRequest) -> None:
    """NaN in unused slots, in a row of -1 or in another row reaches no output."""
    request.getfixturevalue("emulated" if config is DECODE else "interpreted")
    clean = Case(9, 64, 64, 16, 4).arrays()
    ids = np.array([0, -1, 3, 0, 2, -1, 2, 0, 3], np.int32)
    x, y, v, a, b = (np.array(z) for z in (clean.x, clean.y, clean.v, clean.a, clean.b))
    a[1], b[1], x[1], v[1], x[2], v[2] = np.nan, np.nan, np.nan, np.inf, np.nan, np.nan
    y[1], y[5] = np.nan, -0.0
    before = as_jax(Arrays(clean.x, clean.a, clean.b, clean.y, clean.v, clean.scales, ids))
    after = as_jax(Arrays(x, a, b, y, v, clean.scales, ids))
    rest = [0, 3, 4, 6, 7, 8]
    for run in (shrink, expand, functools.partial(add_lora, fuse=fuse)):
        out = run(after, config=config)
        np.testing.assert_array_equal(bits(out)[rest], bits(run(before, config=config))[rest])
        if run is not shrink:
            np.testing.assert_array_equal(bits(out)[[1, 5]], bits(y)[[1, 5]])
        assert np.isnan(out[2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (Case(70, 64, 200, 16, 3, "zipf"), dict(expand_columns=5)),  # the last block has fewer
        slow(Case(130, 64, 136, 32, 3, "uniform"), dict(expand_columns=3, expand_stages=3)),
        (Case(9, 64, 96, 8, 4, "distinct", y_dtype="float32"), dict(expand_columns=6)),
        (Case(66, 64, 112, 16, 3, "uniform"), dict(expand_columns=7, expand_stack=2)),
        (Case(66, 64, 64, 16, 3, "none"), dict(expand_columns=4)),
        (Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(expand_columns=2)),
    ],
    ids=str,
)
def test_expand_takes_columns_in_turn(
    case: Case, change: dict[str, int], interpreted: None
) -> None:
    arrays = case.arrays()
    z, config = as_jax(arrays), mosaic_gpu.Config(block_n=16, **change)
    y = expand(z, case.y_offset, config)
    want, columns = arrays.y.astype(np.float64), slice(case.y_offset, case.y_offset + case.width)
    want[:, columns] += products(arrays.v.astype(arrays.b.dtype), arrays.b, arrays.ids)
    assert relative_error(y, want) < y_tolerance(case.y_dtype, case.weight_dtype)
    one = expand(z, case.y_offset, dataclasses.replace(config, expand_columns=1))
    np.testing.assert_array_equal(bits(y), bits(one))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_shrink_takes_any_number_of_stages(stages: int, interpreted: None) -> None:
    arrays = Case(5, 640, 64, 16, 3, "uniform").arrays()
    v = shrink(as_jax(arrays), mosaic_gpu.Config(split=1, stages=stages))
    want = products(arrays.x, arrays.a, arrays.ids)
    want *= arrays.scales[np.maximum(arrays.ids, 0)][:, None]
    assert relative_error(v, want) < v_tolerance(640)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        slow(Case(70, 64, 72, 8, 3, "zipf"), dict(expand_columns=3)),
        slow(
            Case(130, 128, 64, 48, 3, "uniform"),
            dict(stages=1, stack=2, chunks=2, expand_stack=2),
        ),
        slow(Case(140, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(expand_columns=2)),
        slow(Case(130, 64, 64, 16, 2, "uniform", "float32", "bfloat16", "float32"), dict(split=1)),
        slow(Case(70, 1024, 64, 64, 2, "uniform", "float32", "bfloat16", "float32"), dict(split=1)),
        (Case(70, 64, 64, 16, 140, "identical"), {}),  # a route in two copies
        slow(Case(130, 64, 64, 16, 3, "none"), {}),
    ],
    ids=str,
)
def test_two_tiles_share_what_a_block_loads(
    case: Case, change: dict[str, int], interpreted: None
) -> None:
    arrays = case.arrays()
    z, ids = as_jax(arrays), arrays.ids
    one = mosaic_gpu.Config(**{"split": 2, "block_n": 32, **change})
    two = dataclasses.replace(one, row_tiles=2, expand_row_tiles=2)
    want_v = products(arrays.x, arrays.a, ids) * arrays.scales[np.maximum(ids, 0)][:, None]
    columns = slice(case.y_offset, case.y_offset + case.width)
    want = arrays.y.astype(np.float64)
    want[:, columns] += products(want_v, arrays.b, ids)

    v, y = shrink(z, two), add_lora(z, case.y_offset, two)
    assert relative_error(v, want_v) < v_tolerance(case.features)
    assert relative_error(y, want) < y_tolerance(case.y_dtype, case.weight_dtype)
    np.testing.assert_array_equal(bits(v), bits(shrink(z, one)))
    np.testing.assert_array_equal(bits(y), bits(add_lora(z, case.y_offset, one)))


def ids_of_three_parts() -> np.ndarray:
    """Of 200 tokens, in tiles where none, one, all and two of the parts have adapters."""
    ids = np.random.default_rng(1).integers(-1, 4, (3, 4, 64))
    ids[:, 0], ids[::2, 1], ids[1, 3] = -1, -1, -1
    return ids.reshape(3, -1)[:, :200].astype(np.int32)


def take_parts_in_turn(monkeypatch: pytest.MonkeyPatch, *, in_turn: bool = True) -> None:
    module = sys.modules[shrink_kernel.__module__]
    monkeypatch.setattr(module, "MULTIPROCESSORS", 0 if in_turn else 1000)


@pytest.mark.parametrize("planes", [1, slow(3)])
def test_shrink_has_more_stages_where_a_tile_has_one_adapter(
    planes: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[shrink_kernel.__module__]
    # Tiles with two adapters, one, three, and none.
    ids = np.repeat([0, 1, 2, 0, 1, -1], [40, 24, 64, 20, 44, 60]).astype(np.int32)
    ids[-61] = 2
    dtype = "bfloat16" if planes == 1 else "float32"
    case = Case(len(ids), 256, 64, 16, 3, "uniform", dtype, "bfloat16")
    z = {**as_jax(case.arrays()), "ids": jnp.asarray(ids)}
    # Columns of 64 in shared memory: three with one adapter, two with two.
    room = 12 * 1024 + 3 * 64 * 2 * (planes * 64 + 16)
    monkeypatch.setattr(module, "_PIPELINE_BYTES", room)
    want = shrink(z, one := mosaic_gpu.Config(split=1))
    seen, smem = set(), module.plgpu.SMEM
    monkeypatch.setattr(
        module.plgpu, "SMEM", lambda shape, *a, **k: seen.add(shape) or smem(shape, *a, **k)
    )
    v = shrink(z, dataclasses.replace(one, stack=2))
    np.testing.assert_array_equal(bits(v), bits(want))
    assert {(3, 16, 64), (2, 32, 64)} <= seen


@pytest.mark.parametrize(("zero_rows", "row_tiles"), [slow(False, 1), (True, 1), slow(True, 2)])
def test_shrink_takes_parts_in_turn(
    zero_rows: bool, row_tiles: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One block, two chunks, and two blocks of ranks.
    ranks = {8: {}, 16: dict(stack=2, chunks=2), 96: dict(rank_block=48)}
    rng, ids = np.random.default_rng(0), ids_of_three_parts()
    x = rng.standard_normal((200, 384)).astype(ml_dtypes.bfloat16)  # 3 steps for 2 stages
    parts, wants = [], []
    for (rank, change), mine in zip(ranks.items(), ids):
        a = (rng.standard_normal((4, rank, 384)) / 20).astype(ml_dtypes.bfloat16)
        scales = rng.uniform(0.5, 2.0, 4).astype(np.float32)
        config = mosaic_gpu.Config(split=1, stages=2, row_tiles=row_tiles, **change)
        segments = pk.make_segments(jnp.asarray(mine), 4)
        together = jnp.append(jnp.full(rank, jnp.nan), scales)
        parts.append(ShrinkPart(jnp.asarray(a), together, segments, np.float32, config, rank))
        wants.append(products(x, a, mine) * scales[np.maximum(mine, 0)][:, None])

    def run(in_turn: bool) -> list[np.ndarray]:
        take_parts_in_turn(monkeypatch, in_turn=in_turn)
        sums = shrink_kernel(jnp.asarray(x)[None], tuple(parts), 200, zero_rows=zero_rows)
        return [np.asarray(v.sum(axis=0)) for v in sums]

    for v, other, want, mine in zip(run(True), run(False), wants, ids):
        used = mine >= 0
        assert relative_error(v[used], want[used]) < v_tolerance(384)
        np.testing.assert_array_equal(bits(v)[used], bits(other)[used])
        assert not zero_rows or not v[~used].any()


@pytest.mark.parametrize(
    ("exclusive", "row_tiles", "shared_bytes"),
    [slow(False, 1, 2**20), (True, 1, 2**20), slow(False, 2, 2**20), (False, 1, 20 * 1024)],
)
def test_overlapping_parts_of_mixed_ranks(
    exclusive: bool,
    row_tiles: int,
    shared_bytes: int,
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All parts at once, or in turns: each alone, or two and then one, as 20 KiB hold."""
    take_parts_in_turn(monkeypatch)
    monkeypatch.setattr(sys.modules[expand_kernel.__module__], "_SHARED_BYTES", shared_bytes)
    ids, parts = ids_of_three_parts(), []
    if exclusive:
        for n in (1, 2):
            ids[n][(ids[:n] >= 0).any(axis=0)] = -1
    first = Case(200, 128, 64, 8, 4, y_extra=16).arrays()
    want = first.y.astype(np.float64)
    for rank, offset, mine in zip((8, 16, 64), (0, 0, 16), ids):
        z = Case(200, 128, 64, rank, 4, seed=rank).arrays()
        stacks = jnp.asarray(z.a), jnp.asarray(z.b)
        parts.append(pk.LoRAPart(*stacks, jnp.asarray(mine), jnp.asarray(z.scales), offset))
        v = products(first.x, z.a, mine) * z.scales[np.maximum(mine, 0)][:, None]
        want[:, offset : offset + 64] += products(v, z.b, mine)
    config = mosaic_gpu.Config(
        split=2, block_n=16, expand_columns=2, row_tiles=row_tiles, expand_row_tiles=row_tiles
    )

    def run(promise: bool) -> np.ndarray:
        y = pk.add_lora_multi(
            jnp.asarray(first.y), jnp.asarray(first.x), tuple(parts),
            implementation="mosaic_gpu", config=config, exclusive=promise,
        )  # fmt: skip
        return np.asarray(y)

    y = run(exclusive)
    assert relative_error(y, want) < y_tolerance("bfloat16")
    unused = (ids < 0).all(axis=0)
    np.testing.assert_array_equal(bits(y)[unused], bits(first.y)[unused])
    if exclusive:
        np.testing.assert_array_equal(bits(y), bits(run(False)))


@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        ((512, 256, 128, 64), {}),
        slow((192, 160, 336, 448, 416), {}),  # arrays in shared memory take whole KiB
        slow((512,) * 5, {}),  # in turns of three and two
        ((512, 384), dict(block_n=72, expand_columns=8)),  # 72 has no half that is a multiple of 8
        ((512, 64), dict(row_tiles=2, expand_row_tiles=2, expand_columns=8)),
        ((512, 384), dict(row_tiles=2, expand_row_tiles=2)),  # v of 128 rows does not fit
    ],
    ids=str,
)
def test_overlapping_parts_of_high_ranks_fit_shared_memory(
    ranks: tuple[int, ...], change: dict[str, int]
) -> None:
    config = mosaic_gpu.Config(**change) if change else None

    def step(y: Any, x: Any, ids: Any, stacks: Any) -> Any:
        parts = [pk.LoRAPart(a, b, ids, None, 32 * n) for n, (a, b) in enumerate(stacks)]
        return pk.add_lora_multi(
            y, x, parts, phase="prefill", implementation="mosaic_gpu", config=config
        )

    half = jnp.bfloat16
    stacks = [
        tuple(jax.ShapeDtypeStruct((4, *shape), half) for shape in ((r, 256), (512, r)))
        for r in ranks
    ]
    operands = [jax.ShapeDtypeStruct((4096, n), half) for n in (1024, 256)]
    ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
    traced = jax.jit(step).trace(*operands, ids, stacks)
    name = "_".join(["lora_expand", *(f"r{rank}" for rank in ranks)])
    assert name in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_a_row_depends_on_itself_alone(interpreted: None) -> None:
    """In one config, other rows, their order and their number change no bit."""
    arrays = Case(70, 128, 64, 16, 3).arrays()
    config = mosaic_gpu.Config(split=2, stack=2, chunks=2, stages=2, block_n=32, expand_stack=2)
    order = np.random.default_rng(5).permutation(70)[:9]
    picked = Arrays(
        arrays.x[order], arrays.a, arrays.b, arrays.y[order], arrays.v[order], arrays.scales,
        arrays.ids[order],
    )  # fmt: skip
    for run in (shrink, expand, add_lora):
        whole = run(as_jax(arrays), config=config)
        np.testing.assert_array_equal(bits(whole)[order], bits(run(as_jax(picked), config=config)))


DECODE_TINY = [
    (Case(9, 584, 136, 8, 9, "uniform"), {}),
    (Case(5, 256, 64, 16, 4, "distinct"), dict(column_clusters=2)),
    (Case(70, 128, 200, 32, 3, "zipf"), dict(warps=8)),
    (Case(20, 128, 192, 16, 2, "identical"), dict(split=4)),
    (Case(130, 64, 64, 16, 3, "none"), {}),
    slow(Case(140, 64, 64, 16, 2, "uniform"), {}),
    (Case(10, 64, 64, 48, 3, "out_of_range"), dict(warps=16)),
    (Case(3, 1472, 64, 80, 2, "uniform"), dict(split=1)),  # 23 units of H: rings turn
    (Case(2, 256, 64, 272, 2, "uniform"), dict(expand_stages=3)),
    (Case(2, 64, 2568, 16, 2, "uniform"), dict(expand_stages=3)),  # loops over y's columns
    (Case(2, 5000, 64, 64, 1, "uniform"), dict(split=1, stages=3)),  # and over H
    (Case(3, 128, 352, 64, 2, "uniform", y_dtype="float32"), {}),
    (Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(column_clusters=2)),
    (Case(4, 64, 64, 16, 2, "uniform", "float16", "float16", "float16"), {}),
]


@pytest.mark.parametrize(("case", "change"), DECODE_TINY, ids=str)
def test_decode_emulated_against_float64(
    case: Case, change: dict[str, int], emulated: None
) -> None:
    arrays = case.arrays()
    ids = np.where((arrays.ids >= 0) & (arrays.ids < case.num_adapters), arrays.ids, -1)
    columns = slice(case.y_offset, case.y_offset + case.width)
    config = dataclasses.replace(DECODE, **change)
    part = decode_plan.DecodePart(arrays.a, arrays.b, arrays.scales, 0, case.y_offset)
    assert decode_plan.plan((arrays.y,), arrays.x, (part,), config) is not None

    z = as_jax(arrays)

    want_v = products(arrays.x, arrays.a, ids) * arrays.scales[np.maximum(ids, 0)][:, None]
    v = shrink(z, config)
    assert relative_error(v, want_v) < v_tolerance(case.features)
    assert not bits(v)[ids < 0].any()
    for y, delta in (
        (
            expand(z, case.y_offset, config),
            products(arrays.v.astype(arrays.b.dtype), arrays.b, ids),
        ),
        (add_lora(z, case.y_offset, config), products(want_v, arrays.b, ids)),
        (add_lora(z, case.y_offset, config, fuse=True), products(want_v, arrays.b, ids)),
        (add_lora(z, case.y_offset, config, seated=True), products(want_v, arrays.b, ids)),
    ):
        want = arrays.y.astype(np.float64)
        want[:, columns] += delta
        assert relative_error(y, want) < y_tolerance(case.y_dtype, case.weight_dtype)
        np.testing.assert_array_equal(bits(y)[ids < 0], bits(arrays.y)[ids < 0])
        outside = np.ones(y.shape[1], bool)
        outside[columns] = False
        np.testing.assert_array_equal(bits(y)[:, outside], bits(arrays.y)[:, outside])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_decode_shrink_adds_to_v(dtype: str, wide: bool, emulated: None) -> None:
    """And takes ids as they come: outside of the slots they are none, 64 bits are two words."""
    arrays = Case(11, 128, 64, 16, 3, "out_of_range").arrays()
    ids = arrays.ids.astype(np.int64)
    if wide:
        ids[1::3] += 2**32  # whose low word is a slot
    used = (ids >= 0) & (ids < 3)
    v = arrays.v.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    given: Any = jnp.asarray(arrays.ids)
    if wide:
        given = WideIndices(jnp.asarray(ids[:, None].view(np.int32)))
    out = ops.add_shrink(
        v, arrays.x, arrays.a, given, scale=0.5, implementation="mosaic_gpu", config=DECODE
    )
    want = v.astype(np.float64) + 0.5 * products(arrays.x, arrays.a, np.where(used, ids, -1))
    tolerance = v_tolerance(128) if dtype == "float32" else y_tolerance(dtype)
    assert out.dtype == v.dtype
    assert relative_error(out, want) < tolerance
    np.testing.assert_array_equal(bits(out)[~used], bits(v)[~used])
    by_xla = ops.add_shrink(v, arrays.x, arrays.a, given, scale=0.5, implementation="xla")
    np.testing.assert_array_equal(bits(by_xla)[~used], bits(v)[~used])


@pytest.mark.parametrize("v_dtype", ["float32", "bfloat16"])
def test_decode_expand_overwrites(v_dtype: str, emulated: None) -> None:
    arrays = Case(9, 64, 136, 16, 3).arrays()
    v = arrays.v.astype(ml_dtypes.bfloat16 if v_dtype == "bfloat16" else v_dtype)
    out = pk.bgmv_expand(
        v, arrays.b, arrays.ids, arrays.y, add_inputs=False, implementation="mosaic_gpu",
        config=DECODE,
    )  # fmt: skip
    used = arrays.ids >= 0
    want = products(v.astype(arrays.b.dtype), arrays.b, arrays.ids)
    assert relative_error(out[used], want[used]) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(out)[~used], bits(arrays.y)[~used])


def test_decode_rows_depend_on_themselves_alone(emulated: None) -> None:
    arrays = Case(40, 256, 64, 16, 3).arrays()
    order = np.random.default_rng(5).permutation(40)[:9]
    picked = Arrays(
        arrays.x[order], arrays.a, arrays.b, arrays.y[order], arrays.v[order], arrays.scales,
        arrays.ids[order],
    )  # fmt: skip
    whole = add_lora(as_jax(arrays), config=DECODE)
    few = add_lora(as_jax(picked), config=DECODE)
    np.testing.assert_array_equal(bits(whole)[order], bits(few))
    seated = add_lora(as_jax(arrays), config=DECODE, seated=True)
    np.testing.assert_array_equal(bits(seated), bits(whole))


@hypothesis.given(tokens=st.integers(1, 256), data=st.data())
@hypothesis.settings(max_examples=10, deadline=None)
def test_seating_gives_each_leader_its_clusters(tokens: int, data: Any) -> None:
    ranks = data.draw(st.lists(st.sampled_from([8, 16, 64, 128]), min_size=1, max_size=3))
    slots = [data.draw(st.sampled_from([1, 2, 3, 9, 40, 300])) for _ in ranks]
    parts = tuple(
        decode_plan.DecodePart(
            jnp.zeros((n, rank, 64)), jnp.zeros((n, 64, rank)), jnp.ones(1), ids, 0
        )
        for ids, (n, rank) in enumerate(zip(slots, ranks))
    )
    x = jnp.zeros((tokens, 64))
    config = dataclasses.replace(DECODE, column_clusters=data.draw(st.sampled_from([1, 4, 12])))
    plan = decode_plan.plan((x,), x, parts, config, exclusive=True, seated=True)
    assert plan is not None
    starts = np.cumsum([0, *slots])
    used = data.draw(st.lists(st.integers(-1, sum(slots) - 1), min_size=1, max_size=tokens))
    keys = data.draw(hnp.arrays(np.int32, tokens, elements=st.sampled_from(used)))
    ids = np.searchsorted(starts, keys, side="right") - 1
    shares = np.array([plan.dealt(i) if key >= 0 else 0 for i, key in zip(ids, keys)])
    number: collections.Counter[int] = collections.Counter()
    groups: dict[tuple[int, int], list[int]] = {}  # by key and eight, in the leaders' order
    for token, key in enumerate(keys.tolist()):
        if key >= 0:
            groups.setdefault((key, number[key] // 8), []).append(token)
            number[key] += 1
    want = [
        [*mine, *[-1] * (8 - len(mine)), key, column]
        for (key, _), mine in sorted(groups.items(), key=lambda group: -shares[group[1][0]])
        for column in range(shares[mine[0]])
    ]
    clusters, columns = plan.grid
    assert len(want) <= clusters and columns == 1
    want += [[-1] * 9 + [0]] * (clusters - len(want))
    table = seating(jnp.asarray(keys), jnp.asarray(shares, jnp.int32), clusters)
    np.testing.assert_array_equal(table, want)


def test_copies_of_a_are_at_once_with_two_blocks_on_a_multiprocessor() -> None:
    """Of 16 clusters, one block on a multiprocessor, some would wait for others to end."""

    def plan_of(tokens: int, *ranks: int) -> decode_plan.Plan:
        x = jnp.zeros((tokens, 4096), jnp.bfloat16)
        parts = tuple(
            decode_plan.DecodePart(
                jnp.zeros((64, rank, 4096), x.dtype), jnp.zeros((64, 4096, rank), x.dtype),
                jnp.ones(1), ids, 0,
            )
            for ids, rank in enumerate(ranks)
        )  # fmt: skip
        config = mosaic_gpu.config.decode_config(
            tokens, 4096, 4096, max(ranks), buckets=len(ranks), exclusive=True
        )
        plan = decode_plan.plan((x,), x, parts, config, exclusive=True, seated=True)
        assert plan is not None
        return plan

    for tokens, rank in itertools.product((1, 16, 64), (16, 64, 128)):
        plan = plan_of(tokens, rank)
        assert plan.a_stages(plan.jobs[0]) == 2  # of two turns
        if tokens > 1:
            assert 2 * 4 * plan.words <= 226 * 1024
    # The memory that the highest rank asks for gives the others all that they use.
    plan = plan_of(64, 8, 16, 32, 64, 128)
    assert [plan.a_stages(job) for job in plan.jobs[:4]] == [2] * 4
    assert [plan.b_stages(job, job.strips[0]) for job in plan.jobs[:4]] == [4, 4, 4, 2]
    assert 4 * plan.words <= 80 * 1024  # what some products leave that it is to run beside


def test_indices_of_no_slot_are_none_where_segments_are_made_by_hand(emulated: None) -> None:
    arrays = Case(5, 128, 72, 16, 3).arrays()
    ids = jnp.asarray([0, 3, 1, -1, 7], jnp.int32)
    segments = dataclasses.replace(pk.make_segments(ids, 3), indices=ids)
    part = pk.LoRAPart(arrays.a, arrays.b, segments, arrays.scales)
    for fuse in (False, True):
        out = pk.add_lora_multi(
            arrays.y, arrays.x, (part,), implementation="mosaic_gpu", fuse=fuse, config=DECODE
        )
        kept = np.array([1, 3, 4])
        np.testing.assert_array_equal(bits(np.asarray(out))[kept], bits(arrays.y)[kept])
        assert np.isfinite(np.asarray(out, np.float32)).all()


SCATTERED = [
    (Case(3, 1024, 72, 128, 2), {}),  # as ranks of 128 are
    (Case(9, 512, 64, 80, 3), {}),  # 20 columns in fours are three for each block, and then too few
    (Case(5, 256, 64, 48, 2), dict(split=4, warps=8)),
    (Case(4, 512, 64, 48, 2), dict(column_clusters=2)),  # two blocks add up nothing
]


@pytest.mark.parametrize(("case", "change"), SCATTERED, ids=str)
def test_who_adds_up_sums_changes_no_bit(
    case: Case, change: dict[str, int], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, config, outs = case.arrays(), dataclasses.replace(DECODE, **change), []
    for scatters in (True, False):
        monkeypatch.setattr(decode_plan.Plan, "scatters", scatters)
        outs.append(add_lora(as_jax(arrays), config=config, seated=True))
    np.testing.assert_array_equal(bits(outs[0]), bits(outs[1]))
    assert np.isfinite(np.asarray(outs[0], np.float32)).all()
    assert not np.array_equal(bits(outs[0]), bits(arrays.y))


@pytest.mark.parametrize("which", ["barrier", "warp_barrier", "cluster_barrier", "arrived"])
def test_the_emulator_finds_a_missing_barrier(
    which: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = as_jax(Case(3, 640, 1032, 16, 2).arrays())
    want = add_lora(z, config=DECODE)
    monkeypatch.setattr(lanes.Emulator, which, lambda *_: None)
    if which == "arrived":  # what is on its way is NaN
        assert not np.array_equal(bits(add_lora(z, config=DECODE)), bits(want))
    else:
        with pytest.raises(Exception, match="barrier"):
            add_lora(z, config=DECODE)


def test_the_emulator_finds_a_missing_barrier_between_jobs(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job's sums would be pushed over those that others still read."""
    cases = [Case(3, 640, 1032, rank, 2, seed=rank).arrays() for rank in (16, 8)]
    x, y, ids = cases[0].x, cases[0].y, jnp.zeros(3, jnp.int32)
    parts = [pk.LoRAPart(z.a, z.b, ids + 0, z.scales) for z in cases]
    add = functools.partial(pk.add_lora_multi, implementation="mosaic_gpu", config=DECODE)
    assert np.isfinite(np.asarray(add(y, x, parts), np.float32)).all()
    calls: collections.Counter[int] = collections.Counter()
    barrier = lanes.Emulator.cluster_barrier

    def all_but_the_second(self: Any) -> None:
        calls[id(self)] += 1
        if calls[id(self)] != 2:
            barrier(self)

    monkeypatch.setattr(lanes.Emulator, "cluster_barrier", all_but_the_second)
    with pytest.raises(Exception, match="pushed without a barrier of the cluster"):
        add(y, x, parts)


@pytest.mark.parametrize("missing", [1, 2])
def test_the_emulator_finds_a_missing_barrier_where_blocks_add_up_for_others(
    missing: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_plan.Plan, "scatters", True)
    z = as_jax(Case(3, 640, 64, 32, 1, "identical").arrays())
    assert np.isfinite(np.asarray(add_lora(z, config=DECODE), np.float32)).all()
    calls: collections.Counter[int] = collections.Counter()
    barrier = lanes.Emulator.cluster_barrier

    def all_but_one(self: Any) -> None:
        calls[id(self)] += 1
        if calls[id(self)] != missing:
            barrier(self)

    monkeypatch.setattr(lanes.Emulator, "cluster_barrier", all_but_one)
    with pytest.raises(Exception, match="barrier"):
        add_lora(z, config=DECODE)


@pytest.mark.parametrize("fuse", [False, True], ids=["in place", "fused"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla", "loop"])
@pytest.mark.parametrize("column_clusters", [1, 2, slow(3), 7])
@pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")
def test_parts_of_several_ys(
    implementation: str, column_clusters: int, fuse: bool, emulated: None
) -> None:
    """Two buckets of three projections, a part from one into the next, and tokens with several
    adapters: every column is some one cluster's, whatever their number."""
    widths, ranks = (72, 64, 200), (16, 64)
    arrays = [Case(13, 128, sum(widths), rank, 3, seed=rank).arrays() for rank in ranks]
    x, whole = arrays[0].x, arrays[0].y
    edges = [0, *np.cumsum(widths).tolist()]
    spans = [*itertools.pairwise(edges), (40, 160)]
    parts = [
        pk.LoRAPart(z.a, z.b[:, start:stop], ids, z.scales, start)
        for z, ids in zip(arrays, [jnp.asarray(z.ids) for z in arrays])
        for start, stop in spans
    ]
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    out = pk.add_lora_multi(
        tuple(np.split(whole, edges[1:-1], axis=1)), x, parts, implementation=implementation,
        fuse=fuse, config=config if implementation == "mosaic_gpu" else None,
    )  # fmt: skip
    assert [y.shape for y in out] == [(13, width) for width in widths]
    want, used = whole.astype(np.float64), np.zeros(whole.shape, bool)
    for part in parts:
        ids, columns = (
            np.asarray(part.indices),
            slice(part.y_offset, part.y_offset + len(part[1][0])),
        )
        v = products(x, part.lora_a, ids) * part.scales[np.maximum(ids, 0)][:, None]
        want[:, columns] += products(v, part.lora_b, ids)
        used[:, columns] |= (ids >= 0)[:, None]
    side_by_side = np.concatenate(out, axis=1)
    assert relative_error(side_by_side, want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(side_by_side)[~used], bits(whole)[~used])


@pytest.mark.parametrize("fuse", [False, True], ids=["in place", "fused"])
@pytest.mark.parametrize("seated", [False, True], ids=["raw ids", "segments"])
@pytest.mark.parametrize("column_clusters", [slow(1), slow(3), 8])
def test_exclusive_lists(column_clusters: int, seated: bool, fuse: bool, emulated: None) -> None:
    """Rank buckets give the bits that they give without the promise, however they are dealt, and
    wherever the stacks lie."""
    ranks, widths = (8, 16, 32, 128), (72, 200)
    bucket = np.array([0, 3, 1, 3, -1, 2, 3, 0, 3, 2, 3, 3, 3])
    slots = np.array([0, 1, 2, 1, 0, 3, 1, 0, 1, 1, 0, 1, 1])  # seven of one adapter
    ids: list[Any] = [np.where(bucket == n, slots, -1).astype(np.int32) for n in range(len(ranks))]
    ids[0][4] = 9  # none: there are four
    meant = [np.where((i >= 0) & (i < 4), i, -1) for i in ids]
    lists = [*map(jnp.asarray, ids[:2]), pk.make_segments(ids[2], 4)]
    lists.append(WideIndices(jnp.stack([jnp.asarray(ids[3]), jnp.asarray(ids[3]) >> 31], axis=1)))
    if seated:
        lists = [pk.make_segments(i, 4) for i in ids]
    arrays = [Case(13, 128, sum(widths), rank, 4, seed=rank).arrays() for rank in ranks]
    x, whole = arrays[0].x, arrays[0].y
    scales = np.concatenate([z.scales for z in arrays])
    parts = [
        pk.LoRAPart(z.a, z.b[:, start:stop], route, scales, start, 4 * n)
        for n, (z, route) in enumerate(zip(arrays, lists))
        for start, stop in ((0, 72), (72, 272))
    ]
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    outs = [
        np.concatenate(
            pk.add_lora_multi(
                tuple(np.split(whole, [72], axis=1)), x, placed, implementation="mosaic_gpu",
                fuse=fuse, exclusive=exclusive, config=config,
            ),
            axis=1,
        )
        for exclusive, placed in ((True, parts), (False, parts), (True, in_one_array(parts)))
    ]  # fmt: skip
    for other in outs[1:]:
        np.testing.assert_array_equal(bits(outs[0]), bits(other))
    want = whole.astype(np.float64)
    for z, mine in zip(arrays, meant):
        v = products(x, z.a, mine) * z.scales[np.maximum(mine, 0)][:, None]
        want += products(v, z.b, mine)
    assert relative_error(outs[0], want) < y_tolerance("bfloat16")
    used = functools.reduce(np.logical_or, [mine >= 0 for mine in meant])
    np.testing.assert_array_equal(bits(outs[0])[~used], bits(whole)[~used])


@pytest.mark.parametrize("fuse", [False, True], ids=["in place", "fused"])
@pytest.mark.parametrize("seated", [False, True], ids=["raw ids", "segments"])
def test_of_lists_that_are_not_exclusive_the_first_counts(
    seated: bool, fuse: bool, emulated: None
) -> None:
    """Whatever columns the others cover: nothing undefined comes out."""
    arrays = [Case(5, 128, 72, rank, 2, seed=rank).arrays() for rank in (16, 8)]
    lists = [np.array(ids, np.int32) for ids in ([0, -1, 1, -1, 0], [1, 0, 0, -1, -1])]
    x, whole = arrays[0].x, Case(5, 128, 144, 8, 1).arrays().y
    parts = [
        pk.LoRAPart(
            z.a, z.b, pk.make_segments(ids, 2) if seated else jnp.asarray(ids), z.scales, 72 * n
        )
        for n, (z, ids) in enumerate(zip(arrays, lists))
    ]
    out = pk.add_lora_multi(
        whole, x, parts, implementation="mosaic_gpu", fuse=fuse, exclusive=True, config=DECODE
    )
    want, used = whole.astype(np.float64), np.zeros(whole.shape, bool)
    counts = [lists[0], np.where(lists[0] >= 0, -1, lists[1])]
    for n, (z, ids) in enumerate(zip(arrays, counts)):
        v = products(x, z.a, ids) * z.scales[np.maximum(ids, 0)][:, None]
        want[:, 72 * n : 72 * n + 72] += products(v, z.b, ids)
        used[:, 72 * n : 72 * n + 72] = (ids >= 0)[:, None]
    assert relative_error(np.asarray(out), want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(np.asarray(out))[~used], bits(whole)[~used])


def test_exclusive_lists_share_clusters_by_rank() -> None:
    y, x = jnp.zeros((64, 400), jnp.bfloat16), jnp.zeros((64, 128), jnp.bfloat16)
    parts = tuple(
        decode_plan.DecodePart(
            jnp.zeros((2, rank, 128), x.dtype), jnp.zeros((2, 200, rank), x.dtype), jnp.ones(1),
            ids, offset,
        )
        for ids, rank in enumerate((8, 64, 128))
        for offset in (0, 200)
    )  # fmt: skip
    config = dataclasses.replace(DECODE, column_clusters=6)
    plan = decode_plan.plan((y,), x, parts, config, exclusive=True)
    assert plan is not None
    dealt = [(plan.ids_of(n), job.cluster, job.clusters) for n, job in enumerate(plan.jobs)]
    # Of rank 128 one slice is as much as a job holds, so that each half of the clusters has one.
    assert dealt == [(0, 0, 1), (1, 0, 3), (2, 0, 3), (2, 3, 3)]
    assert plan.grid == ((64 + 7 * 6) // 8, 6)
    assert decode_plan.plan((y,), x, parts, config).grid == (64, 6)
    # The first tokens of six adapters, and 58 more by eights, at worst all of rank 128.
    seated = decode_plan.plan((y,), x, parts, config, exclusive=True, seated=True)
    assert [seated.dealt(i) for i in range(3)] == [1, 3, 6]
    assert seated.grid == (2 * (1 + 3 + 6) + 58 // 8 * 6, 1)


def test_a_list_of_many_clusters_and_few_slots_may_have_all_tokens() -> None:
    """57 tokens of one adapter are eight times its 12 clusters, 7 more have an adapter each."""
    x = jnp.zeros((64, 64))
    parts = tuple(
        decode_plan.DecodePart(jnp.zeros((n, r, 64)), jnp.zeros((n, 64, r)), jnp.ones(1), ids, 0)
        for ids, (n, r) in enumerate([(64, 8), (1, 128)])
    )
    config = dataclasses.replace(DECODE, column_clusters=12)
    plan = decode_plan.plan((x,), x, parts, config, exclusive=True, seated=True)
    assert plan is not None
    assert [plan.dealt(i) for i in range(2)] == [1, 12]
    assert plan.grid == (8 * 12 + 7, 1)


@pytest.mark.parametrize("column_clusters", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [(16,), (8, 16), (64, 128), (8, 128)], ids=str)
def test_columns_of_y_have_the_same_clusters_in_every_job(
    ranks: tuple[int, ...], column_clusters: int
) -> None:
    """Else two clusters might update the columns of a token that has several adapters."""
    y, x = jnp.zeros((9, 400), jnp.bfloat16), jnp.zeros((9, 128), jnp.bfloat16)
    parts = tuple(
        decode_plan.DecodePart(
            jnp.zeros((2, rank, 128), x.dtype), jnp.zeros((2, width, rank), x.dtype), jnp.ones(1),
            ids, offset,
        )
        for ids, rank in enumerate(ranks)
        for offset, width in ((0, 200), (200, 72), (272, 128), (96, 208))
    )  # fmt: skip
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    plan = decode_plan.plan((y,), x, parts, config)
    assert plan is not None
    owners: dict[int, set[tuple[int, int]]] = {}
    seen = collections.Counter()
    for job in plan.jobs:
        assert job.cluster >= 0 and job.cluster + job.clusters <= column_clusters
        for strip in job.strips:
            for piece in strip:
                owners.setdefault(piece.start, set()).add((job.cluster, job.clusters))
                seen[piece.part] += piece.stop - piece.start
    assert all(len(of_column) == 1 for of_column in owners.values())
    assert seen == {n: part.width for n, part in enumerate(parts)}


@WAYS
@pytest.mark.parametrize("offsets", [(0, 0), (0, 64), (0, 8)], ids=str)
def test_parts_share_launches(
    offsets: tuple[int, int], config: Any, fuse: bool, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("emulated" if config is DECODE else "interpreted")
    arrays = [Case(5, 64, 64, rank, 2, seed=rank).arrays() for rank in (8, 16)]
    x, y = arrays[0].x, Case(5, 64, 136, 8, 1).arrays().y
    parts = [pk.LoRAPart(z.a, z.b, z.ids, z.scales, offset) for z, offset in zip(arrays, offsets)]
    out = np.asarray(
        pk.add_lora_multi(y, x, parts, implementation="mosaic_gpu", fuse=fuse, config=config)
    )
    want, used = y.astype(np.float64), np.zeros(y.shape, bool)
    for z, offset in zip(arrays, offsets):
        v = products(x, z.a, z.ids) * z.scales[np.maximum(z.ids, 0)][:, None]
        want[:, offset : offset + 64] += products(v, z.b, z.ids)
        used[:, offset : offset + 64] |= (z.ids >= 0)[:, None]
    assert relative_error(out, want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(out)[~used], bits(y)[~used])


@pytest.mark.parametrize("column_clusters", [1, 2])
@pytest.mark.parametrize("ranks", [(16, 16, 8), (128, 8, 144)], ids=str)
def test_fused_parts_add_up_where_several_reach_a_token(
    ranks: tuple[int, ...], column_clusters: int, emulated: None
) -> None:
    """In one job's strips, in jobs of the same ids and of others: any may be the first to run."""
    given = [
        jnp.array([0, -1, 1, 0, -1, 1, -1]),
        WideIndices(jnp.array([(0, 1), (0, 0), (1, 0), (-1, -1), (1, 0), (2, 0), (-1, -1)])),
        pk.make_segments([-1, 1, 0, 1, 9, -1, -1], 2),
    ]
    meant = np.array(
        [(0, -1, 1, 0, -1, 1, -1), (-1, 0, 1, -1, 1, -1, -1), (-1, 1, 0, 1, *[-1] * 3)]
    )
    edges = [136, 200]  # the second y is covered in part, the third not at all
    arrays = Case(7, 128, 272, 8, 1, y_dtype="float32").arrays()
    x, whole = arrays.x, arrays.y
    parts, want, used = [], whole.astype(np.float64), np.zeros(whole.shape, bool)
    for n, (start, stop) in enumerate([(0, 136), (64, 160), (40, 112)]):
        for which, rank in zip((0, 1, 2)[n % 2 :], ranks):
            z = Case(7, 128, stop - start, rank, 2, seed=n + rank).arrays()
            parts.append(pk.LoRAPart(z.a, z.b, given[which], z.scales, start))
            v = products(x, z.a, ids := meant[which]) * z.scales[np.maximum(ids, 0)][:, None]
            want[:, start:stop] += products(v, z.b, ids)
            used[:, start:stop] |= (ids >= 0)[:, None]
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    out = pk.add_lora_multi(
        tuple(np.split(whole, edges, axis=1)), x, parts, implementation="mosaic_gpu", fuse=True,
        config=config,
    )  # fmt: skip
    side_by_side = np.concatenate(out, axis=1)
    assert relative_error(side_by_side, want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(side_by_side)[~used], bits(whole)[~used])


# ----------------------------------------------------------------------------------------- lowering


def lowered(
    num_tokens: int, features: int, width: int, rank: int, num_adapters: int = 64,
    dtypes: tuple[str, str, str] = ("bfloat16",) * 3, columns: int = 0, y_offset: int = 0,
    config: Any = None, phase: str = "decode", fuse: bool = False, seated: bool = False,
) -> str:  # fmt: skip
    """add_lora's module for Hopper: layout inference and the shared-memory check have run."""
    x, w, y = dtypes
    shape = functools.partial(jax.ShapeDtypeStruct)

    def run(y: Any, x: Any, a: Any, b: Any, ids: Any) -> Any:
        route = pk.make_segments(ids, num_adapters) if seated else ids
        part = pk.LoRAPart(a, b, route, y_offset=y_offset)
        return pk.add_lora_multi(
            y, x, (part,), phase=phase, implementation="mosaic_gpu", fuse=fuse, config=config
        )

    traced = jax.jit(run).trace(
        shape((num_tokens, columns or width), y),
        shape((num_tokens, features), x),
        shape((num_adapters, rank, features), w),
        shape((num_adapters, width, rank), w),
        shape((num_tokens,), "int32"),
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_kernels(module: str, *ranks: int, one: bool = False) -> None:
    names = "_".join(f"r{rank}" for rank in ranks)
    found = set(re.findall(r"lora(?:_shrink|_expand)?(?:_r\d+)+", module))
    two = {f"lora_shrink_{names}", f"lora_expand_{names}"}
    assert found == ({f"lora_{names}"} if one else two)
    assert module.count("stablehlo.custom_call @mosaic_gpu_v2") == len(found)
    assert "dot_general" not in module


BUCKETS = (8, 16, 32, 64, 128)
TWO_TILES = mosaic_gpu.Config(split=2, row_tiles=2, expand_row_tiles=2, expand_columns=2)
EVERY_RANK = (8, *range(16, 513, 16))
MOST_RANK = 368  # whose sums fit into the decode kernel's shared memory for any T


@pytest.mark.parametrize("num_tokens", [1, slow(64), 256, slow(300), 8192])
@pytest.mark.parametrize("rank", [*BUCKETS, 144, 496])
def test_every_bucket_lowers(rank: int, num_tokens: int) -> None:
    phase = "decode" if num_tokens <= 256 else "prefill"
    one = rank <= (MOST_RANK if num_tokens <= 128 else 128 if num_tokens <= 256 else 0)
    assert_kernels(lowered(num_tokens, 4096, 4096, rank, phase=phase), rank, one=one)


@pytest.mark.parametrize(
    ("rank", "x", "tokens_of_a_block"),
    [(8, "bfloat16", (128, 128)), slow(16, "float16", (128, 128)),
     slow(128, "bfloat16", (128, 128)), slow(144, "float32", (128, 128)),
     (496, "bfloat16", (64, 128)), (512, "float32", (128, 128))],
)  # fmt: skip
def test_two_tiles_share_a_block(rank: int, x: str, tokens_of_a_block: tuple[int, int]) -> None:
    """Unless there are too many sums for a thread: 496 has no fair divisor below 248."""
    weights = "bfloat16" if x == "float32" else x
    for split, num_tokens in (1, 300), (2, 8192), (4, 8192):
        config = dataclasses.replace(TWO_TILES, split=split)
        dtypes = x, weights, weights
        module = lowered(num_tokens, 2048, 4096, rank, dtypes=dtypes, config=config)
        assert_kernels(module, rank)
        calls = re.findall(r"custom_call @mosaic_gpu_v2.* : \(([^)]*)\)", module)
        blocks = [int(max(re.findall(r"tensor<(\d+)x\d+xi32>", call))) for call in calls]
        assert blocks == [-(-num_tokens // tokens) for tokens in tokens_of_a_block]


def test_of_many_tokens_several_buckets_of_high_ranks_take_two_launches() -> None:
    for ranks, one in ((64, 32), True), ((128, 32), False):
        config = mosaic_gpu.decode_config(256, 4096, 4096, max(ranks), buckets=len(ranks))
        assert (config.warps is not None) == one


def test_mosaic_waits_for_the_cluster_where_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own wait is found and taken out, and ours is there."""
    found, texts = [], []
    take_over, asm = lanes.Gpu._take_over_start, lanes._ptx
    monkeypatch.setattr(
        lanes.Gpu, "_take_over_start", staticmethod(lambda: found.append(take_over()) or found[-1])
    )
    monkeypatch.setattr(lanes, "_ptx", lambda t, *a, **k: texts.append(t) or asm(t, *a, **k))
    for seated in (False, True):
        lowered(64, 4096, 4096, 16, seated=seated)
        assert found and all(found)
        waits = ["cluster.arrive" in text for text in texts if "cluster.wait" in text]
        assert waits == [False, True]  # Mosaic has arrived already; then sums are exchanged
        texts.clear()


@pytest.mark.parametrize("num_tokens", [2, slow(16), slow(63), 256])
@pytest.mark.parametrize("rank", [*BUCKETS, 48, 96, 208, 256])
def test_every_bucket_lowers_to_one_launch(rank: int, num_tokens: int) -> None:
    config = dataclasses.replace(DECODE, split=8)
    for seated in (False, True):
        module = lowered(num_tokens, 4096, 4096, rank, config=config, seated=seated)
        assert_kernels(module, rank, one=True)
        assert ("x10xi32" in module) == seated  # the table


@pytest.mark.parametrize(
    "shape",
    [(64, 64), (128, 200), (4096, 28672), (28672, 4096), (3424, 128256), (131072, 72)],
    ids=str,
)
@pytest.mark.parametrize("y", ["bfloat16", "float32"])
def test_every_size_lowers_to_one_launch(shape: tuple[int, int], y: str) -> None:
    for warps in (4, 8):
        config = dataclasses.replace(DECODE, split=8, warps=warps)
        module = lowered(64, *shape, 16, 3, ("bfloat16", "bfloat16", y), config=config)
        assert_kernels(module, 16, one=True)


@pytest.mark.parametrize(
    "shape",
    [(64, 64), (72, 88), (4096, 11008), (3424, 29568), (128256, 64), (64, 131072), (131072, 64)],
    ids=str,
)
def test_every_size_lowers(shape: tuple[int, int]) -> None:
    assert_kernels(lowered(9, *shape, 16, 3), 16, one=True)
    assert_kernels(lowered(9, *shape, 16, 3, config=TWO), 16)


@pytest.mark.parametrize(
    ("x", "weights", "y"),
    [
        (x, weights, y) if weights in (x, y) else slow(x, weights, y)
        for weights in ("bfloat16", "float16")
        for x, y in itertools.product(("bfloat16", "float16", "float32"), repeat=2)
    ],
)
def test_every_dtype_lowers(x: str, weights: str, y: str) -> None:
    assert_kernels(lowered(9, 128, 136, 64, 3, (x, weights, y)), 64, one=x == weights)
    assert_kernels(lowered(9, 128, 136, 64, 3, (x, weights, y), config=TWO), 64)


@pytest.mark.parametrize(
    "config",
    [
        mosaic_gpu.Config(split=1),
        mosaic_gpu.Config(split=8, stack=4, chunks=2, stages=8),
        mosaic_gpu.Config(rank_block=32, block_n=256, expand_stack=2, expand_stages=4),
        mosaic_gpu.Config(block_n=8, expand_stack=32),
        mosaic_gpu.Config(split=8, stack=2, row_tiles=2, block_n=256, expand_row_tiles=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [slow(17), 130])
def test_every_config_lowers(config: mosaic_gpu.Config, num_tokens: int) -> None:
    assert_kernels(lowered(num_tokens, 2048, 512, 64, config=config), 64)


@pytest.mark.parametrize("y", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("columns", [136, 200])
def test_a_fused_call_has_a_kernel_without_y(columns: int, y: str) -> None:
    dtypes = "bfloat16", "bfloat16", y
    add = functools.partial(lowered, 64, 128, 136, 16, 3, dtypes, columns, columns - 136)
    for fuse in (False, True):
        module = add(fuse=fuse)
        assert_kernels(module, 16, one=True)
        assert ("output_operand_alias<" in module) == (not fuse)
        [operands] = re.findall(r"custom_call @mosaic_gpu_v2\(([^)]*)\)", module)
        assert len(operands.split(",")) == (5 if fuse else 6)
    # Columns are told apart where no part covers some of them.
    assert (f"tensor<{columns}xi1>" in module) == (columns > 136)
    assert "output_operand_alias<" in add(fuse=True, config=TWO)  # two launches are as without


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 63, 64, 65, 128, 1000, 4096, 8192])
@pytest.mark.parametrize("rank", EVERY_RANK)
def test_the_whole_grid_lowers(rank: int, num_tokens: int, weights: str) -> None:
    for x in (weights, "float32"):
        module = lowered(num_tokens, 3424, 4096, rank, 8, (x, weights, x))
        one = x == weights and num_tokens <= (128 if rank >= 128 else 256)
        if one and rank > MOST_RANK:
            one = f"lora_r{rank}" in module
        assert_kernels(module, rank, one=one)


@pytest.mark.parametrize(
    ("num_tokens", "config", "fuse"),
    [(64, None, False), (64, None, True), (64, TWO, True), (4096, None, True)],
)
def test_mixed_ranks_share_launches(num_tokens: int, config: Any, fuse: bool) -> None:
    ranks = BUCKETS
    shape = jax.ShapeDtypeStruct

    def run(y: Any, x: Any, stacks: Any, ids: Any) -> Any:
        parts = [pk.LoRAPart(a, b, ids) for a, b in stacks]
        return pk.add_lora_multi(y, x, parts, implementation="mosaic_gpu", fuse=fuse, config=config)

    half = jnp.bfloat16
    stacks = [(shape((8, r, 512), half), shape((8, 256, r), half)) for r in ranks]
    args = (
        shape((num_tokens, 256), half), shape((num_tokens, 512), half), stacks,
        shape((num_tokens,), jnp.int32),
    )  # fmt: skip
    module = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert_kernels(module, *ranks, one=num_tokens == 64 and config is None)


def test_many_parts_are_dealt_to_launches_by_their_columns() -> None:
    def part(rank: int, offset: int, width: int) -> pk.LoRAPart:
        stacks = jnp.zeros((2, rank, 64)), jnp.zeros((2, width, rank))
        return pk.LoRAPart(*stacks, jnp.zeros(4, jnp.int32), 1.0, offset)

    slices = ((0, 128), (128, 64), (192, 64))
    parts = tuple(part(rank, *columns) for columns in slices for rank in BUCKETS)
    launches = mosaic_gpu._launches(parts)
    assert [[p.y_offset for p in launch] for launch in launches] == [[0] * 5, [128] * 5, [192] * 5]
    assert mosaic_gpu._launches(parts[::5]) == [parts[::5]]
    chain = (part(8, 0, 64), part(8, 128, 64), part(8, 32, 128))  # the last touches both others
    assert mosaic_gpu._launches(chain) == [chain]


# ------------------------------------------------------------------------------ limits and choices


def test_missing_names_what_a_case_lacks() -> None:
    missing = mosaic_gpu.missing
    assert missing(jnp.bfloat16, 16, 4096, 4096, jnp.bfloat16, 4096) is None
    assert "float32 weights" in str(missing(jnp.float32, 16, 4096))
    assert "rank 24" in str(missing(jnp.bfloat16, 24, 4096))
    assert "rank 528" in str(missing(jnp.bfloat16, 528, 4096))
    assert "H=100" in str(missing(jnp.bfloat16, 16, 100))
    assert "N=56" in str(missing(jnp.bfloat16, 16, None, 56))
    assert "H=131080" in str(missing(jnp.bfloat16, 16, 131080))
    assert "264 bytes" in str(missing(jnp.bfloat16, 16, None, 64, jnp.bfloat16, 132))
    assert "y_offset=4" in str(missing(jnp.bfloat16, 16, None, 64, jnp.bfloat16, 128, 4))


@pytest.mark.parametrize("rank", EVERY_RANK)
def test_the_order_of_sums_does_not_depend_on_tokens(rank: int) -> None:
    for features in (64, 1000, 4096, 131072):
        splits = {
            mosaic_gpu.default_config(t, features, n, rank, slots).split
            for t in (1, 64, 65, 4096) for n in (64, 14336) for slots in (1, 64)
        }  # fmt: skip
        assert len(splits) == 1


@pytest.mark.parametrize(
    "bad",
    [
        dict(split=3),
        dict(block_n=12),
        dict(stack=0),
        dict(stages=65),
        dict(warps=5),
        dict(column_clusters=0),
        dict(row_tiles=3),
        dict(expand_row_tiles=0),
    ],
    ids=str,
)
def test_config_checks_its_values(bad: dict[str, int]) -> None:
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        mosaic_gpu.Config(**bad)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 200])
@pytest.mark.parametrize("rows", [64, 128])
def test_routes_list_the_adapters_of_each_block(
    rows: int, num_tokens: int, popularity: str
) -> None:
    ids = indices(popularity, num_tokens, 7)
    segments = pk.make_segments(ids, 7)
    with jax.numpy_rank_promotion("raise"):
        table = np.asarray(tiles.routes(segments, rows))
    assert table.shape[1] == tiles.route_words(segments, rows)
    checked = np.pad(np.asarray(segments.indices), (0, -num_tokens % rows), constant_values=-1)
    np.testing.assert_array_equal(table[:, :rows], checked.reshape(-1, rows))
    for row in table:
        count, adapters = row[rows], row[rows + 1 :]
        assert sorted(adapters[:count]) == sorted(set(row[:rows].tolist()) - {-1})
        assert (adapters[count:] == -1).all()
        assert len(adapters) - count >= 63  # kernels look ahead


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_planes_add_up_to_x(x_dtype: str, weights: str) -> None:
    rng = np.random.default_rng(0)
    magnitudes = np.exp2(rng.uniform(-12, 12, (16, 64)))
    if x_dtype != "float16":
        magnitudes *= np.exp2(rng.uniform(-80, 80, (16, 1)))
    x = (rng.standard_normal((16, 64)) * magnitudes).astype(
        ml_dtypes.bfloat16 if x_dtype == "bfloat16" else x_dtype
    )
    planes, factor = jax.jit(mosaic_gpu._planes, static_argnums=1)(x, jnp.dtype(weights))
    total = np.asarray(planes).astype(np.float64).sum(0)
    if factor is not None:
        total *= np.asarray(factor).astype(np.float64)[:, None]
    error = np.abs(total - x.astype(np.float64))
    assert (error <= 2.0**-23 * np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)).all()
