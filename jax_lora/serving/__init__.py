"""From prompts to completions: a batch of rows, or an engine for requests that come and go."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_lora.serving.engine import AdapterLimits as AdapterLimits
    from jax_lora.serving.engine import Answer as Answer
    from jax_lora.serving.engine import Engine as Engine
    from jax_lora.serving.engine import EngineBusyError as EngineBusyError
    from jax_lora.serving.engine import FinishReason as FinishReason
    from jax_lora.serving.engine import Generation as Generation
    from jax_lora.serving.engine import Piece as Piece
    from jax_lora.serving.engine import RequestError as RequestError
    from jax_lora.serving.engine import SamplingParams as SamplingParams
    from jax_lora.serving.engine import StepShape as StepShape

__all__ = [
    "AdapterLimits",
    "Answer",
    "Engine",
    "EngineBusyError",
    "FinishReason",
    "Generation",
    "Piece",
    "RequestError",
    "SamplingParams",
    "StepShape",
]


def __getattr__(name: str) -> object:
    # Not at the import of jax_lora, which needs neither tokenizers nor models.
    if name in __all__:
        from jax_lora.serving import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
