"""Two allocators on one GPU: torch's takes what it needs, JAX's most of the card at its start."""

import importlib.util
import os
import warnings

import jax
import torch

from interop.internals import CUDA_PLUGINS

_SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def warn_of_preallocation() -> None:
    """Warns where JAX would take three quarters of the GPU that torch uses, and nobody chose so."""
    platforms = jax.config.jax_platforms
    jax_takes_gpus = not platforms or {"cuda", "gpu"} & set(platforms.split(","))
    if any(name in os.environ for name in _SETTINGS) or not jax_takes_gpus:
        return
    if not torch.cuda.is_available() or not _has_cuda_plugin():
        return
    warnings.warn(
        "JAX will take 75 % of the GPU's memory when it is first used, and torch shares that GPU. "
        "Set XLA_PYTHON_CLIENT_PREALLOCATE=false (grow as needed) or "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=.10 (take a part) before Python starts, or "
        "XLA_PYTHON_CLIENT_PREALLOCATE=true to keep this and silence the warning.",
        stacklevel=3,
    )


def _has_cuda_plugin() -> bool:
    try:
        return any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)
    except ModuleNotFoundError:  # no plugins at all
        return False
