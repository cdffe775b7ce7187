"""The bgmv ops for engines that capture CUDA graphs: any sizes, and more tokens than one launch.

vLLM and SGLang capture their decode steps, of up to some hundred tokens. While a graph is captured
only native kernels may run, and torch's own operations.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import torch

from interop import checks, functions, ops
from pallas_kernels.mosaic_gpu.decode.config import most_unseated_tokens
from pallas_kernels.mosaic_gpu.support import missing

# Up to as many tokens calls are launches of the decode kernel, which a graph may hold. Beyond that
# a step is a prefill, which no engine captures, and DLPack's host time is short beside it.
MOST_TOKENS = 1024


def shrink(
    output: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: torch.Tensor,
    ids: torch.Tensor,
    scaling: float,
) -> None:
    """output[t] += scaling * inputs[t] @ lora_a[ids[t]].T, as `interop.bgmv_shrink`."""
    rank, features = lora_a.shape[-2:]
    by_torch = _is_captured(inputs) and missing(_dtype(lora_a), rank, features)
    for rows in _launches(inputs, rank):
        if by_torch:
            output[rows] += scaling * _products(inputs[rows], lora_a, ids[rows])
        else:
            ops.bgmv_shrink(inputs[rows], lora_a, output[rows], ids[rows], scaling)


def expand(
    output: torch.Tensor,
    inputs: torch.Tensor,
    lora_b: torch.Tensor,
    ids: torch.Tensor,
    offset: int,
    add_inputs: bool,
) -> None:
    """output[t, offset:][:N] (+)= inputs[t] @ lora_b[ids[t]].T, as `interop.bgmv_expand_slice`."""
    width, rank = lora_b.shape[-2:]
    y_dtype, y_width = _dtype(output), output.shape[1]
    by_torch = _is_captured(inputs) and missing(
        _dtype(lora_b), rank, None, width, y_dtype, y_width, offset
    )
    for rows in _launches(inputs, rank):
        if by_torch:
            columns = output[rows, offset : offset + width]
            delta = _products(inputs[rows].to(lora_b.dtype), lora_b, ids[rows])
            if add_inputs:
                columns += delta
            else:
                columns.copy_(torch.where(_has_adapter(lora_b, ids[rows]), delta, columns))
        else:
            ops.bgmv_expand_slice(
                inputs[rows], lora_b, output[rows], ids[rows], offset, width, add_inputs
            )


def linear(
    output: torch.Tensor,
    inputs: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ids: torch.Tensor,
    scaling: float,
) -> None:
    """Both halves of all slices of a projection, whose columns follow each other in `output`."""
    ranks, widths = [a.shape[-2] for a in lora_a], [b.shape[-2] for b in lora_b]
    offsets = tuple(itertools.accumulate(widths, initial=0))[:-1]
    if _is_captured(inputs) and any(
        missing(_dtype(a), rank, a.shape[-1], width, _dtype(output), output.shape[1], offset)
        for a, rank, width, offset in zip(lora_a, ranks, widths, offsets)
    ):
        for a, b, offset in zip(lora_a, lora_b, offsets):
            v = inputs.new_zeros((inputs.shape[0], a.shape[-2]), dtype=torch.float32)
            shrink(v, inputs, a, ids, scaling)
            expand(output, v, b, ids, offset, True)
        return
    op = _linear_op(len(lora_a))
    for rows in _launches(inputs, max(ranks, default=0)):
        tensors = output[rows], inputs[rows], *lora_a, *lora_b, ids[rows]
        ops.dispatch(op, tensors, scaling, None, (offsets,))


@functools.cache
def _linear_op(slices: int) -> ops.Op:
    last = 2 + 2 * slices
    rows = {0: 0, 1: 0, last: -1}
    check, function = checks.add_lora_slices, functions.add_lora_slices
    return ops.Op("add_lora_slices", check, function, last + 1, rows, True, ("offsets",))


def _launches(inputs: torch.Tensor, rank: int) -> Iterator[slice]:
    """The rows of each call."""
    tokens = inputs.shape[0]
    size = most_unseated_tokens(rank)
    if inputs.device.type != "cuda" or not size < tokens <= MOST_TOKENS:
        size = max(tokens, 1)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _dtype(tensor: torch.Tensor) -> np.dtype:
    return jnp.dtype(str(tensor.dtype).removeprefix("torch."))


def _has_adapter(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return ((ids >= 0) & (ids < weights.shape[0]))[:, None]


def _products(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """rows[t] @ weights[ids[t]].T in float32 by torch, for sizes that the kernels lack.

    It gathers weights for each row, and is no matrix product: cuBLAS could not start in a capture.
    """
    chosen = weights.reshape(weights.shape[0], *weights.shape[-2:])[
        ids.clamp(0, weights.shape[0] - 1)
    ]
    sums = (rows.float()[:, None] * chosen.float()).sum(2)
    return torch.where(_has_adapter(weights, ids), sums, 0.0)
