"""What tests of meshes share: meshes, and what is compiled for them."""

import collections
import re

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

COLUMN, ROW = P(None, "tp"), P("tp", None)
KINDS = (AxisType.Explicit, AxisType.Auto)


def mesh_of(kind=AxisType.Explicit, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def assert_equal(got, want, rtol=1e-5):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for a, b in (map(np.asarray, pair) for pair in pairs):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, np.abs(b).max()))


def collectives(fn, *operands):
    """`{collective: how many}` of the compiled program."""
    text = fn.lower(*operands).compile().as_text()
    names = re.findall(
        r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text
    )
    return dict(collections.Counter(names))
