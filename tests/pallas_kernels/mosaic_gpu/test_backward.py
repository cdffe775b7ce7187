"""The backward kernels without a GPU: interpreted with race detection, and lowered for CUDA."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_cases import (
    GradientArrays,
    GradientCase,
    by_name,
    check_compact,
    check_half,
    in_float64,
    in_layers,
    tolerance,
    with_nan,
)
from marks import in_ci
from mosaic_cases import relative_error

import pallas_kernels as pk
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import backend, layouts, support
from pallas_kernels.mosaic_gpu.backward.config import by_lanes, narrow_cut, outer_cut
from pallas_kernels.mosaic_gpu.backward.tiles import Tiles

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def gradients(z: GradientArrays, slots: int, *, sorted_once: bool = True) -> dict[str, np.ndarray]:
    call = Call("add_lora", "mosaic_gpu", ("sgmv",) * len(z.parts))
    ids = pk.make_segments(z.ids, slots) if sorted_once else jnp.asarray(z.ids)
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    with jax.numpy_rank_promotion("raise"):
        dx, dparts, _ = jax.jit(lambda *a: backend.add_lora_grad(call, *a))(dy, x, parts, ids)
    return by_name(dx, dparts)


def check(case: GradientCase, z: GradientArrays, got: dict[str, np.ndarray]) -> None:
    for name, want in in_float64(z).items():
        error = relative_error(got[name], want)
        assert error < tolerance(name, case.dtype), (name, error)
        assert not got[name][want == 0].any(), name


ci = pytest.mark.ci
CASES = [
    pytest.param(GradientCase(70, 128, (96,), ((16, 3),), "zipf"), marks=ci),
    GradientCase(9, 72, (80,), ((8, 3),), "gaps"),
    pytest.param(GradientCase(1, 64, (64,), ((32, 2),), "identical"), marks=ci),
    pytest.param(GradientCase(140, 192, (64,), ((16, 2),), "identical"), marks=ci),
    pytest.param(GradientCase(66, 64, (64,), ((16, 3),), "none"), marks=ci),
    pytest.param(GradientCase(20, 136, (64,), ((80, 2),), "shuffled", "float16"), marks=ci),
    pytest.param(GradientCase(12, 64, (64,), ((272, 2),), "distinct"), marks=ci),
    pytest.param(GradientCase(80, 128, (64, 72), ((8, 2), (16, 2)), "gaps"), marks=ci),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_against_float64(case: GradientCase, interpreted: None) -> None:
    z = case.arrays()
    check(case, z, gradients(z, case.slots, sorted_once=case.num_tokens % 2 == 0))


BY_LANES = ["narrow", "wide", "outer"]
LANES = [
    GradientCase(9, 72, (80,), ((8, 3),), "gaps"),
    # More tokens of one slot than a warp takes, and more columns than a block has.
    pytest.param(GradientCase(170, 64, (1104,), ((8, 24),), "zipf"), marks=ci),
    pytest.param(GradientCase(20, 136, (64,), ((16, 24),), "shuffled", "float16"), marks=ci),
    pytest.param(GradientCase(40, 128, (64, 72), ((8, 24), (16, 24)), "gaps"), marks=ci),
]


@pytest.mark.parametrize("case", LANES, ids=str)
def test_sums_by_lanes_against_float64(case: GradientCase, by_lanes_always: list[str]) -> None:
    z = case.arrays()
    check(case, z, gradients(z, case.slots))
    assert by_lanes_always == BY_LANES


@pytest.mark.parametrize(
    "case",
    [
        GradientCase(12, 64, (64,), ((8, 4),), "shuffled"),
        # Slot 0 has more tokens than one warp takes by itself.
        pytest.param(GradientCase(60, 72, (64,), ((8, 6),), "zipf", "float16"), marks=ci),
    ],
    ids=str,
)
def test_an_adapters_bits_by_lanes_follow_from_its_own(
    case: GradientCase, by_lanes_always: list[str]
) -> None:
    """Not from the neighbours' tokens, adapters or number, while the shapes stay."""
    z, other = case.arrays(), dataclasses.replace(case, seed=7).arrays()
    mine = z.ids == 0
    ids = np.where(mine, 0, np.where(other.ids == 0, -1, other.ids)).astype(np.int32)
    [part], [others] = z.parts, other.parts
    for name in ("lora_a", "lora_b", "scales"):
        getattr(others, name)[0] = getattr(part, name)[0]
    x, dy = (np.where(mine[:, None], *both) for both in ((z.x, other.x), (z.dy, other.dy)))
    found = gradients(z, case.slots), gradients(GradientArrays(x, dy, (others,), ids), case.slots)
    for name, rows in (("dx", mine), ("dA0", 0), ("dB0", 0), ("ds0", 0)):
        one, same = (each[name][rows] for each in found)
        assert one.any()
        np.testing.assert_array_equal(same, one, err_msg=name)
    assert (found[0]["dA0"][1:] != found[1]["dA0"][1:]).any()
    assert by_lanes_always == BY_LANES * 2


def test_lanes_sum_where_adapters_have_few_tokens() -> None:
    many = 4096
    assert by_lanes(512, 64, 8, many) and not by_lanes(513, 64, 8, many)
    assert by_lanes(64, 32, 16, many) and not by_lanes(256, 16, 16, many)
    assert not by_lanes(64, 8, 8, 1024)  # few blocks of squares


def test_an_axis_with_more_blocks_than_others_may_have_comes_last() -> None:
    few, many = (layouts.grid_of(job=4, tile=tiles, share=2) for tiles in (65535, 65536))
    assert few == {"grid": (4, 65535, 2), "grid_names": ("job", "tile", "share")}
    assert many == {"grid": (4, 2, 65536), "grid_names": ("job", "share", "tile")}


@pytest.mark.ci
def test_grids_in_another_order(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "MOST_BLOCKS", 4)  # the case has six tiles
    case = GradientCase(12, 128, (64,), ((16, 5),), "shuffled")
    z = case.arrays()
    check(case, z, gradients(z, case.slots))


@pytest.mark.parametrize(
    ("tokens", "slots", "rank", "cuts"),
    [
        (512, 4, 16, ((16, 4), (2, 2))),  # blocks that fit at once with two stages
        (256, 64, 8, ((8, 4), (2, 2))),  # four tokens an adapter
        (512, 64, 64, ((2, 4), (2, 2))),  # more ranks, so larger shares
        (8192, 64, 8, ((1, 4), (2, 3))),  # full tiles
    ],
)
def test_cuts(
    tokens: int, slots: int, rank: int, cuts: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    tiles = Tiles.of(pk.make_segments(jnp.arange(tokens) * slots // tokens, slots))
    narrow = narrow_cut(2 * tiles.count, 8192, rank, sparse=tiles.sparse)
    assert (narrow, outer_cut(tiles.count, slots, 8192)) == cuts


@pytest.mark.parametrize("how", [pytest.param("interpreted", marks=ci), "by_lanes_always"])
def test_an_adapter_meets_no_other_tokens(how: str, request: pytest.FixtureRequest) -> None:
    """NaN in one adapter's tokens stays there, and the others' gradients keep their bits."""
    request.getfixturevalue(how)
    case = GradientCase(24, 64, (64,), ((16, 3),), "shuffled")
    z = case.arrays()
    clean, dirty = gradients(z, 3), gradients(with_nan(z, 1), 3)
    assert np.isnan(dirty["dA0"][1].astype(np.float32)).all()
    for name in ("dA0", "dB0"):
        np.testing.assert_array_equal(dirty[name][[0, 2]], clean[name][[0, 2]])
    others = z.ids != 1
    np.testing.assert_array_equal(dirty["dx"][others], clean["dx"][others])


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_gpu", marks=ci)])
def test_compact_gradients_hold_the_slots_in_use(
    implementation: Any, request: pytest.FixtureRequest
) -> None:
    if implementation == "mosaic_gpu":
        request.getfixturevalue("interpreted")
    check_compact(implementation)


@pytest.mark.ci
def test_compact_gradients_by_lanes(by_lanes_always: list[str]) -> None:
    check_compact("mosaic_gpu")
    assert by_lanes_always == BY_LANES


def test_whole_gradients_equal_those_of_jax() -> None:
    case = GradientCase(30, 64, (64,), ((16, 3),), "shuffled", "float16")
    z = case.arrays()
    x, dy, (part,) = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))

    def add(x: Any, part: Any) -> Any:
        return pk.add_lora_multi(jnp.zeros_like(dy), x, (part,), z.ids, implementation="xla")

    dx, dpart = jax.vjp(add, x, part)[1](dy)
    got, (gradient,) = pk.lora_gradients(dy, x, (part,), z.ids, implementation="xla")
    np.testing.assert_array_equal(got, dx)
    np.testing.assert_array_equal(gradient.slots, [0, 1, 2])
    for name in ("lora_a", "lora_b", "scales"):
        np.testing.assert_array_equal(getattr(gradient, name), getattr(dpart, name))


@pytest.mark.parametrize("how", [pytest.param("interpreted", marks=ci), "by_lanes_always"])
def test_stacks_of_several_layers_are_read_in_their_place(
    how: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(how)
    z = GradientCase(9, 64, (64,), ((16, 3),), "shuffled").arrays()
    got, want = gradients(in_layers(z), 3), gradients(z, 3)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_compact_gradients_of_fewer_slots_than_are_in_use() -> None:
    """The first ones; `in_use` says that some are missing."""
    z = GradientCase(12, 64, (64,), ((16, 3),)).arrays()
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    _, [few] = pk.lora_gradients(dy, x, parts, z.ids, compact=2, implementation="xla")
    _, [whole] = pk.lora_gradients(dy, x, parts, z.ids, implementation="xla")
    np.testing.assert_array_equal(few.slots, [0, 1])
    np.testing.assert_array_equal(few.lora_a, whole.lora_a[:2])
    assert few.in_use == whole.in_use == 3
    with pytest.raises(ValueError, match="compact must be at least 1, got 0"):
        pk.lora_gradients(dy, x, parts, z.ids, compact=0)


def test_gradients_without_tokens_are_zero() -> None:
    part = pk.LoRAPart(jnp.ones((2, 8, 64), "bfloat16"), jnp.ones((2, 64, 8), "bfloat16"))
    nothing = jnp.ones((0, 64), "bfloat16")
    dx, (gradient,) = pk.lora_gradients(nothing, nothing, (part,), jnp.zeros(0, jnp.int32))
    assert dx.shape == (0, 64)
    assert gradient.lora_a.shape == (2, 8, 64) and not gradient.lora_a.any()


@pytest.mark.parametrize("num_tokens", [*map(in_ci, (1, 5, 64)), 65, 200])
@pytest.mark.parametrize("order", ["runs", "shuffled", "none", "gaps"])
def test_tiles_hold_each_token_once(num_tokens: int, order: str) -> None:
    case = GradientCase(num_tokens, 64, (64,), ((16, 5),), order)
    ids = case.arrays().ids
    ids = np.where((ids >= 0) & (ids < 5), ids, -1)
    tiles = Tiles.of(pk.make_segments(ids, 5))
    tokens, is_token = np.asarray(tiles.tokens()), np.asarray(tiles.is_token())
    assert sorted(tokens[is_token]) == list(range(num_tokens))
    np.testing.assert_array_equal(ids[tokens[is_token]], np.asarray(tiles.adapters())[is_token])
    slots = np.array([0, 1, 2, 3, 4, -1, 2**31 - 1], np.int32)
    for slot, (first, count) in zip(slots, np.asarray(tiles.slot_tiles(jnp.asarray(slots)))):
        assert count == -(-np.sum((ids == slot) & (ids >= 0)) // 64)
        assert (np.asarray(tiles.table)[first : first + count, 0] == slot).all()
    rows = np.asarray(tiles.rows)
    for slot, (row, start, count) in zip(slots, np.asarray(tiles.slot_tokens(jnp.asarray(slots)))):
        mine = np.flatnonzero((ids == slot) & (ids >= 0))
        np.testing.assert_array_equal(rows[start : start + count], mine)
        np.testing.assert_array_equal(tokens[row : row + count], mine)
    pairs = np.asarray(tiles.slot_tiles(jnp.asarray([0, 2], jnp.int32), 2))
    for slot, (first, count) in zip((0, 2), pairs):
        mine = np.asarray(tiles.table)[first : first + count, 0]
        assert set(mine) == set(ids) & {slot, slot + 1}
        assert count == sum(-(-np.sum(ids == one) // 64) for one in (slot, slot + 1))


def test_gradients_take_no_memory_for_slots_that_no_part_has() -> None:
    z, call = GradientCase(9, 64, (64,), ((16, 3),)).arrays(), Call("f", "mosaic_gpu", ("sgmv",))
    parts = tuple(dataclasses.replace(part, first_slot=2**30) for part in z.parts)
    traced = jax.make_jaxpr(functools.partial(backend.add_lora_grad, call))(z.dy, z.x, parts, z.ids)
    assert max(out.aval.size for eqn in traced.eqns for out in eqn.outvars) < 2**20


def lowered(
    num_tokens: int, features: int, width: int, *ranks: int, slots: int = 8, dtype: str = "bfloat16"
) -> str:
    """The gradients' module for Hopper: layout inference and the shared-memory check have run."""
    shape = jax.ShapeDtypeStruct

    def run(y: Any, x: Any, weights: Any, ids: Any) -> Any:
        def total(x: Any, weights: Any) -> Any:
            parts = [pk.LoRAPart(a, b, first_slot=i * slots) for i, (a, b) in enumerate(weights)]
            return pk.add_lora_multi(y, x, parts, ids, implementation="mosaic_gpu")

        out, pull = jax.vjp(total, x, weights)
        return pull(out)

    weights = [
        (shape((slots, rank, features), dtype), shape((slots, width, rank), dtype))
        for rank in ranks
    ]
    traced = jax.jit(run).trace(
        shape((num_tokens, width), dtype),
        shape((num_tokens, features), dtype),
        weights,
        shape((num_tokens,), "int32"),
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_kernels(module: str, *ranks: int) -> None:
    names = "_".join(f"r{rank}" for rank in ranks)
    found = set(re.findall(r"lora_(?:narrow|wide|outer)(?:_r\d+)+", module))
    assert found == {f"lora_{kind}_{names}" for kind in ("narrow", "wide", "outer")}
    assert "stablehlo.while" not in module and "stablehlo.dot_general" not in module


@pytest.mark.parametrize("num_tokens", [64, pytest.param(1, marks=ci), 8192])
@pytest.mark.parametrize(
    "rank",
    [
        16,
        *(pytest.param(rank, marks=ci) for rank in (8, 128, 512)),
        *(pytest.param(rank, marks=pytest.mark.slow) for rank in (32, 64)),
    ],
)
def test_every_bucket_lowers(rank: int, num_tokens: int) -> None:
    assert_kernels(lowered(num_tokens, 4096, 4096, rank), rank)


@pytest.mark.ci
@pytest.mark.parametrize("shape", [(72, 4096), (4096, 72), (14336, 4096), (64, 64)])
def test_every_size_lowers(shape: tuple[int, int]) -> None:
    assert_kernels(lowered(300, *shape, 48, dtype="float16"), 48)


@pytest.mark.ci
def test_mixed_ranks_share_launches() -> None:
    assert_kernels(lowered(1000, 4096, 4096, 8, 16, 32), 8, 16, 32)


@pytest.mark.parametrize(
    ("sizes", "slots", "ranks"),
    [
        ((64, 4096, 4096), 32, [16]),
        pytest.param((256, 8192, 14336), 32, [8, 8], marks=ci),
        pytest.param((64, 8192, 8192), 64, [8], marks=ci),  # as test_training_device.py
    ],
)
def test_sums_by_lanes_lower(sizes: tuple[int, int, int], slots: int, ranks: list[int]) -> None:
    module = lowered(*sizes, *ranks, slots=slots)
    for kind in ("narrow", "wide", "outer"):
        assert f"lora_{kind}_few_r{ranks[0]}" in module and f"lora_{kind}_r" not in module


def test_gradients_lower_with_64_bits_enabled() -> None:
    call, half = Call("add_lora", "mosaic_gpu", ("sgmv",), compact=2), "bfloat16"
    shapes = ((70, 64), (70, 64), (3, 16, 64), (3, 64, 16))
    arrays = [jax.ShapeDtypeStruct(shape, half) for shape in shapes]

    def run(dy: Any, x: Any, a: Any, b: Any, scales: Any, ids: Any) -> Any:
        return backend.add_lora_grad(call, dy, x, (pk.LoRAPart(a, b, scales),), ids)

    with jax.enable_x64(True):
        others = jax.ShapeDtypeStruct((3,), "float32"), jax.ShapeDtypeStruct((70,), "int32")
        traced = jax.jit(run).trace(*arrays, *others)
        assert_kernels(traced.lower(lowering_platforms=("cuda",)).as_text(), 16)


def test_missing_gradient_names_what_a_case_lacks() -> None:
    missing, half = support.missing_gradient, "bfloat16"
    assert missing(5, [half, half], x=half, y=half) is None
    assert missing(0, [half], x=half) == "calls without a token"
    lack = "gradients of bfloat16 weights beside float32 x"
    assert missing(5, [half], x="float32", y=half) == lack
    lack = "gradients of bfloat16 weights beside float16 y"
    assert missing(5, [half], x=half, y="float16") == lack


@pytest.mark.parametrize(
    "op", [pytest.param("shrink", marks=ci), "expand", pytest.param("expand=", marks=ci)]
)
def test_halves_against_float64(op: str, interpreted: None) -> None:
    z = GradientCase(20, 64, (72,), ((16, 3),), "gaps").arrays()
    check_half(op, z)
