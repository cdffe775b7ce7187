"""SGLang's LoRA functions of its csgmv backend, with its names, arguments and batch metadata.

    from sglang.srt.lora.backend import chunked_backend
    from interop import sglang

    chunked_backend.chunked_sgmv_lora_shrink_forward = sglang.chunked_sgmv_lora_shrink_forward
    chunked_backend.chunked_sgmv_lora_expand_forward = sglang.chunked_sgmv_lora_expand_forward

Nothing here imports SGLang. An adapter of own rank r, in stacks of rank R, has its slices packed by
r: rows `[s r, (s + 1) r)` of A are its slice s, and so are these columns of what a shrink gives.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from interop import capture


class BatchInfo(Protocol):
    """What is read of SGLang's `LoRABatchInfo`: int32 tensors on the GPU.

    Segment g is the rows permutation[seg_indptr[g]:seg_indptr[g + 1]], or, where permutation is
    None, these rows themselves. Its adapter is weight_indices[g]; one of rank 0 is the base model.
    """

    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    permutation: torch.Tensor | None


def chunked_sgmv_lora_shrink_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    batch_info: BatchInfo,
    num_slices: int = 1,
    split_k: int | None = None,
) -> torch.Tensor:
    """v[t] = x[t] @ weights[i].T, i the adapter of row t; `[T, S R]` in x's dtype, sums in float32.

    Columns beyond an adapter's own S r hold what its rows of weights hold; rows of the base model
    are zeros.

    Args:
      x: `[T, H]`.
      weights: `[L, S R, H]`.
      batch_info: see `BatchInfo`. A captured graph reads its tensors anew in each replay.
      num_slices: S.
      split_k: how Triton's kernel splits H; not read.

    Raises: as `interop.bgmv_shrink`.

    Source: SGLang, python/sglang/kernels/ops/lora/dense/chunked_sgmv_shrink.py.
    """
    v = x.new_zeros(x.shape[0], weights.shape[1])
    if weights.numel():
        capture.shrink(v, x, weights, token_adapters(batch_info, x.shape[0]), 1.0)
    return v


def chunked_sgmv_lora_expand_forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    batch_info: BatchInfo,
    slice_offsets: torch.Tensor,
    max_slice_size: int,
    base_output: torch.Tensor | None,
    slice_offsets_cpu: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t, columns of s] += scaling * x[t, s r : (s + 1) r] @ weights[i, columns of s, :r].T.

    i is row t's adapter, r its own rank and scaling its scale. Rows of the base model keep every
    byte. Scaled x is rounded to the weights' dtype once.

    Args:
      x: `[T, S R]`, what the shrink gave.
      weights: `[L, N, R]`. What lies beyond an adapter's own rank is multiplied by zero: it must be
        finite.
      slice_offsets: `[S + 1]` int32, the columns of slice s are [s] to [s + 1].
      max_slice_size: the widest slice, which sizes Triton's grid; not read.
      base_output: y, changed in place; None for zeros `[T, N]`.
      slice_offsets_cpu: the same on the CPU. Without it the first call with several slices waits
        for the GPU, and must come before a capture.

    Returns:
      y.

    Raises: as `interop.bgmv_expand_slice`; RuntimeError where a graph is captured and the offsets
    were never read.

    Source: SGLang, python/sglang/kernels/ops/lora/dense/chunked_sgmv_expand.py.
    """
    y = x.new_zeros(x.shape[0], weights.shape[1]) if base_output is None else base_output
    if not weights.numel():
        return y
    if not y.is_contiguous():  # columns of a wider tensor
        y.copy_(
            chunked_sgmv_lora_expand_forward(
                x, weights, batch_info, slice_offsets, max_slice_size, y.contiguous(),
                slice_offsets_cpu,
            )
        )  # fmt: skip
        return y
    offsets = _on_host(slice_offsets, weights.shape[1], slice_offsets_cpu)
    ids = token_adapters(batch_info, x.shape[0])
    v = _unpacked(x, weights.shape[2], ids, batch_info)
    # A slice of `[L, N, R]` is no stack in one piece. Blocks of columns are, of L adapters each.
    block = math.gcd(*offsets)
    blocks = weights.shape[1] // block
    stack = weights.reshape(-1, block, weights.shape[2])
    numbers = torch.arange(blocks, dtype=torch.int32, device=x.device)[:, None]
    block_ids = torch.where(ids >= 0, ids * blocks + numbers, -1)
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        for n in range(start // block, stop // block):
            capture.expand(y, v[s], stack, block_ids[n], n * block, True)
    return y


def token_adapters(batch_info: BatchInfo, rows: int) -> torch.Tensor:
    """The adapter of each row, int32, -1 for the base model and for rows in no segment.

    It waits for nothing and may be captured.
    """
    ends = batch_info.seg_indptr[1:]
    position = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    segment = torch.searchsorted(ends, position, right=True).clamp(max=len(ends) - 1)
    adapter = batch_info.weight_indices[segment]
    has_one = (position < ends[-1]) & (batch_info.lora_ranks[adapter] > 0)
    ids = torch.where(has_one, adapter, -1)
    if batch_info.permutation is None:
        return ids
    # Behind the last segment a permutation holds what it held before: such rows go nowhere.
    row = torch.where(position < ends[-1], batch_info.permutation[:rows], rows).long()
    return ids.new_full((rows + 1,), -1).scatter_(0, row, ids)[:rows]


def _unpacked(x: torch.Tensor, rank: int, ids: torch.Tensor, batch_info: BatchInfo) -> torch.Tensor:
    """x of each slice, scaled, zero beyond an adapter's own rank: float32 `[S, T, R]`."""
    slices = x.shape[1] // rank
    adapter = ids.clamp(min=0)
    own = batch_info.lora_ranks[adapter][:, None].clamp(max=rank)
    column = torch.arange(rank, device=x.device)
    first = own[None] * torch.arange(slices, device=x.device)[:, None, None]
    where = (first + column).clamp(max=x.shape[1] - 1)
    v = torch.gather(x.float().expand(slices, -1, -1), 2, where)
    scaled = v * batch_info.scalings[adapter][:, None]
    return torch.where(column < own, scaled, 0.0)


# By tensor: layers keep theirs, and never change them.
_offsets = WeakTensorKeyDictionary()


def _on_host(offsets: torch.Tensor, width: int, on_cpu: torch.Tensor | None) -> Sequence[int]:
    """The offsets of slices as numbers, which one slice of all columns has without asking."""
    if on_cpu is not None:
        return tuple(on_cpu.tolist())
    if len(offsets) == 2:
        return 0, width
    if offsets not in _offsets:
        if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the {len(offsets)} slice_offsets are new and cannot be read while a CUDA graph "
                "is captured: pass slice_offsets_cpu, or call the function once before"
            )
        _offsets[offsets] = tuple(offsets.tolist())
    found: tuple[int, ...] = _offsets[offsets]
    return found
