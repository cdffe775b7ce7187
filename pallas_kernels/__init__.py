"""Multi-LoRA kernels for JAX: SGMV for prefill, BGMV for decode, any rank, any device.

    y = pallas_kernels.add_lora(y, x, lora_a, lora_b, indices)     # y[t] += x[t] A[i]^T B[i]^T

Names, shapes and meanings follow Punica (arXiv 2310.18547) and LoRAX. `api.py` lists the names; the
first use of one imports JAX.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.api import *  # noqa: F403
else:
    from pallas_kernels.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__, {"StackView": "a part takes a stack as an array, [L, R, H] or [L, N, R]"}
    )
