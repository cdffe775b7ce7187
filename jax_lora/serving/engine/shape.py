"""The static sizes of an engine's steps, each of which is a compiled program."""

import dataclasses
from typing import Self

from jax_lora.messages import shown
from jax_lora.models.config import LlamaConfig
from jax_lora.models.pages import blocks_of

_MAX_LENGTH = 2048
# From so many positions on there are steps for a quarter of them too.
_LONG = 1024


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of an engine's steps. A step is compiled for each of `lanes` and each of `contexts`.

    A step takes `rows + lanes * chunk` tokens: one of each request that decodes, and up to `chunk`
    tokens of a prompt in each lane. A prompt may have several lanes. A step has the fewest lanes
    and the smallest context that its requests need.

    Args:
      rows: requests that run at a time.
      max_length: tokens of a prompt and its answer; None for what the model takes, at most 2048.
      chunk: tokens of a lane. A request's prompt is always cut at its multiples.
      lanes: numbers of lanes.
      contexts: positions that a step's requests may have; the last must be `max_length`. None for
        `max_length`, and beyond 1024 a quarter of it too.
      block: tokens of a block of the key-value cache.
      blocks: how many there are; None for as many as `rows` requests of `max_length` take. A
        request takes one when its tokens need it. Where there are fewer, a request that runs may
        skip steps until another one has ended.
      prompt_logprobs: compute those of prompts' tokens, which takes logits for all of them.

    Raises:
      TypeError, ValueError: a number is malformed, or does not fit the others.
    """

    rows: int = 64
    max_length: int | None = None
    chunk: int = 64
    lanes: tuple[int, ...] = (0, 2, 8)
    contexts: tuple[int, ...] | None = None
    block: int = 32
    blocks: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "max_length", "chunk", "block", "blocks"):
            value = getattr(self, name)
            if value is not None or name in ("rows", "chunk", "block"):
                _check(name, value, 1)
        for name, least in (("lanes", 0), ("contexts", 1)):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list | tuple) or not values:
                raise TypeError(f"{name} must be a tuple of integers, got {shown(values)}")
            for value in values:
                _check(name, value, least)
            object.__setattr__(self, name, tuple(sorted({*values})))
        if self.lanes[-1] < 1:
            raise ValueError(f"lanes must have a number above 0, for prompts; got {self.lanes}")

    def resolved(self, config: LlamaConfig) -> Self:
        """With all numbers, for a model of this config.

        Raises:
          ValueError: they do not fit the model or each other.
        """
        most = config.max_position_embeddings
        length = self.max_length or min(most or _MAX_LENGTH, _MAX_LENGTH)
        if most is not None and length > most:
            raise ValueError(
                f"max_length={length} exceeds the model's {most} positions "
                "(max_position_embeddings)"
            )
        contexts = self.contexts
        if contexts is None:
            contexts = (-(-length // 4), length) if length > _LONG else (length,)
        if contexts[-1] != length:
            raise ValueError(f"the last of contexts={contexts} must be max_length={length}")
        of_one = blocks_of(length, self.block)
        blocks = self.blocks or self.rows * of_one
        if blocks < of_one:
            raise ValueError(
                f"blocks={blocks} of {self.block} tokens hold no request of max_length={length}"
            )
        return dataclasses.replace(self, max_length=length, contexts=contexts, blocks=blocks)

    @property
    def forms(self) -> list[tuple[int, int]]:
        """`(lanes, blocks of a table)` of each compiled step, the largest first."""
        tables = {blocks_of(context, self.block) for context in self.contexts or ()}
        return sorted(((n, blocks) for n in self.lanes for blocks in tables), reverse=True)

    def form(self, lanes: int, positions: int) -> tuple[int, int]:
        """The form of a step with so many lanes, whose requests have so many positions."""
        context = next(size for size in self.contexts or () if size >= positions)
        return next(n for n in self.lanes if n >= lanes), blocks_of(context, self.block)


def _check(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
