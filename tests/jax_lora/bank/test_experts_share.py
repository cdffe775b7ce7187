"""Experts that share A or B: layers with one of them in a slot, against copies and float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from gradient_cases import TOLERANCE
from mosaic_cases import relative_error

import jax_lora
from jax_lora import Adapter, AdapterBank, LoRAConfig, LoRAWeights, training

EXPERTS, TOP, H, N = 4, 2, 12, 8
FEATURES = {"up": (H, N), "down": (N, H)}
SHARE = {"up": "A", "down": "B"}


class Mixture(nnx.Module):
    """A mixture of experts whose router is the row's number."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = jax_lora.Experts(EXPERTS, H, N, rngs=rngs)
        self.down = jax_lora.Experts(EXPERTS, N, H, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, experts = jnp.asarray(x), jnp.asarray(chosen(len(x)))
        pairs = jax_lora.pairs_of(experts, EXPERTS, x.shape[:-1])
        y = self.down(jnp.tanh(self.up(pairs.gathered(x), pairs)), pairs)
        return pairs.summed(y, jnp.full((len(x), TOP), 0.5))


class Layers(nnx.Module):
    """Two mixtures, stacked for a scan."""

    def __init__(self) -> None:
        self.peft_names = {f"layers.{name}": f"layers.{{}}.experts.{{}}.{name}" for name in SHARE}
        self.layers = nnx.vmap(Mixture)(nnx.Rngs(0).split(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        y, _ = jax_lora.scan_layers(lambda layer, x, _: (layer(x), None), self.layers, x)
        return y


class Alone(nnx.Module):
    """One mixture."""

    def __init__(self) -> None:
        self.peft_names = {f"layer.{name}": f"layers.0.experts.{{}}.{name}" for name in SHARE}
        self.layer = Mixture(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def chosen(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(EXPERTS)[:TOP] for _ in range(rows)]).astype(np.int32)


def bank_of(shares: bool = True, model: Any = Alone, **room: Any) -> tuple[Any, AdapterBank]:
    made = model()
    options = {"slots": 2, "buckets": (8, 16), **room}
    jax_lora.apply_lora(made, experts_share=SHARE if shares else None, **options)
    return made, AdapterBank(made)


def sharing(seed: int, rank: int, layers: int = 1, like: Any = np.asarray) -> Adapter:
    """An adapter of which all experts of `up` have one A, and those of `down` one B."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Any:
        return like((rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32))

    config, modules = LoRAConfig(rank, 2.0 * rank), {}
    for layer in range(layers):
        one = {"up": random(rank, H), "down": random(H, rank)}
        for expert in range(EXPERTS):
            name = f"layers.{layer}.experts.{expert}"
            modules[f"{name}.up"] = LoRAWeights(one["up"], random(N, rank), 2.0)
            modules[f"{name}.down"] = LoRAWeights(random(rank, N), one["down"], 2.0)
    return Adapter(config, modules)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, H)).astype(np.float32)


@nnx.jit
def run(model: Any, x: np.ndarray, batch: jax_lora.AdapterBatch) -> jax.Array:
    with jax_lora.use(batch):
        return model(x)


def wanted(model: Alone, x: np.ndarray, adapters: Sequence[Adapter | None]) -> np.ndarray:
    """In float64, each row by its experts' whole weights."""
    found = np.zeros(x.shape)
    for row, (tokens, experts) in enumerate(zip(x.astype(np.float64), chosen(len(x)))):
        for expert in experts:
            y = tokens
            for name, layer in (("up", model.layer.up), ("down", model.layer.down)):
                kernel = np.asarray(layer.kernel[...], np.float64)[expert]
                if (adapter := adapters[row]) is not None:
                    own = adapter.modules[f"layers.0.experts.{expert}.{name}"]
                    a, b = (np.asarray(t, np.float64) for t in (own.a, own.b))
                    kernel = kernel + own.scale * (b @ a).T
                y = np.tanh(y @ kernel) if name == "up" else y @ kernel
            found[row] += 0.5 * y
    return found


def arrays_of(adapter: Adapter) -> dict[str, np.ndarray]:
    return {
        f"{module}.{half}": np.asarray(getattr(weights, half))
        for module, weights in adapter.modules.items()
        for half in "ab"
    }


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for name, array in arrays_of(one).items():
        np.testing.assert_array_equal(array, arrays_of(other)[name], err_msg=name)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_rows_equal_those_of_copies_and_of_whole_weights(phase: str) -> None:
    """Bit for bit, and float64's; also where a slot has had another adapter before."""
    names = ["one", None, "other", "one", "wide", "other", "wide"]
    adapters = {"one": sharing(1, 4), "other": sharing(2, 8), "wide": sharing(3, 12)}
    results = []
    for shares in (True, False):
        model, bank = bank_of(shares)
        for seed in (7, 8):
            bank.load(f"before {seed}", sharing(seed, 8))
        for name, adapter in adapters.items():
            bank.load(name, adapter)
        results.append(np.asarray(run(model, rows(7), bank.batch(names, phase=phase))))
    np.testing.assert_array_equal(*results)
    own = [None if name is None else adapters[name] for name in names]
    np.testing.assert_allclose(results[0], wanted(model, rows(7), own), rtol=1e-4, atol=1e-5)


def test_a_slot_has_one_of_what_experts_share() -> None:
    model, bank = bank_of()
    stacks = {name: getattr(model.layer, name).stacks[0] for name in SHARE}
    assert stacks["up"].lora_a.shape == (2, 8, H)
    assert stacks["up"].lora_b.shape == (2, EXPERTS * N, 8)
    assert stacks["down"].lora_a.shape == (2, EXPERTS * 8, N)
    assert stacks["down"].lora_b.shape == (2, H, 8)
    sizes = {v.nbytes for v in jax.tree.leaves(bank_of(False)[1].state)}
    assert sum(v.nbytes for v in jax.tree.leaves(bank.state)) < sum(sizes) * 3


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bits_are_those_of_copies(tmp_path: Path, dtype: str) -> None:
    adapter, results = sharing(1, 8), []
    for shares in (True, False):
        model, bank = bank_of(shares, dtype=dtype)
        bank.load("it", adapter)
        results.append(np.asarray(run(model, rows(5), bank.batch(["it", None, "it", "it", "it"]))))
        bank.save("it", tmp_path / str(shares))
        bank.load("saved", tmp_path / str(shares))  # what is shared is saved as such
        again = run(model, rows(5), bank.batch(["saved", None, "saved", "saved", "saved"]))
        np.testing.assert_allclose(again, results[-1], rtol=0.1, atol=0.1)
    np.testing.assert_array_equal(*results)


@pytest.mark.ci
def test_layers_of_a_scan_share_too() -> None:
    results = []
    for shares in (True, False):
        model, bank = bank_of(shares, Layers)
        bank.load("narrow", sharing(1, 8, layers=2))
        bank.load("wide", sharing(2, 16, layers=2))
        names = ["narrow", "wide", None, "narrow", "wide"]
        results.append(np.asarray(run(model, rows(5), bank.batch(names))))
        assert_equal(bank._adapter("wide"), sharing(2, 16, layers=2))
    np.testing.assert_array_equal(*results)


@nnx.jit
def gradients_of(
    model: Alone, x: np.ndarray, dy: np.ndarray, batch: jax_lora.AdapterBatch
) -> nnx.State:
    def total(model: Alone) -> jax.Array:
        with jax_lora.use(batch):
            return jnp.sum(model(x) * dy)

    found: nnx.State = nnx.grad(total, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    return found


@pytest.mark.ci
def test_gradients_are_the_sums_of_those_of_copies() -> None:
    """And those of float64, for B of `down`, which is linear in it."""
    names = ["one", "other", None, "one", "one", "other"]
    adapters = {"one": sharing(1, 8), "other": sharing(2, 8)}
    x, dy = rows(6), np.random.default_rng(2).normal(size=(6, H)).astype(np.float32)
    gradients = []
    for shares in (True, False):
        model, bank = bank_of(shares, buckets=(8,))
        for name, adapter in adapters.items():
            bank.load(name, adapter)
        found = gradients_of(model, x, dy, bank.batch(names, phase="prefill"))
        flat = nnx.to_flat_state(found)
        gradients.append({path: np.asarray(v.get_value(), np.float64) for path, v in flat})
    for path, got in gradients[0].items():
        each = gradients[1][path].reshape(len(got), -1, *got.shape[1:])
        assert relative_error(got, np.sum(each, axis=1)) < TOLERANCE["float32"], path
    of_b, pairs = np.zeros((2, H, 8)), chosen(6)
    kernels = np.asarray(model.layer.up.kernel[...], np.float64)
    for row, name in enumerate(names):
        for expert in pairs[row] if name else ():
            modules = adapters[name].modules
            up, down = (modules[f"layers.0.experts.{expert}.{of}"] for of in SHARE)
            whole = kernels[expert] + up.scale * (np.float64(up.b) @ up.a).T
            v = 0.5 * down.scale * down.a @ np.tanh(x[row] @ whole)
            of_b[[*adapters].index(name)] += np.outer(dy[row], v)
    got = gradients[0]["layer", "down", "stacks", 0, "lora_b"]
    assert relative_error(got, of_b) < TOLERANCE["float32"]


@pytest.mark.ci
def test_training_moves_one_half_for_all_experts(tmp_path: Path) -> None:
    """From a new adapter on; and what is saved is loaded again."""
    model, bank = bank_of(slots=3, buckets=(8,))
    bank.create("new", LoRAConfig(4, 8), rngs=nnx.Rngs(0))
    bank.load("still", sharing(1, 8))
    start = bank._adapter("new")
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    tx = training.per_adapter(optax.adamw(0.02))

    @jax.jit
    def step(lora: nnx.State, state: Any, batch: Any, trainees: Any) -> Any:
        def loss(lora: nnx.State) -> jax.Array:
            with jax_lora.use(batch):
                return jnp.sum((nnx.merge(graphdef, lora, rest)(rows(3)) - 1) ** 2)

        value, gradients = jax.value_and_grad(loss)(lora)
        with jax.numpy_dtype_promotion("standard"):  # optax is not strict
            moves, state = tx.update(gradients, state, lora, trainees=trainees)
        return value, optax.apply_updates(lora, moves), state

    state, losses = tx.init(lora), []
    given = bank.batch(["new", "new", "still"], phase="prefill"), bank.trainees(["new"])
    for _ in range(3):
        value, lora, state = step(lora, state, *given)
        losses.append(float(value))
    nnx.update(model, lora)
    assert losses[0] > losses[1] > losses[2]
    trained = bank._adapter("new")
    for expert in range(EXPERTS):
        up, down = (trained.modules[f"layers.0.experts.{expert}.{name}"] for name in SHARE)
        assert up.a is trained.modules["layers.0.experts.0.up"].a
        assert down.b is trained.modules["layers.0.experts.0.down"].b
    assert (trained.modules["layers.0.experts.0.up"].a != 0).any()
    assert any((a != arrays_of(start)[name]).any() for name, a in arrays_of(trained).items())
    assert_equal(bank._adapter("still"), sharing(1, 8))
    bank.save("new", tmp_path)
    bank.load("again", tmp_path)
    assert_equal(bank._adapter("again"), trained)


def test_adapters_go_through_a_bank_unchanged(tmp_path: Path) -> None:
    """By a folder, from the device, a copy, a checkpoint, and folded into the kernels."""
    adapter = sharing(1, 8)
    model, bank = bank_of()
    bank.load("it", adapter)
    bank.save("it", tmp_path / "saved")
    saved = jax_lora.load_peft(tmp_path / "saved")
    assert_equal(saved, adapter)
    assert saved.header.shared == adapter.header.shared
    bank.load("device", sharing(1, 8, like=jnp.asarray), replace=True)
    assert_equal(bank._adapter("device"), adapter)
    bank.publish("copy", "device")
    assert_equal(bank._adapter("copy"), adapter)
    other, others = bank_of(buckets=(16,))
    others.publish("copy", "copy", bank=bank)
    assert_equal(others._adapter("copy"), adapter)
    bank.save_checkpoint(tmp_path / "checkpoint")
    _, again = bank_of()
    again.restore_checkpoint(tmp_path / "checkpoint")
    assert_equal(again._adapter("copy"), adapter)
    nnx.update(other, others.merge("copy"))
    alone = run(other, rows(4), others.batch([None] * 4))
    np.testing.assert_allclose(alone, wanted(model, rows(4), [adapter] * 4), rtol=1e-4, atol=1e-5)


def test_some_experts_may_have_no_adapter() -> None:
    whole = sharing(1, 8)
    some = {m: w for m, w in whole.modules.items() if ".experts.2." not in m}
    model, bank = bank_of()
    bank.load("some", Adapter(whole.config, some))
    zero = {
        m: w if m in some else LoRAWeights(np.zeros_like(w.a), np.zeros_like(w.b), w.scale)
        for m, w in whole.modules.items()
    }
    got = run(model, rows(6), bank.batch(["some"] * 6))
    own = [Adapter(whole.config, zero)] * 6
    np.testing.assert_allclose(got, wanted(model, rows(6), own), rtol=1e-4, atol=1e-5)


def changed(adapter: Adapter, module: str, **halves: np.ndarray) -> dict[str, LoRAWeights]:
    own = adapter.modules[module]
    new = LoRAWeights(halves.get("a", own.a), halves.get("b", own.b), own.scale)
    return {**adapter.modules, module: new}


def test_copies_are_taken_if_they_are_equal() -> None:
    adapter = sharing(1, 8)
    modules = {m: LoRAWeights(w.a.copy(), w.b.copy(), w.scale) for m, w in adapter.modules.items()}
    _, bank = bank_of()
    bank.load("copies", Adapter(adapter.config, modules))
    assert_equal(bank._adapter("copies"), adapter)


@pytest.mark.parametrize(("name", "half", "shape"), [("up", "a", (8, 12)), ("down", "b", (12, 8))])
@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
def test_adapters_that_do_not_share_are_refused(
    name: str, half: str, shape: tuple[int, int], like: Any
) -> None:
    adapter, module = sharing(1, 8, like=like), f"layers.0.experts.2.{name}"
    modules = changed(adapter, module, **{half: like(np.ones(shape, np.float32))})
    _, bank = bank_of()
    bank.load("before", sharing(2, 8))
    start = jax.tree.map(np.array, bank.state)
    first = f"'layers.0.experts.0.{name}' {[*shape]}".replace("[", r"\[").replace("]", r"\]")
    message = rf"lora_{half.upper()} of {first} and '{module}' \[{shape[0]}, {shape[1]}\] differ"
    with pytest.raises(ValueError, match=message):
        bank.load("it", Adapter(adapter.config, modules))
    assert bank.names == ("before",)
    jax.tree.map(np.testing.assert_array_equal, bank.state, start)


def test_ranks_of_experts_that_share_are_one() -> None:
    """Which files say before their weights are read."""
    config = LoRAConfig(8, 16, rank_pattern={r"experts\.1\.up": 4})
    _, bank = bank_of()
    with pytest.raises(ValueError, match=r"0.up' \[8, 12\] and '.*1.up' \[4, 12\] differ"):
        bank.create("new", config, rngs=nnx.Rngs(0))
    assert bank.names == ()


def test_models_that_share_otherwise_are_others(tmp_path: Path) -> None:
    (_, bank), (_, copies) = bank_of(), bank_of(False)
    bank.load("it", sharing(1, 8))
    with pytest.raises(ValueError, match=r"experts\.0\.down: share B there, none here"):
        copies.publish("it", "it", bank=bank)
    bank.save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"experts of layer\.down: share B there, none here"):
        copies.restore_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        ({"up": "C"}, ValueError, r"experts_share\['up'\] must be \"A\" or \"B\", got 'C'"),
        ({"up": "A", r"layer\.up": "B"}, ValueError, "gives layer.up both halves"),
        ({"down": "B"}, TypeError, "matches no experts that have room for LoRA; these have: layer"),
        ({"sideways": "A"}, ValueError, "no layer matches experts_share's key 'sideways'; linear"),
        ({5: "A"}, TypeError, "experts_share's key 5 must be a regular expression"),
        ("A", TypeError, "experts_share must map expressions to"),
        ("", TypeError, 'experts_share must map expressions to "A" or "B", got \'\''),
    ],
)
def test_other_arguments_are_refused(share: Any, error: type[Exception], message: str) -> None:
    model = Alone()
    with pytest.raises(error, match=message):
        jax_lora.apply_lora(model, slots=2, buckets=(8,), target="up", experts_share=share)
    assert type(model.layer.up) is jax_lora.Experts


def test_all_experts_have_the_rank_that_training_gave_to_one(tmp_path: Path) -> None:
    """A column behind the adapter's rank is live in one expert's B, and in the A of all."""
    model, bank = bank_of(buckets=(8,))
    bank.load("it", sharing(1, 4))
    stack = model.layer.up.stacks[0]
    stack.lora_a.set_value(stack.lora_a[...].at[:, 6].set(1.0))
    stack.lora_b.set_value(stack.lora_b[...].at[:, N : 2 * N, 6].set(1.0))
    ranks = {module: weights.rank for module, weights in bank._adapter("it").modules.items()}
    assert ranks == {module: 7 if module.endswith("up") else 4 for module in ranks}
    before = run(model, rows(5), bank.batch(["it"] * 5))
    bank.save("it", tmp_path)
    bank.load("again", tmp_path)
    np.testing.assert_array_equal(run(model, rows(5), bank.batch(["again"] * 5)), before)
