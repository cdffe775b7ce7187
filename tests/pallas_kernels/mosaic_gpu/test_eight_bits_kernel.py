"""The kernels with stacks in 8 bits: emulated, interpreted, and lowered for CUDA."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from eight_bit_cases import EightBitCase, Stack, as_shapes, parts_of
from mosaic_cases import add_parts, bits, parts_in_float64, relative_error, y_tolerance

import pallas_kernels as pk
from pallas_kernels.mosaic_gpu import Config
from pallas_kernels.mosaic_gpu.decode import DecodePart, plan
from pallas_kernels.mosaic_gpu.lanes import ArrayMemory, Emulator, gpu
from pallas_kernels.stacks import LayerStacks

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
ci = functools.partial(pytest.param, marks=pytest.mark.ci)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

TWO = (Stack(16, 3, 72, 0, 0), Stack(64, 2, 72, 3, 0), Stack(16, 3, 64, 0, 72))
MANY = (*TWO, Stack(64, 2, 64, 3, 72), Stack(8, 2, 136, 5, 0))
CASES = [
    (EightBitCase(11, 256, (Stack(64, 3, 96),), "zipf"), {}),
    (EightBitCase(9, 128, (Stack(8, 3, 72),)), {}),
    ci(EightBitCase(10, 272, (Stack(16, 4, 64),), "out_of_range"), dict(split=4)),
    ci(EightBitCase(5, 640, (Stack(32, 2, 200),), "identical"), dict(column_clusters=2)),
    ci(EightBitCase(3, 192, (Stack(48, 2, 64),), y_dtype="float32"), dict(split=1)),
    (EightBitCase(3, 256, (Stack(128, 2, 72),), "distinct"), {}),
    ci(EightBitCase(2, 256, (Stack(272, 2, 64),)), dict(expand_stages=3)),
    ci(EightBitCase(2, 8192, (Stack(16, 1, 64),)), dict(split=1, stages=3)),  # loops over H
    ci(EightBitCase(2, 128, (Stack(16, 2, 2568),)), dict(expand_stages=3)),  # and over columns
    ci(EightBitCase(13, 256, TWO, "zipf"), {}),
    (EightBitCase(12, 128, MANY, "out_of_range"), dict(column_clusters=2)),
    ci(EightBitCase(11, 256, (Stack(64, 3, 96),), "zipf", dtype="int8"), {}),
    (EightBitCase(12, 128, MANY, "out_of_range", dtype="int8"), dict(column_clusters=2)),
]
PREFILL = Config(split=2)
PREFILLS = [
    ci(EightBitCase(70, 128, (Stack(16, 2, 64), Stack(32, 1, 64, 2)), "zipf"), {}),
    (EightBitCase(66, 144, (Stack(8, 3, 72),)), dict(expand_stack=2)),
    ci(EightBitCase(9, 72, (Stack(48, 3, 72),), "distinct"), dict(split=1, stages=1)),
    ci(
        EightBitCase(130, 672, (Stack(64, 2, 136),), y_dtype="float32"),
        dict(row_tiles=2, expand_row_tiles=2, expand_columns=2),
    ),
    ci(EightBitCase(65, 64, (Stack(272, 2, 64),)), dict(stack=2)),
    ci(EightBitCase(70, 96, (Stack(8, 2, 136, 5), *TWO), "out_of_range"), {}),
    ci(EightBitCase(70, 96, (Stack(8, 2, 136, 5), *TWO), "out_of_range", dtype="int8"), {}),
]


WAYS = pytest.mark.parametrize("config", [DECODE, ci(PREFILL)], ids=["one launch", "two launches"])


def check(case: EightBitCase, new: np.ndarray) -> None:
    """`new` against float64; what no part adds to keeps its bits."""
    (x, y), ids = case.rows(), case.ids
    delta, used = parts_in_float64(x, case.parts(), ids, case.columns)
    want = y.astype(np.float64) + delta
    assert used.any()
    assert relative_error(new, want) < y_tolerance(case.y_dtype, "bfloat16")
    np.testing.assert_array_equal(bits(new)[~used], bits(y)[~used])


def decode_part(part: pk.LoRAPart) -> DecodePart:
    a, b, scales = (jnp.asarray(t) for t in (part.lora_a, part.lora_b, part.scales))
    return DecodePart(a, b, scales, part.first_slot, part.y_offset, part.scales_offset or 0)


@pytest.mark.parametrize("seated", [False, True], ids=["ids", "segments"])
@pytest.mark.parametrize("delta", [False, True], ids=["in place", "delta"])
@pytest.mark.parametrize(("case", "change"), CASES, ids=str)
def test_decode_emulated_against_float64(
    case: EightBitCase, change: dict[str, int], delta: bool, seated: bool, emulated: None
) -> None:
    (x, y), config = case.rows(), dataclasses.replace(DECODE, **change)
    assert plan((y,), x, tuple(map(decode_part, case.parts())), config) is not None
    slots = max(one.first_slot + one.slots for one in case.stacks)
    ids = pk.make_segments(case.ids, slots) if seated else case.ids
    how: Any = {"implementation": "mosaic_gpu", "config": config}
    check(case, np.asarray(add_parts(jnp.asarray(y), x, case.parts(), ids, delta=delta, **how)))


@WAYS
def test_several_layers(config: Config, request: pytest.FixtureRequest) -> None:
    """Stacks, and scales too, are read where they stand among those of all layers."""
    request.getfixturevalue("emulated" if config is DECODE else "interpreted")
    case = EightBitCase(7, 128, (Stack(16, 2, 64), Stack(16, 3, 64, 2)))
    (x, y), parts = case.rows(), case.parts()
    scales = np.asarray(parts[0].scales)

    def of_layers(own: Any) -> Any:
        return np.stack([np.asarray(own)[::-1].copy(), np.asarray(own)])

    parts = [
        dataclasses.replace(
            part,
            layers=LayerStacks(
                of_layers(part.lora_a), of_layers(part.lora_b), of_layers(scales), jnp.int32(1)
            ),
        )
        for part in parts
    ]
    how: Any = {"implementation": "mosaic_gpu", "config": config}
    check(case, np.asarray(pk.add_lora_multi(jnp.asarray(y), x, parts, case.ids, **how)))


@WAYS
def test_mixes(config: Config, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("emulated" if config is DECODE else "interpreted")
    case = EightBitCase(6, 128, (Stack(16, 4, 64),))
    (x, y), [part] = case.rows(), case.parts()
    rng = np.random.default_rng(5)
    ids = rng.integers(-1, 4, (6, 2)).astype(np.int32)
    weights = rng.normal(size=(6, 2)).astype(np.float32)
    how: Any = {"implementation": "mosaic_gpu", "config": config, "weights": weights}
    new = pk.add_lora_multi(jnp.asarray(y), x, [part], ids, **how)
    want = y.astype(np.float64)
    for column, factors in zip(ids.T, weights.T):
        want += parts_in_float64(x, [part], column, 64)[0] * factors[:, None]
    assert relative_error(np.asarray(new), want) < y_tolerance("bfloat16")


@pytest.mark.parametrize(("case", "change"), PREFILLS, ids=str)
def test_prefill_interpreted(case: EightBitCase, change: dict[str, int], interpreted: None) -> None:
    (x, y), config = case.rows(), dataclasses.replace(PREFILL, **change)
    how: Any = {"implementation": "mosaic_gpu", "config": config}
    check(case, np.asarray(pk.add_lora_multi(jnp.asarray(y), x, case.parts(), case.ids, **how)))


@pytest.mark.parametrize("x_dtype", [ci("float16"), "float32"])
def test_x_of_another_dtype(x_dtype: str, interpreted: None) -> None:
    case = EightBitCase(6, 128, (Stack(16, 2, 64),))
    (x, y), how = case.rows(), {"implementation": "mosaic_gpu"}
    x = x.astype(x_dtype)
    check(case, np.asarray(pk.add_lora_multi(jnp.asarray(y), x, case.parts(), case.ids, **how)))


@pytest.mark.parametrize("dtype", [ci("bfloat16"), "int8"])
def test_beside_a_part_in_another_dtype(dtype: str, interpreted: None) -> None:
    case = EightBitCase(9, 128, (Stack(16, 2, 64), Stack(32, 2, 64, 2)))
    (x, y), [one, two] = case.rows(), case.parts()
    if dtype == "int8":
        two = dataclasses.replace(case, dtype=dtype).parts()[1]
    else:
        a, b = (np.asarray(t).astype(dtype) for t in (two.lora_a, two.lora_b))
        two = pk.LoRAPart(a, b, np.float32([2**-18, 2**-19]), 2)
    new = pk.add_lora_multi(jnp.asarray(y), x, [one, two], case.ids, implementation="mosaic_gpu")
    delta, _ = parts_in_float64(x, [one, two], case.ids, 64)
    assert relative_error(np.asarray(new), y.astype(np.float64) + delta) < y_tolerance("bfloat16")


def every_byte(dtype: str) -> np.ndarray:
    """Words that have each number of a byte in each of their places."""
    orders = [np.random.default_rng(n).permutation(256).astype(np.uint8) for n in range(4)]
    found = np.stack(orders, axis=1).view(jnp.dtype(dtype))
    assert all(len(set(column.view(np.uint8).tolist())) == 256 for column in found.T)
    return found


def numbers(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The four bfloat16 of each pair of words."""
    pairs = np.stack([low, high], axis=-1)
    return np.ascontiguousarray(pairs).view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_every_byte_is_widened_exactly(dtype: str) -> None:
    every = every_byte(dtype)
    m = Emulator(ArrayMemory([np.zeros(4, np.float32)]), 64, 1, 256)
    words = m.integer(0)
    words.array = every.view(np.int32).T.copy()
    low, high = (one.array[0] for one in m.widen(words, every.dtype))
    np.testing.assert_array_equal(numbers(low, high), every.astype(np.float64))


def test_what_a_gpu_runs_widens_every_byte_exactly() -> None:
    """The text of the instructions, carried out in NumPy. Nothing in it may be rounded."""
    every = every_byte("int8")
    registers = ptx.run(gpu.WIDENS_INT8, {"$2": every.view(np.uint32)[:, 0]})
    found = numbers(registers["$0"], registers["$1"])
    np.testing.assert_array_equal(found, every.astype(np.float64))
    every = every_byte("float8_e4m3fn")
    given = {"$1": every.view(np.uint32)[:, 0], "$2": np.uint32([0x7B807B80])}
    low, high = (ptx.run(text, given)["$0"] for text in gpu.WIDENS_FLOAT8)
    found, want = numbers(low, high), every.astype(np.float64)
    is_number = ~np.isnan(want)
    np.testing.assert_array_equal(found[is_number], want[is_number])
    np.testing.assert_array_equal(np.signbit(found[is_number]), np.signbit(want[is_number]))


# ----------------------------------------------------------------------------------------- lowering


def lowered(
    case: EightBitCase, config: Config | None, *, seated: bool = False, x_dtype: str = "bfloat16"
) -> str:
    like = [
        pk.LoRAPart(
            np.zeros((one.slots, one.rank, case.features), case.dtype),
            np.zeros((one.slots, one.width, one.rank), case.dtype),
            np.zeros(sum(s.slots * s.rank for s in case.stacks), np.float32),
            one.first_slot,
            one.y_offset,
            sum(s.slots * s.rank for s in case.stacks[:n]),
        )
        for n, one in enumerate(case.stacks)
    ]
    slots = max(one.first_slot + one.slots for one in case.stacks)

    def run(y: Any, x: Any, operands: Any, ids: Any) -> Any:
        route = pk.make_segments(ids, slots) if seated else ids
        how: Any = {"implementation": "mosaic_gpu", "config": config}
        return pk.add_lora_multi(y, x, parts_of(like, operands), route, **how)

    shapes = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), as_shapes(like))
    traced = jax.jit(run).trace(
        jax.ShapeDtypeStruct((case.tokens, case.columns), case.y_dtype),
        jax.ShapeDtypeStruct((case.tokens, case.features), x_dtype),
        shapes,
        jax.ShapeDtypeStruct((case.tokens,), "int32"),
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels(module: str) -> set[str]:
    return set(re.findall(r"lora(?:_shrink|_expand)?(?:_r\d+)+", module))


@pytest.mark.parametrize("tokens", [1, ci(64), ci(256)])
@pytest.mark.parametrize("rank", [8, 64, 128, *map(ci, (16, 32, 48, 96, 256))])
def test_decode_lowers(rank: int, tokens: int) -> None:
    dtype = "int8" if rank in (8, 96) else "float8_e4m3fn"
    case = EightBitCase(tokens, 4096, (Stack(rank, 8, 4096),), dtype=dtype)
    for seated in (False, True):
        config = dataclasses.replace(DECODE, split=8) if tokens > 128 else None
        assert kernels(lowered(case, config, seated=seated)) == {f"lora_r{rank}"}


@pytest.mark.parametrize("sizes", [(64, 64), (576, 1536), ci((14336, 4096)), ci((131072, 72))])
def test_every_size_lowers(sizes: tuple[int, int]) -> None:
    features, width = sizes
    for rank in (8, 16, 64):
        case = EightBitCase(8, features, (Stack(rank, 2, width),), y_dtype="float32")
        assert kernels(lowered(case, None)) == {f"lora_r{rank}"}


def test_buckets_share_a_launch() -> None:
    stacks = [
        Stack(rank, 4, 1024, 4 * n, 1024 * column)
        for n, rank in enumerate((8, 16, 64))
        for column in range(2)
    ]
    assert kernels(lowered(EightBitCase(16, 1024, tuple(stacks)), None)) == {
        "lora_r8_r8_r16_r16_r64_r64"
    }


EVERY_RANK = (8, *range(16, 513, 16))


@pytest.mark.parametrize("rank", [8, 64, *map(ci, (16, 48, 128, 256, 512)), *map(slow, EVERY_RANK)])
@pytest.mark.parametrize("tokens", [ci(300), 4096])
@pytest.mark.parametrize("dtype", ["int8", ci("float8_e4m3fn")])
def test_a_prefill_reads_stacks_as_they_are(rank: int, tokens: int, dtype: str) -> None:
    case = EightBitCase(tokens, 4096, (Stack(rank, 64, 4096),), dtype=dtype)
    module = lowered(case, None if tokens > 1024 else PREFILL)
    assert kernels(module) == {f"lora_shrink_r{rank}", f"lora_expand_r{rank}"}
    assert not re.search(r"stablehlo\.(convert|copy|pad).*x(f8E4M3FN|i8)", module)


@pytest.mark.parametrize(
    "sizes", [(144, 72), *map(ci, ((64, 64), (72, 88), (576, 200), (14336, 4096), (131072, 72)))]
)
@pytest.mark.parametrize("x_dtype", ["bfloat16", ci("float32")])
def test_every_size_lowers_in_prefill(sizes: tuple[int, int], x_dtype: str) -> None:
    features, width = sizes
    for rank in (8, 16, 64):
        case = EightBitCase(300, features, (Stack(rank, 4, width),), y_dtype="float32")
        found = kernels(lowered(case, PREFILL, x_dtype=x_dtype))
        assert found == {f"lora_shrink_r{rank}", f"lora_expand_r{rank}"}


@pytest.mark.ci
def test_buckets_share_launches_in_prefill() -> None:
    stacks = tuple(Stack(rank, 4, 256, 4 * n) for n, rank in enumerate((8, 16, 64)))
    found = kernels(lowered(EightBitCase(2000, 256, stacks), None))
    assert found == {"lora_shrink_r8_r16_r64", "lora_expand_r8_r16_r64"}
