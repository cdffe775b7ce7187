"""Continuous batching: requests join and leave at any step, each with its own adapter."""

from jax_lora.serving.engine.adapters import AdapterLimits as AdapterLimits
from jax_lora.serving.engine.engine import Engine as Engine
from jax_lora.serving.engine.requests import Answer as Answer
from jax_lora.serving.engine.requests import EngineBusyError as EngineBusyError
from jax_lora.serving.engine.requests import FinishReason as FinishReason
from jax_lora.serving.engine.requests import Generation as Generation
from jax_lora.serving.engine.requests import Piece as Piece
from jax_lora.serving.engine.requests import RequestError as RequestError
from jax_lora.serving.engine.requests import SamplingParams as SamplingParams
from jax_lora.serving.engine.shape import StepShape as StepShape
