"""Adapters of PEFT's in mixed batches against PEFT itself, in float32: the long matrix."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from tiny import make_adapter
from transformers.pytorch_utils import Conv1D

import jax_lora
from jax_lora import AdapterBank, apply_lora

WIDTH = 12
RANKS = (1, 2, 4, 7, 8, 9, 12, 15, 16, 17, 33, 48, 64, 80, 96, 112, 127, 128, 130, 160, 256)
BUCKETS = (8, 16, 32, 64, 80, 96, 112, 128, 144, 160, 256)
ROWS, LENGTH = 6, 3


class TorchBlock(torch.nn.Module):
    """Attention-like: products of projections, so that a wrong scale anywhere shows."""

    def __init__(self, linear):
        super().__init__()
        self.attn = torch.nn.Module()
        self.attn.q_proj = linear(WIDTH, WIDTH)
        self.attn.v_proj = linear(WIDTH, WIDTH)
        self.up_proj = linear(WIDTH, 20)
        self.down_proj = linear(20, WIDTH)

    def forward(self, x):
        x = x + torch.sigmoid(self.attn.q_proj(x)) * self.attn.v_proj(x)
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class TorchModel(torch.nn.Module):
    def __init__(self, linear=torch.nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(TorchBlock(linear) for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, 7)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.25)

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.head(x)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.v_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = Attention(rngs)
        self.up_proj = nnx.Linear(WIDTH, 20, rngs=rngs)
        self.down_proj = nnx.Linear(20, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + nnx.sigmoid(self.attn.q_proj(x)) * self.attn.v_proj(x)
        return x + self.down_proj(jnp.tanh(self.up_proj(x)))


class Model(nnx.Module):
    def __init__(self, torch_model):
        rngs = nnx.Rngs(0)
        self.model = nnx.Module()
        self.model.layers = nnx.List(Block(rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, 7, rngs=rngs)
        for path, module in nnx.iter_modules(self):
            if isinstance(module, nnx.Linear):
                source = torch_model.get_submodule(".".join(map(str, path)))
                weight = source.weight.detach().numpy()
                transposed = isinstance(source, torch.nn.Linear)
                module.kernel[...] = jnp.asarray(weight.T if transposed else weight)
                module.bias[...] = jnp.asarray(source.bias.detach().numpy())

    def __call__(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.head(x)


FEATURES = {
    f"model.layers.{n}.{name}": shape
    for n in range(2)
    for name, shape in {
        "attn.q_proj": (WIDTH, WIDTH),
        "attn.v_proj": (WIDTH, WIDTH),
        "up_proj": (WIDTH, 20),
        "down_proj": (20, WIDTH),
    }.items()
}
ATTENTION, MLP = ["q_proj", "v_proj"], ["up_proj", "down_proj"]
ALL = [*ATTENTION, *MLP, "head"]

CONFIGS = {
    **{f"rank {r}": {"r": r, "lora_alpha": 8, "target_modules": ALL} for r in RANKS},
    "alpha below the rank": {"r": 16, "lora_alpha": 1, "target_modules": ALL},
    "alpha above the rank": {"r": 4, "lora_alpha": 64, "target_modules": ALL},
    "alpha of no whole ratio": {"r": 7, "lora_alpha": 5, "target_modules": ALL},
    **{
        f"rslora rank {r}": {"r": r, "lora_alpha": 4, "use_rslora": True, "target_modules": ALL}
        for r in (4, 9, 64, 130)
    },
    "rank_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.attn\.v_proj": 16, "layers.0.up_proj": 1},
    },
    "alpha_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ALL,
        "alpha_pattern": {"v_proj": 1, r".*\.0\.down_proj": 40, "head": 3},
    },
    "both patterns, rslora": {
        "r": 12,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ALL,
        "rank_pattern": {"^head": 20, "down_proj": 2},
        "alpha_pattern": {"down_proj": 9, "layers.1.attn.q_proj": 2},
    },
    "attention only": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "mlp only": {"r": 8, "lora_alpha": 16, "target_modules": MLP},
    "one module": {"r": 8, "lora_alpha": 16, "target_modules": ["model.layers.1.attn.q_proj"]},
    "a nested name": {"r": 8, "lora_alpha": 16, "target_modules": ["attn.v_proj", "head"]},
    "a regular expression": {"r": 8, "lora_alpha": 16, "target_modules": r".*\.0\..*_proj"},
    "all-linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "layers_to_transform": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION,
        "layers_to_transform": [1],
    },
    "exclude_modules": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "exclude_modules": ["head", "model.layers.0.attn.q_proj"],
    },
}
FILES = ("float16", "bfloat16", "sharded with an index", "sharded without an index")


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def save_adapter(folder, base, options, seed=0):
    """Random weights in a new PEFT model over `base`; saved, and what it computes."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():  # deltas of the size of the base's outputs, whatever the rank and alpha
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                module = model.get_submodule(name.partition(".lora_B")[0])
                parameter *= 2 / (module.scaling["default"] * module.r["default"] ** 0.5)
    model.save_pretrained(folder)
    return model


def outputs(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, inputs):
    """A folder of every adapter, and its outputs by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    right = {None: outputs(TorchModel(), inputs)}
    for seed, (name, options) in enumerate(CONFIGS.items()):
        right[name] = outputs(save_adapter(root / name, TorchModel(), options, seed), inputs)
    for name in FILES:  # the same adapter in other files, as PEFT reads it
        source = root / "rank 12"
        shutil.copytree(source, root / name)
        file = root / name / "adapter_model.safetensors"
        tensors = load_file(file)
        if name in ("float16", "bfloat16"):
            save_file({k: v.to(getattr(torch, name)) for k, v in tensors.items()}, file)
            model = peft.PeftModel.from_pretrained(TorchModel(), root / name)
            right[name] = outputs(model, inputs)
            continue
        file.unlink()
        shards = [f"adapter_model-{n}-of-00003.safetensors" for n in ("00001", "00002", "00003")]
        where = dict(zip(tensors, itertools.cycle(shards)))
        for shard in shards:
            save_file({k: tensors[k] for k in tensors if where[k] == shard}, root / name / shard)
        if name == "sharded with an index":
            index = root / name / "adapter_model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        right[name] = right["rank 12"]
    return root, right


@pytest.fixture(scope="module")
def served():
    model = Model(TorchModel())
    apply_lora(model, slots=2, buckets=BUCKETS)
    bank = AdapterBank(model)

    @nnx.jit
    def step(model, x, batch):
        with jax_lora.use(batch):
            return model(x)

    return bank, lambda x, batch: np.asarray(step(model, x, batch))


def check(served, right, inputs, names):
    """Rows of all names that are loaded, in both phases, against PEFT's."""
    bank, step = served
    rows = [names[n % len(names)] for n in range(ROWS)]
    for phase in ("decode", "prefill"):
        got = step(inputs, bank.batch(rows, phase=phase))
        for n, name in enumerate(rows):
            np.testing.assert_allclose(
                got[n], right[name][n], atol=1e-4, err_msg=f"{name}, {phase}"
            )


NEIGHBOURS = ("alpha_pattern", "rank_pattern")  # of buckets 8 and 16


@pytest.mark.ci
@pytest.mark.parametrize("name", [*CONFIGS, *FILES])
def test_rows_equal_peft(served, saved, inputs, name):
    """In a mixed batch with other adapters and base rows; and again after evict and reload."""
    bank, _ = served
    root, right = saved
    assert np.abs(right[name] - right[None]).max() > 0.05
    for other in bank.names:
        bank.unload(other)
    for other in dict.fromkeys((name, *NEIGHBOURS)):
        bank.load(other, root / other)
    check(served, right, inputs, [name, None, *NEIGHBOURS])
    bucket = bank.bucket(name)
    for n in range(2):  # strangers in both slots of its bucket
        bank.load(f"stranger {n}", make_adapter(n, bucket, features=FEATURES, alpha=50))
    assert name not in bank.names
    bank.load(name, root / name)
    assert "stranger 0" not in bank.names
    check(served, right, inputs, [None, name])


@pytest.mark.ci
def test_fan_in_fan_out(tmp_path, inputs):
    """Transformers' Conv1D stores its weight transposed; PEFT's A and B are as ever."""
    torch_model = TorchModel(lambda n_in, n_out: Conv1D(n_out, n_in))
    model = Model(torch_model)
    apply_lora(model, slots=1, buckets=(8,))
    bank = AdapterBank(model)
    options = {"r": 6, "lora_alpha": 9, "target_modules": [*ATTENTION, *MLP]}
    base = outputs(torch_model, inputs)
    right = outputs(
        save_adapter(tmp_path, torch_model, {**options, "fan_in_fan_out": True}), inputs
    )
    assert np.abs(right - base).max() > 0.05
    bank.load("a", tmp_path)
    for _ in range(2):
        with jax_lora.use(bank.batch(["a", None] * 3)):
            got = model(jnp.asarray(inputs))
        np.testing.assert_allclose(got[::2], right[::2], atol=1e-4)
        np.testing.assert_allclose(got[1::2], base[1::2], atol=1e-4)
        bank.load("stranger", bank._adapter("a"))  # evicts
        assert bank.names == ("stranger",)
        bank.load("a", tmp_path)


@pytest.mark.ci
def test_saved_adapters_compute_the_same_in_peft(served, saved, inputs, tmp_path):
    bank, _ = served
    root, right = saved
    for name in ("rank 9", "rslora rank 130", "both patterns, rslora", "a regular expression"):
        bank.load(name, root / name, replace=True)
        bank.save(name, tmp_path / name)
        model = peft.PeftModel.from_pretrained(TorchModel(), tmp_path / name)
        np.testing.assert_allclose(outputs(model, inputs), right[name], atol=1e-6)


def test_the_matrix_is_not_run_in_tf32():
    assert jax.config.jax_default_matmul_precision is None  # float32 comes from the ops themselves
