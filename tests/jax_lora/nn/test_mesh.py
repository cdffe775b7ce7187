"""LoRA layers on a mesh: up to eight devices compute what one does."""

import contextlib
import functools
import re

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import in_ci, spread
from meshes import COLUMN, KINDS, ROW, assert_equal, collectives, mesh_of
from tiny import Mlp, expected, make_adapter, make_bank
from tiny import tokens as tiny_tokens

import jax_lora
import pallas_kernels as pk
from jax_lora import (
    AdapterBank,
    AdapterBatch,
    LoRAConfig,
    LoRADense,
    LoRAScale,
    apply_lora,
    load_peft,
)
from pallas_kernels import dispatch, routing

SLOTS = {8: 3, 16: 2}
ROWS = [0, 3, -1, 4, 2, 2, 1, 0]


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
        return jnp.sum(jnp.square(y)), y

    argnums = (nnx.DiffState(0, nnx.LoRAParam), 1)
    grads, y = nnx.grad(loss, argnums=argnums, has_aux=True)(layer, x)
    return y, grads


@pytest.mark.ci
@pytest.mark.parametrize("devices, phase, lead", [(1, "decode", (8,)), (8, "prefill", (8, 3))])
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


@nnx.jit
def call(layer, x, adapters):
    return layer(x, adapters)


@pytest.mark.ci
@pytest.mark.parametrize("how, kind", spread(["metadata", "sharding"], KINDS))
@pytest.mark.parametrize("spec", [COLUMN, ROW])
def test_layers_follow_their_kernel(spec, how, kind):
    """Column-parallel: B and y are divided, nothing is exchanged. Row-parallel: A and x are, and
    one sum over the devices, that of the base layer, has the adapters in it."""
    mesh = mesh_of(kind, tp=8)
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


class OwnSharded(nnx.Module):
    """Its call wants to be told the output's sharding, and its bias is in no variable."""

    einsum_str = "...d,df->...f"

    def __init__(self, sharding):
        kernel = np.random.default_rng(2).normal(size=(32, 24)).astype(np.float32)
        self.kernel = nnx.Param(jax.device_put(kernel, sharding))
        self.bias = nnx.data(jnp.ones(24))

    def __call__(self, x, *, out_sharding):
        return jnp.matmul(x, self.kernel[...], out_sharding=out_sharding) + self.bias


@pytest.mark.ci
def test_modules_of_a_users_own_get_the_sharding_of_their_output():
    mesh = mesh_of(tp=4)
    plain = OwnSharded(NamedSharding(mesh, ROW))
    layer = OwnSharded(NamedSharding(mesh, ROW))
    apply_lora(layer, slots=SLOTS, buckets=tuple(SLOTS))
    fill(layer)
    x, rows = jax.device_put(tokens(8), NamedSharding(mesh, P(None, "tp"))), P(None, None)
    with jax.set_mesh(mesh):
        want = plain(x, out_sharding=rows)
        assert_equal(layer(x, out_sharding=rows), want)
        got = layer(x, batch(), out_sharding=rows)
    kernel = np.asarray(layer.kernel[...])
    alone = nnx.Linear(32, 24, kernel_init=lambda *_: jnp.asarray(kernel), rngs=nnx.Rngs(0))
    alone.bias.set_value(jnp.ones(24))
    apply_lora(alone, slots=SLOTS, buckets=tuple(SLOTS))
    assert_equal(got, fill(alone)(tokens(8), batch()))


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


@pytest.mark.parametrize(
    "kind",
    [AxisType.Explicit, *map(in_ci, (AxisType.Auto, None))],
)
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


def served(mesh):
    """An Mlp, column- and row-parallel, and its bank."""
    model = Mlp(nnx.Rngs(0))
    for layer, spec in ((model.up, COLUMN), (model.down, ROW)):
        sharding = NamedSharding(mesh, spec)
        layer.kernel.set_value(jax.device_put(layer.kernel.get_value(), sharding))
    apply_lora(model, slots=2, buckets=(8, 16))
    return model, AdapterBank(model)


@pytest.mark.parametrize("kind", [AxisType.Explicit, in_ci(AxisType.Auto)])
def test_a_bank_of_divided_stacks(kind, tmp_path):
    """Loads change them in place, device by device. Nothing compiles at a second time: no load,
    create, save or merge."""
    mesh = mesh_of(kind, tp=2)
    model, bank = served(mesh)
    x = tiny_tokens(4)
    on_mesh = jax.device_put(x, NamedSharding(mesh, P()))
    adapters = {n: make_adapter(n, rank) for n, rank in enumerate((4, 8, 12, 6, 16))}
    variables = jax.tree.leaves(bank.state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    shardings = [v.get_value().sharding for v in variables]
    bank.load("a", adapters[0])
    bank.create("new", LoRAConfig(rank=2, alpha=2.0), rngs=nnx.Rngs(0))
    bank.load("b", adapters[2])
    rows(model, on_mesh, ["a"] * 4, bank)
    rows(model, on_mesh, ["new"] * 4, bank)
    for name in ("a", "b"):
        bank.save(name, tmp_path / "before")
        bank.merge(name)
    with counted() as compilations:
        before = list(map(shards_at, variables))
        bank.create("newer", LoRAConfig(rank=2, alpha=2.0), rngs=nnx.Rngs(0))
        for n in (1, 2, 3, 4):  # evicts: there are two slots for three of these
            bank.load(f"{n}", adapters[n])
        bank.load("4", adapters[2], replace=True)
        assert list(map(shards_at, variables)) == before
        got = rows(model, on_mesh, ["1", "3", None, "4"], bank)
        bank.save("3", tmp_path)
        merged = bank.merge("4")
    assert compilations == []
    wanted = [adapters[1], adapters[3], None, adapters[2]]
    np.testing.assert_allclose(got, expected(model, x, wanted), 1e-5, 1e-5)
    for variable, sharding in zip(variables, shardings):
        assert variable.get_value().sharding.is_equivalent_to(sharding, variable.ndim)
    assert_equal(
        [load_peft(tmp_path).modules[name].a for name in ("up", "down")],
        [adapters[3].modules[name].a for name in ("up", "down")],
    )
    assert merged["up"]["kernel"].get_value().sharding.spec == COLUMN
    one = Mlp(nnx.Rngs(0))
    nnx.update(one, jax.tree.map(np.asarray, merged))
    np.testing.assert_allclose(one(x), expected(model, x, [adapters[2]] * 4), 1e-5, 1e-5)


def shards_at(variable):
    """Where in memory the shards are."""
    shards = variable.get_value().addressable_shards
    return [shard.data.unsafe_buffer_pointer() for shard in shards]


DENSE = lambda: nnx.Linear(32, 32, rngs=nnx.Rngs(0))  # noqa: E731
LAYERS = {  # what makes the layer, the kernel's spec, the features of x
    "fsdp": (DENSE, P("dp", "tp"), (32,)),
    "row": (DENSE, P("tp", None), (32,)),
    "bfloat16": (DENSE, P(None, "tp"), (32,)),
    "heads out": (
        lambda: nnx.LinearGeneral(32, (4, 8), rngs=nnx.Rngs(0)),
        P("dp", "tp", None),
        (32,),
    ),
    "heads in": (
        lambda: nnx.LinearGeneral((4, 8), 32, axis=(-2, -1), rngs=nnx.Rngs(0)),
        P("tp", None, None),
        (4, 8),
    ),
    "einsum": (
        lambda: nnx.Einsum("...h,hnd->...nd", (32, 4, 8), (4, 8), rngs=nnx.Rngs(0)),
        P(None, "tp", None),
        (32,),
    ),
}


@pytest.mark.ci
@pytest.mark.parametrize("case, kind", spread(LAYERS, KINDS))
def test_layers_over_two_axes(case, kind):
    """Tokens over one axis of the mesh, weights over the other, or over both. In bfloat16 the
    kernels are traced too."""
    make, spec, features = LAYERS[case]
    dtype = jnp.bfloat16 if case == "bfloat16" else jnp.float32
    mesh = mesh_of(kind, dp=2, tp=4)

    def layer(mesh):
        layer = make()
        layer.dtype, kernel = dtype, layer.kernel.get_value().astype(dtype)
        if mesh is not None:
            kernel = jax.device_put(kernel, NamedSharding(mesh, spec))
        layer.kernel.set_value(kernel)
        apply_lora(layer, slots=SLOTS, buckets=tuple(SLOTS))
        return fill(layer)

    x = tokens(8, 3).reshape(8, 3, *features).astype(dtype)
    of_x = P("dp", None, *(spec[: len(features)] if spec[0] == "tp" else ()))
    want = value_and_grads(layer(None), x, batch())
    got = value_and_grads(layer(mesh), jax.device_put(x, NamedSharding(mesh, of_x)), batch())
    want, got = (jax.tree.map(lambda t: t.astype(jnp.float32), tree) for tree in (want, got))
    assert_equal(got, want, rtol=1e-5 if dtype == jnp.float32 else 2e-2)


def stacked_layers(sharding=None, dtype=jnp.float32):
    make = functools.partial(nnx.Linear, 32, 32, dtype=dtype, param_dtype=dtype)
    layers = nnx.vmap(lambda rngs: make(rngs=rngs))(nnx.Rngs(0).split(3))
    if sharding is not None:
        layers.kernel.set_value(jax.device_put(layers.kernel.get_value(), sharding))
    apply_lora(layers, slots=SLOTS, buckets=tuple(SLOTS))
    return fill(layers)


def test_a_scan_over_divided_tokens_sorts_them_once(monkeypatch):
    make, sorts = routing._make, []
    monkeypatch.setattr(routing, "_make", lambda *args: sorts.append(args) or make(*args))
    graphdef, state = nnx.split(stacked_layers())

    @jax.jit
    def run(state, x, adapters):
        layers = nnx.merge(graphdef, state)
        with jax_lora.use(adapters):
            return jax_lora.scan_layers(lambda layer, x, _: (jnp.sin(layer(x)), None), layers, x)

    x = jax.device_put(tokens(8, 3), NamedSharding(mesh_of(dp=4), P("dp")))
    got = run(state, x, batch())
    assert len(sorts) == len(SLOTS)
    assert_equal(got, run(state, tokens(8, 3), batch()))


@pytest.mark.parametrize("tokens, phase", [(64, "decode"), (1024, "prefill")])
@pytest.mark.parametrize("kind", [AxisType.Explicit, in_ci(AxisType.Auto)])
@pytest.mark.parametrize(
    "spec, fully, exchanged",
    [
        (COLUMN, False, []),
        (ROW, False, ["all_reduce"]),
        pytest.param(COLUMN, True, ["all_gather"], marks=pytest.mark.ci),
        pytest.param(ROW, True, ["reduce_scatter", "all_reduce"], marks=pytest.mark.ci),
    ],
)
def test_kernels_run_on_shards(spec, fully, exchanged, kind, tokens, phase):
    """Lowered for a GPU: the kernels' calls, and no exchange but the base layer's. Where ranks are
    divided too, one small one more."""
    mesh = mesh_of(kind, tp=2)
    layer = nnx.Linear(512, 512, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = layer.kernel.get_value()
    layer.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, spec)))
    apply_lora(layer, slots=2, buckets=(16, 64), fully_sharded=fully)
    x = jax.device_put(jnp.ones((tokens, 512), jnp.bfloat16), NamedSharding(mesh, P(None, spec[0])))
    adapters = AdapterBatch(np.zeros(tokens, np.int32), ranges=((16, 2), (64, 2)), phase=phase)
    graphdef, state = nnx.split(layer)
    step = jax.jit(lambda state, x, adapters: nnx.merge(graphdef, state)(x, adapters))
    text = step.trace(state, x, adapters).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert not re.findall(r"jit_(\w+_xla)", text)
    found = re.findall(r"stablehlo\.(all_\w+|reduce_scatter|collective_permute)", text)
    assert found == exchanged


FEATURES, WIDTHS = 128, {"q": 256, "k": 128, "v": 128}


def projections(mesh, specs, dtype=jnp.float32, plain=()):
    """Layers of one x, each with a kernel as its spec says, and stacks but for `plain`."""
    layers = {}
    for n, (name, spec) in enumerate(specs.items()):
        layer = nnx.Linear(FEATURES, WIDTHS[name], dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(n))
        if mesh is not None:
            kernel = layer.kernel.get_value()
            layer.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, spec)))
        layers[name] = layer
    model = nnx.Dict(layers)
    apply_lora(model, slots=SLOTS, buckets=tuple(SLOTS), target="|".join(set(specs) - set(plain)))
    for n, name in enumerate(set(specs) - set(plain)):
        fill(model[name], n)
    return model


def call_projections(model, x, adapters):
    with jax_lora.use(adapters):
        return jax_lora.call_packed(tuple(model.values()), x)


def in_order(jaxpr):
    """The primitives of a jaxpr and of its calls. An op of LoRA is its name."""
    for eqn in jaxpr.eqns:
        name = eqn.params["name"] if eqn.primitive.name == "jit" else eqn.primitive.name
        yield name
        if "lora" not in name:
            for inner in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from in_order(inner)


def form_of(call, model, x, adapters):
    """The calls of `shard_map` of a step, and what each does."""
    graphdef, state = nnx.split(model)
    step = jax.make_jaxpr(lambda state, *args: call(nnx.merge(graphdef, state), *args))
    flat = list(in_order(step(state, x, adapters).jaxpr))
    starts = [n for n, name in enumerate(flat) if name == "shard_map"]
    return [flat[start:stop] for start, stop in zip(starts, [*starts[1:], None])]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_decode_step_has_the_form_of_one_device(kind):
    """LoRA of q, k and v is one launch, ahead of their products; a row-parallel layer's is ahead of
    its product, and in the sum over the devices that the base needs."""
    mesh = mesh_of(kind, tp=2)
    model = projections(mesh, dict.fromkeys(WIDTHS, COLUMN), jnp.bfloat16)
    x = jax.device_put(jnp.ones((8, FEATURES), jnp.bfloat16), NamedSharding(mesh, P()))
    [packed] = form_of(call_projections, model, x, batch())
    row = projections(mesh, {"q": ROW}, jnp.bfloat16)["q"]
    [alone] = form_of(type(row).__call__, row, x, batch())
    for form, products in ((packed, 3), (alone, 1)):
        deltas = [n for n, name in enumerate(form) if "lora_delta_mosaic_gpu" in name]
        assert len(deltas) == 1
        barrier = form.index("optimization_barrier")
        dots = [n for n, name in enumerate(form) if name == "dot_general"]
        assert deltas[0] < barrier < min(dots) and len(dots) == products
    sums = [n for n, name in enumerate(alone) if name.startswith("psum")]
    assert not any(name.startswith("psum") for name in packed)
    last_add = max(n for n, name in enumerate(alone) if name == "add")
    assert alone.index("dot_general") < last_add < min(sums)


def test_a_prefill_adds_in_place_on_shards():
    mesh = mesh_of(AxisType.Auto, tp=2)
    for name, spec in (("q", COLUMN), ("k", ROW)):
        layer = projections(mesh, {name: spec}, jnp.bfloat16)[name]
        x = jnp.ones((1536, FEATURES), jnp.bfloat16)
        rows = batch([0] * 1536, phase="prefill")
        [form] = form_of(type(layer).__call__, layer, x, rows)
        assert any("add_lora_mosaic_gpu" in name for name in form)
        assert not any("lora_delta" in name for name in form)


MIXED = {"q": COLUMN, "k": P(), "v": COLUMN}


@pytest.mark.ci
@pytest.mark.parametrize(
    "specs, plain, kind",
    [
        (dict.fromkeys(WIDTHS, COLUMN), (), AxisType.Explicit),
        (dict.fromkeys(WIDTHS, COLUMN), ("k",), AxisType.Auto),
        (MIXED, (), AxisType.Auto),
        (dict.fromkeys(WIDTHS, ROW), (), AxisType.Explicit),
    ],
)
def test_projections_of_one_x_equal_those_of_one_device(specs, plain, kind):
    """All divided alike, with one without adapters, one whole, and over rows of x."""

    @nnx.jit
    def value_and_grads(model, x, adapters):
        def loss(model, x):
            ys = call_projections(model, x, adapters)
            return sum(jnp.sum(jnp.square(y)) for y in ys), ys

        argnums = (nnx.DiffState(0, nnx.LoRAParam), 1)
        return nnx.grad(loss, argnums=argnums, has_aux=True)(model, x)

    x, mesh = tokens(8, inputs=FEATURES), mesh_of(kind, tp=4)
    want = value_and_grads(projections(None, specs, plain=plain), x, batch())
    of_x = P(None, "tp") if ROW in specs.values() else P()
    got = value_and_grads(
        projections(mesh, specs, plain=plain),
        jax.device_put(x, NamedSharding(mesh, of_x)),
        batch(),
    )
    assert_equal(got, want)


TWO_AXES = P("b", "a")


@pytest.mark.ci
@pytest.mark.parametrize(
    "spec, sizes, exchanged, kind",
    spread(
        [
            (COLUMN, {"tp": 8}, {"all-gather": 1}),
            (ROW, {"tp": 8}, {"reduce-scatter": 1, "all-reduce": 1}),
            (TWO_AXES, {"a": 2, "b": 4}, {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 1}),
        ],
        KINDS,
    ),
)
def test_a_layer_whose_ranks_are_divided_too(spec, sizes, exchanged, kind):
    """Each device has its part of A and B alone. One small exchange comes to those of the base."""
    ranges = {64: 3, 128: 2}

    def layer(mesh):
        layer = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
        if mesh is not None:
            kernel = jax.device_put(layer.kernel.get_value(), NamedSharding(mesh, spec))
            layer.kernel.set_value(kernel)
        apply_lora(layer, slots=ranges, buckets=tuple(ranges), fully_sharded=True)
        return fill(layer)

    mesh = mesh_of(kind, **sizes)
    divided, x = layer(mesh), jax.device_put(tokens(8), NamedSharding(mesh, P(None, spec[0])))
    for stack in divided.stacks:
        for variable in stack.variables:
            [size] = {shard.data.size for shard in variable.get_value().addressable_shards}
            assert size * mesh.size == variable.size
    adapters = AdapterBatch(np.array(ROWS, np.int32), ranges=tuple(ranges.items()))
    want = value_and_grads(layer(None), tokens(8), adapters)
    assert_equal(value_and_grads(divided, x, adapters), want)
    assert collectives(call, divided, x, adapters) == exchanged


def test_ranks_that_do_not_divide_are_refused():
    """By the rule of LoRAX, with the buckets that it pads to."""
    model = Mlp(nnx.Rngs(0))
    sharding = NamedSharding(mesh_of(tp=2), COLUMN)
    model.up.kernel.set_value(jax.device_put(model.up.kernel.get_value(), sharding))
    message = (
        r"up: LoRADense: buckets \(8, 16, 64\) do not divide over the 2 devices of mesh axes "
        r"\('tp',\) into ranks .* give buckets=\(16, 64\)"
    )
    with pytest.raises(ValueError, match=message):
        apply_lora(model, buckets=(8, 16, 64), fully_sharded=True)
    assert type(model.up) is type(model.down) is nnx.Linear
    apply_lora(model, buckets=(16, 64), fully_sharded=True)
    later = nnx.Linear(32, 24, rngs=nnx.Rngs(0))
    apply_lora(later, slots=SLOTS, buckets=tuple(SLOTS), fully_sharded=True)
    later.kernel.set_value(jax.device_put(later.kernel.get_value(), sharding))
    with pytest.raises(ValueError, match=r"buckets \(8, 16\) do not divide .*buckets=\(16,\)"):
        later(tokens(8), batch())


@nnx.jit
def run_layers(layers, x, adapters):
    def body(layer, x, _):
        return 0.02 * layer(x), None

    with jax_lora.use(adapters):
        return jax_lora.scan_layers(body, layers, x)[0]


@pytest.mark.parametrize("kind", [AxisType.Explicit, in_ci(AxisType.Auto)])
def test_a_scan_of_divided_layers(kind):
    mesh = mesh_of(kind, dp=2, tp=2)
    layers = stacked_layers(NamedSharding(mesh, P(None, "tp", None)))
    x = jax.device_put(tokens(8, 3), NamedSharding(mesh, P("dp")))
    assert_equal(
        run_layers(layers, x, batch()), run_layers(stacked_layers(), tokens(8, 3), batch())
    )


def outside_of_loops(jaxpr):
    """The primitives of a jaxpr and of its calls, but for those of scans."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "scan":
            for inner in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from outside_of_loops(inner)


def test_the_gradient_of_a_scan_has_no_branch_for_its_sums():
    """JAX would take the choice of how a platform sums in half precision out of the loop. XLA then
    can't know it in a turn."""
    mesh = mesh_of(AxisType.Auto, tp=2)
    layers = stacked_layers(NamedSharding(mesh, P(None, "tp", None)), jnp.bfloat16)
    graphdef, state = nnx.split(layers)

    def loss(state, x, adapters):
        return jnp.sum(run_layers(nnx.merge(graphdef, state), x, adapters).astype(jnp.float32))

    x = jnp.asarray(tokens(8, 3), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(loss, allow_int=True))(state, x, batch(phase="prefill"))
    names = list(outside_of_loops(jaxpr.jaxpr))
    assert "scan" in names and "platform_index" not in names


def test_a_model_that_is_placed_later():
    """Its bank moves the stacks; their shardings are in Flax's metadata, for `in_shardings`."""
    mesh = mesh_of(AxisType.Auto, tp=2)
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    for layer, spec in ((model.up, COLUMN), (model.down, ROW)):
        kernel = layer.kernel.get_value()
        layer.kernel.set_value(jax.device_put(kernel, NamedSharding(mesh, spec)))
    bank = AdapterBank(model)
    assert model.up.stacks[0].lora_b.get_value().sharding.spec == P(None, "tp", None)
    adapter, x = make_adapter(0, 4), tiny_tokens(2)
    bank.load("a", adapter)
    graphdef, _, rest = nnx.split(model, (nnx.LoRAParam, LoRAScale), ...)

    def step(state, rest, x, adapters):
        with jax_lora.use(adapters):
            return nnx.merge(graphdef, state, rest)(x)

    shardings = nnx.get_named_sharding(bank.state, mesh)
    step = jax.jit(step, in_shardings=(shardings, None, None, None))
    got = step(bank.state, rest, x, bank.batch(["a", None]))
    np.testing.assert_allclose(got, expected(model, x, [adapter, None]), 1e-5, 1e-5)


def test_a_mesh_that_the_call_alone_has():
    """The kernel's metadata say how it is divided, where no mesh was set when it was made."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tp"))
    with nnx.use_eager_sharding(False):
        layer = dense(kernel_init=init)
    want = call(layer, tokens(8), batch())
    mesh = mesh_of(AxisType.Auto, tp=4)
    with jax.set_mesh(mesh):
        got = call(layer, tokens(8), batch())
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp")), 2)
    assert_equal(got, want)


OPS = {
    "add_lora": lambda a, b, x, y, v, i, **how: pk.add_lora(y, x, a, b, i, **how),
    "bgmv_shrink": lambda a, b, x, y, v, i: pk.bgmv_shrink(x, a, i),
    "sgmv_shrink": lambda a, b, x, y, v, i: pk.sgmv_shrink(x, a, pk.make_segments(i, 2)),
    "bgmv_expand": lambda a, b, x, y, v, i, **how: pk.bgmv_expand(v, b, i, y, **how),
    "lora_delta": lambda a, b, x, y, v, i, **how: pk.lora_delta(
        x, [pk.LoRAPart(a, b)], i, 64, **how
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_ops_in_a_shard_map_that_checks(op):
    """Those that write in place too: by XLA here, and lowered for a GPU as kernels."""
    rows, whole = P("dp"), P()
    shapes = [(2, 16, 64), (2, 64, 16), (8, 64), (8, 64), (8, 16)]
    operands = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    operands.append(jnp.zeros(8, jnp.int32))
    specs = (whole, whole, rows, rows, rows, rows)
    mesh = mesh_of(AxisType.Auto, dp=4)
    maps = [
        jax.jit(jax.shard_map(OPS[op], mesh=mesh, in_specs=specs, out_specs=rows, check_vma=check))
        for check in (False, True)
    ]
    want = maps[0](*operands)
    np.testing.assert_array_equal(maps[1](*operands), want)
    text = maps[1].trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert not re.findall(r"jit_(\w+_xla)", text)


@pytest.mark.parametrize("op", OPS)
def test_ops_on_an_explicit_mesh_name_the_mend(op):
    """Columns of B and y are divided, outside of a `shard_map`."""
    shapes = [(2, 16, 64), (2, 64, 16), (8, 64), (8, 64), (8, 16)]
    specs = [P(), P(None, "tp"), P(), P(None, "tp"), P()]
    mesh = mesh_of(tp=4)
    operands = [
        jax.device_put(jnp.ones(shape, jnp.bfloat16), NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    message = (
        rf"{op} gets .* on a mesh with explicit axes \['tp'\]; call it inside of jax.shard_map"
    )
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(OPS[op])(*operands, jnp.zeros(8, jnp.int32))


COLUMNS = [P(), P(None, "tp"), P(), P(None, "tp"), P()]
TOKENS = [P(), P(), P("tp"), P("tp"), P("tp")]


def operands_on(mesh, specs):
    shapes = [(2, 16, 64), (2, 64, 16), (8, 64), (8, 64), (8, 16)]
    placed = [NamedSharding(mesh, spec) for spec in specs]
    arrays = [jax.device_put(jnp.ones(s, jnp.bfloat16), at) for s, at in zip(shapes, placed)]
    return [*arrays, jax.device_put(jnp.zeros(8, jnp.int32), NamedSharding(mesh, P()))]


@pytest.fixture
def kernels_by_xla(monkeypatch):
    """XLA's forms in place of the kernels, so that programs with them compile on a CPU."""
    monkeypatch.setitem(dispatch.BACKENDS, "mosaic_gpu", dispatch.xla)
    dispatch.compiled.cache_clear()
    yield
    dispatch.compiled.cache_clear()


OF_COLUMNS = [op for op in OPS if "shrink" not in op]


@pytest.mark.parametrize("op", OF_COLUMNS)
@pytest.mark.usefixtures("kernels_by_xla")
def test_ops_on_operands_divided_over_columns_of_an_auto_mesh(op):
    """Without a `shard_map`, each GPU would gather all of B. A call refuses them, and so does a
    program as XLA compiles it, its gradient too."""
    mesh = mesh_of(AxisType.Auto, tp=4)
    call = functools.partial(OPS[op], implementation="mosaic_gpu")
    operands = operands_on(mesh, COLUMNS)
    mend = r"gets an operand \[.*\] whose axes \[1\] are divided over devices, .*jax.shard_map"
    with pytest.raises(NotImplementedError, match=mend):
        call(*operands)
    with pytest.raises(NotImplementedError, match=mend):
        OPS[op](*operands)
    with pytest.raises(jax.errors.JaxRuntimeError, match=mend):
        jax.jit(call)(*operands)
    by_xla = functools.partial(OPS[op], implementation="xla")
    whole = by_xla(*operands_on(mesh, [P()] * 5))
    assert_equal(by_xla(*operands), whole)
    assert_equal(jax.jit(call)(*operands_on(mesh, [P()] * 5)), whole)
    assert_equal(jax.jit(call)(*operands_on(mesh, TOKENS)), whole)

    def loss(b, a, x, *rest):
        return jnp.sum(jnp.square(call(a, b, x, *rest)).astype(jnp.float32))

    a, b, *rest = operands
    with pytest.raises(jax.errors.JaxRuntimeError, match=mend):
        jax.jit(jax.grad(loss))(b, a, *rest)
