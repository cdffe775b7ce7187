"""A plugin of pytest: SGLang's tests of its csgmv backend get our functions, without SGLang."""

import importlib

import sglang
import stubs  # benchmarks/peers: what SGLang's files import of SGLang and lack here

for package in ("sglang.kernels.ops", "sglang.kernels.ops.gemm"):  # theirs imports all of SGLang
    stubs.put(package, [f"{path}/{package[7:].replace('.', '/')}" for path in sglang.__path__])
stubs.put("sglang.srt.utils.common", is_pin_memory_available=lambda *_: False)
stubs.put(
    "sglang.srt.model_executor.forward_batch_deepseek_mha_mixin",
    ForwardBatchDeepSeekMHAMixin=object,
)

from interop import sglang as ours  # noqa: E402

calls: list[str] = []


def counted(op):
    def call(*args, **kwargs):
        calls.append(op.__name__)
        return op(*args, **kwargs)

    return call


for half in ("shrink", "expand"):
    module = importlib.import_module(f"sglang.kernels.ops.gemm.chunked_sgmv_{half}")
    name = f"chunked_sgmv_lora_{half}_forward"
    setattr(module, name, counted(getattr(ours, name)))
    getattr(module, f"_chunked_lora_{half}_kernel")._clear_cache = lambda: None


def pytest_sessionfinish():
    """The tests would pass without our calls too."""
    assert len(set(calls)) == 2
