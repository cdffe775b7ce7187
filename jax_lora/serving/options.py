"""What XLA has to be told for a step with LoRA to run fast."""

import jax


def step_options() -> dict[str, str]:
    """For `jax.jit(step, compiler_options=step_options())`; empty where JAX runs on no GPU.

    In a CUDA graph, what does not wait for each other then runs side by side: LoRA beside the
    product that it is added to. XLA's default puts all launches of a step one behind the other.
    """
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
