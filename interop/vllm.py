"""vLLM's LoRA ops, with its names and arguments, and both halves of a projection in one launch.

    from interop.vllm import lora_expand, lora_shrink    # instead of vllm.lora.ops.triton_ops

Nothing here imports vLLM; `interop.vllm_punica` does.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from interop import capture

# What `LoRAKernelMeta.meta_args` gives: the adapter of each token, and what follows from it for
# Triton's grids. The kernels here read the first alone; a flag on the host says that none is used.
Meta = torch.Tensor


def lora_shrink(
    inputs: torch.Tensor,
    lora_a_weights: Sequence[torch.Tensor],
    output_tensor: torch.Tensor,
    token_lora_mapping: Meta,
    token_indices_sorted_by_lora_ids: Meta,
    num_tokens_per_lora: Meta,
    lora_token_start_loc: Meta,
    lora_ids: Meta,
    no_lora_flag_cpu: Meta,
    num_active_loras: Meta,
    scaling: float,
) -> None:
    """`output_tensor[s, t] = scaling * inputs[t] @ lora_a_weights[s][i].T`, i token t's adapter.

    In place. Rows of -1 become zeros; nothing changes where `no_lora_flag_cpu` holds True.

    Args:
      inputs: `[T, H]`, as the weights.
      lora_a_weights: for each of S slices `[L, R, H]` or `[L, 1, R, H]`.
      output_tensor: `[S, T, R]`.
      token_lora_mapping: `[T]` int32 or int64, the adapter of each token.
      no_lora_flag_cpu: `[1]` bool on the CPU. A captured graph keeps the value of its capture.
      scaling: a number.

    The other arguments size Triton's grids and are not read.

    Raises: as `interop.bgmv_shrink`; ValueError where slices and weights differ in number.

    Source: vLLM, vllm/lora/ops/triton_ops/lora_shrink_op.py.
    """
    _need_slices("output_tensor", output_tensor, lora_a_weights)
    shrink(output_tensor, inputs, lora_a_weights, token_lora_mapping, no_lora_flag_cpu, scaling)


def lora_expand(
    inputs: torch.Tensor,
    lora_b_weights: Sequence[torch.Tensor],
    output_tensor: torch.Tensor,
    token_lora_mapping: Meta,
    token_indices_sorted_by_lora_ids: Meta,
    num_tokens_per_lora: Meta,
    lora_token_start_loc: Meta,
    lora_ids: Meta,
    no_lora_flag_cpu: Meta,
    num_active_loras: Meta,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """`output_tensor[t, columns of s] (+)= inputs[s, t] @ lora_b_weights[s][i].T`, i t's adapter.

    In place. The columns of the slices follow each other from `offset_start` on. Rows of -1 and
    other columns keep every byte.

    Args:
      inputs: `[S, T, R]`.
      lora_b_weights: for each of S slices `[L, N, R]` or `[L, 1, N, R]`; N may differ.
      output_tensor: `[T, columns]`.
      add_inputs: False overwrites rows that have an adapter.
      The others: as in `lora_shrink`.

    Raises: as `interop.bgmv_expand_slice`; ValueError where slices and weights differ in number.

    Source: vLLM, vllm/lora/ops/triton_ops/lora_expand_op.py.
    """
    _need_slices("inputs", inputs, lora_b_weights)
    how = no_lora_flag_cpu, offset_start, add_inputs
    expand(output_tensor, inputs, lora_b_weights, token_lora_mapping, *how)


def _need_slices(name: str, tensor: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    if tensor.ndim != 3 or tensor.shape[0] != len(weights):
        raise ValueError(
            f"{name} must have shape [S, T, R] with a slice for each of {len(weights)} weights, "
            f"got {list(tensor.shape)}"
        )


def _op(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function with torch.compile, which then does not look at the flag.

    Without it calls go to the function itself: dispatching costs the host more than the rest.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = f"vllm_{function.__name__}"
        custom = torch.library.custom_op(
            f"jax_lora::{name}", function, mutates_args=("output",), schema=schema
        )
        custom.register_fake(lambda *_: None)

        @functools.wraps(function)
        def call(*args: object) -> None:
            if torch.compiler.is_compiling():
                getattr(torch.ops.jax_lora, name)(*args)
            else:
                function(*args)

        return call

    return register


@_op("(Tensor(a!) output, Tensor x, Tensor[] a, Tensor ids, Tensor no_lora, float scaling) -> ()")
def shrink(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ids: torch.Tensor,
    no_lora: torch.Tensor,
    scaling: float,
) -> None:
    """`lora_shrink` of what it reads."""
    if no_lora.item():
        return
    output.zero_()
    for slice_, weights in zip(output, lora_a):
        capture.shrink(slice_, x.contiguous(), weights, ids, scaling)


@_op(
    "(Tensor(a!) output, Tensor v, Tensor[] b, Tensor ids, Tensor no_lora, SymInt offset, "
    "bool add_inputs) -> ()"
)
def expand(
    output: torch.Tensor,
    v: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ids: torch.Tensor,
    no_lora: torch.Tensor,
    offset: int,
    add_inputs: bool,
) -> None:
    """`lora_expand` of what it reads."""
    if no_lora.item():
        return
    for slice_, weights in zip(v, lora_b):
        capture.expand(output, slice_, weights, ids, offset, add_inputs)
        offset += weights.shape[-2]


@_op(
    "(Tensor(a!) output, Tensor x, Tensor[] a, Tensor[] b, Tensor ids, Tensor no_lora, "
    "float scaling) -> ()"
)
def add_lora_linear(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ids: torch.Tensor,
    no_lora: torch.Tensor,
    scaling: float,
) -> None:
    """`lora_shrink` and `lora_expand` of all slices: one launch up to 256 tokens, and no buffer.

    `output[t, columns of s] += scaling * (x[t] @ lora_a[s][i].T) @ lora_b[s][i].T`, in place, where
    i is `ids[t]`. The columns of the slices follow each other from 0 on.
    """
    if len(lora_a) != len(lora_b):
        raise ValueError(f"lora_a and lora_b differ in slices: {len(lora_a)} and {len(lora_b)}")
    if no_lora.item():
        return
    capture.linear(output, x.contiguous(), lora_a, lora_b, ids, scaling)
