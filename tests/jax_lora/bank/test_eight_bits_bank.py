"""Stacks in 8 bits: what a bank loads, says, refuses, saves and merges."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FEATURES, Mlp, expected, filled_with, forward, make_adapter, make_bank, tokens

import jax_lora
from jax_lora import (
    Adapter,
    AdapterBank,
    LoRAConfig,
    LoRAWeights,
    apply_lora,
    load_peft,
    plan_slots,
    scan_layers,
)
from jax_lora.bank.eight_bits import error_of, in_eight_bits
from jax_lora.inspection import EightBitsReport, inspect_adapter
from pallas_kernels.eight_bits import quantised

NAMES = ["one", None, "two", "one"]


@pytest.fixture(params=["float8_e4m3fn", "int8"])
def eight(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(bank: AdapterBank, name: str, folder: Path) -> Adapter:
    """What a bank saves of an adapter."""
    bank.save(name, folder / name)
    return load_peft(folder / name)


def test_rows_compute_what_is_saved(tmp_path: Path, eight: str) -> None:
    model, bank = make_bank(dtype=eight)
    given = {"one": make_adapter(1, 3), "two": make_adapter(2, 16, rslora=True)}
    errors = {name: bank.load(name, adapter) for name, adapter in given.items()}
    stacks = [variable for stack in model.up.stacks for variable in stack.variables]
    assert {variable.dtype for variable in stacks} == {jnp.dtype(eight)}
    x = tokens(4)
    out = forward(model, x, bank.batch(NAMES))
    held = {name: saved(bank, name, tmp_path) for name in given}
    want = expected(model, x, [held.get(name) for name in NAMES])
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    exact = expected(model, x, [given.get(name) for name in NAMES])
    assert 1e-4 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.1
    for name, adapter in given.items():
        assert held[name].config.rank == adapter.config.rank
        assert 0.001 < errors[name] < 0.1
        for module, own in adapter.modules.items():
            delta = np.float64(own.b) @ np.float64(own.a)
            stored = held[name].modules[module]
            found = np.linalg.norm(np.float64(stored.b) @ np.float64(stored.a) - delta)
            assert found / np.linalg.norm(delta) <= errors[name] * 1.001


def test_what_is_saved_has_the_same_bytes_again(tmp_path: Path, eight: str) -> None:
    _, bank = make_bank(dtype=eight)
    bank.load("one", make_adapter(1, 3))
    first = saved(bank, "one", tmp_path)
    error = bank.load("again", first)
    assert error is not None and error < 1e-6
    before, after = (bank.state["up"]["stacks"][0]["lora_a"].get_value()[n] for n in (0, 1))
    np.testing.assert_array_equal(np.asarray(before, np.float32), np.asarray(after, np.float32))


def test_merged_weights_compute_the_same(tmp_path: Path, eight: str) -> None:
    model, bank = make_bank(dtype=eight)
    bank.load("one", make_adapter(1, 3))
    plain, x = Mlp(nnx.Rngs(0)), tokens(3)
    nnx.update(plain, bank.merge("one"))
    np.testing.assert_allclose(
        plain(x), forward(model, x, bank.batch(["one"] * 3)), rtol=1e-5, atol=1e-5
    )


def test_mixes_and_eviction(tmp_path: Path, eight: str) -> None:
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), dtype=eight)
    bank = AdapterBank(model, adapters_per_row=2)
    for name, seed in (("one", 1), ("two", 2)):  # the second evicts the first
        bank.load(name, make_adapter(seed, 8))
    x = tokens(2)
    out = forward(model, x, bank.batch([{"two": 0.5}, None]))
    held = saved(bank, "two", tmp_path)
    modules = {m: LoRAWeights(w.a, w.b * np.float32(0.5), w.scale) for m, w in held.modules.items()}
    half = Adapter(held.config, modules)
    np.testing.assert_allclose(out, expected(model, x, [half, None]), rtol=1e-5, atol=1e-5)


def test_dora(tmp_path: Path, eight: str) -> None:
    model, bank = make_bank(dtype=eight, dora=True)
    plain, rng = make_adapter(1, 3), np.random.default_rng(0)
    modules = {
        name: LoRAWeights(
            w.a, w.b, w.scale, magnitude=rng.uniform(1, 2, w.b.shape[0]).astype(np.float32)
        )
        for name, w in plain.modules.items()
    }
    config = dataclasses.replace(plain.config, dora=True)
    assert bank.load("one", Adapter(config, modules)) is not None
    x, held = tokens(3), saved(bank, "one", tmp_path)
    out = forward(model, x, bank.batch(["one"] * 3))
    other, exact = make_bank(dora=True)
    exact.load("one", held)
    np.testing.assert_allclose(
        out, forward(other, x, exact.batch(["one"] * 3)), rtol=1e-5, atol=1e-5
    )
    for name, own in held.modules.items():
        np.testing.assert_allclose(own.magnitude, modules[name].magnitude, rtol=1e-5)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.up(x)


class Stacked(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.vmap(Block)(nnx.Rngs(0).split(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        out, _ = scan_layers(lambda block, x, _: (block(x), None), self.layers, x)
        return out


def test_layers_stacked_for_a_scan(tmp_path: Path, eight: str) -> None:
    features = {f"layers.{n}.up": (4, 4) for n in range(3)}
    adapter = make_adapter(1, 5, features=features)
    model, exact = Stacked(), Stacked()
    for one, dtype in ((model, eight), (exact, jnp.float32)):
        apply_lora(one, slots=2, buckets=(8, 16), dtype=dtype)
    bank, other = AdapterBank(model), AdapterBank(exact)
    bank.load("other", make_adapter(2, 9, features=features))
    bank.load("one", adapter)
    other.load("one", saved(bank, "one", tmp_path))
    x, names = tokens(3), ["one", None, "one"]
    out, want = (forward(m, x, b.batch(names)) for m, b in ((model, bank), (exact, other)))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_the_same_bytes(tmp_path: Path, eight: str) -> None:
    model, bank = make_bank(dtype=eight)
    for name, rank in (("one", 3), ("two", 16)):
        bank.load(name, make_adapter(rank, rank))
    x = tokens(4)
    out = forward(model, x, bank.batch(NAMES))
    bank.save_checkpoint(tmp_path / "bank")
    again, restored = make_bank(dtype=eight)
    restored.restore_checkpoint(tmp_path / "bank")
    np.testing.assert_array_equal(forward(again, x, restored.batch(NAMES)), out)
    for other in {"int8", "float8_e4m3fn", "float32"} - {eight}:
        _, bank = make_bank(dtype=other)
        with pytest.raises(ValueError, match=f"{eight} there, {other} here"):
            bank.restore_checkpoint(tmp_path / "bank")
        assert not bank.names


def cancelling() -> Adapter:
    """Two ranks that all but cancel each other."""
    adapter = make_adapter(1, 2)
    modules = {}
    for name, w in adapter.modules.items():
        a, b = np.stack([w.a[0], w.a[0]]), np.stack([w.b[:, 0], 0.01 * w.b[:, 1]], axis=1)
        b[:, 1] -= b[:, 0]
        modules[name] = LoRAWeights(a, b.astype(np.float32), w.scale)
    return Adapter(adapter.config, modules)


def test_an_adapter_that_8_bits_do_not_hold_is_refused(eight: str) -> None:
    _, bank = make_bank(dtype=eight)
    with pytest.raises(ValueError, match=rf"'one': {eight} changes what \w+ adds by \d+\.\d%"):
        bank.load("one", cancelling())
    with pytest.raises(ValueError, match="changes what up adds by inf%"):
        bank.load("one", filled_with(np.nan))
    assert bank.load("zero", filled_with(0.0)) == 0
    assert list(bank.names) == ["zero"]
    _, exact = make_bank()
    assert exact.load("one", cancelling()) is None


def test_training_and_publishing_are_refused(eight: str) -> None:
    model, bank = make_bank(dtype=eight)
    config = LoRAConfig(rank=4, alpha=4, target_modules=["up"])
    with pytest.raises(ValueError, match=f"the stacks are {eight}; train it in a model"):
        bank.create("new", config, rngs=nnx.Rngs(0))
    bank.load("one", make_adapter(1, 4))
    with pytest.raises(ValueError, match=f"'one' is to be trained, but the stacks are {eight};"):
        bank.trainees(["one"])
    _, other = make_bank()
    other.load("one", make_adapter(1, 4))
    for target, source in ((bank, bank), (bank, other), (other, bank)):
        with pytest.raises(ValueError, match="save it by its bank, and load the folder as 'copy'"):
            target.publish("copy", "one", bank=source)
    batch = bank.batch(["one"] * 2)

    def loss(model: nnx.Module) -> jax.Array:
        with jax_lora.use(batch):
            return model(tokens(2)).sum()

    # JAX itself refuses whole numbers.
    error = TypeError if eight == "int8" else NotImplementedError
    with pytest.raises(error, match=r"got int8|train in stacks of bfloat16"):
        nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


@pytest.mark.parametrize("small", ["up", "down"])
def test_layers_in_other_dtypes_beside_them(small: str, tmp_path: Path, eight: str) -> None:
    model = Mlp(nnx.Rngs(0))
    for name in FEATURES:
        apply_lora(
            model, target=name, slots=2, buckets=(8,), dtype=eight if name == small else None
        )
    bank, x = AdapterBank(model), tokens(3)
    both = make_adapter(1, 3)
    (wide,) = FEATURES.keys() - {small}
    alone = make_adapter(2, 5, features={wide: FEATURES[wide]})
    assert 0.001 < (bank.load("both", both) or 0) < 0.1
    assert bank.load("alone", alone) is None  # no module of it is in 8 bits
    assert bank.trainees(["alone"]).by_bucket[8].serials.any()
    with pytest.raises(ValueError, match="'both' is to be trained"):
        bank.trainees(["alone", "both"])
    held = {name: saved(bank, name, tmp_path) for name in ("both", "alone")}
    np.testing.assert_array_equal(held["both"].modules[wide].a, both.modules[wide].a)
    out = forward(model, x, bank.batch(["alone", None, "both"]))
    want = expected(model, x, [alone, None, held["both"]])
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    on_device = {
        name: LoRAWeights(jnp.asarray(w.a), jnp.asarray(w.b), w.scale)
        for name, w in alone.modules.items()
    }
    assert bank.load("alone", Adapter(alone.config, on_device), replace=True) is None
    again = forward(model, x, bank.batch(["alone", None, "both"]))
    np.testing.assert_array_equal(again, out)


class WithEmbedding(nnx.Module):
    def __init__(self) -> None:
        self.table = nnx.Embed(8, 4, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(4, 6, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.table(x))


def test_embeddings_stay_in_their_dtype(tmp_path: Path, eight: str) -> None:
    features = {"table": (8, 4), "up": (4, 6)}
    both = make_adapter(1, 8, features=features, embeddings=["table"])
    table = make_adapter(2, 8, features={"table": (8, 4)}, embeddings=["table"])
    model, exact = WithEmbedding(), WithEmbedding()
    plan = plan_slots([both, table], 1 << 20, dtype=eight)
    taken = apply_lora(model, **plan)
    apply_lora(exact, **{**plan, "dtype": jnp.float32})
    assert [layer.stacks[0].lora_a.dtype for layer in (model.table, model.up)] == [
        jnp.float32,
        eight,
    ]
    slot = 8 * (4 * (8 + 4) + (4 + 6) + 4)
    assert taken + model.up.scales.nbytes == 2 * slot
    assert plan_slots([both, table], 2 * slot, dtype=eight)["slots"] == {8: 2}
    assert plan_slots([both, table], 2 * slot - 1, dtype=eight)["slots"] == {8: 1}
    bank, other = AdapterBank(model), AdapterBank(exact)
    assert bank.load("both", both) and bank.load("table", table) is None
    for name in ("both", "table"):
        other.load(name, saved(bank, name, tmp_path))
    x, names = np.arange(3), ["both", None, "table"]
    out, want = (forward(m, x, b.batch(names)) for m, b in ((model, bank), (exact, other)))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    reports = inspect_adapter(tmp_path / "both", eight_bits=True).eight_bits
    assert reports is not None and reports.keys() == {"int8", "float8_e4m3fn"}
    assert reports[eight].errors.keys() == {"up"} and reports[eight].module == "up"
    reports = inspect_adapter(tmp_path / "table", eight_bits=True).eight_bits
    assert reports == dict.fromkeys(["int8", "float8_e4m3fn"], EightBitsReport({}, 0.0, None, True))


def test_meshes_are_refused(eight: str) -> None:
    model = WithEmbedding()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "x")
    kernel = jax.device_put(model.up.kernel[...], jax.sharding.NamedSharding(mesh, spec))
    model.up.kernel.set_value(kernel)
    with pytest.raises(ValueError, match="LoRADense is on a mesh of 2 devices"):
        apply_lora(model, target="up", dtype=eight)


def test_full_slots_stay_in_the_kernels_dtype(eight: str) -> None:
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), dtype=eight, full_slots={"down": 1})
    assert model.down.full.slots[0].weight.dtype == jnp.float32


def test_the_plan_counts_bytes_and_scales(eight: str) -> None:
    adapters = [make_adapter(n, 8) for n in range(3)]
    slot = 8 * ((4 + 6) * 2 + 2 * 4)
    plan = plan_slots(adapters, 2 * slot, dtype=eight)
    assert plan["slots"] == {8: 2} and plan["dtype"] == jnp.dtype(eight)
    model = Mlp(nnx.Rngs(0))
    stacks = apply_lora(model, **plan)
    assert stacks + model.up.scales.nbytes + model.down.scales.nbytes == 2 * slot


@pytest.mark.parametrize(
    ("eight", "bounds"), [("float8_e4m3fn", (0.02, 0.05)), ("int8", (0.005, 0.015))]
)
def test_errors_are_those_of_float64(eight: str, bounds: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(16, 300)).astype(np.float32)
    b = rng.normal(size=(200, 16)).astype(np.float32) * 1e-3
    held = quantised(a, b, dtype=eight)
    exact = np.float64(b) @ np.float64(a)
    stored = held.lora_b.astype(np.float64) * held.scales @ held.lora_a.astype(np.float64)
    want = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
    assert bounds[0] < want < bounds[1]
    np.testing.assert_allclose(error_of(a, b, held), want, rtol=1e-3)


def test_int8_is_nearer_but_for_weights_far_larger_than_others() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(8, 4096)).astype(np.float32)
    b = rng.normal(size=(256, 8)).astype(np.float32)
    large = a.copy()
    large[:, 7] = 200

    def errors(a: np.ndarray) -> list[float]:
        return [error_of(a, b, quantised(a, b, dtype=dtype)) for dtype in ("int8", "float8_e4m3fn")]

    of_int8, of_float8 = errors(a)
    assert of_int8 < of_float8 / 2.5
    of_int8, of_float8 = errors(large)
    assert of_int8 > 0.1 and of_float8 < 0.05
    weights = LoRAWeights(large, b, 1.0)
    with pytest.raises(ValueError, match=r"'one': int8 changes what up adds by 1\d\.\d%"):
        in_eight_bits("one", {"up": weights}, {"up": np.dtype("int8")})
