"""A request's text as it comes, token by token, up to a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Tokens of a prompt that the first new ones are decoded with: a character has fewer.
_TAIL = 16
# What tokenizers write for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes tokens one by one; what it gives adds up to what `decode` makes of all of them.

    A character whose bytes are spread over several tokens comes with the last of them. What may be
    the beginning of a stop string is kept back until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-_TAIL:])  # since some point at which all text was complete
        self._read = len(self._ids)  # of these, those whose text is known
        self._known: str = tokenizer.decode(self._ids)
        self._kept = ""

    def put(self, token: int) -> tuple[str, bool]:
        """The text that a token adds, and whether a stop string ended it."""
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids)
        return ("", False) if text.endswith(_INCOMPLETE) else self._emit(text)

    def end(self) -> str:
        """The text that was kept back."""
        text, is_stopped = self._emit(self._tokenizer.decode(self._ids))
        return text if is_stopped else text + self._kept

    def _emit(self, text: str) -> tuple[str, bool]:
        new = text[_shared(self._known, text) :]
        if new and self._known:
            # The next is decoded behind these alone. Behind none, a tokenizer may drop its space.
            self._ids = self._ids[self._read :]
            self._read, self._known = len(self._ids), self._tokenizer.decode(self._ids)
        else:
            self._read, self._known = len(self._ids), text
        text = self._kept + new
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._kept = ""
            return text[: min(ends)], True
        size = max((_beginning(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - size :]
        return text[: len(text) - size], False


def _beginning(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def _shared(a: str, b: str) -> int:
    """With how many equal characters both begin."""
    differs = (i for i, (before, after) in enumerate(zip(a, b)) if before != after)
    return next(differs, min(len(a), len(b)))
