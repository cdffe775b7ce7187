"""LoRA layers on a mesh: four devices compute what one does."""

import collections
import contextlib
import re

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
from jax_lora import AdapterBatch, LoRAConfig, LoRADense, apply_lora, load_peft

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
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for a, b in (map(np.asarray, pair) for pair in pairs):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, np.abs(b).max()))


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


COLUMN, ROW = P(None, "tp"), P("tp", None)


def divided(mesh, spec, how, **options):
    """A layer whose kernel is divided over the mesh: by a sharding, or by Flax's metadata."""
    if how == "metadata":
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), tuple(spec))
            return dense(kernel_init=init, **options)
    layer = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), NamedSharding(mesh, spec)))
    apply_lora(layer, slots=SLOTS, buckets=tuple(SLOTS), **options)
    return fill(layer)


def collectives(fn, *operands):
    """`{collective: how many}` of the compiled program."""
    text = fn.lower(*operands).compile().as_text()
    names = re.findall(
        r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text
    )
    return dict(collections.Counter(names))


@nnx.jit
def call(layer, x, adapters):
    return layer(x, adapters)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("how", ["metadata", "sharding"])
@pytest.mark.parametrize("spec", [COLUMN, ROW])
def test_layers_follow_their_kernel(spec, how, kind):
    """Column-parallel: B and y are divided, nothing is exchanged. Row-parallel: A and x are, and
    one sum over the devices, that of the base layer, has the adapters in it."""
    mesh = mesh_of(kind, tp=4)
    layer = divided(mesh, spec, how)
    for stack in layer.stacks:
        a, b = (variable.get_value().sharding for variable in stack.variables)
        assert (a.spec, b.spec) == (P(None, None, spec[0]), P(None, spec[1], None))
    x = jax.device_put(tokens(8), NamedSharding(mesh, P(None, spec[0])))
    want = value_and_grads(dense(), tokens(8), batch())
    assert collectives(call, layer, x, batch()) == ({} if spec == COLUMN else {"all-reduce": 1})
    assert call(layer, x, batch()).sharding.is_equivalent_to(
        NamedSharding(mesh, P(None, spec[1])), 2
    )
    got = value_and_grads(layer, x, batch())
    assert_equal(got, want)


def test_x_that_would_be_gathered_is_refused():
    mesh = mesh_of(tp=4)
    layer = divided(mesh, COLUMN, "sharding")
    x = jax.device_put(tokens(8), NamedSharding(mesh, P(None, "tp")))
    with pytest.raises(ValueError, match=r"all of x would be gathered; .*P\(None, None\)"):
        layer(x, batch())


@pytest.mark.parametrize("spec, features", [(COLUMN, "22 output"), (ROW, "30 input")])
def test_widths_that_do_not_divide_are_refused(spec, features):
    layer = nnx.Linear(30, 22, rngs=nnx.Rngs(0))
    layer.kernel.set_metadata(out_sharding=tuple(spec))
    message = rf"{features} features do not divide over the 4 devices of mesh axes \('tp',\)"
    with jax.set_mesh(mesh_of(tp=4)), pytest.raises(ValueError, match=message):
        apply_lora(layer)


def test_slices_whose_columns_are_divided_are_refused():
    layer = divided(mesh_of(tp=4), ROW, "metadata", slices=(8, 16))
    x = tokens(8)
    assert_equal(call(layer, x, batch()), call(dense(slices=(8, 16)), x, batch()))
    layer = divided(mesh_of(tp=4), COLUMN, "metadata", slices=(8, 16))
    with pytest.raises(ValueError, match=r"slices \(8, 16\), .* make a layer of each"):
        layer(x, batch())


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
