"""A punica wrapper for vLLM: its LoRA layers call these kernels. Needs vLLM.

vLLM takes the wrapper that its platform names. A plugin names this one, in each worker:

    from vllm.platforms import current_platform
    type(current_platform).get_punica_wrapper = lambda: "interop.vllm_punica.PunicaWrapper"

`docs/torch.md` says how such a plugin is installed.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from interop import vllm


class PunicaWrapper(PunicaWrapperBase):  # type: ignore[misc]
    """What vLLM's PunicaWrapperGPU does, except for LoRA of experts, which raises.

    The adapters of a step's tokens are a tensor at a fixed address, which captured graphs read.
    Its preparation sorts nothing and does not wait for the GPU.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **kwargs: object,
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._no_lora, self._no_lora_in_prompts = torch.tensor([False]), torch.tensor([False])

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: object,
    ) -> None:
        """Sets the adapters of the next step: ids of 0 in a mapping are the base model."""
        self.is_prefill = mapping.is_prefill
        for ids in (self._token_lora_indices, self._sampler_indices):
            ids.fill_(-1)  # a graph's batch may be longer than the step's
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._no_lora[0] = not any(mapping.index_mapping)
        self._no_lora_in_prompts[0] = not any(mapping.prompt_mapping)

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: object,
    ) -> None:
        """y[s] = scale * x @ A of slice s and the token's adapter."""
        x = x.view(-1, x.shape[-1])
        vllm.shrink(y, x, lora_a_stacked, self._tokens(x), self._no_lora, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: object,
    ) -> None:
        """y[:, columns of s] (+)= x[s] @ B of slice s and the token's adapter."""
        y = y.view(-1, y.shape[-1])
        how = self._tokens(y), self._no_lora, offset_start, add_inputs
        vllm.expand(y, x, lora_b_stacked, *how)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: object,
    ) -> None:
        """Both halves of all slices; one launch for a decode step."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if add_inputs:
            ids = self._tokens(x)
            vllm.add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, ids, self._no_lora, scale)
            return
        shape = len(output_slices), x.shape[0], lora_b_stacked[0].shape[-1]
        v = torch.empty(shape, dtype=torch.float32, device=x.device)
        self.add_shrink(v, x, lora_a_stacked, scale)
        self.add_expand(y, v, lora_b_stacked, output_slices, add_inputs=False)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: object,
    ) -> None:
        """y (+)= x @ B of the token's adapter; vLLM looked x up in A."""
        self.add_expand(y, x[None], (lora_b_stacked,), (), add_inputs=add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: object,
    ) -> None:
        """Both halves for the rows that are sampled from."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        stacks = (lora_a_stacked,), (lora_b_stacked,)
        ids = self._sampler_indices[: x.shape[0]]
        vllm.add_lora_linear(y, x, *stacks, ids, self._no_lora_in_prompts, scale)

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """y = x @ W + bias of the row's adapter, where that has one."""
        shape = 1, x.shape[0], weight_stacked.shape[-2]
        out = torch.zeros(shape, dtype=torch.float32, device=x.device)
        ids = self._sampler_indices[: x.shape[0]]
        vllm.shrink(out, x, (weight_stacked,), ids, self._no_lora_in_prompts, 1.0)
        y.copy_(self._select_full_linear_output(y, out[0], bias_stacked, module_enabled))

    def _tokens(self, rows: torch.Tensor) -> torch.Tensor:
        return self._token_lora_indices[: rows.shape[0]]
