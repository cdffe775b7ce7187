"""The torch ops on a Hopper GPU: exact, zero-copy, in stream order, fast, captured into graphs."""

import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_kernels import add_in_place, double, shift
from torch_cases import TOLERANCE, Case, products, relative_error, runs, same_bytes
from torch_cases import double as float64

import interop
from interop import native

pytestmark = pytest.mark.gpu

HALVES = (torch.bfloat16, torch.float16)
SLEEP = 400_000_000  # cycles, about 0.2 s
# A capture that is refused leaves nothing in its graph, of which torch warns.
refused_in_capture = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")


def case(**changes):
    sizes = dict(num_tokens=20, features=512, width=320, num_adapters=6, device="cuda")
    return Case(**{**sizes, **changes}).tensors()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("id_dtype", "four_dim"), [(torch.int32, False), (torch.int64, True)])
def test_every_op(dtype, id_dtype, four_dim):
    t = case(x_dtype=dtype, weight_dtype=dtype, y_dtype=dtype, id_dtype=id_dtype,
             four_dim=four_dim)  # fmt: skip
    used = t.ids >= 0
    starts, lengths = runs([1] * 20, "cuda")
    delta_v, delta_y = products(t.x, t.a, t.ids), products(t.v.to(dtype), t.b, t.ids)
    for segmented in (False, True):
        index = (starts, lengths, t.ids, 20, 1) if segmented else (t.ids,)
        kind = "sgmv" if segmented else "bgmv"
        for out_dtype in (torch.float32, dtype):
            out = torch.randn(20, 16, device="cuda").to(out_dtype)
            before, pointer = out.clone(), out.data_ptr()
            getattr(interop, f"{kind}_shrink")(t.x, t.a, out, *index, 0.5)
            assert relative_error(out, float64(before) + 0.5 * delta_v) < max(
                TOLERANCE[out_dtype], 1e-5
            )
            assert out.data_ptr() == pointer
            assert same_bytes(out[~used], before[~used])
        for add in (True, False):
            y = t.y.clone()
            getattr(interop, f"{kind}_expand")(t.v, t.b, y, *index, add)
            want = (float64(t.y) * add + delta_y)[used.cpu().numpy()]
            assert relative_error(y[used], want) < max(TOLERANCE[dtype], 1e-5)
            assert same_bytes(y[~used], t.y[~used])
            wide = torch.randn(20, 400, device="cuda").to(dtype)
            y = wide.clone()
            getattr(interop, f"{kind}_expand_slice")(t.v, t.b, y, *index, 48, 320, add)
            want = (float64(wide[:, 48:368]) * add + delta_y)[used.cpu().numpy()]
            assert relative_error(y[used][:, 48:368], want) < max(TOLERANCE[dtype], 1e-5)
            assert same_bytes(y[~used], wide[~used])
            assert same_bytes(y[:, :48], wide[:, :48])
            assert same_bytes(y[:, 368:], wide[:, 368:])
    y = t.y.clone()
    assert interop.add_lora(y, t.x, t.a, t.b, t.ids, scales=0.5) is y
    want = float64(t.y) + products(torch.from_numpy(0.5 * delta_v), t.b, t.ids)
    assert relative_error(y, want) < max(TOLERANCE[dtype], 1e-5)


def test_nothing_is_copied(monkeypatch):
    """Weights of 512 MB, and neither allocator grows by a tenth of that."""
    a = torch.randn(64, 64, 65536, device="cuda").bfloat16()
    x = torch.randn(8, 65536, device="cuda").bfloat16()
    out, ids = torch.zeros(8, 64, device="cuda"), torch.arange(8, device="cuda")
    device = jax.local_devices(backend="cuda")[0]

    def copied(array):
        raise AssertionError("the result was not written in place")

    interop.bgmv_shrink(x, a, out, ids, path="dlpack")
    torch.cuda.synchronize()
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", copied)
    torch.cuda.reset_peak_memory_stats()
    of_torch, of_jax = torch.cuda.memory_allocated(), device.memory_stats()["bytes_in_use"]
    for _ in range(3):
        interop.bgmv_shrink(x, a, out, ids, path="dlpack")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - of_torch < 50e6
    assert device.memory_stats()["bytes_in_use"] - of_jax < 50e6
    assert device.memory_stats()["peak_bytes_in_use"] < 512e6
    assert interop.to_jax(a).unsafe_buffer_pointer() == a.data_ptr()


@pytest.mark.parametrize("side", [False, True])
def test_calls_keep_torchs_order_and_the_host_does_not_wait(side):
    t = case()
    want = products(t.x, t.a, t.ids)
    out = torch.zeros(20, 16, device="cuda")
    interop.bgmv_shrink(t.x, t.a, out, t.ids, path="dlpack")
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late_x, late_out = torch.full_like(t.x, float("nan")), torch.full_like(out, float("nan"))
        stream.synchronize()
        start = time.perf_counter()
        torch.cuda._sleep(SLEEP)
        late_x.copy_(t.x)
        late_out.zero_()
        interop.bgmv_shrink(late_x, t.a, late_out, t.ids, path="dlpack")
        copy = late_out.clone()  # after JAX
        late_x.fill_(float("nan"))  # after JAX has read it
        late_out.fill_(float("nan"))
        elapsed = time.perf_counter() - start
        done = stream.query()
    torch.cuda.synchronize()
    assert relative_error(copy, want) < 1e-5
    assert late_out.isnan().all()
    assert not done
    assert elapsed < 0.1, f"the host waited {elapsed:.3f} s"


def test_tensors_and_arrays_may_be_dropped_early():
    t = case()
    want = products(t.x, t.a, t.ids)
    out = torch.zeros(20, 16, device="cuda")
    interop.bgmv_shrink(t.x, t.a, out, t.ids, path="dlpack")
    for _ in range(20):
        out.zero_()
        x = t.x.clone()
        torch.cuda._sleep(SLEEP // 40)
        interop.bgmv_shrink(x, t.a, out, t.ids, path="dlpack")
        del x
        gc.collect()
        torch.full((20, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
        assert relative_error(out, want) < 1e-5
    array = jnp.arange(1000.0)
    view = interop.to_torch(array)
    del array
    gc.collect()
    jax.block_until_ready(jnp.full(1000, jnp.nan))
    assert float(view.sum()) == 499500
    tensor = torch.arange(1000.0, device="cuda")
    array = interop.to_jax(tensor)
    del tensor
    torch.full((1000,), float("nan"), device="cuda")
    assert float(array.sum()) == 499500


def test_kept_weights_follow_their_tensor():
    t = case()
    out = torch.zeros(20, 16, device="cuda")
    used = torch.cuda.memory_allocated()
    for scale in (1, 2):  # changed in place, and other memory under the same tensor
        a = t.a * scale
        interop.bgmv_shrink(t.x, a, out.zero_(), t.ids, path="dlpack")
        assert relative_error(out, products(t.x, a, t.ids)) < 1e-5
        a.mul_(3)
        interop.bgmv_shrink(t.x, a, out.zero_(), t.ids, path="dlpack")
        assert relative_error(out, products(t.x, a, t.ids)) < 1e-5
        a.data = t.a * 5
        interop.bgmv_shrink(t.x, a, out.zero_(), t.ids, path="dlpack")
        assert relative_error(out, products(t.x, t.a * 5, t.ids)) < 1e-5
    torch.cuda.synchronize()
    del a
    gc.collect()
    assert torch.cuda.memory_allocated() == used


def on_two_streams(work):
    """work(seed) in two threads, each on a stream of its own."""

    def run(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            work(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_two_threads_on_two_streams():
    wrong: list[float] = []

    def work(seed: int) -> None:
        t = case(seed=seed)
        want = products(t.x, t.a, t.ids)
        for n in range(100):
            out = torch.full((20, 16), float(n), device="cuda")
            interop.bgmv_shrink(t.x, t.a, out, t.ids, path="dlpack")
            if not (error := relative_error(out, want + n)) < 1e-5:
                wrong.append(error)

    on_two_streams(work)
    assert wrong == []


@pytest.mark.parametrize("path", ["native", "dlpack"])
def test_bad_cuda_tensors_are_refused_before_anything_is_written(path):
    t = case()
    out = torch.zeros(20, 16, device="cuda")
    with pytest.raises(ValueError, match=r"on one device, got \{'inputs': 'cpu', .*'cuda:0'"):
        interop.bgmv_shrink(t.x.cpu(), t.a, out, t.ids, path=path)
    memory = torch.zeros(20 * 512 + 1, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"tensor 1 starts .* multiple of 16: \.clone\(\)"):
        interop.bgmv_shrink(memory[1:].view(20, 512), t.a, out, t.ids, path=path)
    assert not out.any()
    later = torch.cat([t.ids[:1], t.ids])[1:]  # ids at an odd address are taken
    interop.bgmv_shrink(t.x, t.a, out, later, path=path)
    assert relative_error(out, products(t.x, t.a, t.ids)) < 1e-5


@refused_in_capture
def test_dlpack_refuses_to_be_captured():
    t = case()
    out = torch.zeros(20, 16, device="cuda")
    interop.bgmv_shrink(t.x, t.a, out, t.ids, path="dlpack")
    graph = torch.cuda.CUDAGraph()
    refusal = pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph")
    with torch.cuda.graph(graph), refusal:
        interop.bgmv_shrink(t.x, t.a, out, t.ids, path="dlpack")


# What torch's own compiler warns of within torch is not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torch_compile_and_gradients():
    t = case(x_dtype=torch.float32, weight_dtype=torch.float32, y_dtype=torch.float32)

    def layer(x, a, b, ids):
        y = (x * 2)[:, :320].contiguous()
        v = torch.zeros(x.shape[0], 16, device=x.device)
        interop.bgmv_shrink(x, a, v, ids)
        interop.bgmv_expand(v, b, y, ids)
        return interop.add_lora(y, x, a, b, ids, scales=0.5)

    want = layer(t.x, t.a, t.b, t.ids)
    compiled = torch.compile(layer, fullgraph=True)
    assert same_bytes(compiled(t.x, t.a, t.b, t.ids), want)

    grads = []
    for reference in (False, True):
        leaves = [w.clone().requires_grad_() for w in (t.x, t.a, t.b)]
        x, a, b = leaves
        y = torch.zeros(20, 320, device="cuda")
        if reference:
            rows = [(x[i] @ a[j].T) @ b[j].T * (j >= 0) for i, j in enumerate(t.ids.tolist())]
            y = torch.stack(rows)
        else:
            interop.add_lora(y, x, a, b, t.ids)
        (y**2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads):
        assert relative_error(mine, float64(theirs)) < 1e-5


# ------------------------------------------------------------------------------------- native path


def chain(y, x):
    """Two kernels that add to y in place, with memory between kernels and a number in memory."""
    return add_in_place(y, shift(double(x), jnp.int32(3)))


@pytest.fixture
def program():
    spec = jax.ShapeDtypeStruct((128,), jnp.float32)
    return native.compile(chain, (spec, spec), torch.device("cuda"), donate=(0,))


def vectors(seed: int):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(128, device="cuda", generator=generator) for _ in range(2)]


def test_a_program_equals_jax_to_the_bit(program):
    y, x = vectors(0)
    want = interop.to_torch(jax.jit(chain)(*(jnp.asarray(v.cpu().numpy()) for v in (y, x))))
    assert program((y, x)) is y
    assert same_bytes(y, want)
    spec = jax.ShapeDtypeStruct((128,), jnp.float32)
    fresh = native.compile(double, (spec,), torch.device("cuda"))
    assert same_bytes(fresh((x,)), x * 2)
    assert same_bytes(fresh((), (x.data_ptr(),)), x * 2)
    with pytest.raises(ValueError, match="needs a multiple of 16"):
        fresh((torch.zeros(129, device="cuda")[1:],))


def test_a_graph_replays_a_program_with_new_data(program):
    y, x = vectors(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program((y, x))
        program((y, x))
    for seed in range(3):
        new_y, new_x = vectors(seed)
        y.copy_(new_y)
        x.copy_(new_x)
        graph.replay()
        program((new_y, new_x))
        program((new_y, new_x))
        assert same_bytes(y, new_y)


def test_programs_keep_the_order_of_a_side_stream(program):
    y, x = vectors(2)
    want = y + (x * 2 + 3)
    program((y.clone(), x))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(SLEEP)
        late.copy_(x)
        program((y, late))
        late.fill_(float("nan"))
    stream.synchronize()
    torch.testing.assert_close(y, want)


def test_programs_from_two_threads_and_streams(program):
    wrong: list[int] = []

    def work(seed: int) -> None:
        y, x = vectors(seed)
        want = y + (x * 2 + 3)
        for n in range(300):
            got = y.clone()
            program((got, x))
            if not torch.allclose(got, want):
                wrong.append(n)

    on_two_streams(work)
    assert wrong == []


@refused_in_capture
def test_kernels_are_not_compiled_during_a_capture():
    spec = jax.ShapeDtypeStruct((128,), jnp.float32)
    refusal = pytest.raises(RuntimeError, match="call it once before")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refusal:
        native.compile(double, (spec,), torch.device("cuda"))


def host_us(call, aim: float) -> float:
    """What a call costs the host where nothing disturbs it: others may share the machine.

    So the best of two seconds, and of up to ten until the aim is met, as a host that is shared has
    slow phases. It goes on after the aim is met, lest the figure be where it stopped. Few calls at
    a time, since JAX lets the host wait when 32 are under way.
    """
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() < begin + (2 if best < aim else 10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        best = min(best, (time.perf_counter() - start) / 10 * 1e6)
    torch.cuda.synchronize()
    return best


def test_host_time_of_a_program(record_property):
    spec = jax.ShapeDtypeStruct((128,), jnp.float32)
    one = native.compile(add_in_place, (spec, spec), torch.device("cuda"), donate=(0,))
    y, x = vectors(3)
    took = host_us(lambda: one((y, x)), 10)
    record_property("host_us", took)
    assert took < 10, f"{took:.1f} us"


def test_host_time_through_dlpack(record_property):
    t = case(num_tokens=64, features=4096, width=4096, num_adapters=8)
    y = t.y.clone()
    interop.add_lora(y, t.x, t.a, t.b, t.ids, path="dlpack")
    took = host_us(lambda: interop.add_lora(y, t.x, t.a, t.b, t.ids, path="dlpack"), 100)
    record_property("host_us", took)
    assert took < 100, f"{took:.1f} us"


# --------------------------------------------------------------------------------- ops, natively


@dataclasses.dataclass(frozen=True)
class Native:
    """An op that is native, as `call(out, tensors, path)`, and the columns that it may change."""

    call: Callable[..., object]
    width: int = 320
    columns: slice = slice(None)


def bgmv_shrink(out, t, path):
    interop.bgmv_shrink(t.x, t.a, out, t.ids, 0.5, path=path)


def bgmv_expand(out, t, path):
    interop.bgmv_expand(t.v, t.b, out, t.ids, path=path)


def bgmv_expand_over(out, t, path):
    interop.bgmv_expand(t.v.to(t.b.dtype), t.b, out, t.ids, False, path=path)


def bgmv_expand_slice(out, t, path):
    interop.bgmv_expand_slice(t.v, t.b, out, t.ids, 48, t.b.shape[-2], path=path)


def add_lora(out, t, path):
    interop.add_lora(out, t.x, t.a, t.b, t.ids, scales=0.5, path=path)


def add_lora_slice(out, t, path):
    scales = torch.linspace(0.5, 2, t.a.shape[0], device="cuda")
    interop.add_lora(out, t.x, t.a, t.b, t.ids, scales=scales, y_offset=48, path=path)


SLICE = dict(width=400, columns=slice(48, 368))
NATIVE = [
    pytest.param(native_op, id=native_op.call.__name__)
    for native_op in (
        Native(bgmv_shrink, width=16),
        Native(bgmv_expand),
        Native(bgmv_expand_over),
        Native(bgmv_expand_slice, **SLICE),
        Native(add_lora),
        Native(add_lora_slice, **SLICE),
    )
]


def outputs(op, seed: int, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    out = torch.randn(20, op.width, device="cuda", generator=generator)
    out[:, ::7] = -0.0
    return out.to(dtype)


def odd_ids(t):
    """Ids outside of the stack among those of `t`, in place."""
    t.ids[3] = 2**40 + 1 if t.ids.dtype == torch.int64 else 6
    t.ids[4] = -7
    return t


def keeps_the_rest(op, got, before, ids) -> bool:
    named = torch.zeros_like(got, dtype=torch.bool)
    named[((ids >= 0) & (ids < 6)).nonzero().squeeze(1), op.columns] = True
    return same_bytes(got[~named], before[~named]) and not same_bytes(got[named], before[named])


@pytest.mark.parametrize("op", NATIVE)
@pytest.mark.parametrize(("id_dtype", "four_dim", "dtype", "out_dtype"), [
    (torch.int32, False, torch.bfloat16, torch.bfloat16),
    (torch.int64, True, torch.float16, torch.float32),
])  # fmt: skip
def test_native_ops_have_jaxs_bits_also_in_graphs(op, id_dtype, four_dim, dtype, out_dtype):
    kind = dict(x_dtype=dtype, weight_dtype=dtype, id_dtype=id_dtype, four_dim=four_dim)
    t = odd_ids(case(**kind))
    before = outputs(op, 0, out_dtype)
    natively, by_dlpack = before.clone(), before.clone()
    op.call(natively, t, "native")
    op.call(by_dlpack, t, "dlpack")
    assert same_bytes(natively, by_dlpack)
    assert keeps_the_rest(op, natively, before, t.ids)
    assert np.isfinite(float64(natively)).all()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.call(natively, t, None)  # native by default, or the capture would be refused
    for seed in (1, 2):
        new, before = odd_ids(case(seed=seed, **kind)), outputs(op, seed, out_dtype)
        for buffer in dataclasses.fields(t):
            getattr(t, buffer.name).copy_(getattr(new, buffer.name))
        natively.copy_(before)
        by_dlpack.copy_(before)
        graph.replay()
        op.call(by_dlpack, t, "dlpack")
        assert same_bytes(natively, by_dlpack)
        assert keeps_the_rest(op, natively, before, t.ids)


@pytest.mark.parametrize("op", NATIVE)
def test_native_ops_keep_the_order_of_a_side_stream(op):
    t = case()
    want, got = outputs(op, 0), outputs(op, 0)
    op.call(want, t, "native")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = dataclasses.replace(t, x=torch.zeros_like(t.x), v=torch.zeros_like(t.v))
        torch.cuda._sleep(SLEEP // 2)
        late.x.copy_(t.x)
        late.v.copy_(t.v)
        op.call(got, late, "native")
        late.x.fill_(float("nan"))
        late.v.fill_(float("nan"))
        assert not stream.query()
    stream.synchronize()
    assert same_bytes(got, want)


@pytest.mark.parametrize("op", NATIVE)
def test_native_ops_from_two_threads_and_streams(op):
    wrong: list[int] = []
    cases = [case(seed=seed) for seed in range(2)]
    wants = [outputs(op, seed) for seed in range(2)]
    for want, t in zip(wants, cases):
        op.call(want, t, "native")
    torch.cuda.synchronize()

    def work(seed: int) -> None:
        for n in range(50):
            got = outputs(op, seed)
            op.call(got, cases[seed], "native")
            if not same_bytes(got, wants[seed]):
                wrong.append(n)

    on_two_streams(work)
    assert wrong == []


@pytest.mark.parametrize("first", ["compiled", "launched", "captured"])
def test_a_native_op_may_be_all_that_a_thread_asks_of_cuda(first):
    t = case(num_adapters=7 if first == "compiled" else 6)  # 7 are in no other test
    want, got, graph = t.y.clone(), t.y.clone(), torch.cuda.CUDAGraph()
    if first != "compiled":
        add_lora(want, t, "native")
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.graph(graph) if first == "captured" else contextlib.nullcontext():
            add_lora(got, t, "native")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if first == "compiled":
        add_lora(want, t, "native")
    if first == "captured":
        graph.replay()
    assert same_bytes(got, want)
    assert not same_bytes(got, t.y)


@refused_in_capture
def test_what_is_not_native_says_so_and_is_not_captured():
    t = case()
    y, (starts, lengths) = t.y.clone(), runs([1] * 20, "cuda")
    how = starts, lengths, t.ids, 20, 1
    with pytest.raises(NotImplementedError, match=r"in the way: .*stablehlo\.sort"):
        interop.sgmv_expand(t.v, t.b, y, *how, path="native")
    many = case(num_tokens=300)
    with pytest.raises(NotImplementedError, match="in the way: "):
        interop.bgmv_expand(many.v, many.b, many.y, many.ids, path="native")
    interop.sgmv_expand(t.v, t.b, y, *how)
    refusal = pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refusal:
        interop.sgmv_expand(t.v, t.b, y, *how)


@pytest.mark.parametrize("op", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "add_lora"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_host_time_of_native_ops(op, id_dtype, record_property):
    t = case(num_tokens=64, features=4096, width=4096, num_adapters=8, id_dtype=id_dtype)
    wide = torch.cat([t.y, t.y], dim=1)
    calls = {
        "bgmv_shrink": lambda: interop.bgmv_shrink(t.x, t.a, t.v, t.ids, 0.5),
        "bgmv_expand": lambda: interop.bgmv_expand(t.v, t.b, t.y, t.ids),
        "bgmv_expand_slice": lambda: interop.bgmv_expand_slice(t.v, t.b, wide, t.ids, 4096, 4096),
        "add_lora": lambda: interop.add_lora(t.y, t.x, t.a, t.b, t.ids, scales=0.5),
    }
    calls[op]()
    took = host_us(calls[op], 10)
    record_property("host_us", took)
    assert took < 10, f"{took:.1f} us"
