"""SGLang's LoRA functions of its csgmv backend, with its names, arguments and batch metadata.

    from sglang.srt.lora.backend import chunked_backend
    from interop import sglang

    chunked_backend.chunked_sgmv_lora_shrink_forward = sglang.chunked_sgmv_lora_shrink_forward
    chunked_backend.chunked_sgmv_lora_expand_forward = sglang.chunked_sgmv_lora_expand_forward

Nothing here imports SGLang. An adapter of own rank r, in stacks of rank R, has its slices packed by
r: rows `[s r, (s + 1) r)` of A are its slice s, and so are these columns of what a shrink gives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from interop import capture, internals


class BatchInfo(Protocol):
    """What is read of SGLang's `LoRABatchInfo`: int32 tensors on the GPU, float32 scalings.

    Segment g is the rows permutation[seg_indptr[g]:seg_indptr[g + 1]], or, where permutation is
    None, these rows themselves. Its adapter is weight_indices[g]; one of rank 0 is the base model.
    Without `use_cuda_graph` an object is of one step, and its tensors do not change.
    """

    use_cuda_graph: bool
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
        capture.shrink(v, x, weights, _token_adapters(batch_info, x.shape[0]), 1.0)
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
    rows, (_, width, rank) = x.shape[0], weights.shape
    offsets = _on_host(slice_offsets, width, slice_offsets_cpu)
    # A slice of `[L, N, R]` is no stack in one piece. Blocks of columns are, of L adapters each.
    block = math.gcd(*offsets)
    stack, routes = weights.view(-1, block, rank), _kept(batch_info, _routes, rows, rank, offsets)
    v = x[:, None]
    if routes.columns is not None:
        v = torch.gather(v.expand(-1, width // block, -1), 2, routes.columns)
    v = (v * routes.scales).masked_fill_(routes.beyond, 0)
    if rows <= capture.MOST_TOKENS:  # each block of a row as a row of its own
        flat = y.view(-1, block), v.view(-1, rank), routes.ids.view(-1)
        for out, inputs, ids in zip(*(t.split(capture.MOST_TOKENS) for t in flat)):
            capture.expand(out, inputs, stack, ids, 0, True)
    else:
        for n in range(width // block):
            capture.expand(
                y, v[:, n].contiguous(), stack, routes.ids[:, n].contiguous(), n * block, True
            )
    return y


class _Routes(NamedTuple):
    """How x reaches K blocks of y.

    Attributes:
      ids: `[T, K]`, of a stack of L K blocks.
      columns: `[T, K, R]`, of x; None where one block takes all.
      beyond: `[T, 1, R]`, whether these are beyond the adapter's own rank.
      scales: `[T, 1, 1]` float32.
    """

    ids: torch.Tensor
    columns: torch.Tensor | None
    beyond: torch.Tensor
    scales: torch.Tensor


def _routes(batch_info: BatchInfo, rows: int, rank: int, offsets: Sequence[int]) -> _Routes:
    block, slices = math.gcd(*offsets), len(offsets) - 1
    ids = _token_adapters(batch_info, rows)[:, None, None]
    numbers = torch.arange(offsets[-1] // block, dtype=ids.dtype, device=ids.device)[:, None]
    slice_of = torch.zeros_like(numbers)
    for edge in offsets[1:-1]:
        slice_of += numbers >= edge // block
    adapter, column = ids.clamp(min=0), torch.arange(rank, device=ids.device)
    own_rank = batch_info.lora_ranks[adapter].clamp(max=rank)
    columns = (slice_of * own_rank + column).clamp(max=slices * rank - 1).long()
    return _Routes(
        ids=torch.where(ids >= 0, ids * len(numbers) + numbers, -1)[..., 0].contiguous(),
        columns=columns if slices > 1 else None,
        beyond=column >= own_rank,
        scales=batch_info.scalings[adapter],
    )


def _token_adapters(batch_info: BatchInfo, rows: int) -> torch.Tensor:
    """`token_adapters`, once in a step for all layers."""
    return _kept(batch_info, token_adapters, rows)


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


# What was made in a step, by the tensor of its segments, with the number of its capture.
_steps = WeakTensorKeyDictionary()


def _kept[T](batch_info: BatchInfo, make: Callable[..., T], *args: object) -> T:
    """`make(batch_info, *args)`, once in a step for all layers.

    A captured graph makes its own, and anew in each replay. Where nothing is captured and a batch's
    tensors may change, each call does.
    """
    step, captured = batch_info.seg_indptr, 0
    if capturing := step.is_cuda and torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(step.device).cuda_stream
        captured = internals.capture_id(stream)
    if not captured and (capturing or batch_info.use_cuda_graph):
        return make(batch_info, *args)
    of, made = _steps.get(step, (None, {}))
    if of != captured:
        made = {}
        _steps[step] = captured, made
    key = make, *args
    if key not in made:
        made[key] = make(batch_info, *args)
    kept: T = made[key]
    return kept


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
