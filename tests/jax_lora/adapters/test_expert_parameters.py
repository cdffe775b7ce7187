"""LoRA of parameters that hold all experts' weights, as PEFT stores it, without PEFT."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_lora import load_peft, save_peft

EXPERTS, RANK, H, INNER = 3, 2, 8, 6
HOLDER = "layers.0.mlp.experts"
SHAPES = {
    f"{HOLDER}.base_layer": ((EXPERTS * RANK, H), (2 * INNER, RANK * EXPERTS)),
    HOLDER: ((EXPERTS * RANK, INNER), (H, RANK * EXPERTS)),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def write(folder: pathlib.Path, modules: dict, **keys: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{module}.lora_{half}.weight": np.asarray(
            rng.normal(size=shape), np.float32
        )
        for module, shapes in modules.items()
        for half, shape in zip("AB", shapes)
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": []} | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_each_expert_has_modules_of_its_own(tmp_path: pathlib.Path) -> None:
    tensors = write(tmp_path, SHAPES, target_parameters=TARGETS)
    adapter = load_peft(tmp_path)
    a, b = (tensors[f"base_model.model.{HOLDER}.base_layer.lora_{half}.weight"] for half in "AB")
    a, b = a.reshape(EXPERTS, RANK, H), b.reshape(2 * INNER, RANK, EXPERTS)
    whole = np.einsum("ore,erh->eoh", b, a)  # what PEFT adds to the parameter, but for the scale
    for expert in range(EXPERTS):
        gate, up = (adapter.modules[f"{HOLDER}.{expert}.{n}_proj"] for n in ("gate", "up"))
        assert gate.scale == up.scale == 2
        own = np.concatenate([gate.b @ gate.a, up.b @ up.a])
        np.testing.assert_allclose(own, whole[expert], rtol=1e-5, atol=1e-6)
        assert adapter.modules[f"{HOLDER}.{expert}.down_proj"].shape.out_features == H
    assert len(adapter.modules) == 3 * EXPERTS
    save_peft(adapter, tmp_path / "again")
    again = load_peft(tmp_path / "again")
    for module, weights in adapter.modules.items():
        np.testing.assert_array_equal(again.modules[module].b, weights.b)


def test_ranks_of_parameters_are_those_of_their_modules(tmp_path: pathlib.Path) -> None:
    gate_up = {f"{HOLDER}.base_layer": ((EXPERTS * 4, H), (2 * INNER, 4 * EXPERTS))}
    patterns = {"rank_pattern": {".*gate_up_proj": 4}, "alpha_pattern": {".*gate_up_proj": 12}}
    write(tmp_path, SHAPES | gate_up, target_parameters=TARGETS, **patterns)
    adapter = load_peft(tmp_path)
    assert adapter.config.rank_of(f"{HOLDER}.2.up_proj") == 4
    assert adapter.config.scale_of(f"{HOLDER}.2.up_proj") == 3
    assert adapter.modules[f"{HOLDER}.2.down_proj"].rank == 2
    assert adapter.config.scale_of(f"{HOLDER}.2.down_proj") == 2
    # PEFT reads the modules as parameters again, of twice the config's own rank.
    assert adapter.config.rank == 4 and adapter.config.rank_pattern == {"down_proj": 2}


@pytest.mark.parametrize(
    ("modules", "targets", "message"),
    [
        (SHAPES, ["experts.up"], "LoRA of bare parameters is not supported, but for experts'"),
        (SHAPES, TARGETS[1:], r"must name the parameters of layers.0.mlp.experts that have LoRA"),
        ({HOLDER: SHAPES[HOLDER]}, TARGETS, r"must name the parameters of layers.0.mlp.experts"),
        ({HOLDER: ((5, H), (H, 5))}, TARGETS[1:], r"lora_A must be \[experts \* 2, H\]"),
        ({HOLDER: ((6, H), (5, 6))}, TARGETS[:1], r"lora_A must be \[experts \* 2, H\]"),
        ({HOLDER: ((), (6, 6))}, TARGETS[:1], r"lora_A must be .*, got \[\] and \[6, 6\]"),
        ({HOLDER: ((6, H),)}, TARGETS[:1], "lacks a half of its LoRA; save the adapter again"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: pathlib.Path, modules: dict, targets: list[str], message: str
) -> None:
    write(tmp_path, modules, target_parameters=targets)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path)
