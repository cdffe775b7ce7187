"""Experts that share A or B by the Mosaic kernels: emulated, interpreted, and lowered for CUDA."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_cases import bits, relative_error, y_tolerance
from sharing_cases import SharingCase, check_sharing, check_sharing_gradients, repeated, wanted

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.mosaic_gpu import Config

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:LoRA runs as one dense product"),
]

DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
ci = functools.partial(pytest.param, marks=pytest.mark.ci)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def how_of(implementation: str, phase: str, request: pytest.FixtureRequest) -> Any:
    """The arguments of a call, in the interpreter of the kernel that the phase stands for."""
    config = None
    if implementation == "mosaic_gpu":
        request.getfixturevalue("emulated" if phase == "decode" else "interpreted")
        config = DECODE if phase == "decode" else None
    return {"implementation": implementation, "phase": phase, "config": config}


@pytest.mark.parametrize(
    ("shared", "phase"),
    [
        ("A", "decode"), ("B", "decode"), ("A, B", "decode"), ci("A", "prefill"), ("B", "prefill"),
        slow("A, B", "prefill"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("implementation", ["mosaic_gpu", ci("xla"), ci("loop")])
def test_against_float64(
    implementation: Any, shared: str, phase: str, request: pytest.FixtureRequest
) -> None:
    case = SharingCase(13, 128, 64, 16, shared)
    check_sharing(case, sorted_once=False, **how_of(implementation, phase, request))


@pytest.mark.parametrize(
    ("case", "phase", "change"),
    [
        ci(SharingCase(21, 256, 72, 8, "A"), "decode", {"split": 4}),
        ci(SharingCase(10, 128, 200, 64, "A, none"), "decode", {"column_clusters": 2}),
        ci(SharingCase(9, 64, 64, 128, "A, B", dtype="float16"), "decode", {}),
        slow(SharingCase(70, 128, 64, 8, "A", slots=2, experts=3), "prefill", {}),
        slow(SharingCase(70, 64, 72, 16, "B", dtype="float16"), "prefill", {}),
        slow(SharingCase(9, 64, 64, 144, "A, none"), "prefill", {}),
        slow(SharingCase(70, 64, 64, 16, "A"), "prefill", {"row_tiles": 2}),
    ],
    ids=str,
)
def test_sizes(
    case: SharingCase, phase: str, change: dict[str, int], request: pytest.FixtureRequest
) -> None:
    how = how_of("mosaic_gpu", phase, request)
    if change:
        how["config"] = dataclasses.replace(how["config"] or Config(), **change)
    for delta in (False, True):
        check_sharing(case, sorted_once=True, delta=delta, **how)


@pytest.mark.parametrize("phase", ["decode", ci("prefill")])
@pytest.mark.parametrize("shared", ["A", ci("B")])
def test_stacks_of_several_layers_and_other_layouts(
    shared: str, phase: str, request: pytest.FixtureRequest
) -> None:
    case = SharingCase(7, 64, 64, 16, shared)
    (x, y), ids, [part] = case.rows(), case.ids(), case.parts()
    how = how_of("mosaic_gpu", phase, request)
    arrays = part.lora_a, part.lora_b, part.scales
    whole = [jnp.stack([jnp.full_like(t, jnp.nan), t]) for t in map(jnp.asarray, arrays)]
    layers = pk.LayerStacks(*whole, jnp.int32(1))
    placed = dataclasses.replace(part, scales_offset=0, layers=layers)
    for given in (placed, part.with_layout(transposed=True)):
        new = np.asarray(pk.add_lora_multi(jnp.asarray(y), x, [given], ids, **how))
        assert relative_error(new, wanted(case)) < y_tolerance("bfloat16")


@pytest.mark.parametrize("phase", ["decode", ci("prefill")])
@pytest.mark.parametrize("shared", ["A", ci("B")])
def test_in_8_bits(shared: str, phase: str, request: pytest.FixtureRequest) -> None:
    """Each adapter has scales of its own, also where it shares A."""
    slots, experts, rank = 2, 3, 16
    rng, every = np.random.default_rng(0), slots * experts
    of_a, of_b = (slots if half == shared else every for half in "AB")
    a, b = (
        pk.quantised(rng.normal(size=(n, rank, 128)), rng.normal(size=(n, 64, rank)))
        for n in (of_a, of_b)
    )
    scales = rng.uniform(0.5, 2, (every, rank)).astype(np.float32) / 4096
    part = pk.LoRAPart(a.lora_a, b.lora_b, scales)
    ids = rng.integers(-1, every, (9, 2)).astype(np.int32)
    weights = rng.normal(size=(9, 2)).astype(np.float32)
    x, y = (rng.normal(size=(9, n)).astype(jnp.bfloat16) for n in (128, 64))
    how = how_of("mosaic_gpu", phase, request)

    def run(part: pk.LoRAPart) -> np.ndarray:
        new = pk.add_lora_multi(jnp.asarray(y), x, [part], ids, weights=weights, **how)
        return np.asarray(new)

    new = run(part)
    want = reference.mix(y, x, a.lora_a, b.lora_b, ids, weights, scales)
    assert relative_error(new, want) < 2 * y_tolerance("bfloat16")  # rounded for each of two
    np.testing.assert_array_equal(bits(new), bits(run(*repeated([part]))))


@pytest.mark.parametrize(
    "case",
    [
        ci(SharingCase(13, 64, 64, 16, "A, B")),
        slow(SharingCase(13, 128, 72, 8, "A, none", dtype="float16")),
        ci(SharingCase(100, 64, 64, 80, "A", slots=2, experts=3)),
        ci(SharingCase(9, 64, 72, 16, "B", slots=3, experts=1)),
    ],
    ids=str,
)
def test_gradients_against_float64(case: SharingCase, interpreted: None) -> None:
    check_sharing_gradients(case)


@pytest.mark.ci
@pytest.mark.parametrize("shared", ["A", "B"])
def test_gradients_of_several_layers(shared: str, interpreted: None) -> None:
    check_sharing_gradients(SharingCase(9, 64, 64, 16, shared), of_layers=True)


@pytest.mark.ci
@pytest.mark.parametrize("shared", ["A, B", "A, none"])
def test_gradients_by_lanes(shared: str, by_lanes_always: list[str]) -> None:
    """Squares sum the gradients of A and B where slots share one; lanes sum all else. With so few
    tokens both round to the same."""
    check_sharing_gradients(SharingCase(9, 64, 72, 8, shared, slots=2, experts=3))
    assert by_lanes_always == ["narrow", "wide", "narrow", "wide", "outer"]


def names_in(shared: str, tokens: int, rank: int, implementation: Any = "mosaic_gpu") -> set[str]:
    """The kernels of a call and of its gradients, lowered for CUDA."""
    of, slots, every = jax.ShapeDtypeStruct, 8, 8 * 16
    of_a, of_b = (slots if half == shared else every for half in "AB")

    def run(y: Any, x: Any, a: Any, b: Any, ids: Any) -> Any:
        add = functools.partial(pk.add_lora, indices=ids, implementation=implementation)
        new, pull = jax.vjp(add, y, x, a, b)
        return pull(new)

    traced = jax.jit(run).trace(
        of((tokens, 512), jnp.bfloat16),
        of((tokens, 1024), jnp.bfloat16),
        of((of_a, rank, 1024), jnp.bfloat16),
        of((of_b, 512, rank), jnp.bfloat16),
        of((tokens,), jnp.int32),
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "dot_general" not in text
    return {*re.findall(r"lora(?:_[a-z]+)?_r\d+", text)}


@pytest.mark.parametrize("shared", ["A", ci("B")])
@pytest.mark.parametrize("rank", [16, ci(8), ci(32), ci(64), ci(128), ci(272), ci(512)])
def test_every_rank_lowers(rank: int, shared: str) -> None:
    one, two = {f"lora_r{rank}"}, {f"lora_shrink_r{rank}", f"lora_expand_r{rank}"}
    backward = {f"lora_{kind}_r{rank}" for kind in ("narrow", "wide", "outer")}
    assert names_in(shared, 64, rank) == (one if rank <= 464 else two) | backward
    assert names_in(shared, 4096, rank) == two | backward


@pytest.mark.parametrize("shared", ["A", "B"])
def test_kernels_are_taken_where_nothing_is_named(shared: str) -> None:
    assert names_in(shared, 64, 16, None) == names_in(shared, 64, 16)
