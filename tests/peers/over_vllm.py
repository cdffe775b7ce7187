"""A plugin of pytest: vLLM's tests of its Triton ops get ours, where vLLM is not installed."""

import pytest
import stubs  # noqa: F401  (benchmarks/peers: what vLLM's files import of vLLM and lack here)
import torch
from vllm.lora.ops import triton_ops
from vllm.lora.ops.triton_ops.fused_moe_lora_op import fused_moe_lora
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.utils import torch_utils

from interop import vllm

torch_utils.set_random_seed = torch.manual_seed
triton_ops.LoRAKernelMeta = LoRAKernelMeta
triton_ops.fused_moe_lora = fused_moe_lora  # vLLM's own: experts are not ours
calls: list[str] = []


def counted(op):
    def call(*args, **kwargs):
        calls.append(op.__name__)
        return op(*args, **kwargs)

    return call


triton_ops.lora_shrink, triton_ops.lora_expand = map(counted, (vllm.lora_shrink, vllm.lora_expand))


@pytest.fixture
def reset_default_device():
    """As in vLLM's conftest.py, which imports its engine."""
    device = torch.get_default_device()
    yield
    torch.set_default_device(device)


def pytest_sessionfinish():
    """The tests would pass without our calls too."""
    assert {"lora_shrink", "lora_expand"} <= set(calls)
