"""Layers stacked in one module: run by scans, named by their numbers, loaded and saved."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from marks import PHASES, in_ci
from tiny import make_adapter, tokens

from jax_lora import (
    AdapterBank,
    AdapterBatch,
    LoRAConfig,
    LoRADense,
    apply_lora,
    call_packed,
    load_peft,
    plan_slots,
    scan_layers,
    use,
)
from jax_lora.llama import Llama, LlamaConfig, decode, prefill
from pallas_kernels import routing
from pallas_kernels.mosaic_gpu.prefill import expand

SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
ATTENTION = "self_attn.[qkvo]_proj"  # two calls of a layer
H, LAYERS, NAMES = 4, 3, ["a", None, "b"]
OPTIONS = {"slots": {8: 2, 16: 3}, "buckets": (8, 16)}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(H, rngs=rngs)
        self.up = nnx.Linear(H, 6, rngs=rngs)
        self.gate = nnx.Linear(H, 6, rngs=rngs)
        self.down = nnx.LinearGeneral(6, H, rngs=rngs)

    def __call__(self, x):
        up, gate = call_packed((self.up, self.gate), self.norm(x))
        return x + self.down(jnp.tanh(gate) * up)


def run(block, x, _):
    return block(x), None


class Model(nnx.Module):
    """Three stacked layers between two that are not; `how` says how they run."""

    def __init__(self, rngs, how="scan_layers"):
        self.first = nnx.Linear(H, H, rngs=rngs)
        self.layers = nnx.vmap(Block)(rngs.split(LAYERS))
        self.head = nnx.Linear(H, H, rngs=rngs)
        self.how = how

    def __call__(self, x):
        return self.head(self.blocks(self.first(x)))

    def blocks(self, x):
        if self.how == "scan_layers":
            return scan_layers(run, self.layers, x)[0]
        if self.how == "nnx.scan":
            step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, self.layers)
        graphdef, state = nnx.split(self.layers)
        if self.how == "lax.scan":
            return jax.lax.scan(lambda x, own: (nnx.merge(graphdef, own)(x), None), x, state)[0]
        if self.how == "remat":
            once = nnx.remat(lambda block, x: block(x))
            return scan_layers(lambda block, x, _: (once(block, x), None), self.layers, x)[0]
        for n in range(LAYERS):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], state))(x)
        return x


SCANS = ["nnx.scan", "lax.scan", "remat"]
HOWS = ["unrolled", "scan_layers", *map(in_ci, SCANS)]
FEATURES = {"first": (H, H), "head": (H, H)} | {
    f"layers.{n}.{name}": size
    for n in range(LAYERS)
    for name, size in {"up": (H, 6), "gate": (H, 6), "down": (6, H)}.items()
}
ADAPTERS = {
    "a": make_adapter(1, 3, features=FEATURES),
    "b": make_adapter(2, 16, features={k: v for k, v in FEATURES.items() if "up" not in k}),
}


def served(how="scan_layers"):
    model = Model(nnx.Rngs(0), how)
    apply_lora(model, **OPTIONS)
    bank = AdapterBank(model)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    return model, bank


@jax.jit
def forward(split, x, batch):
    with use(batch):
        return nnx.merge(*split)(x)


def outputs(model, x, batch):
    return np.asarray(forward(nnx.split(model), x, batch))


X = tokens(3)


@pytest.fixture(scope="module")
def expected():
    """By float64, layer by layer, each row with its adapter."""
    model, _ = served()

    def linear(layer, name, x, adapter, index=()):
        kernel, bias = (np.float64(v[...])[index] for v in (layer.kernel, layer.bias))
        y = x @ kernel + bias
        if adapter is not None and name in adapter.modules:
            w = adapter.modules[name]
            y = y + w.scale * (x @ np.float64(w.a).T) @ np.float64(w.b).T
        return y

    def row(x, adapter):
        x, layers = linear(model.first, "first", x, adapter), model.layers
        for n in range(LAYERS):
            own = {
                name: functools.partial(
                    linear, getattr(layers, name), f"layers.{n}.{name}", adapter=adapter, index=n
                )
                for name in ("up", "gate", "down")
            }
            normed = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
            x = x + own["down"](x=np.tanh(own["gate"](x=normed)) * own["up"](x=normed))
        return linear(model.head, "head", x, adapter)

    return np.stack([row(np.float64(x), ADAPTERS.get(name)) for x, name in zip(X, NAMES)])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("phase", PHASES)
def test_every_way_to_run_stacked_layers_computes_the_same(expected, how, phase):
    model, bank = served(how)
    got = outputs(model, X, bank.batch(NAMES, phase=phase))
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.fixture(scope="module")
def right_gradients():
    return gradients("unrolled")


def gradients(how):
    model, bank = served(how)

    @nnx.jit
    def gradient(model, batch):
        def loss(model):
            with use(batch):
                return jnp.sum(jnp.sin(model(jnp.asarray(X))))

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    found = nnx.to_flat_state(gradient(model, bank.batch(NAMES)))
    return {path: np.asarray(variable[...]) for path, variable in found}


@pytest.mark.ci
@pytest.mark.parametrize("how", ["scan_layers", *SCANS])
def test_every_way_has_the_same_gradients(right_gradients, how):
    found = gradients(how)
    for path, want in right_gradients.items():
        np.testing.assert_allclose(found[path], want, atol=1e-4, err_msg=str(path))
    used = {(path[-4], path[-2]) for path, want in right_gradients.items() if want.any()}
    layers = {"first", "head", "up", "gate", "down"}
    assert used == {(name, bucket) for name in layers for bucket in (0, 1)} - {("up", 1)}


def test_tokens_are_sorted_once_for_all_layers(monkeypatch):
    model, bank = served()
    make, sorts = routing._make, []
    monkeypatch.setattr(routing, "_make", lambda *args: sorts.append(args) or make(*args))

    def step(x, batch):
        with use(batch):
            return model.blocks(x)

    jaxpr = jax.make_jaxpr(step)(X, bank.batch(NAMES, phase="prefill"))
    assert len(sorts) == 2  # one for each bucket
    [scan] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert "make_segments" in str(jaxpr) and "make_segments" not in str(scan)


def test_what_a_layer_compiles_outside_of_jit_serves_no_other_batch():
    layers = nnx.vmap(lambda rngs: nnx.Linear(H, H, rngs=rngs))(nnx.Rngs(0).split(2))
    apply_lora(layers, slots=2, buckets=(8,))
    for variable in layers.stacks[0].variables:
        slots = np.array([0.1, 0.2], np.float32)[:, None, None]
        variable.set_value(jnp.asarray(np.broadcast_to(slots, variable.shape)))
    layers.scales.set_value(jnp.asarray(np.ones(layers.scales.shape, np.float32)))
    once = jax.jit(lambda split, x: nnx.merge(*split)(x))

    def outputs_of(slot, call):
        with use(AdapterBatch(np.array([slot]), ranges=((8, 2),))):
            x, _ = scan_layers(lambda layer, x, _: (call(layer, x), None), layers, np.ones((1, H)))
        return np.asarray(x)

    first, second = (outputs_of(n, lambda layer, x: once(nnx.split(layer), x)) for n in (0, 1))
    np.testing.assert_allclose(second, outputs_of(1, lambda layer, x: layer(x)), rtol=1e-5)
    assert abs(first - second).max() > 0.1


def loops_over_layers(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == LAYERS:
            yield eqn
            continue
        values = list(eqn.params.values())
        for inner in jax.tree.leaves(values, is_leaf=lambda value: hasattr(value, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from loops_over_layers(inner.jaxpr)


@pytest.mark.ci
@pytest.mark.parametrize("columns", [None, 2])
@pytest.mark.parametrize("rows", [37, 300])
def test_tables_of_kernels_are_made_before_the_loop(rows, columns, monkeypatch):
    model = Llama(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    apply_lora(model, slots=12, buckets=(128,), target=ATTENTION)
    ids, kind, weights = np.arange(rows) % 12, routing.Segments, None
    if columns:
        ids, kind = np.stack([ids] * columns, axis=1), routing.Mix
        weights = np.ones(ids.shape, np.float32)
    batch = AdapterBatch(ids, weights=weights, ranges=((128, 12),), phase="decode")
    known, made, bodies = kind.with_tables, [], []

    def with_tables(segments, turn):
        made.append(known(segments, turn))
        return made[-1]

    def step(batch, tokens):
        with use(batch):
            return decode(model, model.init_cache(rows, 8), tokens)

    monkeypatch.setattr(kind, "with_tables", with_tables)
    body = expand._block_body
    monkeypatch.setattr(expand, "_block_body", lambda *refs: bodies.append(refs) or body(*refs))
    tokens = jnp.zeros(rows, jnp.int32)
    jaxpr = jax.make_jaxpr(step)(batch, tokens)
    # Tables that an equal trace asked for are asked for anew.
    again = jax.make_jaxpr(lambda *args: step(*args))(batch, tokens)
    some = [mix.columns[1] if columns else mix for mix in made]
    first, second = ({type(table).__name__ for table in segments.made} for segments in some)
    one_launch = {"Seating", "Holders"}
    assert first == second == (one_launch if rows == 37 else {"Order", "Rounds", "Routes"})
    # A kernel's body is traced once, for both, though its tables are asked for before.
    assert len(bodies) == (0 if rows == 37 else 2 * (columns or 1))
    # Each token is compared with each other to make a table, and nowhere else.
    tokens = rows * (columns or 1)
    pairs = f"bool[{tokens},{tokens}]" if rows == 37 else "bool[5,64,64]"
    for traced in (jaxpr, again):
        loops = [str(loop) for loop in loops_over_layers(traced.jaxpr)]
        assert "mpmd_map" in str(loops)
        assert pairs in str(traced) and pairs not in str(loops)


def test_layers_whose_x_is_not_the_carry():
    model, bank = served()

    @jax.jit
    def step(x, batch):
        def body(block, carry, _):
            total, x = carry
            x = block(x)
            return (total + x.sum(), x), x

        with use(batch):
            (total, last), each = scan_layers(body, model.layers, (jnp.zeros(()), x))
            return total, last, each, model.blocks(x)

    total, last, each, want = step(jnp.asarray(X), bank.batch(NAMES))
    np.testing.assert_allclose(last, want, atol=1e-6)
    np.testing.assert_allclose(total, each.sum(), rtol=1e-5)


class Nested(nnx.Module):
    """Two groups of three layers."""

    def __init__(self, rngs):
        inner = nnx.vmap(Group)
        self.groups = inner(rngs.split(2))

    def __call__(self, x):
        return scan_layers(run, self.groups, x)[0]


class Group(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(H, H, rngs=rngs)
        self.layers = nnx.vmap(Block)(rngs.split(LAYERS))

    def __call__(self, x):
        return self.proj(scan_layers(run, self.layers, x)[0])


@pytest.mark.ci
def test_scans_inside_of_scans(tmp_path):
    model, one_by_one = Nested(nnx.Rngs(0)), Nested(nnx.Rngs(0))
    apply_lora(model, **OPTIONS)
    assert model.groups.layers.up.lead == (2, 3)
    assert model.groups.layers.up.stacks[1].lora_a.shape == (2, 3, 3, 16, H)
    bank = AdapterBank(model)
    features = {f"groups.{g}.layers.{n}.up": (H, 6) for g in range(2) for n in range(LAYERS)}
    features |= {f"groups.{g}.proj": (H, H) for g in range(2)}
    adapter = make_adapter(3, 4, features=features)
    bank.load("a", adapter)
    bank.save("a", tmp_path)
    saved = load_peft(tmp_path)
    for name, weights in adapter.modules.items():
        np.testing.assert_array_equal(saved.modules[name].a, weights.a)
        np.testing.assert_array_equal(saved.modules[name].b, weights.b)
    got = outputs(model, X, bank.batch(["a", None, "a"]))
    base = outputs(one_by_one, X, None)
    nnx.update(one_by_one, bank.merge("a"))
    merged = outputs(one_by_one, X, None)
    np.testing.assert_allclose(got, [merged[0], base[1], merged[2]], atol=2e-5)
    assert np.abs(merged - base).max(axis=1).min() > 1e-2


# ------------------------------------------------------------------------------------- the bank


def test_a_bank_of_stacked_layers_loads_evicts_replaces_saves_and_merges(tmp_path):
    model, bank = served()
    some = make_adapter(5, 8, features={"layers.2.down": (6, H), "head": (H, H)})
    bank.load("c", some)  # beside a, in bucket 8
    bank.load("d", make_adapter(6, 5, features=FEATURES))  # in place of a
    assert bank.names == ("b", "c", "d")
    with pytest.raises(KeyError, match=r"no adapter 'a' \(evicted by the load of 'd'\)"):
        bank.batch(["a"])
    bank.load("b", make_adapter(7, 12, features=FEATURES), replace=True)
    plain = Model(nnx.Rngs(0))
    base = outputs(plain, X, None)
    got = outputs(model, X, bank.batch(["c", "b", "d"]))
    for row, name in enumerate(["c", "b", "d"]):
        merged = nnx.clone(plain)
        nnx.update(merged, bank.merge(name))
        want = outputs(merged, X, None)
        np.testing.assert_allclose(got[row], want[row], atol=2e-5)
        assert np.abs(want - base)[row].max() > 1e-2
    bank.save("c", tmp_path)
    saved = load_peft(tmp_path)
    assert {*saved.modules} == {*some.modules}
    for name, weights in some.modules.items():
        np.testing.assert_array_equal(saved.modules[name].a, weights.a)
        assert saved.modules[name].scale == weights.scale
    other, again = served()
    again.load("c", tmp_path)
    np.testing.assert_array_equal(outputs(other, X, again.batch(["c"] * 3))[0], got[0])


def test_an_adapter_is_created_in_every_layer():
    _, bank = served()
    bank.create("new", LoRAConfig(4, 8, target_modules=("up",)), rngs=nnx.Rngs(0))
    assert bank._entry("new").modules == {f"layers.{n}.up" for n in range(LAYERS)}
    a = bank._adapter("new").modules
    assert np.abs(a["layers.0.up"].a - a["layers.1.up"].a).min() > 0
    bank.create("last", LoRAConfig(4, 8, target_modules=r"layers\.2\..*"), rngs=nnx.Rngs(0))
    assert bank._entry("last").modules == {f"layers.2.{n}" for n in ("up", "gate", "down")}


def test_a_load_writes_the_named_layers_alone():
    model, bank = served()
    bank.load("c", make_adapter(5, 8, features={"layers.1.up": (H, 6)}))
    slot = bank._entry("c").slot
    stack = model.layers.up.stacks[0]
    used = np.abs(stack.lora_a[:, slot]).max(axis=(1, 2)) > 0
    assert used.tolist() == [False, True, False]
    scales = model.layers.up.scales[:, slot]
    np.testing.assert_array_equal(scales > 0, used)


def test_packed_slices_of_stacked_layers():
    def make(rngs):
        return LoRADense(H, 6, slots=1, buckets=(8,), slices=(2, 4), rngs=rngs)

    model = nnx.Module()
    model.qv = nnx.vmap(make)(nnx.Rngs(0).split(2))
    model.peft_names = nnx.static({"qv": ("h.{}.q", "h.{}.v")})
    bank = AdapterBank(model)
    features = {"h.0.q": (H, 2), "h.1.v": (H, 4)}
    adapter = make_adapter(1, 4, features=features)
    bank.load("a", adapter)

    @jax.jit
    def step(split, x, batch):
        with use(batch):
            layer = nnx.merge(*split).qv
            return scan_layers(lambda layer, carry, _: (carry, layer(x)), layer, x)[1]

    got = step(nnx.split(model), X, bank.batch(["a"] * 3)) - step(nnx.split(model), X, None)
    want = np.zeros((2, 3, 6))
    for index, weights in zip((np.s_[0, :, :2], np.s_[1, :, 2:]), adapter.modules.values()):
        want[index] = weights.scale * (X @ weights.a.T) @ weights.b.T
    np.testing.assert_allclose(got, want, atol=1e-5)


class Heads(nnx.Module):
    """Einsums, whose kernels have heads between the axes of layers and the features."""

    def __init__(self, rngs):
        def make(rngs):
            return nnx.Einsum("...h,nhd->...nd", (2, H, 2), (2, 2), rngs=rngs)

        self.heads = nnx.vmap(make)(rngs.split(LAYERS))

    def __call__(self, x):
        return scan_layers(lambda layer, x, _: (layer(x).reshape(x.shape), None), self.heads, x)[0]


def test_einsums_of_a_scan():
    model, plain = Heads(nnx.Rngs(0)), Heads(nnx.Rngs(0))
    apply_lora(model, **OPTIONS)
    assert model.heads.stacks[0].lora_b.shape == (LAYERS, 2, H, 8)
    bank = AdapterBank(model)
    bank.load("a", make_adapter(1, 4, features={"heads.0": (H, H), "heads.2": (H, H)}))
    got, base = outputs(model, X, bank.batch(["a", None, "a"])), outputs(plain, X, None)
    nnx.update(plain, bank.merge("a"))
    merged = outputs(plain, X, None)
    np.testing.assert_allclose(got, [merged[0], base[1], merged[2]], atol=2e-5)
    assert np.abs(merged - base).max(axis=1).min() > 1e-2


@pytest.mark.ci
def test_checkpoints_of_flax():
    model, bank = served()
    stored = serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(model)))
    other = Model(nnx.Rngs(1))
    apply_lora(other, **OPTIONS)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, serialization.msgpack_restore(stored))
    nnx.update(other, state)
    batch = AdapterBatch(bank.batch(NAMES).indices, ranges=((8, 2), (16, 3)))
    want = outputs(model, X, bank.batch(NAMES))
    np.testing.assert_array_equal(outputs(other, X, batch), want)


# ------------------------------------------------------------------------------------------ names


class Wrapped(nnx.Module):
    """Layers in a module of their own, as SkyRL-tx has them: PEFT's list is `model.layers`."""

    def __init__(self, rngs):
        self.model = nnx.Module()
        self.model.embed = nnx.Embed(7, H, rngs=rngs)
        self.model.stack = nnx.Module()
        self.model.stack.inner = nnx.vmap(Block)(rngs.split(2))


@pytest.mark.parametrize(
    ("peft_names", "names"),
    [
        ({}, "model.stack.{}.inner."),
        ({"model.stack.inner": "model.layers.{}"}, "model.layers.{}."),
        ({"model.stack": "h.{}"}, "h.{}.inner."),
    ],
)
def test_where_the_number_stands(peft_names, names):
    model = Wrapped(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,))
    model.peft_names = nnx.static(peft_names)
    bank = AdapterBank(model)
    modules = [names.format(n) + layer for n in range(2) for layer in ("up", "gate", "down")]
    assert sorted(bank._sites) == sorted(modules)
    with pytest.raises(ValueError, match=r"adapts modules without LoRA.*it has .*0.*up"):
        bank.load("a", make_adapter(1, 4, features={"model.layers.2.up": (H, 6)}))


@pytest.mark.parametrize(
    ("peft_names", "message"),
    [
        ({"model.stack": "layers"}, r"inner.* stacked along 1 axes, .* 1 times '\{\}'"),
        ({"model.stack.inner.up": "{}.{}"}, r"got \['\{\}\.\{\}'\]"),
        ({"model.stak": "layers.{}"}, r"paths without a LoRA layer: model\.stak"),
        ({"model.stack": ("a", "b")}, r"model\.stack, which holds layers, one name, got \['a'"),
        ({"model.stack.inner.up": "{}", "model.stack.inner.gate": "{}"}, "are called '0'"),
    ],
)
def test_names_that_do_not_fit_are_refused(peft_names, message):
    model = Wrapped(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,))
    model.peft_names = nnx.static(peft_names)
    with pytest.raises(ValueError, match=message):
        AdapterBank(model)


@pytest.mark.parametrize(
    "target", ["up", r"layers\.up", r"layers\.1\.up", (r"layers\.0\.up", r"layers\.2\.up")]
)
def test_targets_match_numbers_too(target):
    model = Model(nnx.Rngs(0))
    apply_lora(model, **OPTIONS, target=target)
    assert isinstance(model.layers.up, LoRADense) and type(model.layers.gate) is nnx.Linear
    with pytest.raises(ValueError, match="no layer matches"):
        apply_lora(Model(nnx.Rngs(0)), target=r"layers\.3\.up")


def test_a_plan_of_numbered_modules_fits():
    model = Model(nnx.Rngs(0))
    apply_lora(model, **plan_slots(ADAPTERS.values(), memory=1 << 20))
    bank = AdapterBank(model)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    assert bank.slots == {8: 1, 16: 1}


# ----------------------------------------------------------------------------------------- errors


def test_stacked_layers_are_not_called_as_one():
    model, _ = served()
    with pytest.raises(ValueError, match=r"LoRADense is \[3\] layers, stacked .*\.scan_layers"):
        model.layers.up(X)


def test_layers_without_an_axis_in_front_are_refused():
    model, _ = served()
    with pytest.raises(ValueError, match=r"one axis of layers in front; these have .* \[4, 4\]"):
        scan_layers(run, model.head, X)
    with pytest.raises(ValueError, match="these have no arrays"):
        scan_layers(run, nnx.Module(), X)


def test_a_batch_of_another_model_is_refused_in_a_scan():
    model, _ = served()
    ids = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="the layer has slots"):
        outputs(model, X, AdapterBatch(ids, ranges=((8, 5),)))


# ------------------------------------------------------------------------------- what a GPU gets


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_kernels_take_the_stacks_of_all_layers(phase):
    """Lowered for a GPU: each kernel in the loop reads `[layers * L, R, H]`, and no slice."""

    def make():
        model = Llama(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        target = None if phase == "decode" else [ATTENTION, "lm_head"]
        apply_lora(model, slots={8: 7, 16: 5}, buckets=(8, 16), target=target)
        return model

    model, rows = nnx.eval_shape(make), 16 if phase == "decode" else 4
    graphdef, state = nnx.split(model)
    ids, tokens = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((rows,), (rows, 320)))
    inputs = (ids,) if phase == "decode" else (tokens, ids)

    def step(state, batch, *inputs):
        model = nnx.merge(graphdef, state)
        with use(batch):
            return (decode if phase == "decode" else prefill)(
                model, model.init_cache(rows, 512), *inputs
            )

    batch = AdapterBatch(ids, ranges=((8, 7), (16, 5)), phase=phase)
    lowered = jax.jit(step).trace(state, batch, *inputs).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    calls = re.findall(r"custom_call @mosaic_gpu\w*\(.*?\).*?: (\(.*?\)) ->", text)
    stacks = [re.findall(r"<(\d+)x\d+x\d+xbf16>", call) for call in calls]
    # Four calls of a layer; in a prefill the two of its attention, of two launches each. And one of
    # lm_head, with stacks alone.
    *of_layers, of_head = [{int(n) for n in some} - {1} for some in stacks]
    assert of_head == {7, 5}
    assert of_layers == [{3 * 7, 3 * 5}] * 4
