"""Many LoRA adapters of any rank over one Flax model, in one jitted batch.

`api.py` lists the names; the first use of one imports JAX.
"""

from typing import TYPE_CHECKING

from jax_lora import process as process  # it must know of forks that come before the first use

if TYPE_CHECKING:
    from jax_lora import linen as linen
    from jax_lora.api import *  # noqa: F403
else:
    from pallas_kernels.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(__name__)
