"""Several adapters trained in one step on one mixed batch, against one PEFT run for each."""

import functools

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from marks import spread
from tiny import Mlp, expected, forward, make_adapter, tokens
from torch_mlp import TorchMlp, peft_run

import jax_lora
from jax_lora import AdapterBank, LoRAConfig, apply_lora, load_peft, use

ROWS = 10
NAMES = ["small", "large", None, "small", "large", "large", None, "small", "large", "small"]
CONFIGS = {
    "small": LoRAConfig(3, 6),
    "large": LoRAConfig(12, 5, rslora=True, rank_pattern={"up": 9}),
}
X = tokens(ROWS, seed=1)
TARGETS = tokens(ROWS, seed=2)


@pytest.fixture
def pair():
    """A model with room for both, and a bystander in each of their buckets."""
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=3, buckets=(8, 16))
    bank = AdapterBank(model)
    bank.load("bystander 8", make_adapter(1, 8))
    bank.load("bystander 16", make_adapter(2, 16))
    for name, config in CONFIGS.items():
        bank.create(name, config, rngs=nnx.Rngs(len(name)))
    return model, bank


def randomize(bank):
    """Other weights for both, B too: PEFT starts at B = 0, where A has no gradient."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        options = {"rslora": config.rslora, "rank_pattern": config.rank_pattern}
        adapter = make_adapter(seed + 5, config.rank, alpha=config.alpha, **options)
        bank.load(name, adapter, replace=True)


def loss_of(y, targets):
    """Each adapter's own mean loss, summed, so that none depends on the others' rows."""
    error = ((y - targets) ** 2).mean(-1)
    rows = [[n for n, other in enumerate(NAMES) if other == name] for name in CONFIGS]
    return sum(error[np.array(row)].mean() for row in rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(graphdef, tx, lora, opt_state, rest, batch):
    """nnx.split, jax.grad and optax, as in a loop over pure arrays."""

    def loss(lora):
        with use(batch):
            return loss_of(nnx.merge(graphdef, lora, rest)(X), TARGETS)

    value, grads = jax.value_and_grad(loss)(lora)
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        updates, opt_state = tx.update(grads, opt_state, lora)
    return value, grads, optax.apply_updates(lora, updates), opt_state


def train(model, batch, tx, steps):
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    opt_state, losses = tx.init(lora), []
    for _ in range(steps):
        value, grads, lora, opt_state = train_step(graphdef, tx, lora, opt_state, rest, batch)
        losses.append(float(value))
    nnx.update(model, lora)
    return losses, grads


def slots_of(state, bank, name):
    """Every array of an adapter's slot, at its whole padded rank."""
    bucket, slot = bank.bucket(name), bank._entry(name).slot
    return {
        path: np.asarray(leaf[...])[slot]
        for path, leaf in nnx.to_flat_state(state)
        if bucket in leaf.shape and path[-1] != "scales"
    }


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "adam": (optax.adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": (
        optax.adamw(0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ),
}


@pytest.mark.ci
@pytest.mark.parametrize(("start", "steps"), [("elsewhere", 1), ("as created", 3)])
@pytest.mark.parametrize(("optimizer", "phase"), spread(OPTIMIZERS, ["decode", "prefill"]))
def test_one_mixed_step_equals_two_peft_runs(pair, tmp_path, optimizer, phase, steps, start):
    model, bank = pair
    if start == "elsewhere":
        randomize(bank)
    tx, torch_tx = OPTIMIZERS[optimizer]
    for name in CONFIGS:
        bank.save(name, tmp_path / f"{name} before")
    train(model, bank.batch(NAMES, phase=phase), tx, steps)
    for name in CONFIGS:
        rows = [n for n, other in enumerate(NAMES) if other == name]
        folder = tmp_path / f"{name} before"
        run = peft_run(model, folder, torch_tx, steps, X[rows], TARGETS[rows])
        run.save_pretrained(tmp_path / f"{name} peft")
        bank.save(name, tmp_path / f"{name} after")
        got, right, before = (
            load_peft(tmp_path / f"{name} {what}").modules for what in ("after", "peft", "before")
        )
        assert set(got) == set(right) == {"up", "down"}
        for module in right:
            np.testing.assert_allclose(got[module].a, right[module].a, atol=1e-5)
            np.testing.assert_allclose(got[module].b, right[module].b, atol=1e-5)
            assert np.abs(got[module].b - before[module].b).max() > 1e-3


@pytest.mark.ci
@pytest.mark.parametrize(("optimizer", "phase"), spread(OPTIMIZERS, ["decode", "prefill"]))
def test_absent_adapters_have_zero_gradient_and_padding_stays_zero(pair, optimizer, phase):
    model, bank = pair
    randomize(bank)
    before = {name: slots_of(bank.state, bank, name) for name in bank.names}
    _, grads = train(model, bank.batch(NAMES, phase=phase), OPTIMIZERS[optimizer][0], 3)
    for name in bank.names:
        gradient, after = slots_of(grads, bank, name), slots_of(bank.state, bank, name)
        for path, old in before[name].items():
            if name.startswith("bystander"):
                assert not gradient[path].any()
                if optimizer != "adamw":  # which decays what has no gradient, too
                    np.testing.assert_array_equal(after[path], old)
                continue
            rank = CONFIGS[name].rank_of(path[0])
            axis = 0 if path[-1] == "lora_a" else 1
            assert np.take(gradient[path], range(rank), axis).all()
            assert not np.take(gradient[path], range(rank, bank.bucket(name)), axis).any()
            assert not np.take(after[path], range(rank, bank.bucket(name)), axis).any()


@pytest.mark.ci
def test_adapters_of_different_ranks_learn_different_things(pair):
    """Both fit their own rows in one run, and the base rows stay."""
    model, bank = pair
    base = forward(model, X)
    losses, _ = train(model, bank.batch(NAMES), OPTIMIZERS["adam"][0], 600)
    assert losses[-1] < 0.1 * losses[0]
    y = forward(model, X, bank.batch(NAMES))
    is_base = np.array([name is None for name in NAMES])
    np.testing.assert_array_equal(y[is_base], base[is_base])
    swapped = [{"small": "large", "large": "small"}.get(name) for name in NAMES]
    wrong = forward(model, X, bank.batch(swapped))
    error, wrong_error = (np.abs(out - TARGETS)[~is_base].mean() for out in (y, wrong))
    assert error < 0.5 * wrong_error


@pytest.mark.ci
def test_the_optimizer_of_flax_trains_the_same(pair):
    model, bank = pair
    other = nnx.clone(model)
    train(model, bank.batch(NAMES), OPTIMIZERS["adam"][0], 2)
    optimizer = nnx.Optimizer(other, optax.adam(0.01), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            with use(batch):
                return loss_of(model(X), TARGETS)

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)

    batch = bank.batch(NAMES)
    for _ in range(2):
        step(other, optimizer, batch)
    for mine, theirs in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, other))
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.ci
def test_a_created_adapter_starts_as_pefts(pair, optimised):
    model, bank = pair
    rows = ["small", None, "large"]
    y = forward(model, X[:3], bank.batch(rows))
    np.testing.assert_array_equal(y, forward(model, X[:3]))
    bank.create("uniform", LoRAConfig(16, 16, target_modules=("up",)), rngs=nnx.Rngs(7))
    (weights,) = bank._adapter("uniform").modules.values()
    bound = 1 / np.sqrt(4)  # kaiming uniform with a = sqrt(5): 1 / sqrt(H)
    assert 0.8 * bound < np.abs(weights.a).max() <= bound
    assert abs(weights.a.mean()) < 0.3 * bound and not weights.b.any()
    bank.create("again", LoRAConfig(16, 16, target_modules=("up",)), rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(bank._adapter("again").modules["up"].a, weights.a)
    bank.create("other", LoRAConfig(16, 16), rngs=nnx.Rngs(8))
    assert (bank._adapter("other").modules["up"].a != weights.a).any()


def test_what_was_trained_is_read_by_peft(pair, tmp_path):
    model, bank = pair
    train(model, bank.batch(NAMES), OPTIMIZERS["adam"][0], 40)
    for name in CONFIGS:
        bank.save(name, tmp_path / name)
        run = peft.PeftModel.from_pretrained(TorchMlp(model), tmp_path / name)
        with torch.no_grad():
            right = run(torch.tensor(X)).numpy()
        mine = forward(model, X, bank.batch([name] * ROWS))
        np.testing.assert_allclose(mine, right, atol=1e-5)
        assert np.abs(mine - forward(model, X)).max() > 0.1


def test_training_goes_on_over_loads(pair):
    """Another tenant arrives between two steps: neither sees the other."""
    model, bank = pair
    batch = bank.batch(NAMES)
    train(model, batch, OPTIMIZERS["sgd"][0], 1)
    held = {name: slots_of(bank.state, bank, name) for name in CONFIGS}
    stranger = make_adapter(9, 7)
    bank.load("stranger", stranger)
    for name, old in held.items():
        for path, now in slots_of(bank.state, bank, name).items():
            np.testing.assert_array_equal(now, old[path])
    train(model, batch, OPTIMIZERS["sgd"][0], 1)
    np.testing.assert_array_equal(
        bank._adapter("stranger").modules["up"].a, stranger.modules["up"].a
    )


def test_stacks_are_what_nnx_calls_lora_params(pair):
    model, _ = pair
    state = nnx.to_flat_state(nnx.state(model))
    assert {type(v) for path, v in state if "stacks" in path} == {nnx.LoRAParam}
    assert {type(v) for path, v in state if path[-1] == "scales"} == {jax_lora.LoRAScale}


@pytest.mark.ci
@pytest.mark.parametrize(
    "tx", [optax.yogi(1e-2), optax.noisy_sgd(5e-2, key=0)], ids=["yogi", "noisy_sgd"]
)
def test_what_moves_without_gradient_is_saved_and_merged_as_it_computes(pair, tmp_path, tx):
    """These optimizers fill the columns behind an adapter's rank, which then count."""
    model, bank = pair
    train(model, bank.batch(NAMES), tx, 25)
    for name, config in CONFIGS.items():
        live = forward(model, X, bank.batch([name] * ROWS))
        bank.save(name, tmp_path / name)
        saved = load_peft(tmp_path / name)
        assert saved.rank == bank.bucket(name) and saved.config.rslora == config.rslora
        plain = Mlp(nnx.Rngs(0))
        np.testing.assert_allclose(live, expected(plain, X, [saved] * ROWS), atol=2e-5)
        nnx.update(plain, bank.merge(name))
        np.testing.assert_allclose(plain(X), live, atol=2e-5)
        assert bank.config(name) == config
