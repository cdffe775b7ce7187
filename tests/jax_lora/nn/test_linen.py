"""The Linen layer against the NNX one, and the bank over a Linen model's variables."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import PHASES, spread
from meshes import KINDS
from tiny import Mlp, expected, make_adapter, tokens

from jax_lora import AdapterBank, LoRAConfig, linen, load_peft, use
from jax_lora.linen import LoRADense

OPTIONS = {"slots": 2, "buckets": (8, 16)}


class Model(nn.Module):
    """`Mlp`, in Linen."""

    @nn.compact
    def __call__(self, x, adapters=None):
        x = LoRADense(6, **OPTIONS, name="up")(x, adapters)
        return LoRADense(4, **OPTIONS, name="down")(jnp.tanh(x), adapters)


@pytest.fixture
def pair():
    """`(params, bank)` of a Linen model with the weights of `Mlp`."""
    reference = Mlp(nnx.Rngs(0))
    variables = Model().init(jax.random.key(0), tokens(1))
    params = {
        name: {
            "kernel": getattr(reference, name).kernel[...],
            "bias": getattr(reference, name).bias[...],
        }
        for name in ("up", "down")
    }
    return params, linen.AdapterBank({**variables, "params": params})


@jax.jit
def apply(variables, x, batch):
    return Model().apply(variables, x, batch)


def right(x, adapters):
    return expected(Mlp(nnx.Rngs(0)), x, adapters)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ambient", [False, True])
def test_rows_use_their_adapters(pair, phase, ambient):
    params, bank = pair
    a, b = make_adapter(1, 3), make_adapter(2, 12)
    bank.load("a", a)
    bank.load("b", b)
    x = tokens(4)
    batch = bank.batch(["b", None, "a", "b"], phase=phase)

    @jax.jit
    def step(variables, x, batch):
        with use(batch):
            return Model().apply(variables, x)

    got = (step if ambient else apply)({"params": params, **bank.variables}, x, batch)
    np.testing.assert_allclose(got, right(x, [b, None, a, b]), atol=1e-5)


def test_the_base_is_flax_dense():
    x = tokens(3)
    dense, layer = nn.Dense(6), LoRADense(6, **OPTIONS)
    variables = layer.init(jax.random.key(0), x)
    base = dense.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], base["params"])
    np.testing.assert_array_equal(layer.apply(base, x), dense.apply(base, x))  # no stacks needed
    np.testing.assert_array_equal(layer.apply(variables, x), dense.apply(base, x))
    assert set(variables) == {"params", "lora", "lora_scale"}
    assert not any(leaf.any() for leaf in jax.tree.leaves(variables["lora"]))


@pytest.mark.parametrize("phase", PHASES)
def test_slices_and_dtypes_equal_the_nnx_layer(phase):
    options = {"slots": 2, "buckets": (8,), "slices": (5, 2), "param_dtype": jnp.bfloat16}
    layer = LoRADense(7, **options, name="qkv")

    class Packed(nn.Module):
        @nn.compact
        def __call__(self, x, adapters=None):
            return LoRADense(7, **options, name="qkv")(x, adapters)

    class Reference(nnx.Module):
        peft_names = {"qkv": ("q", "v")}  # noqa: RUF012

        def __init__(self):
            from jax_lora import LoRADense

            self.qkv = LoRADense(4, 7, **options, rngs=nnx.Rngs(0))

    assert layer.slices == (5, 2)
    x = jnp.asarray(tokens(6)).astype(jnp.bfloat16).reshape(3, 2, 4)
    variables = Packed().init(jax.random.key(0), x)
    reference = Reference()
    params = variables["params"]["qkv"]
    reference.qkv.kernel[...], reference.qkv.bias[...] = params["kernel"], params["bias"]
    banks = linen.AdapterBank(variables, peft_names={"qkv": ("q", "v")}), AdapterBank(reference)
    for bank in banks:
        bank.load("a", make_adapter(1, 4, features={"q": (4, 5), "v": (4, 2)}))
    batch = banks[0].batch(["a", None, "a"], phase=phase)
    got = Packed().apply({"params": variables["params"], **banks[0].variables}, x, batch)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        got, reference.qkv(x, banks[1].batch(["a", None, "a"], phase=phase))
    )
    assert np.abs(np.float32(got - reference.qkv(x))[0]).max() > 0.1


def test_loads_recompile_nothing_and_keep_the_structure(pair):
    params, bank = pair
    before = jax.tree.structure(bank.variables)
    assert before == jax.tree.structure(
        {k: v for k, v in Model().init(jax.random.key(0), tokens(1)).items() if k != "params"}
    )
    traces = 0

    @jax.jit
    def step(variables, x, batch):
        nonlocal traces
        traces += 1
        return Model().apply(variables, x, batch)

    x = tokens(1)
    for n, rank in enumerate((1, 8, 9, 16, 3)):
        adapter = make_adapter(n, rank)
        bank.load("a", adapter, replace=True)
        got = step({"params": params, **bank.variables}, x, bank.batch(["a"]))
        np.testing.assert_allclose(got, right(x, [adapter]), atol=1e-5)
    assert traces == 1 and jax.tree.structure(bank.variables) == before


def test_training_saving_and_merging(pair, tmp_path):
    params, bank = pair
    bank.create("a", LoRAConfig(3, 6), rngs=nnx.Rngs(0))
    bank.create("b", LoRAConfig(12, 12), rngs=nnx.Rngs(1))
    bank.load("absent", make_adapter(1, 4))
    absent = bank._adapter("absent")
    names = ["a", "b", None, "a"]
    x, targets = tokens(4), tokens(4, seed=1)
    batch = bank.batch(names)
    tx = optax.sgd(0.01)

    @jax.jit
    def step(lora, scales):
        def loss(lora):
            variables = {"params": params, "lora": lora, "lora_scale": scales}
            return ((Model().apply(variables, x, batch) - targets) ** 2).sum()

        value, grads = jax.value_and_grad(loss)(lora)
        updates, _ = tx.update(grads, tx.init(lora), lora)
        return value, optax.apply_updates(lora, updates)

    lora, scales = bank.variables["lora"], bank.variables["lora_scale"]
    values = []
    for _ in range(20):
        value, lora = step(lora, scales)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    bank.update(lora)
    for name in ("up", "down"):
        np.testing.assert_array_equal(
            bank._adapter("absent").modules[name].a, absent.modules[name].a
        )
    x = tokens(2)
    for name in ("a", "b"):
        bank.save(name, tmp_path / name)
        adapter = load_peft(tmp_path / name)
        rows = apply({"params": params, **bank.variables}, x, bank.batch([name, name]))
        np.testing.assert_allclose(rows, right(x, [adapter] * 2), atol=1e-5)
        merged = bank.merged_params(name, params)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        np.testing.assert_allclose(Model().apply({"params": merged}, x), rows, atol=1e-5)


def test_update_refuses_what_does_not_fit(pair):
    _, bank = pair
    lora = bank.variables["lora"]
    for bad in (
        {"up": lora["up"]},
        jax.tree.map(lambda leaf: leaf[:1], lora),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lora),
    ):
        with pytest.raises(ValueError, match="paths, shapes and dtypes of the bank's stacks"):
            bank.update(bad)


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, adapters):
        return x + LoRADense(4, **OPTIONS, name="proj")(
            nn.LayerNorm(name="norm")(x), adapters
        ), None


class Scanned(nn.Module):
    """Three layers by `nn.scan`, and one that is not scanned."""

    lora_axis: int = 0

    @nn.compact
    def __call__(self, x, adapters=None):
        axes = {"params": 0, "lora": self.lora_axis, "lora_scale": 0}
        split = {"params": True}
        scan = nn.scan(
            ScannedLayer, variable_axes=axes, split_rngs=split, in_axes=nn.broadcast, length=3
        )
        x, _ = scan(name="layers")(x, adapters)
        return LoRADense(4, **OPTIONS, name="head")(x, adapters)


@pytest.mark.ci
def test_layers_of_a_scan():
    x, names = tokens(2), ["head", *(f"layers.{n}.proj" for n in range(3))]
    variables = Scanned().init(jax.random.key(0), x)
    bank = linen.AdapterBank(variables)
    bank.load("a", make_adapter(1, 4, features=dict.fromkeys(names, (4, 4))))
    model = jax.jit(Scanned().apply)
    got = model({"params": variables["params"], **bank.variables}, x, bank.batch(["a", None]))
    merged = model({"params": bank.merged_params("a", variables["params"])}, x)
    base = model({"params": variables["params"]}, x)
    np.testing.assert_allclose(got, [merged[0], base[1]], atol=1e-5)
    assert np.abs(merged - base).min() > 0.01


def test_what_the_bank_cannot_serve_is_refused():
    x = tokens(2)
    with pytest.raises(ValueError, match="no LoRA layers"):
        linen.AdapterBank(nn.Dense(4).init(jax.random.key(0), x))
    with pytest.raises(ValueError, match="a LoRADense alone has no path"):
        linen.AdapterBank(LoRADense(4, **OPTIONS).init(jax.random.key(0), x))
    message = r"layers\.proj: kernel \[3, 4, 4\] and stacks \[2, 3, 8, 4\] must have the same axes"
    with pytest.raises(ValueError, match=message):
        linen.AdapterBank(Scanned(lora_axis=1).init(jax.random.key(0), x))
    variables = nn.Sequential([LoRADense(6)]).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="stacks, but no lora_scale, of layers_0"):
        linen.AdapterBank({k: v for k, v in variables.items() if k != "lora_scale"})


def test_layers_that_cannot_be_are_refused():
    x = tokens(2)
    with pytest.raises(ValueError, match=r"slices \(3, 2\) must be positive and sum to 6"):
        LoRADense(6, slices=(3, 2)).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="LoRADense takes an AdapterBatch as its second argument"):
        LoRADense(6).init(jax.random.key(0), x, 5)
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        LoRADense(6, slots=0).init(jax.random.key(0), x)


def test_nested_modules_have_dotted_names():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, adapters=None):
            return Model(name="mlp")(x, adapters)

    x = tokens(1)
    variables = Outer().init(jax.random.key(0), x)
    bank = linen.AdapterBank(variables)
    adapter = make_adapter(1, 4, features={"mlp.up": (4, 6)})
    bank.load("a", adapter)
    got = Outer().apply({"params": variables["params"], **bank.variables}, x, bank.batch(["a"]))
    merged = bank.merged_params("a", variables["params"])
    np.testing.assert_allclose(got, Outer().apply({"params": merged}, x), atol=1e-5)
    changed = {
        path
        for path, leaf in flatten_dict(merged).items()
        if (leaf != flatten_dict(variables["params"])[path]).any()
    }
    assert changed == {("mlp", "up", "kernel")}


def test_a_batch_of_another_bank_is_refused(pair):
    params, bank = pair
    other = linen.AdapterBank(Model().init(jax.random.key(1), tokens(1)))
    bank.load("a", make_adapter(1, 4))
    other.load("b", make_adapter(2, 4))
    x, batch = tokens(1), jax.device_put(bank.batch(["a"]))
    for call in (apply, Model().apply):
        with pytest.raises(ValueError, match="another AdapterBank than the LoRADense that"):
            call({"params": params, **other.variables}, x, batch)
    got = apply({"params": params, **bank.variables}, x, batch)
    np.testing.assert_allclose(got, right(x, [make_adapter(1, 4)]), atol=1e-5)


def test_variables_have_one_bank(pair):
    """Two would give the same slots away, and delete each other's arrays."""
    params, first = pair
    adapter = make_adapter(1, 4)
    first.load("a", adapter)
    batch, x = first.batch(["a"]), tokens(1)
    second = linen.AdapterBank({"params": params, **first.variables})
    with pytest.raises(RuntimeError, match="has taken over its slots"):
        first.load("b", adapter)
    second.load("b", make_adapter(2, 4))
    got = apply({"params": params, **second.variables}, x, batch)  # what it leases stays
    np.testing.assert_allclose(got, right(x, [adapter]), atol=1e-5)
    old = second.variables
    second.load("c", make_adapter(3, 4), replace=True)
    with pytest.raises(ValueError, match="the stacks in variables were deleted"):
        linen.AdapterBank({"params": params, **old})


def test_arrays_of_the_caller_are_copied():
    variables = Model().init(jax.random.key(0), tokens(1))
    host = jax.tree.map(np.array, variables)
    bank = linen.AdapterBank(host)
    lora = jax.tree.map(np.array, bank.variables["lora"])
    bank.update(lora)
    for leaf in (*jax.tree.leaves(host["lora"]), *jax.tree.leaves(lora)):
        leaf[:] = 7
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(bank.variables["lora"]))


COLUMN, ROW = P(None, "tp"), P("tp", None)
TOKENS = P("dp", None)


class Divided(nn.Module):
    """Two layers, column- and row-parallel, as the metadata of their kernels say."""

    @nn.compact
    def __call__(self, x, adapters=None):
        for name, features, spec in (("up", 8, COLUMN), ("down", 4, ROW)):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), tuple(spec))
            x = LoRADense(features, **OPTIONS, kernel_init=init, name=name)(jnp.tanh(x), adapters)
        return x


@jax.jit
def value_and_grads(params, bank_variables, x, batch):
    def loss(lora, x):
        variables = {"params": params, **bank_variables, "lora": lora}
        y = Divided().apply(variables, x, batch)
        return jnp.sum(jnp.square(y)), y

    lora = bank_variables["lora"]
    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lora, x)
    return y, grads


@pytest.mark.ci
@pytest.mark.parametrize(
    "dp, tp, kind", [*((2, 2, kind) for kind in KINDS), *spread([(1, 1), (4, 1)], KINDS)]
)
def test_layers_on_a_mesh_equal_those_of_one_device(dp, tp, kind):
    """Tokens over dp. Kernels over tp: the types of explicit axes say so, or Flax's metadata."""
    params = nn.meta.unbox(Divided().init(jax.random.key(0), tokens(4)))["params"]
    features = {"up": (4, 8), "down": (8, 4)}
    adapters = [make_adapter(seed, rank, features=features) for seed, rank in ((1, 3), (2, 12))]
    mesh = jax.make_mesh((dp, tp), ("dp", "tp"), axis_types=(kind, kind))
    results = []
    for placed in (False, True):
        params = jax.tree.map(np.asarray, params)
        x = tokens(4)
        if placed:
            x = jax.device_put(x, NamedSharding(mesh, TOKENS))
            for name, spec in (("up", COLUMN), ("down", ROW)):
                of_kernel = NamedSharding(mesh, spec)
                params[name]["kernel"] = jax.device_put(params[name]["kernel"], of_kernel)
        variables = Divided().init(jax.random.key(0), tokens(4))
        bank = linen.AdapterBank({**variables, "params": params})
        for name, adapter in zip("ab", adapters):
            bank.load(name, adapter)
        batch = bank.batch(["b", None, "a", "b"])
        with jax.set_mesh(mesh) if placed else contextlib.nullcontext():
            results.append(value_and_grads(params, bank.variables, x, batch))
    want, got = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, want)
    b = bank.variables["lora"]["up"]["stacks"][0]["lora_b"]
    assert b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp", None)), 3)


def test_a_bank_of_boxed_variables():
    """As `init` returns them where a kernel has metadata, of a mesh or of logical axes."""
    adapter, x = make_adapter(0, 4, features={"proj": (4, 8)}), tokens(2)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, adapters=None):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return LoRADense(8, **OPTIONS, kernel_init=init, name="proj")(x, adapters)

    variables = Model().init(jax.random.key(0), x)
    assert isinstance(variables["params"]["proj"]["kernel"], nn.LogicallyPartitioned)
    bank = linen.AdapterBank(variables)
    bank.load("a", adapter)
    with nn.logical_axis_rules([("embed", None), ("mlp", "tp")]):
        got = Model().apply({**variables, **bank.variables}, x, bank.batch(["a", None]))
    w = adapter.modules["proj"]
    delta = w.scale * (x[:1] @ w.a.T) @ w.b.T
    base = x @ nn.meta.unbox(variables["params"]["proj"]["kernel"])
    np.testing.assert_allclose(got, base + np.concatenate([delta, 0 * delta]), 1e-5, 1e-5)
