"""SkyRL-tx's `apply_lora` as one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from meshes import assert_equal, mesh_of

from jax_lora.integrations.skyrl import apply_lora

B, S, L, H, R, N = 4, 3, 3, 16, 8, 24
IDS = jnp.asarray([2, -1, 0, 2])


class Layer(nnx.Module):
    """As SkyRL-tx's, with the metadata of a stack of layers."""

    def __init__(self, sharding=None, dtype=jnp.float32):
        rng = np.random.default_rng(0)
        a, b = (jnp.asarray(rng.normal(size=s) / 8, dtype) for s in ((L, H, R), (L, R, N)))
        self.lora_A, self.lora_B = nnx.Param(a), nnx.Param(b)
        if sharding is not None:
            inputs, outputs = sharding
            self.lora_A.set_metadata(out_sharding=(None, None, inputs, None))
            self.lora_B.set_metadata(out_sharding=(None, None, None, outputs))
        self.lora_scaling = nnx.Variable(jnp.asarray([0.5, 1, 2], dtype))


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def expected(layer, x, y):
    a, b, scales = (np.asarray(v[...]) for v in (layer.lora_A, layer.lora_B, layer.lora_scaling))
    rows = [scales[i] * xs @ a[i] @ b[i] if i >= 0 else 0 for xs, i in zip(np.asarray(x), IDS)]
    return np.asarray(y) + np.stack(np.broadcast_arrays(*rows))


@nnx.jit
def value_and_gradients(layer, x, y, ids):
    def loss(layer, x):
        out = apply_lora(layer, x, y, ids)
        return jnp.sum(jnp.square(out)), out

    return nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x)


@pytest.mark.parametrize("lead", [(B,), (B, S)])
def test_rows_of_several_adapters(lead):
    layer, x, y = Layer(), draw(*lead, H), draw(*lead, N)
    assert_equal(apply_lora(layer, x, y, IDS), expected(layer, x, y))
    assert apply_lora(layer, x, y, None) is y


def test_scales_in_half_precision():
    layer, x, y = (
        Layer(dtype=jnp.bfloat16), draw(B, H, dtype=jnp.bfloat16), draw(B, N, dtype=jnp.bfloat16)
    )  # fmt: skip
    out = apply_lora(layer, x, y, IDS)
    assert out.dtype == jnp.bfloat16
    want = expected(*jax.tree.map(lambda t: t.astype(jnp.float32), (layer, x, y)))
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.02, atol=0.02)


@pytest.mark.ci
@pytest.mark.parametrize("rows", [B, 3])
@pytest.mark.parametrize("sharding", [("fsdp", "tp"), ("tp", "fsdp"), (None, "tp")])
def test_meshes_compute_what_one_device_does(sharding, rows):
    """Three rows do not divide over `fsdp`."""
    layer, x, y = Layer(sharding), draw(B, S, H)[:rows], draw(B, S, N)[:rows]
    want = value_and_gradients(Layer(), x, y, IDS[:rows])
    with jax.set_mesh(mesh_of(AxisType.Auto, fsdp=2, ep=2, tp=2)):
        got = value_and_gradients(layer, x, y, IDS[:rows])
    assert_equal(got, want)
