"""From a body to the engine, and from its pieces to the response."""

import contextlib
import dataclasses
import functools
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jax_lora.messages import shown
from jax_lora.serving.chat import ChatTemplate
from jax_lora.serving.engine import (
    Answer,
    Engine,
    EngineBusyError,
    FinishReason,
    Generation,
    Piece,
    RequestError,
    SamplingParams,
)
from jax_lora.serving.server.answers import DONE, Form, Kind, event
from jax_lora.serving.server.errors import ApiError, without_places
from jax_lora.serving.server.metrics import Metrics
from jax_lora.serving.server.schemas import AskBody, ChatBody, CompletionBody
from jax_lora.serving.server.streams import Inbox, Mailbox
from jax_lora.serving.text import encode

_COMPLETION_TOKENS = 16  # OpenAI's default; a chat's is what there is room for
_MAX_STOPS = 16


@dataclasses.dataclass(frozen=True)
class Served:
    """What the server answers with: an engine with a tokenizer, and the base model's name.

    Attributes:
      base: the model's folder. adapters: that of its adapters, below which clients may have some
        loaded; None for nowhere.
    """

    engine: Engine
    base: Path
    name: str
    adapters: Path | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    def told(self, error: Exception) -> str:
        """An error's text for clients."""
        return without_places(error, self.base, self.adapters)

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.base)


@dataclasses.dataclass(frozen=True)
class Question:
    """A request, read and checked but for what the engine checks."""

    form: Form
    adapter: str | None
    prompts: list[np.ndarray]
    n: int
    params: SamplingParams

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def read_question(served: Served, body: CompletionBody | ChatBody, max_answers: int) -> Question:
    """Tokens and parameters of a body. It takes a while: a thread's work.

    Raises:
      ApiError: 404, there is no such model; 400, for a value that is out of range.
    """
    adapter = None if body.model == served.name else body.model
    if adapter is not None and adapter not in served.engine.adapters:
        raise no_model(body.model)
    try:
        prompts = _prompts(served, body)
        if not prompts or len(prompts) * body.n > max_answers:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={body.n} ask for {len(prompts) * body.n} answers; "
                f"a request may have 1 to {max_answers}",
                param="n",
            )
        return Question(_form(served, body), adapter, prompts, body.n, _params(body))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ApiError(400, served.told(error)) from None


def no_model(name: str) -> ApiError:
    """404."""
    message = f"there is no model {shown(name)}; GET /v1/models lists them"
    return ApiError(404, message, param="model", code="model_not_found")


def _prompts(served: Served, body: CompletionBody | ChatBody) -> list[np.ndarray]:
    if isinstance(body, ChatBody):
        messages = [message.plain for message in body.messages]
        text = served.chat.prompt(messages)
        return [encode(served.tokenizer, [text], special_tokens=False)[0][0]]
    return [
        encode(served.tokenizer, [prompt])[0][0] if isinstance(prompt, str) else _ids(prompt)
        for prompt in body.prompts
    ]


def _ids(tokens: Sequence[int]) -> np.ndarray:
    if any(not 0 <= token < 1 << 31 for token in tokens):
        raise ValueError(f"a prompt holds no tokens: {shown(tokens)}")
    return np.array(tokens, np.int32)


def _form(served: Served, body: CompletionBody | ChatBody) -> Form:
    is_chat = isinstance(body, ChatBody)
    if isinstance(body, ChatBody):
        logprobs, top, param = body.logprobs, body.top_logprobs, "top_logprobs"
    else:
        logprobs, top, param = body.logprobs is not None, body.logprobs or 0, "logprobs"
    # The engine tells the token that it takes. At temperature 0 that is the most likely one.
    if top > (body.temperature == 0):
        raise ApiError(400, f"{param} must be 0, or 1 at temperature 0; got {top}", param=param)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    options = body.stream_options
    usage = options is not None and options.include_usage
    kind: Kind = "chat" if is_chat else "completion"
    return Form(kind, name, body.model, logprobs, top, usage, served.tokenizer)


def _params(body: AskBody) -> SamplingParams:
    if len(body.stops) > _MAX_STOPS:
        raise ApiError(
            400, f"stop may hold {_MAX_STOPS} texts, got {len(body.stops)}", param="stop"
        )
    asked = body.max_tokens
    if isinstance(body, ChatBody):
        asked = body.max_completion_tokens or asked
    return SamplingParams(
        max_tokens=asked,
        temperature=body.temperature,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        top_p=body.top_p,
        seed=secrets.randbits(32) if body.seed is None else body.seed % (1 << 32),
        stop=body.stops,
        stop_tokens=() if body.ignore_eos else None,
    )


class Asked:
    """The answers to a question, under way.

    Attributes:
      generations: of the answers, `n` for each prompt in its turn.
    """

    def __init__(
        self, served: Served, question: Question, mailbox: Mailbox, metrics: Metrics
    ) -> None:
        """Asks the engine for all of them, or for none.

        Raises:
          ApiError: 429, too many wait; 400 or 404, for what the engine refuses; 503, it has ended.
        """
        self._served, self._question, self._metrics = served, question, metrics
        self._told: Inbox[tuple[int, Piece | Generation]] = Inbox(mailbox)
        self._start = time.monotonic()
        self._first: dict[int, float] = {}
        self.num_tokens = 0
        self.generations: list[Generation] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.cancel)
            for index in range(question.num_answers):
                self.generations.append(self._submit(index))
            undo.pop_all()
        metrics.prompt_tokens.labels(question.form.model).inc(question.num_prompt_tokens)

    def cancel(self) -> None:
        """Ends all of them."""
        for generation in self.generations:
            generation.cancel()

    def _submit(self, index: int) -> Generation:
        engine, question = self._served.engine, self._question
        prompt, seed = question.prompts[index // question.n], question.params.seed
        params = dataclasses.replace(
            question.params,
            seed=(seed + index % question.n) % (1 << 32),
            max_tokens=self._max_tokens(engine, len(prompt)),
        )

        def tell(told: Piece | Generation) -> None:
            self._told.post((index, told))

        try:
            generation = engine.submit(prompt, params, adapter=question.adapter, on_piece=tell)
        except EngineBusyError as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded") from None
        except KeyError:  # it was unloaded since
            raise no_model(question.form.model) from None
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from None
        except RuntimeError as error:
            raise ApiError(503, str(error)) from None
        generation.on_done(tell)
        return generation

    def _max_tokens(self, engine: Engine, length: int) -> int:
        if self._question.params.max_tokens is not None:
            return self._question.params.max_tokens
        assert engine.shape.max_length is not None
        room = max(engine.shape.max_length - length, 1)
        return room if self._question.form.kind == "chat" else min(room, _COMPLETION_TOKENS)

    async def turns(self) -> AsyncIterator[dict[int, list[Piece | Answer]]]:
        """What has come since the turn before, by the answer's number, until all have ended.

        Raises:
          ApiError: 422, one can't be answered; 503, the engine was closed meanwhile.
        """
        left = len(self.generations)
        while left:
            turn: dict[int, list[Piece | Answer]] = {}
            for index, item in await self._told.take():
                if isinstance(item, Generation):
                    left -= 1
                    turn.setdefault(index, []).append(self._ended(index, item))
                else:
                    turn.setdefault(index, []).append(item)
                    self._first.setdefault(index, time.monotonic())
            yield turn

    def _ended(self, index: int, generation: Generation) -> Answer:
        model, metrics = self._question.form.model, self._metrics
        try:
            answer = generation.result()
        except RequestError as error:
            metrics.answers.labels(model, "error").inc()
            raise ApiError(422, self._served.told(error), code="request_failed") from None
        count = len(answer.tokens)
        metrics.answers.labels(model, answer.finish_reason.value).inc()
        metrics.tokens.labels(model).inc(count)
        self.num_tokens += count
        if (first := self._first.get(index)) is not None:
            metrics.first.observe(first - self._start)
            if count > 1:
                metrics.between.observe((time.monotonic() - first) / (count - 1))
        if answer.finish_reason == FinishReason.cancelled:
            raise ApiError(503, "the answer was ended: the server stops, or the client went away")
        return answer

    async def whole(self) -> object:
        """All answers, when they have ended. Raises as `turns`."""
        pieces: dict[int, list[Piece]] = {}
        reasons: dict[int, FinishReason] = {}
        async for turn in self.turns():
            for index, items in turn.items():
                for item in items:
                    if isinstance(item, Answer):
                        reasons[index] = item.finish_reason
                    else:
                        pieces.setdefault(index, []).append(item)
        question = self._question
        choices = [question.form.choice(i, pieces.get(i, []), reasons[i]) for i in sorted(reasons)]
        return question.form.whole(choices, question.num_prompt_tokens, self.num_tokens)

    async def events(self) -> AsyncIterator[bytes]:
        """Chunks as events, as they come; an error is the last event but `[DONE]`."""
        question, offsets = self._question, dict[int, int]()
        form = question.form
        try:
            async for turn in self.turns():
                yield b"".join(self._chunks(turn, offsets))
        except ApiError as error:
            self._metrics.errors.labels(str(error.status)).inc()
            yield event(error.body)
        else:
            if form.usage:
                yield form.usage_chunk(question.num_prompt_tokens, self.num_tokens)
        yield DONE

    def _chunks(
        self, turn: dict[int, list[Piece | Answer]], offsets: dict[int, int]
    ) -> list[bytes]:
        form, chunks = self._question.form, []
        for index, items in turn.items():
            pieces = [item for item in items if isinstance(item, Piece)]
            size = sum(len(piece.text) for piece in pieces)
            is_first = index not in offsets
            if size or (pieces and (form.logprobs or is_first)):
                offset = offsets.setdefault(index, 0)
                chunks.append(form.chunk(index, pieces, offset, is_first))
                offsets[index] += size
            if isinstance(last := items[-1], Answer):
                chunks.append(form.last_chunk(index, last.finish_reason))
        return chunks
