"""The backward kernels on a Hopper GPU: every case against float64.

PYTHONPATH=. python3 -m pytest tests/gpu/test_backward_device.py -m gpu -o addopts= -n 8
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_cases import (
    ORDERS,
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
from mosaic_cases import bits, relative_error

import pallas_kernels as pk
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import backend

pytestmark = pytest.mark.gpu

# One program for each shape, as compiling is what these tests wait for.
_COMPILED: dict[int, Any] = {}


def run(z: GradientArrays, slots: int) -> dict[str, np.ndarray]:
    """The gradients, in memory that held NaN."""
    jax.block_until_ready([jnp.full(2**k, jnp.nan) for k in (8, 12, 16, 20, 22, 24)])
    call = Call("add_lora", "mosaic_gpu", ("sgmv",) * len(z.parts))
    if call not in _COMPILED:
        _COMPILED[call] = jax.jit(lambda *a: backend.add_lora_grad(call, *a))
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    dx, dparts, _ = _COMPILED[call](dy, x, parts, pk.make_segments(z.ids, slots))
    return by_name(dx, dparts)


def errors(case: GradientCase, z: GradientArrays, got: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is wrong, by gradient: an error that is too large, or where zeros are not zero."""
    wrong: dict[str, Any] = {}
    for name, want in in_float64(z).items():
        error = relative_error(got[name], want)
        if not error < tolerance(name, case.dtype):
            wrong[name] = error, _where(got[name], want)
        elif got[name][want == 0].any():
            wrong[name] = "values where zeros belong"
    return wrong


def _where(got: np.ndarray, want: np.ndarray) -> str:
    """Which of its elements are wrong, as a range for each axis."""
    got = got.astype(np.float64)
    bad = ~(np.abs(got - want) < 0.1 * (np.abs(want) + np.std(want)))
    spans = [f"{np.min(axis)}..{np.max(axis)}" for axis in np.nonzero(bad)] if bad.any() else []
    return f"{bad.sum()} of {bad.size} wrong, {np.isnan(got).sum()} NaN, at [{', '.join(spans)}]"


ONE = [
    GradientCase(64, 4096, (4096,), ((16, 8),)),
    GradientCase(1, 256, (256,), ((16, 2),), "identical"),
    GradientCase(128, 64, (64,), ((64, 1),), "identical"),
    GradientCase(128, 64, (64,), ((64, 2),), "shuffled"),
    *(GradientCase(300, 512, (576,), ((r, 4),), "zipf") for r in (8, 16, 32, 48, 64, 80, 128, 512)),
    *(GradientCase(333, 320, (256,), ((16, 5),), order) for order in ORDERS),
    GradientCase(200, 72, (80,), ((8, 3),), "gaps"),
    GradientCase(257, 1096, (4104,), ((32, 3),), "shuffled", "float16"),
    GradientCase(4096, 1024, (1024,), ((16, 64),), "shuffled"),
    GradientCase(1024, 1024, (2048,), ((128, 64),)),
    GradientCase(8192, 4096, (4096,), ((16, 8),), "zipf"),
    GradientCase(65536, 256, (256,), ((16, 8),), "runs"),
    # By lanes.
    GradientCase(64, 8192, (8192,), ((8, 64),), "distinct"),
    GradientCase(512, 4096, (4104,), ((8, 64),), "zipf"),
    GradientCase(60, 14336, (20000,), ((16, 32),), "gaps"),
    GradientCase(100, 4096, (4096, 1096), ((8, 48), (8, 32)), "shuffled", "float16"),
]
SEVERAL = [
    GradientCase(300, 512, (512, 128, 128), ((16, 4),), "zipf"),
    GradientCase(700, 512, (512,), ((8, 2), (16, 4), (64, 3)), "shuffled"),
    GradientCase(500, 256, (264, 72), ((8, 2), (128, 2)), "gaps"),
]


@pytest.mark.parametrize("case", ONE + SEVERAL, ids=str)
def test_every_gradient_against_float64(case: GradientCase) -> None:
    z = case.arrays()
    got = run(z, case.slots)
    wrong = errors(case, z, got)
    assert not wrong, wrong
    again = run(z, case.slots)
    assert not [name for name in got if (bits(got[name]) != bits(again[name])).any()]


@pytest.mark.parametrize("op", ["shrink", "expand", "expand="])
def test_halves_against_float64(op: str) -> None:
    check_half(op, GradientCase(200, 520, (264,), ((16, 3),), "gaps").arrays())


def test_stacks_of_several_layers_are_read_in_their_place() -> None:
    z = GradientCase(300, 512, (256,), ((16, 3),), "zipf").arrays()
    got, want = run(in_layers(z), 3), run(z, 3)
    for name in want:
        np.testing.assert_array_equal(bits(got[name]), bits(want[name]))


def test_compact_gradients_hold_the_slots_in_use() -> None:
    check_compact("mosaic_gpu")


@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_an_adapter_meets_no_other_tokens(order: str) -> None:
    case = GradientCase(500, 512, (512,), ((16, 4),), order)
    z = case.arrays()
    clean, dirty = run(z, 4), run(with_nan(z, 1), 4)
    for name in ("dA0", "dB0"):
        np.testing.assert_array_equal(dirty[name][[0, 2, 3]], clean[name][[0, 2, 3]])
    np.testing.assert_array_equal(dirty["dx"][z.ids != 1], clean["dx"][z.ids != 1])


def test_the_bits_of_an_adapter_do_not_depend_on_its_neighbours() -> None:
    """Its tokens among others, in another order of adapters, have the same gradient."""
    case = GradientCase(600, 512, (512,), ((16, 4),), "runs")
    z = case.arrays()
    mine = np.flatnonzero(z.ids == 2)
    moved = np.full_like(z.ids, 3)
    places = np.sort(np.random.default_rng(0).permutation(600)[: len(mine)])
    moved[places] = 2
    other = GradientArrays(z.x[::-1].copy(), z.dy[::-1].copy(), z.parts, moved)
    other.x[places], other.dy[places] = z.x[mine], z.dy[mine]
    one, two = run(z, 4), run(other, 4)
    for name in ("dA0", "dB0"):
        np.testing.assert_array_equal(bits(one[name][2]), bits(two[name][2]))
    np.testing.assert_array_equal(bits(one["dx"][mine]), bits(two["dx"][places]))


@pytest.mark.parametrize("num_tokens", [40, 500])
def test_the_public_gradient_runs_the_kernels(num_tokens: int) -> None:
    """Under jit, checkpoint and scan: of two layers in turn, against XLA's form."""
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 16, 256), (2, 3, 256, 16)]
    a, b = (jnp.asarray(rng.normal(size=s) * s[-1] ** -0.5, "bfloat16") for s in shapes)
    x = jnp.asarray(rng.normal(size=(num_tokens, 256)), "bfloat16")
    segments = pk.make_segments(jnp.arange(num_tokens) % 4 - 1, 3)

    def loss(implementation: str, x: Any, a: Any, b: Any) -> Any:
        @jax.checkpoint
        def layer(y: Any, weights: Any) -> Any:
            return pk.add_lora(y, y, *weights, segments, implementation=implementation), None

        out, _ = jax.lax.scan(layer, x, (a, b))
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def gradient(implementation: str) -> Any:
        return jax.jit(jax.grad(lambda *z: loss(implementation, *z), (0, 1, 2)))(x, a, b)

    for got, want in zip(gradient("mosaic_gpu"), gradient("xla")):
        assert relative_error(got, np.asarray(want).astype(np.float64)) < 1e-2
