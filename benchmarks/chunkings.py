"""How far the engine's log-probabilities are apart in steps of other sizes, and how many requests
go another way."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.agreement import bank_of
from jax_lora.demo import tasks
from jax_lora.demo.job import FOLDER
from jax_lora.generation import encode, load_tokenizer
from jax_lora.llama import Llama
from jax_lora.serving import Answer, Engine, SamplingParams, StepShape

# The first is what the others are held against: rows, chunks of prompts, lanes beside decoding
# rows, blocks and contexts differ.
SHAPES = (
    StepShape(rows=16, max_length=64, chunk=64, lanes=(0, 2), block=16, prompt_logprobs=True),
    StepShape(rows=4, max_length=64, chunk=8, lanes=(0, 1), block=8, prompt_logprobs=True),
    StepShape(
        rows=32,
        max_length=64,
        chunk=3,
        lanes=(4,),
        contexts=(16, 64),
        block=32,
        prompt_logprobs=True,
    ),
)
_READ, _ANSWER = 40, 16


@dataclasses.dataclass(frozen=True)
class Spread:
    """What steps of other sizes make of the same requests.

    Attributes:
      dtype: of weights and computation.
      forced: `[shapes, tokens]`, log-probabilities of tokens that were given.
      answers: of each shape, the greedy answers of all requests.
    """

    dtype: str
    forced: np.ndarray
    answers: list[list[tuple[int, ...]]]

    @property
    def differences(self) -> np.ndarray:
        """How far each log-probability is from that of the first shape."""
        apart: np.ndarray = np.abs(self.forced[1:] - self.forced[0])
        return apart

    @property
    def diverging(self) -> float:
        """The share of requests whose answer is another one in some shape."""
        return float(np.mean([len({*each}) > 1 for each in zip(*self.answers)]))

    @property
    def line(self) -> str:
        apart = self.differences
        return (
            f"{self.dtype:9} {self.forced.shape[1]:5} tokens in {len(self.forced)} sizes of steps: "
            f"mean {apart.mean():.1e}, at most {apart.max():.1e}; {self.diverging:.1%} of "
            f"{len(self.answers[0])} requests diverge"
        )


def run(
    dtype: str,
    progress: Callable[[str], None],
    chosen: Sequence[str] | None = None,
    rounds: int = 4,
    shapes: Sequence[StepShape] = SHAPES,
) -> Spread:
    """Requests of bundled adapters and of the base model, by an engine of each shape.

    Args:
      chosen, rounds: as in `agreement.run`.
    """
    model = Llama.from_pretrained(FOLDER / "base", dtype=jnp.dtype(dtype))
    bank, names = bank_of(model, chosen, rounds)
    words = [word for word in tasks.EVERYDAY_WORDS if tasks.is_clear(word)][: len(names)]
    prompts, lengths = encode(load_tokenizer(FOLDER / "base"), [f"{word}:" for word in words])
    asked = [row[:length] for row, length in zip(prompts, lengths)]
    rng = np.random.default_rng(0)
    read = [
        np.r_[prompt, rng.integers(0, model.config.vocab_size, _READ - len(prompt))]
        for prompt in asked
    ]
    forced, answers = [], []
    for number, shape in enumerate(shapes):
        progress(f"{dtype}: asking in steps of size {number + 1} of {len(shapes)}")
        with Engine(model, bank, shape=shape) as engine:
            greedy = SamplingParams(max_tokens=_ANSWER, stop_tokens=())
            given = SamplingParams(max_tokens=1, stop_tokens=(), prompt_logprobs=True)
            answers.append([answer.tokens for answer in _all(engine, asked, greedy, names)])
            found = _all(engine, read, given, names)
            forced.append(np.concatenate([answer.prompt_logprobs for answer in found]))
    return Spread(dtype, np.stack(forced), answers)


def _all(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    params: SamplingParams,
    names: Sequence[str | None],
) -> list[Answer]:
    asked = [engine.submit(p, params, adapter=name) for p, name in zip(prompts, names)]
    return [generation.result() for generation in asked]
