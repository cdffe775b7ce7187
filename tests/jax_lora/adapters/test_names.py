"""Names that other people's files give to modules: wrappers, renaming, the name that was meant."""

import json
import re

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import expected, forward, make_adapter, make_bank, tokens
from torch_net import Net

from jax_lora import Adapter, LoRAConfig, LoRAWeights, load_peft, save_peft
from jax_lora.adapters import meant, renamed
from jax_lora.adapters.names import config_of, new_names

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = {"up": "model.layers.0.up", "down": "model.layers.0.down"}


def rewrite(folder, change, **config):
    """The folder's tensors under other keys, and keys of its config changed."""
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | config))


def save_renamed(folder, prefix, adapter=None):
    """An adapter of the model of tiny.py, whose modules have a prefix."""
    save_peft(renamed(adapter or make_adapter(1, 4), lambda name: prefix + name), folder)
    return folder


class Outer(torch.nn.Module):
    """What DDP does to names, without processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def options(**changes):
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]} | changes,
        init_lora_weights=False,
    )


def deltas_of_peft(model):
    """`{name in the file: scale * B @ A}` of PEFT's own layers."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def deltas_of(adapter):
    return {name: w.scale * w.b @ w.a for name, w in adapter.modules.items()}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    ("wrap", "rename", "wrapped"),
    [
        (torch.compile, None, "_orig_mod.up"),
        (Outer, {"module": ""}, "module.up"),
        (lambda net: Outer(torch.compile(net)), {"module.": ""}, "module._orig_mod.up"),
    ],
    ids=["compile", "ddp", "ddp of compile"],
)
def test_adapters_that_peft_made_of_wrapped_models(tmp_path, wrap, rename, wrapped):
    net = wrap(Net())
    linear = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    model = peft.get_peft_model(net, options(target_modules=linear))
    right = deltas_of_peft(model)
    assert wrapped in right
    model.save_pretrained(tmp_path)
    got = deltas_of(load_peft(tmp_path, rename=rename))
    assert got.keys() == {"up", "down"}
    for name, delta in got.items():
        (other,) = (value for key, value in right.items() if name in key)
        np.testing.assert_allclose(delta, other, atol=1e-5)


@pytest.mark.parametrize(
    "key",
    [
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
        "{}|up=up._fsdp_wrapped_module",
        "{}|model.up=model._orig_mod.up",
        "{}|up.lora=up._checkpoint_wrapped_module.lora",
        "{}|.weight=._fsdp_wrapped_module.weight",
        "{}|base_model.=base_model._orig_mod.",
    ],
)
def test_wrappers_in_keys(tmp_path, key):
    adapter = make_adapter(1, 4)
    save_peft(adapter, tmp_path)
    form, _, change = key.partition("|")
    old, _, new = change.partition("=")
    rewrite(tmp_path, lambda name: form.format(name.replace(old, new) if old else name))
    assert sorted(deltas_of(load_peft(tmp_path))) == ["down", "up"]
    for name, delta in deltas_of(load_peft(tmp_path)).items():
        np.testing.assert_array_equal(delta, deltas_of(adapter)[name])


def test_patterns_that_mean_a_name_with_a_wrapper_are_exact_or_refused(tmp_path):
    adapter = make_adapter(1, 4)
    save_peft(adapter, tmp_path)
    rewrite(tmp_path, lambda key: key.replace("model.up", "model._orig_mod.up"))
    rewrite(tmp_path, str, alpha_pattern={"up": 8})
    assert load_peft(tmp_path).modules["up"].scale == 2.0
    for pattern in (r"_orig_mod\.up", r"^up"):  # PEFT scales by the one, and not by the other
        rewrite(tmp_path, str, alpha_pattern={pattern: 8})
        with pytest.raises(
            ValueError, match=r"give up rank and alpha .*by its name in the file, _"
        ):
            load_peft(tmp_path)
    rewrite(tmp_path, str, alpha_pattern={}, target_modules=["_orig_mod.up", "down"])
    assert load_peft(tmp_path).modules["up"].scale == 0.5


def test_the_name_with_wrappers_is_that_below_pefts_prefix(tmp_path):
    save_renamed(tmp_path, "model.")
    rewrite(
        tmp_path,
        lambda key: "module." + key.replace("model.model.up", "model._orig_mod.model.up"),
        alpha_pattern={r"^model\.up": 8},
    )
    with pytest.raises(ValueError, match=r"by its name in the file, _orig_mod\.model\.up; write"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "rename"),
    [
        ("module.", {"module": ""}),
        ("base_model.model.", {"base_model.model": ""}),
        ("model.language_model.", {"model.language_model": "", "model": "wrong"}),
        ("a.b.", lambda name: name.rpartition(".")[2]),
    ],
)
def test_a_bank_loads_renamed_modules(tmp_path, prefix, rename):
    ranks = {"rank_pattern": {"up": 7}, "alpha_pattern": {f"{prefix}down": 9}}
    adapter = make_adapter(1, 4, rank_pattern={"up": 7}, alpha_pattern={"down": 9})
    save_renamed(tmp_path, prefix, adapter)
    rewrite(tmp_path, str, r=4, lora_alpha=2, **ranks, target_modules=["up", "down"])
    model, bank = make_bank()
    x = tokens(3)
    for source in (tmp_path, load_peft(tmp_path)):
        bank.load("a", source, rename=rename, replace=True)
        got = forward(model, x, bank.batch(["a", None, "a"]))
        np.testing.assert_allclose(got, expected(model, x, [adapter, None, adapter]), atol=1e-5)
    bank.save("a", tmp_path / "again")
    assert load_peft(tmp_path / "again").modules["up"].rank == 7


def test_renamed_modules_keep_dora(tmp_path):
    w, m = np.ones((4, 4), np.float32), np.full(4, 3, np.float32)
    weights = {"model.up": LoRAWeights(w, w, 0.5, magnitude=m)}
    save_peft(Adapter(LoRAConfig(4, alpha=2, dora=True), weights), tmp_path)
    for adapter in (
        load_peft(tmp_path, rename={"model": ""}),
        renamed(load_peft(tmp_path), {"model": ""}),
    ):
        assert adapter.config.dora
        np.testing.assert_array_equal(adapter.modules["up"].magnitude, m)


def test_prefixes():
    modules = ["model.a.q", "model.b.q", "q", "modelb.q"]
    for rename, right in (
        ({}, modules),
        ({"model": "m"}, ["m.a.q", "m.b.q", "q", "modelb.q"]),
        ({"model.": "", "model.b": "x.y."}, ["a.q", "x.y.q", "q", "modelb.q"]),
        ({"": "m"}, ["m.model.a.q", "m.model.b.q", "m.q", "m.modelb.q"]),
        ({"q": "k"}, ["model.a.q", "model.b.q", "k", "modelb.q"]),
    ):
        assert list(new_names(modules, rename).values()) == right


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        ({"module.up": "x", "module.down": "x"}, ValueError, "'module.*' and 'module.*' one name"),
        ({"module.up": ""}, ValueError, "'' is not a module's name"),
        ({"module": "a b"}, ValueError, r"'a b\.\w+' is not a module's name"),
        ({"module": 3}, TypeError, "must map text to text, got 'module': 3"),
        (lambda name: None, TypeError, r"rename gives None for 'module\.\w+'"),
        (lambda name: "x" * 9000, ValueError, "is not a module's name"),
        ("module", TypeError, "rename must map prefixes .* or be a function, got 'module'"),
    ],
)
def test_bad_renames(tmp_path, rename, error, message):
    save_renamed(tmp_path, "module.")
    with pytest.raises(error, match=message) as caught:
        load_peft(tmp_path, rename=rename)
    assert len(str(caught.value)) < 1000


def test_the_config_of_whole_names_is_exact():
    """Also where one name is the end of another, and for rsLoRA."""
    ranks = {"q": 2, "a.q": 3, "b.a.q": 4, "aXq": 5, "k": 2}
    alphas = {"q": 1.0, "a.q": 2.0, "b.a.q": 3.0, "aXq": 4.0, "k": 1.0}
    for rslora in (False, True):
        config = config_of(ranks, alphas, rslora=rslora)
        assert {name: config.rank_of(name) for name in ranks} == ranks
        assert {name: config.alpha_of(name) for name in ranks} == alphas
        assert config.rslora is rslora and all(map(config.targets, ranks))
    same = config_of({"a": 4, "b": 4}, {"a": 8.0, "b": 8.0})
    assert same == LoRAConfig(4, 8.0, target_modules=("a", "b"))


def test_errors_name_the_module_that_was_meant_and_the_rename(tmp_path):
    model, bank = make_bank()
    save_renamed(tmp_path, "base_model.model.")
    message = r"the closest to 'base_model\.model\.down' is 'down'; give (rename=.*), by which all"
    with pytest.raises(ValueError, match=message) as caught:
        bank.load("a", tmp_path)
    assert bank.names == ()
    mend = re.search(r"rename=(\{.*\})", str(caught.value))
    bank.load("a", tmp_path, rename=eval(mend[1]))  # what the message says is right
    x = tokens(2)
    got = forward(model, x, bank.batch(["a", None]))
    np.testing.assert_allclose(got, expected(model, x, [make_adapter(1, 4), None]), atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "known", "message"),
    [
        (["a.q"], ["a.q"], ""),
        (["a.q"], [], ""),
        (["l.0.qproj"], ["l.0.k_proj", "l.0.q_proj"], "the closest to 'l.0.qproj' is 'l.0.q_proj'"),
        (
            ["layers.1.q", "layers.0.q"],
            ["model.layers.0.q", "model.layers.1.q", "visual.layers.0.q"],
            "the closest to 'layers.0.q' is 'model.layers.0.q'; give rename={'': 'model'}, by "
            "which all its modules fit",
        ),
        # One of them has no counterpart, or only the other's.
        (["m.a.q", "m.b.k"], ["a.q", "c.k"], "the closest to 'm.a.q' is 'a.q'"),
        (["m.a.q", "a.q"], ["a.q"], "the closest to 'm.a.q' is 'a.q'"),
    ],
)
def test_the_closest_name(modules, known, message):
    assert meant(modules, known) == message


def test_the_closest_of_many_names_is_found_soon():
    known = [f"model.layers.{n}." + "x" * 400 for n in range(5000)]
    assert "layers.4999." in meant(["y.layers.4999." + "x" * 400], known)


def test_renamed_adapters_are_checked():
    weights = LoRAWeights(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 1.0)
    adapter = renamed(Adapter(LoRAConfig(2, 2.0), {"x.q": weights}), {"x": "y"})
    assert list(adapter.modules) == ["y.q"] and adapter.config.target_modules == ("y.q",)
