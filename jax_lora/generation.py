"""Text in, text out; see `jax_lora.serving.text`."""

from jax_lora.serving.chat import chat_prompt as chat_prompt
from jax_lora.serving.text import Completion as Completion
from jax_lora.serving.text import complete as complete
from jax_lora.serving.text import decode as decode
from jax_lora.serving.text import encode as encode
from jax_lora.serving.text import fitting_slots as fitting_slots
from jax_lora.serving.text import load_tokenizer as load_tokenizer
