"""A plugin of pytest: qwix's tests of its LoRA get our provider, with one adapter."""

from qwix._src.providers import lora

from jax_lora.integrations.qwix import MultiLoraProvider

lora.LoraProvider = MultiLoraProvider
