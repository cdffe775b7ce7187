"""Answers in OpenAI's form, as objects and as chunks of a stream."""

import dataclasses
import time
from typing import Literal

from tokenizers import Tokenizer

from jax_lora.serving.engine import FinishReason, Piece

Kind = Literal["completion", "chat"]


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

    def chunk(self, index: int, pieces: list[Piece], offset: int, is_first: bool) -> object:
        """What tokens add to an answer. `offset`: of their text in the answer."""
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, object] = {"index": index, "finish_reason": None}
        if self.kind == "chat":
            choice["delta"] = {**({"role": "assistant"} if is_first else {}), "content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(pieces, offset)
        return self._chunk([choice])

    def last_chunk(self, index: int, reason: FinishReason) -> object:
        """Why an answer ended."""
        text: dict[str, object] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        choice = {"index": index, **text, "logprobs": None, "finish_reason": _reason(reason)}
        return self._chunk([choice])

    def usage_chunk(self, prompt: int, answer: int) -> object:
        """Behind all others, where it was asked for."""
        return {**self._begin(True), "choices": [], "usage": usage(prompt, answer)}

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

    def _chunk(self, choices: list[dict[str, object]]) -> object:
        tail: dict[str, object] = {"usage": None} if self.usage else {}
        return {**self._begin(True), "choices": choices, **tail}

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
