"""Text in, text out: a base model's folder, adapters' folders and prompts, in one batch."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from jax_lora.adapters import AdapterHeader, peft_header, refuse_pointer
from jax_lora.bank import AdapterBank
from jax_lora.models.config import LlamaConfig
from jax_lora.models.hub import check_format, is_hub_name, local_folder
from jax_lora.models.llama import Llama
from jax_lora.nn.apply import apply_lora
from jax_lora.plan import room_for
from jax_lora.serving.chat import ChatTemplate
from jax_lora.serving.generate import check_prompts
from jax_lora.serving.generate import generate as generate_tokens
from pallas_kernels import padded_rank


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt, the adapter that answered it (None for the base model), and its answer."""

    adapter: str | None
    prompt: str
    text: str


def load_tokenizer(base: Path) -> Tokenizer:
    """The `tokenizer.json` of a model's folder, without the padding and truncation stored in it.

    Raises:
      FileNotFoundError: there is none, or no such folder.
      ValueError: it is a pointer of Git LFS, or can't be parsed.
    """
    if not base.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(base)!r}; give one, or OWNER/MODEL of Hugging Face's hub"
        )
    file = base / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{str(base)!r} has no tokenizer.json; {_tokenizer_remedy(base)}")
    with file.open("rb") as opened:
        refuse_pointer(opened.read(40), file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare ones
        raise ValueError(
            f"{str(file)!r} is no tokenizer: {error!s:.200}; save or download it again"
        ) from None
    return _without_padding(tokenizer)


_CONVERTIBLE = ("tokenizer.model", "vocab.json", "vocab.txt")


def _tokenizer_remedy(base: Path) -> str:
    if found := next((name for name in _CONVERTIBLE if (base / name).is_file()), None):
        folder = str(base)
        return (
            f"convert {found}, e.g. by pip install transformers sentencepiece tiktoken, and in "
            f"Python: from transformers import AutoTokenizer; "
            f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
        )
    return (
        "download that of the model, e.g. by "
        f"hf download OWNER/MODEL tokenizer.json --local-dir {shlex.quote(str(base))}"
    )


def _without_padding(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], *, special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[B, S]` token ids, padded on the right with 0, and their lengths `[B]`.

    Each prompt is whole: the tokenizer's own padding and truncation are not applied.

    Args:
      special_tokens: add the tokenizer's own, such as a beginning of text. A prompt that a chat
        template wrote has them already.

    Raises:
      TypeError: prompts that are not text.
      ValueError: there is no prompt, or one has no token or is no Unicode text.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of str, got {prompts!r:.100}")
    if not prompts:
        raise ValueError("give at least one prompt, got none")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt {prompt!r:.100} is no Unicode text: {error.reason}"
            ) from None
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        # A copy, as the caller may want its tokenizer to pad.
        tokenizer = _without_padding(Tokenizer.from_str(tokenizer.to_str()))
    encodings = tokenizer.encode_batch(list(prompts), add_special_tokens=special_tokens)
    ids = [encoding.ids for encoding in encodings]
    for prompt, row_ids in zip(prompts, ids):
        if not row_ids:
            raise ValueError(f"the prompt {prompt!r:.100} has no token")
    lengths = np.array([len(row_ids) for row_ids in ids], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, row_ids in zip(tokens, ids):
        row[: len(row_ids)] = row_ids
    return tokens, lengths


def decode(
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    eos_ids: np.ndarray,
    *,
    prompt_ids: Sequence[int] | np.ndarray | None = None,
) -> str:
    """The text with which one row's new tokens, up to the first end token, continue its prompt.

    Many tokenizers drop the space at the start of what they decode, or spread a character over
    several tokens. So the prompt is decoded too, and the result is what its text lacks: it keeps
    that space, and has a character whole whose first bytes end the prompt.

    Args:
      tokens: the new tokens.
      eos_ids: the end tokens.
      prompt_ids: the prompt's tokens; None for those of another text, which keeps the space too.
    """
    ends = np.flatnonzero(np.isin(tokens, eos_ids))
    new = np.asarray(tokens)[: ends[0] if len(ends) else None].tolist()
    if prompt_ids is None:
        prompt = tokenizer.encode("a", add_special_tokens=False).ids
    else:
        prompt = np.asarray(prompt_ids, np.int64).tolist()
    known, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    pairs = enumerate(zip(known, whole))
    differs = (i for i, (before, after) in pairs if before != after)
    return str(whole[next(differs, min(len(known), len(whole))) :])


def fitting_slots(ranks: Sequence[int]) -> dict[int, int]:
    """`{bucket: slots}` with one bucket per padded rank that occurs, and just enough slots."""
    padded = sorted(map(padded_rank, ranks))
    return {bucket: padded.count(bucket) for bucket in dict.fromkeys(padded)}


def bank_for(
    model: Llama,
    headers: Sequence[AdapterHeader],
    slots: Mapping[int, int],
    *,
    dtype: DTypeLike | None = None,
) -> AdapterBank:
    """Gives a model room for adapters of these headers, in `{bucket: slots}`, as `apply_lora`."""
    room = room_for(model, headers)
    apply_lora(model, slots=slots, buckets=tuple(slots), dtype=dtype, **room)
    return AdapterBank(model)


def complete(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[tuple[str | None, str]],
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    dtype: DTypeLike | None = None,
    allow_links: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Completion]:
    """Greedy completions of `(adapter, text)` prompts, all in one batch.

    Args:
      base, adapters: folders, or names on Hugging Face's hub; see `local_folder`.
      chat: each text is a user's message, which the model's chat template makes a prompt of.
      max_new_tokens: of each completion, at most; None for 64, or for what the longest prompt
        leaves of the model's positions if that is less.
      allow_links: read adapters' files that are links out of their folder. Those that came from
        the hub are links of its cache, and are read.

    Raises:
      FileNotFoundError, ValueError: see `local_folder`, `load_tokenizer`, `chat_prompt`, `encode`,
        `load_peft`, `Llama.from_pretrained` and `AdapterBank.load`; ValueError also where a prompt
        and its new tokens exceed the model's `max_position_embeddings`.
      KeyError: a prompt names an adapter that is not given.
    """
    for name, _ in prompts:
        if name is not None and name not in adapters:
            raise KeyError(f"no adapter {name!r:.100}; given: {', '.join(adapters) or 'none'}")
    base = local_folder(base)
    check_format(base)
    tokenizer = load_tokenizer(base)
    texts = [text for _, text in prompts]
    if chat:
        template = ChatTemplate(base)
        texts = [template.prompt([{"role": "user", "content": text}]) for text in texts]
    tokens, lengths = encode(tokenizer, texts, special_tokens=not chat)
    config = LlamaConfig.from_json(base)
    max_new_tokens = _new_tokens(config, lengths, max_new_tokens)
    check_prompts(config, tokens, lengths, max_new_tokens)
    sources = {name: _Source.of(path, allow_links) for name, path in adapters.items()}
    headers = [peft_header(s.folder, allow_links=s.allow_links) for s in sources.values()]
    progress(f"loading {base}")
    model = Llama.from_pretrained(base, dtype=dtype)
    batch = None
    if headers:
        slots = fitting_slots([header.rank for header in headers])
        bank = bank_for(model, headers, slots)
        for name, source in sources.items():
            progress(f"loading adapter {name}")
            bank.load(name, source.folder, allow_links=source.allow_links)
        batch = bank.batch([name for name, _ in prompts])
    progress("compiling and generating")
    new_tokens = generate_tokens(
        model, tokens, lengths, adapters=batch, max_new_tokens=max_new_tokens
    )
    eos_ids = np.array(config.eos_token_id, np.int32)
    return [
        Completion(name, text, decode(tokenizer, new, eos_ids, prompt_ids=row[:length]))
        for (name, text), new, row, length in zip(prompts, new_tokens, tokens, lengths)
    ]


class _Source(NamedTuple):
    """Where an adapter's files are, and whether they may be links out of their folder."""

    folder: Path
    allow_links: bool

    @classmethod
    def of(cls, path: str | Path, allow_links: bool) -> Self:
        return cls(local_folder(path), allow_links or is_hub_name(path))


_NEW_TOKENS = 64


def _new_tokens(config: LlamaConfig, lengths: np.ndarray, asked: int | None) -> int:
    positions, longest = config.max_position_embeddings, int(lengths.max())
    if positions is None:
        return _NEW_TOKENS if asked is None else asked
    room = positions - longest
    if asked is None:
        asked = min(_NEW_TOKENS, max(room, 1))
    if asked > room:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={asked} exceed the model's "
            f"{positions} positions (max_position_embeddings)"
        )
    return asked
