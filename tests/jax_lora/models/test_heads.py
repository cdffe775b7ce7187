"""LoRA of output layers and embeddings against PEFT, in mixed batches."""

from pathlib import Path

import pytest
from heads import Pair, compilations

ADAPTERS = {
    "body": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "head": dict(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"]),
    "embed": dict(r=8, lora_alpha=4, target_modules=["embed_tokens", "v_proj"]),
    "both": dict(
        r=5, lora_alpha=5, target_modules=["embed_tokens", "lm_head"], use_rslora=True,
        rank_pattern={"lm_head": 11}, alpha_pattern={"embed_tokens": 9},
    ),
    "tied": dict(r=2, lora_alpha=3, target_modules=["embed_tokens"], ensure_weight_tying=True),
}  # fmt: skip
TARGET = ["q_proj", "v_proj", "embed_tokens", "lm_head"]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "scan"), [("Llama-3.2", True), ("Llama-1", True), ("Gemma-3", False)]
)
def test_a_mixed_batch_equals_peft(tmp_path: Path, family: str, scan: bool) -> None:
    """Tied (Llama 3.2, Gemma 3, whose embeddings are scaled) and not; after evict and reload."""
    pair = Pair(tmp_path, family, ADAPTERS, scan=scan, slots=2, buckets=(8, 16), target=TARGET)
    pair.load("body", "embed", "both")
    pair.check(["both", None, "embed", "body"], 0)
    pair.check(["embed", "both", "both", None], 1, "decode")
    with compilations() as compiled:
        pair.load("head")
        assert "body" not in pair.bank.names
        pair.check(["both", "head", None, "embed"], 2)
        pair.load("body")
        assert "head" not in pair.bank.names
        pair.check(["embed", "body", "both", None], 3, "decode")
    assert not compiled
    pair.bank.save("both", tmp_path / "saved")
    pair.bank.unload("both")
    pair.bank.load("both", tmp_path / "saved")
    pair.load("tied")
    pair.check(["both", "tied", None, "body"], 4)
