"""Rows that see some positions of blocks, and what they see in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """Row b sees [firsts[b], lengths[b]); NaN stands in all that no row sees."""

    firsts: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int = 2
    group: int = 4
    head_dim: int = 64
    block: int = 16
    dtype: str = "bfloat16"

    @property
    def tables(self) -> np.ndarray:
        rows, width = len(self.lengths), -(-max(*self.lengths, 1) // self.block)
        mixed = np.random.default_rng(0).permutation(rows * width + 2)
        return mixed[: rows * width].reshape(rows, width).astype(np.int32)

    def arrays(self) -> tuple[jax.Array, ...]:
        rng, tables = np.random.default_rng(1), self.tables
        q = rng.normal(size=(len(tables), self.heads, self.group, self.head_dim))
        pages = rng.normal(size=(2, tables.size + 2, self.heads, self.block, self.head_dim))
        seen = np.zeros((tables.size + 2, self.block), bool)
        for table, first, length in zip(tables, self.firsts, self.lengths):
            for n in range(first, length):
                seen[table[n // self.block], n % self.block] = True
        pages = np.where(seen[:, None, :, None], pages, np.nan)
        q, keys, values = (jnp.asarray(t, self.dtype) for t in (q, *pages))
        numbers = (jnp.asarray(t, jnp.int32) for t in (tables, self.firsts, self.lengths))
        return q, keys, values, *numbers

    def check(self, out: np.ndarray, scale: float = 0.1) -> None:
        """Whether `out` is right: zeros in rows that see nothing."""
        q, keys, values = (np.asarray(t, np.float64) for t in self.arrays()[:3])
        for b, (first, length) in enumerate(zip(self.firsts, self.lengths)):
            seen = slice(first, length)
            k, v = (t[self.tables[b]].swapaxes(0, 1) for t in (keys, values))
            k, v = (t.reshape(self.heads, -1, self.head_dim)[:, seen] for t in (k, v))
            if first >= length:
                np.testing.assert_array_equal(out[b], 0)
                continue
            scores = np.einsum("ngd,ntd->ngt", q[b], k) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            right = np.einsum("ngt,ntd->ngd", weights, v)
            np.testing.assert_allclose(out[b], right, atol=0.012, rtol=0.012)


CASES = [
    PagedCase((0, 5, 100), (200, 64, 190), heads=1, head_dim=128, block=32),
    PagedCase((0, 0), (0, 128), group=1, block=64, dtype="float16"),
    PagedCase((63, 0), (72, 1), heads=1, group=12, block=8),
    PagedCase((0, 9), (64, 9)),
]
