"""Parts whose stacks are laid out as Flax lays kernels out: `[L, H, R]` and `[L, R, N]`."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

H, R, N, OFFSET, WIDTH = 64, 16, 72, 8, 96
IDS = np.array([0, 5, -1, 3, 3, 1, 0, 2, 9], np.int32)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=s) / 8 for s in ((len(IDS), H), (4, R, H), (4, N, R)))
    return [jnp.asarray(t, dtype) for t in (x, a, b, rng.uniform(0.5, 2, 4))]


def parts_of(a, b, scales, transposed):
    """Two ranges of slots, the second one with a part of another layout."""
    if transposed:
        a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    part = pk.LoRAPart(a, b, scales, y_offset=OFFSET, transposed=transposed)
    return part, dataclasses.replace(part, first_slot=4).with_layout(transposed=False)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:LoRA runs as one dense product")
@pytest.mark.parametrize(
    "implementation, phase",
    [
        ("xla", "prefill"),
        ("xla", "decode"),
        ("loop", "decode"),
    ],
)
def test_values_and_gradients_are_those_of_the_other_layout(implementation, phase):
    x, *stacks = arrays()

    def value(transposed, x, *stacks):
        parts = parts_of(*stacks, transposed)
        how = {"implementation": implementation, "phase": phase}
        y = pk.add_lora_multi(jnp.ones((len(x), WIDTH)), x, parts, IDS, **how)
        delta = pk.lora_delta(x, parts, IDS, WIDTH, **how)
        return jnp.sum(jnp.square(y)), (y, delta)

    both = jax.value_and_grad(value, argnums=(1, 2, 3, 4), has_aux=True)
    got, want = (both(transposed, x, *stacks) for transposed in (True, False))
    assert float(got[0][0]) > len(x) * WIDTH
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_xla_turns_no_stack(phase):
    """Neither in the forward nor in the gradients, whose layout is that of the stacks."""
    x, a, b, scales = arrays()
    a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)

    def loss(a, b):
        part = pk.LoRAPart(a, b, scales, transposed=True)
        out = pk.lora_delta(x, [part], IDS, N, phase=phase, implementation="xla")
        return jnp.sum(jnp.square(out))

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b).compile().as_text()
    assert re.search(rf"f32\[4,{H},{R}\]", text)
    stacks = rf"f32\[4,(?:{H},{R}|{R},{H}|{R},{N}|{N},{R})\]"
    assert not re.findall(rf"= {stacks}\S* (?:copy|transpose)\(.*", text)


@pytest.mark.ci
@pytest.mark.parametrize("tokens", [8, 2048])
def test_kernels_lower_for_a_gpu(tokens):
    """They read a copy in their own layout, and their gradients come back in the stacks'."""
    shapes = ((tokens, H), (4, H, R), (4, R, H))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(x, a, b):
        part = pk.LoRAPart(a, b, transposed=True)
        ids = jnp.zeros(len(x), jnp.int32)
        out = pk.lora_delta(x, [part], ids, H, implementation="mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    lowered = grad.trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert [t.shape for t in lowered.out_info[1]] == [*shapes]


def test_shapes_that_do_not_fit():
    x, a, b, scales = arrays()
    call = [jnp.ones((len(x), N)), x]
    with pytest.raises(ValueError, match=r"parts\[0\].lora_a differ in features H: 64 and 16"):
        pk.add_lora_multi(*call, [pk.LoRAPart(a, b, scales, transposed=True)], IDS)
    turned = a.swapaxes(1, 2)
    with pytest.raises(ValueError, match="lora_a and lora_b differ in rank R: 16 and 72"):
        pk.add_lora_multi(*call, [pk.LoRAPart(turned, b, scales, transposed=True)], IDS)
    several = pk.LayerStacks(turned[None], b.swapaxes(1, 2)[None], scales[None], jnp.int32(0))
    part = pk.LoRAPart(turned, b.swapaxes(1, 2), scales, 0, 0, 0, several, transposed=True)
    with pytest.raises(ValueError, match=r"parts\[0\] is transposed, so it can't have layers"):
        pk.add_lora_multi(*call, [part], IDS)
