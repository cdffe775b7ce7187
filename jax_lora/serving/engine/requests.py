"""What is asked of an engine, how it is answered, and what is known of it in between."""

import concurrent.futures
import contextlib
import dataclasses
import math
import queue
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from jax_lora.messages import shown
from jax_lora.models.config import end_tokens
from jax_lora.serving.engine.text import TextStream


class EngineBusyError(RuntimeError):
    """As many requests wait as may; try again later."""


class RequestError(RuntimeError):
    """A request could not be answered. The message says why; other requests go on."""


class FinishReason(StrEnum):
    """Why an answer ends: a stop token or text, `max_tokens`, or `cancel()`."""

    stop = "stop"
    length = "length"
    cancelled = "cancelled"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and where it ends.

    Args:
      max_tokens: tokens of the answer, at most; None for 64, or what the prompt leaves of the
        engine's `max_length` if that is less.
      temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
      top_k: draw from the `top_k` most likely tokens; None for all. Tokens as likely as the last
        of them are among them.
      top_p: of these, draw from the most likely that together have this probability.
      seed: of the draws. The same request with the same seed draws the same.
      stop: texts that end the answer, which holds what stands in front of them. Needs a tokenizer.
      stop_tokens: tokens that end the answer; None for those of the model's config, `()` for none.
      prompt_logprobs: give the log-probabilities of the prompt's tokens too.

    Raises:
      TypeError, ValueError: a value has another type, or is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("max_tokens", 1, None), ("top_k", 1, None), ("seed", 0, 1 << 32)):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {shown(value)}")
            if value < low or (high is not None and value >= high):
                bound = f"at least {low}" if high is None else f"in [{low}, {high})"
                raise ValueError(f"{name} must be {bound}, got {value}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must hold texts that are not empty, got {shown(self.stop)}")
        object.__setattr__(self, "stop", stops)
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", end_tokens(self.stop_tokens))


class Piece(NamedTuple):
    """A token of an answer as it comes.

    Attributes:
      text: what it adds to the text, which may lag behind the tokens; "" without a tokenizer.
      logprob: the logarithm of the token's probability by the model's logits as they are, before
        temperature, `top_k` and `top_p`.
    """

    token: int
    logprob: float
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """All of an answer.

    Attributes:
      tokens: the stop token included, if one ended it.
      logprobs: of each token, as in `Piece`.
      text: without stop token and stop text; "" without a tokenizer.
      prompt_logprobs: of each token of the prompt but the first; None where not asked for.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    prompt_logprobs: tuple[float, ...] | None = None


class Generation:
    """The answer to a request, as it comes. Iterating gives its `Piece`s, once.

    Example::

        for piece in engine.submit("Good morning", adapter="french"):
            print(piece.text, end="")
    """

    def __init__(
        self, cancel: Callable[[], None], on_piece: Callable[[Piece], None] | None = None
    ) -> None:
        self._cancel, self._on_piece = cancel, on_piece
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def __iter__(self) -> Iterator[Piece]:
        """Waits for each. Raises RequestError where the request fails."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever iterates once more
        if (error := self._answer.exception()) is not None:
            raise error

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the end.

        Raises:
          RequestError: the request failed.
          TimeoutError: it takes longer than `timeout` seconds.
        """
        return self._answer.result(timeout)

    def _put(self, piece: Piece) -> None:
        self._pieces.put(piece)
        if self._on_piece is not None:
            self._on_piece(piece)

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._answer.done()

    def on_done(self, callback: Callable[["Generation"], None]) -> None:
        """Has `callback(self)` called at the end, in the engine's thread: it must not wait."""
        self._answer.add_done_callback(lambda _: callback(self))

    def cancel(self) -> None:
        """Ends it early; what has come until then is the answer. No error where it has ended."""
        self._cancel()


@dataclasses.dataclass(eq=False)
class Request:
    """One request, from the queue to its end. Only the engine's loop changes it.

    Attributes:
      arrival: its number.
      max_tokens: of the answer. ends: stop tokens.
      text: None without a tokenizer.
      slot: the adapter's id, while `lease` keeps its slot.
      row: its place, while it runs. table: its blocks, of which it has the first `held`.
      read: tokens of the prompt that steps have taken. sent: tokens of the answer that steps were
        asked for.
      has_ended: nothing more is told.
    """

    arrival: int
    prompt: np.ndarray
    adapter: str | None
    params: SamplingParams
    max_tokens: int
    ends: frozenset[int]
    text: TextStream | None
    generation: Generation
    slot: int = -1
    lease: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    row: int = -1
    table: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    held: int = 0
    read: int = 0
    sent: int = 0
    has_ended: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    parts: list[str] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Positions that it takes at most: its last token is not read again."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def remaining(self) -> int:
        """Steps that it takes at most, but for the prompt's."""
        return self.max_tokens - self.sent

    def accept(self, token: int, logprob: float) -> FinishReason | None:
        """Takes the next token and tells it; says why the answer ends with it, if so."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        text, is_stopped = "", token in self.ends
        is_last = len(self.tokens) == self.max_tokens
        if self.text is not None:
            if not is_stopped:
                text, is_stopped = self.text.put(token)
            if token in self.ends or (is_last and not is_stopped):
                text += self.text.end()
        self.parts.append(text)
        self.generation._put(Piece(token, logprob, text))
        if is_stopped:
            return FinishReason.stop
        return FinishReason.length if is_last else None

    def end(self, reason: FinishReason) -> None:
        """Tells the answer."""
        answer = Answer(
            tuple(self.tokens),
            tuple(self.logprobs),
            "".join(self.parts),
            reason,
            tuple(self.prompt_logprobs) if self.params.prompt_logprobs else None,
        )
        self._leave()
        self.generation._answer.set_result(answer)
        self.generation._pieces.put(None)

    def fail(self, reason: str) -> None:
        """Tells that it has no answer."""
        self._leave()
        self.generation._answer.set_exception(RequestError(reason))
        self.generation._pieces.put(None)

    def _leave(self) -> None:
        self.has_ended = True
        self.lease.close()
