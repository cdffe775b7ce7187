"""The Mosaic kernels without a GPU: interpreted with race detection, and lowered for CUDA.

tests/gpu holds the same cases on a device, where clusters exchange sums; here, where peers' shared
memory does not exist, partial sums go through device memory and XLA adds them.
"""

import dataclasses
import functools
import itertools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import networkx
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import constraints
from mosaic_cases import (
    POPULARITIES,
    Arrays,
    Case,
    add_parts,
    as_jax,
    bits,
    indices,
    of_integers,
    parts_in_float64,
    products,
    relative_error,
    v_tolerance,
    y_tolerance,
)

import pallas_kernels as pk
from pallas_kernels import ops
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import Config, backend, inference, support
from pallas_kernels.mosaic_gpu.decode import DecodePart, decode_config, plan
from pallas_kernels.mosaic_gpu.prefill import (
    ExpandPart,
    ShrinkPart,
    default_config,
    expand_kernel,
    shrink_kernel,
)
from pallas_kernels.mosaic_gpu.prefill.route import Portions, Routes, RouteSize, route_size
from pallas_kernels.routing import SlotRange, WideIndices

# The interpreter fills shared memory with NaN; numpy says so where a stack is not full.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def shrink(z: dict[str, Any], config: Any = None) -> np.ndarray:
    """With a scale for each adapter, as the first half of `add_lora` has."""
    segments = pk.make_segments(z["ids"], z["a"].shape[0])
    call = Call("bgmv_shrink", "mosaic_gpu", ("bgmv",), config=config)
    run = jax.jit(functools.partial(backend.shrink, call, None))
    return np.asarray(run(z["x"], z["a"], segments, z["scales"]))


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
    delta: bool = False,
    seated: bool = False,
) -> np.ndarray:
    """`add_lora` by raw ids, whose tokens the decode kernel finds, or `seated` by XLA."""
    ids = pk.make_segments(z["ids"], z["a"].shape[0]) if seated else z["ids"]
    part = pk.LoRAPart(z["a"], z["b"], z["scales"], 0, y_offset)
    return np.asarray(
        add_parts(
            z["y"], z["x"], (part,), ids,
            delta=delta, implementation="mosaic_gpu", config=config,
        )
    )  # fmt: skip


# The emulated kernels take seconds for what a device test does too.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
ci = functools.partial(pytest.param, marks=pytest.mark.ci)
TWO = Config(split=2)  # launches
DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
WAYS = pytest.mark.parametrize(
    ("config", "delta"),
    [(DECODE, False), (DECODE, True), (TWO, False)],
    ids=["one launch", "delta", "two launches"],
)
TINY = [
    Case(9, 72, 80, 8, 3, "uniform"),
    slow(Case(5, 256, 64, 16, 4, "distinct")),
    slow(Case(70, 128, 96, 16, 3, "zipf")),
    ci(Case(130, 64, 64, 32, 2, "identical")),
    slow(Case(66, 64, 64, 16, 3, "none")),
    ci(Case(1, 128, 64, 64, 2, "identical")),
    ci(Case(10, 64, 64, 48, 3, "out_of_range")),
    slow(Case(7, 384, 72, 272, 2, "uniform")),
    ci(Case(3, 128, 64, 16, 2, "uniform", "float32", "bfloat16", "float32")),
    ci(Case(9, 64, 64, 8, 2, "uniform", "float32", "float16", "float16")),
    ci(Case(4, 64, 64, 16, 2, "uniform", "float16", "bfloat16", "bfloat16")),
    slow(Case(4, 64, 64, 16, 2, "uniform", "bfloat16", "float16", "bfloat16")),
    ci(Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16)),
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


@pytest.mark.ci
@WAYS
def test_nothing_leaks(config: Any, delta: bool, request: pytest.FixtureRequest) -> None:
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
    for run in (shrink, expand, functools.partial(add_lora, delta=delta)):
        out = run(after, config=config)
        np.testing.assert_array_equal(bits(out)[rest], bits(run(before, config=config))[rest])
        if run is not shrink:
            np.testing.assert_array_equal(bits(out)[[1, 5]], bits(y)[[1, 5]])
        assert np.isnan(out[2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("case", "change"),
    [
        # The last block has fewer.
        ci(Case(70, 64, 200, 16, 3, "zipf"), dict(expand_columns=5)),
        slow(Case(130, 64, 136, 32, 3, "uniform"), dict(expand_columns=3, expand_stages=3)),
        ci(Case(9, 64, 96, 8, 4, "distinct", y_dtype="float32"), dict(expand_columns=6)),
        ci(Case(66, 64, 112, 16, 3, "uniform"), dict(expand_columns=7, expand_stack=2)),
        ci(Case(66, 64, 64, 16, 3, "none"), dict(expand_columns=4)),
        # The first tile is cut into portions.
        ci(Case(90, 64, 200, 16, 12, "uniform"), dict(expand_columns=4)),
        (Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(expand_columns=2)),
    ],
    ids=str,
)
def test_expand_takes_columns_in_turn(
    case: Case, change: dict[str, int], interpreted: None
) -> None:
    arrays = case.arrays()
    z, config = as_jax(arrays), Config(block_n=16, **change)
    y = expand(z, case.y_offset, config)
    want, columns = arrays.y.astype(np.float64), slice(case.y_offset, case.y_offset + case.width)
    want[:, columns] += products(arrays.v.astype(arrays.b.dtype), arrays.b, arrays.ids)
    assert relative_error(y, want) < y_tolerance(case.y_dtype, case.weight_dtype)
    one = expand(z, case.y_offset, dataclasses.replace(config, expand_columns=1))
    np.testing.assert_array_equal(bits(y), bits(one))


@pytest.mark.parametrize("stages", [ci(1), ci(2), 3])
def test_the_shrink_takes_any_number_of_stages(stages: int, interpreted: None) -> None:
    arrays = Case(5, 640, 64, 16, 3, "uniform").arrays()
    v = shrink(as_jax(arrays), Config(split=1, stages=stages))
    want = products(arrays.x, arrays.a, arrays.ids)
    want *= arrays.scales[np.maximum(arrays.ids, 0)][:, None]
    assert relative_error(v, want) < v_tolerance(640)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        slow(Case(70, 64, 72, 8, 3, "zipf"), dict(expand_columns=3)),
        slow(
            Case(130, 128, 64, 48, 3, "uniform"),
            dict(stages=1, stack=2, expand_stack=2),
        ),
        slow(Case(140, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(expand_columns=2)),
        slow(Case(130, 64, 64, 16, 2, "uniform", "float32", "bfloat16", "float32"), dict(split=1)),
        slow(Case(70, 1024, 64, 64, 2, "uniform", "float32", "bfloat16", "float32"), dict(split=1)),
        ci(Case(70, 64, 64, 16, 140, "identical"), {}),  # a route in two copies
        slow(Case(130, 64, 64, 16, 3, "none"), {}),
    ],
    ids=str,
)
def test_two_tiles_share_what_a_block_loads(
    case: Case, change: dict[str, int], interpreted: None
) -> None:
    arrays = of_integers(case.arrays())
    z, ids = as_jax(arrays), arrays.ids
    one = Config(**{"split": 2, "block_n": 32, **change})
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
    """For 200 tokens, in tiles where none, one, all and two of the parts have adapters."""
    ids = np.random.default_rng(1).integers(-1, 4, (3, 4, 64))
    ids[:, 0], ids[::2, 1], ids[1, 3] = -1, -1, -1
    return ids.reshape(3, -1)[:, :200].astype(np.int32)


def take_parts_in_turn(monkeypatch: pytest.MonkeyPatch, *, in_turn: bool = True) -> None:
    module = sys.modules[shrink_kernel.__module__]
    monkeypatch.setattr(module, "MULTIPROCESSORS", 1 if in_turn else 1000)


@pytest.mark.parametrize("planes", [ci(1), slow(3)])
def test_shrink_has_more_stages_where_a_tile_has_one_adapter(
    planes: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[shrink_kernel.__module__]
    # Tiles with two adapters, one, three, and none.
    ids = np.repeat([0, 1, 2, 0, 1, -1], [40, 24, 64, 20, 44, 60]).astype(np.int32)
    ids[-61] = 2
    dtype = "bfloat16" if planes == 1 else "float32"
    case = Case(len(ids), 256, 64, 16, 3, "uniform", dtype, "bfloat16")
    z = {**as_jax(of_integers(case.arrays())), "ids": jnp.asarray(ids)}
    # Columns of 64 in shared memory: three with one adapter, two with two.
    room = 3 * 64 * 2 * (planes * 64 + 16)
    monkeypatch.setattr(module, "_PIPELINE_BYTES", room)
    want = shrink(z, one := Config(split=1))
    seen, smem = set(), module.plgpu.SMEM
    monkeypatch.setattr(
        module.plgpu, "SMEM", lambda shape, *a, **k: seen.add(shape) or smem(shape, *a, **k)
    )
    v = shrink(z, dataclasses.replace(one, stack=2))
    np.testing.assert_array_equal(bits(v), bits(want))
    assert {(3, 16, 64), (2, 32, 64)} <= seen


@pytest.mark.ci
@pytest.mark.parametrize(("zero_rows", "row_tiles"), [slow(False, 1), (True, 1), slow(True, 2)])
def test_shrink_takes_parts_in_turn(
    zero_rows: bool, row_tiles: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One adapter in a round, two, and two blocks of ranks.
    ranks = {8: {}, 16: dict(stack=2), 96: dict(rank_block=48)}
    rng, every = np.random.default_rng(0), np.full(200, -1, np.int32)
    for first, mine in zip((0, 4, 8), ids_of_three_parts()):
        every = np.where((every < 0) & (mine >= 0), mine + first, every)
    ranges = [SlotRange(first, 4) for first in (0, 4, 8)]
    ids = [np.where(slots.holds(every), every - slots.first, -1) for slots in ranges]
    x = rng.standard_normal((200, 384)).astype(ml_dtypes.bfloat16)  # 3 steps for 2 stages
    parts, wants = [], []
    for (rank, change), slots, mine in zip(ranks.items(), ranges, ids):
        a = (rng.standard_normal((4, rank, 384)) / 20).astype(ml_dtypes.bfloat16)
        scales = rng.uniform(0.5, 2.0, 4).astype(np.float32)
        config = Config(split=1, stages=2, row_tiles=row_tiles, **change)
        together = jnp.append(jnp.full(rank, jnp.nan), scales)
        parts.append(ShrinkPart(jnp.asarray(a), together, slots, np.float32, config, rank))
        wants.append(products(x, a, mine) * scales[np.maximum(mine, 0)][:, None])

    segments = pk.make_segments(every, 12)

    def run(in_turn: bool) -> list[np.ndarray]:
        take_parts_in_turn(monkeypatch, in_turn=in_turn)
        sums = shrink_kernel(jnp.asarray(x)[None], tuple(parts), segments, zero_rows=zero_rows)
        return [np.asarray(v.sum(axis=0)) for v in sums]

    for v, other, want, mine in zip(run(True), run(False), wants, ids):
        used = mine >= 0
        assert relative_error(v[used], want[used]) < v_tolerance(384)
        np.testing.assert_array_equal(bits(v)[used], bits(other)[used])
        assert not zero_rows or not v[~used].any()


@pytest.mark.parametrize(
    ("first_slots", "row_tiles", "shared_bytes"),
    [
        slow((0, 0, 0), 1, 2**20),
        ci((0, 4, 8), 1, 2**20),
        slow((0, 4, 0), 2, 2**20),
        ci((0, 0, 0), 1, 20 * 1024),
    ],
    ids=str,
)
def test_overlapping_parts_of_mixed_ranks(
    first_slots: tuple[int, ...],
    row_tiles: int,
    shared_bytes: int,
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All parts at once, or in sweeps: each alone, or two and then one, as 20 KiB hold."""
    take_parts_in_turn(monkeypatch)
    monkeypatch.setattr(sys.modules[expand_kernel.__module__], "_SHARED_BYTES", shared_bytes)
    ids, parts = np.full(200, -1, np.int32), []
    for first_slot, mine in zip(first_slots, ids_of_three_parts()):
        ids = np.where((ids < 0) & (mine >= 0), mine + first_slot, ids)
    first = Case(200, 128, 64, 8, 4, y_extra=16).arrays()
    for rank, offset, first_slot in zip((8, 16, 64), (0, 0, 16), first_slots):
        z = Case(200, 128, 64, rank, 4, seed=rank).arrays()
        parts.append(pk.LoRAPart(z.a, z.b, z.scales, first_slot, offset))
    config = Config(
        split=2, block_n=16, expand_columns=2, row_tiles=row_tiles, expand_row_tiles=row_tiles
    )
    y = np.asarray(
        pk.add_lora_multi(first.y, first.x, parts, ids, implementation="mosaic_gpu", config=config)
    )
    delta, used = parts_in_float64(first.x, parts, ids, 80)
    assert relative_error(y, first.y.astype(np.float64) + delta) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(y)[~used], bits(first.y)[~used])


@pytest.mark.ci
@pytest.mark.parametrize("ranks", [(8, 16), (8, 16, 32, 48)], ids=["a launch for both", "for each"])
def test_several_ys(ranks: tuple[int, ...], interpreted: None) -> None:
    widths, slots = (64, 72), 2
    z = Case(70, 64, sum(widths), 16, slots).arrays()
    ids = np.random.default_rng(0).integers(-1, slots * len(ranks), 70).astype(np.int32)
    parts = []
    for n, rank in enumerate(ranks):
        own = Case(70, 64, sum(widths), rank, slots, seed=rank).arrays()
        for start, stop in ((0, 64), (64, 136)):
            b = own.b[:, start:stop]
            parts.append(pk.LoRAPart(own.a, b, own.scales, slots * n, start))
    ys = tuple(map(jnp.asarray, np.split(z.y, [64], axis=1)))
    how = dict(implementation="mosaic_gpu", config=TWO)
    new = np.concatenate(pk.add_lora_multi(ys, z.x, parts, ids, **how), axis=1)
    delta, used = parts_in_float64(z.x, parts, ids, sum(widths))
    assert relative_error(new, z.y.astype(np.float64) + delta) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(new)[~used], bits(z.y)[~used])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("shared_bytes", "add_inputs", "few_adapters", "sweeps"),
    [
        (2**20, True, 4, [(0, 2), (1,)]),
        (2**20, False, 4, [(0, 2), (1,)]),
        (2**20, True, 0, [(0, 2), (1,)]),
        (11 * 1024, False, 4, [(0,), (2,), (1,)]),
    ],
)
def test_ranges_take_sweeps(
    shared_bytes: int,
    add_inputs: bool,
    few_adapters: int,
    sweeps: list[tuple[int, ...]],
    interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of one range that share columns are added at once if they fit, else one after another.
    Tokens of another range have sweeps of their own, or, of few adapters, are in the same sweep. In
    either case their y is rounded once."""
    module = sys.modules[expand_kernel.__module__]
    monkeypatch.setattr(module, "_SHARED_BYTES", shared_bytes)
    monkeypatch.setattr(module, "_FEW_ADAPTERS", few_adapters)
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 6, 70)  # of slots 0 to 3 in one range, and 4 and 5 in another
    y = rng.standard_normal((70, 96)).astype(ml_dtypes.bfloat16)
    delta, is_put, parts = np.zeros(y.shape), np.zeros(y.shape, bool), []
    config = Config(block_n=16, expand_columns=2)
    for rank, first_slot, slots, start, stop in (
        (16, 0, 4, 0, 64),
        (8, 4, 2, 0, 96),
        (8, 0, 4, 16, 80),
    ):
        local = np.where((ids >= first_slot) & (ids < first_slot + slots), ids - first_slot, -1)
        v = (rng.standard_normal((72, rank))).astype(ml_dtypes.bfloat16)
        b = (rng.standard_normal((slots, stop - start, rank)) / 4).astype(ml_dtypes.bfloat16)
        operand = jnp.asarray(np.pad(v, ((0, 0), (0, 16 - rank))))
        own = SlotRange(first_slot, slots)
        parts.append(ExpandPart(operand, jnp.asarray(b), own, start, config))
        delta[:, start:stop] += products(v[:70], b, local)
        is_put[:, start:stop] |= (local >= 0)[:, None]
    old = y.astype(np.float64)
    want = np.where(is_put, delta + (old if add_inputs else 0.0), old)
    cut = module._plan(jnp.asarray(y), tuple(parts), add_inputs, False).cuts[1]
    assert [sweep.parts for sweep in cut.sweeps] == sweeps
    assert cut.together == (module._Sweep((0, 2, 1), add_inputs) if len(sweeps) == 2 else None)

    def run(parts: list[ExpandPart]) -> np.ndarray:
        own = jnp.asarray(y), tuple(parts), pk.make_segments(ids.astype(np.int32), 6)
        return np.asarray(expand_kernel(*own, add_inputs=add_inputs))

    got = run(parts)
    assert relative_error(got, want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(got)[~is_put], bits(y)[~is_put])
    if add_inputs:
        # Each with zeros for the other range's adapters: now there is one range.
        pads = [(p.slots.first, 6 - p.slots.stop) for p in parts]
        stacks = [jnp.pad(p.lora_b, (pad, (0, 0), (0, 0))) for p, pad in zip(parts, pads)]
        at_once = [p._replace(lora_b=b, slots=SlotRange(0, 6)) for p, b in zip(parts, stacks)]
        np.testing.assert_array_equal(bits(got), bits(run(at_once)))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        ((512, 256, 128, 64), {}),
        slow((192, 160, 336, 448, 416), {}),  # arrays in shared memory take whole KiB
        slow((512,) * 5, {}),  # in sweeps of three and two
        ((512, 384), dict(block_n=72, expand_columns=8)),  # 72 has no half that is a multiple of 8
        ((512, 64), dict(row_tiles=2, expand_row_tiles=2, expand_columns=8)),
        ((512, 384), dict(row_tiles=2, expand_row_tiles=2)),  # v of 128 rows does not fit
    ],
    ids=str,
)
def test_overlapping_parts_of_high_ranks_fit_shared_memory(
    ranks: tuple[int, ...], change: dict[str, int]
) -> None:
    config = Config(**change) if change else None

    def step(y: Any, x: Any, ids: Any, stacks: Any) -> Any:
        parts = [pk.LoRAPart(a, b, y_offset=32 * n) for n, (a, b) in enumerate(stacks)]
        return pk.add_lora_multi(
            y, x, parts, ids, phase="prefill", implementation="mosaic_gpu", config=config
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
    config = Config(split=2, stack=2, stages=2, block_n=32, expand_stack=2)
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
    ci(Case(70, 128, 200, 32, 3, "zipf"), dict(warps=8)),
    (Case(20, 128, 192, 16, 2, "identical"), dict(split=4)),
    ci(Case(130, 64, 64, 16, 3, "none"), {}),
    slow(Case(140, 64, 64, 16, 2, "uniform"), {}),
    (Case(10, 64, 64, 48, 3, "out_of_range"), dict(warps=16)),
    ci(Case(3, 1472, 64, 80, 2, "uniform"), dict(split=1)),  # 23 units of H: rings turn
    ci(Case(2, 256, 64, 272, 2, "uniform"), dict(expand_stages=3)),
    ci(Case(2, 64, 2568, 16, 2, "uniform"), dict(expand_stages=3)),  # loops over y's columns
    ci(Case(2, 5000, 64, 64, 1, "uniform"), dict(split=1, stages=3)),  # and over H
    ci(Case(3, 128, 352, 64, 2, "uniform", y_dtype="float32"), {}),
    (Case(12, 64, 72, 16, 3, "uniform", y_offset=40, y_extra=16), dict(column_clusters=2)),
    (Case(4, 64, 64, 16, 2, "uniform", "float16", "float16", "float16"), {}),
]


@pytest.mark.ci
@pytest.mark.parametrize(("case", "change"), DECODE_TINY, ids=str)
def test_decode_emulated_against_float64(
    case: Case, change: dict[str, int], emulated: None
) -> None:
    arrays = case.arrays()
    ids = np.where((arrays.ids >= 0) & (arrays.ids < case.num_adapters), arrays.ids, -1)
    columns = slice(case.y_offset, case.y_offset + case.width)
    config = dataclasses.replace(DECODE, **change)
    part = DecodePart(arrays.a, arrays.b, arrays.scales, 0, case.y_offset)
    assert plan((arrays.y,), arrays.x, (part,), config) is not None

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
        (add_lora(z, case.y_offset, config, delta=True), products(want_v, arrays.b, ids)),
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


def test_indices_of_no_slot_are_none_where_segments_are_made_by_hand(emulated: None) -> None:
    arrays = Case(5, 128, 72, 16, 3).arrays()
    ids = jnp.asarray([0, 3, 1, -1, 7], jnp.int32)
    segments = dataclasses.replace(pk.make_segments(ids, 3), indices=ids)
    part = pk.LoRAPart(arrays.a, arrays.b, arrays.scales)
    for delta in (False, True):
        out = add_parts(
            arrays.y, arrays.x, (part,), segments,
            delta=delta, implementation="mosaic_gpu", config=DECODE,
        )  # fmt: skip
        kept = np.array([1, 3, 4])
        np.testing.assert_array_equal(bits(np.asarray(out))[kept], bits(arrays.y)[kept])
        assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("delta", [False, True], ids=["in place", "delta"])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", ci("xla"), ci("loop")])
@pytest.mark.parametrize("column_clusters", [1, ci(2), slow(3), ci(7)])
@pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")
def test_parts_of_several_ys(
    implementation: str, column_clusters: int, delta: bool, emulated: None
) -> None:
    """Two buckets of three projections, and a part from one into the next: every column is some
    one cluster's, whatever their number."""
    widths, ranks = (72, 64, 200), (16, 64)
    arrays = [Case(13, 128, sum(widths), rank, 3, seed=rank).arrays() for rank in ranks]
    x, whole = arrays[0].x, arrays[0].y
    edges = [0, *np.cumsum(widths).tolist()]
    spans = [*itertools.pairwise(edges), (40, 160)]
    parts = [
        pk.LoRAPart(z.a, z.b[:, start:stop], z.scales, 3 * n, start)
        for n, z in enumerate(arrays)
        for start, stop in spans
    ]
    ids = np.array([5, 0, -1, 3, 2, 2, 6, 1, 4, 5, 0, -1, 3], np.int32)
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    out = add_parts(
        tuple(np.split(whole, edges[1:-1], axis=1)), x, parts, ids, delta=delta,
        implementation=implementation, config=config if implementation == "mosaic_gpu" else None,
    )  # fmt: skip
    assert [y.shape for y in out] == [(13, width) for width in widths]
    more, used = parts_in_float64(x, parts, ids, sum(widths))
    side_by_side = np.concatenate(out, axis=1)
    want = whole.astype(np.float64) + more
    assert relative_error(side_by_side, want) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(side_by_side)[~used], bits(whole)[~used])


@WAYS
@pytest.mark.parametrize(
    ("offsets", "first_slots"),
    [((0, 0), (0, 2)), ci((0, 0), (0, 0)), ci((0, 64), (0, 0)), ci((0, 8), (0, 0)),
     ci((0, 8), (2, 0))],
    ids=str,
)  # fmt: skip
def test_parts_share_launches(
    offsets: tuple[int, int],
    first_slots: tuple[int, int],
    config: Any,
    delta: bool,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("emulated" if config is DECODE else "interpreted")
    arrays = [Case(5, 64, 64, rank, 2, seed=rank).arrays() for rank in (8, 16)]
    x, y = arrays[0].x, Case(5, 64, 136, 8, 1).arrays().y
    places = zip(arrays, first_slots, offsets)
    parts = [pk.LoRAPart(z.a, z.b, z.scales, *place) for z, *place in places]
    ids = np.array([1, 3, -1, 0, 2], np.int32)
    out = np.asarray(
        add_parts(y, x, parts, ids, delta=delta, implementation="mosaic_gpu", config=config)
    )
    more, used = parts_in_float64(x, parts, ids, 136)
    assert relative_error(out, y.astype(np.float64) + more) < y_tolerance("bfloat16")
    np.testing.assert_array_equal(bits(out)[~used], bits(y)[~used])


# ----------------------------------------------------------------------------------------- lowering


def lowered(
    num_tokens: int, features: int, width: int, rank: int, num_adapters: int = 64,
    dtypes: tuple[str, str, str] = ("bfloat16",) * 3, columns: int = 0, y_offset: int = 0,
    config: Any = None, phase: str = "decode", delta: bool = False, seated: bool = False,
) -> str:  # fmt: skip
    """add_lora's module for Hopper: layout inference and the shared-memory check have run."""
    x, w, y = dtypes
    shape = functools.partial(jax.ShapeDtypeStruct)

    def run(y: Any, x: Any, a: Any, b: Any, ids: Any) -> Any:
        route = pk.make_segments(ids, num_adapters) if seated else ids
        part = pk.LoRAPart(a, b, y_offset=y_offset)
        how = dict(phase=phase, implementation="mosaic_gpu", config=config)
        return add_parts(y, x, (part,), route, delta=delta, **how)

    traced = jax.jit(run).trace(
        shape((num_tokens, columns or width), y),
        shape((num_tokens, features), x),
        shape((num_adapters, rank, features), w),
        shape((num_adapters, width, rank), w),
        shape((num_tokens,), "int32"),
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_product_waits_neither_for_a_delta_nor_for_its_mask() -> None:
    """XLA runs what is masked in front of the barrier as a launch of its own."""

    def step(x: Any, w: Any, a: Any, b: Any, ids: Any) -> Any:
        segments, part = pk.make_segments(ids, 4), pk.LoRAPart(a, b)
        shape = jax.ShapeDtypeStruct((64, 256), x.dtype)
        behind, deltas = ops.delta_ahead(x, x, [part], segments, [shape], phase="decode")
        ys = (behind @ w,)
        return ops.add_in_step(ys, x, [part], segments, phase="decode", deltas=deltas)

    shapes = (64, 128), (128, 256), (4, 16, 128), (4, 256, 16)
    operands = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    ids = jax.ShapeDtypeStruct((64,), "int32")
    module = jax.jit(step).trace(*operands, ids).lower(lowering_platforms=("cuda",)).as_text()
    [launch] = [f for f in module.split("func.func ") if "custom_call @mosaic_gpu_v2" in f]
    _, behind_launch = launch.split("custom_call @mosaic_gpu_v2")
    assert re.fullmatch(r".*\s+return %\d+ : tensor<64x256xbf16>\s+}\s*", behind_launch)
    [(barrier, behind)] = re.findall(r"(%\d+):2 = stablehlo\.optimization_barrier(.*)", module)
    assert behind.endswith(": tensor<64x128xbf16>, tensor<64x256xbf16>")
    assert f"dot_general {barrier}#0" in module
    assert re.search(rf"call @_where\S*\(%\d+, {barrier}#1", module)


def test_layouts_are_inferred_from_groups_of_equal_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def check(system: constraints.ConstraintSystem) -> dict[Any, list[Any]]:
        pairs = networkx.Graph(
            (c.lhs, c.rhs) for c in system.constraints
            if isinstance(c, constraints.Equals)
            and isinstance(c.lhs, constraints.Variable)
            and isinstance(c.rhs, constraints.Variable)
        )  # fmt: skip
        groups = {v: group for group in networkx.connected_components(pairs) for v in group}
        equal = inference.equal_variables(system)
        assert {v: {v, *others} for v, others in equal.items()} == groups
        sizes.append(max(map(len, groups.values())))
        return equal

    monkeypatch.setattr(constraints, "compute_transitively_equal_vars", check)
    assert_kernels(lowered(300, 128, 128, 144), 144)
    assert len(sizes) == 2
    assert max(sizes) > 2


def assert_kernels(module: str, *ranks: int, one: bool = False) -> None:
    names = "_".join(f"r{rank}" for rank in ranks)
    found = set(re.findall(r"lora(?:_shrink|_expand)?(?:_r\d+)+", module))
    two = {f"lora_shrink_{names}", f"lora_expand_{names}"}
    assert found == ({f"lora_{names}"} if one else two)
    assert module.count("stablehlo.custom_call @mosaic_gpu_v2") == len(found)
    assert "dot_general" not in module


BUCKETS = (8, 16, 32, 64, 128)
TWO_TILES = Config(split=2, row_tiles=2, expand_row_tiles=2, expand_columns=2)
EVERY_RANK = (8, *range(16, 513, 16))
MOST_RANK = 368  # whose sums fit into the decode kernel's shared memory for any T


def most_rank(num_tokens: int) -> int:
    """Up to which rank so many tokens are one launch."""
    return next(
        (r for t, r in ((128, MOST_RANK), (256, 128), (512, 64), (1024, 32)) if num_tokens <= t), 0
    )


@pytest.mark.ci
@pytest.mark.parametrize("num_tokens", [1, slow(64), 256, slow(300), 8192])
@pytest.mark.parametrize("rank", [*BUCKETS, 144, 496])
def test_every_bucket_lowers(rank: int, num_tokens: int) -> None:
    phase = "decode" if num_tokens <= 256 else "prefill"
    one = rank <= most_rank(num_tokens)
    assert_kernels(lowered(num_tokens, 4096, 4096, rank, phase=phase), rank, one=one)


@pytest.mark.ci
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
        shrink, expand = (re.findall(r"tensor<(\d+)x(\d+)xi32>", call)[-1] for call in calls)
        shrinks, expands = tokens_of_a_block
        assert int(shrink[1]) == RouteSize(shrinks, 1).words  # a route for each round
        assert int(expand[1]) == route_size(64, expands).words  # and for each tile


@pytest.mark.parametrize(
    ("tokens", "ranks", "is_one"),
    [
        (256, (64,), True),
        (256, (128,), True),
        (257, (128,), False),
        (768, (16, 128), True),
        (769, (16, 128), False),
        (1024, (8, 32), True),
        (129, (8, 256), False),
    ],
    ids=str,
)
def test_one_launch_is_taken_where_it_is_faster(
    tokens: int, ranks: tuple[int, ...], is_one: bool
) -> None:
    config = decode_config(tokens, 4096, max(ranks), features=4096, buckets=len(ranks))
    assert (config.warps is not None) == is_one


def test_wide_stacks_take_two_launches_of_fewer_tokens() -> None:
    """Tokens of one adapter would read it once for each eight of them."""
    for tokens, rank, features, is_one in (
        (512, 64, 4096, True), (384, 64, 28672, False), (256, 64, 28672, True),
        (256, 128, 28672, False), (128, 128, 28672, True),
    ):  # fmt: skip
        config = decode_config(tokens, 2048, rank, features=features)
        assert (config.warps is not None) == is_one


@pytest.mark.parametrize("num_tokens", [2, slow(16), slow(63), ci(256)])
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
    ("features", "vocabulary"),
    [slow(4096, 32000), slow(4096, 128256), slow(3584, 151936), (2304, 256000), (2560, 262144)],
)
def test_output_layers_lower(features: int, vocabulary: int) -> None:
    """Those of Llama 2 and 3, Qwen2, Gemma 2 and 3: decode in one launch, prefill in two."""
    assert_kernels(lowered(64, features, vocabulary, 64, 4), 64, one=True)
    assert_kernels(lowered(4096, features, vocabulary, 128, 4, phase="prefill"), 128)


@pytest.mark.ci
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
        Config(split=1),
        Config(split=8, stack=4, stages=8),
        Config(rank_block=32, block_n=256, expand_stack=2, expand_stages=4),
        Config(block_n=8, expand_stack=32),
        Config(split=8, stack=2, row_tiles=2, block_n=256, expand_row_tiles=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [slow(17), 130])
def test_every_config_lowers(config: Config, num_tokens: int) -> None:
    assert_kernels(lowered(num_tokens, 2048, 512, 64, config=config), 64)


@pytest.mark.parametrize("y", ["bfloat16", ci("float16"), "float32"])
@pytest.mark.parametrize("columns", [136, 200])
def test_a_delta_has_a_kernel_without_y(columns: int, y: str) -> None:
    dtypes = "bfloat16", "bfloat16", y
    add = functools.partial(lowered, 64, 128, 136, 16, 3, dtypes, columns, columns - 136)
    for delta in (False, True):
        module = add(delta=delta)
        assert_kernels(module, 16, one=True)
        assert ("output_operand_alias<" in module) == (not delta)
        [operands] = re.findall(r"custom_call @mosaic_gpu_v2\(([^)]*)\)", module)
        assert len(operands.split(",")) == (5 if delta else 6)
    # Columns are told apart where no part covers some of them.
    assert (f"tensor<{columns}xi1>" in module) == (columns > 136)
    assert "output_operand_alias<" in add(delta=True, config=TWO)  # two launches are as without


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 63, 64, 65, 128, 1000, 4096, 8192])
@pytest.mark.parametrize("rank", EVERY_RANK)
def test_the_whole_grid_lowers(rank: int, num_tokens: int, weights: str) -> None:
    for x in (weights, "float32"):
        module = lowered(num_tokens, 3424, 4096, rank, 8, (x, weights, x))
        one = x == weights and (rank <= most_rank(num_tokens) or num_tokens <= 128)
        if one and rank > MOST_RANK:
            one = f"lora_r{rank}" in module
        assert_kernels(module, rank, one=one)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("num_tokens", "ranks", "config", "delta"),
    [
        (64, BUCKETS, None, False),
        (64, BUCKETS, None, True),
        (64, BUCKETS[::2], TWO, True),
        (4096, BUCKETS[::2], None, True),
        slow(64, BUCKETS, TWO, True),
        slow(4096, BUCKETS, None, True),
    ],
    ids=str,
)
def test_mixed_ranks_share_launches(
    num_tokens: int, ranks: tuple[int, ...], config: Any, delta: bool
) -> None:
    shape = jax.ShapeDtypeStruct

    def run(y: Any, x: Any, stacks: Any, ids: Any) -> Any:
        parts = [pk.LoRAPart(a, b, first_slot=8 * n) for n, (a, b) in enumerate(stacks)]
        how = dict(delta=delta, implementation="mosaic_gpu", config=config)
        return add_parts(y, x, parts, ids, **how)

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
        return pk.LoRAPart(*stacks, y_offset=offset)

    slices = ((0, 128), (128, 64), (192, 64))
    parts = tuple(part(rank, *columns) for columns in slices for rank in BUCKETS)
    launches = backend._launches(parts)
    assert [[p.y_offset for p in launch] for launch in launches] == [[0] * 5, [128] * 5, [192] * 5]
    assert backend._launches(parts[::5]) == [parts[::5]]
    chain = (part(8, 0, 64), part(8, 128, 64), part(8, 32, 128))  # the last touches both others
    assert backend._launches(chain) == [chain]


# ------------------------------------------------------------------------------ limits and choices


def test_missing_names_what_a_case_lacks() -> None:
    missing = support.missing
    assert missing(jnp.bfloat16, 16, 4096, 4096, jnp.bfloat16, 4096) is None
    assert "float32 weights" in str(missing(jnp.float32, 16, 4096))
    assert "rank 24" in str(missing(jnp.bfloat16, 24, 4096))
    assert "rank 528" in str(missing(jnp.bfloat16, 528, 4096))
    assert "H=100" in str(missing(jnp.bfloat16, 16, 100))
    assert "N=56" in str(missing(jnp.bfloat16, 16, None, 56))
    assert "N=262152" in str(missing(jnp.bfloat16, 16, 4096, 262152))
    assert "H=131080" in str(missing(jnp.bfloat16, 16, 131080))
    assert "264 bytes" in str(missing(jnp.bfloat16, 16, None, 64, jnp.bfloat16, 132))
    assert "y_offset=4" in str(missing(jnp.bfloat16, 16, None, 64, jnp.bfloat16, 128, 4))


@pytest.mark.parametrize("rank", EVERY_RANK)
def test_the_order_of_sums_follows_from_tokens_features_and_rank(rank: int) -> None:
    for features in (64, 1000, 4096, 131072):
        for num_tokens in (1, 64, 65, 1024, 4096, 65536):
            splits = {
                default_config(num_tokens, features, n, rank, slots).split
                for n in (64, 14336) for slots in (1, 64)
            }  # fmt: skip
            assert len(splits) == 1
            assert splits <= {1, 2, 4, 8}


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
        Config(**bad)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 200])
@pytest.mark.parametrize("rows", [64, 128])
def test_routes_list_the_adapters_of_each_block(
    rows: int, num_tokens: int, popularity: str
) -> None:
    ids = indices(popularity, num_tokens, 7)
    segments = pk.make_segments(ids, 7)
    with jax.numpy_rank_promotion("raise"):
        [table] = map(np.asarray, segments.table(Routes(SlotRange(0, 7), rows, sorts=False)))
    assert table.shape[1] == route_size(7, rows).words
    checked = np.pad(np.asarray(segments.indices), (0, -num_tokens % rows), constant_values=-1)
    np.testing.assert_array_equal(table[:, :rows], checked.reshape(-1, rows))
    np.testing.assert_array_equal(table[:, rows : 2 * rows].reshape(-1), np.arange(checked.size))
    assert not table[:, 2 * rows + 1].any()  # no tile is scattered
    for row in table:
        count, adapters = row[2 * rows], row[2 * rows + 6 :]
        assert sorted(adapters[:count]) == sorted(set(row[:rows].tolist()) - {-1})
        assert (adapters[count:] == -1).all()
        assert len(adapters) - count >= 63  # kernels look ahead


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(
    "portions", [Portions(4, 3), *map(ci, [Portions(4, 9), Portions(8, 40), Portions(3, 2)])]
)
def test_portions_of_a_tile_are_all_of_its_steps(portions: Portions, popularity: str) -> None:
    ids = np.concatenate([np.arange(64), indices(popularity, 200, 64), np.full(80, 7)])
    segments = pk.make_segments(jnp.asarray(ids, jnp.int32), 64)
    slots, rows = SlotRange(0, 64), 64
    [tiles] = map(np.asarray, segments.table(Routes(slots, rows, sorts=False)))
    [table] = map(np.asarray, segments.table(Routes(slots, rows, sorts=False, portions=portions)))
    assert table.shape == (len(tiles) + portions.spare, tiles.shape[1])
    taken = np.zeros((len(tiles), portions.steps), int)
    for row in table:
        tile, first, steps = row[2 * rows + 2], row[2 * rows + 3], row[2 * rows + 4]
        taken[tile, first : first + steps] += 1
        same = np.r_[: 2 * rows + 3, 2 * rows + 6 : len(row)]
        np.testing.assert_array_equal(row[same], tiles[tile][same])
    assert (taken == 1).all()
    np.testing.assert_array_equal(table[: len(tiles), 2 * rows + 2], np.arange(len(tiles)))
    steps = table[: len(tiles), 2 * rows + 4]
    assert steps[-1] == portions.steps  # a tile of one adapter is not cut
    if popularity == "identical":  # one with 64 is, where no other is
        assert steps[0] < portions.steps


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
    planes, factor = jax.jit(backend._planes, static_argnums=1)(x, jnp.dtype(weights))
    total = np.asarray(planes).astype(np.float64).sum(0)
    if factor is not None:
        total *= np.asarray(factor).astype(np.float64)[:, None]
    error = np.abs(total - x.astype(np.float64))
    assert (error <= 2.0**-23 * np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)).all()
