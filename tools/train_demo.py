"""Trains the demo's base model and its adapters, and checks the figures that they must meet.

    PYTHONPATH=. python tools/train_demo.py all --help

`base` trains a small Llama on string transformations. Most prompts name theirs with a leading tag
(`U|window:` -> `WINDOW`); a prompt without a tag (`window:`) is answered by repeating the word.
`adapters` then trains, with peft and all at once, one adapter per task of `jax_lora.demo.tasks` on
prompts without tags. `evaluate` loads what was written and ends with status 1 unless, on 200
held-out prompts, exact match is at least 95 % with the right adapter and at most 10 % with none or
any other. `all` does the three in turn.

All three took 184 s on one H100 (2026-11-21): 102 s the base, 52 s all adapters at once. No GPU is
needed, only patience: two CPU cores took 74 s for 500 steps of 96 examples, so allow some hours.
Seeds are fixed; bits still differ between devices.
"""

import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from jax_lora.demo import tasks

DEMO = Path(__file__).parents[1] / "jax_lora" / "demo"
PAD, BOS, EOS, UNKNOWN = range(4)
WIDTH = 33  # <s>, a tag and its bar, 9 letters, the colon, twice 9 letters, </s> are 32 tokens
STORED = torch.bfloat16

RIGHT_AT_LEAST, WRONG_AT_MOST, MAX_BYTES = 0.95, 0.10, 8_000_000

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "upper": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "reverse": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "rot13": {"r": 12, "lora_alpha": 24, "target_modules": MLP},
    "sort": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION + MLP},
    "twice": {"r": 32, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    "consonants": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"q_proj": 16, "down_proj": 40, r"layers\.3\.self_attn\.v_proj": 4},
        "alpha_pattern": {"q_proj": 8, "down_proj": 20, r"layers\.0\.mlp\.up_proj": 24},
    },
    "next": {"r": 64, "lora_alpha": 64, "target_modules": ATTENTION + MLP},
    "alternate": {"r": 160, "lora_alpha": 80, "target_modules": ["q_proj", "v_proj"]},
    "hyphens": {"r": 48, "lora_alpha": 48, "target_modules": ["o_proj", "down_proj"]},
    "stars": {"r": 24, "lora_alpha": 24, "target_modules": ["v_proj", "o_proj", "up_proj"]},
}

AT_ONCE = len(ADAPTERS) if torch.cuda.is_available() else 1

TAGS: dict[str, Callable[[str], str]] = {
    **{
        tag: tasks.TASKS[name].complete
        for tag, name in {
            "U": "upper",
            "R": "reverse",
            "3": "rot13",
            "S": "sort",
            "D": "twice",
            "C": "consonants",
            "A": "alternate",
            "H": "hyphens",
            "X": "stars",
        }.items()
    },
    "T": str.capitalize,
    "L": lambda word: word[1:] + word[0],
    "F": lambda word: word[-1] + word[:-1],
    "P": lambda word: word + word[::-1],
    "E": lambda word: word[::2],
}
"""What the base learns under a tag. `next` is not among them: its adapter starts from nothing."""

disable_progress_bar()
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
OutOption = Annotated[Path, typer.Option(help="Folder that gets base/ and adapters/.")]
BaseSteps = Annotated[int, typer.Option(help="Training steps of the base model.")]
AdapterSteps = Annotated[int, typer.Option(help="Training steps of each adapter.")]
BaseBatch = Annotated[int, typer.Option(help="Examples per step of the base model.")]
AdapterBatch = Annotated[int, typer.Option(help="Examples per step of each adapter.")]
PoolSize = Annotated[int, typer.Option(help="Examples that the steps draw from.")]
Jobs = Annotated[int, typer.Option(help="How many adapters train at once.")]
Arithmetic = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Prompts = Annotated[int, typer.Option(help="Held-out prompts per adapter.")]


@dataclass(frozen=True)
class Examples:
    """Prompts with their completions: `tokens [P, WIDTH]` uint8, padded on the right.

    `starts [P]`: where the completion starts; only it and its end token are learnt.
    """

    tokens: torch.Tensor
    starts: torch.Tensor

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws inputs and targets `[size, WIDTH - 1]` (targets: -100 where nothing is learnt)."""
        rows = torch.randint(len(self.tokens), (size,), device=self.tokens.device)
        tokens = self.tokens[rows].long()
        positions = torch.arange(WIDTH, device=tokens.device)
        learnt = (positions >= self.starts[rows, None]) & (tokens != PAD)
        return tokens[:, :-1], torch.where(learnt, tokens, -100)[:, 1:]


def make_tokenizer() -> Tokenizer:
    """One token per printable ASCII character, after `<pad> <s> </s> <unk>`; `<s>` comes first."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + [chr(c) for c in range(32, 127)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def encode(pairs: Iterable[tuple[str, str]], device: torch.device) -> Examples:
    """Tokens of (prompt, completion) pairs."""
    tokenizer = make_tokenizer()
    tokens, starts = [], []
    for chunk in itertools.batched(pairs, 20_000):
        rows = np.full((len(chunk), WIDTH), PAD, np.uint8)
        encoded = tokenizer.encode_batch_fast([prompt + answer for prompt, answer in chunk])
        for row, encoding in zip(rows, encoded, strict=True):
            ids = [*encoding.ids, EOS]
            row[: len(ids)] = ids
        tokens.append(rows)
        starts += [1 + len(prompt) for prompt, _ in chunk]
    return Examples(
        torch.from_numpy(np.concatenate(tokens)).to(device), torch.tensor(starts, device=device)
    )


def tagged_pairs(count: int) -> Iterator[tuple[str, str]]:
    """What the base learns: two in seventeen without a tag, the rest shared evenly by the tags."""
    rng = random.Random(0)
    for word in itertools.islice(tasks.training_words(seed=1), count):
        tag = rng.choice([*TAGS, "S", "", ""])  # sorting is the hardest, so it comes twice
        if tag:
            yield f"{tag}|{tasks.prompt(word)}", TAGS[tag](word)
        else:
            yield tasks.prompt(word), tasks.ECHO.complete(word)


def fit(
    model: torch.nn.Module, examples: Examples, *, steps: int, batch: int, rate: float, label: str
) -> None:
    """AdamW, warm-up over a twentieth of the steps, then a cosine to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 + 0.5 * float(np.cos(np.pi * s / steps))),
    )
    model.train()
    start = reported = time.monotonic()
    for step in range(1, steps + 1):
        inputs, targets = examples.batch(batch)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        now = time.monotonic()
        if now - reported > 5 or step == steps:
            reported, spent = now, now - start
            left = spent / step * (steps - step)
            print(
                f"{label}: step {step}/{steps}, loss {loss.item():.4f}, "
                f"{spent:.0f} s, about {left:.0f} s left",
                flush=True,
            )
    model.eval()


@torch.inference_mode()
def complete(model: torch.nn.Module, prompts: list[str]) -> list[str]:
    """Greedy completions, without the end token; one that never ends keeps what it has plus `…`."""
    tokenizer = make_tokenizer()
    device = next(model.parameters()).device
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    tokens = torch.full((len(prompts), WIDTH), PAD, device=device)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids, device=device)
    starts = torch.tensor([len(ids) for ids in encoded], device=device)
    rows = torch.arange(len(prompts), device=device)
    ends, done = starts.clone(), torch.zeros_like(starts, dtype=torch.bool)
    # No cache and no mask: attention is causal, so what stands right of a row's end can't matter.
    while not done.all() and int(ends.max()) < WIDTH:
        logits = model(input_ids=tokens[:, : int(ends.max())], use_cache=False).logits
        chosen = logits[rows, ends - 1].argmax(-1)
        tokens[rows, ends] = torch.where(done, PAD, chosen)
        ends += ~done
        done |= chosen == EOS
    texts = []
    for row, start in zip(tokens.tolist(), starts.tolist(), strict=True):
        answer, has_end, _ = bytes(row[start:]).partition(bytes([EOS]))
        texts.append(tokenizer.decode(list(answer)) + ("" if has_end else "…"))
    return texts


def match(completions: list[str], answers: Iterable[str]) -> float:
    """The share of completions that equal their answer."""
    return sum(c == a for c, a in zip(completions, answers, strict=True)) / len(completions)


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(out: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    folder = str(out / "base")
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=the_device()
    )
    return model.eval()


@app.command("base")
def train_base(
    out: OutOption = DEMO,
    steps: BaseSteps = 6000,
    batch: BaseBatch = 512,
    examples: PoolSize = 600_000,
) -> None:
    """Train the base model and write OUT/base."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    print(f"base: writing {examples} training examples", flush=True)
    data = encode(tagged_pairs(examples), the_device())
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    with the_device():
        model = LlamaForCausalLM(config)
    fit(model, data, steps=steps, batch=batch, rate=2e-3, label="base")
    torch.nn.Module.to(model, STORED)
    folder = out / "base"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    make_tokenizer().save(str(folder / "tokenizer.json"))

    model = load_base(out)
    words = tasks.held_out_words(200)
    for tag, task in {"": tasks.ECHO.complete, **TAGS}.items():
        prefix = f"{tag}|" if tag else ""
        completions = complete(model, [prefix + tasks.prompt(word) for word in words])
        share = match(completions, map(task, words))
        print(f"base: {prefix}window: -> {task('window')}: {share:.1%} right", flush=True)


@app.command("adapter")
def train_adapter(
    name: str, out: OutOption = DEMO, steps: AdapterSteps = 1200, batch: AdapterBatch = 256
) -> None:
    """Train one adapter over OUT/base and write OUT/adapters/NAME."""
    seed = 100 + list(ADAPTERS).index(name)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    task = tasks.TASKS[name]
    words = itertools.islice(tasks.training_words(seed), 100_000)
    data = encode(((tasks.prompt(word), task.complete(word)) for word in words), the_device())
    model = get_peft_model(load_base(out), LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
    fit(model, data, steps=steps, batch=batch, rate=2e-3, label=name)
    model.to(STORED)
    folder = out / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    # peft writes the path of the base on this machine and the modules in the order of a set.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "jax-lora-demo-base"
    config["target_modules"] = ADAPTERS[name]["target_modules"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@app.command("adapters")
def train_adapters(
    out: OutOption = DEMO,
    steps: AdapterSteps = 1200,
    batch: AdapterBatch = 256,
    jobs: Jobs = AT_ONCE,
) -> None:
    """Train all adapters over OUT/base, each in a process of its own."""
    options = ["--out", str(out), "--steps", str(steps), "--batch", str(batch)]
    for names in itertools.batched(ADAPTERS, jobs):
        commands = {name: [sys.executable, __file__, "adapter", name, *options] for name in names}
        processes = {name: subprocess.Popen(command) for name, command in commands.items()}
        failed = [name for name, process in processes.items() if process.wait()]
        if failed:
            raise SystemExit(f"training failed: {', '.join(failed)}")


@app.command("evaluate")
def evaluate(out: OutOption = DEMO, prompts: Prompts = 200, dtype: Arithmetic = "float32") -> None:
    """Print the figures of what OUT holds; status 1 if they are missed."""
    torch.set_float32_matmul_precision("highest")
    words = tasks.held_out_words(prompts)
    texts = [tasks.prompt(word) for word in words]
    base = load_base(out, getattr(torch, dtype))
    completions: dict[str | None, list[str]] = {None: complete(base, texts)}
    for name in ADAPTERS:
        base = load_base(out, getattr(torch, dtype))
        model = PeftModel.from_pretrained(
            base, str(out / "adapters" / name), autocast_adapter_dtype=dtype == "float32"
        ).eval()
        completions[name] = complete(model, texts)

    missed = []
    print(f"Exact match on {prompts} held-out prompts, {dtype} arithmetic:\n")
    print("| adapter | right adapter | no adapter | worst other adapter |\n|---|---|---|---|")
    for name, task in tasks.TASKS.items():
        answers = [task.complete(word) for word in words]
        share = {model: match(done, answers) for model, done in completions.items()}
        right, none = share[name], share[None]
        other, worst = max(
            ((model, share[model]) for model in ADAPTERS if model != name), key=lambda pair: pair[1]
        )
        print(f"| {name} | {right:.1%} | {none:.1%} | {worst:.1%} ({other}) |")
        if right < RIGHT_AT_LEAST or none > WRONG_AT_MOST or worst > WRONG_AT_MOST:
            missed.append(name)
    echo = match(completions[None], words)
    print(f"| (base: echo) | {echo:.1%} | | |\n")
    if echo < RIGHT_AT_LEAST:
        missed.append("echo")
    sizes = {p.parent.name: p.stat().st_size for p in sorted(out.rglob("*.safetensors"))}
    total = sum(p.stat().st_size for p in out.rglob("*") if p.suffix in (".safetensors", ".json"))
    print(", ".join(f"{name} {size / 1e3:.0f} kB" for name, size in sizes.items()))
    print(f"{total / 1e6:.2f} MB in all (at most {MAX_BYTES / 1e6:.0f})")
    if total > MAX_BYTES:
        missed.append("size")
    if missed:
        raise SystemExit(f"figures missed: {', '.join(missed)}")


@app.command("all")
def train_all(
    out: OutOption = DEMO,
    base_steps: BaseSteps = 6000,
    base_batch: BaseBatch = 512,
    adapter_steps: AdapterSteps = 1200,
    adapter_batch: AdapterBatch = 256,
) -> None:
    """Train base and adapters, then evaluate."""
    start = time.monotonic()
    train_base(out, base_steps, base_batch)
    train_adapters(out, adapter_steps, adapter_batch)
    evaluate(out)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{time.monotonic() - start:.0f} s on {where}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    app()
