"""Every op against float64, on every implementation that runs anywhere; and what the ops promise.

The inputs are hostile throughout: slots that no token uses hold NaN and infinities, tokens without
adapter too, and bytes that an op must not touch hold signalling NaNs with payloads.
"""

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import in_ci

import pallas_kernels as pk
from pallas_kernels import dispatch, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA runs as one dense product"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # numpy, of the poison
]


@pytest.fixture(autouse=True)
def no_rank_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


F32, BF16, F16 = np.dtype("float32"), jnp.dtype("bfloat16"), np.dtype("float16")

# Relative error of a row (2-norm), by the narrowest type that a result was rounded to.
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 4e-3}

IMPLEMENTATIONS = ["xla", "loop"]
SHRINKS = [f"{kernel}_shrink" for kernel in ("bgmv", "sgmv")]
EXPANDS = [
    f"{kernel}_{what}"
    for kernel in ("bgmv", "sgmv")
    for what in ("expand", "expand_add", "expand_slice", "expand_slice_over")
]
ADDS = ["decode_add_lora", "prefill_add_lora", "decode_add_lora_multi", "prefill_add_lora_multi"]
OPS = [*SHRINKS, *EXPANDS, *ADDS]
# The loop knows no kernels: one of the two is enough.
WAYS = [
    *((op, "xla") for op in OPS),
    *((op, "loop") for op in OPS if op.startswith(("bgmv", "decode"))),
]
OFFSET, MARGIN = 3, 8  # columns of y before, and before and after, those that an op touches


class Case(NamedTuple):
    tokens: int
    adapters: int
    rank: int
    features: int
    width: int
    x: np.dtype
    weights: np.dtype
    y: np.dtype
    stacks: int = 3  # axes; 4 is LoRAX's [L, 1, ., .]

    @property
    def id(self) -> str:
        types = "-".join(d.name for d in (self.x, self.weights, self.y))
        return f"T{self.tokens}-L{self.adapters}-r{self.rank}-{types}"


QUICK_CASES = [
    Case(0, 3, 8, 24, 40, F32, F32, F32),
    Case(2, 1, 8, 33, 17, F16, F16, F16, stacks=4),
    Case(7, 3, 16, 40, 24, F32, BF16, F32),
    Case(65, 6, 16, 1000, 130, BF16, BF16, BF16),
    Case(65, 4, 136, 72, 56, F32, F32, F32),  # beyond BGMV_MAX_RANK
]
CASES = [
    *QUICK_CASES,
    Case(1, 4, 16, 136, 72, BF16, BF16, BF16),
    Case(7, 3, 16, 40, 24, F16, F32, BF16),
    Case(65, 6, 16, 1000, 130, F32, F32, F32),
    Case(65, 90, 8, 64, 48, BF16, F16, F32),
]


def popularity(name: str, tokens: int, adapters: int) -> np.ndarray:
    rng = np.random.default_rng(tokens + adapters)
    last = adapters - 1
    return {
        "distinct": lambda: last - rng.permutation(tokens) % adapters,
        "uniform": lambda: rng.integers(-1, adapters, tokens),
        "zipf": lambda: np.minimum(rng.zipf(1.5, tokens) - 1, last),
        "identical": lambda: np.full(tokens, last),
        "none": lambda: np.full(tokens, -1),
        "out_of_range": lambda: np.resize([last, -2, adapters, 2**31 - 1, -(2**31), 0], tokens),
    }[name]().astype(np.int32)


POPULARITIES = ["distinct", "uniform", "zipf", "identical", "none", "out_of_range"]


def poison(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """NaNs with payloads, quiet and signalling, infinities and -0.0."""
    bits, values = {
        F32: (np.uint32, [0x7F800001, 0xFFC12345, 0x7F800000, 0x80000000, 0x7FC00000]),
        BF16: (np.uint16, [0x7F81, 0xFFC5, 0x7F80, 0x8000, 0x7FC0]),
        F16: (np.uint16, [0x7C01, 0xFE05, 0x7C00, 0x8000, 0x7E00]),
    }[dtype]
    return rng.choice(np.array(values, bits), shape).view(dtype)


def bits_of(array: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.uint32 if array.dtype.itemsize == 4 else np.uint16)


def inputs(case: Case, indices: np.ndarray, seed: int = 0, *, poisoned: bool = True) -> dict:
    """Signed random arrays; what no adapter of a token touches is poisoned."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, dtype: np.dtype) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    tokens, adapters, rank, features, width = case[:5]
    used = np.isin(np.arange(adapters), indices)
    live = np.isin(indices, np.arange(adapters))
    arrays = {
        "y": normal(tokens, MARGIN + width, dtype=case.y),
        "x": normal(tokens, features, dtype=case.x),
        "v": normal(tokens, rank, dtype=F32 if case.x == case.weights else case.x),
        "a": normal(adapters, rank, features, dtype=case.weights),
        "b": normal(adapters, width, rank, dtype=case.weights),
        "scales": normal(adapters, dtype=F32),
    }
    if poisoned:
        for name, clean in (("x", live), ("v", live), ("a", used), ("b", used), ("scales", used)):
            array = arrays[name]
            array[~clean] = poison(rng, array[~clean].shape, array.dtype)
        foul = np.ones(arrays["y"].shape, bool)
        foul[live, OFFSET : OFFSET + width] = False
        arrays["y"] = np.where(foul, poison(rng, foul.shape, case.y), arrays["y"])
    if case.stacks == 4:
        arrays |= {name: arrays[name][:, None] for name in "ab"}
    return arrays


def run(op: str, arrays: dict, indices, implementation: str | None) -> jax.Array:
    """`op` on the arrays that it takes."""
    x, v, a, b, y, scales = (arrays[name] for name in ("x", "v", "a", "b", "y", "scales"))
    how = {"implementation": implementation}
    width = b.shape[-2]
    group, _, what = op.partition("_")
    if group == "sgmv":
        indices = pk.make_segments(indices, a.shape[0])
    match what:
        case "shrink":
            return getattr(pk, op)(x, a, indices, scale=scales[-1], **how)
        case "expand":
            return getattr(pk, op)(v, b, indices, **how)
        case "expand_add":
            y = y[:, OFFSET : OFFSET + width]
            return getattr(pk, f"{group}_expand")(v, b, indices, y, **how)
        case "expand_slice" | "expand_slice_over":
            add = {"add_inputs": what == "expand_slice"}
            expand_slice = getattr(pk, f"{group}_expand_slice")
            return expand_slice(v, b, indices, y, OFFSET, width, **add, **how)
        case "add_lora":
            y = y[:, OFFSET : OFFSET + width]
            return pk.add_lora(y, x, a, b, indices, scales=scales, phase=group, **how)
        case "add_lora_multi":  # two overlapping parts of unequal widths
            segments = pk.make_segments(indices, a.shape[0])
            half = b[..., : width // 2, :]
            parts = [
                pk.LoRAPart(a, b, scales, y_offset=OFFSET),
                pk.LoRAPart(a, half, 0.5, y_offset=OFFSET + width // 4),
            ]
            return pk.add_lora_multi(y, x, parts, segments, phase=group, **how)
    raise AssertionError(op)


@functools.cache
def compiled(op: str, implementation: str):
    return jax.jit(functools.partial(run, op, implementation=implementation))


def rounded(v: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 `v` as the expand multiplies it with a B of `dtype`."""
    return v.astype(F32).astype(dtype) if dtype != F32 else v


def expected(op: str, arrays: dict, indices: np.ndarray) -> np.ndarray:
    """What `op` means, in float64 (but for the cast of v to B's type)."""
    x, v, y, scales = (arrays[name] for name in ("x", "v", "y", "scales"))
    a, b = (arrays[name].reshape(-1, *arrays[name].shape[-2:]) for name in "ab")
    width = b.shape[1]
    if v.dtype == F32:
        v = rounded(v, b.dtype)

    def expand(v, y, offset=0, b=b, **options):
        return reference.expand(v, b, indices, y, offset, **options)

    def shrink(scales):
        return reference.shrink(x, a, indices, scales)

    inner = y[:, OFFSET : OFFSET + width]
    match op.partition("_")[2]:
        case "shrink":
            return shrink(scales[-1])
        case "expand":
            return expand(v, np.zeros((len(v), width)))
        case "expand_add":
            return expand(v, inner)
        case "expand_slice":
            return expand(v, y, OFFSET)
        case "expand_slice_over":
            return expand(v, y, OFFSET, add_inputs=False)
        case "add_lora":
            return expand(rounded(shrink(scales), b.dtype), inner)
        case "add_lora_multi":
            out = expand(rounded(shrink(scales), b.dtype), y, OFFSET)
            half = rounded(shrink(0.5), b.dtype)
            return expand(half, out, OFFSET + width // 4, b[:, : width // 2])
    raise AssertionError(op)


def untouched(op: str, arrays: dict, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits that the result of `op` must hold, and where."""
    y, width = arrays["y"], arrays["b"].shape[-2]
    live = np.isin(indices, np.arange(len(arrays["a"])))
    match op.partition("_")[2]:
        case "shrink":
            y, columns = np.zeros((len(y), arrays["a"].shape[-2]), F32), slice(None)
        case "expand":
            y, columns = np.zeros((len(y), width), arrays["b"].dtype), slice(None)
        case "expand_add" | "add_lora":
            y, columns = y[:, OFFSET : OFFSET + width], slice(None)
        case _:
            columns = slice(OFFSET, OFFSET + width)
    kept = np.ones(y.shape, bool)
    kept[live, columns] = False
    return bits_of(np.ascontiguousarray(y)), kept


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Row by row in 2-norm."""
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    got, want = np.nan_to_num(got), np.nan_to_num(want)
    error, size = (np.linalg.norm(m, axis=-1) for m in (got - want, want))
    assert np.all(error <= tolerance * size), f"{np.max(error / np.maximum(size, 1e-30)):.2e}"


def check(op: str, case: Case, out: jax.Array, arrays: dict, indices: np.ndarray) -> None:
    want = expected(op, arrays, indices)
    y_type = {"shrink": F32, "expand": case.weights}.get(op.partition("_")[2], case.y)
    assert out.shape == want.shape and out.dtype == y_type
    bits, kept = untouched(op, arrays, indices)
    np.testing.assert_array_equal(bits_of(out)[kept], bits[kept])
    # Where both halves run, v is rounded too, and may round the other way than the oracle's.
    types = [y_type, case.weights] if op in ADDS else [y_type]
    clean = ~kept.all(-1)
    got, want = (np.where(kept, 0, np.asarray(m, np.float64))[clean] for m in (out, want))
    assert_close(got, want, max(TOLERANCE[t] for t in types))


def every_way():
    """The loop is for comparison: two popularities of it; the others are slow, and so are most of
    the cases that are not quick."""
    for (op, implementation), case, which in itertools.product(WAYS, CASES, POPULARITIES):
        some = which in ("uniform", "zipf", "out_of_range")
        few = which not in ("zipf", "out_of_range")
        few = few and (implementation == "loop" or case not in QUICK_CASES)
        quick = some and case in QUICK_CASES
        marks = [pytest.mark.slow] if few else [] if quick else [pytest.mark.ci]
        name = f"{op}-{implementation}-{which}-{case.id}"
        yield pytest.param(op, implementation, case, which, marks=marks, id=name)


@pytest.mark.parametrize(("op", "implementation", "case", "which"), list(every_way()))
def test_against_float64(op, implementation, case, which):
    indices = popularity(which, case.tokens, case.adapters)
    arrays = inputs(case, indices)
    arrays["scales"][-1] = 0.75  # the shrinks' one scale
    live = np.flatnonzero(np.isin(indices, np.arange(case.adapters)))
    if len(live) > 1:  # a row's NaN stays in that row
        arrays["x"][live[0], 1] = np.nan
        arrays["v"][live[0], 1] = np.nan
    check(op, case, compiled(op, implementation)(arrays, indices), arrays, indices)


PLAIN = Case(19, 5, 16, 40, 24, F32, F32, F32)


def plain(seed: int = 0, case: Case = PLAIN) -> tuple[dict, np.ndarray]:
    indices = popularity("uniform", case.tokens, case.adapters)
    return inputs(case, indices, seed, poisoned=False), indices


def names(fn, *args) -> set[str]:
    """The named programs of this package in a jaxpr."""
    found = re.findall(r"name=(\w+)", str(jax.make_jaxpr(fn)(*args)))
    return {
        name
        for name in found
        if re.search("(shrink|expand|add_lora|lora_delta)_(xla|loop|mosaic)", name)
    }


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("op", OPS)
def test_the_named_implementation_runs_and_no_other(op, implementation):
    group, _, what = op.partition("_")
    kernel = {"decode": "bgmv", "prefill": "sgmv"}.get(group, group)
    what = "add_lora" if op in ADDS else what.split("_")[0]
    wanted = f"{what}_loop" if implementation == "loop" else f"{kernel}_{what}_xla"
    arrays, indices = plain()
    assert names(lambda a: run(op, a, indices, implementation), arrays) == {wanted}


@pytest.mark.parametrize(("op", "implementation"), WAYS)
def test_float32_never_multiplies_in_tf32(op, implementation):
    """A GPU's default, which a CPU would not show."""
    arrays, indices = plain()
    fn = jax.grad(loss(functools.partial(run, op, implementation=implementation)))
    text = str(jax.make_jaxpr(fn)(arrays, indices))
    exact = re.findall(r"precision=\(?(?:Precision\.)?HIGHEST", text)
    assert len(exact) == text.count("dot_general[") > 0


def test_decode_takes_bgmv_up_to_its_rank_and_sgmv_beyond():
    def add(phase):
        low, high = (inputs(PLAIN._replace(rank=r), indices) for r in (128, 136))
        parts = [pk.LoRAPart(m["a"], m["b"]) for m in (low, high)]
        add = functools.partial(pk.add_lora_multi, phase=phase)
        return names(lambda y: add(y, low["x"], parts, indices), low["y"])

    _, indices = plain()
    assert add("decode") == {"bgmv_sgmv_add_lora_xla"}
    assert add("prefill") == {"sgmv_add_lora_xla"}


@pytest.mark.parametrize("op", OPS)
def test_environment_switches_to_the_loop_at_each_trace(op, monkeypatch):
    arrays, indices = plain()

    def suffix(implementation):
        (name,) = names(lambda a: run(op, a, indices, implementation), arrays)
        return name.rpartition("_")[2]

    assert suffix(None) == "xla"
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "1")
    assert suffix(None) == "loop"
    assert suffix("xla") == "xla"


def test_the_loop_warns_once_and_blames_the_caller():
    arrays, indices = plain()
    dispatch.warn_loop.cache_clear()
    with pytest.warns(UserWarning, match="one dense product per adapter slot") as caught:
        run("bgmv_shrink", arrays, indices, "loop")
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("decode_add_lora", arrays, indices, "loop")


@pytest.mark.parametrize("op", ["bgmv_shrink", "sgmv_expand_slice", *ADDS[:2]])
def test_host_lists_wide_ids_and_eager_calls_mean_the_same(op):
    arrays, indices = plain()
    want = np.asarray(compiled(op, "xla")(arrays, indices))
    wide = np.where(indices < 0, 2**32 + 1, indices.astype(np.int64))
    for ids in (indices.tolist(), wide, jnp.asarray(indices, jnp.int8)):
        np.testing.assert_array_equal(run(op, arrays, ids, "xla"), want)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_narrow_ids_reach_every_slot_they_can_name(dtype):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 8, 16)).astype(F32)
    x = rng.normal(size=(4, 16)).astype(F32)
    ids = np.array([0, 100, np.iinfo(dtype).max, 7], dtype)
    for form in (ids, jnp.asarray(ids)):
        got = jax.jit(pk.bgmv_shrink)(x, a, form)
        assert_close(got, reference.shrink(x, a, ids), TOLERANCE[F32])


def test_under_x64_ids_beyond_int32_are_no_adapter():
    arrays, indices = plain()
    wide = np.where(indices < 0, 2**32 + 1, indices.astype(np.int64))
    want = {op: np.asarray(compiled(op, "xla")(arrays, indices)) for op in ADDS[:2]}
    with jax.enable_x64():
        for op in want:
            got = jax.jit(lambda a, i, op=op: run(op, a, i, "xla"))(arrays, jnp.asarray(wide))
            np.testing.assert_array_equal(got, want[op])


# ------------------------------------------------------------------------ determinism, invariance


@pytest.mark.parametrize(
    "dtypes", [in_ci((F32, F32, F32)), (BF16, BF16, F32)], ids=["float32", "bf16"]
)
@pytest.mark.parametrize("op", [*SHRINKS, "bgmv_expand_add", "sgmv_expand_add", *ADDS])
def test_a_row_depends_on_no_other_row_bit_for_bit(op, dtypes):
    case = Case(67, 5, 16, 264, 136, *dtypes)
    rng = np.random.default_rng(0)
    arrays, indices = plain(case=case)
    fn = compiled(op, "xla")
    want = np.asarray(fn(arrays, indices))
    np.testing.assert_array_equal(fn(arrays, indices), want)
    for _ in range(4):
        order = rng.permutation(case.tokens)
        rows = {name: arrays[name][order] for name in "yxv"}
        np.testing.assert_array_equal(fn(arrays | rows, indices[order]), want[order])

        keep = rng.random(case.tokens) < 0.3  # the others: other adapters, other data
        other = np.where(keep, indices, rng.integers(-1, case.adapters, case.tokens))
        rows = {
            name: np.where(keep[:, None], rows, poison(rng, rows.shape, rows.dtype))
            for name, rows in ((name, arrays[name]) for name in "yxv")
        }
        got = np.asarray(fn(arrays | rows, other.astype(np.int32)))
        np.testing.assert_array_equal(got[keep], want[keep])

        slots = rng.permutation(case.adapters)  # the same adapters, in other slots
        place = np.append(np.argsort(slots), -1).astype(np.int32)
        stacks = {name: arrays[name][slots] for name in ("a", "b", "scales")}
        if op in SHRINKS:
            stacks["scales"] = arrays["scales"]
        np.testing.assert_array_equal(fn(arrays | stacks, place[indices]), want)


# -------------------------------------------------------------------------------- transformations


def dense(op: str, arrays: dict, indices: np.ndarray) -> jax.Array:
    """The ops as plain jnp: one weight per token, gathered."""
    x, v, a, b, y, scales = (arrays[name] for name in ("x", "v", "a", "b", "y", "scales"))
    width, live = b.shape[1], (indices >= 0)[:, None]
    high = {"precision": "highest"}

    def shrink(scale):
        out = jnp.einsum("th,trh->tr", x, a[indices], **high)
        return jnp.where(live, out * scale, 0)

    def expand(v, y, offset=0, b=b, add=True):
        columns = slice(offset, offset + b.shape[1])
        delta = jnp.einsum("tr,tnr->tn", v, b[indices], **high)
        new = y[:, columns] + delta if add else delta
        return y.at[:, columns].set(jnp.where(live, new, y[:, columns]))

    inner = y[:, OFFSET : OFFSET + width]
    per_row = scales[indices][:, None]
    match op.partition("_")[2]:
        case "shrink":
            return shrink(scales[-1])
        case "expand":
            return expand(v, jnp.zeros_like(inner))
        case "expand_add":
            return expand(v, inner)
        case "expand_slice":
            return expand(v, y, OFFSET)
        case "expand_slice_over":
            return expand(v, y, OFFSET, add=False)
        case "add_lora":
            return expand(shrink(per_row), inner)
        case "add_lora_multi":
            out = expand(shrink(per_row), y, OFFSET)
            return expand(shrink(0.5), out, OFFSET + width // 4, b[:, : width // 2])
    raise AssertionError(op)


def loss(fn):
    """A scalar whose gradient weighs every element of fn's result differently."""

    def scalar(arrays, indices):
        out = fn(arrays, indices).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape) * out)

    return scalar


@pytest.mark.ci
@pytest.mark.parametrize(
    ("op", "implementation", "dtype"),
    [
        # All implementations and kernels share their gradients, so each op is here once or twice.
        ("bgmv_shrink", "xla", F32),
        ("sgmv_shrink", "loop", F32),
        ("sgmv_expand", "xla", F32),
        ("bgmv_expand_add", "xla", F32),
        ("sgmv_expand_slice", "xla", F32),
        ("bgmv_expand_slice", "xla", BF16),
        ("bgmv_expand_slice_over", "xla", F32),
        ("sgmv_expand_slice_over", "loop", F32),
        ("decode_add_lora", "xla", F32),
        ("decode_add_lora", "xla", BF16),
        ("prefill_add_lora", "loop", F32),
        ("prefill_add_lora_multi", "xla", F32),
        ("decode_add_lora_multi", "xla", BF16),
    ],
)
def test_gradients_equal_those_of_the_dense_form(op, implementation, dtype):
    case = PLAIN._replace(x=dtype, weights=dtype, y=dtype)
    arrays = inputs(case, np.array([]), poisoned=False)
    indices = np.where(popularity("uniform", 19, 5) == 2, -1, popularity("uniform", 19, 5))
    got = jax.jit(jax.grad(loss(functools.partial(run, op, implementation=implementation))))(
        arrays, indices
    )
    exact = {name: array.astype(F32) for name, array in arrays.items()}
    want = jax.jit(jax.grad(loss(functools.partial(dense, op))))(exact, indices)
    for name, grad in got.items():
        assert grad.dtype == arrays[name].dtype, name
        error = np.linalg.norm(grad.astype(F32) - want[name])
        assert error <= (1e-5 if dtype == F32 else 1e-2) * np.linalg.norm(want[name]), name
    absent = np.setdiff1d(np.arange(case.adapters), indices)
    assert 2 in absent
    for name in ("a", "b", *(["scales"] if op in ADDS else [])):
        assert not bits_of(got[name][absent]).any(), name


def test_gradients_of_unused_slots_are_zero_though_they_hold_nan():
    indices = np.array([0, -1, 3, 3, -1, 0], np.int32)
    case = PLAIN._replace(tokens=6)
    arrays = inputs(case, indices)
    arrays["y"] = np.zeros_like(arrays["y"])
    for op in ADDS[1:3]:
        got = jax.jit(jax.grad(loss(functools.partial(run, op, implementation="xla"))))(
            arrays, indices
        )
        assert all(np.isfinite(grad).all() for grad in got.values()), op
        for name, unused in {
            "a": [1, 2, 4],
            "b": [1, 2, 4],
            "scales": [1, 2, 4],
            "x": [1, 4],
        }.items():
            assert not bits_of(got[name])[unused].any(), (op, name)


# One token, or the only slot of a few: sums of one tile, without a loop. Last, tiles of two rows.
FEW = [(1, 5), (1, 1), (6, 1), (2, 5)]


@pytest.mark.parametrize("op", ["sgmv_shrink", in_ci("sgmv_expand_slice"), *ADDS[2:3]])
@pytest.mark.parametrize(("tokens", "adapters"), FEW)
@pytest.mark.parametrize("used", [True, False])
def test_gradients_of_few_tokens(op, tokens, adapters, used):
    """Slots without tokens, and tokens without one, hold NaN."""
    indices = np.full(tokens, adapters // 2 if used else -1, np.int32)
    indices[1:2] = -1
    case = PLAIN._replace(tokens=tokens, adapters=adapters)
    clean = inputs(case, indices, poisoned=False)
    arrays = {name: array.copy() for name, array in clean.items()}
    unused = np.setdiff1d(np.arange(adapters), indices)
    for name in "ab":
        arrays[name][unused] = np.nan
    for name in "xv":
        arrays[name][indices < 0] = np.nan
    fn = functools.partial(run, op, implementation="xla")
    got = jax.jit(jax.grad(loss(fn)))(arrays, indices)
    want = jax.jit(jax.grad(loss(functools.partial(dense, op))))(clean, indices)
    for name in got:
        error = np.linalg.norm(got[name] - want[name])
        assert error <= 1e-5 * np.linalg.norm(want[name]), name
    for name in "ab":
        assert not bits_of(got[name][unused]).any(), name


@pytest.mark.parametrize(("tokens", "adapters", "has_loop"), [(1, 5, 0), (6, 1, 0), (2, 5, 1)])
def test_only_several_tiles_are_a_loop(tokens, adapters, has_loop):
    arrays, indices = plain(case=PLAIN._replace(tokens=tokens, adapters=adapters))
    part = pk.LoRAPart(arrays["a"], arrays["b"], arrays["scales"], 0, OFFSET)
    gradients = functools.partial(pk.lora_gradients, implementation="xla")
    text = str(jax.make_jaxpr(gradients)(arrays["y"], arrays["x"], (part,), indices))
    assert ("while[" in text) == has_loop


@pytest.mark.parametrize(("tokens", "adapters"), FEW)
def test_gradients_of_few_tokens_in_transforms(tokens, adapters):
    case = PLAIN._replace(tokens=tokens, adapters=adapters)
    stacks = {name: plain(case=case)[0][name] for name in ("a", "b", "scales")}
    rows = [plain(seed, case)[0] for seed in range(3)]
    rows = {name: np.stack([one[name] for one in rows]) for name in "yxv"}
    indices = np.stack([np.full(tokens, n - 1, np.int32) % (adapters + 1) - 1 for n in range(3)])
    fn = functools.partial(run, "prefill_add_lora", implementation="xla")

    def grad(rows, ids):
        return jax.grad(loss(jax.checkpoint(fn)))(rows | stacks, ids)

    want = [
        jax.jit(grad)({name: array[n] for name, array in rows.items()}, indices[n])
        for n in range(3)
    ]
    mesh = jax.make_mesh((1,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("dp")
    turns = jax.vmap(grad)
    for how in (
        turns,
        lambda *z: jax.lax.scan(lambda _, one: (None, grad(*one)), None, z)[1],
        jax.shard_map(turns, mesh=mesh, in_specs=spec, out_specs=spec),
    ):
        got = jax.jit(how)(rows, indices)
        for n in range(3):
            for name in want[n]:
                np.testing.assert_allclose(got[name][n], want[n][name], rtol=1e-5, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
    "op", ["bgmv_shrink", "sgmv_shrink", "bgmv_expand_slice", "sgmv_expand_slice_over", *ADDS]
)
def test_vmap_over_tokens_and_indices(op):
    many = [plain(seed) for seed in range(3)]
    stacks = {name: many[0][0][name] for name in ("a", "b", "scales")}
    rows = {name: np.stack([arrays[name] for arrays, _ in many]) for name in "yxv"}
    indices = np.stack([np.roll(ids, n) for n, (_, ids) in enumerate(many)])
    fn = functools.partial(run, op, implementation="xla")
    got = jax.jit(jax.vmap(lambda rows, ids: fn(rows | stacks, ids)))(rows, indices)
    for n in range(3):
        one = {name: array[n] for name, array in rows.items()}
        want = compiled(op, "xla")(one | stacks, indices[n])
        np.testing.assert_allclose(got[n], want, rtol=1e-5, atol=1e-5)


def test_vmap_over_adapter_stacks_and_gradients():
    """Ensembles, as in a search over ranks or seeds: stacks are batched, tokens are not."""
    arrays, indices = plain()
    stacks = {name: np.stack([arrays[name], -arrays[name]]) for name in "ab"}
    fn = functools.partial(run, "prefill_add_lora", implementation="xla")
    grad = jax.grad(loss(fn))
    got = jax.jit(jax.vmap(lambda s: grad(arrays | s, indices)))(stacks)
    for n in range(2):
        want = jax.jit(grad)(arrays | {name: s[n] for name, s in stacks.items()}, indices)
        for name in want:
            np.testing.assert_allclose(got[name][n], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loop", ["scan", "fori_loop"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_inside_a_loop_over_layers(phase, loop):
    case = PLAIN._replace(width=40)
    layers = [plain(seed, case)[0] for seed in range(3)]
    _, indices = plain(case=case)
    stacks = {name: np.stack([layer[name] for layer in layers]) for name in "ab"}

    def layer(y, n, segments):
        return pk.add_lora(y, y, stacks["a"][n] * 0.1, stacks["b"][n], segments, phase=phase)

    @jax.jit
    def looped(y, indices):
        segments = pk.make_segments(indices, case.adapters)
        a, b = (jnp.asarray(stacks[name]) for name in "ab")

        def step(y, a, b):
            return pk.add_lora(y, y, a * 0.1, b, segments, phase=phase)

        if loop == "scan":
            return jax.lax.scan(lambda y, ab: (step(y, *ab), None), y, (a, b))[0]
        return jax.lax.fori_loop(0, 3, lambda n, y: step(y, a[n], b[n]), y)

    want = y = layers[0]["x"]
    for n in range(3):
        want = layer(want, n, indices)
    np.testing.assert_allclose(looped(y, indices), want, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------- add_lora_multi


# Slots of a model's four ranges, and the parts: (range, rank, width, offset).
SLOTS = (2, 4, 1, 3)
PLACES = [(0, 8, 32, 0), (1, 16, 32, 0), (2, 144, 32, 0), (1, 16, 24, 32), (3, 64, 50, 40)]


@pytest.mark.ci
@pytest.mark.parametrize("together", [False, True], ids=["own scales", "in one array"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_of_every_rank_width_and_place(implementation, phase, dtype, together):
    """Rank buckets and slices together: parts differ in rank, width, slots and tokens."""
    rng = np.random.default_rng(0)
    tokens, features = 23, 48
    x = rng.normal(size=(tokens, features)).astype(dtype)
    y = poison(rng, (tokens, 100), dtype)
    y[:, :90] = rng.normal(size=(tokens, 90)).astype(dtype)
    ids = rng.integers(-1, sum(SLOTS) + 2, tokens)
    parts, want = [], y.astype(np.float64)
    delta, touched = np.zeros(y.shape), np.zeros(y.shape, bool)
    for which, rank, width, offset in PLACES:
        slots, first = SLOTS[which], sum(SLOTS[:which])
        a = rng.normal(size=(slots, rank, features)).astype(dtype)
        b = rng.normal(size=(slots, width, rank)).astype(dtype)
        scales = rng.normal(size=slots).astype(F32)
        parts.append(pk.LoRAPart(a, b, scales, first, offset))
        own = np.where((ids >= first) & (ids < first + slots), ids - first, -1)
        v = rounded(reference.shrink(x, a, own, scales), dtype)
        want = reference.expand(v, b, own, want, offset)
        delta = reference.expand(v, b, own, delta, offset)
        touched[own >= 0, offset : offset + width] = True
    if together:
        starts = itertools.accumulate((len(part.scales) for part in parts), initial=0)
        scales = np.concatenate([part.scales for part in parts])
        parts = [
            dataclasses.replace(part, scales=scales, scales_offset=start)
            for part, start in zip(parts, starts)
        ]
    segments = pk.make_segments(ids, sum(SLOTS))
    how = {"phase": phase, "implementation": implementation}
    for indices in (ids, segments):
        out = np.asarray(jax.jit(lambda *z: pk.add_lora_multi(*z, **how))(y, x, parts, indices))
        np.testing.assert_array_equal(bits_of(out)[~touched], bits_of(y)[~touched])
        assert_close(np.where(touched, out, 0), np.where(touched, want, 0), TOLERANCE[dtype])
        made = jax.jit(lambda *z: pk.lora_delta(*z, 100, **how))(x, parts, indices)
        assert made.dtype == dtype
        assert (bits_of(made)[~touched] == bits_of(np.array(-0.0, dtype))).all()
        assert_close(made, delta, TOLERANCE[dtype])


def test_overlapping_parts_are_rounded_once():
    """1 + 2^-9 + 2^-9 in bfloat16: two roundings lose both halves, one keeps their sum."""
    y = jnp.ones((1, 8), BF16)
    x = jnp.ones((1, 8), BF16)
    a = jnp.zeros((1, 8, 8), BF16).at[:, 0, 0].set(1)
    b = jnp.zeros((1, 8, 8), BF16).at[:, :, 0].set(2**-8)
    part = pk.LoRAPart(a, b)
    for phase, implementation in itertools.product(["decode", "prefill"], IMPLEMENTATIONS):
        how = {"phase": phase, "implementation": implementation}
        assert (pk.add_lora_multi(y, x, [part, part], [0], **how) == 1 + 2**-7).all()


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_delta_has_the_gradients_of_the_sum(implementation, phase):
    """Several ys, and parts that overlap; rows without adapter keep y."""
    arrays, indices = plain()
    widths = (20, arrays["y"].shape[1] - 20)

    def parts_of(arrays):
        a, b, scales = (arrays[name] for name in ("a", "b", "scales"))
        return [pk.LoRAPart(a, b, scales, y_offset=OFFSET), pk.LoRAPart(a, b)]

    how = {"phase": phase, "implementation": implementation}

    def added(arrays, indices):
        ys = tuple(jnp.split(arrays["y"], [20], axis=1))
        return pk.add_lora_multi(ys, arrays["x"], parts_of(arrays), indices, **how)

    def by_delta(arrays, indices):
        ys = tuple(jnp.split(arrays["y"], [20], axis=1))
        deltas = pk.lora_delta(arrays["x"], parts_of(arrays), indices, widths, **how)
        return tuple(y + delta for y, delta in zip(ys, deltas))

    def total(fn):
        return lambda *args: jnp.concatenate(fn(*args), axis=1)

    got, want = (jax.jit(total(fn))(arrays, indices) for fn in (by_delta, added))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    unused = indices < 0
    np.testing.assert_array_equal(bits_of(got)[unused], bits_of(arrays["y"])[unused])
    gots, wants = (jax.jit(jax.grad(loss(total(fn))))(arrays, indices) for fn in (by_delta, added))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gots, wants)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_delta_works_inside_of_shard_map(phase):
    """With its default check of which values vary over the mesh."""
    arrays, indices = plain()
    mesh = jax.make_mesh((1,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, width = jax.sharding.PartitionSpec("dp"), arrays["b"].shape[1]

    def delta(x, indices):
        part = pk.LoRAPart(arrays["a"], arrays["b"], arrays["scales"])
        return pk.lora_delta(x, [part], indices, width, phase=phase)

    mapped = jax.shard_map(delta, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    got, want = (jax.jit(f)(arrays["x"], indices) for f in (mapped, delta))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", ["lora_delta", "add_lora"])
@pytest.mark.parametrize("dtype", [F32, in_ci(BF16)])
def test_gradients_inside_of_shard_map_are_sums_over_the_mesh(dtype, op):
    """Four devices have the stacks, and each its tokens: as one device. In bfloat16 kernels are
    traced too."""
    arrays, indices = plain(case=PLAIN._replace(tokens=20, features=64, width=64))
    arrays["y"] = arrays["y"][:, :64]
    y, x, a, b = (jnp.asarray(arrays[name]).astype(dtype) for name in ("y", "x", "a", "b"))
    mesh = jax.make_mesh((4,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("dp"), jax.sharding.PartitionSpec()

    def run(y, x, a, b, indices):
        if op == "add_lora":
            return pk.add_lora(y, x, a, b, indices)
        return y + pk.lora_delta(x, [pk.LoRAPart(a, b)], indices, b.shape[1])

    specs = (rows, rows, whole, whole, rows)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows)
    gots, wants = (
        jax.jit(jax.grad(lambda *z, f=f: jnp.sum(f(*z, indices).astype(F32) ** 2), (0, 1, 2, 3)))(
            y, x, a, b
        )
        for f in (mapped, run)
    )
    for got, want in zip(gots, wants):
        got, want = (np.asarray(t.astype(F32)) for t in (got, want))
        rtol = TOLERANCE[dtype]
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_gradients_reach_scales_that_lie_together(implementation, phase):
    arrays, indices = plain()
    stacks, scales = (arrays["a"], arrays["b"]), arrays["scales"]
    both = np.concatenate([[np.nan], scales, [np.nan], 2 * scales]).astype(F32)
    starts = 1, 2 + len(scales)

    def add(parts):
        how = {"phase": phase, "implementation": implementation}
        out = pk.add_lora_multi(arrays["y"], arrays["x"], parts, indices, **how)
        return jnp.sum(jnp.sin(out.astype(F32)))

    def together(both):
        return add([pk.LoRAPart(*stacks, both, 0, OFFSET, start) for start in starts])

    def apart(both):
        return add([pk.LoRAPart(*stacks, both[s : s + len(scales)], 0, OFFSET) for s in starts])

    got, want = (jax.jit(jax.value_and_grad(f))(both) for f in (together, apart))
    assert np.isfinite(want[0]) and np.any(want[1])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_parts_leave_y():
    arrays, _ = plain()
    out = pk.add_lora_multi(arrays["y"], arrays["x"], [], np.zeros(len(arrays["x"]), int))
    np.testing.assert_array_equal(out, arrays["y"])


# ----------------------------------------------------------------------------------------- errors

X, A, B, Y = (np.ones(s, F32) for s in ((4, 8), (3, 16, 8), (3, 6, 16), (4, 6)))
V, WIDE, IDS = np.ones((4, 16), F32), np.ones((4, 10), F32), np.zeros(4, np.int32)
SEGMENTS = functools.cache(lambda: pk.make_segments(IDS, 3))


def add(y=Y, x=X, a=A, b=B, ids=IDS, **options):
    return pk.add_lora(y, x, a, b, ids, **options)


def multi(y=WIDE, x=X, a=A, b=B, ids=IDS, scales=None, first=0, y_offset=0, at=None, **options):
    part = pk.LoRAPart(a, b, scales, first, y_offset, at)
    return pk.add_lora_multi(y, x, [part], ids, **options)


def delta(x=X, parts=(), ids=IDS, widths=6, **options):
    return pk.lora_delta(x, parts, ids, widths, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # implementation, config, phase
        (lambda: add(implementation="triton"), ValueError, "xla, mosaic_gpu, loop, got 'triton'"),
        (lambda: pk.bgmv_shrink(X, A, IDS, implementation=1), ValueError, "loop, got 1"),
        (lambda: add(implementation="xla", config=3), ValueError, "config .* got 3"),
        (lambda: add(implementation="loop", config=3), ValueError, "config .* got 3"),
        (lambda: add(phase="train"), ValueError, "'decode' or 'prefill', got 'train'"),
        # types
        (lambda: pk.bgmv_shrink(X.astype(int), A, IDS), TypeError, "x must be .* got int64"),
        (lambda: pk.bgmv_shrink(X, A.astype(float), IDS), TypeError, "lora_a .* got float64"),
        (lambda: add(a=A[:, None].astype(float)), TypeError, "lora_a must be .* got float64"),
        (lambda: add(b=B.astype(np.complex64)), TypeError, "lora_b must be .* got complex64"),
        (lambda: add(y=Y.astype(bool)), TypeError, "y must be .* got bool"),
        (lambda: pk.bgmv_shrink(X.tolist(), A, IDS), TypeError, "x must be an array, got list"),
        (lambda: pk.bgmv_shrink(X, None, IDS), TypeError, "lora_a must be an array, got NoneType"),
        (lambda: add(ids=IDS.astype(F32)), TypeError, "indices must be integers, got float32"),
        (lambda: add(scales="1"), TypeError, "1"),
        (lambda: add(scales=True), TypeError, "scales must be real numbers, got bool"),
        (lambda: pk.sgmv_shrink(X, A, IDS), TypeError, "sgmv takes Segments.* got ndarray"),
        (lambda: pk.sgmv_expand(V, B, IDS), TypeError, "sgmv takes Segments.* got ndarray"),
        (lambda: pk.add_lora_multi(Y, X, [(A, B)], IDS), TypeError, r"parts\[0\] .* got tuple"),
        (lambda: pk.add_lora_multi(Y, X, pk.LoRAPart(A, B), IDS), TypeError, "not iterable"),
        (lambda: pk.add_lora_multi(Y, X, [pk.LoRAPart(A, B)]), TypeError, "argument: 'indices'"),
        (lambda: multi(scales=SEGMENTS()), TypeError, "real numbers, got Segments; a part has no"),
        (lambda: multi(first=1.0), TypeError, "first_slot must be a static int, got 1.0"),
        (lambda: multi(ids=pk.LoRAPart(A, B)), TypeError, "got a LoRAPart"),
        (lambda: delta(widths=6.0), TypeError, "widths must be a static int, got 6.0"),
        (lambda: delta(dtype=int), TypeError, "dtype must be float32, .* got int"),
        # names that are gone
        (lambda: multi(fuse=True), TypeError, "no fuse= any more: lora_delta"),
        (lambda: multi(exclusive=True), TypeError, "no exclusive= any more: a token has one id"),
        (lambda: pk.LoRAPart(A, B, indices=IDS), TypeError, "no indices= any more: a call takes"),
        (lambda: pk.StackView, AttributeError, "StackView is gone: a part takes a stack as an arr"),
        (lambda: pk.nothing, AttributeError, "'pallas_kernels' has no attribute 'nothing'"),
        (lambda: multi(y_offset=1.0), TypeError, "y_offset must be a static int, got 1.0"),
        (lambda: jax.jit(lambda n: multi(y_offset=n))(0), TypeError, "y_offset must be a static"),
        (lambda: multi(scales=np.ones(4, F32), at=0.5), TypeError, "static int, got 0.5"),
        (lambda: multi(scales=np.ones(4, int) > 0, at=1), TypeError, "real numbers, got bool"),
        # shapes
        (lambda: pk.bgmv_shrink(X[0], A, IDS), ValueError, r"x must have shape .* got \[8\]"),
        (lambda: pk.bgmv_shrink(X, A[0], IDS), ValueError, r"\[L, R, H\], got \[16, 8\]"),
        (lambda: pk.bgmv_shrink(X, A[None], IDS), ValueError, r"got \[1, 3, 16, 8\]"),
        (lambda: pk.bgmv_shrink(X, A[:0], IDS), ValueError, r"empty axis, got \[0, 16, 8\]"),
        (lambda: pk.bgmv_shrink(X[:, :5], A, IDS), ValueError, "features H: 5 and 8"),
        (lambda: pk.bgmv_shrink(X, A, IDS[:3]), ValueError, "tokens: 3 and 4"),
        (lambda: pk.bgmv_shrink(X, A, IDS[None]), ValueError, r"\[T\], got \[1, 4\]"),
        (lambda: pk.bgmv_shrink(X, A, IDS, scale=[1.0, 2.0, 3.0]), ValueError, r"\[\], got \[3\]"),
        (lambda: pk.bgmv_expand(V[:, :9], B, IDS), ValueError, "rank R: 9 and 16"),
        (lambda: pk.bgmv_expand(V, B, IDS, Y[:3]), ValueError, "tokens T: 4 and 3"),
        (lambda: pk.bgmv_expand(V, B, IDS, WIDE), ValueError, "features N: 10 and 6"),
        (lambda: pk.bgmv_expand_slice(V, B, IDS, WIDE, 0, 5), ValueError, "features N: 5 and 6"),
        (lambda: pk.bgmv_expand_slice(V, B, IDS, WIDE, 5, 6), ValueError, r"\[5, 11\) .*\[4, 10\]"),
        (lambda: pk.sgmv_expand_slice(V, B, SEGMENTS(), WIDE, -1, 6), ValueError, r"\[-1, 5\)"),
        (lambda: pk.sgmv_shrink(X[:2], A, SEGMENTS()), ValueError, "tokens: 4 and 2"),
        (lambda: pk.sgmv_shrink(X, A[:2], SEGMENTS()), ValueError, "adapters: 3 and 2"),
        (lambda: add(y=WIDE), ValueError, "features N: 10 and 6"),
        (lambda: add(y=Y[:3]), ValueError, "tokens T: 4 and 3"),
        (lambda: add(b=B[:2]), ValueError, "adapters L: 3 and 2"),
        (lambda: add(b=B[:, :, :8]), ValueError, "rank R: 16 and 8"),
        (lambda: add(scales=np.ones(2, F32)), ValueError, r"\[\] or \[3\], got \[2\]"),
        (lambda: multi(scales=np.ones(4, F32), at=2), ValueError, r"scales \[2, 5\) .* \[4\]"),
        (lambda: multi(scales=np.ones(4, F32), at=-1), ValueError, r"scales \[-1, 2\) .* \[4\]"),
        (lambda: multi(scales=2.0, at=0), ValueError, r"scales \[0, 3\) .* shape \[\]"),
        (lambda: multi(at=0), ValueError, r"scales \[0, 3\) .* shape \[\]"),
        (lambda: multi(y_offset=5), ValueError, r"columns \[5, 11\) leave y of shape \[4, 10\]"),
        (lambda: add(ids=SEGMENTS(), a=A[:2], b=B[:2]), ValueError, "adapters: 3 and 2"),
        (lambda: multi(ids=SEGMENTS(), first=1), ValueError, "3 slots, .* up to 4; .*adapters=4"),
        (lambda: multi(first=-1), ValueError, "first_slot must be between 0 and .* got -1"),
        (lambda: delta(widths=0), ValueError, "widths must be at least 1, got 0"),
        (lambda: delta(widths=()), ValueError, r"at least one number of columns, got \(\)"),
        (lambda: delta(parts=[pk.LoRAPart(A, B)], widths=5), ValueError, r"\[0, 6\) .* \[4, 5\]"),
        (
            lambda: delta(parts=[pk.LoRAPart(A, B), pk.LoRAPart(A, B, first_slot=2)]),
            ValueError,
            r"parts\[0\] has \[0, 3\), parts\[1\] has \[2, 5\)",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_values(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_parts_may_come_one_by_one():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 8), (1, 4, 8), (1, 8, 4)))
    y, ids = jnp.zeros((6, 8)), np.arange(6) % 4
    parts = [pk.LoRAPart(a * n, b, first_slot=n) for n in range(4)]
    want = pk.add_lora_multi(y, x, parts, ids)
    np.testing.assert_array_equal(pk.add_lora_multi(y, x, iter(parts), ids), want)


def test_a_part_is_a_pytree_of_its_arrays():
    part = pk.LoRAPart(A, B, 2.0, first_slot=3, y_offset=4)
    leaves, treedef = jax.tree.flatten(part)
    assert len(leaves) == 3 and jax.tree.unflatten(treedef, leaves) == part

    def call(part):
        return pk.add_lora_multi(jnp.zeros((4, 10)), X, [part], IDS + 3)

    np.testing.assert_array_equal(jax.jit(call)(part), call(part))
