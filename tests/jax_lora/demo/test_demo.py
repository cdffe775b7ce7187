"""The main job: the bundled model does what the demo and the model card say."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jax_lora import AdapterBank, apply_lora, load_peft
from jax_lora.cli import app
from jax_lora.demo import tasks
from jax_lora.demo.job import FOLDER, MAX_LOGIT_DIFFERENCE, MAX_NEW_TOKENS, adapter_paths
from jax_lora.generation import decode, encode, fitting_slots, load_tokenizer
from jax_lora.llama import Llama, generate

PROMPTS, BATCH = 100, 110
PROMPTS_IN_8_BITS = 4  # in each dtype: a CPU computes with these some three times as long


FLOAT8 = pytest.param("float8_e4m3fn", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[None, "int8", FLOAT8])
def exact_match(request: pytest.FixtureRequest) -> dict[tuple[str | None, str], float]:
    """Share of held-out prompts that each adapter (or none) completes as each task would, in stacks
    of the model's dtype, and in 8 bits."""
    model = Llama.from_pretrained(FOLDER / "base", dtype=jnp.float32)
    tokenizer = load_tokenizer(FOLDER / "base")
    adapters = {name: load_peft(path) for name, path in adapter_paths().items()}
    slots = fitting_slots([adapter.rank for adapter in adapters.values()])
    apply_lora(model, slots=slots, buckets=tuple(slots), dtype=request.param)
    bank = AdapterBank(model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    words = tasks.held_out_words(PROMPTS_IN_8_BITS if request.param else PROMPTS)
    rows = [(name, word) for word in words for name in (*adapters, None)]
    np.random.default_rng(0).shuffle(rows)
    completions: dict[tuple[str | None, str], str] = {}
    tokens, lengths = encode(tokenizer, [tasks.prompt(word) for _, word in rows])
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        batch = bank.batch([name for name, _ in rows[part]])
        new = generate(
            model, tokens[part], lengths[part], adapters=batch, max_new_tokens=MAX_NEW_TOKENS
        )
        for row, row_tokens in zip(rows[part], new):
            assert model.config.eos_token_id in row_tokens, row
            completions[row] = decode(tokenizer, row_tokens, np.array(model.config.eos_token_id))
    return {
        (name, task): np.mean(
            [completions[name, word] == tasks.TASKS[task].complete(word) for word in words]
        )
        for name in (*adapters, None)
        for task in tasks.TASKS
    }


@pytest.mark.ci
@pytest.mark.parametrize("task", tasks.TASKS)
def test_exact_match_on_held_out_prompts(
    exact_match: dict[tuple[str | None, str], float], task: str
) -> None:
    others = {name: exact_match[name, task] for name in (*tasks.TASKS, None) if name != task}
    assert exact_match[task, task] >= 0.95
    assert max(others.values()) <= 0.10, others


@pytest.mark.ci
def test_demo_reports_what_it_checked() -> None:
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"]
    assert {row["adapter"] for row in report["rows"]} == {*tasks.TASKS, None}
    assert {4, 8, 12, 16, 64, 160} <= set(report["ranks"])
    assert (report["compilations"], report["recompilations"]) == (2, 0)
    assert 0 < report["max_logit_difference"] <= MAX_LOGIT_DIFFERENCE
    for row in report["rows"]:
        word = tasks.word_of(row["prompt"])
        assert row["completion"] == tasks.task_of(row["adapter"]).complete(word)
        kernels = (row["decode_kernel"], row["prefill_kernel"])
        large = row["rank"] is not None and row["rank"] > 128
        expected = (None, None) if row["rank"] is None else ("sgmv" if large else "bgmv", "sgmv")
        assert kernels == expected


def test_demo_ends_non_zero_when_a_completion_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_lora.demo import job

    def wrong(progress: object) -> job.Report:
        row = job.Row("able:", None, None, None, None, None, None, "abel", False)
        return job.Report([row], 0, [], 2, 0, True, 0.0)

    monkeypatch.setattr(job, "run", wrong)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "Wrong: 1 completions" in result.output


def test_bundled_files_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.*")) <= 8_000_000
