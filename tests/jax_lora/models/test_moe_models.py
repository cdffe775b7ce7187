"""Mixtral and Qwen3-MoE with adapters of experts, against transformers + peft."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from gradient_cases import TOLERANCE
from mosaic_cases import relative_error

import jax_lora
from jax_lora import Adapter, AdapterBank, AdapterBatch, LoRAConfig, LoRAWeights, llama, plan_slots
from jax_lora.inspection import inspect_adapter

pytestmark = [
    pytest.mark.ci,
    # What peft says of its own conversion of modules of experts to parameters.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]

FAMILIES = ["Mixtral", "Qwen3-MoE"]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Gates and ups, whose parameter PEFT gives one A; Mixtral calls them w1 and w3.
PAIRS = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
# As PEFT writes them for Transformers 5: parameters of both projections, of one and of the router.
FUSED: dict[str, dict[str, Any]] = {
    "both": dict(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=PARAMETERS),
    "down": dict(
        r=12,
        lora_alpha=6,
        target_modules=[],
        target_parameters=[PARAMETERS[1], "mlp.gate.weight"],
    ),
    "uneven": dict(
        r=3,
        lora_alpha=6,
        target_modules=["o_proj"],
        target_parameters=PARAMETERS,
        rank_pattern={r".*\.gate_up_proj": 6},
        alpha_pattern={r".*\.gate_up_proj": 12},
    ),
}


class Case(NamedTuple):
    """A family's folder: of the base model, and of an adapter for each of `FUSED`."""

    name: str
    folder: Path

    def reference(self, adapter: str | None = None) -> Any:
        """The model of Transformers, with the adapter that PEFT reads from this folder."""
        base = families.reference_of(self.folder / "config")
        if adapter is None:
            return base
        return peft.PeftModel.from_pretrained(base, self.folder / adapter)

    def logits(self, adapter: str | None, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.reference(adapter)(torch.from_numpy(tokens).long()).logits.numpy()

    def save_gradients(self, adapter: str, tokens: np.ndarray, dy: np.ndarray) -> None:
        """Writes PEFT's gradients as an adapter."""
        model = self.reference(adapter)
        own = [p for name, p in model.named_parameters() if "lora_" in name]
        for parameter in own:
            parameter.requires_grad_(True)
        logits = model(torch.from_numpy(tokens).long()).logits
        for parameter, gradient in zip(own, torch.autograd.grad(logits, own, torch.tensor(dy))):
            parameter.data = gradient
        model.save_pretrained(self.folder / f"gradients {adapter}")

    def model(self, **room: Any) -> tuple[llama.Llama, AdapterBank]:
        model = llama.Llama.from_pretrained(self.folder / "base")
        jax_lora.apply_lora(model, **room)
        return model, AdapterBank(model)

    @property
    def phase(self) -> str:
        """One of the two, as each takes seconds to compile."""
        return "decode" if self.name == "Mixtral" else "prefill"


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    families.write_config(folder / "config", request.param)
    made = Case(request.param, folder)
    made.reference().save_pretrained(folder / "base")
    for seed, (name, options) in enumerate(FUSED.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(init_lora_weights=False, **options)
        peft.get_peft_model(made.reference(), config).save_pretrained(folder / name)
    return made


@pytest.fixture(scope="module")
def held(case: Case) -> tuple[llama.Llama, AdapterBank]:
    return case.model(slots=3, buckets=(16,))


def tokens_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 61, (rows, 9)).astype(np.int32)


@nnx.jit
def logits_of(model: llama.Llama, tokens: np.ndarray, batch: AdapterBatch) -> jax.Array:
    with jax_lora.use(batch):
        return model(tokens)


def check_rows(
    case: Case,
    held: tuple[llama.Llama, AdapterBank],
    names: list[str | None],
    folders: dict[str, str] | None = None,
) -> None:
    """A mixed batch, row by row; `folders`: where adapters are, if not under their names."""
    (model, bank), tokens = held, tokens_of(len(names))
    at = [None if name is None else (folders or {}).get(name, name) for name in names]
    wanted = [case.logits(folder, tokens[n : n + 1])[0] for n, folder in enumerate(at)]
    got = logits_of(model, tokens, bank.batch(names, phase=case.phase))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    plain = case.logits(None, tokens)
    assert all(np.abs(w - p).max() > 0.1 for w, p, name in zip(wanted, plain, names) if name)


def randomized(adapter: Adapter, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)

    def like(array: Any) -> np.ndarray:
        return 0.3 * rng.normal(size=array.shape).astype(np.float32)

    modules = {m: LoRAWeights(like(w.a), like(w.b), w.scale) for m, w in adapter.modules.items()}
    return Adapter(adapter.config, modules)


def test_parameters_of_experts_in_a_mixed_batch(
    case: Case, held: tuple[llama.Llama, AdapterBank]
) -> None:
    _, bank = held
    for name in ("both", "down", "uneven"):
        bank.load(name, case.folder / name)
    check_rows(case, held, ["both", None, "uneven", "down"])
    bank.load("again", case.folder / "both")  # evicts the least recently used one
    assert bank.names == ("uneven", "down", "again")
    check_rows(case, held, ["down", "again", "uneven", None], {"again": "both"})


@pytest.mark.parametrize(
    "case", ["Mixtral", pytest.param("Qwen3-MoE", marks=pytest.mark.slow)], indirect=True
)
def test_modules_of_experts_saved_for_peft(
    case: Case, held: tuple[llama.Llama, AdapterBank]
) -> None:
    """By the names that PEFT had with Transformers 4, of which it makes parameters with 5."""
    _, bank = held
    experts = r"w[123]" if case.name == "Mixtral" else r"(gate|up|down)_proj"
    config = LoRAConfig(4, 8, target_modules=rf".*\.(q_proj|gate|{experts})")
    bank.create("made", config, rngs=nnx.Rngs(0))
    bank.save("made", case.folder / "start")
    bank.load("made", randomized(jax_lora.load_peft(case.folder / "start"), 3), replace=True)
    for name in ("both", "uneven"):
        bank.load(name, case.folder / name, replace=True)
    folders = {name: f"saved {name}" for name in ("made", "both", "uneven")}
    for name, folder in folders.items():
        bank.save(name, case.folder / folder)
    text = json.loads((case.folder / "saved made" / "adapter_config.json").read_text())
    last = "w2" if case.name == "Mixtral" else "down_proj"
    assert any(name.endswith(f"experts.3.{last}") for name in text["target_modules"])
    check_rows(case, held, ["made", None, "both", "uneven"], folders)
    merged, tokens = llama.Llama.from_pretrained(case.folder / "base"), tokens_of(1)
    nnx.update(merged, bank.merge("made"))
    np.testing.assert_allclose(merged(tokens), case.logits("saved made", tokens), atol=1e-4)


@pytest.mark.parametrize(
    "case", ["Mixtral", pytest.param("Qwen3-MoE", marks=pytest.mark.slow)], indirect=True
)
def test_gradients_equal_pefts(case: Case) -> None:
    """Those of each adapter's own rows of a mixed batch."""
    model, bank = case.model(slots=4, buckets=(8,))
    names, tokens = ["both", None, "uneven", "both"], tokens_of(4)
    for name in ("both", "uneven"):
        bank.load(name, case.folder / name)
    dy = np.random.default_rng(1).normal(size=(*tokens.shape, model.config.vocab_size))
    dy = dy.astype(np.float32)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def gradients(lora: nnx.State, batch: AdapterBatch) -> jax.Array:
        with jax_lora.use(batch):
            return jnp.sum(nnx.merge(graphdef, lora, rest)(tokens) * dy)

    nnx.update(model, gradients(lora, bank.batch(names, phase=case.phase)))  # read as an adapter is
    for name in ("both", "uneven"):
        rows = [n for n, own in enumerate(names) if own == name]
        case.save_gradients(name, tokens[rows], dy[rows])
        bank.load("peft", case.folder / f"gradients {name}", replace=True)
        got, want = (bank._adapter(one).modules for one in (name, "peft"))
        assert got.keys() == want.keys()
        for module, right in want.items():
            a = got[module].a
            holder, _, last = module.rpartition(".")
            if last in PAIRS:
                a = a + got[f"{holder}.{PAIRS[last]}"].a
            for one, other in ((a, right.a), (got[module].b, right.b)):
                assert relative_error(one, other) < TOLERANCE["float32"], module
        chosen = sum(bool(right.b.any()) for right in want.values())
        assert chosen > 0.9 * len(want)  # an expert may have no token


def test_plan_and_inspect_know_experts(case: Case) -> None:
    folders = [case.folder / name for name in FUSED]
    plan = plan_slots(folders, memory=1 << 24)
    model, bank = case.model(**plan)
    for name in FUSED:
        bank.load(name, case.folder / name)
    adapted = {path for path, layer in bank._layers.items()}
    assert {path.rpartition(".")[2] for path in adapted} == {
        "q_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    report = inspect_adapter(case.folder / "uneven")
    kinds = {(module.kind, module.rank): count for count, module in report.groups()}
    experts = model.config.num_experts
    assert kinds == {
        ("gate_proj", 6): 2 * experts,
        ("up_proj", 6): 2 * experts,
        ("down_proj", 3): 2 * experts,
        ("o_proj", 3): 2,
    }
