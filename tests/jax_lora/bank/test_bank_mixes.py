"""Rows with several adapters, each with a weight: `bank.batch([{"a": 0.7, "b": 0.3}])`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import PHASES
from tiny import Mlp, expected, forward, make_adapter, make_bank, tokens

import jax_lora
from jax_lora import (
    Adapter,
    AdapterBank,
    AdapterBatch,
    BankFullError,
    LoRAConfig,
    LoRADense,
    LoRAWeights,
    apply_lora,
    linen,
    scan_layers,
)

ADAPTERS = {"a": make_adapter(1, 3), "b": make_adapter(2, 12), "c": make_adapter(3, 8, alpha=5.0)}
MIXES = [{"a": 0.75, "b": -0.5}, "a", None, {"b": 2}, {"c": 0.25, "b": 1.0, "a": 0.0}]


def together(row, adapters=ADAPTERS):
    """One adapter that computes what a row's adapters do: theirs, one below the other."""
    if not row or isinstance(row, str):
        return adapters.get(row or None)
    modules = {}
    for name in next(iter(adapters.values())).modules:
        mine = [(adapters[one].modules[name], weight) for one, weight in row.items()]
        a = np.concatenate([w.a for w, _ in mine])
        b = np.concatenate([weight * w.scale * w.b for w, weight in mine], axis=1)
        modules[name] = LoRAWeights(a, b, 1.0)
    return Adapter(LoRAConfig(len(a), float(len(a))), modules)


def mixing_bank(adapters_per_row=3, slots=2, **options):
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=slots, buckets=(8, 16), **options)
    bank = AdapterBank(model, adapters_per_row=adapters_per_row)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    return model, bank


def right(model, x, rows):
    return expected(model, x, list(map(together, rows)))


@pytest.mark.parametrize("phase", PHASES)
def test_rows_get_what_their_adapters_add(phase):
    model, bank = mixing_bank()
    x = tokens(len(MIXES))
    got = forward(model, x, bank.batch(MIXES, phase=phase))
    np.testing.assert_allclose(got, right(model, x, MIXES), atol=1e-5)
    long = np.stack([x, -x], axis=1)  # [B, S, H]
    got = forward(model, long, bank.batch(MIXES, phase=phase))
    np.testing.assert_allclose(got[:, 1], right(model, -x, MIXES), atol=1e-5)
    lengths = [2, 0, 3, 1, 1]
    flat = tokens(9, seed=1)
    got = forward(model, flat, bank.batch(MIXES, lengths, phase=phase))
    rows = [*np.repeat(np.array(MIXES, object), lengths), None, None]
    np.testing.assert_allclose(got, right(model, flat, rows), atol=1e-5)


def test_batches_of_names_alone():
    model, bank = mixing_bank()
    batch = bank.batch(["b", None])
    np.testing.assert_array_equal(batch.indices, [[batch.indices[0, 0], -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(batch.weights, [[1, 0, 0], [0, 0, 0]])
    x = tokens(2)
    np.testing.assert_allclose(forward(model, x, batch), right(model, x, ["b", None]), atol=1e-5)


def test_a_bank_of_one_adapter_per_row_has_no_weights():
    _, bank = make_bank()
    bank.load("a", ADAPTERS["a"])
    batch = bank.batch([{"a": 1.0}, {}, "a", None])
    assert batch.weights is None
    np.testing.assert_array_equal(batch.indices, [0, -1, 0, -1])
    assert len(jax.tree.leaves(batch)) == 1


WIDTH = 12


class TorchMlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(WIDTH, 20), torch.nn.Linear(20, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class WideMlp(nnx.Module):
    def __init__(self, torch_model):
        self.up = nnx.Linear(WIDTH, 20, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(20, WIDTH, rngs=nnx.Rngs(0))
        for name in ("up", "down"):
            layer, source = getattr(self, name), getattr(torch_model, name)
            layer.kernel[...] = jnp.asarray(source.weight.detach().numpy().T)
            layer.bias[...] = jnp.asarray(source.bias.detach().numpy())

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


PEFT_ROWS = [
    {"fr": 0.7, "legal": 0.3},
    {"fr": 1.0},
    {"fr": 0.25, "legal": -0.5, "code": 1.5},
    {"code": -2.0},
    {"code": 1.0, "legal": 1.0},
]


@pytest.mark.ci
def test_rows_equal_what_peft_makes_of_them(tmp_path):
    """`add_weighted_adapter(combination_type="cat")` for each row, in float32.

    PEFT computes the scale of the sum as the first adapter's config says, so the rsLoRA one, which
    would have it scaled once more, is never first.
    """
    configs = {
        "fr": {"r": 4, "lora_alpha": 16},
        "legal": {"r": 16, "lora_alpha": 8, "use_rslora": True},
        "code": {"r": 9, "lora_alpha": 3, "target_modules": ["down"]},
    }
    model = None
    for name, options in configs.items():
        options = {"target_modules": ["up", "down"], "init_lora_weights": False, **options}
        config = peft.LoraConfig(**options)
        if model is None:
            model = peft.get_peft_model(TorchMlp(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(tmp_path)
    ours = WideMlp(TorchMlp())
    apply_lora(ours, slots=3, buckets=(8, 16))
    bank = AdapterBank(ours, adapters_per_row=3)
    for name in configs:
        bank.load(name, tmp_path / name)
    x = np.random.default_rng(0).normal(size=(len(PEFT_ROWS), WIDTH)).astype(np.float32)
    want = []
    for n, row in enumerate(PEFT_ROWS):
        model.add_weighted_adapter(list(row), list(row.values()), f"{n}", combination_type="cat")
        model.set_adapter(f"{n}")
        with torch.no_grad():
            want.append(model(torch.from_numpy(x[n : n + 1])).numpy()[0])
    with torch.no_grad(), model.disable_adapter():
        want.append(model(torch.from_numpy(x[:1])).numpy()[0])
    x = np.concatenate([x, x[:1]])
    rows = [*PEFT_ROWS, None]
    for phase in ("decode", "prefill"):
        got = forward(ours, x, bank.batch(rows, phase=phase))
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        assert np.abs(got[:-1] - got[-1]).max() > 0.1
    bank.unload("legal")
    bank.load("other", tmp_path / "code")
    bank.load("legal", tmp_path / "legal")
    got = forward(ours, x, bank.batch(rows))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_no_mix_and_no_weight_compiles_anything():
    model, bank = mixing_bank(2)
    x = tokens(3)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, x, batch):
        with jax_lora.use(batch):
            return nnx.merge(graphdef, state)(x)

    batches = [["a", None, "b"], [{"a": 1, "c": 2}, {"b": -1}, None], [{}, {}, {"c": 0.5}]]
    for rows in batches:
        got = step(state, x, bank.batch(rows))
        np.testing.assert_allclose(got, right(model, x, rows), atol=1e-5)
    assert step._cache_size() == 1


def test_a_mix_leases_and_uses_all_of_its_adapters():
    _, bank = mixing_bank(2, slots=1)  # "b" is alone in its bucket; "c" has evicted "a"
    assert bank.names == ("b", "c")
    batch = bank.batch([{"c": 1, "b": 1}])
    assert bank.names == ("c", "b")
    for name, rank in (("d", 8), ("e", 16)):
        with pytest.raises(BankFullError):
            bank.load(name, make_adapter(4, rank))
    del batch
    bank.load("d", make_adapter(4, 8))
    assert bank.names == ("b", "d")
    with pytest.raises(KeyError, match=r"no adapter 'c' \(evicted by the load of 'd'\)"):
        bank.batch([{"c": 1, "b": 1}])


@pytest.fixture
def descent():
    """The loss of rows of one mix against those of another, and what it takes but weights."""
    model, bank = mixing_bank(2)
    x = tokens(16)
    batch = bank.batch([{"a": 0.0, "b": 0.0}] * 16)
    want = jnp.asarray(right(model, x, [{"a": 0.5, "b": -0.25}] * 16), jnp.float32)
    graphdef, state = nnx.split(model)

    def loss(weights, state, batch):
        batch = batch.with_weights(jnp.broadcast_to(weights, (16, 2)))
        with jax_lora.use(batch):
            return jnp.mean(jnp.square(nnx.merge(graphdef, state)(x) - want))

    return loss, state, batch


def test_weights_are_trained(descent):
    """By gradient descent, the weights of the other mix are found."""
    loss, *given = descent
    step, weights = jax.jit(jax.grad(loss)), jnp.zeros(2)
    assert step(weights, *given).all()
    for _ in range(200):
        weights -= 0.5 * step(weights, *given)
    np.testing.assert_allclose(weights, [0.5, -0.25], atol=0.02)
    assert step._cache_size() == 1


@pytest.mark.ci
def test_weights_have_the_same_gradients_without_jit(descent):
    loss, *given = descent
    want = jax.jit(jax.grad(loss))(jnp.zeros(2), *given)
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2), *given), want, rtol=1e-4)


@pytest.mark.ci
def test_linen_has_mixes_too():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, adapters=None):
            options = {"slots": 2, "buckets": (8, 16)}
            x = linen.LoRADense(6, **options, name="up")(x, adapters)
            return linen.LoRADense(4, **options, name="down")(jnp.tanh(x), adapters)

    reference, x = Mlp(nnx.Rngs(0)), tokens(len(MIXES))
    variables = Model().init(jax.random.key(0), x)
    params = {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in (("up", reference.up), ("down", reference.down))
    }
    bank = linen.AdapterBank({**variables, "params": params}, adapters_per_row=3)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    got = Model().apply({"params": params, **bank.variables}, x, bank.batch(MIXES))
    np.testing.assert_allclose(got, right(reference, x, MIXES), atol=1e-5)


class Stacked(nnx.Module):
    """Two layers in one module, in a scan, or one after the other."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Mlp)(rngs.split(2))
        self.scanned = True

    def __call__(self, x):
        if self.scanned:
            return scan_layers(lambda block, x, _: (block(x), None), self.layers, x)[0]
        graphdef, state = nnx.split(self.layers)
        for n in range(2):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], state))(x)
        return x


@pytest.mark.ci
def test_scanned_layers_take_mixes(optimised):
    model = Stacked(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank = AdapterBank(model, adapters_per_row=2)
    features = {
        f"layers.{n}.{name}": shape
        for n in range(2)
        for name, shape in {"up": (4, 6), "down": (6, 4)}.items()
    }
    for seed, rank in enumerate((3, 12)):
        bank.load("ab"[seed], make_adapter(seed, rank, features=features))
    rows = [{"a": 0.5, "b": -1.5}, "b", None]
    x, batch = tokens(3), bank.batch([{"a": 0.5, "b": -1.5}, "b", None])
    got = forward(model, x, batch)
    model.scanned = False
    np.testing.assert_allclose(got, forward(model, x, batch), atol=1e-5)
    assert np.abs(got - forward(model, x)).max(axis=1)[:2].min() > 0.1
    assert rows[2] is None
    np.testing.assert_array_equal(got[2], forward(model, x)[2])


@pytest.mark.ci
@pytest.mark.parametrize("lead", [(8,), (8, 3)])
def test_tokens_divided_over_a_mesh(lead):
    rng = np.random.default_rng(0)
    layer = LoRADense(16, 24, slots=2, buckets=(8, 16), rngs=nnx.Rngs(0))
    for stack in layer.stacks:
        for variable in stack.variables:
            variable.set_value(jnp.asarray(rng.normal(size=variable.shape), jnp.float32))
    layer.scales.set_value(jnp.ones_like(layer.scales.get_value()))
    ids = rng.integers(-1, 4, (8, 2)).astype(np.int32)
    weights = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    x = rng.normal(size=(*lead, 16)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("dp",), axis_types=(AxisType.Explicit,))

    def loss(layer, x, weights):
        batch = AdapterBatch(jnp.asarray(ids), weights=weights, ranges=((8, 2), (16, 2)))
        y = layer(x, batch)
        return jnp.sum(jnp.square(y)), y

    step = nnx.jit(nnx.grad(loss, argnums=(1, 2), has_aux=True))
    want = step(layer, jnp.asarray(x), weights)
    got = step(layer, jax.device_put(x, NamedSharding(mesh, P("dp"))), weights)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"a": 1, "b": 1, "c": 1}], ValueError, "row 0 has 3 adapters, ['a', 'b', 'c'], but the"),
        (["a", {"b": float("nan")}], ValueError, "row 1: the weight of 'b' must be finite in"),
        (
            [{"b": 1e39}],
            ValueError,
            "weight of 'b' must be finite in float32, got 1e+39",
        ),
        (
            [{"b": -(10**400)}],
            ValueError,
            "weight of 'b' must be finite in float32, got -1000",
        ),
        ([{"b": "1"}], TypeError, "a list of names, None and {name: weight}, got [{'b': '1'}]"),
        ([{"b": True}], TypeError, "a list of names, None and {name: weight}, got [{'b': True}]"),
        ([{1: 1.0}], TypeError, "a list of names, None and {name: weight}, got [{1: 1.0}]"),
        ({"a": 1.0}, TypeError, "a list of names, None and {name: weight}, got {'a': 1.0}"),
        ([{"b": 1, "x": 1}], KeyError, "no adapter 'x'; loaded: 'a', 'c', 'b'"),
    ],
)
def test_malformed_mixes_are_refused(rows, error, message):
    _, bank = mixing_bank(2)
    bank.batch(["b"])
    with pytest.raises(error, match=re.escape(message)):
        bank.batch(rows)


def test_what_one_adapter_per_row_cannot_do_names_the_mend():
    model, bank = make_bank()
    bank.load("a", ADAPTERS["a"])
    with pytest.raises(ValueError, match=r"'a' has weight 0.5, but .* adapters_per_row=2"):
        bank.batch([{"a": 0.5}])
    with pytest.raises(ValueError, match=r"make it with AdapterBank\(model, adapters_per_row=2\)"):
        bank.batch([{"a": 1, "b": 1}])
    with pytest.raises(ValueError, match="one adapter per row, without a weight"):
        bank.batch(["a"]).with_weights(np.ones(1))
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="adapters_per_row"):
            AdapterBank(model, adapters_per_row=wrong)
    bank.batch(["a"])  # the bank before is still the model's


@pytest.mark.parametrize(
    ("indices", "weights", "error", "message"),
    [
        (np.zeros((2, 2), int), None, ValueError, "indices must have shape [B], got [2, 2]"),
        (np.zeros(2, int), np.ones(2), ValueError, "shape [B, K] beside weights, got [2]"),
        (np.zeros((2, 2), int), np.ones((2, 1)), ValueError, "[2, 2], got [2, 1]"),
        (np.zeros((2, 2), int), np.full((2, 2), np.inf), ValueError, "row 0, column 0 is inf"),
        (np.zeros((2, 2), int), np.ones((2, 2), bool), TypeError, "real numbers, got bool"),
    ],
)
def test_malformed_batches_made_by_hand_are_refused(indices, weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        AdapterBatch(indices, weights=weights, ranges=((8, 2),))
