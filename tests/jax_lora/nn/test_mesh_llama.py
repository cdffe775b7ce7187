"""A Llama on a mesh: 1, 2, 4 and 8 devices compute what one does, forward and gradients."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import COLUMN, ROW, assert_equal, collectives, mesh_of
from tiny import logits_and_gradients, make_adapter

import jax_lora
from jax_lora import AdapterBank, apply_lora, llama

RANKS = (1, 3, 16, 40, 160)
NAMES = ["160", "3", None, "16", "40", "3", "1", None]
CONFIG = llama.LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=4,
)


def tokens():
    return np.random.default_rng(0).integers(0, 61, (len(NAMES), 5)).astype(np.int32)


def model_on(mesh, column, row, *, scan=True, buckets=(16, 160), fully_sharded=False):
    """A Llama, attention and MLP divided as the specs say, with adapters of several ranks."""
    model = llama.Llama(CONFIG, rngs=nnx.Rngs(0), scan=scan)
    for path, module in nnx.iter_modules(model):
        if mesh is not None and path and str(path[-1]).endswith("_proj"):
            spec = row if path[-1] in ("o_proj", "down_proj") else column
            lead = [None] * (module.kernel.ndim - 2)
            sharding = NamedSharding(mesh, P(*lead, *spec))
            module.kernel.set_value(jax.device_put(module.kernel.get_value(), sharding))
    how = {"slots": 5, "buckets": buckets, "fully_sharded": fully_sharded}
    apply_lora(model, target=".*_proj", **how)
    bank = AdapterBank(model)
    features = {name: site.features for name, site in bank._sites.items()}
    for rank in RANKS:
        bank.load(f"{rank}", make_adapter(rank, rank, features=features))
    return model, bank


@nnx.jit
def step(model, ids, adapters):
    with jax_lora.use(adapters):
        return model(ids)


def result(mesh, form, phase, **how):
    """Logits and gradients, and the arguments of a step."""
    column, row, of_ids = form
    model, bank = model_on(mesh, column, row, **how)
    ids = tokens()
    if mesh is not None:
        ids = jax.device_put(ids, NamedSharding(mesh, of_ids))
    arguments = model, ids, bank.batch(NAMES, phase=phase)
    return logits_and_gradients(*arguments), arguments


@functools.cache
def on_one_device(phase, scan, buckets):
    return result(None, (None, None, None), phase, scan=scan, buckets=buckets)[0]


TENSOR = (COLUMN, ROW, P())
BOTH = (P("fsdp", "tp"), P("tp", "fsdp"), P("fsdp"))
BUCKETS, WIDE = (16, 160), (64, 192)
CASES = {  # the mesh, how kernels and ids are divided, the kind of axes, buckets
    "2": ({"tp": 2}, TENSOR, AxisType.Auto, BUCKETS),
    "4": ({"tp": 4}, TENSOR, AxisType.Explicit, BUCKETS),
    "4, ranks too": ({"tp": 4}, TENSOR, AxisType.Explicit, WIDE),
    "8, ranks too": ({"tp": 8}, TENSOR, AxisType.Auto, WIDE),
    "8, explicit": ({"tp": 8}, TENSOR, AxisType.Explicit, BUCKETS),
    "data of 8": ({"dp": 8}, (P(), P(), P("dp")), AxisType.Auto, BUCKETS),
    "fsdp of 4, 2, ranks too": ({"fsdp": 4, "tp": 2}, BOTH, AxisType.Auto, WIDE),
}
PREFILLS = ("4", "4, ranks too")
MORE_CASES = {  # the same code; test_mesh.py has single layers on such meshes
    "1": ({"tp": 1}, TENSOR, AxisType.Explicit, BUCKETS),
    "2, ranks too": ({"tp": 2}, TENSOR, AxisType.Auto, WIDE),
    "8": ({"tp": 8}, TENSOR, AxisType.Auto, BUCKETS),
    "fsdp of 2, 4": ({"fsdp": 2, "tp": 4}, BOTH, AxisType.Auto, BUCKETS),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)]
)
def test_a_llama_equals_that_of_one_device(case):
    """Adapters of ranks 1 to 160 in one batch; logits, and the gradients of all stacks."""
    sizes, form, kind, buckets = (CASES | MORE_CASES)[case]
    scan, phase = case != "4", "prefill" if case in PREFILLS else "decode"
    how = {"scan": scan, "buckets": buckets, "fully_sharded": buckets == WIDE}
    got, again = result(mesh_of(kind, **sizes), form, phase, **how)
    assert_equal(got, on_one_device(phase, scan, buckets))
    if sizes.get("tp") == 8:
        assert any("tp" in str(gradient.sharding.spec) for gradient in jax.tree.leaves(got[1]))
        small = {"all-gather": 5, "reduce-scatter": 2} if buckets == WIDE else {}
        assert collectives(step, *again) == {"all-reduce": 2, **small}


@pytest.mark.parametrize(
    "projection, spec, features", [("q_proj", COLUMN, "32 output"), ("o_proj", ROW, "32 input")]
)
def test_a_width_that_does_not_divide_is_refused_by_name(projection, spec, features):
    """Before anything changes."""
    model = llama.Llama(CONFIG, rngs=nnx.Rngs(0))
    modules = {path[-1]: module for path, module in nnx.iter_modules(model) if path}
    modules[projection].kernel.set_metadata(out_sharding=(None, *spec))
    message = rf"{projection}: LoRADense: {features} features do not divide over the 3 devices"
    with jax.set_mesh(mesh_of(tp=3)), pytest.raises(ValueError, match=message):
        apply_lora(model, target=".*_proj")
    assert type(modules["q_proj"]) is nnx.Linear
