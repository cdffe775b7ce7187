"""What XLA has to be told for a step with LoRA to run fast."""

import jax

_OPTIONS: dict[str, str | bool | int] = {
    # In a CUDA graph, what does not wait for each other runs side by side: LoRA beside the product
    # that it is added to. XLA's default puts all launches of a step one behind the other.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    # In a loop over layers cuBLAS reads a layer's weights where they stand. For Triton's products
    # XLA copies them in each turn. H200, decode step of Llama-3-8B's shape, 64 rows with 1024
    # cached tokens: 19.5 ms with Triton, 9.1 with cuBLAS. Layers one by one: 8.3 and 8.5.
    "xla_gpu_enable_triton_gemm": False,
    # Else XLA puts the weights of products of the same x side by side, which copies them too: 9.1
    # ms with, 8.75 without.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # One CUDA graph for the whole step: the loop over layers, all of its turns, and the choice of
    # the plain model. Else the host starts each turn, and waits for the GPU to choose. 8 adapters
    # of rank 16: 9.5 ms with a graph for each two turns, 9.17 so; layers one by one 9.09.
    "xla_gpu_command_buffer_unroll_loops": True,
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
}


def step_options(platform: str | None = None) -> dict[str, str | bool | int]:
    """For `jax.jit(step, compiler_options=step_options())`; empty for other platforms than GPUs.

    Without them a GPU copies the weights of each layer that a scan runs, in each step.

    Args:
      platform: for which the step is compiled, "gpu" or "cuda"; None for JAX's default.
    """
    platform = jax.default_backend() if platform is None else platform
    return dict(_OPTIONS) if platform in ("gpu", "cuda") else {}
