"""Zero-copy exchange of arrays between PyTorch and JAX."""

import jax
import jax.dlpack
import torch
import torch.utils.dlpack


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """`tensor` as a JAX array on the same memory, ordered after torch's current stream.

    Gradients end here: a tensor that requires them is detached. What torch writes later is seen
    by JAX, which takes arrays to be constant: do not change the tensor while the array is in use.

    Args:
      tensor: dense and contiguous, on a CPU or CUDA device that JAX has.

    Raises:
      TypeError: not a tensor, or a layout or dtype that JAX lacks.
      ValueError: not contiguous, or JAX can't alias it (its address, its device). The message
        says what to do; nothing is ever copied silently.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"to_jax takes a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"to_jax takes dense tensors, got layout {tensor.layout}, dtype {tensor.dtype}; use "
            ".to_dense() or .dequantize()"
        )
    if tensor.dtype in (torch.int64, torch.float64) and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"JAX has no {tensor.dtype} unless jax_enable_x64 is set; convert the tensor to 32 bits"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"the tensor of shape {list(tensor.shape)} has strides {list(tensor.stride())}; use "
            ".contiguous()"
        )
    try:
        return jax.dlpack.from_dlpack(tensor.detach(), copy=False)
    except Exception as error:
        raise ValueError(
            f"JAX cannot alias this {tensor.dtype} tensor on {tensor.device} at address "
            f"{tensor.data_ptr():#x} ({error}); .clone() gives it memory of its own, aligned"
        ) from error


def to_torch(array: jax.Array) -> torch.Tensor:
    """`array` as a torch tensor on the same memory, ordered before torch's current stream.

    The tensor keeps the memory alive. Writing to it would change a JAX array, which is taken to be
    constant: don't, unless the array was donated or dropped.

    Raises:
      TypeError: not a concrete JAX array.
      ValueError: the array lies on several devices, or torch lacks its dtype.
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise TypeError(f"to_torch takes a concrete jax.Array, got {type(array).__name__}")
    if len(array.devices()) != 1:
        raise ValueError(f"to_torch takes an array on one device, got {array.sharding}")
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except Exception as error:
        raise ValueError(f"torch cannot take this {array.dtype} array ({error})") from error
