"""A file of requests, answered by an engine into a file of answers, which may be gone on with."""

import dataclasses
import hashlib
import json
import os
import queue
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from jax_lora.adapters import Adapter, load_peft, peft_header
from jax_lora.messages import printable, shown
from jax_lora.models.config import LlamaConfig
from jax_lora.models.hub import check_format, is_hub_name, local_folder
from jax_lora.models.llama import Llama
from jax_lora.serving.chat import ChatTemplate
from jax_lora.serving.engine import AdapterLimits, Engine, Generation, RequestError, SamplingParams
from jax_lora.serving.engine.shape import StepShape
from jax_lora.serving.text import bank_for, encode, fitting_slots, load_tokenizer

_SAMPLING = frozenset({"max_tokens", "temperature", "top_k", "top_p", "seed", "stop"})
_KEYS = _SAMPLING | {"prompt", "adapter", "id"}
# More adapters of a bucket take turns.
_MAX_SLOTS = 16
_MAX_ROWS = 64
_MAX_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class JobProgress:
    """How far a job is: requests answered, of how many, and tokens of this run's answers."""

    answered: int
    failed: int
    total: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Job:
    """Requests to answer.

    Each line of `requests` is a JSON object with a `prompt` and, if wanted, `adapter`, `id`,
    `max_tokens`, `temperature`, `top_k`, `top_p`, `seed` and `stop`. Each line of `answers` is one
    with `index` (the request's line, from 0), its `id` and `adapter`, and `text`, `tokens` (how
    many) and `finish_reason`; or with `error`. Answers stand in the order in which they came.

    Attributes:
      base: folder of the model, or its name on the hub. adapters: folders, by name.
      resume: go on with `answers`, where a job before has ended early. A request whose answer
        stands there whole is not asked again; one that failed is.
      chat: each prompt is a user's message, for the model's chat template.
    """

    base: str | Path
    adapters: Mapping[str, str | Path]
    requests: Path
    answers: Path
    resume: bool = False
    chat: bool = False
    dtype: DTypeLike | None = None
    allow_links: bool = False


@dataclasses.dataclass(frozen=True)
class _Line:
    """One request of the file.

    Attributes:
      digest: of the line, by which answers know their request again.
      prompt: tokens.
    """

    index: int
    digest: str
    prompt: np.ndarray
    adapter: str | None
    given_id: object
    params: SamplingParams

    @property
    def begin(self) -> dict[str, object]:
        """That of its answer."""
        begin: dict[str, object] = {"index": self.index, "request": self.digest}
        if self.given_id is not None:
            begin["id"] = self.given_id
        return {**begin, "adapter": self.adapter}


def run_job(
    job: Job,
    told: Callable[[JobProgress], None] = lambda _: None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> JobProgress:
    """Answers the requests of a file.

    Args:
      told: is told after each answer. progress: what is being done before.

    Raises:
      FileNotFoundError: a file or folder is missing.
      FileExistsError: there are answers, and `resume` is not asked for.
      ValueError: a line is malformed, names an adapter that is not given, or exceeds what the
        model takes; or the answers are those of other requests. See also `complete`.
    """
    base = local_folder(job.base)
    check_format(base)
    config, tokenizer = LlamaConfig.from_json(base), load_tokenizer(base)
    lines = [_sized(line, config) for line in _read_lines(job, ChatTemplate(base), tokenizer)]
    left = _left(job, lines)
    state = JobProgress(len(lines) - len(left), 0, len(lines), 0)
    told(state)
    if not left:
        return state
    progress(f"loading {base}")
    engine = _engine(job, base, lines)
    with engine, job.answers.open("a", encoding="utf-8") as out:
        progress("compiling")
        engine.warmup()
        progress("generating")
        ended: queue.SimpleQueue[tuple[_Line, Generation]] = queue.SimpleQueue()
        waiting, in_flight = iter(left), 0
        while True:
            while in_flight < 2 * engine.shape.rows and (line := next(waiting, None)) is not None:
                _ask(engine, line, ended)
                in_flight += 1
            if not in_flight:
                return state
            state = _write(out, *ended.get(), state)
            in_flight -= 1
            told(state)


def _ask(engine: Engine, line: _Line, ended: queue.SimpleQueue[tuple[_Line, Generation]]) -> None:
    generation = engine.submit(line.prompt, line.params, adapter=line.adapter)
    generation.on_done(lambda done: ended.put((line, done)))


def _write(out: TextIO, line: _Line, generation: Generation, state: JobProgress) -> JobProgress:
    """Writes an answer, whole or not at all."""
    answered, failed, tokens = state.answered, state.failed, state.tokens
    try:
        answer = generation.result()
    except RequestError as error:
        end: dict[str, object] = {"error": str(error)}
        failed += 1
    else:
        end = {
            "text": answer.text,
            "tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason.value,
        }
        answered, tokens = answered + 1, tokens + len(answer.tokens)
    out.write(json.dumps({**line.begin, **end}, ensure_ascii=False) + "\n")
    out.flush()
    return dataclasses.replace(state, answered=answered, failed=failed, tokens=tokens)


def _read_lines(job: Job, chat: ChatTemplate, tokenizer: Tokenizer) -> Iterator[_Line]:
    with job.requests.open(encoding="utf-8") as file:
        for index, text in enumerate(file):
            try:
                yield _read_line(index, text, job, chat, tokenizer)
            except (ValueError, TypeError, KeyError) as error:
                reason = error.args[0] if isinstance(error, KeyError) else error
                where = f"{printable(job.requests)}, line {index + 1}"
                raise ValueError(f"{where}: {printable(str(reason), 1000)}") from None


def _read_line(index: int, text: str, job: Job, chat: ChatTemplate, tokenizer: Tokenizer) -> _Line:
    given = json.loads(text)
    if not isinstance(given, dict) or not isinstance(prompt := given.get("prompt"), str):
        raise ValueError(f"it must be an object with a prompt, got {shown(given)}")
    if unknown := sorted(given.keys() - _KEYS):
        raise ValueError(f"it has {shown(unknown)}; known are {', '.join(sorted(_KEYS))}")
    adapter = given.get("adapter")
    if adapter is not None and adapter not in job.adapters:
        known = ", ".join(map(repr, list(job.adapters)[:20])) or "none"
        raise ValueError(f"no adapter is called {shown(adapter)}; there are {known}")
    sampling = {key: given[key] for key in _SAMPLING & given.keys() if given[key] is not None}
    if isinstance(stop := sampling.get("stop"), str):
        sampling["stop"] = (stop,)
    params = SamplingParams(**sampling)
    if job.chat:
        prompt = chat.prompt([{"role": "user", "content": prompt}])
    tokens = encode(tokenizer, [prompt], special_tokens=not job.chat)[0][0]
    digest = hashlib.sha256(text.strip().encode(errors="surrogatepass")).hexdigest()[:16]
    return _Line(index, digest, tokens, adapter, given.get("id"), params)


def _sized(line: _Line, config: LlamaConfig) -> _Line:
    """With `max_tokens`; ValueError where that exceeds what the model takes."""
    length, positions = len(line.prompt), config.max_position_embeddings
    room = _MAX_NEW_TOKENS if positions is None else positions - length
    asked = line.params.max_tokens
    if asked is None:
        asked = max(min(_MAX_NEW_TOKENS, room), 1)
    if positions is not None and asked > room:
        raise ValueError(
            f"request {line.index} has a prompt of {length} tokens and max_tokens={asked}, which "
            f"exceed the model's {positions} positions (max_position_embeddings)"
        )
    return dataclasses.replace(line, params=dataclasses.replace(line.params, max_tokens=asked))


def _left(job: Job, lines: list[_Line]) -> list[_Line]:
    """The requests that have no answer yet. Whole answers stay in their file."""
    if not job.answers.exists():
        return lines
    if not job.resume:
        raise FileExistsError(
            f"{printable(job.answers)} has answers; resume, or give answers another file"
        )
    kept: dict[int, str] = {}
    # Behind the last line feed stands what a job that was killed did not write to its end.
    *whole, _ = job.answers.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(whole):
        where = f"{printable(job.answers)}, line {number + 1}"
        try:
            answer = json.loads(text)
            index, digest = answer["index"], answer["request"]
            is_other = digest != lines[index].digest
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(f"{where}: it is no answer to the requests: {shown(text)}") from None
        if is_other:
            raise ValueError(
                f"{where}: it answers another request than line {index + 1} of "
                f"{printable(job.requests)} has now; give the requests of then, or other files"
            )
        if "error" not in answer:
            kept[index] = text + "\n"
    # In one step: whoever is killed meanwhile leaves the old file.
    new = job.answers.with_name(f".{job.answers.name}.new")
    new.write_text("".join(kept.values()), encoding="utf-8")
    os.replace(new, job.answers)
    return [line for line in lines if line.index not in kept]


def _engine(job: Job, base: Path, lines: list[_Line]) -> Engine:
    """An engine that is as large as the requests need, those with answers too.

    So a job that goes on takes the same steps as the one before, to the bit.
    """
    names = sorted({line.adapter for line in lines if line.adapter is not None})
    sources = {name: local_folder(job.adapters[name]) for name in names}
    links = {name: job.allow_links or is_hub_name(job.adapters[name]) for name in names}
    headers = [peft_header(sources[name], allow_links=links[name]) for name in names]
    model, bank = Llama.from_pretrained(base, dtype=job.dtype), None
    if names:
        fitting = fitting_slots([header.rank for header in headers])
        slots = {bucket: min(count, _MAX_SLOTS) for bucket, count in fitting.items()}
        bank = bank_for(model, headers, slots)
    longest = max(len(line.prompt) + (line.params.max_tokens or 0) for line in lines)
    shape = StepShape(
        rows=min(_MAX_ROWS, len(lines)), max_length=longest, contexts=(longest,), lanes=(0, 4)
    )
    # Those of the hub's cache are links out of their folder, those of strangers must not be.
    adapters: dict[str, Path | Adapter] = {
        name: load_peft(path, allow_links=True) if links[name] and not job.allow_links else path
        for name, path in sources.items()
    }
    limits = AdapterLimits(allow_links=job.allow_links)
    return Engine(model, bank, load_tokenizer(base), adapters=adapters, shape=shape, limits=limits)
