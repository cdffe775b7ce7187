"""The machine that carries instructions out in numpy, for a whole cluster, and finds races."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, Int64

from pallas_kernels.mosaic_gpu.lanes.values import (
    Address,
    Carry,
    Chosen,
    Flag,
    Int,
    Number,
    Operand,
    Real,
    Ref,
)

_NAN = 0x7FC00000


class Lanes:
    """An integer, float or predicate of each lane, `[blocks, threads]`, with the operators of
    `values`."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __add__(self, other: Operand) -> "Lanes":
        return Lanes(self.array + _array(other))

    def __sub__(self, other: Operand) -> "Lanes":
        return Lanes(self.array - _array(other))

    def __mul__(self, other: Operand) -> "Lanes":
        return Lanes(self.array * _array(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Operand) -> "Lanes":
        return Lanes(_array(other) - self.array)

    def __floordiv__(self, other: Operand) -> "Lanes":
        return Lanes(self.array // _array(other))

    def __mod__(self, other: Operand) -> "Lanes":
        return Lanes(self.array % _array(other))

    def __and__(self, other: Operand) -> "Lanes":
        return Lanes(self.array & _array(other))

    def __or__(self, other: Operand) -> "Lanes":
        return Lanes(self.array | _array(other))

    def __xor__(self, other: Operand) -> "Lanes":
        return Lanes(self.array ^ _array(other))

    def __lshift__(self, other: Operand) -> "Lanes":
        return Lanes(self.array << _array(other))

    def __rshift__(self, other: Operand) -> "Lanes":
        bits = self.array.view(np.uint32) >> np.asarray(_array(other), np.uint32)
        return Lanes(bits.view(np.int32))

    def __invert__(self) -> "Lanes":
        return Lanes(~self.array)

    def __lt__(self, other: Operand) -> "Lanes":
        return Lanes(self.array < _array(other))

    def __ge__(self, other: Operand) -> "Lanes":
        return Lanes(self.array >= _array(other))


def _array(value: Operand) -> np.ndarray | int:
    return value if isinstance(value, int) else cast(Lanes, value).array


def _of(value: Int | Real | Flag) -> np.ndarray:
    """A kernel's values are this machine's own."""
    return cast(Lanes, value).array


class ArrayRef(NamedTuple):
    """An array in the emulated device memory: its first byte."""

    start: int
    dtype: np.dtype


class ArrayMemory:
    """Arrays side by side, as device memory holds them; between them there is nothing."""

    _GAP = 1024  # bytes

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.nbytes // self._GAP) * self._GAP + self._GAP
        self.words = np.zeros(end // 4, np.int32)
        self.inside = np.zeros(end // 4, bool)
        for array, start in zip(arrays, starts):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.words.view(np.uint8)[start : start + flat.size] = flat
            self.inside[start // 4 : -(-(start + flat.size) // 4)] = True
        self.refs = [ArrayRef(start, array.dtype) for start, array in zip(starts, arrays)]
        self._shapes = [array.shape for array in arrays]

    def array(self, n: int) -> np.ndarray:
        """The nth array as it is now."""
        start, dtype = self.refs[n]
        flat = self.words.view(dtype)[start // dtype.itemsize :]
        return flat[: math.prod(self._shapes[n])].reshape(self._shapes[n])


class Words(NamedTuple):
    """Words of shared memory that some lanes touch, a vector for each of these lanes."""

    block: Int64[np.ndarray, "lanes 1"]
    word: Int64[np.ndarray, "lanes words"]
    lane: Int64[np.ndarray, "lanes 1"]

    @property
    def at(self) -> tuple[np.ndarray, np.ndarray]:
        return self.block, self.word


class SharedMemory:
    """The shared memory of a cluster's blocks. Each word knows who touched it since the last
    barrier, as lanes run in step here, so that a missing barrier would not show by itself."""

    # Who touched a word: a lane (its number), or one of these; of warp w _WARP - w if its barrier
    # came since, else _READING - w.
    _NOBODY, _EVERYONE, _WARP, _READING = -1, -2, -100, -200

    def __init__(self, blocks: int, words: int) -> None:
        self.words = np.full((blocks, words), _NAN, np.int32)
        self._writer = np.full((blocks, words), self._NOBODY)
        self._reader = np.full((blocks, words), self._NOBODY)
        self._foreign = np.zeros((blocks, words), bool)  # pushed here, and not yet arrived
        self._in_use = np.zeros((blocks, words), bool)  # read since the cluster's last barrier

    def read(self, words: Words) -> np.ndarray:
        self._check(self._writer, words)
        assert not np.any(self._foreign[words.at]), "read before the cluster's barrier"
        self._in_use[words.at] = True
        self._note_readers(words)
        return self.words[words.at]

    def write(self, words: Words, values: np.ndarray) -> None:
        self._check(self._reader, words)
        self._check(self._writer, words)
        code = words.block * self.words.shape[1] + words.word
        assert np.unique(code).size == code.size, "two lanes put to one word"
        self._writer[words.at] = words.lane
        self.words[words.at] = values

    def write_from_afar(self, words: Words, values: np.ndarray) -> None:
        """`write` by lanes of another block, which a barrier of the cluster must order."""
        in_use = self._in_use[words.at]
        assert not np.any(in_use), "pushed without a barrier of the cluster since a read"
        self.write(words, values)
        self._foreign[words.at] = True

    def _check(self, owner: np.ndarray, words: Words) -> None:
        """Since the last barrier none but the lane may have touched these words."""
        now, lane = owner[words.at], words.lane
        mine = (now == self._NOBODY) | (now == lane) | (now == self._WARP - lane // 32)
        assert np.all(mine), "a barrier is missing"

    def _note_readers(self, words: Words) -> None:
        """Who reads: one lane, several of a warp (until its barrier), or several warps."""
        code = (words.block * self.words.shape[1] + words.word).reshape(-1)
        warp = np.broadcast_to(words.lane // 32, words.word.shape).reshape(-1)
        first, last = np.full(self._reader.size, 1 << 30), np.full(self._reader.size, -1)
        np.minimum.at(first, code, warp)
        np.maximum.at(last, code, warp)
        owner = self._reader.reshape(-1)
        several = (first != last)[code]
        before = owner[code]
        reading = self._READING - warp
        free = (before == self._NOBODY) | (before == reading) | (before == self._WARP - warp)
        owner[code] = np.where(free & ~several, reading, self._EVERYONE)

    def after_block_barrier(self, blocks: Bool[np.ndarray, "blocks 1"]) -> None:
        self._writer[blocks & ~self._foreign] = self._NOBODY
        self._reader[np.broadcast_to(blocks, self._reader.shape)] = self._NOBODY

    def after_warp_barrier(self, warps: Bool[np.ndarray, "blocks warps"]) -> None:
        for owner in (self._writer, self._reader):
            for block, warp in np.argwhere(warps):
                row = owner[block]
                by_lane = (row >= warp * 32) & (row < warp * 32 + 32)
                row[by_lane | (row == self._READING - warp)] = self._WARP - warp

    def after_cluster_barrier(self) -> None:
        self._writer[:], self._reader[:] = self._NOBODY, self._NOBODY
        self._foreign[:], self._in_use[:] = False, False


class Left(Exception):
    """The cluster that is emulated has ended."""


class Emulator:
    """Carries each method of `values.Machine` out for all lanes of a cluster at once.

    An access that no barrier orders is an error, as are addresses outside of an array and vectors
    that are not aligned. What has not arrived is NaN.
    """

    def __init__(self, memory: ArrayMemory, words: int, blocks: int, threads: int) -> None:
        self._memory = memory
        self._shape = blocks, threads
        self._block = np.arange(blocks, dtype=np.int64)[:, None]
        self._shared = SharedMemory(blocks, words)
        self._active = np.ones(self._shape, bool)
        self._begun = False
        self._groups: list[list[tuple[Words, np.ndarray]]] = [[]]  # copies of the last groups
        self._tid = np.broadcast_to(np.arange(threads, dtype=np.int32), self._shape)

    @property
    def tid(self) -> Lanes:
        return Lanes(self._tid)

    @property
    def block(self) -> Lanes:
        """The number of a lane's block in the cluster."""
        return Lanes(np.broadcast_to(self._block.astype(np.int32), self._shape))

    # -------------------------------------------------------------------------------- arithmetic

    def integer(self, value: int) -> Lanes:
        return Lanes(np.full(self._shape, value, np.int32))

    def real(self, value: float) -> Lanes:
        return Lanes(np.full(self._shape, value, np.float32))

    def select(self, where: Flag, a: Chosen, b: Chosen | int) -> Chosen:
        chosen = np.where(_of(where), _of(a), np.asarray(_array(b), _of(a).dtype))
        return cast(Chosen, Lanes(chosen))

    def minimum(self, a: Int, b: Number) -> Lanes:
        return Lanes(np.minimum(_of(a), np.asarray(_array(b), np.int32)))

    def equal(self, a: Int, b: Number) -> Lanes:
        return Lanes(_of(a) == _array(b))

    def fma(self, a: Real, b: Real, c: Real) -> Lanes:
        with np.errstate(all="ignore"):
            return Lanes(_of(a) * _of(b) + _of(c))

    def ones(self, word: Int) -> Lanes:
        return Lanes(np.bitwise_count(_of(word).view(np.uint32)).astype(np.int32))

    def as_word(self, value: Real) -> Lanes:
        return Lanes(_of(value).view(np.int32))

    def as_real(self, word: Int) -> Lanes:
        return Lanes(_of(word).view(np.float32))

    def pack(self, low: Real, high: Real, dtype: np.dtype) -> Lanes:
        with np.errstate(all="ignore"):
            halves = np.stack([_of(low), _of(high)], axis=-1).astype(dtype)
        return Lanes(halves.view(np.int32)[..., 0])

    def unpack(self, word: Int, dtype: np.dtype) -> list[Real]:
        halves = np.ascontiguousarray(_of(word))[..., None].view(dtype).astype(np.float32)
        return [Lanes(halves[..., 0]), Lanes(halves[..., 1])]

    def widen(self, word: Int, dtype: np.dtype) -> list[Int]:
        wide = np.ascontiguousarray(_of(word))[..., None].view(dtype).astype(jnp.bfloat16)
        return [Lanes(wide.view(np.int32)[..., n]) for n in range(2)]

    def mma(self, acc: list[Real], a: list[Int], b: list[Int], dtype: np.dtype) -> list[Real]:
        warps = self._active.reshape(self._shape[0], -1, 32)
        assert np.all(warps == warps[..., :1]), "lanes of a warp diverge at mma"

        def tile(words: list[Int]) -> np.ndarray:  # [block, warp, 8 rows, 16]
            pairs = [np.stack([_of(half) for half in self.unpack(w, dtype)], -1) for w in words]
            halves = np.stack(pairs, -2).reshape(*warps.shape[:2], 8, 4, 2, 2)
            return halves.transpose(0, 1, 2, 4, 3, 5).reshape(*warps.shape[:2], 8, 16)

        with np.errstate(all="ignore"):
            product = tile(a) @ tile(b).swapaxes(-1, -2)
            sums = product.reshape(*self._shape, 2)
            return [Lanes(_of(acc[n]) + sums[..., n]) for n in range(2)]

    def ballot(self, where: Flag) -> Lanes:
        bits = (_of(where) & self._active).reshape(self._shape[0], -1, 32).astype(np.uint32)
        word = np.sum(bits << np.arange(32, dtype=np.uint32), axis=-1, dtype=np.uint32)
        return Lanes(np.repeat(word, 32, axis=-1).view(np.int32))

    def match(self, word: Int) -> Lanes:
        warps = _of(word).reshape(self._shape[0], -1, 32)
        same = (warps[..., :, None] == warps[..., None, :]).astype(np.uint32)
        bits = np.sum(same << np.arange(32, dtype=np.uint32), axis=-1, dtype=np.uint32)
        return Lanes(bits.reshape(self._shape).view(np.int32))

    # ----------------------------------------------------------------------------- device memory

    def address(self, ref: Ref, row: Int, stride: int) -> Address:
        start, dtype = cast(ArrayRef, ref)
        return Address(Lanes(start + _of(row).astype(np.int64) * (stride * dtype.itemsize)), dtype)

    def ahead(self, address: Address, offset: Number) -> Address:
        return address._replace(first=Lanes(self._bytes(address, offset)))

    @staticmethod
    def _bytes(address: Address, offset: Number) -> np.ndarray:
        return _of(address.first) + np.asarray(_array(offset), np.int64) * address.dtype.itemsize

    def _words(
        self, address: Address, offset: Number, count: int, where: Flag
    ) -> tuple[Bool[np.ndarray, "blocks threads"], Int64[np.ndarray, "lanes words"]]:
        """The lanes that take part, and which words of device memory each of them touches."""
        first = np.broadcast_to(self._bytes(address, offset), self._shape)
        use = np.broadcast_to(_of(where) & self._active, self._shape)
        assert np.all(first[use] % min(4 * count, 16) == 0), "not aligned"
        index = first[use][:, None] // 4 + np.arange(count)
        assert np.all(index >= 0) and np.all(self._memory.inside[index]), "outside of all arrays"
        return use, index

    def load(self, address: Address, offset: Number, where: Flag, *, fixed: bool = True) -> Lanes:
        use, index = self._words(address, offset, 1, where)
        found = np.zeros(self._shape, np.int32)
        found[use] = self._memory.words[index[:, 0]]
        return Lanes(found)

    def store(self, address: Address, offset: Number, words: Sequence[Int], where: Flag) -> None:
        use, index = self._words(address, offset, len(words), where)
        assert np.unique(index).size == index.size, "two lanes store to one word"
        self._memory.words[index] = np.stack([_of(word) for word in words], axis=-1)[use]

    # ----------------------------------------------------------------------------- shared memory

    def _places(
        self, block: np.ndarray, word: Number, count: int, where: Flag | None
    ) -> tuple[Bool[np.ndarray, "blocks threads"], Words]:
        """The lanes that take part, and which words of shared memory each of them touches."""
        first = np.broadcast_to(_array(word), self._shape)
        use = self._active if where is None else _of(where) & self._active
        assert np.all(first[use] % count == 0), "not aligned"
        index = first[use][:, None] + np.arange(count)
        inside = (index >= 0) & (index < self._shared.words.shape[1])
        assert np.all(inside), "outside of shared memory"
        block = np.broadcast_to(block, self._shape)[use][:, None]
        return use, Words(block, index, self._tid[use][:, None])

    def get(self, word: Number, count: int) -> list[Int]:
        return self._read(self._block, word, count)

    def peek(self, block: int, word: Number, count: int) -> list[Int]:
        return self._read(np.full_like(self._block, block), word, count)

    def _read(self, block: np.ndarray, word: Number, count: int) -> list[Int]:
        use, words = self._places(block, word, count, None)
        found = np.zeros((*self._shape, count), np.int32)
        found[use] = self._shared.read(words)
        return [Lanes(found[..., n]) for n in range(count)]

    def put(self, word: Number, words: Sequence[Int], where: Flag | None = None) -> None:
        use, at = self._places(self._block, word, len(words), where)
        self._shared.write(at, np.stack([_of(w) for w in words], axis=-1)[use])

    def push(self, block: Int, word: Number, words: Sequence[Int], where: Flag) -> None:
        assert self._begun, "the block may not have begun"
        use, at = self._places(_of(block), word, len(words), where)
        self._shared.write_from_afar(at, np.stack([_of(w) for w in words], axis=-1)[use])

    def copy(self, word: Number, address: Address, offset: Number, where: Flag) -> None:
        _, at = self._places(self._block, word, 4, None)
        use, index = self._words(address, offset, 4, where)
        values: Int32[np.ndarray, "blocks threads 4"] = np.zeros((*self._shape, 4), np.int32)
        values[use] = self._memory.words[index]
        self._shared.write(at, np.full(at.word.shape, _NAN, np.int32))
        self._groups[-1].append((at, values[self._active]))

    def commit(self) -> None:
        self._groups.append([])

    def arrived(self, pending: int) -> None:
        done = max(0, len(self._groups) - 1 - pending)
        for group in self._groups[:done]:
            for words, values in group:
                self._shared.words[words.at] = values
        self._groups = self._groups[done:]

    # ------------------------------------------------------------------------------------- order

    def _whole(self, lanes: int) -> np.ndarray:
        """Whether each group of so many lanes is here; its lanes must agree."""
        units = self._active.reshape(self._shape[0], -1, lanes)
        assert np.all(units == units[..., :1]), f"{lanes} lanes diverge at a barrier"
        return units[..., 0]

    def begun(self) -> None:
        self._begun = True

    def barrier(self) -> None:
        self._shared.after_block_barrier(self._whole(self._shape[1]))

    def warp_barrier(self) -> None:
        self._shared.after_warp_barrier(self._whole(32))

    def cluster_barrier(self) -> None:
        assert np.all(self._active), "blocks of a cluster diverge at its barrier"
        assert self._begun, "a barrier of the cluster within another"
        self._shared.after_cluster_barrier()

    def leave(self, where: Flag) -> None:
        ends = _of(where)
        assert np.all(ends) or not np.any(ends), "a cluster's lanes do not agree"
        if np.all(ends):
            raise Left

    def when(self, where: Flag, do: Callable[[], None]) -> None:
        before, self._active = self._active, self._active & _of(where)
        if np.any(self._active):
            do()
        self._active = before

    def loop(
        self, count: Number, do: Callable[[Int, list[Carry]], list[Carry]], carry: list[Carry]
    ) -> list[Carry]:
        counts = np.broadcast_to(_array(count), self._shape)
        for i in range(int(np.max(np.where(self._active, counts, 0)))):
            before, self._active = self._active, self._active & (i < counts)
            if np.any(self._active):
                new = do(self.integer(i), carry)
                carry = [self.select(Lanes(self._active), a, b) for a, b in zip(new, carry)]
            self._active = before
        return carry
