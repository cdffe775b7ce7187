"""LoRA layers on a mesh: four devices compute what one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_lora import AdapterBatch, LoRADense

SLOTS = {8: 3, 16: 2}
ROWS = [0, 3, -1, 4, 2, 2, 1, 0]


def mesh_of(kind=AxisType.Explicit, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def fill(layer, seed=0):
    """Numbers in all stacks, as if adapters were loaded."""
    rng = np.random.default_rng(seed)
    for variable in jax.tree.leaves(
        nnx.state(layer, nnx.LoRAParam), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        put(variable, rng.normal(size=variable.shape))
    put(layer.scales, rng.uniform(0.5, 2, layer.scales.shape))
    return layer


def put(variable, new):
    """Where the old value is, and as little committed to it."""
    old = variable.get_value()
    placed = jax.device_put(new, old.sharding) if old.committed else jnp.asarray(new)
    variable.set_value(placed.astype(old.dtype))


def batch(rows=ROWS, phase="decode"):
    return AdapterBatch(np.array(rows, np.int32), ranges=tuple(SLOTS.items()), phase=phase)


def dense(inputs=32, outputs=24, **how):
    how = {"slots": SLOTS, "buckets": tuple(SLOTS), "rngs": nnx.Rngs(0), **how}
    return fill(LoRADense(inputs, outputs, **how))


def tokens(*lead, inputs=32, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(*lead, inputs)).astype(dtype)


@nnx.jit
def value_and_grads(layer, x, adapters):
    """The output, and the gradients in the stacks and in x."""

    def loss(layer, x):
        y = layer(x, adapters)
        return jnp.sum(jnp.sin(y)), y

    argnums = (nnx.DiffState(0, nnx.LoRAParam), 1)
    grads, y = nnx.grad(loss, argnums=argnums, has_aux=True)(layer, x)
    return y, grads


def assert_equal(got, want, rtol=1e-5):
    def close(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, np.abs(b).max()))

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("devices, phase, lead", [(1, "decode", (8,)), (4, "prefill", (8, 3))])
def test_tokens_over_an_explicit_mesh(devices, phase, lead):
    """`jax.make_mesh`'s default, each device with its part of the batch."""
    want = value_and_grads(dense(), tokens(*lead), batch(phase=phase))
    mesh = mesh_of(dp=devices)
    x = jax.device_put(tokens(*lead), NamedSharding(mesh, P("dp")))
    assert_equal(dense()(x, batch(phase=phase)), want[0])
    got = value_and_grads(dense(), x, batch(phase=phase))
    assert jax.typeof(got[0]).sharding.spec == P("dp", *[None] * len(lead))
    assert_equal(got, want)
    with jax.set_mesh(mesh):
        assert_equal(value_and_grads(dense(), x, batch(phase=phase)), want)
