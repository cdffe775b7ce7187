"""The bundled decoder of Llama and its relatives, and how to generate with it."""

from jax_lora.models.config import LlamaConfig as LlamaConfig
from jax_lora.models.llama import KVCache as KVCache
from jax_lora.models.llama import Llama as Llama
from jax_lora.models.llama import decode as decode
from jax_lora.models.llama import prefill as prefill
from jax_lora.models.rope import DynamicScaling as DynamicScaling
from jax_lora.models.rope import LinearScaling as LinearScaling
from jax_lora.models.rope import Llama3Scaling as Llama3Scaling
from jax_lora.models.rope import LongScaling as LongScaling
from jax_lora.models.rope import Rope as Rope
from jax_lora.models.rope import RopeScaling as RopeScaling
from jax_lora.models.rope import YarnScaling as YarnScaling
from jax_lora.serving.generate import generate as generate
