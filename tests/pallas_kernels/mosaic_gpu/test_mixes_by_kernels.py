"""Several adapters per token by the Mosaic kernels: emulated, interpreted, and lowered for CUDA."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_cases import GradientCase, by_name, tolerance
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_cases import bits, local_ids, relative_error, y_tolerance

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import Config, backend

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
BUCKETS = GradientCase(21, 128, (72, 64), ((8, 3), (16, 2)), "shuffled")


@pytest.fixture
def emulated() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def ids_and_weights(case: GradientCase, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of each bucket, of none, and of no slot; NaN where there is no adapter."""
    rng = np.random.default_rng(columns)
    ids = rng.integers(-1, case.slots + 1, (case.num_tokens, columns)).astype(np.int32)
    ids[::5] = -1
    used = (ids >= 0) & (ids < case.slots)
    return ids, np.where(used, rng.normal(size=ids.shape), np.nan).astype(np.float32)


def wanted(y: np.ndarray, z: Any, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = y.astype(np.float64)
    for part in z.parts:
        a, b = np.asarray(part.lora_a), np.asarray(part.lora_b)
        local = np.stack([local_ids(column, part) for column in ids.T], axis=1)
        columns = slice(part.y_offset, part.y_offset + b.shape[1])
        out[:, columns] = reference.mix(
            out[:, columns], z.x, a, b, local, weights, np.asarray(part.scales)
        )
    return out


def check(case: GradientCase, columns: int, config: Config | None, *, sorted_once: bool) -> None:
    z = case.arrays()
    ids, weights = ids_and_weights(case, columns)
    mix = pk.make_mix(ids, jnp.asarray(weights), case.slots)
    if not sorted_once:
        mix = pk.Mix(tuple(jnp.asarray(ids.T)), jnp.asarray(weights))
    y = np.asarray(z.dy)
    ys = tuple(map(jnp.asarray, np.split(y, np.cumsum(case.widths)[:-1], axis=1)))
    call = Call("add_lora", "mosaic_gpu", (), widths=case.widths, dtype=jnp.float32, config=config)
    x, parts = jax.tree.map(jnp.asarray, (z.x, z.parts))
    out, delta = jax.jit(
        lambda ys, *z: (backend.add_lora(call, ys, *z), backend.lora_delta(call, *z))
    )(ys, x, parts, mix)
    got = np.concatenate([np.asarray(y) for y in out], axis=1)
    want = wanted(y, z, ids, weights)
    assert relative_error(got, want) < y_tolerance("bfloat16")
    added = np.concatenate([np.asarray(y) for y in delta], axis=1)
    assert relative_error(added, want - y.astype(np.float64)) < y_tolerance("bfloat16")
    none = ~((ids >= 0) & (ids < case.slots)).any(axis=1)
    assert none.any()
    np.testing.assert_array_equal(bits(got[none]), bits(y[none]))
    assert np.signbit(added[none]).all() and not added[none].any()


@pytest.mark.parametrize("sorted_once", [False, True])
@pytest.mark.parametrize("columns", [2, pytest.param(4, marks=pytest.mark.ci)])
def test_one_launch_for_few_tokens(columns: int, sorted_once: bool, emulated: None) -> None:
    check(BUCKETS, columns, DECODE, sorted_once=sorted_once)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GradientCase(9, 64, (64,), ((16, 3),), "shuffled"), marks=pytest.mark.ci),
        pytest.param(GradientCase(80, 128, (64, 72), ((8, 2), (16, 2))), marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_two_launches_for_many_tokens(case: GradientCase, interpreted: None) -> None:
    check(case, 2, None, sorted_once=True)


def in_columns(case: GradientCase, z: Any, ids: np.ndarray, weights: np.ndarray) -> dict:
    """Every gradient in float64, by name; those in weights are `dw`."""
    x, dy = z.x.astype(np.float64), z.dy.astype(np.float64)
    found: dict[str, Any] = {"dx": np.zeros_like(x), "dw": np.zeros(ids.shape)}
    for n, part in enumerate(z.parts):
        given = part.lora_a, part.lora_b, part.scales
        a, b, scales = (np.asarray(t).astype(np.float64) for t in given)
        da, db, ds = np.zeros_like(a), np.zeros_like(b), np.zeros_like(scales)
        for t, k in np.ndindex(*ids.shape):
            i = ids[t, k] - part.first_slot
            if not 0 <= i < len(a):
                continue
            dys, w = dy[t, part.y_offset :][: b.shape[1]], float(weights[t, k])
            u, dv = a[i] @ x[t], dys @ b[i]
            found["dx"][t] += w * scales[i] * (dv @ a[i])
            da[i] += w * scales[i] * np.outer(dv, x[t])
            db[i] += w * scales[i] * np.outer(dys, u)
            ds[i] += w * (u @ dv)
            found["dw"][t, k] += scales[i] * (u @ dv)
        found |= {f"dA{n}": da, f"dB{n}": db, f"ds{n}": ds}
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GradientCase(9, 64, (64,), ((8, 3),), "gaps"), marks=pytest.mark.ci),
        pytest.param(GradientCase(70, 128, (64, 72), ((8, 2), (16, 2))), marks=pytest.mark.ci),
        pytest.param(GradientCase(130, 64, (64,), ((16, 1),)), marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_gradients_against_float64(case: GradientCase, interpreted: None) -> None:
    z = case.arrays()
    ids, weights = ids_and_weights(case, 2)
    if case.slots == 1:  # tiles of 64 tokens that follow each other, also beyond the first column
        ids[:], weights = 0, np.nan_to_num(weights, nan=0.5)
    call = Call("add_lora", "mosaic_gpu", ("sgmv",) * len(z.parts))
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    mix = pk.make_mix(ids, jnp.asarray(weights), case.slots)
    dx, dparts, dw = jax.jit(lambda *a: backend.add_lora_grad(call, *a))(dy, x, parts, mix)
    got = by_name(dx, dparts) | {"dw": np.asarray(dw)}
    for name, want in in_columns(case, z, ids, weights).items():
        limit = tolerance("ds0" if name == "dw" else name, case.dtype)
        error = relative_error(got[name], want)
        # dx is rounded for each of the token's adapters.
        assert error < (2 * limit if name == "dx" else limit), (name, error)
        assert not got[name][want == 0].any(), name


@pytest.mark.ci
@pytest.mark.parametrize(("num_tokens", "columns"), [(1, 2), (64, 2), (64, 4), (4096, 2)])
def test_every_size_lowers(num_tokens: int, columns: int) -> None:
    """Forward and backward have no more launches than those of plain ids."""
    of = jax.ShapeDtypeStruct
    a, b = of((8, 16, 1024), jnp.bfloat16), of((8, 512, 16), jnp.bfloat16)
    x, y = of((num_tokens, 1024), jnp.bfloat16), of((num_tokens, 512), jnp.bfloat16)
    ids, weights = of((num_tokens, columns), jnp.int32), of((num_tokens, columns), jnp.float32)

    def names_in(f: Any) -> set[str]:
        text = jax.jit(f).trace(y, x, a, b, weights, ids)
        return {*re.findall(r"lora_?\w*_r\d+", text.lower(lowering_platforms=("cuda",)).as_text())}

    def forward(y: Any, x: Any, a: Any, b: Any, weights: Any, ids: Any) -> Any:
        mix = pk.make_mix(ids, weights, 8)
        return pk.add_lora(y, x, a, b, mix, implementation="mosaic_gpu")

    def backward(y: Any, *operands: Any) -> Any:
        *floats, ids = operands
        return jax.vjp(lambda *floats: forward(y, *floats, ids), *floats)[1](y)

    few = num_tokens * columns <= 1024
    assert names_in(forward) == (
        {"lora_r16"} if few else {"lora_shrink_r16_r16", "lora_expand_r16_r16"}
    )
    assert names_in(backward) == {"lora_narrow_r16", "lora_wide_r16", "lora_outer_r16"}
