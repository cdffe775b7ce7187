"""The DLPack exchange, on the CPU: pointers prove that nothing is copied."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import interop

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_and_its_array_share_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(64).reshape(4, 16).to(dtype)
    array = interop.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    np.testing.assert_array_equal(np.asarray(array).astype(np.float64), tensor.double().numpy())
    back = interop.to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype


def test_an_array_outlives_its_tensor_and_a_tensor_its_array() -> None:
    tensor = torch.full((1000,), 3.0)
    array = interop.to_jax(tensor)
    del tensor
    assert float(array.sum()) == 3000
    array = jnp.full(1000, 2.0)
    tensor = interop.to_torch(array)
    del array
    assert float(tensor.sum()) == 2000


def test_gradients_are_detached() -> None:
    tensor = torch.ones(16, requires_grad=True)
    assert interop.to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (np.ones(3), TypeError, "takes a torch.Tensor, got ndarray"),
        (torch.ones(4, 6).T, ValueError, r"strides \[1, 6\]; use .contiguous"),
        (torch.eye(3).to_sparse(), TypeError, "takes dense tensors, got layout torch.sparse_coo"),
        (torch.ones(3, dtype=torch.int64), TypeError, "no torch.int64 unless jax_enable_x64"),
        (torch.ones(3, dtype=torch.complex128), TypeError, "no torch.complex128 unless jax_enab"),
        (torch.arange(3).to(torch.uint64), TypeError, "no torch.uint64 unless jax_enable_x64"),
        (torch._neg_view(torch.ones(16)), ValueError, r"negated values; use \.resolve_neg"),
        (torch.ones(65)[1:], ValueError, r"cannot alias .*; \.clone"),
    ],
)
def test_what_cannot_be_aliased_says_what_to_do(
    tensor: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        interop.to_jax(tensor)  # type: ignore[arg-type]


def test_to_torch_takes_concrete_arrays_alone() -> None:
    with pytest.raises(TypeError, match=r"takes a concrete jax\.Array, got Tensor"):
        interop.to_torch(torch.ones(3))  # type: ignore[arg-type]


def test_without_torch_the_import_gives_one_sentence() -> None:
    code = "import sys; sys.modules['torch'] = None; import interop"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: interop needs PyTorch: pip install 'jax-lora[torch]'" in result.stderr
