"""Rows that TMA cannot copy as one tile: those of tokens in any order, and a cluster's sums.

The first half is written for single lanes (`lanes.values`): a block's lanes share the work. The
second half puts it into a kernel. Pallas's interpreter cannot run that, so kernels take other ways
there, and tests give the first half to the emulator.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import DTypeLike

from pallas_kernels.mosaic_gpu.lanes import Gpu, MemRef
from pallas_kernels.mosaic_gpu.lanes.values import Flag, Int, Machine
from pallas_kernels.mosaic_gpu.lanes.values import Ref as LaneRef
from pallas_kernels.mosaic_gpu.layouts import Ref

type Layout = tuple[plgpu.Transform, ...]

THREADS = 128  # of a block: one warpgroup


def swizzled(place: Int, line: int) -> Int:
    """Where 16 bytes of a tile's lines lie, or which lie there. The hardware's swizzle: bits 4 to 6
    of an address, or fewer, change with bits 7 to 9."""
    return place ^ ((place >> 3) & (line - 16))


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows in shared memory, in wgmma's order: 8 of them in turn, swizzled.

    Attributes:
      rows: how many.
      chunks: 16 bytes each, in a row.
      line: bytes of a row in which chunks change places; a row has one or more of these.
    """

    rows: int
    chunks: int
    line: int

    def word(self, row: Int, chunk: Int) -> Int:
        """The first word of a chunk."""
        per_line = self.line // 16
        eight = row // 8 * (self.chunks // per_line) + chunk // per_line
        place = (eight * 8 + row % 8) * self.line + chunk % per_line * 16
        return swizzled(place, self.line) // 4

    def dealt(self, m: Machine) -> Iterator[tuple[Int, Int, Flag]]:
        """(row, chunk, whether it is one) for all chunks, dealt to the lanes of a block."""
        total = self.rows * self.chunks
        for first in range(0, total, THREADS):
            n = m.tid + first
            yield n // self.chunks, n % self.chunks, n < total


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of an array in device memory.

    Attributes:
      tokens: the machine whose shared memory has the route.
      first: the word of the first one's token.
      count: of tokens that there are. Others have no row.
      array: `[planes, height, width]`, or without the planes.
      height: rows of a plane.
      width: elements of a row.
    """

    tokens: Machine
    first: int
    count: int
    array: Ref
    height: int
    width: int

    def token(self, row: Int, where: Flag) -> tuple[Int, Flag]:
        """The token of a row, zero without one; and whether it has one."""
        n = self.tokens.select(where, row, 0)
        [token] = self.tokens.get(n + self.first, 1)
        there = where & (token < self.count)
        return self.tokens.select(there, token, 0), there


def gather(m: Machine, block: Block, rows: Rows, column: Int, plane: int = 0) -> None:
    """Starts to copy the rows' columns from `column` on; zeros for those that are not there.

    The caller closes the group of copies.
    """
    each = 16 // rows.array.dtype.itemsize
    for row, chunk, is_one in block.dealt(m):
        token, there = rows.token(row, is_one)
        place = column + chunk * each
        there = there & (place < rows.width)
        address = m.address(rows.array, token + plane * rows.height, rows.width)
        if block.rows * block.chunks % THREADS == 0:
            m.copy(block.word(row, chunk), address, m.select(there, place, 0), there)
        else:
            copy = functools.partial(
                m.copy, block.word(row, chunk), address, m.select(there, place, 0), there
            )
            m.when(is_one, copy)


def scatter(m: Machine, block: Block, rows: Rows, column: Int) -> None:
    """Stores the rows' columns from `column` on."""
    each = 16 // rows.array.dtype.itemsize
    for row, chunk, is_one in block.dealt(m):
        token, there = rows.token(row, is_one)
        words = m.get(block.word(m.select(is_one, row, 0), m.select(is_one, chunk, 0)), 4)
        m.store(m.address(rows.array, token, rows.width), column + chunk * each, words, there)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a block adds up for its cluster.

    Attributes:
      split: blocks of the cluster, each of which has its share in shared memory.
      width: columns of a share.
      out_width: columns of what is stored: `width`, or more with zeros behind.
      own: rows that each block adds up.
    """

    split: int
    width: int
    out_width: int
    own: int


@dataclasses.dataclass(frozen=True)
class Target:
    """Where rows are stored: from `first_row` and `column` on. `count`: rows that there are."""

    array: LaneRef
    count: int
    width: int
    first_row: Int
    column: Int


def add_up(
    m: Machine, sums: Sums, shares: Block, route: Machine, out: Target, me: Int,
    adapters: Sequence[Int], also_none: Flag,
) -> None:  # fmt: skip
    """Adds up the cluster's shares in the order of its blocks, for the block's own rows. Stores
    those whose adapter is one of `adapters`, or, if `also_none`, that have none.

    `me` is the number of the block. To be called between two barriers of the cluster.
    """
    dtype, quads = out.array.dtype, sums.out_width // 4
    total = sums.own * quads
    for first in range(0, total, THREADS):
        is_one = m.tid + first < total
        n = m.select(is_one, m.tid + first, 0)
        row, quad = n // quads + me * sums.own, n % quads
        [adapter] = route.get(row, 1)
        mine = [m.equal(adapter, one) & (one >= 0) for one in adapters]
        stored = functools.reduce(operator.or_, mine, also_none & ~(adapter >= 0))
        stored = stored & is_one & (row + out.first_row < out.count)
        is_sum = quad < sums.width // 4
        place = shares.word(row, m.select(is_sum, quad, 0))
        values = [m.as_real(word) for word in m.peek(0, place, 4)]
        for block in range(1, sums.split):
            more = [m.as_real(word) for word in m.peek(block, place, 4)]
            values = [a + b for a, b in zip(values, more)]
        if sums.out_width > sums.width:
            values = [m.select(is_sum, value, m.real(0.0)) for value in values]
        if dtype == np.float32:
            words = [m.as_word(value) for value in values]
        else:
            words = [m.pack(values[i], values[i + 1], dtype) for i in (0, 2)]
        address = m.address(out.array, m.select(stored, row + out.first_row, 0), out.width)
        m.store(address, out.column + quad * 4, words, stored)


# -------------------------------------------------------------------------------- in a kernel


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in device memory: `[height, width]`, or planes of these."""

    ref: Ref
    dtype: DTypeLike
    height: int
    width: int

    def of_lanes(self, ref: Ref) -> MemRef:
        return MemRef(ref, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a block's rows: in its route from word `first` on. Those from `count` on are
    none."""

    words: Ref
    first: int
    count: int


def _block_of(rows: int, row_bytes: int, layout: Layout) -> Block:
    swizzles = [t.swizzle for t in layout if isinstance(t, plgpu.SwizzleTransform)]
    return Block(rows, row_bytes // 16, swizzles[0] if swizzles else row_bytes)


def fetch(
    smem: Ref, layout: Layout, array: Array, tokens: Tokens, column: jax.Array, plane: int = 0
) -> None:
    """Starts to copy the tokens' columns from `column` on to shared memory, which has `layout`."""

    def copy(m: Gpu, block: Block, rows: Rows, column: Int) -> None:
        m.barrier()  # all lanes are done with what was there
        gather(m, block, rows, column, plane)

    _by_lanes(copy, smem, layout, array, tokens, column)


def store(smem: Ref, layout: Layout, array: Array, tokens: Tokens, column: jax.Array) -> None:
    """Stores the tokens' columns from `column` on, from shared memory, which has `layout`."""
    _by_lanes(scatter, smem, layout, array, tokens, column)


def _by_lanes(
    work: Callable[[Gpu, Block, Rows, Int], None], smem: Ref, layout: Layout, array: Array,
    tokens: Tokens, column: jax.Array,
) -> None:  # fmt: skip
    """`work` on the tokens' rows of `array` and on shared memory, which has `layout`."""
    count, columns = smem.shape[-2:]
    block = _block_of(count, columns * jnp.dtype(array.dtype).itemsize, layout)

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(
            plgpu.RefType(layout), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT
        )
    )  # fmt: skip
    def inline(_: Ref, smem: Ref, words: Ref, ref: Ref, column: Ref) -> None:
        m, route = Gpu(smem, begins=False), Gpu(words, begins=False)
        there = array.of_lanes(ref)
        rows = Rows(route, tokens.first, tokens.count, there, array.height, array.width)
        work(m, block, rows, m.uniform(column))

    inline(smem, tokens.words, array.ref, column)


@dataclasses.dataclass(frozen=True)
class Share:
    """A block's share of a cluster's sums, in shared memory that has `layout`."""

    sums: Sums
    ref: Ref
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Corner:
    """Where a tile's first row and column stand in an array."""

    array: Array
    row: jax.Array
    column: jax.Array


def add_up_shares(
    share: Share, route: Ref, out: Corner, me: jax.Array,
    adapters: list[jax.Array], also_none: jax.Array,
) -> None:  # fmt: skip
    """`add_up` of the shares of a cluster's blocks, in each block's shared memory."""
    sums, layout = share.sums, share.layout
    block = _block_of(share.ref.shape[0], sums.width * 4, layout)
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(
            plgpu.RefType(layout), plgpu.RefType(), plgpu.RefType(), [scalar] * 4,
            [scalar] * len(adapters),
        )
    )  # fmt: skip
    def inline(
        _: Ref, share: Ref, words: Ref, ref: Ref, places: list[Ref], adapters: list[Ref]
    ) -> None:
        m, route = Gpu(share, begins=False), Gpu(words, begins=False)
        me, row, column, also_none = (m.uniform(place) for place in places)
        array = out.array
        target = Target(array.of_lanes(ref), array.height, array.width, row, column)
        mine = [m.uniform(one) for one in adapters]
        add_up(m, sums, block, route, target, me, mine, also_none >= 1)

    scalars = [me, out.row, out.column, also_none.astype(jnp.int32)]
    inline(share.ref, route, out.array.ref, scalars, adapters)
