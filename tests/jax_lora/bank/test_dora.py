"""DoRA, PEFT's `use_dora`: against PEFT in float32, in batches with plain adapters."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import in_ci
from safetensors.numpy import load_file, save_file
from tiny import forward, make_adapter, make_bank

import jax_lora
from jax_lora import (
    Adapter,
    AdapterBank,
    LoRAConfig,
    LoRAScale,
    apply_lora,
    call_packed,
    load_peft,
    scan_layers,
)
from jax_lora.inspection import inspect_adapter

WIDTH, INNER = 12, 20
CONFIGS = {
    "dora": {"r": 4, "lora_alpha": 16, "use_dora": True},
    "plain": {"r": 7, "lora_alpha": 8},
    "high": {"r": 16, "lora_alpha": 2, "use_dora": True, "use_rslora": True},
    "one module": {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": ["down"]},
}


class TorchMlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = (torch.nn.Linear(WIDTH, INNER, bias=bias) for bias in (True, False))
        self.down = torch.nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Mlp(nnx.Module):
    """The same; `down` is a LinearGeneral, and `packed` calls two layers at once."""

    def __init__(self, torch_model, packed=False):
        self.packed, rngs = packed, nnx.Rngs(0)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.down = nnx.LinearGeneral((INNER,), (3, 4), rngs=rngs)
        for name in ("up", "gate", "down"):
            layer, source = getattr(self, name), getattr(torch_model, name)
            weight = jnp.asarray(source.weight.detach().numpy().T)
            layer.kernel[...] = weight.reshape(layer.kernel.shape)
            if source.bias is not None:
                bias = jnp.asarray(source.bias.detach().numpy())
                layer.bias[...] = bias.reshape(layer.bias.shape)

    def __call__(self, x):
        if self.packed:
            up, gate = call_packed((self.up, self.gate), x)
        else:
            up, gate = self.up(x), self.gate(x)
        return x + self.down(jnp.tanh(gate) * up).reshape(x.shape)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each adapter, inputs, and what PEFT computes of them."""
    root = tmp_path_factory.mktemp("adapters")
    x = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
    with torch.no_grad():
        right = {None: TorchMlp()(torch.from_numpy(x)).numpy()}
    for seed, (name, options) in enumerate(CONFIGS.items()):
        options = {"target_modules": ["up", "gate", "down"], "init_lora_weights": False, **options}
        torch.manual_seed(seed)
        model = peft.get_peft_model(TorchMlp(), peft.LoraConfig(**options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter *= torch.rand_like(parameter) + 0.5
            right[name] = model(torch.from_numpy(x)).numpy()
        model.save_pretrained(root / name)
    return root, x, right


def make(slots=2, *, dora=True, packed=False, adapters_per_row=1):
    model = Mlp(TorchMlp(), packed)
    apply_lora(model, slots=slots, buckets=(8, 16), dora=dora)
    return model, AdapterBank(model, adapters_per_row=adapters_per_row)


ROWS = ["dora", "plain", None, "high", "one module", "dora"]


def wanted(right, rows=ROWS):
    return np.stack([right[name][n] for n, name in enumerate(rows)])


@pytest.mark.ci
@pytest.mark.parametrize("packed", [False, True])
def test_mixed_batches_equal_peft(saved, packed, optimised):
    root, x, right = saved
    model, bank = make(3, packed=packed)
    plain, base = make(3, dora=False, packed=packed)
    base.load("plain", root / "plain")
    for name in CONFIGS:
        bank.load(name, root / name)
    for phase in ("decode", "prefill"):
        got = forward(model, x, bank.batch(ROWS, phase=phase))
        np.testing.assert_allclose(got, wanted(right), atol=1e-4, rtol=1e-4)
        # Rows without DoRA have the bits of a model without room for it.
        same = forward(plain, x, base.batch([None, "plain", *[None] * 4], phase=phase))
        np.testing.assert_array_equal(got[1:3], same[1:3])
    assert min(np.abs(right[name] - right[None]).max() for name in CONFIGS) > 0.1


def test_evict_reload_and_replace(saved):
    root, x, right = saved
    model, bank = make(1)  # all but "high" take turns in one slot
    for name in ("dora", "plain", "one module", "dora"):
        bank.load(name, root / name)
        bank.load("high", root / "high", replace="high" in bank.names)
        rows = [name, None, "high"] * 2
        got = forward(model, x, bank.batch(rows))
        np.testing.assert_allclose(got, wanted(right, rows), atol=1e-4, rtol=1e-4)
    bank.load("dora", root / "plain", replace=True)
    got = forward(model, x, bank.batch(["dora"] * 6))
    np.testing.assert_allclose(got, right["plain"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [in_ci("dora"), "one module"])
def test_saved_again_it_is_the_same(saved, tmp_path, name):
    root, x, right = saved
    _, bank = make()
    bank.load(name, root / name)
    bank.save(name, tmp_path)
    for module, weights in load_peft(root / name).modules.items():
        again = load_peft(tmp_path).modules[module]
        np.testing.assert_array_equal(again.a, weights.a)
        np.testing.assert_allclose(again.magnitude, weights.magnitude, rtol=1e-6)
    model = peft.PeftModel.from_pretrained(TorchMlp(), tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(x)).numpy(), right[name], atol=1e-4)


@pytest.mark.parametrize("name", ["dora", *map(in_ci, ("high", "one module"))])
def test_merged_it_computes_the_same(saved, name):
    root, x, right = saved
    _, bank = make()
    bank.load(name, root / name)
    plain = Mlp(TorchMlp())
    nnx.update(plain, bank.merge(name))
    np.testing.assert_allclose(plain(x), right[name], atol=1e-4, rtol=1e-4)


def test_a_load_compiles_nothing(saved):
    root, x, _ = saved
    model, bank = make()
    graphdef, _, rest = nnx.split(model, (nnx.LoRAParam, LoRAScale), ...)

    @jax.jit
    def step(state, rest, x, batch):
        with jax_lora.use(batch):
            return nnx.merge(graphdef, state, rest)(x)

    step(bank.state, rest, x, bank.batch([None] * 6))
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name in CONFIGS:
            bank.load(name, root / name)
            step(bank.state, rest, x, bank.batch([name, None] * 3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


class Blocks(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))(
            nnx.Rngs(0).split(2)
        )

    def __call__(self, x):
        return scan_layers(lambda layer, x, _: (jnp.tanh(layer(x)), None), self.layers, x)[0]


def with_magnitudes(adapter, seed=0):
    """The adapter, with DoRA of any magnitudes."""
    rng = np.random.default_rng(seed)
    modules = {
        name: dataclasses.replace(w, magnitude=rng.uniform(0.5, 2, w.b.shape[0]).astype(np.float32))
        for name, w in adapter.modules.items()
    }
    return Adapter(dataclasses.replace(adapter.config, dora=True), modules)


def test_layers_of_a_scan_have_norms_of_their_own():
    model = Blocks()
    features = {f"layers.{n}": (WIDTH, WIDTH) for n in range(2)}
    adapter = with_magnitudes(make_adapter(1, 3, features=features))
    kernels = np.float64(model.layers.kernel[...])
    biases = np.float64(model.layers.bias[...])
    apply_lora(model, slots=2, buckets=(8,), dora=True)
    bank = AdapterBank(model)
    bank.load("a", adapter)
    x = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    want = x[:1].astype(np.float64)
    for n in range(2):
        w = adapter.modules[f"layers.{n}"]
        whole = kernels[n].T + w.scale * np.float64(w.b) @ np.float64(w.a)
        whole *= (w.magnitude / np.linalg.norm(whole, axis=1))[:, None]
        want = np.tanh(want @ whole.T + biases[n])
    got = forward(model, x, bank.batch(["a", None]))
    np.testing.assert_allclose(got[:1], want, atol=1e-5)
    np.testing.assert_array_equal(got[1], forward(model, x)[1])
    assert set(jax.tree.leaves(bank.merge("a"))[0].shape) == {2, WIDTH}


def test_packed_slices_have_their_own():
    model = nnx.Module()
    model.qkv = jax_lora.LoRADense(WIDTH, 8, slots=2, buckets=(8,), slices=(5, 3), rngs=nnx.Rngs(0))
    model.qkv.add_rescales()
    bank = AdapterBank(model)
    features = {"qkv.0": (WIDTH, 5), "qkv.1": (WIDTH, 3)}
    adapter = with_magnitudes(make_adapter(1, 3, features=features))
    bank.load("a", adapter)
    x = np.random.default_rng(0).normal(size=(1, WIDTH)).astype(np.float32)
    kernel = np.float64(model.qkv.kernel[...]).T
    want = []
    for name, rows in (("qkv.0", kernel[:5]), ("qkv.1", kernel[5:])):
        w = adapter.modules[name]
        whole = rows + w.scale * np.float64(w.b) @ np.float64(w.a)
        want.append(whole * (w.magnitude / np.linalg.norm(whole, axis=1))[:, None])
    got = model.qkv(x, bank.batch(["a"]))
    np.testing.assert_allclose(got, x @ np.concatenate(want).T, atol=1e-5)


def test_beside_mixes(saved):
    root, x, right = saved
    model, bank = make(3, adapters_per_row=2)
    for name in CONFIGS:
        bank.load(name, root / name)
    got = forward(model, x, bank.batch([*ROWS[:5], {"dora": 1.0}]))
    np.testing.assert_allclose(got, wanted(right), atol=1e-4, rtol=1e-4)
    for row in ({"dora": 0.5}, {"plain": 1.0, "dora": 1.0}):
        with pytest.raises(ValueError, match=r"row 1: 'dora' uses DoRA, .* a row of its own"):
            bank.batch([None, row])


@pytest.mark.ci
def test_gradients_of_stacks_are_those_of_peft(saved):
    """PEFT holds the norm for a constant, as do we."""
    root, x, _ = saved
    reference = peft.PeftModel.from_pretrained(TorchMlp(), root / "dora", is_trainable=True)
    torch.sum(torch.sin(reference(torch.from_numpy(x)))).backward()
    model, bank = make()
    bank.load("dora", root / "dora")
    batch = bank.batch(["dora"] * 6)

    def loss(model):
        return jnp.sum(jnp.sin(model(x)))

    with jax_lora.use(batch):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    for name in ("up", "gate", "down"):
        for half, shape in (("A", np.s_[:4]), ("B", np.s_[:, :4])):
            want = reference.get_parameter(f"base_model.model.{name}.lora_{half}.default.weight")
            got = grads[name].stacks[0][f"lora_{half.lower()}"][...][0][shape]
            np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-4, rtol=1e-3)


def test_a_step_trains_adapters_without_dora_alone(saved):
    root, *_ = saved
    _, bank = make()
    for name in ("dora", "plain"):
        bank.load(name, root / name)
    with pytest.raises(ValueError, match=r"\['dora'\] use DoRA, which is not trained here: a step"):
        bank.trainees(["plain", "dora"])
    assert bank.trainees(["plain"]).by_bucket[8].serials.any()


@pytest.mark.ci
def test_on_a_mesh_tokens_may_be_divided_and_kernels_may_not():
    x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    adapter = with_magnitudes(make_adapter(1, 3, features={"proj": (WIDTH, 8)}))
    results = []
    for spec in (None, P("dp"), P()):
        model = nnx.Module()
        model.proj = nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0))
        apply_lora(model, slots=2, buckets=(8,), dora=True)
        bank = AdapterBank(model)
        bank.load("a", adapter)
        batch, given = bank.batch(["a", None] * 2), jnp.asarray(x)
        if spec is not None:
            mesh = jax.make_mesh((4,), ("dp",), axis_types=(AxisType.Explicit,))
            given = jax.device_put(x, NamedSharding(mesh, spec))
        results.append(np.asarray(model.proj(given, batch)))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    kernel = model.proj.kernel
    kernel.set_value(jax.device_put(kernel[...], NamedSharding(mesh, P(None, "tp"))))
    bank = AdapterBank(model)
    with pytest.raises(ValueError, match="DoRA needs whole kernels, but this layer's is divided"):
        model.proj(jnp.asarray(x), bank.batch([None] * 4))


def test_a_model_without_room_names_the_mend(saved):
    root, _, _ = saved
    _, bank = make(dora=False)
    for adapter in (root / "dora", load_peft(root / "dora")):
        with pytest.raises(
            ValueError, match=r"adapter 'x' uses DoRA, .* give apply_lora dora=True"
        ):
            bank.load("x", adapter)
    assert bank.names == ()
    config = LoRAConfig(4, 8.0, dora=True)
    with pytest.raises(ValueError, match="DoRA is not trained here"):
        bank.create("x", config, rngs=nnx.Rngs(0))


def test_an_embedding_is_refused_by_name():
    model = nnx.Module()
    model.embed = nnx.Embed(WIDTH, 8, rngs=nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8,), target="embed", dora=True)
    bank = AdapterBank(model)
    adapter = with_magnitudes(make_adapter(1, 3, features={"embed": (WIDTH, 8)}))
    weights = dataclasses.replace(adapter.modules["embed"], is_embedding=True)
    with pytest.raises(ValueError, match=r"uses DoRA, .* no room: 'embed'; .* in nnx\.Linear"):
        bank.load("a", Adapter(adapter.config, {"embed": weights}))


def test_room_for_dora_is_counted_and_needs_no_weights():
    sizes = []
    for dora in (False, True):
        model = Mlp(TorchMlp())
        sizes.append(apply_lora(model, slots=3, buckets=(8,), dora=dora))
    assert sizes[1] - sizes[0] == 3 * 4 * (INNER + INNER + WIDTH)
    model = nnx.Module()
    model.layer = nnx.Einsum("ab,bc->ac", (4, 5), (5,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer: DoRA does not cover an nnx.Einsum with a bias"):
        apply_lora(model, dora=True)
    assert type(model.layer) is nnx.Einsum


def test_inspect_says_what_it_needs(saved):
    root, _, _ = saved
    advice = {name: inspect_adapter(root / name).advice for name in ("dora", "plain")}
    assert advice["dora"][0] == "it uses DoRA, so give apply_lora dora=True"
    assert not any("DoRA" in line for line in advice["plain"])


def damaged(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


VECTOR = "base_model.model.down.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(VECTOR), "down has no magnitude, but the config says DoRA"),
        (lambda t, c: c.update(use_dora=False), "has a magnitude of DoRA, but the config says no"),
        (lambda t, c: t.update({VECTOR: t[VECTOR][1:]}), "must be [12] of float32, float16"),
        (lambda t, c: t.update({VECTOR: t[VECTOR] * np.nan}), "down has NaN or infinite weights"),
        (lambda t, c: c.update(use_dora="yes"), "dora must be True or False, got 'yes'"),
    ],
)
def test_malformed_files_are_refused(saved, tmp_path, change, message):
    root, _, _ = saved
    jax_lora.save_peft(load_peft(root / "one module"), tmp_path)
    damaged(tmp_path, change)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        load_peft(tmp_path)


def test_a_weight_without_direction_is_refused():
    model, bank = make_bank(dora=True)
    model.up.kernel[...] = jnp.zeros_like(model.up.kernel[...])
    adapter = with_magnitudes(make_adapter(1, 4))
    modules = {n: dataclasses.replace(w, b=np.zeros_like(w.b)) for n, w in adapter.modules.items()}
    with pytest.raises(ValueError, match="up: row 0 of the whole weight has norm 0"):
        bank.load("a", Adapter(adapter.config, modules))
    assert bank.names == ()
