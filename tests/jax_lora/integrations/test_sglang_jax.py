"""sglang-jax's backend interface. `tests/peers` runs its own tests, where most of what adapters add
vanishes in bfloat16's rounding."""

import importlib
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_equal, mesh_of

L, R, H, N = 3, 8, 16, (24, 8, 8)
INTERFACE = "sgl_jax.srt.lora.backend.bgmv_backend"


@pytest.fixture(scope="module")
def backend():
    """The backend, over a stand-in for the class that it extends."""
    with pytest.MonkeyPatch.context() as patch:
        parts = INTERFACE.split(".")
        for n in range(len(parts)):
            name = ".".join(parts[: n + 1])
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[INTERFACE], "BgmvLoRABackend", object, raising=False)
        name = "jax_lora.integrations.sglang_jax"
        yield importlib.import_module(name).KernelLoRABackend()
        del sys.modules[name]


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def tokens(count):
    """x, ids and scalings; the last tokens are padding, as sglang-jax makes it."""
    ids = np.random.default_rng(count).integers(0, L, count).astype(np.int32)
    scalings = np.abs(draw(count)) + 0.5
    ids[-2:], scalings[-2:] = 0, 0
    return draw(count, H), ids, scalings


def products(x, stack, ids):
    return np.stack([stack[i] @ row for row, i in zip(x, ids)])


MESHES = {"one": (), "columns": (P(), P(None, "tensor")), "rows": (P(None, "tensor"), P())}


@pytest.mark.parametrize(
    "mesh, count, jitted",
    [
        pytest.param("one", 8, False, marks=pytest.mark.ci),
        pytest.param("one", 300, True, marks=pytest.mark.ci),
        ("columns", 300, True),
        ("rows", 8, True),
    ],
)
def test_the_two_halves(backend, mesh, count, jitted):
    """On a mesh, operands are divided as sglang-jax divides them."""
    x, ids, scalings = tokens(count)
    a, b, y = draw(L, R, H), draw(L, N[0], R), draw(count, N[0])
    v = products(x, a, ids) * scalings[:, None]
    want = v, y + products(v, b, ids)
    devices = mesh_of(data=2, tensor=2) if MESHES[mesh] else mesh_of(data=1, tensor=1)
    of_x, of_y = MESHES[mesh] or (P(), P())
    columns = P(None, *of_y[1:])
    out_a, out_b = (NamedSharding(devices, spec) for spec in (P(None, None), columns))

    def both(x, a, b, y, scalings, ids):
        v = backend.run_lora_a_gemm(x, a, out_a, scalings, ids)
        return v, backend.run_lora_b_gemm(v, b, y, out_b, ids)

    operands = x, a, b, y, scalings, ids
    if MESHES[mesh]:
        specs = P("data", *of_x[1:]), P(None, None, *of_x[1:]), P(*of_y), P("data", *of_y[1:])
        placed = [NamedSharding(devices, spec) for spec in (*specs, P("data"), P("data"))]
        operands = [jax.device_put(t, where) for t, where in zip(operands, placed)]
    with jax.set_mesh(devices):
        got = (jax.jit(both) if jitted else both)(*operands)
    assert got[1].sharding.is_equivalent_to(out_b, 2)
    assert_equal(got, want)


@pytest.mark.parametrize(
    "widths, is_tuple", [(N, True), (N, False), ((16, 16), True), ((16, 16), False)]
)
def test_fused_projections(backend, widths, is_tuple):
    x, ids, scalings = tokens(12)
    a, y = draw(L, R * len(widths), H), draw(12, sum(widths))
    stacks = [draw(L, width, R, seed=n) for n, width in enumerate(widths)]
    v = np.split(products(x, a, ids) * scalings[:, None], len(widths), axis=1)
    deltas = [products(*one, ids) for one in zip(v, stacks)]
    given = np.concatenate(stacks, axis=1)
    if is_tuple:
        q, *kv = stacks
        given = tuple(stacks) if len(widths) == 2 else (q[None], np.stack(kv))
    out = NamedSharding(mesh_of(data=1, tensor=1), P(None, "tensor"))
    if len(widths) == 3:
        got = backend.run_qkv_lora(x, a, given, widths, y, out, out, scalings, ids)
    else:
        got = backend.run_gate_up_lora(x, a, given, y, out, out, scalings, ids)
    assert_equal(got, y + np.concatenate(deltas, axis=1))


def test_padding_reads_no_adapter(backend):
    """Its index is 0 and its scaling too: NaN in slot 0 must not reach it."""
    x, ids, scalings = tokens(6)
    a, b, y = draw(L, 2 * R, H), draw(L, 32, R), draw(6, 32)
    ids[:-2] = 1
    a[0] = np.nan
    out = NamedSharding(mesh_of(data=1, tensor=1), P())
    got = backend.run_gate_up_lora(x, a, b, y, out, out, scalings, ids)
    np.testing.assert_array_equal(got[-2:], y[-2:])
    assert np.isfinite(np.asarray(got)).all()
