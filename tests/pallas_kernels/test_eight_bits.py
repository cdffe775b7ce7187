"""Stacks in 8 bits, a scale for each rank column: against float64, and what is refused."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.eight_bits import Quantised
from pallas_kernels.stacks import LayerStacks

pytestmark = pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")

SLOTS, RANK, FEATURES, WIDTH, TOKENS = 5, 8, 32, 24, 40
WAYS = [("xla", "decode"), ("xla", "prefill"), ("loop", None), (None, None)]
IDS = np.resize(np.array([0, 4, -1, 2, 2, 9, 4], np.int32), TOKENS)


EIGHT_BITS = pytest.mark.parametrize("eight", ["int8", "float8_e4m3fn"])


@functools.cache
def adapters(eight: str, slots: int = SLOTS) -> Quantised:
    rng = np.random.default_rng(slots)
    a = rng.normal(size=(slots, RANK, FEATURES)).astype(np.float32) * 0.1
    b = rng.normal(size=(slots, WIDTH, RANK)).astype(np.float32) * 0.02
    a *= rng.uniform(0.01, 100, (slots, RANK, 1)).astype(np.float32)
    return pk.quantised(a, b, rng.uniform(0.5, 2, slots), eight)


def rows(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, FEATURES)).astype(dtype)
    return x, rng.normal(size=(TOKENS, WIDTH)).astype(dtype)


def wanted(y: np.ndarray, x: np.ndarray, ids: np.ndarray, held: Quantised) -> np.ndarray:
    ones = np.ones((len(ids), 1))
    return reference.mix(y, x, held.lora_a, held.lora_b, ids[:, None], ones, held.scales)


@pytest.mark.parametrize(
    ("eight", "largest", "bound"), [("float8_e4m3fn", 448, 0.05), ("int8", 127, 0.012)]
)
def test_quantised_is_near_what_it_holds(eight: str, largest: int, bound: float) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 4, 64)) * 1e-3, rng.normal(size=(2, 48, 4))
    a[0, 1] = 0
    held = pk.quantised(a, b, np.array([0.5, 2.0]), dtype=eight)
    assert held.lora_a.dtype == held.lora_b.dtype == eight
    whole = held.lora_b.astype(np.float64) @ (held.scales[..., None] * held.lora_a.astype(float))
    want = np.array([0.5, 2.0])[:, None, None] * (b @ a)
    assert np.linalg.norm(whole - want) / np.linalg.norm(want) < bound
    assert np.abs(held.lora_a.astype(np.float32)).max(axis=2).tolist() == [
        [largest, 0, largest, largest], [largest] * 4
    ]  # fmt: skip


def test_elements_go_to_the_nearest_and_ties_to_even() -> None:
    row = np.float32([127, 0.5, 1.5, -2.5, 2.51, -126.5, 1e-3])
    held = pk.quantised(row[None], np.ones((1, 1)), dtype="int8")
    assert held.lora_a.tolist() == [[127, 0, 2, -2, 3, -126, 0]]
    assert held.lora_b.tolist() == [[127]] and held.scales == np.float32(1 / 127)
    row = np.float32([448, 17, 19, -21, 2**-10, 3 * 2**-10])
    held = pk.quantised(row[None], np.ones((1, 1)))
    assert held.lora_a.astype(np.float32).tolist() == [[448, 16, 20, -20, 0, 2**-8]]


@EIGHT_BITS
def test_subnormal_weights_stay_in_range(eight: str) -> None:
    least = np.finfo(np.float32).smallest_subnormal
    for most in (1, 190, 600):
        a = np.float32([[most, -most, 1]]) * least
        held = pk.quantised(a, np.ones((1, 1)), dtype=eight).lora_a.astype(np.float64)
        assert np.isfinite(held).all() and held[0, 0] == -held[0, 1]


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="in 8 bits are int8 or float8_e4m3fn, not uint8"):
        pk.quantised(np.ones((1, 2)), np.ones((2, 1)), dtype="uint8")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("way", WAYS, ids=str)
@EIGHT_BITS
def test_against_float64(way: tuple[Any, Any], dtype: Any, eight: str) -> None:
    (x, y), held, (implementation, phase) = rows(dtype), adapters(eight), way
    how: Any = {"implementation": implementation, "phase": phase}
    out = pk.add_lora(y, x, held.lora_a, held.lora_b, IDS, scales=held.scales, **how)
    want, tolerance = wanted(y, x, IDS, held), 1e-5 if dtype == np.float32 else 1e-2
    assert out.dtype == dtype
    assert np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want) < tolerance
    unchanged = ~((IDS >= 0) & (IDS < SLOTS))
    np.testing.assert_array_equal(np.asarray(out)[unchanged], y[unchanged])


@pytest.mark.parametrize("way", WAYS, ids=str)
@EIGHT_BITS
def test_scales_of_several_parts_in_one_array(way: tuple[Any, Any], eight: str) -> None:
    (x, y), (implementation, phase) = rows(), way
    one, two = adapters(eight, 2), adapters(eight, 3)
    unused = np.full(4, np.nan, np.float32)
    scales = np.concatenate([unused, one.scales.ravel(), two.scales.ravel()])
    first = pk.LoRAPart(one.lora_a, one.lora_b, scales, 1, 0, scales_offset=4)
    second = pk.LoRAPart(two.lora_a, two.lora_b, scales, 3, 0, scales_offset=4 + 2 * RANK)
    how: Any = {"implementation": implementation, "phase": phase}
    out = jax.jit(functools.partial(pk.add_lora_multi, **how))(y, x, [first, second], IDS)
    want = wanted(wanted(y, x, IDS - 1, one), x, IDS - 3, two)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("way", WAYS, ids=str)
@EIGHT_BITS
def test_mixes_and_experts_that_share_a(way: tuple[Any, Any], eight: str) -> None:
    (x, y), (implementation, phase) = rows(), way
    own, shared = adapters(eight, 6), adapters(eight, 3)
    a, scales = shared.lora_a, own.scales
    rng = np.random.default_rng(2)
    ids = rng.integers(-1, 6, (TOKENS, 2)).astype(np.int32)
    weights = rng.normal(size=(TOKENS, 2)).astype(np.float32)
    how: Any = {"implementation": implementation, "phase": phase, "weights": weights}
    out = pk.add_lora(y, x, a, own.lora_b, ids, scales=scales, **how)
    want = reference.mix(y, x, a, own.lora_b, ids, weights, scales)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("way", WAYS, ids=str)
@EIGHT_BITS
def test_layers_in_place(way: tuple[Any, Any], eight: str) -> None:
    (x, y), (implementation, phase) = rows(), way
    all_layers = adapters(eight, 2 * SLOTS)
    a, b, scales = (t.reshape(2, SLOTS, *t.shape[1:]) for t in all_layers)
    layers = LayerStacks(a, b, scales.reshape(2, -1), jnp.int32(1))
    part = pk.LoRAPart(a[1], b[1], scales[1].reshape(-1), scales_offset=0, layers=layers)
    how: Any = {"implementation": implementation, "phase": phase}
    out = pk.add_lora_multi(y, x, [part], IDS, **how)
    want = wanted(y, x, IDS, Quantised(a[1], b[1], scales[1]))
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-4)


@EIGHT_BITS
def test_there_are_no_gradients(eight: str) -> None:
    (x, y), held = rows(), adapters(eight)
    part = pk.LoRAPart(*held)

    def loss(x: Any) -> Any:
        return pk.add_lora_multi(y, x, [part], IDS).sum()

    def delta(x: Any) -> Any:
        return pk.lora_delta(x, [part], IDS, WIDTH).sum()

    assert np.isfinite(loss(x)) and np.isfinite(delta(x))
    for call in (jax.grad(loss), jax.grad(delta)):
        with pytest.raises(NotImplementedError, match="train in stacks of bfloat16"):
            call(jnp.asarray(x))
    with pytest.raises(NotImplementedError, match=r"lora_gradients has no gradients .* parts\[0\]"):
        pk.lora_gradients(y, x, [part], IDS)


@EIGHT_BITS
def test_what_is_refused(eight: str) -> None:
    (x, y), held = rows(), adapters(eight)
    part = pk.LoRAPart(*held)
    changed = functools.partial(dataclasses.replace, part)
    half = held.lora_b.astype(ml_dtypes.bfloat16)
    flat = np.ones(2 + SLOTS * RANK, np.float32)
    bad: list[tuple[Any, str]] = [
        (changed(lora_b=half), f"lora_a of {eight} and lora_b of bfloat16"),
        (changed(scales=None), r"must have shape \[5, 8\], one for each rank column"),
        (changed(scales=np.ones(SLOTS)), r"must have shape \[5, 8\]"),
        (changed(scales=flat, scales_offset=2), "must be multiples of 4, .* got 2 and 42"),
        (changed(scales=flat, scales_offset=4), r"scales \[4, 44\) by its scales_offset"),
    ]
    for one, match in bad:
        with pytest.raises(ValueError, match=match):
            pk.add_lora_multi(y, x, [one], IDS)
    turned = part.with_layout(transposed=True)
    with pytest.raises(ValueError, match="transposed=True; stacks in 8 bits are both so"):
        pk.add_lora_multi(y, x, [turned], IDS)
    with pytest.raises(TypeError, match=f"float32, bfloat16 or float16, got {eight}"):
        pk.bgmv_shrink(x, held.lora_a, IDS)
