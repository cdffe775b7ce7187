"""Cases and float64 oracles of several adapters per token, and of decode rows beside a prompt's
chunk, on CPU and on a device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gradient_cases import GradientArrays, GradientCase, by_name, tolerance
from mosaic_cases import (
    bits,
    local_ids,
    parts_in_float64,
    relative_error,
    y_tolerance,
)

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import Config, backend


def ids_and_weights(case: GradientCase, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of each bucket, of none, and of no slot; NaN where there is no adapter."""
    rng = np.random.default_rng(columns)
    ids = rng.integers(-1, case.slots + 1, (case.num_tokens, columns)).astype(np.int32)
    ids[4::5], ids[0, 0] = -1, case.slots - 1
    used = (ids >= 0) & (ids < case.slots)
    return ids, np.where(used, rng.normal(size=ids.shape), np.nan).astype(np.float32)


def wanted(y: np.ndarray, z: GradientArrays, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = y.astype(np.float64)
    for part in z.parts:
        a, b = np.asarray(part.lora_a), np.asarray(part.lora_b)
        local = np.stack([local_ids(column, part) for column in ids.T], axis=1)
        columns = slice(part.y_offset, part.y_offset + b.shape[1])
        out[:, columns] = reference.mix(
            out[:, columns], z.x, a, b, local, weights, np.asarray(part.scales)
        )
    return out


def check_mix(
    case: GradientCase, columns: int, config: Config | None = None, *, sorted_once: bool
) -> None:
    z = case.arrays()
    ids, weights = ids_and_weights(case, columns)
    mix = pk.make_mix(ids, jnp.asarray(weights), case.slots)
    if not sorted_once:
        mix = pk.Mix(tuple(jnp.asarray(ids.T)), jnp.asarray(weights))
    y = np.asarray(z.dy)
    ys = tuple(map(jnp.asarray, np.split(y, np.cumsum(case.widths)[:-1], axis=1)))
    dtype = jnp.dtype(case.dtype)
    call = Call("add_lora", "mosaic_gpu", (), widths=case.widths, dtype=dtype, config=config)
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
    assert none.any() or case.num_tokens < 5
    np.testing.assert_array_equal(bits(got[none]), bits(y[none]))
    assert np.signbit(added[none]).all() and not added[none].any()


def check_one_of_several(case: GradientCase, config: Config | None = None) -> None:
    """A row that has one adapter, with weight 1, where it may have three: the bits of plain ids."""
    z = case.arrays()
    x, parts = jax.tree.map(jnp.asarray, (z.x, z.parts))
    some = np.random.default_rng(0).permutation(case.num_tokens)[: case.num_tokens // 3]
    ids = np.full((case.num_tokens, 3), -1, np.int32)
    ids[:, 0] = z.ids
    ids[some, 2], ids[some, 0] = z.ids[some], -1  # not the first column's either
    mix = pk.make_mix(ids, jnp.where(jnp.asarray(ids) >= 0, 1.0, jnp.nan), case.slots)
    dtype = jnp.dtype(case.dtype)
    call = Call("add_lora", "mosaic_gpu", (), widths=case.widths, dtype=dtype, config=config)

    @jax.jit
    def run(ids: pk.Mix | pk.Segments) -> tuple[jax.Array, ...]:
        return backend.lora_delta(call, x, parts, ids)

    for got, want in zip(run(mix), run(pk.make_segments(z.ids, case.slots))):
        np.testing.assert_array_equal(bits(np.asarray(got)), bits(np.asarray(want)))


def _in_float64(z: GradientArrays, ids: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
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


def check_mix_gradients(case: GradientCase, columns: int = 2) -> None:
    z = case.arrays()
    ids, weights = ids_and_weights(case, columns)
    if case.slots == 1:  # tiles of 64 tokens that follow each other, also beyond the first column
        ids[:], weights = 0, np.nan_to_num(weights, nan=0.5)
    call = Call("add_lora", "mosaic_gpu", ("sgmv",) * len(z.parts))
    x, dy, parts = jax.tree.map(jnp.asarray, (z.x, z.dy, z.parts))
    mix = pk.make_mix(ids, jnp.asarray(weights), case.slots)
    dx, dparts, dw = jax.jit(lambda *a: backend.add_lora_grad(call, *a))(dy, x, parts, mix)
    got = by_name(dx, dparts) | {"dw": np.asarray(dw)}
    for name, want in _in_float64(z, ids, weights).items():
        limit = tolerance("ds0" if name == "dw" else name, case.dtype)
        error = relative_error(got[name], want)
        # dx is rounded for each of the token's adapters.
        assert error < (2 * limit if name == "dx" else limit), (name, error)
        assert not got[name][want == 0].any(), name


@dataclasses.dataclass(frozen=True)
class ChunkCase:
    """Decode rows, each with an adapter of its own, beside a chunk of one prompt.

    Attributes:
      ranges: `(rank, slots)` of each bucket. Row n has the slot n; one slot, `unused`, has NaN.
      own: the chunk's slot; one of `range(rows)` is a decode row's too.
      rows_first: whether the rows stand before the chunk, or behind it.
    """

    chunk: int
    ranges: tuple[tuple[int, int], ...]
    own: int
    rows: int = 64
    features: int = 1024
    width: int = 512
    rows_first: bool = True

    def __str__(self) -> str:
        ranks = "+".join(f"r{rank}x{slots}" for rank, slots in self.ranges)
        where = "before" if self.rows_first else "behind"
        return f"{self.rows} rows {where} {self.chunk} of slot {self.own}, {ranks}"

    @property
    def slots(self) -> int:
        return sum(slots for _, slots in self.ranges)

    @property
    def is_chunk(self) -> np.ndarray:
        """Which tokens are the chunk's."""
        own = np.arange(self.rows + self.chunk) >= self.rows
        return own if self.rows_first else own[::-1]

    def arrays(self) -> GradientArrays:
        """`dy` is the y to which is added."""
        total = self.rows + self.chunk
        z = GradientCase(total, self.features, (self.width,), self.ranges).arrays()
        ids = np.full(total, self.own, np.int32)
        ids[~self.is_chunk] = np.arange(self.rows)
        [unused] = {*range(self.slots)} - {*ids.tolist()}
        for part in z.parts:
            if part.first_slot <= unused < part.first_slot + part.slots:
                for stack in (part.lora_a, part.lora_b):
                    stack[unused - part.first_slot] = np.nan
        return dataclasses.replace(z, ids=ids)


@functools.partial(jax.jit, static_argnames=("sorted_once", "implementation", "config"))
def _beside_a_chunk(
    x: jax.Array,
    ids: jax.Array,
    y: jax.Array,
    parts: tuple[pk.LoRAPart, ...],
    *,
    sorted_once: bool,
    **how: Any,
) -> tuple[jax.Array, jax.Array]:
    """y with what is added to it, and the delta alone."""
    if sorted_once:
        ids = pk.make_segments(ids, sum(part.slots for part in parts))
    delta = pk.lora_delta(x, parts, ids, y.shape[1], dtype=y.dtype, **how)
    return pk.add_lora_multi(y, x, parts, ids, **how), delta


def check_chunk(case: ChunkCase, **how: Any) -> None:
    """Both forms against float64: rows and chunk each for itself, also where some rows have no
    adapter. Their y keeps its bytes."""
    z = case.arrays()
    parts = jax.tree.map(jnp.asarray, z.parts)
    without = z.ids.copy()
    without[np.flatnonzero(~case.is_chunk)[1::3]] = -1
    for ids in (z.ids, without):
        found = _beside_a_chunk(z.x, ids, z.dy, parts, **how)
        added, delta = map(np.asarray, found)
        want, used = parts_in_float64(z.x, z.parts, ids, case.width)
        for mine in (case.is_chunk, ~case.is_chunk & used[:, 0]):
            sums = z.dy[mine].astype(np.float64) + want[mine]
            assert relative_error(added[mine], sums) < y_tolerance("bfloat16")
            assert relative_error(delta[mine], want[mine]) < y_tolerance("bfloat16")
        np.testing.assert_array_equal(bits(added)[~used], bits(z.dy)[~used])
        assert not delta[~used].any()


def check_chunk_bits(case: ChunkCase, **how: Any) -> None:
    """The rows' bits do not depend on the chunk, nor the chunk's on the rows, nor on places."""
    z, is_chunk, rng = case.arrays(), case.is_chunk, np.random.default_rng(0)
    parts = jax.tree.map(jnp.asarray, z.parts)
    first = _beside_a_chunk(z.x, z.ids, z.dy, parts, **how)

    def check(kept: np.ndarray, x: np.ndarray, ids: np.ndarray) -> None:
        for one, other in zip(first, _beside_a_chunk(x, ids, z.dy, parts, **how)):
            np.testing.assert_array_equal(bits(other)[kept], bits(one)[kept])

    used = np.unique(z.ids)
    for kept in (is_chunk, ~is_chunk):
        others = ~kept[:, None]
        for x, ids in (
            (np.full_like(z.x, np.nan), z.ids),
            (rng.permutation(z.x), np.full_like(z.ids, -1)),
            (rng.permutation(z.x), np.full_like(z.ids, used[0])),
            (rng.permutation(z.x), rng.choice(used, len(z.ids)).astype(np.int32)),
        ):
            check(kept, np.where(others, x, z.x), np.where(kept, z.ids, ids))
    order = rng.permutation(len(z.ids))
    moved = _beside_a_chunk(z.x[order], z.ids[order], z.dy[order], parts, **how)
    for one, other in zip(first, moved):
        np.testing.assert_array_equal(bits(other), bits(one)[order])
