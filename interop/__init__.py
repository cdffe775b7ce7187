"""PyTorch tensors in and out of JAX through DLPack, without a copy. Needs `jax-lora[torch]`."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("interop needs PyTorch: pip install 'jax-lora[torch]'") from error

from interop.dlpack import to_jax as to_jax
from interop.dlpack import to_torch as to_torch
