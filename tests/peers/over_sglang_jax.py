"""A plugin of pytest: sglang-jax's tests of its backend get ours."""

from sgl_jax.srt.lora.backend import bgmv_backend

from jax_lora.integrations.sglang_jax import KernelLoRABackend

bgmv_backend.BgmvLoRABackend = KernelLoRABackend
