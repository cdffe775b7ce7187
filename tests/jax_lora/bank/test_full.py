"""Whole weights of adapters' own: which full slots they have, and what rows compute with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import make_adapter

import jax_lora
from jax_lora import (
    Adapter,
    AdapterBank,
    BankFullError,
    FullModule,
    LoRAConfig,
    LoRAScale,
    TrainedTokens,
    apply_lora,
    load_peft,
    tie_head,
)
from jax_lora.plan import room_for

V, H, LABELS = 11, 6, 3


class Net(nnx.Module):
    """A body, the head of a tied embedding, and a classifier."""

    def __init__(self, rngs):
        self.embed = tie_head(nnx.Embed(V, H, rngs=rngs))
        self.mid = nnx.Linear(H, H, rngs=rngs)
        self.score = nnx.Linear(H, LABELS, rngs=rngs)
        self.peft_names = nnx.static({"embed.head": "lm_head"})

    def __call__(self, tokens):
        x = jnp.tanh(self.mid(self.embed(tokens)))
        return jnp.concatenate([self.embed.attend(x), self.score(x)], axis=-1)


SHAPES = {"embed": (V, H), "lm_head": (V, H), "score": (LABELS, H)}


def adapter(seed, *saved, rank=3, lora=("mid",)):
    rng = np.random.default_rng(seed)
    features = {"mid": (H, H), "embed": (V, H), "lm_head": (H, V), "score": (H, LABELS)}
    own = make_adapter(
        seed, rank, features={name: features[name] for name in lora}, embeddings=("embed",)
    )

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    full = {
        m: FullModule(normal(*SHAPES[m]), normal(LABELS) if m == "score" else None) for m in saved
    }
    return Adapter(own.config, own.modules, full)


ADAPTERS = {
    "score": adapter(1, "score"),
    "head": adapter(2, "lm_head", "score"),
    "embed": adapter(3, "embed", rank=12),
    "plain": adapter(4, lora=("mid", "embed", "lm_head", "score")),
}


def expected(model, tokens, name):
    """`[S, V + LABELS]` in float64, of one row."""
    own = ADAPTERS.get(name)
    embedding = np.float64(model.embed.embedding[...])
    weights = {"embed": embedding, "lm_head": embedding, "score": model.score.kernel[...].T}
    weights["mid"] = model.mid.kernel[...].T
    biases = {"mid": model.mid.bias[...], "score": model.score.bias[...]}
    weights = {module: np.float64(weight) for module, weight in weights.items()}
    for module, w in ({} if own is None else own.modules).items():
        delta = w.scale * np.float64(w.b) @ np.float64(w.a)
        weights[module] = weights[module] + (delta.T if module == "embed" else delta)
    for module, whole in ({} if own is None else own.full).items():
        weights[module] = np.float64(whole.weight)
        if whole.bias is not None:
            biases[module] = whole.bias
    x = np.tanh(weights["embed"][tokens] @ weights["mid"].T + np.float64(biases["mid"]))
    scores = x @ weights["score"].T + np.float64(biases["score"])
    return np.concatenate([x @ weights["lm_head"].T, scores], axis=-1)


FULL = {"score": 2, "lm_head": 1, "embed": 1}


class Served:
    def __init__(self, **options):
        self.model = Net(nnx.Rngs(0))
        options = {"slots": 3, "buckets": (8, 16), "full_slots": FULL, **options}
        self.nbytes = apply_lora(self.model, **options)
        self.bank = AdapterBank(self.model)
        graphdef, _, self.rest = nnx.split(self.model, (nnx.LoRAParam, LoRAScale), ...)

        @jax.jit
        def step(state, rest, tokens, batch):
            with jax_lora.use(batch):
                return nnx.merge(graphdef, state, rest)(tokens)

        self.step = step

    def load(self, *names):
        for name in names:
            self.bank.load(name, ADAPTERS[name])

    def run(self, batch, tokens):
        return np.asarray(self.step(self.bank.state, self.rest, tokens, batch))

    def check(self, *names, batch=None):
        tokens = np.random.default_rng(len(names)).integers(0, V, (len(names), 4), dtype=np.int32)
        got = self.run(batch or self.bank.batch(names), tokens)
        for row, name in enumerate(names):
            want = expected(self.model, tokens[row], name)
            np.testing.assert_allclose(got[row], want, atol=1e-5, err_msg=f"{name}")


def test_each_row_has_its_own_weights_also_after_evict_and_reload():
    served = Served()
    served.load("score", "head", "embed", "plain")
    served.check("plain", "head", None, "embed", "score")
    served.bank.unload("head")
    served.bank.load("other", adapter(5, "score", "lm_head"))
    served.check("plain", "embed", None, None, "score")
    served.bank.load("head", ADAPTERS["head"])  # "other" loses its full slot of lm_head
    assert "other" not in served.bank.names
    served.check("plain", "head", None, "embed", "score")


def test_bytes_and_the_state():
    served = Served(slots=1, buckets=(8,))
    lora = 8 * sum((H + H, V + H, V + H, H + LABELS))
    full = 2 * (LABELS * H + LABELS) + 2 * V * H
    assert served.nbytes == 4 * (lora + full)
    split, _ = nnx.split(served.model, (nnx.LoRAParam, LoRAScale), ...)[1:]
    assert jax.tree.structure(split) == jax.tree.structure(served.bank.state)
    one = Net(nnx.Rngs(0))
    apply_lora(one, slots=1, buckets=(8,), target="mid", full_slots={"score": 1})
    assert type(one.embed.head).__name__ == "TiedHead" and type(one.embed).__name__ == "TiedEmbed"


def test_a_leased_full_slot_stays():
    served = Served()
    served.load("head")
    batch = served.bank.batch(["head", None])
    served.bank.unload("head")
    with pytest.raises(
        BankFullError, match=r"no full slot of lm_head for 'new': of its 1, 1 are leas"
    ):
        served.bank.load("new", adapter(5, "lm_head"))
    assert served.bank.names == ()
    served.check("head", None, batch=batch)
    del batch
    served.bank.load("new", adapter(5, "lm_head"))
    served.bank.pin("new")
    with pytest.raises(BankFullError, match="the others pinned"):
        served.load("head")
    assert served.bank.names == ("new",)


@pytest.mark.ci
def test_replacing_takes_the_same_slot_unless_it_is_leased():
    served = Served()
    served.load("score", "head")
    served.bank.load("head", adapter(5, "lm_head"), replace=True)
    served.bank.load("head", ADAPTERS["head"], replace=True)
    served.check("head", "score")
    batch = served.bank.batch(["score"])
    served.bank.load("score", adapter(6), replace=True)  # without a whole weight
    served.check("score", batch=batch)
    with pytest.raises(BankFullError, match=r"no full slot of lm_head|of score"):
        served.bank.pin("head")
        served.bank.load("third", adapter(7, "score", "lm_head"))


def test_a_later_bank_keeps_what_is_leased():
    served = Served()
    served.load("head")
    batch = served.bank.batch(["head", None])
    served.bank = AdapterBank(served.model)
    with pytest.raises(BankFullError, match="1 are leased"):
        served.load("head")
    served.check("head", None, batch=batch)


def test_a_slot_without_whole_weights_has_none_of_the_one_before():
    served = Served(slots=1, buckets=(16,))
    served.load("head")
    served.load("plain")
    served.check("plain", None)


def whole(weight, bias=None, module="score"):
    own = adapter(1)
    return Adapter(own.config, own.modules, {module: FullModule(weight, bias)})


def test_what_has_no_room_is_refused():
    bank = Served(full_slots={"score": 1}).bank
    ones = np.ones((LABELS, H), np.float32)
    refused = {
        r"a whole weight for embed .*no full slots; .*full_slots=\{'embed': 1\}": adapter(
            1, "embed"
        ),
        r"of \[3, 6\] without bias, but the model's is \[3, 6\] with bias": whole(ones),
        r"of \[2, 6\] with bias, but the model's is \[3, 6\]": whole(ones[:2], ones[0, :2]),
        r"for other\.score .*full_slots=\{'score': 1\}": whole(ones, module="other.score"),
    }
    for message, own in refused.items():
        with pytest.raises(ValueError, match=message):
            bank.load("a", own)
    with pytest.raises(
        ValueError, match=r"score: a fully trained module .*\[3\] of float32 is not"
    ):
        whole(ones[:, 0])
    with pytest.raises(ValueError, match=r"score: a fully trained module .* of float64 is not"):
        whole(np.ones((LABELS, H)))
    with pytest.raises(ValueError, match="mid has both LoRA and a whole weight"):
        whole(ones, module="mid")
    assert bank.names == ()


@pytest.mark.parametrize(
    ("full", "error", "message"),
    [
        ({"score": 0}, ValueError, r"full_slots\['score'\] must be at least 1, got 0"),
        ({"score": 1.5}, TypeError, r"full_slots\['score'\] must be an int, got 1\.5"),
        (["score"], TypeError, "full_slots must map expressions to numbers of slots"),
        ([], TypeError, r"full_slots must map expressions to numbers of slots, got \[\]"),
        ({"scor": 1}, ValueError, "no layer matches full_slots' key 'scor'; linear layers"),
        ({5: 1}, TypeError, "full_slots' key 5 must be a regular expression"),
        ({"(": 1}, ValueError, r"full_slots' key '\(' is no regular expression"),
        ({"wide": 1}, ValueError, r"full_slots\['wide'\] matches wide, a LinearGeneral"),
    ],
)
def test_full_slots_are_checked(full, error, message):
    model = Net(nnx.Rngs(0))
    model.wide = nnx.LinearGeneral(H, (2, 3), rngs=nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(error, match=message):
        apply_lora(model, slots=1, buckets=(8,), full_slots=full)
    assert nnx.graphdef(model) == before


def test_save_and_load(tmp_path):
    served = Served()
    served.load("head", "embed")
    for name in ("head", "embed"):
        served.bank.save(name, tmp_path / name)
        read = load_peft(tmp_path / name)
        assert read.full.keys() == ADAPTERS[name].full.keys()
        assert read.config.modules_to_save == tuple(sorted(read.full))
        for module, full in read.full.items():
            np.testing.assert_array_equal(full.weight, ADAPTERS[name].full[module].weight)
            served.bank.load(name, tmp_path / name, replace=True)
    served.check("head", "embed", None)


@pytest.mark.ci
def test_a_new_classifier_learns(tmp_path):
    served = Served()
    config = LoRAConfig(4, 8, target_modules=("mid",), modules_to_save=("score",))
    served.bank.create("new", config, rngs=nnx.Rngs(1))
    served.load("score")
    tokens = np.zeros((2, 4), np.int32)
    batch = served.bank.batch(["new", "score"])
    got = served.run(batch, tokens)
    np.testing.assert_allclose(got[0], expected(served.model, tokens[0], None), atol=1e-5)

    lora, rest = nnx.split_state(served.bank.state, nnx.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def gradient(lora, batch):
        state = nnx.merge_state(lora, rest)
        return jnp.sum(served.step(state, served.rest, tokens, batch)[:1, :, V:] ** 2)

    gradients = gradient(lora, batch)
    mine = {p: v[...] for p, v in nnx.to_flat_state(gradients) if p[:2] == ("score", "full")}
    [moved] = [v for p, v in mine.items() if p[-1] == "weight" and np.any(v)]
    net = served.model
    x = np.tanh(net.embed.embedding[0] @ net.mid.kernel[...] + net.mid.bias[...])
    np.testing.assert_allclose(moved, 2 * 4 * np.outer(got[0, 0, V:], x), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"modules_to_save=\('mid',\) names none of the layers with"
    ):
        config = LoRAConfig(4, 8, modules_to_save=("mid",))
        served.bank.create("other", config, rngs=nnx.Rngs(1))


def test_merge():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.mid = nnx.Linear(H, H, rngs=rngs)
            self.score = nnx.Linear(H, LABELS, rngs=rngs)

        def __call__(self, x):
            return self.score(self.mid(x))

    model, plain = Plain(nnx.Rngs(0)), Plain(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), full_slots={"score": 1})
    bank = AdapterBank(model)
    bank.load("score", ADAPTERS["score"])
    nnx.update(plain, bank.merge("score"))
    x = np.ones((1, H), np.float32)
    with jax_lora.use(bank.batch(["score"])):
        np.testing.assert_allclose(plain(x), model(x), atol=1e-5)


def trained(module, indices, features=H, **others):
    own = adapter(1)
    rows = np.random.default_rng(9).normal(size=(len(indices), features)).astype(np.float32)
    tokens = {module: TrainedTokens(tuple(indices), rows)}
    return Adapter(own.config, own.modules, others, tokens)


def test_trained_tokens_are_rows_of_the_base(monkeypatch):
    served, own = Served(), trained("embed", [3, 0])
    served.bank.load("tokens", own)
    weight = np.array(served.model.embed.embedding[...])
    weight[[3, 0]] = own.tokens["embed"].rows
    full = dict.fromkeys(("embed", "lm_head"), FullModule(weight))
    monkeypatch.setitem(ADAPTERS, "tokens", Adapter(own.config, own.modules, full))
    served.check("tokens", None)
    served.bank.load("head", trained("lm_head", [2]))
    assert served.bank.names == ("head",)
    served.bank.load("tokens", own)
    assert served.bank.names == ("tokens",)
    served.check("tokens", None)


def test_trained_tokens_without_room_are_refused():
    bank = Served(full_slots={"embed": 1}).bank
    refused = {
        r"of lm_head .* this model has none; .*full_slots=\{'lm_head': 1\}": trained("embed", [1]),
        r"of other .* this model has none; .*full_slots=\{'other': 1\}": trained("other", [1]),
    }
    for message, own in refused.items():
        with pytest.raises(ValueError, match=message):
            bank.load("a", own)
    bank = Served().bank
    whole_head = {"lm_head": FullModule(np.ones((V, H), np.float32))}
    refused = {
        r"embed .* up to 11 of 6 features, but the model's has 11 tokens": trained("embed", [1, V]),
        r"up to 1 of 5 features, but the model's has 11 tokens of 6": trained("embed", [1], 5),
        "lm_head .*which is tied to embed, and LoRA or a whole": trained(
            "embed", [1], **whole_head
        ),
    }
    for message, own in refused.items():
        with pytest.raises(ValueError, match=message):
            bank.load("a", own)
    assert bank.names == ()


def test_a_mesh_is_refused():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = Net(nnx.Rngs(0))
    model.score.kernel.set_value(jax.device_put(model.score.kernel[...], whole))
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match="matches score, which is on a mesh of 2 devices"):
        apply_lora(model, slots=1, buckets=(8,), full_slots={"score": 1})
    assert nnx.graphdef(model) == before
    model = Net(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), full_slots={"score": 1})
    model.score.kernel.set_value(jax.device_put(model.score.kernel[...], whole))
    with pytest.raises(ValueError, match="has full slots, which a mesh of 2 devices does not"):
        AdapterBank(model)


def test_packed_projections_take_whole_weights_too():
    class Pair(nnx.Module):
        def __init__(self):
            self.q = nnx.Linear(H, 4, rngs=nnx.Rngs(0))
            self.k = nnx.Linear(H, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return jnp.concatenate(jax_lora.call_packed((self.q, self.k), x), axis=-1)

    model = Pair()
    apply_lora(model, slots=1, buckets=(8,), full_slots={"q": 1})
    bank = AdapterBank(model)
    own = make_adapter(0, 3, features={"k": (H, 4)})
    weight = np.random.default_rng(1).normal(size=(4, H)).astype(np.float32)
    bank.load("a", Adapter(own.config, own.modules, {"q": FullModule(weight, weight[:, 0])}))
    x = np.random.default_rng(2).normal(size=(2, H)).astype(np.float32)
    with jax_lora.use(bank.batch(["a", None])):
        got = np.asarray(model(x))
    np.testing.assert_allclose(got[0, :4], x[0] @ weight.T + weight[:, 0], atol=1e-5)
    np.testing.assert_allclose(got[1], np.asarray(model(x))[1], atol=1e-6)


@pytest.mark.ci
def test_whole_weights_take_a_row_of_their_own():
    served = Served()
    served.bank = AdapterBank(served.model, adapters_per_row=2)
    served.load("head", "plain")
    served.check("head", None, "plain")
    served.check("head", "plain", batch=served.bank.batch([{"head": 1.0}, "plain"]))
    for row in {"head": 0.5}, {"plain": 0.5, "head": 1.0}:
        with pytest.raises(ValueError, match=r"row 1: 'head' has whole weights, which take the pl"):
            served.bank.batch(["plain", row])


def test_room_for_adapters():
    """What `jax-lora generate` gives apply_lora: room for all of the adapters at once."""
    adapters = [*ADAPTERS.values(), trained("embed", [3]), trained("lm_head", [2])]
    model = Net(nnx.Rngs(0))
    assert room_for(model, [adapter(0).header]) == {}
    assert room_for(model, [whole(np.ones((2, H), np.float32), module="other").header]) == {}
    room = room_for(model, [own.header for own in adapters])
    assert room["full_slots"] == {"score": 2, "lm_head": 3, "embed": 2}
    assert set(room["target"]) == {"mid", "score", "embed", "lm_head"}
    apply_lora(model, slots=6, buckets=(8, 16), **room)
    bank = AdapterBank(model)
    for n, own in enumerate(adapters):
        bank.load(f"{n}", own)
    assert len(bank.names) == len(adapters)
