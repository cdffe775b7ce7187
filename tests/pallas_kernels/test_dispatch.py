"""Which implementation runs where, seen in jaxprs and in modules lowered for CUDA without a GPU."""

import dataclasses
import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_lora
import pallas_kernels as pk
from pallas_kernels import dispatch

T, H, N, L = 8, 64, 128, 3
SHAPES = {"y": (T, N), "x": (T, H), "a": (L, 16, H), "b": (L, N, 16)}


def arrays(dtype: Any = jnp.bfloat16) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def for_cuda(fn: Any, *args: Any) -> str:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(module: str) -> set[str]:
    return set(re.findall(r"lora(?:_decode)?(?:_shrink|_expand)?(?:_r\d+)+", module))


def add_lora(implementation: str | None = None, **options: Any) -> Any:
    ids = np.array([0, -1, 2, 1, 0, 7, 2, 2])
    return lambda y, x, a, b: pk.add_lora(y, x, a, b, ids, implementation=implementation, **options)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_the_kernels_run_on_cuda_and_nothing_multiplies_beside_them(
    phase: str, implementation: str | None
) -> None:
    module = for_cuda(add_lora(implementation, phase=phase), *arrays().values())
    assert kernels(module) == {"lora_r16"}
    assert "dot_general" not in module


@pytest.mark.parametrize("implementation", [None, "xla", "loop"])
def test_xla_runs_on_the_cpu(implementation: str | None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA runs as one dense product")
        module = jax.jit(add_lora(implementation)).lower(*arrays().values()).as_text()
    assert kernels(module) == set()
    assert "dot_general" in module


@pytest.mark.parametrize(
    ("tokens", "rank", "phase", "kernel"),
    [
        (1, 8, "decode", True), (1, 48, "decode", True), (1, 64, "decode", False),
        (2, 64, "decode", True), (2, 128, "decode", False), (3, 128, "decode", True),
        (1, 256, "decode", True), (1, 16, "prefill", True),
    ],
)  # fmt: skip
def test_a_token_or_two_of_high_ranks_run_as_xla_unless_told_otherwise(
    tokens: int, rank: int, phase: str, kernel: bool
) -> None:
    x, y = jnp.ones((tokens, 128), jnp.bfloat16), jnp.ones((tokens, 64), jnp.bfloat16)
    a, b = jnp.ones((2, rank, 128), x.dtype), jnp.ones((2, 64, rank), x.dtype)
    ids = jnp.zeros(tokens, jnp.int32)

    def one(*args: Any, **how: Any) -> Any:
        return pk.add_lora(*args, phase=phase, **how)

    def multi(y: Any, x: Any, a: Any, b: Any, ids: Any, **how: Any) -> Any:
        return pk.add_lora_multi(y, x, [pk.LoRAPart(a, b)], ids, phase=phase, **how)

    for op in (one, multi):
        module = for_cuda(op, y, x, a, b, ids)
        assert bool(kernels(module)) == kernel
        assert "applies stablehlo.or" not in module  # whether any row is used: a host would wait
        named = functools.partial(op, implementation="mosaic_gpu")
        assert kernels(for_cuda(named, y, x, a, b, ids))


STAYS: dict[str, Any] = {
    "parts": lambda y, x, part, ids: pk.add_lora_multi(
        jnp.tile(y, 2), x, [part, dataclasses.replace(part, y_offset=64)], ids
    ),
    "ys": lambda y, x, part, ids: pk.add_lora_multi((y, y), x, [part], ids),
    "8 bits": lambda y, x, part, ids: pk.add_lora_multi(
        y, x, [pk.LoRAPart(*pk.quantised(part.lora_a, part.lora_b))], ids
    ),
    "transposed": lambda y, x, part, ids: pk.add_lora_multi(
        y, x, [part.with_layout(transposed=True)], ids
    ),
    "mix": lambda y, x, part, ids: pk.add_lora(
        y, x, part.lora_a, part.lora_b, ids[:, None], weights=jnp.ones((1, 1))
    ),
    "delta": lambda y, x, part, ids: pk.lora_delta(x, [part], ids, 64),
}


@pytest.mark.parametrize("op", STAYS.values(), ids=STAYS)
def test_a_token_of_a_high_rank_stays_with_the_kernel(op: Any) -> None:
    """Where XLA would launch more than a shrink, an expand and a sum, or beside a product."""
    y, x, ids = jnp.ones((1, 64), "bfloat16"), jnp.ones((1, 128), "bfloat16"), jnp.zeros(1, int)
    part = pk.LoRAPart(np.ones((2, 64, 128), "bfloat16"), np.ones((2, 64, 64), "bfloat16"))
    module = for_cuda(lambda y, x, ids: op(y, x, part, ids), y, x, ids)
    assert kernels(module) and "dot_general" not in module


def test_the_gradients_of_a_token_of_a_high_rank_run_as_kernels() -> None:
    def gradients(x: Any, a: Any, b: Any) -> Any:
        call = functools.partial(pk.add_lora, jnp.ones((1, 64), x.dtype), indices=np.zeros(1, int))
        return jax.vjp(call, x, a, b)[1](jnp.ones((1, 64), x.dtype))

    shapes = (1, 128), (2, 64, 128), (2, 64, 64)
    module = for_cuda(gradients, *(jnp.ones(shape, jnp.bfloat16) for shape in shapes))
    assert "add_lora_grad_mosaic_gpu" in module
    assert "dot_general" not in module


def test_none_falls_back_to_xla_where_the_kernels_lack_something() -> None:
    module = for_cuda(add_lora(), *arrays(jnp.float32).values())
    assert kernels(module) == set()
    assert "dot_general" in module


@pytest.mark.parametrize(
    ("dtype", "features", "width", "rank", "lacks"),
    [
        (jnp.float32, 64, 64, 16, "lacks float32 weights"),
        (jnp.bfloat16, 100, 64, 16, "lacks H=100"),
        (jnp.bfloat16, 64, 60, 16, "lacks N=60"),
        (jnp.bfloat16, 64, 64, 24, "lacks rank 24"),
    ],
)
def test_the_named_kernels_say_what_they_lack(
    dtype: Any, features: int, width: int, rank: int, lacks: str
) -> None:
    y, x = jnp.zeros((4, width), dtype), jnp.zeros((4, features), dtype)
    a, b = jnp.zeros((2, rank, features), dtype), jnp.zeros((2, width, rank), dtype)
    ids = np.array([0, 1, -1, 1])
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' {lacks}"):
        pk.add_lora(y, x, a, b, ids, implementation="mosaic_gpu")
    assert pk.add_lora(y, x, a, b, ids).shape == (4, width)


def test_a_slice_that_tma_cannot_address_runs_as_xla() -> None:
    args = jnp.zeros((T, 16), jnp.float32), arrays()["b"], np.zeros(T, np.int32)
    y = jnp.zeros((T, 2 * N), jnp.bfloat16)
    for y_offset, expected in ((16, {"lora_decode_expand_r16"}), (3, set())):

        def expand(y: Any, offset: int = y_offset) -> Any:
            return pk.bgmv_expand_slice(*args, y, offset, N)

        assert kernels(for_cuda(expand, y)) == expected
    with pytest.raises(NotImplementedError, match=r"'mosaic_gpu' lacks y_offset=3"):
        pk.bgmv_expand_slice(*args, y, 3, N, implementation="mosaic_gpu")


def test_a_gpu_that_is_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: "8.0")
    dispatch.warn_other_gpu.cache_clear()
    with pytest.warns(UserWarning, match=r"compute capability 8\.0"):
        module = for_cuda(add_lora(), *arrays().values())
    assert kernels(module) == set()
    for_cuda(add_lora(), *arrays().values())  # warns once: warnings are errors here
    with pytest.raises(NotImplementedError, match=r"needs compute capability 9\.0 .* has 8\.0"):
        add_lora("mosaic_gpu")(*arrays().values())


@pytest.mark.parametrize(("tokens", "buckets"), [(T, (16, 64)), (1, (64,))])
def test_a_layer_runs_the_kernel_of_each_bucket(tokens: int, buckets: tuple[int, ...]) -> None:
    model = nnx.Linear(H, N, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jax_lora.apply_lora(model, slots=2, buckets=buckets)
    bank = jax_lora.AdapterBank(model)
    batch = bank.batch([None] * tokens)
    graphdef, state = nnx.split(model)

    def step(state: Any, x: Any, batch: Any) -> Any:
        return nnx.merge(graphdef, state)(x, batch)

    module = for_cuda(step, state, jnp.zeros((tokens, H), jnp.bfloat16), batch)
    assert all(f"r{bucket}" in "".join(kernels(module)) for bucket in buckets)
    assert module.count("dot_general") == 1  # the base layer's own


def test_mosaic_gradients_are_the_xla_path_s() -> None:
    def loss(implementation: str) -> Any:
        return lambda *args: jnp.sum(add_lora(implementation)(*args).astype(jnp.float32))

    args = arrays().values()
    backward = {
        name: jax.make_jaxpr(jax.grad(loss(name), argnums=(0, 1, 2, 3)))(*args).out_avals
        for name in ("xla", "mosaic_gpu")
    }
    assert backward["xla"] == backward["mosaic_gpu"]


def test_config_is_for_the_named_kernels_alone() -> None:
    from pallas_kernels.mosaic_gpu import Config

    with pytest.raises(ValueError, match="config needs implementation='mosaic_gpu'"):
        add_lora("xla", config=Config())(*arrays().values())
    with pytest.raises(TypeError, match=r"config must be a mosaic_gpu\.Config, got 3"):
        add_lora("mosaic_gpu", config=3)(*arrays().values())
    module = for_cuda(add_lora("mosaic_gpu", config=Config(split=1)), *arrays().values())
    assert kernels(module) == {"lora_shrink_r16", "lora_expand_r16"}


@pytest.mark.parametrize("jitted", [False, True])
def test_the_kernels_say_that_they_need_a_gpu(jitted: bool) -> None:
    """Where they are lowered for a CPU, not where they are traced."""
    z, ids = arrays(), jnp.zeros(T, jnp.int32)
    rest = z["x"], z["a"], z["b"]
    calls: list[Any] = [
        lambda: pk.bgmv_shrink(z["x"], z["a"], ids, implementation="mosaic_gpu"),
        lambda: pk.bgmv_expand(z["x"][:, :16], z["b"], ids, implementation="mosaic_gpu"),
        lambda: add_lora("mosaic_gpu")(*z.values()),
        lambda: jax.vmap(add_lora("mosaic_gpu"), (0, None, None, None))(z["y"][None], *rest),
    ]
    for call in calls:
        jax.make_jaxpr(call)()
        with pytest.raises(NotImplementedError, match="'mosaic_gpu' needs a Hopper GPU, or plgpu"):
            (jax.jit(call) if jitted else call)()


def lacks(message: str, call: Any, *args: Any) -> None:
    """A named mosaic_gpu refuses, and XLA takes the case on CUDA too."""
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' lacks {message}"):
        call("mosaic_gpu", *args)
    module = for_cuda(functools.partial(call, None), *args)
    assert kernels(module) == set()
    assert "dot_general" in module


@pytest.mark.parametrize("tokens", [8, 300, pytest.param(2000, marks=pytest.mark.ci)])
def test_a_and_b_of_different_dtypes(tokens: int) -> None:
    def call(implementation: Any, y: Any, x: Any, a: Any, b: Any, ids: Any) -> Any:
        return pk.add_lora(y, x, a, b, ids, implementation=implementation)

    z = {k: jnp.resize(v, (tokens, v.shape[1])) if k in "xy" else v for k, v in arrays().items()}
    args = *z.values(), jnp.zeros(tokens, jnp.int32)
    lacks("float16 lora_a beside bfloat16", call, *args[:2], z["a"].astype("float16"), *args[3:])


def test_parts_that_overlap_between_the_kernels_columns() -> None:
    def call(implementation: Any, y: Any, x: Any, a: Any, b: Any, ids: Any) -> Any:
        parts = [pk.LoRAPart(a, b, y_offset=start) for start in (0, 4)]
        return pk.add_lora_multi(y, x, parts, ids, implementation=implementation)

    z = arrays()
    y = jnp.zeros((T, N + 8), jnp.float32)  # 4 of its columns are the 16 bytes that TMA wants
    args = y, z["x"], z["a"], z["b"], jnp.zeros(T, jnp.int32)
    lacks(r"columns \[0, 4\) between edges of overlapping parts, 4 more than a multi", call, *args)


@pytest.mark.parametrize("tokens", [8, 300, pytest.param(2000, marks=pytest.mark.ci)])
def test_the_kernels_lower_with_64_bits_enabled(tokens: int) -> None:
    with jax.enable_x64(True):
        z = arrays()
        y, x = (jnp.resize(z[k], (tokens, z[k].shape[1])) for k in "yx")
        ids = jnp.zeros(tokens, jnp.int64)
        for dtype in ("bfloat16", "float32"):
            module = for_cuda(pk.add_lora, y, x.astype(dtype), z["a"], z["b"], ids)
            assert len(kernels(module)) == (1 if tokens < 2000 and dtype == "bfloat16" else 2)
