"""Rows that lanes copy, emulated: tokens in any order, and a cluster's sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import in_ci

import pallas_kernels as pk
from pallas_kernels.mosaic_gpu.lanes import ArrayMemory, Emulator
from pallas_kernels.mosaic_gpu.prefill import route
from pallas_kernels.mosaic_gpu.prefill.rows import (
    Block,
    Rows,
    Sums,
    Target,
    add_up,
    gather,
    scatter,
)
from pallas_kernels.mosaic_gpu.prefill.widening import Pairs, Places, Tiles, pairs_of, widen
from pallas_kernels.routing import SlotRange

THREADS = 128


def with_words(words: np.ndarray, blocks: int = 1) -> Emulator:
    """A machine whose blocks have these words in shared memory."""
    m = Emulator(ArrayMemory([]), words.size, blocks, THREADS)
    m._shared.words[:] = words
    return m


def swizzled(block: Block, rows: np.ndarray) -> np.ndarray:
    """The words of shared memory that hold `[rows, chunks * 4]` words, as wgmma reads them.

    By CUTLASS's definition: of each 16 bytes, bits 4 to 6 of the address change with bits 7 to 9.
    """
    lines = block.chunks * 16 // block.line
    tiled = rows.reshape(block.rows // 8, 8, lines, block.line // 16, 4).transpose(0, 2, 1, 3, 4)
    plain = tiled.reshape(-1, 4)
    out = np.zeros_like(plain)
    mask = {128: 7, 64: 3, 32: 1, 16: 0}[block.line]
    for chunk, words in enumerate(plain):
        out[chunk ^ ((chunk >> 3) & mask)] = words
    return out.reshape(-1)


@pytest.mark.parametrize(("chunks", "line"), [(16, 128), (8, 128), (8, 64), (2, 32), (1, 16)])
@pytest.mark.parametrize("rows", [64, 128])
def test_gathered_rows_lie_as_wgmma_reads_them(rows: int, chunks: int, line: int) -> None:
    rng = np.random.default_rng(0)
    count, width = 200, 8 * chunks + 24
    array = rng.standard_normal((2, count, width)).astype(jnp.bfloat16)
    memory = ArrayMemory([array])
    block = Block(rows, chunks, line)
    tokens = rng.permutation(np.arange(count + 30))[:rows]  # some are no tokens
    m = Emulator(memory, rows * chunks * 4, 1, THREADS)
    there = Rows(with_words(tokens.astype(np.int32)), 0, count, memory.refs[0], count, width)
    gather(m, block, there, m.integer(16), plane=1)
    m.commit()
    m.arrived(0)
    # Behind the last column come zeros, as from TMA.
    padded = np.zeros((count + 30, 8 * chunks), array.dtype)
    columns = min(8 * chunks, width - 16)
    padded[:count, :columns] = array[1, :, 16 : 16 + columns]
    want = swizzled(block, np.ascontiguousarray(padded[tokens]).view(np.int32))
    np.testing.assert_array_equal(m._shared.words[0], want)


@pytest.mark.parametrize(("dtype", "chunks", "line"), [("bfloat16", 8, 128), ("float32", 2, 32)])
def test_scattered_rows_reach_their_tokens_alone(dtype: str, chunks: int, line: int) -> None:
    rng = np.random.default_rng(1)
    size = jnp.dtype(dtype).itemsize
    count, width, columns = 90, 16 * chunks, 16 * chunks // size
    old = rng.standard_normal((count, width)).astype(dtype)
    new = rng.standard_normal((64, columns)).astype(dtype)
    memory, block = ArrayMemory([old]), Block(64, chunks, line)
    tokens = rng.permutation(np.arange(count + 20))[:64].astype(np.int32)
    m = Emulator(memory, 64 * chunks * 4, 1, THREADS)
    m._shared.words[0] = swizzled(block, np.ascontiguousarray(new).view(np.int32))
    there = Rows(with_words(tokens), 0, count, memory.refs[0], count, width)
    scatter(m, block, there, m.integer(16 // size))
    want = old.copy()
    for token, row in zip(tokens, new):
        if token < count:
            want[token, 16 // size : 16 // size + columns] = row[: width - 16 // size]
    np.testing.assert_array_equal(memory.array(0), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("width", [8, 32, 128])
def test_shares_are_added_up_in_order(split: int, width: int, dtype: str) -> None:
    rng = np.random.default_rng(2)
    out_width = max(16, width) if dtype == "bfloat16" else width
    line = min(128, width * 4)
    shares = rng.standard_normal((split, 64, width)).astype(np.float32)
    out = np.full((50, out_width + 8), 7.0, dtype)  # fewer rows than the tile has
    ids = rng.integers(-1, 4, 64).astype(np.int32)
    memory, block = ArrayMemory([out]), Block(64, width // 4, line)
    m = Emulator(memory, 64 * width, split, THREADS)
    for own, share in zip(m._shared.words, shares):
        own[:] = swizzled(block, share.view(np.int32))
    sums = Sums(split, width, out_width, own=64 // split)
    target = Target(memory.refs[0], 50, out_width + 8, m.integer(2), m.integer(4))
    adapters = [m.integer(2), m.integer(-1), m.integer(0)]
    add_up(m, sums, block, with_words(ids, split), target, m.block, adapters, m.tid < 0)
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    want = out.copy()
    for row, adapter in enumerate(ids[:48]):
        if adapter in (0, 2):
            want[row + 2, 4 : 4 + out_width] = 0
            want[row + 2, 4 : 4 + width] = total[row].astype(dtype)
    np.testing.assert_array_equal(memory.array(0), want)


def eight_bits(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers of any size, subnormal ones and both zeros too; no NaN."""
    every = np.random.default_rng(3).integers(0, 127, shape) + 128 * (np.indices(shape).sum(0) % 2)
    return every.astype(np.uint8).view(jnp.dtype(dtype))


def widened(source: np.ndarray, places: Places, size: int, dtype: np.dtype) -> np.ndarray:
    """`size` words of shared memory, to which those of `source` are widened; others are -1."""
    m = with_words(np.full(size, -1, np.int32))
    widen(m, with_words(source), m, places, dtype)
    return m._shared.words[0]


EIGHT_BITS = pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])


@EIGHT_BITS
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (8, 64), (48, 96), (24, 48), (8, 16)])
def test_widened_tiles_lie_as_wgmma_reads_them(rows: int, columns: int, dtype: str) -> None:
    values = eight_bits((rows, columns), dtype)
    line = next(n for n in (64, 32, 16) if columns % n == 0)
    source = swizzled(Block(rows, columns // 16, line), values.view(np.int32))
    wide = np.ascontiguousarray(values.astype(jnp.bfloat16)).view(np.int32)
    want = swizzled(Block(rows, columns // 8, 2 * line), wide)
    found = widened(source, Tiles(rows * columns // 16, line), want.size, values.dtype)
    np.testing.assert_array_equal(found, want)


@EIGHT_BITS
@pytest.mark.parametrize(("stack", "width"), [(1, 64), (3, 8), (2, 72), (8, 32)])
def test_widened_lines_have_zeros_behind_eight_ranks(stack: int, width: int, dtype: str) -> None:
    values = eight_bits((stack, 2 * pairs_of(width), 8), dtype)
    wide = np.zeros((stack * width, 16), jnp.bfloat16)
    wide[:, :8] = values[:, :width].reshape(-1, 8)
    want = swizzled(Block(stack * width, 2, 32), wide.view(np.int32))
    source = np.ascontiguousarray(values).view(np.int32).reshape(-1)
    found = widened(source, Pairs(stack, width), want.size, values.dtype)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("ids", "sorts"),
    [
        (np.repeat([3, 1, -1, 0], [100, 60, 70, 90]), False),  # runs stay, in whatever order
        (np.tile(np.repeat([0, 1], 80), 2), False),  # two prompts of each
        (np.arange(320) % 32, True),
        (np.where(np.arange(320) < 64, np.arange(320) % 32, 33), False),  # decode beside a chunk
    ],
)
def test_tokens_are_sorted_where_adapters_change_often(ids: np.ndarray, sorts: bool) -> None:
    segments = pk.make_segments(ids.astype(np.int32), 40)
    [tokens] = map(np.asarray, jax.jit(route.Order().make)(segments))
    want = np.argsort(np.where(ids < 0, 40, ids), kind="stable") if sorts else np.arange(320)
    np.testing.assert_array_equal(tokens, want)


def test_few_tokens_are_never_sorted() -> None:
    assert not route.may_sort(64)
    assert route.order(pk.make_segments(np.arange(65, dtype=np.int32), 65), False) is None


@pytest.mark.parametrize("every_tile", [False, True])
@pytest.mark.parametrize(("rows", "num_tokens"), [(64, 300), in_ci(128, 300), (64, 40)])
def test_rounds_hold_each_adapter_of_each_tile_once(
    rows: int, num_tokens: int, every_tile: bool
) -> None:
    stacks = {2: 1, 3: 2}  # adapters of a round, and the blocks that take it

    @jax.jit
    def tables(ids: jax.Array) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        segments, sorts = pk.make_segments(ids, 9), route.may_sort(num_tokens)
        parts = tuple(route.PartRounds(SlotRange(0, 9), *part) for part in stacks.items())
        wanted = route.Rounds(parts, rows, sorts, every_tile)
        return route.order(segments, sorts), segments.table(wanted)

    rng = np.random.default_rng(0)
    for ids in (
        np.repeat(rng.permutation(9), 40)[:num_tokens],
        rng.integers(-1, 9, num_tokens),
        np.full(num_tokens, 3),
        np.full(num_tokens, -1),
    ):
        tokens, found = tables(jnp.asarray(ids, jnp.int32))
        order = np.arange(num_tokens) if tokens is None else np.asarray(tokens)
        items = 0
        for (stack, blocks), table in zip(stacks.items(), map(np.asarray, found)):
            first_item = check_rounds(table, ids[order], rows, stack, blocks, every_tile)
            assert first_item == items
            items += table[0, 2 * rows + 5]


def test_rounds_have_room_for_the_runs_that_adapters_of_other_parts_allow() -> None:
    # 45 tokens with an adapter each of another part cut the runs of nine adapters, and as there
    # are so many adapters, tokens are not sorted: every tile has all nine.
    tiles = [
        np.append(np.stack([np.arange(9), 9 + 9 * tile + np.arange(9)], axis=1), [-1] * 46)
        for tile in range(5)
    ]
    ids = np.concatenate(tiles).astype(np.int32)
    segments = pk.make_segments(ids, 54)
    np.testing.assert_array_equal(route.order(segments, True), np.arange(320))
    part = route.PartRounds(SlotRange(0, 9), stack=2, blocks=1)
    [table] = segments.table(route.Rounds((part,), 64, True, False))
    check_rounds(np.asarray(table), np.where(ids < 9, ids, -1), 64, 2, 1, False)


def check_rounds(
    table: np.ndarray, ids: np.ndarray, rows: int, stack: int, blocks: int, every_tile: bool
) -> int:
    """Each tile's adapters are in its rounds, once; returns the first item of the part."""
    count, _, tile, is_first, first_item, items = table[:, 2 * rows : 2 * rows + 6].T
    assert np.unique(first_item).size == 1 and np.unique(items).size == 1
    live, rest = divmod(items[0], blocks)
    assert rest == 0 and live <= len(table)
    found: dict[int, list[int]] = {}
    for n in range(live):
        adapters = table[n, 2 * rows + 6 :][:stack]
        assert (adapters >= 0).sum() == count[n] and (adapters[count[n] :] == -1).all()
        found.setdefault(tile[n], []).extend(adapters[: count[n]].tolist())
        assert is_first[n] == (n == 0 or tile[n] != tile[n - 1])
    for n in range(-(-len(ids) // rows)):
        there = set(ids[n * rows : (n + 1) * rows].tolist()) - {-1}
        assert sorted(found.get(n, [])) == sorted(there)
        assert (n in found) == (every_tile or bool(there))
    return int(first_item[0])
