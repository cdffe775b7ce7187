"""Text in, text out: a base model's folder, adapters' folders and prompts, in one batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jax_lora.adapters import load_peft
from jax_lora.bank import AdapterBank
from jax_lora.layers import apply_lora
from jax_lora.llama import Llama
from jax_lora.llama import generate as generate_tokens
from pallas_kernels import padded_rank


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt, the adapter that answered it (None for the base model), and its answer."""

    adapter: str | None
    prompt: str
    text: str


def load_tokenizer(base: Path) -> Tokenizer:
    """The `tokenizer.json` of a model's folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it can't be parsed.
    """
    file = base / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{str(base)!r} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare ones
        raise ValueError(f"{file}: {error}") from None


def encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[B, S]` token ids, padded on the right, and their lengths `[B]`.

    Raises:
      ValueError: a prompt has no token.
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    for prompt, row_ids in zip(prompts, ids):
        if not row_ids:
            raise ValueError(f"the prompt {prompt!r} has no token")
    lengths = np.array([len(row_ids) for row_ids in ids], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, row_ids in zip(tokens, ids):
        row[: len(row_ids)] = row_ids
    return tokens, lengths


def decode(tokenizer: Tokenizer, tokens: np.ndarray, eos_ids: np.ndarray) -> str:
    """The text of one row's new tokens, up to its first end token."""
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    return str(tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist()))


def fitting_slots(ranks: Sequence[int]) -> dict[int, int]:
    """`{bucket: slots}` with one bucket per padded rank that occurs, and just enough slots."""
    padded = sorted(map(padded_rank, ranks))
    return {bucket: padded.count(bucket) for bucket in dict.fromkeys(padded)}


def complete(
    base: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[tuple[str | None, str]],
    *,
    max_new_tokens: int,
    dtype: Any = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Completion]:
    """Greedy completions of `(adapter, text)` prompts, all in one batch.

    Raises:
      FileNotFoundError, ValueError: see `load_peft`, `Llama.from_pretrained` and
        `AdapterBank.load`.
      KeyError: a prompt names an adapter that is not given.
    """
    tokenizer = load_tokenizer(base)
    loaded = {name: load_peft(path) for name, path in adapters.items()}
    tokens, lengths = encode(tokenizer, [text for _, text in prompts])
    progress(f"loading {base}")
    model = Llama.from_pretrained(base, dtype=dtype)
    batch = None
    if loaded:
        slots = fitting_slots([adapter.rank for adapter in loaded.values()])
        apply_lora(model, slots=slots, buckets=tuple(slots))
        bank = AdapterBank(model)
        for name, adapter in loaded.items():
            progress(f"loading adapter {name}")
            bank.load(name, adapter)
        batch = bank.batch([name for name, _ in prompts])
    progress("compiling and generating")
    new_tokens = generate_tokens(
        model, tokens, lengths, adapters=batch, max_new_tokens=max_new_tokens
    )
    eos_ids = np.atleast_1d(model.config.eos_token_id)
    return [
        Completion(name, text, decode(tokenizer, row, eos_ids))
        for (name, text), row in zip(prompts, new_tokens)
    ]
