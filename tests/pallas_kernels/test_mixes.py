"""Several adapters per token, each with a weight, by the implementations that run anywhere."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import in_ci

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.ops import add_in_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA runs as one dense product"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # numpy, of NaN weights
]

ci = pytest.mark.ci
WAYS = [("xla", "decode"), ("xla", "prefill"), ("loop", None)]
RANKS, SLOTS, FEATURES, WIDTHS = (8, 16), 3, 24, (16, 24)


class Mixed(NamedTuple):
    """A batch whose model has two rank buckets and two projections."""

    ys: tuple[np.ndarray, ...]
    x: np.ndarray
    parts: tuple[pk.LoRAPart, ...]
    ids: np.ndarray
    weights: np.ndarray

    def wanted(self) -> np.ndarray:
        """The ys side by side, in float64."""
        out = np.concatenate(self.ys, axis=1).astype(np.float64)
        for part in self.parts:
            a, b, scales = (np.asarray(t) for t in (part.lora_a, part.lora_b, part.scales))
            local = self.ids - part.first_slot
            local = np.where((local >= 0) & (local < len(a)), local, -1)
            columns = slice(part.y_offset, part.y_offset + b.shape[1])
            out[:, columns] = reference.mix(
                out[:, columns], self.x, a, b, local, self.weights, scales
            )
        return out


def mixed(ids: np.ndarray, seed: int = 0) -> Mixed:
    """The weights of entries without adapter are NaN, and stacks that no token uses hold NaN."""
    rng = np.random.default_rng(seed)
    tokens = len(ids)
    parts, first = [], 0
    for rank in RANKS:
        offset = 0
        for width in WIDTHS:
            a = rng.normal(size=(SLOTS, rank, FEATURES)).astype(np.float32)
            b = rng.normal(size=(SLOTS, width, rank)).astype(np.float32)
            a[~np.isin(first + np.arange(SLOTS), ids)] = np.nan
            scales = rng.uniform(0.5, 2, SLOTS).astype(np.float32)
            parts.append(pk.LoRAPart(a, b, scales, first, offset))
            offset += width
        first += SLOTS
    is_slot = (ids >= 0) & (ids < first)
    weights = np.where(is_slot, rng.normal(size=ids.shape), np.nan).astype(np.float32)
    x = rng.normal(size=(tokens, FEATURES)).astype(np.float32)
    ys = tuple(rng.normal(size=(tokens, n)).astype(np.float32) for n in WIDTHS)
    return Mixed(ys, x, tuple(parts), ids, weights)


def some_ids(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    """Ids of both buckets, of none, and outside of all slots."""
    slots = len(RANKS) * SLOTS
    return np.random.default_rng(seed).integers(-2, slots + 2, (tokens, columns)).astype(np.int32)


def add(z: Mixed, implementation: Any, phase: Any, *, sorted_once: bool = False) -> np.ndarray:
    weights = jnp.asarray(z.weights)
    call = functools.partial(
        pk.add_lora_multi, z.ys, z.x, z.parts, phase=phase, implementation=implementation
    )
    if sorted_once:
        mix = pk.make_mix(z.ids, weights, len(RANKS) * SLOTS)
        out = call(mix.split([(0, SLOTS), (SLOTS, SLOTS)]))
    else:
        out = call(z.ids, weights=weights)
    return np.concatenate([np.asarray(y) for y in out], axis=1)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("sorted_once", [False, True])
@pytest.mark.parametrize("columns", [in_ci(1), 2, in_ci(4)])
def test_against_float64(columns: int, sorted_once: bool, way: tuple[Any, Any]) -> None:
    z = mixed(some_ids(37, columns))
    out = add(z, *way, sorted_once=sorted_once)
    np.testing.assert_allclose(out, z.wanted(), rtol=2e-5, atol=2e-4)
    is_base = ~((z.ids >= 0) & (z.ids < 6)).any(axis=1)
    assert is_base.any() or columns > 1
    np.testing.assert_array_equal(out[is_base], np.concatenate(z.ys, axis=1)[is_base])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_mix_is_what_the_oracle_says(data: st.DataObject) -> None:
    one = st.integers(-1, len(RANKS) * SLOTS)  # the last one is no slot
    ids = data.draw(st.lists(one, min_size=10, max_size=10))
    ids = np.array(ids, np.int32).reshape(5, 2)
    z = mixed(ids, data.draw(st.integers(0, 99)))
    for way in WAYS:
        np.testing.assert_allclose(add(z, *way), z.wanted(), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_weights_of_an_adapter_that_a_token_has_twice_add_up(way: tuple[Any, Any]) -> None:
    twice = mixed(np.array([[4, 4], [1, 1]], np.int32))
    weights = np.array([[0.75, -0.25], [2, 1]], np.float32)
    once = np.array([[0.5, np.nan], [3, np.nan]], np.float32)
    ids = np.array([[4, -1], [1, -1]], np.int32)
    got = add(twice._replace(weights=weights), *way)
    want = add(twice._replace(ids=ids, weights=once), *way)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_half_precision_is_rounded_once() -> None:
    """The shares of a token's adapters cancel but for a sum that bfloat16 would lose in between."""
    x = np.ones((1, 8), jnp.bfloat16)
    a = np.zeros((2, 8, 8), jnp.bfloat16)
    a[:, 0, 0] = 1
    b = np.zeros((2, 16, 8), jnp.bfloat16)
    b[0, :, 0], b[1, :, 0] = 1, 1.0078125
    ids, weights = np.array([[0, 1]]), np.array([[-256.0, 256.0]])
    y = np.full((1, 16), 1.0, jnp.bfloat16)
    for implementation, phase in WAYS:
        out = pk.add_lora(
            y, x, a, b, ids, weights=weights, phase=phase, implementation=implementation
        )
        np.testing.assert_array_equal(np.asarray(out, np.float32), 3.0)


@pytest.mark.ci
@pytest.mark.parametrize(
    "way", [pytest.param(WAYS[0], marks=ci), pytest.param(WAYS[1], marks=ci), WAYS[2]], ids=str
)
def test_gradients_are_those_of_the_oracle(way: tuple[Any, Any]) -> None:
    """Those of y, x, stacks, scales and weights; zero for slots and entries that are not used."""
    z = mixed(some_ids(19, 3))
    used = (z.ids >= 0) & (z.ids < 6)
    z = jax.tree.map(lambda t: jnp.nan_to_num(jnp.asarray(t), nan=0.5), z)
    implementation, phase = way

    def direct(ys: Any, x: Any, parts: Any, weights: Any) -> Any:
        y = jnp.concatenate(ys, axis=1)
        for part in parts:
            local = z.ids - part.first_slot
            mine = (local >= 0) & (local < SLOTS)
            a, b, s = (
                t[jnp.where(mine, local, 0)] for t in (part.lora_a, part.lora_b, part.scales)
            )
            w = jnp.where(mine, weights, 0.0)
            delta = jnp.einsum("tk,tk,tknr,tkrh,th->tn", w, s, b, a, x, precision="highest")
            y = y.at[:, part.y_offset : part.y_offset + b.shape[2]].add(delta)
        return jnp.sum(jnp.sin(y / 40))

    def ours(ys: Any, x: Any, parts: Any, weights: Any) -> Any:
        how = {"phase": phase, "implementation": implementation}
        out = pk.add_lora_multi(ys, x, parts, z.ids, weights=weights, **how)
        delta = pk.lora_delta(x, parts, z.ids, WIDTHS, weights=weights, **how)
        same = [y + d - new for y, d, new in zip(ys, delta, out)]  # zero, but has gradients
        return jnp.sum(jnp.sin(jnp.concatenate(out, axis=1) / 40)) + sum(map(jnp.sum, same))

    arguments = z.ys, z.x, z.parts, z.weights
    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*arguments)
    want = jax.grad(direct, argnums=(0, 1, 2, 3))(*arguments)
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=2e-4)
    assert not np.asarray(got[3])[~used].any()
    assert np.asarray(got[3])[used].all()


def test_no_mix_and_no_weight_recompiles() -> None:
    z = mixed(some_ids(8, 2))

    @jax.jit
    def step(mix: Any) -> Any:
        return pk.lora_delta(z.x, z.parts, mix, WIDTHS)

    for seed in range(3):
        ids = some_ids(8, 2, seed)
        step(pk.make_mix(ids, jnp.full(ids.shape, seed - 1.5), 6))
    assert step._cache_size() == 1


def test_in_a_step_of_a_layer() -> None:
    z = mixed(some_ids(11, 2))
    mix = pk.make_mix(z.ids, jnp.asarray(z.weights), 6)
    ys = tuple(map(jnp.asarray, z.ys))
    out = jax.jit(lambda ys, mix: add_in_step(ys, z.x, z.parts, mix, phase="decode"))(ys, mix)
    got = np.concatenate([np.asarray(y) for y in out], axis=1)
    np.testing.assert_allclose(got, z.wanted(), rtol=2e-5, atol=2e-4)


IDS, WEIGHTS = np.zeros((2, 2), np.int32), np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("ids", "weights", "error", "text"),
    [
        (IDS, None, ValueError, "indices must have shape [T], got [2, 2]; several adapters per "),
        (IDS, WEIGHTS[:, :1], ValueError, "weights must have the shape of indices, [2, 2], got "),
        (IDS[0], WEIGHTS, ValueError, "with weights, indices must have shape [T, K] with K >= 1"),
        (IDS[:, :0], WEIGHTS[:, :0], ValueError, "with K >= 1, got [2, 0]"),
        (IDS, WEIGHTS * [[1, 1], [1, np.nan]], ValueError, "row 1, column 1 is nan"),
        (IDS, WEIGHTS * [[1, 1e300], [1, 1]], ValueError, "row 0, column 1 is 1e+300"),
        (IDS, WEIGHTS > 0, TypeError, "weights must be real numbers, got bool"),
        (IDS * 0.5, WEIGHTS, TypeError, "indices must be integers, got float64"),
        (IDS[:1], WEIGHTS[:1], ValueError, "mix and tensor differ in tokens: 1 and 2"),
        (pk.make_segments(IDS[0], 3), WEIGHTS, TypeError, "not with Segments; make_mix("),
        (pk.make_mix(IDS, WEIGHTS, 3), WEIGHTS, TypeError, "not with Mix; make_mix("),
        (pk.make_mix(IDS, WEIGHTS, 2), None, ValueError, "differ in adapters: 2 and 3"),
    ],
)
def test_errors(ids: Any, weights: Any, error: type[Exception], text: str) -> None:
    a, b = np.ones((3, 8, 8), np.float32), np.ones((3, 8, 8), np.float32)
    x = np.ones((2, 8), np.float32)
    with pytest.raises(error, match=re.escape(text)):
        pk.add_lora(x, x, a, b, ids, weights=weights)


def test_what_takes_one_adapter_per_token_says_so() -> None:
    x, a = np.ones((2, 8), np.float32), np.ones((3, 8, 8), np.float32)
    mix: Any = pk.make_mix(IDS, WEIGHTS, 3)
    with pytest.raises(TypeError, match="one half of a LoRA takes one adapter per token"):
        pk.bgmv_shrink(x, a, mix)
    with pytest.raises(TypeError, match="lora_gradients takes one adapter per token"):
        pk.lora_gradients(x, x, [pk.LoRAPart(a, a)], mix)
    with pytest.raises(ValueError, match="segments describe 2 slots, but the parts have"):
        pk.lora_delta(x, [pk.LoRAPart(a, a)], pk.make_mix(IDS, WEIGHTS, 2), 8)
