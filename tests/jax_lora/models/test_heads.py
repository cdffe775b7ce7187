"""LoRA of output layers and embeddings against PEFT, in mixed batches."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from heads import Pair, compilations
from marks import on_request

import jax_lora
from jax_lora import LoRAConfig

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
    ("family", "scan"), [on_request("Llama-3.2", True), ("Llama-1", True), ("Gemma-3", False)]
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


SAVED = {
    "body": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "head": dict(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embed": dict(r=8, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    "both": dict(r=5, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "other": dict(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
}


@pytest.mark.ci
@pytest.mark.parametrize("family", [on_request("Llama-3.2"), "Llama-1", "Gemma-3"])
def test_modules_to_save_equal_peft(tmp_path: Path, family: str) -> None:
    options = dict(slots=2, buckets=(8,), target=["q_proj", "v_proj"])
    pair = Pair(tmp_path, family, SAVED, **options, full_slots={"lm_head": 1, "embed_tokens": 2})
    pair.load("head", "embed")
    pair.check(["head", None, "embed"], 0)
    pair.check(["embed", "embed", "head"], 1, "decode")
    with compilations() as compiled:
        pair.load("both")  # takes the slot of "embed" and the full slot of "head"
        assert pair.bank.names == ("both",)
        pair.load("body")
        pair.check(["both", None, "body"], 2)
        pair.load("other")
        assert pair.bank.names == ("body", "other")
        pair.check(["other", "body", "other"], 3, "decode")
    assert not compiled
    pair.bank.save("other", tmp_path / "saved")
    pair.bank.load("other", tmp_path / "saved", replace=True)
    pair.check(["other", None, "body"], 4)


TRAINED = {
    "list": dict(r=3, target_modules=["q_proj"], trainable_token_indices=[7, 20, 4]),
    "both": dict(
        target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [9], "lm_head": [9]}
    ),
    "apart": dict(
        target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [9], "lm_head": [4]}
    ),
}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("family", "names"),
    # PEFT itself takes them in one model as long as they train the same layers.
    [("Llama-3.2", ["list"]), ("Llama-3.2", ["apart"]), ("Llama-1", ["both", "apart"])],
)
def test_trained_tokens_equal_peft(tmp_path: Path, family: str, names: list[str]) -> None:
    """In a tied model, the output layer has them too, unless it has others."""
    options = dict(slots=2, buckets=(8,), target=["q_proj", "v_proj"])
    adapters = {name: TRAINED[name] for name in names}
    full = {"lm_head": 2, "embed_tokens": 2}
    pair = Pair(tmp_path, family, adapters, **options, full_slots=full)
    pair.load(*names)
    pair.check([names[0], None, names[-1]], 0)
    pair.bank.save(names[0], tmp_path / "saved")
    pair.bank.load(names[0], tmp_path / "saved", replace=True)
    pair.check([names[0], None, names[-1]], 1)


CLASSIFIERS = {
    "topics": dict(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
    "mood": dict(r=8, target_modules=["v_proj", "down_proj"], task_type="SEQ_CLS"),
}


@pytest.mark.ci
def test_classifiers_serve_their_scores_beside_other_adapters(tmp_path: Path) -> None:
    options = dict(num_labels=3, slots=3, buckets=(8,), full_slots={"score": 2})
    pair = Pair(tmp_path, "Llama-3.2", CLASSIFIERS, **options)
    pair.load("topics", "mood")
    pair.bank.create("other", LoRAConfig(4, 8, target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(3, 61, (4, 7), dtype=np.int32)
    lengths = np.array([7, 3, 5, 1], np.int32)
    names = ["mood", None, "topics", "other"]
    batch = pair.bank.batch(names, phase="prefill")
    got = np.asarray(scores(pair.model, tokens, lengths, batch))
    assert not np.any(got[[1, 3]])
    for row in 0, 2:
        want = pair.expected(names[row], tokens[row : row + 1, : lengths[row]])[0]
        np.testing.assert_allclose(got[row], want, atol=1e-4)
        assert np.abs(want).max() > 0.1


@nnx.jit
def scores(model, tokens, lengths, batch):
    with jax_lora.use(batch):
        return model.scores(tokens, lengths)
