"""`publish`, and loads from a device: slots filled without the host."""

import dataclasses

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import Mlp, expected, filled_with, forward, make_adapter, make_bank, tokens

from jax_lora import (
    Adapter,
    AdapterBank,
    BankFullError,
    LoRAConfig,
    LoRAWeights,
    apply_lora,
    scan_layers,
)
from jax_lora.bank.publish import stays_on_device
from jax_lora.demo.job import counted_compilations

X = tokens(3)


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Mlp)(rngs.split(2))

    def __call__(self, x):
        return scan_layers(lambda layer, x, _: (layer(x), None), self.layers, x)[0]


def stacked_bank(**options):
    model = Stacked(nnx.Rngs(0))
    apply_lora(model, **{"slots": 3, "buckets": (8,), **options})
    return model, AdapterBank(model)


def stacked_adapter(seed, rank):
    features = {f"layers.{n}.{m}": s for n in (0, 1) for m, s in (("up", (4, 6)), ("down", (6, 4)))}
    return make_adapter(seed, rank, features=features)


def on_device(adapter, dtype=None):
    return Adapter(
        adapter.config,
        {
            module: LoRAWeights(jnp.asarray(w.a, dtype), jnp.asarray(w.b, dtype), w.scale)
            for module, w in adapter.modules.items()
        },
    )


def with_magnitudes(adapter):
    """The adapter, with DoRA of other magnitudes than its base weights have."""
    modules = {
        m: dataclasses.replace(w, magnitude=np.linspace(1, 2, w.b.shape[0], dtype=np.float32))
        for m, w in adapter.modules.items()
    }
    return Adapter(dataclasses.replace(adapter.config, dora=True), modules)


def rows(model, bank, name):
    return forward(model, X, bank.batch([name] * len(X)))


def assert_holds(bank, name, adapter):
    got = bank._adapter(name)
    assert set(got.modules) == set(adapter.modules) and got.config == adapter.config
    for module, right in adapter.modules.items():
        np.testing.assert_array_equal(got.modules[module].a, right.a)
        np.testing.assert_array_equal(got.modules[module].b, right.b)


def test_requests_under_way_finish_on_the_old_version():
    model, bank = make_bank(slots=3, buckets=(8,))
    versions = [make_adapter(seed, 5) for seed in range(3)]
    right = [expected(model, X, [version] * 3) for version in versions]
    bank.load("training", versions[0])
    bank.publish("policy", "training")
    under_way = bank.batch(["policy"] * 3)
    bank.load("training", versions[1], replace=True)  # as a training step changes it
    np.testing.assert_allclose(rows(model, bank, "policy"), right[0], atol=1e-5)
    bank.publish("policy", "training")
    np.testing.assert_allclose(rows(model, bank, "policy"), right[1], atol=1e-5)
    np.testing.assert_allclose(forward(model, X, under_way), right[0], atol=1e-5)
    assert set(bank.names) == {"training", "policy"}
    del under_way
    bank.load("training", versions[2], replace=True)
    bank.publish("policy", "training")
    assert_holds(bank, "policy", versions[2])
    assert_holds(bank, "training", versions[2])


def test_only_the_first_copy_compiles():
    _, bank = make_bank(slots=4)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    bank.load("training", make_adapter(0, 5))
    bank.publish("policy", "training")
    under_way = bank.batch(["policy"])
    bank.load("other", make_adapter(1, 7), replace=True)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        bank.publish("policy", "training")
        del under_way
        bank.publish("policy", "other")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_a_copy_never_takes_the_slot_of_its_source():
    _, bank = make_bank(slots=2, buckets=(8,))
    bank.load("training", make_adapter(0, 8))
    bank.load("later", make_adapter(1, 8))
    bank.publish("policy", "training")
    assert set(bank.names) == {"training", "policy"}
    bank.pin("policy")
    bank.unload("training")
    bank.load("training", make_adapter(2, 8))
    with pytest.raises(BankFullError, match="no slot for 'another'"):
        bank.publish("another", "training")
    assert set(bank.names) == {"training", "policy"}


@pytest.mark.ci
def test_the_bank_of_another_model_gets_a_copy():
    """In its dtype, and in a larger bucket; the same name then."""
    model, bank = make_bank(slots=1, buckets=(8,))
    other = Mlp(nnx.Rngs(0))
    apply_lora(other, slots=2, buckets=(16,), dtype=jnp.bfloat16)
    serving = AdapterBank(other)
    adapter = make_adapter(3, 6)
    bank.load("policy", adapter)
    serving.publish("policy", "policy", bank=bank)
    assert serving.bucket("policy") == 16 and serving.rank("policy") == 6
    assert_holds(
        serving,
        "policy",
        Adapter(
            adapter.config,
            {
                module: LoRAWeights(w.a.astype(jnp.bfloat16), w.b.astype(jnp.bfloat16), w.scale)
                for module, w in adapter.modules.items()
            },
        ),
    )
    np.testing.assert_allclose(
        rows(other, serving, "policy"), expected(model, X, [adapter] * 3), atol=0.05
    )
    _, third = stacked_bank()
    with pytest.raises(ValueError, match=r"same LoRA layers.* down: \[6, 4\] there, none here"):
        third.publish("policy", "policy", bank=bank)
    assert third.names == () and bank.names == ("policy",)
    _, fourth = make_bank(dtype=jnp.float16)
    with pytest.raises(ValueError, match="an adapter of float32 on a device may overflow the"):
        fourth.publish("policy", "policy", bank=bank)
    with pytest.raises(ValueError, match=r"needs bucket 16; the model has buckets=\(8,\)"):
        bank.publish("policy", "policy", bank=serving)


@pytest.mark.ci
def test_layers_stacked_for_a_scan_are_published_and_loaded_from_a_device():
    model, bank = stacked_bank()
    adapter = stacked_adapter(0, 5)
    bank.load("host", adapter)
    bank.load("training", on_device(adapter))
    assert_holds(bank, "training", adapter)
    np.testing.assert_array_equal(rows(model, bank, "training"), rows(model, bank, "host"))
    bank.publish("host", "training")
    assert_holds(bank, "host", adapter)
    np.testing.assert_array_equal(rows(model, bank, "training"), rows(model, bank, "host"))
    features = {"layers.1.up": (4, 6)}
    part = make_adapter(4, 8, features=features)
    bank.load("part", on_device(part))
    bank.load("host", part, replace=True)
    np.testing.assert_array_equal(rows(model, bank, "part"), rows(model, bank, "host"))


def test_after_a_warm_up_no_rank_and_no_set_of_modules_compiles():
    _, bank = stacked_bank(buckets=(8, 16))
    whole = [on_device(stacked_adapter(0, rank)) for rank in (8, 3, 16, 11)]
    part = on_device(make_adapter(4, 8, features={"layers.1.up": (4, 6)}))
    assert [stays_on_device(a, 8, bank._sites) for a in (whole[0], whole[1], part)] == [1, 0, 1]
    assert not stays_on_device(on_device(stacked_adapter(0, 8), jnp.bfloat16), 8, bank._sites)
    bank.warmup()
    rngs = nnx.Rngs(0)
    with counted_compilations() as count:
        for adapter in (*whole, part):
            bank.load("loaded", adapter, replace="loaded" in bank.names)
        bank.create("made", LoRAConfig(5, 5), rngs=rngs)
        bank.publish("copy", "made")
        bank.publish("copy of the whole", "loaded")
    assert count() == 0
    assert_holds(bank, "copy of the whole", part)


@pytest.mark.ci
@pytest.mark.parametrize(
    "options", [{"dtype": jnp.int8}, {"dora": True}, {"full_slots": {"down": 1}}], ids=str
)
def test_after_a_warm_up_no_save_compiles(options, tmp_path):
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16), **options)
    bank = AdapterBank(model)
    bank.warmup()
    with counted_compilations() as count:
        for rank in (5, 12):
            adapter = make_adapter(0, rank)
            if "dora" in options:
                adapter = with_magnitudes(adapter)
            bank.load("one", adapter, replace=rank > 5)
            bank.save("one", tmp_path / f"{rank}")
            bank.save_checkpoint(tmp_path / f"all {rank}")
    assert count() == 0


@pytest.mark.parametrize("rank", [8, 5])
def test_a_load_from_the_device_is_that_from_the_host(rank):
    model, bank = make_bank(slots=2, buckets=(8,))
    bank.load("device", filled_with(float("nan"), 8))  # what was in the slot before is gone
    adapter = make_adapter(7, rank, rank_pattern={"up": 3}, rslora=True)
    bank.load("host", adapter)
    bank.load("device", on_device(adapter), replace=True)
    assert_holds(bank, "device", adapter)
    np.testing.assert_array_equal(rows(model, bank, "device"), rows(model, bank, "host"))


def test_whole_weights_are_refused_by_name():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8,), full_slots={"down": 1})
    bank = AdapterBank(model)
    config = LoRAConfig(4, 4, target_modules=("up",), modules_to_save=("down",))
    bank.create("training", config, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"'training' has whole weights \(modules_to_save\), which"
    ):
        bank.publish("policy", "training")
    bank.load("plain", make_adapter(0, 4))
    bank.publish("policy", "plain")
    assert_holds(bank, "policy", make_adapter(0, 4))


@pytest.mark.ci
def test_dora_is_published_with_its_magnitudes():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8,), dora=True)
    bank = AdapterBank(model)
    plain = make_adapter(0, 5)
    adapter = with_magnitudes(plain)
    bank.load("training", adapter)
    bank.publish("policy", "training")
    y = rows(model, bank, "policy")
    np.testing.assert_array_equal(y, rows(model, bank, "training"))
    bank.load("training", plain, replace=True)
    assert np.abs(y - rows(model, bank, "training")).max() > 0.1
    without, _ = make_bank(slots=1, buckets=(8,))
    with pytest.raises(ValueError, match="one of the two models has room for DoRA"):
        AdapterBank(without).publish("policy", "policy", bank=bank)


def test_mistakes_are_told():
    _, bank = make_bank(buckets=(8,), slots=2, dtype=jnp.float16)
    bank.load("training", make_adapter(0, 4, dtype=np.float16))
    with pytest.raises(ValueError, match="publish 'training' under another name"):
        bank.publish("training", "training")
    with pytest.raises(KeyError, match="no adapter 'nobody'"):
        bank.publish("policy", "nobody")
    with pytest.raises(TypeError, match="bank must be an AdapterBank, got int"):
        bank.publish("policy", "training", bank=3)
    with pytest.raises(ValueError, match="name must be 1 to 255 characters"):
        bank.publish("a/b", "training")
    with bank.stepping, pytest.raises(RuntimeError, match=r"this thread holds bank\.stepping"):
        bank.publish("policy", "training")
    with pytest.raises(ValueError, match="weights of up overflow the stacks' float16"):
        bank.load("new", on_device(filled_with(1e6, 4)))
    assert bank.names == ("training",)
    bank.load("new", on_device(make_adapter(0, 4), jnp.float16))
    config = LoRAConfig(2, 2)
    with pytest.raises(TypeError, match="must be NumPy's or JAX's arrays, got list and list"):
        Adapter(config, {"up": LoRAWeights([[1.0]], [[1.0]], 1.0)})
