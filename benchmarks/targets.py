"""A GPU that is not there, for which XLA compiles nevertheless."""

import jax
from jax.experimental import topologies

# What XLA wants to know of an H200; the numbers are those of its own specification,
# openxla/xla xla/backends/gpu/target_config/specs/h200.txtpb.
_H200 = """
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H200"
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.19.0"
}
"""


def h200() -> jax.Device:
    """A device for shapes to be placed on; nothing can be run on it.

    Raises:
      ValueError: JAX's CUDA plugin is not installed, or does not start without a GPU.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=_H200
        )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            "to compile for a GPU that is not there, install JAX's CUDA plugin (uv pip install "
            f"'jax[cuda13]'), and set JAX_PLATFORMS=cpu; JAX says: {error}"
        ) from None
    device: jax.Device = topology.devices[0]
    return device
