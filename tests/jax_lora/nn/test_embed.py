"""LoRA of embeddings, and of the output layers that are tied to them."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from marks import PHASES, in_ci
from tiny import make_adapter

import jax_lora
from jax_lora import (
    AdapterBank,
    LoRAConfig,
    LoRAEmbed,
    LoRAWeights,
    apply_lora,
    plan_slots,
    tie_head,
)

V, H = 11, 6
FEATURES = {"embed": (V, H), "lm_head": (H, V)}
BOTH = {"target": ["embed", "lm_head"], "slots": 2, "buckets": (8, 16)}


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = tie_head(nnx.Embed(V, H, rngs=rngs))
        self.mid = nnx.Linear(H, H, rngs=rngs)
        self.peft_names = nnx.static({"embed.head": "lm_head"})

    def __call__(self, tokens):
        return self.embed.attend(self.mid(self.embed(tokens)))


def adapter(seed, rank, names=("embed", "lm_head"), **config):
    features = {name: FEATURES[name] for name in names}
    return make_adapter(seed, rank, features=features, embeddings=("embed",), **config)


def expected(model, tokens, adapters):
    """In float64, row by row."""
    embedding = np.float64(model.embed.embedding[...])
    rows = []
    for row, own in zip(tokens, adapters):
        deltas = {name: 0.0 for name in FEATURES}
        for name, w in ({} if own is None else own.modules).items():
            deltas[name] = w.scale * np.float64(w.b) @ np.float64(w.a)
        x = embedding[row] + (deltas["embed"] + np.zeros((H, V))).T[row]
        x = x @ np.float64(model.mid.kernel[...]) + np.float64(model.mid.bias[...])
        rows.append(x @ (embedding + deltas["lm_head"]).T)
    return np.stack(rows)


@nnx.jit
def forward(model, tokens, batch):
    with jax_lora.use(batch):
        return model(tokens)


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


ADAPTERS = {"a": adapter(0, 3), "b": adapter(1, 12, ["embed"]), "c": adapter(2, 8, ["lm_head"])}


def served(**options):
    model = Tied(nnx.Rngs(0))
    apply_lora(model, **{**BOTH, **options})
    bank = AdapterBank(model)
    for name, own in ADAPTERS.items():
        bank.load(name, own)
    return model, bank


@pytest.mark.parametrize("phase", PHASES)
def test_each_row_has_its_adapter(phase):
    model, bank = served()
    names, tokens = ["a", "b", None, "c", "a"], tokens_of(5, 4)
    got = forward(model, tokens, bank.batch(names, phase=phase))
    want = expected(model, tokens, [ADAPTERS.get(name) for name in names])
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain = forward(model, tokens, bank.batch([None] * 5, phase=phase))
    np.testing.assert_array_equal(plain[2], got[2])
    assert np.abs(got - plain)[[0, 1, 3, 4]].max(axis=(1, 2)).min() > 1e-2


def test_tied_layers_have_room_by_name_alone():
    model = Tied(nnx.Rngs(0))
    before = nnx.graphdef(model.embed)
    apply_lora(model, slots=2, buckets=(8,))
    assert nnx.graphdef(model.embed) == before
    with pytest.raises(
        ValueError, match=r"linear layers: none; embeddings and heads: embed\.head, embed; wit"
    ):
        apply_lora(model, target="rpoj")
    alone = Tied(nnx.Rngs(0))
    nbytes = apply_lora(alone, target="embed", slots=2, buckets=(8,))
    assert nbytes == 2 * 8 * (V + H) * 4 and isinstance(alone.embed, LoRAEmbed)
    AdapterBank(alone).load("b", adapter(1, 4, ["embed"]))  # lm_head, without room, is named too
    both = Tied(nnx.Rngs(0))
    assert apply_lora(both, **plan_slots(ADAPTERS.values(), memory=1 << 20)) > 0
    AdapterBank(both).load("a", ADAPTERS["a"])


def test_state_paths_stay():
    def paths(model):
        return [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]

    assert paths(tie_head(nnx.Embed(V, H, rngs=nnx.Rngs(0)))) == [("embedding",)]
    before, (model, _) = paths(Tied(nnx.Rngs(0))), served()
    base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model, base))] == before


def test_tie_head_takes_an_embedding():
    with pytest.raises(TypeError, match=r"tie_head takes an nnx\.Embed, got TiedEmbed"):
        tie_head(tie_head(nnx.Embed(V, H, rngs=nnx.Rngs(0))))


def test_the_other_kind_is_refused():
    _, bank = served()
    linear = make_adapter(0, 3, features={"embed": (V, H)})
    message = "'d': embed is an embedding, but the adapter's LoRA is that of a linear layer"
    with pytest.raises(ValueError, match=message):
        bank.load("d", linear)
    with pytest.raises(
        ValueError, match="embed maps 11 to 6 features, but the adapter's lora_A has 12"
    ):
        bank.load("d", make_adapter(0, 3, features={"embed": (12, 6)}, embeddings=("embed",)))


@pytest.mark.ci
def test_a_new_adapter_adds_nothing_and_learns():
    model, bank = served()
    bank.create("new", LoRAConfig(4, 8, target_modules=("embed", "lm_head")), rngs=nnx.Rngs(1))
    tokens = tokens_of(2, 5)
    batch = bank.batch(["new", "c"], phase="prefill")
    np.testing.assert_array_equal(
        forward(model, tokens, batch)[0], forward(model, tokens, bank.batch([None] * 2))[0]
    )
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(lora, state, batch):
        def loss(lora):
            with jax_lora.use(batch):
                logits = nnx.merge(graphdef, lora, rest)(tokens)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

        value, gradients = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(gradients, state)
        return value, gradients, optax.apply_updates(lora, updates), state

    first, gradients, lora, state = step(lora, optimizer.init(lora), batch)
    by_path = {path: v[...] for path, v in nnx.to_flat_state(gradients)}
    grads_a = by_path["embed", "stacks", 0, "lora_a"]
    in_use = [bool(np.any(grads_a[slot])) for slot in range(2)]
    assert sum(in_use) == 1  # the other slot of the bucket is c's, which adapts the head alone
    used = np.unique(tokens[0])
    unused = np.setdiff1d(np.arange(V), used)
    mine = grads_a[in_use.index(True)]
    assert np.all(np.any(mine[:4, used], axis=0)) and not np.any(mine[:, unused])
    assert not np.any(mine[4:])
    for _ in range(10):
        last, _, lora, state = step(lora, state, batch)
    assert last < first - 0.1


def test_gradients_equal_those_of_dense_weights():
    model, bank = served()
    tokens = tokens_of(3, 4)
    tokens[0] = [2, 5, 2, 2]
    batch = bank.batch(["a", "b", "c"])
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    weights = np.random.default_rng(1).normal(size=(3, 4, V)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(lora, batch):
        with jax_lora.use(batch):
            return jnp.sum(nnx.merge(graphdef, lora, rest)(tokens) * weights)

    # On a GPU, a scatter adds in any order.
    made = re.findall(
        r"f32\[2,(?:8|16),11\] = (scatter[-\w]*)", str(jax.make_jaxpr(gradient)(lora, batch))
    )
    assert made == ["scatter"] * 2
    gradients = {p: np.asarray(v[...]) for p, v in nnx.to_flat_state(gradient(lora, batch))}
    # The gradient of a's A of the embedding, by what the product says: dA = s B^T dx onehot^T.
    own = ADAPTERS["a"].modules
    head = np.float64(model.embed.embedding[...])
    head += own["lm_head"].scale * np.float64(own["lm_head"].b) @ np.float64(own["lm_head"].a)
    dx = np.float64(weights[0]) @ head @ np.float64(model.mid.kernel[...]).T
    want = np.zeros((3, V))
    for token, d in zip(tokens[0], dx):
        want[:, token] += own["embed"].scale * np.float64(own["embed"].b).T @ d
    got = gradients["embed", "stacks", 0, "lora_a"]
    slot = int(bank.batch(["a"]).indices[0])
    np.testing.assert_allclose(got[slot, :3], want, atol=1e-5)


def test_all_linear_leaves_both_out():
    _, bank = served()
    with pytest.raises(ValueError, match="names none of"):
        bank.create("new", LoRAConfig(4, 8, target_modules="all-linear"), rngs=nnx.Rngs(1))


def test_merge():
    model, bank = served()
    with pytest.raises(ValueError, match="embed shares its kernel with another layer"):
        bank.merge("b")

    class Untied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, H, rngs=rngs)

        def __call__(self, tokens):
            return self.embed(tokens)

    model, plain = Untied(nnx.Rngs(0)), Untied(nnx.Rngs(0))
    apply_lora(model, target="embed", slots=2, buckets=(16,))
    bank = AdapterBank(model)
    bank.load("b", ADAPTERS["b"])
    nnx.update(plain, bank.merge("b"))
    tokens = tokens_of(1, 4)
    got = forward(model, tokens, bank.batch(["b"]))
    np.testing.assert_allclose(got, plain(tokens), atol=1e-6)


def test_a_token_that_is_none_has_no_column():
    """As of the base's row: NaN, beyond the vocabulary."""
    model, bank = served()
    batch = bank.batch(["a"])
    got = forward(model, np.array([[V]], np.int32), batch)
    assert np.isnan(got).all()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("spec", "fully_sharded"), [((None, "x"), False), (("x", None), False), (("x", None), True)]
)
def test_on_a_mesh(spec, fully_sharded):
    """The embedding divided over features or over the vocabulary."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    model = Tied(nnx.Rngs(0))
    v, h = 12, 6
    model.embed = tie_head(nnx.Embed(v, h, rngs=nnx.Rngs(0)))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    model.embed.embedding.set_value(jax.device_put(model.embed.embedding[...], sharding))
    apply_lora(model, **BOTH | {"buckets": (16,)}, fully_sharded=fully_sharded)
    bank = AdapterBank(model)
    features = {"embed": (v, h), "lm_head": (h, v)}
    own = make_adapter(0, 3, features=features, embeddings=("embed",))
    bank.load("a", own)
    tokens = tokens_of(2, 4)
    got = forward(model, tokens, bank.batch(["a", None]))
    one = Tied(nnx.Rngs(0))
    one.embed = tie_head(nnx.Embed(v, h, rngs=nnx.Rngs(0)))
    apply_lora(one, **BOTH)
    other = AdapterBank(one)
    other.load("a", own)
    np.testing.assert_allclose(got, forward(one, tokens, other.batch(["a", None])), atol=1e-5)


class Wide(nnx.Module):
    """Has widths that the kernels take."""

    def __init__(self):
        embed = nnx.Embed(512, 64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        self.embed = tie_head(embed)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


@pytest.mark.parametrize(("phase", "length"), [("decode", 1), in_ci("prefill", 300)])
def test_hopper_runs_both_by_kernels(phase, length):
    model = Wide()
    apply_lora(model, target=["embed", "embed.head"], slots=2, buckets=(16, 64))
    batch = AdapterBank(model).batch([None] * 4, phase=phase)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, batch):
        with jax_lora.use(batch):
            return nnx.merge(graphdef, state)(tokens)

    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
    module = step.trace(state, tokens, batch).lower(lowering_platforms=("cuda",)).as_text()
    names = set(re.findall(r"lora(?:_decode)?(?:_shrink|_expand)?(?:_r\d+)+", module))
    of_b = {"decode": "lora_decode_expand", "prefill": "lora_expand"}[phase]
    assert {f"{of_b}_r16", f"{of_b}_r64"} < names
    assert any("r16_r64" in name for name in names)  # of the head


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_row_of_several_adapters_has_the_sum_of_their_shares(phase):
    model = Tied(nnx.Rngs(0))
    apply_lora(model, **BOTH)
    bank = AdapterBank(model, adapters_per_row=2)
    for name, own in ADAPTERS.items():
        bank.load(name, own)
    tokens = tokens_of(3, 4)
    rows = [{"a": 0.7, "b": -0.3}, "a", {"b": 2.0}]
    got = forward(model, tokens, bank.batch(rows, phase=phase))

    def weighted(*shares):
        modules = [
            (name, dataclasses.replace(w, b=w.b * np.float32(weight)))
            for own, weight in shares
            for name, w in ADAPTERS[own].modules.items()
        ]
        joined = {}
        for name, w in modules:
            if name in joined:
                one = joined[name]
                b = np.concatenate([one.b * one.scale, w.b * w.scale], axis=1)
                w = LoRAWeights(np.concatenate([one.a, w.a]), b, 1.0, w.is_embedding)
            joined[name] = w
        return SimpleNamespace(modules=joined)

    own = [weighted(("a", 0.7), ("b", -0.3)), ADAPTERS["a"], weighted(("b", 2.0))]
    np.testing.assert_allclose(got, expected(model, tokens, own), atol=1e-5)
