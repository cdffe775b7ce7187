"""LoRA of experts: an adapter for each pair of a slot and an expert; experts that share A or B."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")

SLOTS, EXPERTS, RANK, FEATURES, WIDTH, TOKENS, TOP = 3, 4, 8, 24, 16, 19, 2
PAIRS = SLOTS * EXPERTS
WAYS = [("xla", "decode"), ("xla", "prefill"), ("loop", None)]
SHARED = {"own": (PAIRS, PAIRS), "one A": (SLOTS, PAIRS), "one B": (PAIRS, SLOTS)}


def stacks(shared: str, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    of_a, of_b = SHARED[shared]
    a = rng.normal(size=(of_a, RANK, FEATURES)).astype(dtype)
    b = rng.normal(size=(of_b, WIDTH, RANK)).astype(dtype)
    return a, b, rng.uniform(0.5, 2, PAIRS).astype(np.float32)


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x `[T * K, H]`, ids `[T * K]` and y of the tokens' pairs with experts."""
    rng = np.random.default_rng(0)
    slots = rng.integers(-1, SLOTS, TOKENS).astype(np.int32)
    experts = rng.integers(0, EXPERTS, (TOKENS, TOP)).astype(np.int32)
    ids = pk.expert_indices(jnp.asarray(slots), jnp.asarray(experts), EXPERTS)
    x = rng.normal(size=(TOKENS * TOP, FEATURES)).astype(np.float32)
    y = rng.normal(size=(TOKENS * TOP, WIDTH)).astype(np.float32)
    return x, np.asarray(ids).reshape(-1), y


def wanted(shared: str) -> np.ndarray:
    (x, ids, y), (a, b, scales) = pairs(), stacks(shared)
    return reference.mix(y, x, a, b, ids[:, None], np.ones((len(ids), 1)), scales)


def test_the_id_of_a_pair_counts_through_slots_and_experts() -> None:
    slots, experts = jnp.array([2, -1, 0], jnp.int32), jnp.array([[3, 0], [1, 2], [4, -1]])
    ids = pk.expert_indices(slots, experts.astype(jnp.int32), 4)
    np.testing.assert_array_equal(ids, [[11, 8], [-1, -1], [-1, -1]])


@pytest.mark.parametrize("num_experts", [1, 3, 64, 128])
def test_a_slot_beyond_all_ids_has_no_pairs(num_experts: int) -> None:
    last = (2**31 - num_experts) // num_experts  # whose last id is the last int32, or below
    slots = np.array([last, last + 1, 2**31 // num_experts + 1, 2**31 - 1]).clip(max=2**31 - 1)
    experts = jnp.full((4, 1), num_experts - 1, jnp.int32)
    ids = pk.expert_indices(jnp.asarray(slots, jnp.int32), experts, num_experts)
    wide = np.where(slots > last, -1, slots * num_experts + num_experts - 1)
    np.testing.assert_array_equal(ids[:, 0], wide)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shared", SHARED)
def test_against_float64(shared: str, way: tuple[Any, Any]) -> None:
    implementation, phase = way
    (x, ids, y), (a, b, scales) = pairs(), stacks(shared)
    how: Any = {"implementation": implementation, "phase": phase}
    out = pk.add_lora(y, x, a, b, ids, scales=scales, **how)
    np.testing.assert_allclose(out, wanted(shared), rtol=2e-5, atol=2e-4)
    # The same as views [slots, experts, ...], in which an axis of one is what experts share.
    a4, b4 = (t.reshape(SLOTS, -1, *t.shape[1:]) for t in (a, b))
    viewed = pk.add_lora(y, x, a4, b4, ids, scales=scales, **how)
    np.testing.assert_array_equal(viewed, out)
    delta = pk.lora_delta(x, [pk.LoRAPart(a, b, scales)], ids, WIDTH, **how)
    np.testing.assert_allclose(y + delta, wanted(shared), rtol=2e-5, atol=2e-4)


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("shared", ["one A", "one B"])
def test_stacks_of_several_layers_and_other_layouts(shared: str, phase: str) -> None:
    (x, ids, y), (a, b, scales) = pairs(), stacks(shared)
    add = functools.partial(pk.add_lora_multi, y, x, phase=phase, implementation="xla")
    whole = [jnp.stack([jnp.full_like(t, jnp.nan), t]) for t in (a, b, scales)]
    layers = pk.LayerStacks(*whole, jnp.int32(1))
    part = pk.LoRAPart(a, b, scales, scales_offset=0, layers=layers)
    np.testing.assert_allclose(add([part], ids), wanted(shared), rtol=2e-5, atol=2e-4)
    turned = pk.LoRAPart(a.swapaxes(1, 2), b.swapaxes(1, 2), scales, transposed=True)
    np.testing.assert_allclose(add([turned], ids), wanted(shared), rtol=2e-5, atol=2e-4)


@pytest.mark.ci
@pytest.mark.parametrize("shared", SHARED)
def test_gradients_are_sums_over_those_that_share(shared: str) -> None:
    (x, ids, y), (a, b, scales) = pairs(), stacks(shared)
    dy = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)

    def total(x: jax.Array, part: pk.LoRAPart) -> jax.Array:
        return jnp.sum(pk.add_lora_multi(y, x, [part], ids) * dy)

    part = pk.LoRAPart(*map(jnp.asarray, (a, b, scales)))
    dx, found = jax.grad(total, argnums=(0, 1))(jnp.asarray(x), part)
    apart = [jnp.repeat(t, PAIRS // len(t), axis=0) for t in (a, b)]
    dx_apart, each = jax.grad(total, argnums=(0, 1))(
        jnp.asarray(x), dataclasses.replace(part, lora_a=apart[0], lora_b=apart[1])
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(dx, dx_apart)
    close(found.scales, each.scales)
    for got, own, stack in ((found.lora_a, each.lora_a, a), (found.lora_b, each.lora_b, b)):
        close(got, np.asarray(own).reshape(len(stack), -1, *stack.shape[1:]).sum(1))


def test_what_can_not_be() -> None:
    (x, ids, y), (a, b, scales) = pairs(), stacks("own")
    with pytest.raises(ValueError, match="differ in adapters L: 12 and 5; only experts share"):
        pk.add_lora(y, x, a, b[:5], ids)
    shared = [pk.LoRAPart(a[:SLOTS], b, scales)]
    with pytest.raises(ValueError, match=r"compact must be None .*, got 2"):
        pk.lora_gradients(y, x, shared, ids, compact=2)
