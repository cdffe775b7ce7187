"""What a call by DLPack aliases on a GPU, and for how long, with a CPU in the GPU's place."""

import gc
import types

import jax
import pytest
import torch
from torch_cases import Case, products, relative_error

import interop
from interop import dlpack, internals, ops


@pytest.fixture
def aliased(monkeypatch):
    """The addresses that were aliased, in order, where a CPU passes for a GPU."""
    cpu, alias, found = jax.devices("cpu")[0], internals.alias, []

    def on_cpu(tensor, device, stream, copy):
        found.append(tensor.data_ptr())
        return alias(tensor, device, None, None)

    ready = types.SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(dlpack, "on_jax", lambda device: (cpu, ready))
    monkeypatch.setattr(dlpack, "_wait_for_torch", lambda ready, device: 0)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(internals, "alias", on_cpu)
    monkeypatch.setattr(internals, "wait", lambda array, stream: array.block_until_ready())
    # Ways that a CPU's tensors went are not a GPU's, nor the reverse.
    monkeypatch.setattr(ops, "_routes", {})
    monkeypatch.setattr(ops, "_last", {})
    return found


def shrinks(t) -> bool:
    out = torch.ones(13, 16)
    version = out._version
    interop.bgmv_shrink(t.x, t.a, out, t.ids)
    return relative_error(out, 1 + products(t.x, t.a, t.ids)) < 1e-5 and out._version > version


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_inputs_are_aliased_once(aliased, id_dtype):
    t, kept = Case(id_dtype=id_dtype).tensors(), len(dlpack._kept)
    assert shrinks(t)
    assert aliased[:3] == [t.x.data_ptr(), t.a.data_ptr(), t.ids.data_ptr()]
    assert shrinks(t)
    assert len(aliased) == 5  # and an output each time
    t.a.data = t.a * 2  # other memory
    assert shrinks(t)
    assert aliased[5] == t.a.data_ptr()
    t.x.data, t.a.data = t.x[:, :64].contiguous(), t.a[..., :64].contiguous()
    t.ids.data = t.ids.to(torch.int64)
    assert shrinks(t)
    assert len(dlpack._kept) == kept + 3
    del t
    gc.collect()
    assert len(dlpack._kept) == kept


def test_slices_of_integers_are_copied_and_of_floats_refused(aliased):
    t, kept = Case(num_tokens=14).tensors(), len(dlpack._kept)
    before, out = torch.ones(13, 16), torch.ones(13, 16)
    interop.bgmv_shrink(t.x[:13], t.a, before, t.ids[1:].clone())
    ids = t.ids[1:]
    interop.bgmv_shrink(t.x[:13], t.a, out, ids)
    assert torch.equal(out, before)
    assert ids.data_ptr() not in aliased
    odd = torch.cat([torch.zeros(1), t.x.flatten()]).bfloat16()[1:].view(14, 96)
    with pytest.raises(ValueError, match=f"tensor 1 starts at address {odd.data_ptr():#x}; GPU"):
        interop.bgmv_shrink(odd[:13], t.a, out, ids)
    odd = torch.ones(13 * 16 + 1)[1:].view(13, 16)
    with pytest.raises(ValueError, match=f"tensor 0 starts at address {odd.data_ptr():#x}; GPU"):
        interop.bgmv_shrink(t.x[:13], t.a, odd, ids)
    assert torch.equal(out, before)
    assert (odd == 1).all()
    assert len(dlpack._kept) == kept + 1  # of t.a; a slice is a new object each time
