"""Parts whose stacks stand among those of several layers: they are read in their place."""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array
from marks import in_ci

import pallas_kernels as pk
from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.stacks import LayerStacks

LAYERS, H, SLOTS, WIDTHS = 3, 64, {8: 2, 16: 3}, (64, 72)
IDS = np.array([0, 4, 2, -1, 2, 1, 9], np.int32)  # 9 is no slot
CONFIGS = {
    "xla": ("xla", None),
    "loop": ("loop", None),
    "decode": ("mosaic_gpu", Config(split=2, warps=4, stages=2, expand_stages=2)),
    "prefill": ("mosaic_gpu", Config(split=2)),
}


def whole_parts(dtype: str) -> list[LayerStacks]:
    """A and B by rank and slice, of all layers, with scales of all parts together."""
    rng = np.random.default_rng(0)
    total = sum(SLOTS.values()) * len(WIDTHS)
    scales = jnp.asarray(rng.normal(size=(LAYERS, total)), jnp.float32)

    def stack(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=(LAYERS, *shape)) / 8, dtype)

    return [
        LayerStacks(stack(n, rank, H), stack(n, width, rank), scales, jnp.int32(0))
        for rank, n in SLOTS.items()
        for width in WIDTHS
    ]


def parts_of(whole: list[LayerStacks], layer: Array, *, in_place: bool) -> list[pk.LoRAPart]:
    parts, first_slot, scales_offset = [], 0, 0
    for i, stacks in enumerate(whole):
        y_offset = sum(WIDTHS[: i % len(WIDTHS)])
        mine = dataclasses.replace(stacks, layer=layer)
        a, b, scales = mine.own()
        layers = mine if in_place else None
        slots = a.shape[0]
        parts.append(pk.LoRAPart(a, b, scales, first_slot, y_offset, scales_offset, layers))
        scales_offset += slots
        first_slot += slots * (i % len(WIDTHS) == len(WIDTHS) - 1)
    return parts


def operands(dtype: str, tokens: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(1)
    ids = jnp.asarray(np.resize(IDS, tokens))
    x, y = (jnp.asarray(rng.normal(size=(tokens, n)), dtype) for n in (H, sum(WIDTHS)))
    return y, x, ids


@pytest.mark.parametrize(
    ("name", "num_tokens", "delta"),
    [
        *itertools.product(["xla"], [7, 300], [False]),
        *itertools.product(["loop", "decode"], [7], [False]),
        *itertools.starmap(in_ci, itertools.product(["xla", "loop", "decode"], [7], [True])),
        in_ci("xla", 300, True),
        in_ci("prefill", 7, False),
        pytest.param("prefill", 7, True, marks=pytest.mark.slow),
        pytest.param("prefill", 70, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")
def test_stacks_in_their_place_compute_the_bits_of_slices(
    name: str, num_tokens: int, delta: bool
) -> None:
    implementation, config = CONFIGS[name]
    dtype = "bfloat16" if implementation == "mosaic_gpu" else "float32"
    whole, (y, x, ids) = whole_parts(dtype), operands(dtype, num_tokens)
    segments = pk.make_segments(ids, 5).split([(0, 2), (2, 3)])

    @functools.partial(jax.jit, static_argnames="in_place")
    def run(layer: Array, *, in_place: bool) -> Array:
        parts = parts_of(whole, layer, in_place=in_place)
        how = {"implementation": implementation, "config": config}
        if delta:
            return pk.lora_delta(x, parts, segments, sum(WIDTHS), **how)
        return pk.add_lora_multi(y, x, parts, segments, **how)

    outs = []
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for layer in jnp.array([2, 1], jnp.int32):
            want, out = (np.asarray(run(layer, in_place=where)) for where in (False, True))
            np.testing.assert_array_equal(out, want)
            outs.append(out)
    assert np.abs(outs[0] - outs[1]).max() > 0.1


# With None the module holds both the kernels' gradients and XLA's, as the device decides.
@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        ("float32", "xla"),
        pytest.param("bfloat16", "xla", marks=pytest.mark.slow),
        in_ci("bfloat16", None),
    ],
)
@pytest.mark.parametrize("tokens", [7, in_ci(300)], ids=["bgmv", "sgmv"])
def test_gradients_are_those_of_the_slices(
    tokens: int, dtype: str, implementation: Literal["xla"] | None
) -> None:
    whole, (y, x, ids) = whole_parts(dtype), operands(dtype, tokens)
    layer = jnp.int32(1)

    def loss(x: Array, parts: list[pk.LoRAPart]) -> Array:
        out = pk.add_lora_multi(y, x, parts, ids, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    sliced, in_place = (parts_of(whole, layer, in_place=where) for where in (False, True))
    want, (dx, dparts) = (
        jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, parts) for parts in (sliced, in_place)
    )
    np.testing.assert_allclose(dx, want[0], atol=1e-5)
    assert np.abs(np.asarray(dx, np.float32)).max() > 0.1
    for mine, theirs in zip(dparts, want[1]):
        for name in ("lora_a", "lora_b", "scales"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-4)
        assert np.abs(mine.lora_a).max() > 0 == np.abs(mine.layers.lora_a).max()


def test_parts_of_different_layers_in_one_call() -> None:
    """A launch is of one layer; then all parts are read as slices."""
    whole, (y, x, ids) = whole_parts("float32"), operands("float32", 7)
    parts = parts_of(whole, jnp.int32(1), in_place=True)
    parts[1] = parts_of(whole, jnp.int32(2), in_place=True)[1]
    plain = [dataclasses.replace(part, layers=None) for part in parts]
    out, want = (pk.add_lora_multi(y, x, some, ids) for some in (parts, plain))
    np.testing.assert_array_equal(out, want)


def test_parts_of_differently_many_layers_in_one_call() -> None:
    """The kernel finds its operands by how many layers there are: slices again."""
    (first, *rest), (y, x, ids) = whole_parts("bfloat16"), operands("bfloat16", 7)
    fields = ("lora_a", "lora_b", "scales")
    one_layer = dataclasses.replace(first, **{name: getattr(first, name)[:1] for name in fields})
    parts = parts_of([one_layer, *rest], jnp.int32(0), in_place=True)
    plain = [dataclasses.replace(part, layers=None) for part in parts]
    implementation, config = CONFIGS["decode"]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out, want = (
            pk.add_lora_multi(y, x, some, ids, implementation=implementation, config=config)
            for some in (parts, plain)
        )
        np.testing.assert_array_equal(out, want)


REFUSED = {
    "shape": ({"lora_b": jnp.zeros((3, 2, 64, 16))}, r"layers\.lora_b must have shape \['layers'"),
    "dtype": ({"lora_a": jnp.zeros((3, 2, 8, 64), jnp.bfloat16)}, "float32, got .* bfloat16"),
    "layer": ({"layer": jnp.zeros(2, jnp.int32)}, r"layer must be one int32, got int32 \[2\]"),
    "float": ({"layer": jnp.float32(1)}, "layer must be one int32, got float32"),
    "layers": ({"lora_b": jnp.zeros((2, 2, 64, 8))}, "lora_a and lora_b differ in layers: 3 and 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    y, x, ids = operands("float32", 7)
    [part, *_] = parts_of(whole_parts("float32"), jnp.int32(0), in_place=True)
    part = dataclasses.replace(part, layers=dataclasses.replace(part.layers, **changes))
    with pytest.raises(ValueError, match=message):
        pk.add_lora_multi(y, x, [part], ids)


def test_layers_need_a_scales_offset() -> None:
    y, x, ids = operands("float32", 7)
    [part, *_] = parts_of(whole_parts("float32"), jnp.int32(0), in_place=True)
    part = dataclasses.replace(part, scales=None, scales_offset=None)
    with pytest.raises(ValueError, match="has layers, so it needs a scales_offset"):
        pk.add_lora_multi(y, x, [part], ids)
