"""`per_adapter`: an optimizer's state belongs to an adapter, whoever shares its step or slot."""

import jax
import jax.monitoring
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import Mlp, make_adapter
from torch_mlp import peft_run
from training_run import ADAMW, CONFIGS, ROWS, ROWS_OF, TARGETS, Run, X, assert_same

from jax_lora import AdapterBank, LoRAConfig, apply_lora, load_peft, scan_layers, use
from jax_lora.bank.trainees import Turns
from jax_lora.training import Trainees, load_state, per_adapter, save_state
from jax_lora.training.stacks import Stacks


def assert_is_pefts(folder, name, run, steps, rate, clip, tmp_path):
    """What was trained is what PEFT trains alone, from what is in `folder`."""
    torch_run = peft_run(
        run.model,
        folder,
        lambda p: torch.optim.AdamW(p, rate, weight_decay=0.1),
        steps,
        X[ROWS_OF[name]],
        TARGETS[ROWS_OF[name]],
        clip,
    )
    torch_run.save_pretrained(tmp_path / f"{name} peft")
    right, before = (load_peft(f).modules for f in (tmp_path / f"{name} peft", folder))
    got = run.bank._adapter(name).modules
    for module in right:
        np.testing.assert_allclose(got[module].a, right[module].a, atol=1e-5, rtol=0)
        np.testing.assert_allclose(got[module].b, right[module].b, atol=1e-5, rtol=0)
        assert np.abs(got[module].b - before[module].b).max() > 1e-2


@pytest.mark.ci
def test_adapters_that_join_and_leave_train_as_alone_with_peft(tmp_path):
    """20 steps each, in one slot after another adapter, with pauses, rates and clipping."""
    run = Run(ADAMW)
    run.create("first", "second")
    run.train(3, ["second"])
    run.bank.unload("second")  # its slot, and its state, are there for the next
    run.bank.create("second", CONFIGS["second"], rngs=nnx.Rngs(9))
    for name in ("first", "second"):
        run.bank.save(name, tmp_path / name)
    rates = {"second": 0.5}
    run.train(4, ["first"])
    run.train(6, ["first", "second"], rates)
    run.create("third")
    run.bank.save("third", tmp_path / "third")
    run.train(3, ["third", "second"], rates)
    run.train(4, ["second", "first"], rates, beside=["third"])
    run.train(6, ["third", "first"])
    run.train(7, ["third", "second"], rates)
    run.train(4, ["third"], beside=["first"])
    assert run.traces == 1
    for name, rate in (("first", 0.02), ("second", 0.01), ("third", 0.02)):
        assert_is_pefts(tmp_path / name, name, run, 20, rate, 0.2, tmp_path)


@pytest.mark.ci
def test_a_new_adapter_in_a_used_slot_starts_with_a_new_state():
    fresh, used = Run(optax.adam(0.02)), Run(optax.adam(0.02))
    used.create("first")
    used.train(5, ["first"])
    used.bank.unload("first")
    for run in (fresh, used):
        run.create("first")
        run.train(3, ["first"])
    assert_same(used.weights("first"), fresh.weights("first"))


# Each takes something over a whole tree or array: a norm, a factor, a maximum.
COUPLING = {
    "clip_by_global_norm": ADAMW,
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4),
    "lamb": optax.lamb(0.01),
    "novograd": optax.novograd(0.01),
    "fromage": optax.fromage(0.01),
    "sm3": optax.sm3(0.01),
    "yogi": optax.yogi(0.01),
    "accumulated": optax.MultiSteps(ADAMW, 2).gradient_transformation(),
    "schedule": optax.adam(optax.linear_schedule(0.02, 0.0, 3)),
}
SHAPES = {"up.0.lora_a": (8, 4), "up.0.lora_b": (6, 8), "down.0.lora_a": (8, 6)}


def stacks_of(seed, slots=3):
    """Parameters or gradients of `slots` slots, as a model has them."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        layer, _, half = name.split(".")
        stack = tree.setdefault(layer, {"stacks": {0: {}}})["stacks"][0]
        stack[half] = rng.normal(size=(slots, *shape)).astype(np.float32)
    return tree


def slot_of(tree, slot):
    return {
        name: tree[layer]["stacks"][0][half][slot]
        for name in SHAPES
        for layer, _, half in [name.split(".")]
    }


def assert_trees_close(got, right, rtol):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


@pytest.mark.ci
@pytest.mark.parametrize("tx", COUPLING.values(), ids=COUPLING)
def test_an_adapter_gets_what_the_optimizer_gives_it_alone(tx):
    """And the same bits whatever its neighbours' gradients; one that rests keeps its state."""
    own = per_adapter(tx)
    update, alone = jax.jit(own.update), jax.jit(tx.update)
    params, turns = stacks_of(0), [(4, 0, 9), (4, 7, 0), (4, 7, 9), (4, 0, 9)]
    state, noisy, right = own.init(params), own.init(params), tx.init(slot_of(params, 0))
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        for step, serials in enumerate(turns):
            rates = np.array([1, 0.5, 2], np.float32)
            trainees = Trainees({8: Turns(np.array(serials, np.int32), rates)})
            gradients, before = stacks_of(step + 1), state
            moves, state = update(gradients, state, params, trainees=trainees)
            expected, right = alone(slot_of(gradients, 0), right, slot_of(params, 0))
            assert_trees_close(slot_of(moves, 0), expected, 1e-6)
            assert_trees_close(jax.tree.map(lambda leaf: leaf[0], state.inner[8]), right, 1e-6)
            resting = serials.index(0) if 0 in serials else None
            if resting is not None:
                assert not any(move.any() for move in slot_of(moves, resting).values())
                for old, new in zip(*(jax.tree.leaves(s.inner[8]) for s in (before, state))):
                    np.testing.assert_array_equal(old[resting], new[resting])
            for leaf in jax.tree.leaves(gradients):
                leaf[1:] *= np.float32(1e6 * (step + 1))
            others, noisy = update(gradients, noisy, params, trainees=trainees)
            assert_same(slot_of(others, 0), slot_of(moves, 0))


def test_nothing_compiles_when_adapters_join_and_leave():
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    run = Run(ADAMW)
    run.create("first", "second")
    run.train(2, ["first", "second"])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run.create("third")
        run.train(1, ["third", "first"], {"first": 0.1})
        run.bank.unload("second")
        run.bank.load("second", make_adapter(3, 5))
        run.train(1, ["second"], beside=["third"])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


class Stacked(nnx.Module):
    """Two layers stacked for a scan."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Mlp)(rngs.split(2))

    def __call__(self, x):
        return scan_layers(lambda layer, x, _: (layer(x), None), self.layers, x)[0]


class Unrolled(nnx.Module):
    """The same layers, one by one."""

    def __init__(self, layers):
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.ci
def test_layers_stacked_for_a_scan_train_as_layers_alone():
    stacked = Stacked(nnx.Rngs(0))
    graphdef, state = nnx.split(stacked.layers)
    layers = [nnx.merge(graphdef, jax.tree.map(lambda a, n=n: a[n], state)) for n in (0, 1)]
    stacked, alone = Run(ADAMW, stacked), Run(ADAMW, Unrolled(layers))
    for run in (stacked, alone):
        run.create("first", "third")
    for name in ("first", "third"):
        stacked.bank.load(name, alone.bank._adapter(name), replace=True)
    for run in (stacked, alone):
        run.train(3, ["first"])
        run.train(3, ["third", "first"])
    for name in ("first", "third"):
        got, right = stacked.weights(name), alone.weights(name)
        assert set(got) == set(right) and len(got) == 8
        for path in right:
            np.testing.assert_allclose(got[path], right[path], atol=1e-5)


def test_moments_of_stacked_layers_have_the_slots_where_the_stacks_have_them(tmp_path):
    """Else each step would transpose them all. A file has one slot of them, whoever reads it."""
    run, other = (Run(ADAMW, Stacked(nnx.Rngs(0))) for _ in range(2))
    run.create("first", "third")
    run.train(2, ["first", "third"])
    stacks = Stacks.of(nnx.state(run.model, nnx.LoRAParam))
    for bucket, arrays in stacks.split(nnx.state(run.model, nnx.LoRAParam)).items():
        _, (adam, *_) = run.state.inner[bucket]
        for moments in (adam.mu, adam.nu):
            assert {n: m.shape for n, m in moments.items()} == {
                n: a.shape for n, a in arrays.items()
            }
    other.bank.create("before", CONFIGS["first"], rngs=nnx.Rngs(0))
    run.bank.save("first", tmp_path)
    other.bank.load("first", tmp_path)
    save_state(run.state, run.bank, "first", tmp_path / "state")
    other.state = load_state(other.state, other.bank, "first", tmp_path / "state")
    for one in (run, other):
        one.train(2, ["first"])
    assert_same(other.weights("first"), run.weights("first"))


@pytest.mark.ci
def test_the_optimizer_of_flax_in_a_jitted_step_with_donation():
    plain = Run(ADAMW)
    other = Run(ADAMW)
    optimizer = nnx.Optimizer(other.model, per_adapter(ADAMW), wrt=nnx.LoRAParam)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, batch, trainees, weights):
        def loss(model):
            with use(batch):
                y = model(X)
            return (((y - TARGETS) ** 2).mean(-1) * weights).sum()

        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients, trainees=trainees)

    for run in (plain, other):
        run.create("first", "second")
    for names in (["first", "second"], ["second"]):
        plain.train(2, names)
        rows, weights = [None] * ROWS, np.zeros(ROWS, np.float32)
        for name in names:
            for row in ROWS_OF[name]:
                rows[row], weights[row] = name, 1 / len(ROWS_OF[name])
        batch, trainees = other.bank.batch(rows), other.bank.trainees(names)
        for _ in range(2):
            step(other.model, optimizer, batch, trainees, weights)
    for name in ("first", "second"):
        got, right = other.weights(name), plain.weights(name)
        for path in right:
            np.testing.assert_allclose(got[path], right[path], atol=1e-6)
    assert int(optimizer.step[...]) == 4


@pytest.mark.ci
def test_a_model_on_a_mesh_trains_and_publishes_as_one_on_a_device():
    mesh = jax.make_mesh((2,), ("tp",))

    def trained(model):
        apply_lora(model, slots=2, buckets=(8,))
        bank = AdapterBank(model)
        bank.create("first", CONFIGS["first"], rngs=nnx.Rngs(5))
        optimizer = nnx.Optimizer(model, per_adapter(ADAMW), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, batch, trainees):
            def loss(model):
                with use(batch):
                    return ((model(X) - TARGETS) ** 2).mean()

            gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
            with jax.numpy_dtype_promotion("standard"):
                optimizer.update(model, gradients, trainees=trainees)

        batch, trainees = bank.batch(["first"] * ROWS), bank.trainees(["first"])
        for _ in range(3):
            step(model, optimizer, batch, trainees)
        bank.publish("served", "first")
        return bank._adapter("served").modules, optimizer

    divided = Mlp(nnx.Rngs(0))
    for layer, spec in ((divided.up, (None, "tp")), (divided.down, ("tp", None))):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        layer.kernel.set_value(jax.device_put(layer.kernel[...], sharding))
        bias = NamedSharding(mesh, PartitionSpec(spec[1]))
        layer.bias.set_value(jax.device_put(layer.bias[...], bias))
    with jax.set_mesh(mesh):
        got, optimizer = trained(divided)
    right, _ = trained(Mlp(nnx.Rngs(0)))
    for module, weights in right.items():
        np.testing.assert_allclose(got[module].a, weights.a, atol=1e-5)
        np.testing.assert_allclose(got[module].b, weights.b, atol=1e-5)
        assert weights.b.any()
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(optimizer.opt_state)}
    assert PartitionSpec(None, "tp", None) in specs  # of B's moments


def test_a_function_of_names_tells_a_from_b():
    rates = {"a": optax.sgd(0.0), "b": optax.sgd(0.5)}
    run = Run(optax.multi_transform(rates, lambda params: {n: n[-1] for n in params}))
    run.create("first")
    before = run.weights("first")
    run.train(1, ["first"])
    for (module, half), now in run.weights("first").items():
        assert (now != before[module, half]).any() == (half == "b")


def test_trainees_keep_their_slots():
    run = Run(optax.sgd(0.1))
    run.create("first", "second")
    trainees = run.bank.trainees(["first"])
    run.bank.create("third", LoRAConfig(8, 8), rngs=nnx.Rngs(0))
    assert run.bank.names == ("first", "third")
    run.bank.create("fourth", LoRAConfig(8, 8), rngs=nnx.Rngs(0))
    assert run.bank.names == ("first", "fourth")
    del trainees
    run.bank.create("fifth", LoRAConfig(8, 8), rngs=nnx.Rngs(0))
    assert run.bank.names == ("fourth", "fifth")


def test_mistakes_are_told():
    run = Run(optax.sgd(0.1))
    run.create("first")
    bank = run.bank
    with pytest.raises(KeyError, match="no adapter 'nobody'"):
        bank.trainees(["nobody"])
    with pytest.raises(TypeError, match="names must be a list of adapters' names, got 'first'"):
        bank.trainees("first")
    with pytest.raises(ValueError, match=r"rates names \['second'\], which the step does not"):
        bank.trainees(["first"], {"second": 1.0})
    with pytest.raises(ValueError, match="rate of 'first' must be finite in float32, got nan"):
        bank.trainees(["first"], {"first": float("nan")})
    with pytest.raises(ValueError, match=r"rate of 'first' must be finite in float32, got 1e\+39"):
        bank.trainees(["first"], {"first": 1e39})
    with pytest.raises(TypeError, match="rate of 'first' must be a number, got 'fast'"):
        bank.trainees(["first"], {"first": "fast"})
    with pytest.raises(TypeError, match="rates must map names to numbers, got 2"):
        bank.trainees(["first"], 2)
    with pytest.raises(TypeError, match="per_adapter takes an optax transformation, got 3"):
        per_adapter(3)
    _, lora, _ = nnx.split(run.model, nnx.LoRAParam, ...)
    update = run.tx.update
    with pytest.raises(TypeError, match=r"update needs trainees=.* got None"):
        update(lora, run.state, lora)
    with pytest.raises(TypeError, match="takes no value: it would be that of all adapters"):
        update(lora, run.state, lora, trainees=bank.trainees(["first"]), value=1.0)
    with pytest.raises(ValueError, match="update needs the parameters"):
        update(lora, run.state, trainees=bank.trainees(["first"]))
    other = Mlp(nnx.Rngs(0))
    apply_lora(other, slots=3, buckets=(8, 16))
    with pytest.raises(ValueError, match=r"slots \{8: 3, 16: 3\}, but the parameters have \{8: 2"):
        update(lora, run.state, lora, trainees=AdapterBank(other).trainees([]))
    with pytest.raises(ValueError, match=r"down\.bias.* is no stack of adapters"):
        run.tx.init(nnx.state(run.model, nnx.Param))
