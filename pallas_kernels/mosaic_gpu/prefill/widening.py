"""A and B in 8 bits on their way to wgmma, which has no product of bfloat16 and 8 bits: lanes widen
them from one place in shared memory to another.

Pallas's interpreter cannot run that, and lets numpy widen. Tests give it to the emulator.
"""

import dataclasses
import itertools
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.lanes import Gpu
from pallas_kernels.mosaic_gpu.lanes.values import Int, Machine
from pallas_kernels.mosaic_gpu.layouts import Ref, eight_bit_layout, interpreted, operand_layout
from pallas_kernels.mosaic_gpu.prefill.rows import THREADS, swizzled

_WIDE = np.dtype(jnp.bfloat16)
# Bytes of two rows of B of rank 8: TMA copies 16 at least.
PAIR = 16
# Chunks that a lane loads before it stores the first: no load then waits for a store.
_AT_ONCE = 4


class Places(Protocol):
    """Where 8 bits lie, and where bfloat16 is to lie, 16 bytes at a time. Places are words."""

    @property
    def chunks(self) -> int:
        """How many times 16 bytes there are in 8 bits."""

    @property
    def words(self) -> int:
        """Words of `targets` between two chunks, if they are as many as a block's lanes apart."""

    def source(self, n: Int, /) -> Int: ...

    def targets(self, n: Int, /) -> list[Int]:
        """For the first half of chunk n, for the other, and then for zeros."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of 8 rows of `line` columns, in 8 bits and in bfloat16.

    Lanes take the chunks as they lie. So those that read or write at once never meet in a bank.
    """

    chunks: int
    line: int
    words = 8

    def source(self, n: Int) -> Int:
        return n * 4

    def targets(self, n: Int) -> list[Int]:
        place = swizzled(swizzled(n * 16, self.line) * 2, 2 * self.line) // 4
        return [place, place ^ 4]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """`width` rows of rank 8 of each of `stack` adapters, two in 16 bytes. Widened they have 16
    columns, with zeros behind the ranks, and no gap between adapters."""

    stack: int
    width: int
    words = 16

    @property
    def chunks(self) -> int:
        return self.stack * self.width // 2

    def source(self, n: Int) -> Int:
        each = self.width // 2
        return (n // each * pairs_of(self.width) + n % each) * 4

    def targets(self, n: Int) -> list[Int]:
        first, second = (swizzled((2 * n + row) * 32, 32) // 4 for row in range(2))
        return [first, second, first ^ 4, second ^ 4]


def pairs_of(width: int) -> int:
    """Pairs to copy for `width` rows of rank 8: TMA writes to multiples of 128 bytes."""
    return -(-width // 16) * 8


def widen(m: Machine, source: Machine, target: Machine, places: Places, dtype: np.dtype) -> None:
    """Widens what `source` holds in shared memory, of `dtype`, to `target`'s."""
    zeros, targets = [m.integer(0)] * 4, places.targets(m.tid)
    for some in itertools.batched(range(0, places.chunks, THREADS), _AT_ONCE):
        loaded = []
        for first in some:
            n = m.tid + first
            where = n < places.chunks if places.chunks < first + THREADS else None
            n = n if where is None else m.select(where, n, 0)
            loaded.append((first * places.words, where, source.get(places.source(n), 4)))
        for ahead, where, words in loaded:
            wide = [half for word in words for half in m.widen(word, dtype)]
            for half, place in enumerate(targets):
                target.put(place + ahead, wide[4 * half : 4 * half + 4] or zeros, where)


# -------------------------------------------------------------------------------- in a kernel


def widen_rows(source: Ref, target: Ref, rows: int, line: int) -> None:
    """target[:rows] = source[:rows], which is in 8 bits, for wgmma to read. Tiles of both have
    `line` columns."""
    if interpreted():
        target[:rows] = source[:rows].astype(_WIDE)
    else:
        tiles = Tiles(rows * target.shape[-1] // 16, line)
        _by_lanes(source, target, tiles, eight_bit_layout(line), line)
    plgpu.commit_smem()


def widen_pairs(source: Ref, target: Ref, stack: int, width: int) -> None:
    """As `widen_rows`, of rank 8: `width` rows of each adapter."""
    if interpreted():
        pairs = source[: stack * pairs_of(width)].astype(_WIDE)
        rows = pairs.reshape(stack, -1, 8)[:, :width].reshape(-1, 8)
        target[: stack * width] = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1)
    else:
        _by_lanes(source, target, Pairs(stack, width), (), PAIR)
    plgpu.commit_smem()


def _by_lanes(
    source: Ref, target: Ref, places: Places, layout: tuple[plgpu.Transform, ...], line: int
) -> None:
    wide_layout, dtype = operand_layout(_WIDE, line), np.dtype(source.dtype)

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(plgpu.RefType(layout), plgpu.RefType(wide_layout))
    )
    def inline(_: Ref, source: Ref, target: Ref) -> None:
        m = Gpu(target, begins=False)
        m.barrier()  # all lanes are done with what was there
        widen(m, Gpu(source, begins=False), m, places, dtype)

    inline(source, target)
