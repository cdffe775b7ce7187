"""LoRA layers on a mesh: four devices compute what one does."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import Mlp, expected, make_adapter, make_bank
from tiny import tokens as tiny_tokens

import jax_lora
from jax_lora import AdapterBatch, LoRAConfig, LoRADense, load_peft

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


@contextlib.contextmanager
def counted():
    """What XLA compiles while the block runs."""
    compilations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def rows(model, x, names, bank):
    """What the rows of x give, by a step that writes the model's variables back."""
    return np.asarray(_step(model, x, bank.batch(names)))


@nnx.jit
def _step(model, x, adapters):
    with jax_lora.use(adapters):
        return model(x)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto, None])
def test_a_bank_writes_where_a_step_has_moved_the_stacks(kind, tmp_path):
    """To a mesh, or to another device; from then on loads compile nothing."""
    model, bank = make_bank()
    x = tiny_tokens(4)
    place = jax.devices()[1] if kind is None else NamedSharding(mesh_of(kind, dp=4), P("dp"))
    one, two, three = (make_adapter(seed, rank) for seed, rank in ((0, 4), (1, 8), (2, 6)))
    bank.load("one", one)
    rows(model, jax.device_put(x, place), ["one"] * 4, bank)
    bank.load("two", two)
    bank.load("one", three, replace=True)
    bank.create("new", LoRAConfig(rank=12, alpha=2.0), rngs=nnx.Rngs(0))
    names = ["one", "two", None, "one"]
    got = rows(model, jax.device_put(x, place), names, bank)
    np.testing.assert_allclose(got, expected(model, x, [three, two, None, three]), 1e-5, 1e-5)
    with counted() as compilations:
        bank.load("one", one, replace=True)
        got = rows(model, jax.device_put(x, place), names, bank)
    assert compilations == []
    np.testing.assert_allclose(got, expected(model, x, [one, two, None, one]), 1e-5, 1e-5)
    bank.save("one", tmp_path)
    np.testing.assert_array_equal(load_peft(tmp_path).modules["up"].a, one.modules["up"].a)
    merged = Mlp(nnx.Rngs(0))
    nnx.update(merged, bank.merge("two"))
    np.testing.assert_allclose(merged(x), expected(model, x, [two] * 4), 1e-5, 1e-5)
