"""Answers in OpenAI's form, as objects and as chunks of a stream."""

import dataclasses
import functools
import json
import time
from typing import Literal

from tokenizers import Tokenizer

from jax_lora.serving.engine import FinishReason, Piece

Kind = Literal["completion", "chat"]

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """A value as one server-sent event."""
    return f"data: {_json(value)}\n\n".encode()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclasses.dataclass(frozen=True)
class Form:
    """How the answers to one request are written.

    Attributes:
      id: of the answer. model: as asked for.
      logprobs: with the log-probability of each token. top: of the most likely ones too, 0 or 1.
      usage: a stream ends with numbers of tokens.
    """

    kind: Kind
    id: str
    model: str
    logprobs: bool
    top: int
    usage: bool
    tokenizer: Tokenizer
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def chunk(self, index: int, pieces: list[Piece], offset: int, is_first: bool) -> bytes:
        """The event of what tokens add to an answer. `offset`: of their text in the answer."""
        text = "".join([piece.text for piece in pieces])
        if not (is_first or self.logprobs):
            number, before, behind = self._frame
            return f"{number}{index}{before}{_json(text)}{behind}".encode()
        role = {"role": "assistant"} if is_first else {}
        added: dict[str, object] = {"text": text}
        if self.kind == "chat":
            added = {"delta": {**role, "content": text}}
        logprobs = self._logprobs(pieces, offset)
        return self._chunk({"index": index, "finish_reason": None, **added, "logprobs": logprobs})

    @functools.cached_property
    def _frame(self) -> tuple[str, str, str]:
        """What stands before the answer's number, between it and the text, and behind the text.

        It is the same for each token. 64 streams take that many at each step of the engine.
        """
        before, behind = ('"text":', "")
        if self.kind == "chat":
            before, behind = '"delta":{"content":', "}"
        head = f'data: {_json(self._begin(True))[:-1]},"choices":[{{"index":'
        tail = f'{behind},"logprobs":null}}]{',"usage":null' if self.usage else ""}}}\n\n'
        return head, f',"finish_reason":null,{before}', tail

    def last_chunk(self, index: int, reason: FinishReason) -> bytes:
        """The event of why an answer ended."""
        text: dict[str, object] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(
            {"index": index, **text, "logprobs": None, "finish_reason": _reason(reason)}
        )

    def usage_chunk(self, prompt: int, answer: int) -> bytes:
        """The event behind all others, where it was asked for."""
        return event({**self._begin(True), "choices": [], "usage": usage(prompt, answer)})

    def choice(self, index: int, pieces: list[Piece], reason: FinishReason) -> object:
        """A whole answer."""
        text = "".join(piece.text for piece in pieces)
        content: dict[str, object] = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = self._logprobs(pieces, 0)
        end = {"logprobs": logprobs, "finish_reason": _reason(reason)}
        return {"index": index, **content, **end}

    def whole(self, choices: list[object], prompt: int, answer: int) -> object:
        """All answers to a request."""
        return {**self._begin(False), "choices": choices, "usage": usage(prompt, answer)}

    def _begin(self, is_chunk: bool) -> dict[str, object]:
        name = "text_completion"
        if self.kind == "chat":
            name = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, object]) -> bytes:
        tail: dict[str, object] = {"usage": None} if self.usage else {}
        return event({**self._begin(True), "choices": [choice], **tail})

    def _logprobs(self, pieces: list[Piece], offset: int) -> object:
        if not self.logprobs:
            return None
        names = [self.tokenizer.decode([p.token], skip_special_tokens=False) for p in pieces]
        values = [piece.logprob for piece in pieces]
        if self.kind == "chat":
            return {"content": [self._chat_token(n, v) for n, v in zip(names, values)]}
        offsets = []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        top = [{name: value} for name, value in zip(names, values)] if self.top else None
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _chat_token(self, name: str, value: float) -> object:
        token = {"token": name, "logprob": value, "bytes": list(name.encode())}
        return {**token, "top_logprobs": [token] if self.top else []}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


def _reason(reason: FinishReason) -> str:
    return "stop" if reason == FinishReason.stop else "length"
