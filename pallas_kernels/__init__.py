"""Multi-LoRA kernels for JAX: SGMV for prefill, BGMV for decode, any rank, any device.

    y = pallas_kernels.add_lora(y, x, lora_a, lora_b, indices)     # y[t] += x[t] A[i]^T B[i]^T

Names, shapes and meanings follow Punica (arXiv 2310.18547) and LoRAX.
"""

from pallas_kernels.ops import LoRAGradient as LoRAGradient
from pallas_kernels.ops import add_lora as add_lora
from pallas_kernels.ops import add_lora_multi as add_lora_multi
from pallas_kernels.ops import bgmv_expand as bgmv_expand
from pallas_kernels.ops import bgmv_expand_slice as bgmv_expand_slice
from pallas_kernels.ops import bgmv_shrink as bgmv_shrink
from pallas_kernels.ops import lora_delta as lora_delta
from pallas_kernels.ops import lora_gradients as lora_gradients
from pallas_kernels.ops import sgmv_expand as sgmv_expand
from pallas_kernels.ops import sgmv_expand_slice as sgmv_expand_slice
from pallas_kernels.ops import sgmv_shrink as sgmv_shrink
from pallas_kernels.ranks import BGMV_MAX_RANK as BGMV_MAX_RANK
from pallas_kernels.ranks import DEFAULT_BUCKETS as DEFAULT_BUCKETS
from pallas_kernels.ranks import MAX_RANK_CUSTOM as MAX_RANK_CUSTOM
from pallas_kernels.ranks import MIN_RANK_CUSTOM as MIN_RANK_CUSTOM
from pallas_kernels.ranks import MIN_SGMV_RANK as MIN_SGMV_RANK
from pallas_kernels.ranks import SGMV_BLOCK_SIZE as SGMV_BLOCK_SIZE
from pallas_kernels.ranks import RankTier as RankTier
from pallas_kernels.ranks import check_buckets as check_buckets
from pallas_kernels.ranks import orient_for_rank as orient_for_rank
from pallas_kernels.ranks import pad_rank as pad_rank
from pallas_kernels.ranks import padded_rank as padded_rank
from pallas_kernels.ranks import rank_bucket as rank_bucket
from pallas_kernels.ranks import rank_tier as rank_tier
from pallas_kernels.ranks import select_kernel as select_kernel
from pallas_kernels.ranks import use_cutlass_shrink as use_cutlass_shrink
from pallas_kernels.renamed import removed_names
from pallas_kernels.routing import Mix as Mix
from pallas_kernels.routing import Segments as Segments
from pallas_kernels.routing import make_mix as make_mix
from pallas_kernels.routing import make_segments as make_segments
from pallas_kernels.routing import segments_from_lengths as segments_from_lengths
from pallas_kernels.stacks import LayerStacks as LayerStacks
from pallas_kernels.stacks import LoRAPart as LoRAPart

__getattr__ = removed_names(
    __name__,
    {"StackView": "a part takes a stack as an array, [L, R, H] or [L, N, R]"},
)
