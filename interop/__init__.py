"""LoRAX's ops on PyTorch tensors, computed by JAX's kernels in place. Needs `jax-lora[torch]`.

    from interop import bgmv_expand, bgmv_shrink     # instead of LoRAX's

`interop.vllm` and `interop.sglang` have those projects' functions. `to_jax` and `to_torch` exchange
arrays without a copy; `docs/torch.md` says which path does what.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("interop needs PyTorch: pip install 'jax-lora[torch]'") from error

from interop import library as _library  # noqa: F401  registers torch.ops.jax_lora
from interop import memory as _memory
from interop.dlpack import to_jax as to_jax
from interop.dlpack import to_torch as to_torch
from interop.ops import add_lora as add_lora
from interop.ops import bgmv_expand as bgmv_expand
from interop.ops import bgmv_expand_slice as bgmv_expand_slice
from interop.ops import bgmv_shrink as bgmv_shrink
from interop.ops import orient_for_rank as orient_for_rank
from interop.ops import pad_rank as pad_rank
from interop.ops import sgmv_expand as sgmv_expand
from interop.ops import sgmv_expand_slice as sgmv_expand_slice
from interop.ops import sgmv_shrink as sgmv_shrink

_memory.warn_of_preallocation()
