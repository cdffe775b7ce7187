"""One adapter's outputs and gradients beside others, and rows in calls of several sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.ops import add_in_step

MINE = 2


@jax.jit
def _gradients(x, a, b, ids, dy, y):
    out, pull = jax.vjp(lambda x, a, b: pk.add_lora(y, x, a, b, ids), x, a, b)
    return out, *pull(dy)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """A call in which the adapter `MINE` has the same tokens and weights whatever the seed."""

    tokens: int
    features: int
    width: int
    rank: int
    dtype: str
    slots: int = 5

    def _operands(self, seed):
        rng = np.random.default_rng(seed)
        shapes = {
            "x": (self.tokens, self.features),
            "a": (self.slots, self.rank, self.features),
            "b": (self.slots, self.width, self.rank),
            "dy": (self.tokens, self.width),
            "y": (self.tokens, self.width),
        }
        dtype = jnp.dtype(self.dtype)
        return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}

    def run(self, seed, where, *, alone=False):
        """What `MINE` gets for its tokens, which stand at `where`; others are those of the seed."""
        values, own = self._operands(seed), self._operands(0)
        ids = np.random.default_rng(seed).integers(-1, self.slots, self.tokens).astype(np.int32)
        ids = np.where((ids == MINE) | alone, -1, ids).astype(np.int32)
        ids[where] = MINE
        for name in ("x", "dy", "y"):
            values[name][where] = own[name][: len(where)]
        for name in ("a", "b"):
            values[name][MINE] = own[name][MINE]
        out, dx, da, db = map(np.asarray, _gradients(**values, ids=ids))
        return {"y": out[where], "dx": dx[where], "da": da[MINE], "db": db[MINE]}


@jax.jit
def exact(y, x, parts, ids):
    """The phase "exact" of a layer."""
    return add_in_step((y,), x, parts, ids, phase="exact")[0]


def rows_of_two_ranks(total, features, width, ranks, dtype):
    """y, x, parts and ids of a call, of three slots of each rank."""
    rng, slots = np.random.default_rng(0), 3
    parts = []
    for rank in ranks:
        a, b = rng.normal(size=(slots, rank, features)), rng.normal(size=(slots, width, rank))
        scales = jnp.asarray([0.5, 1.0, 2.0], jnp.float32)
        a, b = (jnp.asarray(half, jnp.dtype(dtype)) for half in (a, b))
        parts.append(pk.LoRAPart(a, b, scales, slots * len(parts)))
    y, x = (jnp.asarray(rng.normal(size=(total, n)), jnp.dtype(dtype)) for n in (width, features))
    ids = rng.integers(-1, slots * len(parts), total).astype(np.int32)
    return y, x, tuple(parts), ids


def check_exact(y, x, parts, ids, sizes):
    """Rows have the same bits in calls of these sizes, and those without an adapter keep theirs."""
    whole, rng = np.asarray(exact(y, x, parts, ids)), np.random.default_rng(1)
    for size in sizes:
        some = rng.permutation(len(ids))[:size]
        np.testing.assert_array_equal(exact(y[some], x[some], parts, ids[some]), whole[some])
    np.testing.assert_array_equal(whole[ids < 0], np.asarray(y)[ids < 0])
    plain = jax.jit(lambda: add_in_step((y,), x, parts, ids, phase="prefill"))()[0]
    whole, plain = (np.asarray(one, np.float32) for one in (whole, plain))
    tolerance = 1e-5 if y.dtype == jnp.float32 else 8e-3
    np.testing.assert_allclose(whole, plain, atol=np.abs(plain).max() * tolerance)
    assert (whole[ids >= 0] != np.asarray(y, np.float32)[ids >= 0]).any(axis=1).all()
