"""LoRA of experts as SGLang, vLLM and Megatron-Bridge store it, with a half that they share."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import jax_lora
from jax_lora import Adapter, LoRAConfig, LoRAWeights, llama, load_peft, save_peft
from jax_lora.adapters import peft_header
from jax_lora.inspection import inspect_adapter

EXPERTS, RANK, H, INNER = 3, 2, 8, 6
HOLDER = "model.layers.0.mlp.experts"
NEXT = "model.layers.1.mlp.experts"
# As vLLM and SGLang read it: A of gate and up, and B of down, are those of all experts.
STACKED = {
    "w1": ((1, RANK, H), (EXPERTS, INNER, RANK)),
    "w3": ((1, RANK, H), (EXPERTS, INNER, RANK)),
    "w2": ((EXPERTS, RANK, INNER), (1, H, RANK)),
}


def stacked_tensors(shapes: dict, holder: str = HOLDER) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"base_model.model.{holder}.{name}.lora_{half}.weight": rng.normal(size=size).astype("f4")
        for name, sizes in shapes.items()
        for half, size in zip("AB", sizes)
        if size
    }


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], **keys: object) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["w1"]} | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))


def check(adapter: Adapter, tensors: dict[str, np.ndarray], name: str) -> None:
    """Each expert's `name` is that of the stacked tensors, what they share as one array."""
    a, b = (tensors[f"base_model.model.{HOLDER}.{name}.lora_{half}.weight"] for half in "AB")
    first = adapter.modules[f"{HOLDER}.0.{name}"]
    for expert in range(EXPERTS):
        own = adapter.modules[f"{HOLDER}.{expert}.{name}"]
        np.testing.assert_array_equal(own.a, a[min(expert, len(a) - 1)])
        np.testing.assert_array_equal(own.b, b[min(expert, len(b) - 1)])
        assert (own.a is first.a) == (expert == 0 or len(a) == 1)
        assert (own.b is first.b) == (expert == 0 or len(b) == 1)
        assert own.scale == 2


def test_stacked_modules_are_those_of_experts(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors := stacked_tensors(STACKED))
    adapter = load_peft(tmp_path)
    assert len(adapter.modules) == 3 * EXPERTS
    for name in STACKED:
        check(adapter, tensors, name)
    assert adapter.header.shared == peft_header(tmp_path).shared
    assert adapter.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert peft_header(tmp_path).nbytes == adapter.nbytes


def test_the_other_half_may_stand_in_modules_of_experts(tmp_path: pathlib.Path) -> None:
    """As Megatron-Bridge writes it; the tenth is not the second."""
    gates = stacked_tensors({"gate_proj": ((1, RANK, H), None)})
    own = {f"{HOLDER}.{expert}": np.full((INNER, RANK), expert, np.float32) for expert in range(11)}
    numbered = {f"base_model.model.{m}.gate_proj.lora_B.weight": b for m, b in own.items()}
    write(tmp_path, gates | numbered)
    adapter = load_peft(tmp_path)
    (a,) = gates.values()
    for name, b in own.items():
        np.testing.assert_array_equal(adapter.modules[f"{name}.gate_proj"].a, a[0])
        np.testing.assert_array_equal(adapter.modules[f"{name}.gate_proj"].b, b)
    assert adapter.header.shared == dict.fromkeys(adapter.modules, "A")
    save_peft(adapter, tmp_path / "again")
    again = load_peft(tmp_path / "again")
    for name, b in own.items():
        np.testing.assert_array_equal(again.modules[f"{name}.gate_proj"].b, b)


def test_patterns_name_the_modules_that_stand_beside_what_is_shared(
    tmp_path: pathlib.Path,
) -> None:
    gates = stacked_tensors({"up": ((1, RANK, H), None)})
    numbered = {
        f"base_model.model.{HOLDER}.{expert}.up.lora_B.weight": np.ones((INNER, RANK), np.float32)
        for expert in range(3)
    }
    write(tmp_path, gates | numbered, alpha_pattern={f"{HOLDER}.2.up": 16})
    modules = load_peft(tmp_path).modules
    assert [modules[f"{HOLDER}.{expert}.up"].scale for expert in range(3)] == [2, 2, 8]


def test_what_is_shared_is_saved_once(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors := stacked_tensors(STACKED), rank_pattern={"w1": RANK})
    adapter = load_peft(tmp_path)
    save_peft(adapter, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "numpy") as file:
        assert {*file.keys()} == {*tensors}
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(key), tensor)
    for name in STACKED:
        check(load_peft(tmp_path / "saved"), tensors, name)


def test_ranks_and_scales_of_stacks_come_back(tmp_path: pathlib.Path) -> None:
    """Also where the adapter's patterns are by whole names of experts' modules."""
    rng, ranks = np.random.default_rng(0), {"gate_proj": 4, "down_proj": 2}
    names = {f"layers.0.experts.{e}.{of}": r for e in range(3) for of, r in ranks.items()}
    patterns = {name.replace(".", r"\."): rank for name, rank in names.items()}
    config = LoRAConfig(3, 6, rank_pattern=patterns, alpha_pattern={r"gate_proj": 2})
    shared = {of: rng.normal(size=(rank, H)).astype("f4") for of, rank in ranks.items()}
    modules = {
        name: LoRAWeights(
            shared[name.rpartition(".")[2]],
            rng.normal(size=(INNER, rank)).astype("f4"),
            config.scale_of(name),
        )
        for name, rank in names.items()
    }
    save_peft(Adapter(config, modules), tmp_path)
    again = load_peft(tmp_path)
    assert again.header.shared == dict.fromkeys(names, "A")
    for name, weights in modules.items():
        assert again.modules[name].scale == weights.scale
        np.testing.assert_array_equal(again.modules[name].b, weights.b)


@pytest.mark.parametrize("leave_out", [0, 1])
def test_experts_that_are_not_alike_stay_modules(tmp_path: pathlib.Path, leave_out: int) -> None:
    write(tmp_path, stacked_tensors(STACKED))
    adapter = load_peft(tmp_path)
    some = {m: w for m, w in adapter.modules.items() if f".{leave_out}." not in m[len(HOLDER) :]}
    save_peft(Adapter(adapter.config, some), tmp_path / "some")
    again = load_peft(tmp_path / "some")
    assert again.modules.keys() == some.keys() and not again.header.shared


@pytest.mark.parametrize(
    ("shapes", "own", "message"),
    [
        (
            {"w1": ((1, 2, H), (1, INNER, 2))},
            {},
            r"w1: lora_A of experts must be \[experts, r, H\]",
        ),
        ({"w1": ((2, 2, H), (3, INNER, 2))}, {}, r"got \{'lora_A': \[2, 2, 8\], 'lora_B': \[3, 6"),
        ({"w1": ((1, 2, H), (INNER, 2))}, {}, "that they share is"),
        ({"w1": ((5000, 1, 1), (1, 1, 1))}, {}, "must be"),
        ({"w1": ((1, 2, H), None)}, {}, "and 0 of those modules"),
        ({"w1": ((1, 2, H), (3, INNER, 2))}, {"1.w1": "B"}, "and 1 of those modules"),
        ({"w1": ((1, 2, H), None)}, {"1.w1": "AB"}, "1.w1 and .*w1 both have lora_A; save"),
        ({"w1": ((1, 3, H), (3, INNER, 3))}, {}, "the config says rank 2 but lora_A is"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(
    tmp_path: pathlib.Path, shapes: dict, own: dict[str, str], message: str
) -> None:
    sizes = {"A": (2, H), "B": (INNER, 2)}
    singles = {
        f"base_model.model.{HOLDER}.{module}.lora_{half}.weight": np.ones(sizes[half], np.float32)
        for module, halves in own.items()
        for half in halves
    }
    write(tmp_path, stacked_tensors(shapes) | singles)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path)


def test_inspect_tells_what_is_shared(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tensors := stacked_tensors(STACKED))
    report = inspect_adapter(tmp_path)
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    (line,) = (line for line in report.advice if "experts_share" in line)
    assert eval(line.partition("experts_share=")[2]) == {
        "w1": "A", "w3": "A", "w2": "B"
    }  # fmt: skip


def test_inspect_advises_what_all_layers_share(tmp_path: pathlib.Path) -> None:
    other = {
        "w1": ((1, RANK, H), (EXPERTS, INNER, RANK)),
        "w3": ((EXPERTS, RANK, H), (1, INNER, RANK)),
    }
    singles = {
        f"base_model.model.{NEXT}.{expert}.w2.lora_{half}.weight": np.full(size, expert, np.float32)
        for expert in range(EXPERTS)
        for half, size in (("A", (RANK, INNER)), ("B", (H, RANK)))
    }
    stacks = stacked_tensors(other, NEXT)
    tensors = stacked_tensors(STACKED) | stacks | singles
    write(tmp_path, tensors, target_modules=["w1", "w2"])
    (line,) = (line for line in inspect_adapter(tmp_path).advice if "experts_share" in line)
    assert line.endswith(
        "by the names that your model has, give apply_lora experts_share={'w1': 'A'}"
    )


@pytest.mark.parametrize("half", ["A", "B"])
def test_bytes_are_right_where_the_halves_have_different_dtypes(
    tmp_path: pathlib.Path, half: str
) -> None:
    tensors = {
        key: tensor.astype(np.float16) if f"lora_{half}" in key else tensor
        for key, tensor in stacked_tensors(STACKED).items()
    }
    write(tmp_path, tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert load_peft(tmp_path).nbytes == peft_header(tmp_path).nbytes == nbytes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_bundled_decoders_take_them(tmp_path: pathlib.Path, family: str) -> None:
    """By either name of a module, from a plan of the folder."""
    config = llama.LlamaConfig(
        vocab_size=8, hidden_size=H, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=H, num_experts=EXPERTS,
        num_experts_per_tok=2, mixtral_names=family == "mixtral",
    )  # fmt: skip
    write(tmp_path, tensors := stacked_tensors(STACKED))
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    share = {"gate_proj": "A", "up_proj": "A", "down_proj": "B"}
    jax_lora.apply_lora(model, slots=1, buckets=(8,), experts_share=share)
    bank = jax_lora.AdapterBank(model)
    bank.load("it", tmp_path)
    bank.save("it", tmp_path / "saved")
    bank.load("saved", tmp_path / "saved", replace=False)
    assert peft_header(tmp_path / "saved").nbytes == sum(t.nbytes for t in tensors.values())
