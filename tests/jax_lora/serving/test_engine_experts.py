"""The engine with a mixture of experts: Mixtral, and Qwen3-MoE with stacks in 8 bits."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import peft
import pytest
import torch

from jax_lora import Adapter, AdapterBank, LoRAWeights, apply_lora, load_peft
from jax_lora.demo.job import counted_compilations
from jax_lora.llama import Llama
from jax_lora.serving import Answer, Engine, Generation, RequestError, SamplingParams, StepShape

pytestmark = [
    pytest.mark.ci,
    # What peft says of its own conversion of modules of experts to parameters.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]

STACKS = {"Mixtral": None, "Qwen3-MoE": "int8"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "experts": dict(r=4, target_modules=["q_proj"], target_parameters=EXPERTS),
    "router": dict(r=7, target_modules=[], target_parameters=[EXPERTS[1], "mlp.gate.weight"]),
    "attention": dict(r=5, target_modules=["q_proj", "v_proj"]),
}
# They take 1 to 6 chunks.
PROMPTS = [[7], [5, 9, 2], [*range(3, 16)], [*range(40, 18, -1)]]
ASKED = [(prompt, name) for prompt in PROMPTS for name in (None, *ADAPTERS)]
PARAMS = SamplingParams(max_tokens=8, stop_tokens=())


@dataclasses.dataclass(frozen=True)
class Served:
    """A family's folder, and an engine for it with two slots, for three adapters.

    Attributes:
      alone: the answers of `ASKED`, each of which ran alone.
    """

    folder: Path
    bank: AdapterBank
    engine: Engine
    alone: list[Answer]

    def ask(self, prompt: list[int], adapter: str | None) -> Generation:
        return self.engine.submit(prompt, PARAMS, adapter=adapter)

    def reference(self, adapter: str | None) -> Any:
        """The model of Transformers, with what the bank holds of the adapter."""
        base = families.reference_of(self.folder / "config")
        if adapter is None:
            return base
        self.ask([1], adapter).result(60)
        self.bank.save(adapter, self.folder / "held" / adapter)
        return peft.PeftModel.from_pretrained(base, self.folder / "held" / adapter)


@pytest.fixture(scope="module", params=STACKS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    families.write_config(folder / "config", request.param)
    families.reference_of(folder / "config").save_pretrained(folder / "base")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(lora_alpha=16, init_lora_weights=False, **options)
        peft.get_peft_model(families.reference_of(folder / "config"), config).save_pretrained(
            folder / name
        )
    model = Llama.from_pretrained(folder / "base")
    apply_lora(model, slots=2, buckets=(8,), dtype=STACKS[request.param])
    bank = AdapterBank(model)
    shape = StepShape(rows=4, max_length=32, chunk=4, lanes=(2,), block=8)
    sources = {name: folder / name for name in ADAPTERS}
    with Engine(model, bank, adapters=sources, shape=shape) as engine:
        engine.warmup()
        served = Served(folder, bank, engine, [])
        served.alone.extend(served.ask(*each).result(60) for each in ASKED)
        yield served


def test_answers_are_those_of_transformers_and_peft(served: Served) -> None:
    for name in (None, *ADAPTERS):
        reference = served.reference(name)
        for (prompt, asked), answer in zip(ASKED, served.alone):
            if asked == name:
                tokens = torch.tensor([[*prompt, *answer.tokens]])
                with torch.no_grad():
                    best = reference(tokens).logits[0].argmax(-1)
                assert best[len(prompt) - 1 : -1].tolist() == [*answer.tokens]
    assert len({answer.tokens for answer in served.alone}) > 2 * len(PROMPTS)


def poison(adapter: Adapter) -> Adapter:
    """What overflows whatever it is added to."""
    config = dataclasses.replace(adapter.config, alpha=3e38, alpha_pattern={})
    modules = {m: LoRAWeights(w.a, w.b, config.scale_of(m)) for m, w in adapter.modules.items()}
    return Adapter(config, modules)


def test_an_answer_is_the_same_to_the_bit_whatever_its_neighbours(served: Served) -> None:
    """Adapters take turns meanwhile, one fails by NaN, and nothing compiles."""
    loads = served.bank.usage()[8].loads
    served.engine.add_adapter("poison", poison(load_peft(served.folder / "experts")))
    with counted_compilations() as count:
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(len(ASKED)).tolist()
            failing = served.ask(PROMPTS[3], "poison")
            generations = {i: served.ask(*ASKED[i]) for i in order}
            for i, generation in generations.items():
                assert generation.result(60) == served.alone[i]  # log-probabilities too
            with pytest.raises(RequestError, match="adapter 'poison' gives logits that are NaN"):
                failing.result(60)
    assert count() == 0
    assert served.bank.usage()[8].loads >= loads + 4
    served.engine.remove_adapter("poison")


def test_a_replaced_adapter_answers_from_the_next_request_on(served: Served) -> None:
    right = dict(zip(map(repr, ASKED), served.alone))
    served.engine.add_adapter("new", served.folder / "router")
    with counted_compilations() as count:
        old = served.ask(PROMPTS[2], "new")
        next(iter(old))  # it has begun
        served.engine.add_adapter("new", served.folder / "experts", replace=True)
        new = served.ask(PROMPTS[2], "new")
        for generation, name in ((old, "router"), (new, "experts")):
            assert generation.result(60) == right[repr((PROMPTS[2], name))]
    assert count() == 0
    served.engine.remove_adapter("new")
