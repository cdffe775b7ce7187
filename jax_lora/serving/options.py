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
    # Two layers a turn: half as many starts of a graph. With LoRA 9.76 ms with one, 9.66 with two.
    "xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER",
}


def step_options(platform: str | None = None) -> dict[str, str | bool | int]:
    """For `jax.jit(step, compiler_options=step_options())`; empty for other platforms than GPUs.

    Without them a GPU copies the weights of each layer that a scan runs, in each step.

    Args:
      platform: for which the step is compiled, "gpu" or "cuda"; None for JAX's default.
    """
    platform = jax.default_backend() if platform is None else platform
    return dict(_OPTIONS) if platform in ("gpu", "cuda") else {}
