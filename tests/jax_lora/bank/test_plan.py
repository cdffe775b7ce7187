"""plan_slots: what it proposes is what apply_lora takes and the bank can load."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FEATURES, Mlp, make_adapter

from jax_lora import (
    Adapter,
    AdapterBank,
    Experts,
    FullModule,
    LoRAWeights,
    apply_lora,
    plan_slots,
    save_peft,
)
from jax_lora.adapters import files

PER_RANK = 4 * sum(h + n for h, n in FEATURES.values())  # bytes, float32


def adapters_of(*ranks):
    return [make_adapter(n, rank) for n, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    ("ranks", "slots"),
    [
        ((4,), {8: 1}),
        ((4, 8, 1), {8: 3}),
        ((4, 12, 16, 60), {8: 1, 16: 2, 64: 1}),
        ((130, 8), {8: 1, 144: 1}),
    ],
)
def test_everything_fits(ranks, slots):
    needed = PER_RANK * sum(bucket * n for bucket, n in slots.items())
    for memory in (needed, 100 * needed):  # what isn't needed isn't taken
        plan = plan_slots(adapters_of(*ranks), memory)
        assert plan["slots"] == slots and plan["buckets"] == tuple(slots)
    if len(ranks) > 1:
        assert plan_slots(adapters_of(*ranks), needed - 1)["slots"] != slots


def test_a_tight_budget_is_shared():
    ranks = (8,) * 8 + (16,) * 4 + (64,) * 2
    everything = PER_RANK * (8 * 8 + 4 * 16 + 2 * 64)
    for memory in range(PER_RANK * 64, everything, PER_RANK * 4):
        plan = plan_slots(adapters_of(*ranks), memory)
        used = PER_RANK * sum(bucket * n for bucket, n in plan["slots"].items())
        left = memory - used
        assert left >= 0
        assert plan["buckets"][-1] == 64 and min(plan["slots"].values()) >= 1
        if plan["buckets"] == (8, 16, 64):
            wanted = {8: 8, 16: 4, 64: 2}
            assert all(plan["slots"][b] == n or b * PER_RANK > left for b, n in wanted.items())
    assert plan_slots(adapters_of(*ranks), everything // 2)["slots"] == {8: 4, 16: 2, 64: 1}


def test_small_buckets_are_given_up_first():
    ranks = (4, 12, 60)
    plans = {
        n: plan_slots(adapters_of(*ranks), n * PER_RANK)["slots"] for n in (88, 87, 80, 79, 64)
    }
    assert plans[88] == {8: 1, 16: 1, 64: 1}
    assert plans[87] == plans[80] == {16: 1, 64: 1}
    assert plans[79] == plans[64] == {64: 1}


def test_a_budget_that_is_too_small_says_the_numbers():
    message = (
        rf"memory=1000 bytes hold no slot: one of bucket 64 takes {64 * PER_RANK}, float32 in 2 "
        "modules.* rank 60"
    )
    with pytest.raises(ValueError, match=message):
        plan_slots(adapters_of(4, 60), 1000)


@pytest.mark.parametrize("how", ["folder", "one adapter", "list"])
def test_the_plan_is_applied_and_loads_them_all(tmp_path, how):
    features = {"down": FEATURES["down"]}
    adapters = {f"{n}": make_adapter(n, 4 + 6 * n, features=features) for n in range(3)}
    for name, adapter in adapters.items():
        save_peft(adapter, tmp_path / name)
    (tmp_path / "no adapter").mkdir()
    sources = {
        "folder": tmp_path,
        "one adapter": str(tmp_path / "1"),
        "list": [tmp_path / "0", adapters["1"], str(tmp_path / "2")],
    }
    plan = plan_slots(sources[how], memory=1 << 20)
    model = Mlp(nnx.Rngs(0))
    nbytes = apply_lora(model, **plan)
    per_rank = 4 * sum(FEATURES["down"])
    assert nbytes == per_rank * sum(bucket * n for bucket, n in plan["slots"].items())
    assert type(model.up) is nnx.Linear  # no adapter names it
    bank = AdapterBank(model)
    wanted = ["1"] if how == "one adapter" else list(adapters)
    for name in wanted:
        bank.load(name, tmp_path / name)
        bank.pin(name)
    assert bank.names == tuple(wanted)


def test_dtype():
    half = [make_adapter(n, 8, dtype=np.float16) for n in range(2)]
    assert plan_slots(half, 1 << 20)["dtype"] == jnp.float16
    assert plan_slots([*half, make_adapter(3, 8)], 1 << 20)["dtype"] == jnp.float32
    plan = plan_slots(adapters_of(8, 8), PER_RANK * 8, dtype=jnp.bfloat16)
    assert plan["dtype"] == jnp.bfloat16 and plan["slots"] == {8: 2}
    with pytest.raises(ValueError, match="stacks are float32, bfloat16 or float16"):
        plan_slots(half, 1 << 20, dtype=jnp.uint8)


def test_bad_arguments(tmp_path):
    one = make_adapter(0, 4)
    for memory in ("2GB", 1e9, True, None):
        with pytest.raises(TypeError, match="memory must be an int, in bytes"):
            plan_slots([one], memory)
    for memory in (0, -5):
        with pytest.raises(ValueError, match="hold no slot"):
            plan_slots([one], memory)
    with pytest.raises(ValueError, match="no adapters"):
        plan_slots([], 1000)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        plan_slots(tmp_path, 1000)
    with pytest.raises(FileNotFoundError, match="no folder"):
        plan_slots(tmp_path / "nowhere", 1000)
    for adapters in (one, 5, None):
        with pytest.raises(TypeError, match="adapters must be a folder, or a list"):
            plan_slots(adapters, 1000)
    other = make_adapter(1, 4, features={"up": (4, 7)})
    message = r"adapters disagree about up: \(4, 6\) and \(4, 7\) features"
    with pytest.raises(ValueError, match=message):
        plan_slots([one, other], 1 << 20)


def test_weights_are_not_read(tmp_path, monkeypatch):
    for n, rank in enumerate((4, 12)):
        save_peft(make_adapter(n, rank), tmp_path / f"{n}")
    right = plan_slots(adapters_of(4, 12), 1 << 20)
    monkeypatch.setattr(files.TensorFile, "read", lambda *_: pytest.fail("a tensor is read"))
    assert plan_slots(tmp_path, 1 << 20) == right


def test_links_and_unfinished_saves(tmp_path):
    save_peft(make_adapter(0, 4), tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="link out of its folder"):
        plan_slots(tmp_path, 1 << 20)
    assert plan_slots(tmp_path, 1 << 20, allow_links=True)["slots"] == {8: 1}


def saving(seed, rank, labels=3, **others):
    """An adapter that has a classifier whole."""
    own = make_adapter(seed, rank)
    full = {"score": FullModule(np.ones((labels, 4), np.float32)), **others}
    return Adapter(own.config, own.modules, full)


def test_whole_weights_have_full_slots():
    """One for each module first, more from what is left."""
    adapters = [saving(0, 4), saving(1, 8), saving(2, 3), make_adapter(3, 4)]
    lora = 8 * sum(h + n for h, n in [*FEATURES.values(), (4, 3)]) * 4
    full = 3 * 4 * 4
    for memory, slots, count in ((lora + full, 1, 1), (4 * lora + 2 * full, 4, 2), (1 << 20, 4, 3)):
        plan = plan_slots(adapters, memory)
        assert (plan["slots"], plan["full_slots"]) == ({8: slots}, {"score": count})
        assert "score" in plan["target"]
    with pytest.raises(
        ValueError, match=f"memory={lora + full - 1} bytes hold no slot.*{full}\\. Gi"
    ):
        plan_slots(adapters, lora + full - 1)
    with pytest.raises(ValueError, match=r"disagree about score: \(4, 3\) and \(4, 2\) features"):
        plan_slots([*adapters, saving(4, 4, labels=2)], 1 << 20)
    assert "full_slots" not in plan_slots(adapters[3:], 1 << 20)


class Mixture(nnx.Module):
    """Three experts, and an output layer."""

    def __init__(self):
        self.peft_names = {"experts": "experts.{}.up"}
        self.experts = Experts(3, 4, 6, rngs=nnx.Rngs(0))
        self.lm_head = nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("names", [("w1", "w2"), ("gate_proj", "down_proj")])
def test_modules_of_one_layer_may_share_different_halves(names):
    """Also where their names are told apart by a digit; but all layers share alike."""
    up, down = names

    def sharing(up_half):
        features = {
            f"layers.{layer}.experts.{expert}.{name}": (4, 6)
            for layer in range(2) for expert in range(2) for name in names
        }  # fmt: skip
        adapter = make_adapter(0, 4, features=features)
        modules = dict(adapter.modules)
        for layer, halves in enumerate([{up: "A", down: "B"}, {up: up_half, down: "B"}]):
            for name, half in halves.items():
                first, last = (f"layers.{layer}.experts.{expert}.{name}" for expert in range(2))
                one, other = modules[first], modules[last]
                a, b = one.a if half == "A" else other.a, one.b if half == "B" else other.b
                modules[last] = LoRAWeights(a, b, other.scale)
        return Adapter(adapter.config, modules)

    of_up, of_down = (
        {rf"layers\.{layer}\.experts\.\d+\.{name}": half for layer in range(2)}
        for name, half in ((up, "A"), (down, "B"))
    )
    assert plan_slots([sharing("A")], 1 << 20)["experts_share"] == of_up | of_down
    assert plan_slots([sharing(None)], 1 << 20)["experts_share"] == of_down


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("half", [None, "A", "B"])
def test_bytes_of_experts_are_those_of_the_arrays(dtype, half):
    """A layer has stacks for all experts, also where adapters adapt two of them, and one of what
    these share."""
    own = make_adapter(0, 5, features={"experts.0.up": (4, 6), "experts.2.up": (4, 6)})
    (first, one), (last, other) = own.modules.items()
    a, b = one.a if half == "A" else other.a, one.b if half == "B" else other.b
    modules = {first: one, last: LoRAWeights(a, b, other.scale)}
    whole = {"lm_head": FullModule(np.ones((5, 4), np.float32))}
    adapter = Adapter(own.config, modules, whole)
    model = Mixture()
    plan = plan_slots([adapter], 1 << 20, dtype=dtype)
    assert plan.get("experts_share") == (half and {r"experts\.\d+\.up": half})
    assert "experts_share" not in plan_slots([adapter, own], 1 << 20, dtype=dtype)
    apply_lora(model, **plan)
    bank = AdapterBank(model)
    bank.load("it", adapter)
    arrays = {path: v.get_value() for path, v in nnx.to_flat_state(bank.state)}
    nbytes = sum(
        array.nbytes
        for path, array in arrays.items()
        if path[-1] != "table" and (path[-1] != "scales" or dtype != "float32")
    )
    assert plan_slots([adapter], nbytes, dtype=dtype) == plan
    with pytest.raises(ValueError, match=f"memory={nbytes - 1} bytes hold no slot"):
        plan_slots([adapter], nbytes - 1, dtype=dtype)
