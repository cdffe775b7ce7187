"""LoRAX's ops on CPU tensors: in place, exact to rounding, and no other byte."""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch_cases import HALVES, TOLERANCE, Case, double, products, relative_error, runs, same_bytes

import interop
from pallas_kernels import padded_rank

FLOATS = (torch.float32, *HALVES)


def valid(ids: torch.Tensor, slots: int = 5) -> torch.Tensor:
    return (ids >= 0) & (ids < slots)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize(("id_dtype", "four_dim"), [(torch.int32, False), (torch.int64, True)])
def test_shrinks_add_into_their_output(dtype, out_dtype, id_dtype, four_dim):
    t = Case(x_dtype=dtype, weight_dtype=dtype, id_dtype=id_dtype, four_dim=four_dim).tensors()
    before = torch.randn(13, 16).to(out_dtype)
    out, used = before.clone(), valid(t.ids)
    view, storage = out[2:4], out.data_ptr()
    assert interop.bgmv_shrink(t.x, t.a, out, t.ids, 0.5) is None
    want = double(before) + 0.5 * products(t.x, t.a, t.ids)
    assert relative_error(out, want) < TOLERANCE[out_dtype]
    assert same_bytes(out[~used], before[~used])
    assert out.data_ptr() == storage
    assert same_bytes(view, out[2:4])

    segments = before.clone()
    starts, lengths = runs([1] * 13)
    interop.sgmv_shrink(t.x, t.a, segments, starts, lengths, t.ids, 13, 1, 0.5)
    assert relative_error(segments, want) < TOLERANCE[out_dtype]
    assert same_bytes(segments[~used], before[~used])


@pytest.mark.ci
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize(("dtype", "weight_dtype", "y_dtype"), [
    *itertools.product([torch.float32], [torch.bfloat16], FLOATS),
    *(pytest.param(torch.float32, torch.float16, y, marks=pytest.mark.slow) for y in FLOATS),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float32),
])  # fmt: skip
def test_expands_add_or_overwrite(dtype, weight_dtype, y_dtype, add_inputs):
    t = Case(weight_dtype=weight_dtype, y_dtype=y_dtype).tensors()
    v, used = t.v.to(dtype), valid(t.ids)
    delta = products(v.to(weight_dtype), t.b, t.ids)
    want = (double(t.y) * add_inputs + delta)[used.numpy()]
    starts, lengths = runs([1] * 13)

    y = t.y.clone()
    interop.bgmv_expand(v, t.b, y, t.ids, add_inputs)
    assert relative_error(y[used], want) < TOLERANCE[y_dtype]
    assert same_bytes(y[~used], t.y[~used])
    y = t.y.clone()
    interop.sgmv_expand(v, t.b, y, starts, lengths, t.ids, 13, 1, add_inputs)
    assert relative_error(y[used], want) < TOLERANCE[y_dtype]
    assert same_bytes(y[~used], t.y[~used])

    wide = torch.randn(13, 200).to(y_dtype)
    want = (double(wide[:, 48:128]) * add_inputs + delta)[used.numpy()]
    for op in ("bgmv", "sgmv"):
        y = wide.clone()
        if op == "bgmv":
            interop.bgmv_expand_slice(v, t.b, y, t.ids, 48, 80, add_inputs)
        else:
            how = starts, lengths, t.ids, 13, 1, 48, 80, add_inputs
            interop.sgmv_expand_slice(v, t.b, y, *how)
        assert relative_error(y[used][:, 48:128], want) < TOLERANCE[y_dtype]
        assert same_bytes(y[~used], wide[~used])
        assert same_bytes(y[:, :48], wide[:, :48])
        assert same_bytes(y[:, 128:], wide[:, 128:])


def test_sgmv_adds_by_default_where_lorax_does_not():
    t = Case().tensors()
    one, other = t.y.clone(), t.y.clone()
    starts, lengths = runs([1] * 13)
    interop.sgmv_expand(t.v, t.b, one, starts, lengths, t.ids, 13, 1)
    interop.sgmv_expand(t.v, t.b, other, starts, lengths, t.ids, 13, 1, False)
    assert same_bytes(one, other)


def test_segments_cover_what_they_say():
    t = Case(num_tokens=20).tensors()
    starts, lengths = torch.tensor([12, 0, 7]), torch.tensor([8, 5, 0])
    adapters = torch.tensor([3, 2**40, 1])
    ids = torch.full((20,), -1)
    ids[12:] = 3  # the segment of an id beyond int32 has no adapter; 5 to 11 have no segment
    out = torch.randn(20, 16)
    before = out.clone()
    interop.sgmv_shrink(t.x, t.a, out, starts, lengths, adapters, 3, 8, 1.0)
    assert relative_error(out, double(before) + products(t.x, t.a, ids)) < 2e-6
    assert same_bytes(out[:12], before[:12])


def test_segments_beyond_int32_end_where_they_end():
    t = Case(num_tokens=20).tensors()
    starts = torch.tensor([2**32, -(2**32), 15])
    lengths = torch.tensor([3, 5, 2**32 + 1])
    ids = torch.full((20,), -1)
    ids[15:] = 2
    out = torch.randn(20, 16)
    before = out.clone()
    interop.sgmv_shrink(t.x, t.a, out, starts, lengths, torch.tensor([0, 1, 2]), 3, 8, 1.0)
    assert relative_error(out, double(before) + products(t.x, t.a, ids)) < 2e-6
    assert same_bytes(out[:15], before[:15])


def test_ids_outside_the_stack_have_no_adapter():
    t = Case().tensors()
    ids = torch.tensor(
        [5, -7, 2**31, 2**32, 2**32 + 1, -(2**40), 2**63 - 1, -(2**63), 4, 0, 1, 2, 3]
    )
    out = torch.randn(13, 16)
    out[0, 0], out[1, 0] = float("nan"), -0.0
    before = out.clone()
    interop.bgmv_shrink(t.x, t.a, out, ids)
    assert same_bytes(out[:8], before[:8])
    assert relative_error(out[8:], double(before[8:]) + products(t.x[8:], t.a, ids[8:])) < 2e-6


@pytest.mark.parametrize("scales", [None, 0.25, "tensor"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_add_lora(scales, phase):
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32).tensors()
    factor = np.ones(5)
    if scales == "tensor":
        scales = torch.rand(5)
        factor = double(scales)
    elif scales:
        factor *= scales
    v = products(t.x, t.a, t.ids) * factor[np.maximum(t.ids.numpy(), 0)][:, None]
    delta = products(torch.from_numpy(v), t.b, t.ids)
    y = t.y.clone()
    assert interop.add_lora(y, t.x, t.a, t.b, t.ids, scales=scales, phase=phase) is y
    assert relative_error(y, double(t.y) + delta) < 2e-6
    wide = torch.randn(13, 200)
    y = wide.clone()
    interop.add_lora(y, t.x, t.a, t.b, t.ids, scales=scales, phase=phase, y_offset=100)
    assert relative_error(y[:, 100:180], double(wide[:, 100:180]) + delta) < 2e-6
    assert same_bytes(y[:, :100], wide[:, :100])
    assert same_bytes(y[:, 180:], wide[:, 180:])


def test_outputs_and_ids_may_be_slices():
    t = Case(num_tokens=7, features=33, width=27).tensors()  # rows at odd addresses
    rows = torch.randn(9, 27).bfloat16()
    before, ids = rows.clone(), torch.cat([torch.tensor([9]), t.ids.long()])[1:]
    interop.bgmv_expand(t.v, t.b, rows[1:8], ids)
    want = double(before[1:8]) + products(t.v.bfloat16(), t.b, t.ids)
    assert relative_error(rows[1:8], want) < 4e-3
    assert same_bytes(rows[[0, 8]], before[[0, 8]])


def test_tensors_that_require_gradients_are_detached():
    t = Case(x_dtype=torch.float32, weight_dtype=torch.float32).tensors()
    x, a = t.x.requires_grad_(), torch.nn.Parameter(t.a)
    out = torch.zeros(13, 16)
    interop.bgmv_shrink(x, a, out, t.ids)
    assert not out.requires_grad
    assert relative_error(out, products(t.x, t.a, t.ids)) < 2e-6


def test_autograd_learns_that_a_saved_tensor_changed():
    t = Case(y_dtype=torch.float32).tensors()
    y = t.y.clone().requires_grad_()
    product = (y * 1.0) ** 2
    saved = product.grad_fn.next_functions[0][0]
    assert saved is not None
    z = y * 1.0
    loss = (z**2).sum()
    with torch.no_grad():
        interop.bgmv_expand(t.v, t.b, z, t.ids)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    with torch.inference_mode():
        t = Case().tensors()
        y = t.y.clone()
        interop.bgmv_expand(t.v, t.b, y, t.ids)
        assert not torch.equal(y, t.y)


def test_empty_batches_change_nothing():
    t = Case().tensors()
    none = torch.zeros(0, dtype=torch.int64)
    out = torch.zeros(0, 16)
    interop.bgmv_shrink(t.x[:0], t.a, out, t.ids[:0])
    y = t.y.clone()
    interop.sgmv_expand(t.v, t.b, y, none, none, none, 0, 0)
    assert same_bytes(y, t.y)


@pytest.mark.parametrize("config", [
    {"BLOCK_K": 128, "SPLIT_K": 1, "num_warps": 4}, {"SPLIT_K": 64}, {},
])  # fmt: skip
def test_hints_never_change_the_result(config):
    t = Case().tensors()
    plain, hinted = torch.ones(13, 16), torch.ones(13, 16)
    interop.bgmv_shrink(t.x, t.a, plain, t.ids)
    interop.bgmv_shrink(t.x, t.a, hinted, t.ids, override_config=config)
    assert same_bytes(plain, hinted)


@pytest.mark.parametrize(("config", "error", "message"), [
    ({"BLOCK_M": 4}, ValueError, r"may hint BLOCK_K, SPLIT_K, .* it has no \['BLOCK_M'\]"),
    ({"SPLIT_K": 0}, ValueError, r"override_config\['SPLIT_K'\] must be at least 1, got 0"),
    ({"SPLIT_K": 2.0}, TypeError, "must be an int, got 2.0"),
    ([1], TypeError, "must be a dict or None, got list"),
])  # fmt: skip
def test_bad_hints_are_refused(config, error, message):
    t = Case().tensors()
    with pytest.raises(error, match=message):
        interop.bgmv_shrink(t.x, t.a, torch.zeros(13, 16), t.ids, override_config=config)


BAD = {
    "no tensor": (dict(inputs=np.ones((13, 96))), TypeError, "must be a torch.Tensor, got nd"),
    "sparse": (dict(inputs=torch.eye(13, 96).to_sparse()), TypeError, r"inputs must be dense.*coo"),
    "quantised": (
        dict(inputs=torch.quantize_per_tensor(torch.ones(13, 96), 1.0, 0, torch.qint8)),
        TypeError,
        "must not be quantised, got torch.qint8",
    ),
    "float64": (dict(inputs=torch.ones(13, 96).double()), TypeError, "float16, got torch.float64"),
    "two dtypes": (dict(inputs=torch.ones(13, 96)), TypeError, "one dtype, got torch.float32 and"),
    "strides": (
        dict(inputs=torch.ones(96, 13).bfloat16().T),
        ValueError,
        r"inputs must be contiguous, got shape \[13, 96\] with strides \[1, 13\]; use .contig",
    ),
    "output strides": (
        dict(output_tensor=torch.zeros(13, 32)[:, :16]),
        ValueError,
        "output_tensor must be contiguous",
    ),
    "features": (dict(inputs=torch.ones(13, 97).bfloat16()), ValueError, "features H: 97 and 96"),
    "rank": (dict(output_tensor=torch.zeros(13, 8)), ValueError, "differ in rank R: 8 and 16"),
    "tokens": (dict(output_tensor=torch.zeros(12, 16)), ValueError, "in tokens T: 13 and 12"),
    "axes": (dict(output_tensor=torch.zeros(16)), ValueError, r"shape \[T, R\], got \[16\]"),
    "weight axes": (
        dict(lora_a_weights=torch.zeros(5, 2, 16, 96).bfloat16()),
        ValueError,
        r"must have 1 on axis 1, got \[5, 2, 16, 96\]",
    ),
    "no slots": (
        dict(lora_a_weights=torch.zeros(0, 16, 96).bfloat16()), ValueError, "must not have an empty"
    ),
    "float ids": (dict(lora_indices_tensor=torch.ones(13)), TypeError, "int64, got torch.f"),
    "short ids": (
        dict(lora_indices_tensor=torch.ones(12, dtype=torch.int32)), ValueError, r"\[13\].*\[12\]"
    ),
    "device": (
        dict(inputs=torch.ones(13, 96, device="meta").bfloat16()),
        ValueError,
        r"on one device, got \{'inputs': 'meta', 'lora_a_weights': 'cpu'",
    ),
    "scaling": (dict(scaling="1"), TypeError, "scaling must be a number, got '1'"),
    "path": (dict(path="cuda"), ValueError, "path must be None, 'dlpack' or 'native', got 'cuda'"),
    "native": (dict(path="native"), NotImplementedError, "'native' needs CUDA tensors, got cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(name):
    change, error, message = BAD[name]
    t = Case().tensors()
    out = torch.zeros(13, 16)
    good = dict(inputs=t.x, lora_a_weights=t.a, output_tensor=out, lora_indices_tensor=t.ids)
    interop.bgmv_shrink(**good)
    before = out.clone()
    with pytest.raises(error, match=message):
        interop.bgmv_shrink(**{**good, **change})
    assert same_bytes(out, before)


def test_bad_slices_and_segments_are_refused():
    t = Case().tensors()
    y = t.y.clone()
    for offset, size, error, message in [
        (1, 80, ValueError, r"columns \[1, 81\) leave output_tensor of shape \[13, 80\]"),
        (0, 79, ValueError, "slice_size and lora_b_weights differ in features N: 80 and 79"),
        (-1, 80, ValueError, "slice_offset must not be negative, got -1"),
        (0.0, 80, TypeError, "slice_offset must be an int, got 0.0"),
    ]:
        with pytest.raises(error, match=message):
            interop.bgmv_expand_slice(t.v, t.b, y, t.ids, offset, size)
    with pytest.raises(ValueError, match="features N: 80 and 79"):
        interop.bgmv_expand(t.v, t.b[:, :79].contiguous(), y, t.ids)
    starts, lengths = runs([6, 7])
    with pytest.raises(ValueError, match="batches and lora_indices_tensor differ in segments: 3"):
        interop.sgmv_expand(t.v, t.b, y, starts, lengths, t.ids[:2], 3, 7)
    with pytest.raises(ValueError, match=r"seq_len_tensor must have shape \[2\]"):
        interop.sgmv_expand(t.v, t.b, y, starts, lengths[:1], t.ids[:2], 2, 7)
    with pytest.raises(ValueError, match="phase must be 'decode' or 'prefill', got 'train'"):
        interop.add_lora(y, t.x, t.a, t.b, t.ids, phase="train")
    with pytest.raises(ValueError, match="scales and lora_a differ in adapters L: 4 and 5"):
        interop.add_lora(y, t.x, t.a, t.b, t.ids, scales=torch.ones(4))
    assert same_bytes(y, t.y)


def test_two_threads_at_once():
    cases = [Case(seed=seed).tensors() for seed in range(2)]
    wrong: list[float] = []

    def work(t) -> None:
        want = products(t.x, t.a, t.ids)
        for n in range(1, 30):
            out = torch.full((13, 16), float(n))
            interop.bgmv_shrink(t.x, t.a, out, t.ids)
            if (error := relative_error(out, want + n)) > 2e-6:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 17, 100, 129])
@pytest.mark.parametrize("world_size", [1, 2])
def test_pad_rank_and_orientation(rank, world_size):
    w = torch.randn(3, rank, 5)
    padded = interop.pad_rank(w, 1, world_size)
    size = padded_rank(rank, world_size)
    assert padded.shape == (3, size, 5)
    assert torch.equal(padded[:, :rank], w)
    assert not padded[:, rank:].any()
    assert torch.equal(interop.pad_rank(w, -2, world_size), padded)
    turned = interop.orient_for_rank(w, rank)
    assert turned.shape == ((rank, 3, 5) if 16 <= rank <= 128 else (3, rank, 5))


def test_rank_rules_refuse_what_they_cannot_take():
    with pytest.raises(TypeError, match=r"t must be a torch\.Tensor, got ndarray"):
        interop.pad_rank(np.ones((3, 4)), 1)
    with pytest.raises(ValueError, match=r"dim must name an axis of shape \[3, 4\], got 2"):
        interop.pad_rank(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        interop.orient_for_rank(torch.ones(3, 4), 0)
