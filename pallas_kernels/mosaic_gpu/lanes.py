"""What the lanes of a cluster's warps do, one instruction at a time: on a GPU, or emulated.

`decode.py` says what each lane loads, multiplies and stores. It is written once, against the
methods that `Gpu` and `Emulator` share: `Gpu` emits an instruction for each, `Emulator` carries it
out in numpy for all lanes of a cluster at once. Integers, floats and predicates of either support
Python's operators. Pallas has no such level: its arrays belong to whole warpgroups, so a lane can
neither gather rows nor load an operand of `mma` from where it lies.

A word is 32 bits: an integer, a float32, or two halves. Shared memory is counted in words.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]
from jax._src.lib.mlir.dialects import arith, llvm
from jax._src.lib.mlir.dialects import math as mlir_math
from jax._src.lib.mlir.dialects import scf as scf_dialect
from jax.experimental.mosaic import gpu as mgpu
from jaxtyping import DTypeLike

_ptx = mgpu.utils.inline_ptx
scf: Any = scf_dialect  # its builders are typed as MLIR's generic ones
_PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}


class _Value:
    """A lane's integer, float or predicate on a GPU, with the operators that numpy's have."""

    __slots__ = ("ir",)

    def __init__(self, value: ir.Value) -> None:
        self.ir = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.ir.type, ir.FloatType)

    def _other(self, other: Any) -> ir.Value:
        return other.ir if isinstance(other, _Value) else mgpu.c(other, self.ir.type)

    def _do(self, other: Any, integer: Any, floating: Any = None) -> "_Value":
        op = floating if self.is_float else integer
        return _Value(op(self.ir, self._other(other)))

    def __add__(self, other: Any) -> "_Value":
        return self._do(other, arith.addi, arith.addf)

    def __sub__(self, other: Any) -> "_Value":
        return self._do(other, arith.subi, arith.subf)

    def __mul__(self, other: Any) -> "_Value":
        return self._do(other, arith.muli, arith.mulf)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> "_Value":
        return _Value(self._other(other)) - self

    def __floordiv__(self, other: Any) -> "_Value":  # no integer here is negative
        return self._do(other, arith.divui)

    def __mod__(self, other: Any) -> "_Value":
        return self._do(other, arith.remui)

    def __and__(self, other: Any) -> "_Value":
        return self._do(other, arith.andi)

    def __or__(self, other: Any) -> "_Value":
        return self._do(other, arith.ori)

    def __xor__(self, other: Any) -> "_Value":
        return self._do(other, arith.xori)

    def __lshift__(self, other: Any) -> "_Value":
        return self._do(other, arith.shli)

    def __rshift__(self, other: Any) -> "_Value":  # of bits: zeros come in
        return self._do(other, arith.shrui)

    def __invert__(self) -> "_Value":
        return self._do(-1 if self.ir.type.width > 1 else True, arith.xori)

    def _compare(self, other: Any, how: Any) -> "_Value":
        return self._do(other, functools.partial(arith.cmpi, how))

    def __lt__(self, other: Any) -> "_Value":
        return self._compare(other, arith.CmpIPredicate.slt)

    def __ge__(self, other: Any) -> "_Value":
        return self._compare(other, arith.CmpIPredicate.sge)

    def __eq__(self, other: Any) -> "_Value":  # type: ignore[override]
        return self._compare(other, arith.CmpIPredicate.eq)

    __hash__ = None  # type: ignore[assignment]


class Address(NamedTuple):
    """A place in device memory, in bytes; offsets from it count elements."""

    first: Any
    dtype: np.dtype[Any]


class Gpu:
    """Emits instructions where Pallas inlines Mosaic GPU code."""

    def __init__(self, shared: ir.Value) -> None:
        self._i32 = ir.IntegerType.get_signless(32)
        self._i64 = ir.IntegerType.get_signless(64)
        self._f32 = ir.F32Type.get()
        pointer = mgpu.utils.memref_ptr(shared)
        self._shared = _Value(llvm.ptrtoint(self._i32, pointer))
        self.tid = self._asm("mov.u32 $0, %tid.x;", self._i32)
        self._waits = self._take_over_start()

    @staticmethod
    def _take_over_start() -> bool:
        """Takes out where Mosaic waits, at the start, until all of the cluster have begun."""
        # A block that never pushes may end without: who has ended counts as arrived.
        waits = "llvm.inline_asm", "nvvm.cluster.wait"  # of JAX 0.11, and of later ones
        block = ir.InsertionPoint.current.block
        while True:
            for op in block.operations:
                if op.name in waits and "cluster.wait" in str(op):
                    op.operation.erase()
                    return True
            parent = block.owner
            if parent is None or parent.name == "gpu.launch":
                return False
            block = parent.operation.block

    def begun(self) -> None:
        """All blocks of the cluster have begun, so that they may be pushed to."""
        # Mosaic's own wait comes before anything that we do; a load may as well be on its way.
        if self._waits:
            self._waits = False
            self._asm("barrier.cluster.wait.aligned;", None)

    def _asm(self, text: str, result: Any, *args: Any, effects: bool = False) -> Any:
        operands = [arg.ir for arg in args]
        if result is None:
            _ptx(text, *operands, convergent=True)
            return None
        out = _ptx(
            text, *operands, result_types=result, has_side_effects=effects, convergent=effects
        )
        return [_Value(o) for o in out] if isinstance(out, tuple) else _Value(out)

    def _flag(self, where: _Value) -> _Value:
        """A predicate as an operand of PTX."""
        return _Value(arith.extui(self._i32, where.ir))

    @staticmethod
    def _vector(first: int, words: int) -> tuple[str, str]:
        """PTX's type of so many words, and their operands."""
        names = ", ".join(f"${first + n}" for n in range(words))
        return ("b32", names) if words == 1 else (f"v{words}.b32", f"{{{names}}}")

    # -------------------------------------------------------------------------------- arithmetic

    def uniform(self, value: mgpu.FragmentedArray) -> _Value:
        """A scalar of Pallas."""
        return _Value(value.registers.item())

    def integer(self, value: int) -> _Value:
        return _Value(mgpu.c(value, self._i32))

    def real(self, value: float) -> _Value:
        return _Value(mgpu.c(value, self._f32))

    def select(self, where: _Value, a: _Value, b: Any) -> _Value:
        return _Value(arith.select(where.ir, a.ir, a._other(b)))

    def minimum(self, a: _Value, b: Any) -> _Value:
        return _Value(arith.minsi(a.ir, a._other(b)))

    def ones(self, word: _Value) -> _Value:
        return _Value(mlir_math.ctpop(word.ir))

    def as_word(self, value: _Value) -> _Value:
        return _Value(arith.bitcast(self._i32, value.ir)) if value.is_float else value

    def as_real(self, word: _Value) -> _Value:
        return _Value(arith.bitcast(self._f32, word.ir))

    def pack(self, low: _Value, high: _Value, dtype: DTypeLike) -> _Value:
        kind = _PTX_TYPE[jnp.dtype(dtype).name]
        return self._asm(f"cvt.rn.{kind}x2.f32 $0, $2, $1;", self._i32, low, high)

    def unpack(self, word: _Value, dtype: DTypeLike) -> list[_Value]:
        if jnp.dtype(dtype) == jnp.bfloat16:
            return [self.as_real(word << 16), self.as_real(word & -65536)]
        text = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
            "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        return self._asm(text, (self._f32, self._f32), word)

    def mma(self, acc: list[Any], a: list[Any], b: list[Any], dtype: DTypeLike) -> list[Any]:
        """acc + a b, m16n8k16; of a and acc the upper 8 rows alone, the others being zero."""
        kind = _PTX_TYPE[jnp.dtype(dtype).name]
        text = (
            "{ .reg .b32 zero; .reg .f32 low, high; mov.b32 zero, 0; mov.b32 low, 0; "
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, low, high}, {$2, zero, $3, zero}, {$4, $5}, {$6, $7, low, low}; }"
        )
        return self._asm(text, (self._f32, self._f32), *a, *b, *acc)

    def ballot(self, where: _Value) -> _Value:
        text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        return self._asm(text, self._i32, self._flag(where), effects=True)

    def match(self, word: _Value) -> _Value:
        """The lanes of the warp, as bits, that have the same word."""
        text = "match.any.sync.b32 $0, $1, 0xffffffff;"
        return self._asm(text, self._i32, word, effects=True)

    # ----------------------------------------------------------------------------- device memory

    def address(self, ref: Any, row: Any, stride: int) -> Address:
        """The first element of a row of `stride` elements."""
        array, dtype = ref
        row64 = arith.extui(self._i64, row.ir)
        step = mgpu.c(stride * dtype.itemsize, self._i64)
        base = llvm.ptrtoint(self._i64, mgpu.utils.memref_ptr(array))
        return Address(_Value(arith.addi(base, arith.muli(row64, step))), dtype)

    def ahead(self, address: Address, offset: Any) -> Address:
        return address._replace(first=self._at(address, offset))

    def _at(self, address: Address, offset: Any) -> _Value:
        if isinstance(offset, int):
            return address.first + offset * address.dtype.itemsize
        wide = _Value(arith.extui(self._i64, offset.ir))
        return address.first + wide * address.dtype.itemsize

    def load(self, address: Address, offset: Any, where: _Value, *, fixed: bool = True) -> _Value:
        """The word there; zero where not `where`. `fixed`: nobody writes it."""
        kind = "global.nc" if fixed else "global"
        # Volatile, lest it be moved to where its value is used.
        loaded = llvm.inline_asm(
            self._i32,
            [self._at(address, offset).ir, self._flag(where).ir],
            f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.{kind}.b32 $0, [$1]; }}",
            "=&r,l,r",
            has_side_effects=True,
        )
        return _Value(loaded)

    def store(self, address: Address, offset: Any, words: Sequence[_Value], where: _Value) -> None:
        if len(words) > 4:
            for first in range(0, len(words), 4):
                element = first * 4 // address.dtype.itemsize
                self.store(address, offset + element, words[first : first + 4], where)
            return
        self._put("global", self._at(address, offset), words, where)

    # ----------------------------------------------------------------------------- shared memory

    def _word(self, word: Any) -> _Value:
        return self._shared + word * 4

    def copy(self, word: Any, address: Address, offset: Any, where: _Value) -> None:
        """Has 16 bytes brought to shared memory, or zeros where not `where`, some time later."""
        size = self._flag(where) * 16
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        self._asm(text, None, self._word(word), self._at(address, offset), size)

    def commit(self) -> None:
        """Closes this lane's group of copies."""
        self._asm("cp.async.commit_group;", None)

    def arrived(self, pending: int) -> None:
        """Of this lane's groups all but the last `pending` are here."""
        self._asm(f"cp.async.wait_group {pending};", None)

    def get(self, word: Any, count: int) -> list[_Value]:
        kind, names = self._vector(0, count)
        text = f"ld.shared.{kind} {names}, [${count}];"
        out = self._asm(text, (self._i32,) * count, self._word(word), effects=True)
        return list(out)

    def put(self, word: Any, words: Sequence[_Value], where: Any = None) -> None:
        self._put("shared", self._word(word), words, where)

    def push(self, block: _Value, word: Any, words: Sequence[_Value], where: _Value) -> None:
        """`put` into the shared memory of another block of the cluster."""
        # Not `st.async`, which would need no barrier of the cluster: each of its 16 bytes counts at
        # the receiver, one after the other. H100, T=64, 64 adapters of R=128: 58 us so, 79 with it
        # (and with loops in place of turns written out, which was not timed apart).
        text = "mapa.shared::cluster.u32 $0, $1, $2;"
        there = self._asm(text, self._i32, self._word(word), block)
        self._put("shared::cluster", there, words, where)

    def _put(self, space: str, place: _Value, words: Sequence[_Value], where: Any) -> None:
        kind, names = self._vector(1, len(words))
        store, args = f"st.{space}.{kind} [$0], {names};", [place, *words]
        if where is not None:
            store = f"{{ .reg .pred p; setp.ne.b32 p, ${len(args)}, 0; @p {store} }}"
            args.append(self._flag(where))
        self._asm(store, None, *args)

    # ------------------------------------------------------------------------------------- order

    def barrier(self) -> None:
        """All lanes of the block are here, and see what each has put."""
        self._asm("bar.sync 0;", None)

    def warp_barrier(self) -> None:
        """All lanes of the warp are here, and see what each has put or had copied."""
        self._asm("bar.warp.sync 0xffffffff;", None)

    def cluster_barrier(self) -> None:
        """All lanes of the cluster are here, and what they pushed."""
        text = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        self._asm(text, None)

    def leave(self, where: _Value) -> None:
        """Ends the blocks where it holds, on which a cluster's lanes must agree."""
        text = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p exit; }"
        self._asm(text, None, self._flag(where))

    def when(self, where: _Value, do: Callable[[], None]) -> None:
        """do() in the warps where it holds; a warp's lanes must agree."""
        branch = scf.IfOp(where.ir)
        with ir.InsertionPoint(branch.then_block):
            do()
            scf.yield_([])

    def loop(self, count: Any, do: Callable[..., list[Any]], carry: list[Any]) -> list[Any]:
        """carry = do(i, carry) for i in range(count), on which a warp's lanes must agree."""
        stop = count.ir if isinstance(count, _Value) else mgpu.c(count, self._i32)
        body = scf.ForOp(
            mgpu.c(0, self._i32), stop, mgpu.c(1, self._i32), [value.ir for value in carry]
        )
        with ir.InsertionPoint(body.body):
            values = [_Value(value) for value in body.inner_iter_args]
            scf.yield_([value.ir for value in do(_Value(body.induction_variable), values)])
        return [_Value(result) for result in body.results]


class Memory:
    """Arrays side by side, as device memory holds them; between them there is nothing."""

    _GAP = 1024  # bytes

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
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
        self.refs = [(start, array.dtype) for start, array in zip(starts, arrays)]
        self._shapes = [array.shape for array in arrays]

    def array(self, n: int) -> np.ndarray[Any, Any]:
        """The nth array as it is now."""
        start, dtype = self.refs[n]
        flat = self.words.view(dtype)[start // dtype.itemsize :]
        return flat[: math.prod(self._shapes[n])].reshape(self._shapes[n])


class Left(Exception):
    """The cluster that is emulated has ended."""


class Emulator:
    """Carries instructions out for all lanes of one cluster: values are `[blocks, threads]`.

    Lanes run in step, so a missing barrier would not show by itself. Each word of shared memory
    therefore knows who touched it since the last barrier; an access that no barrier orders is an
    error, as are addresses outside of an array and vectors that are not aligned.
    """

    # Who touched a word: a lane (its number), or one of these; of warp w _WARP - w if its barrier
    # came since, else _READING - w.
    _NOBODY, _EVERYONE, _WARP, _READING = -1, -2, -100, -200

    def __init__(self, memory: Memory, words: int, blocks: int, threads: int) -> None:
        self._memory = memory
        self._shape = blocks, threads
        self._block = np.arange(blocks, dtype=np.int64)[:, None]
        self._shared = np.full((blocks, words), 0x7FC00000, np.int32)  # NaN
        self._active = np.ones(self._shape, bool)
        self._begun = False
        self._writer = np.full((blocks, words), self._NOBODY)
        self._reader = np.full((blocks, words), self._NOBODY)
        self._foreign = np.zeros((blocks, words), bool)  # pushed here, and not yet arrived
        self._in_use = np.zeros((blocks, words), bool)  # read since the cluster's last barrier
        self._groups: list[list[Any]] = [[]]  # copies of the last groups
        self.tid = np.broadcast_to(np.arange(threads, dtype=np.int32), self._shape)

    # -------------------------------------------------------------------------------- arithmetic

    def integer(self, value: int) -> Any:
        return np.full(self._shape, value, np.int32)

    def real(self, value: float) -> Any:
        return np.full(self._shape, value, np.float32)

    def select(self, where: Any, a: Any, b: Any) -> Any:
        return np.where(where, a, np.asarray(b, a.dtype))

    def minimum(self, a: Any, b: Any) -> Any:
        return np.minimum(a, np.int32(b))

    def ones(self, word: Any) -> Any:
        return np.bitwise_count(word.view(np.uint32)).astype(np.int32)

    def as_word(self, value: Any) -> Any:
        return value.view(np.int32)

    def as_real(self, word: Any) -> Any:
        return word.view(np.float32)

    def pack(self, low: Any, high: Any, dtype: DTypeLike) -> Any:
        with np.errstate(all="ignore"):
            halves = np.stack([low, high], axis=-1).astype(dtype)
        return halves.view(np.int32)[..., 0]

    def unpack(self, word: Any, dtype: DTypeLike) -> list[Any]:
        halves = np.ascontiguousarray(word)[..., None].view(dtype).astype(np.float32)
        return [halves[..., 0], halves[..., 1]]

    def mma(self, acc: list[Any], a: list[Any], b: list[Any], dtype: DTypeLike) -> list[Any]:
        warps = self._active.reshape(self._shape[0], -1, 32)
        assert np.all(warps == warps[..., :1]), "lanes of a warp diverge at mma"

        def tile(words: list[Any]) -> Any:  # [block, warp, 8 rows, 16]
            halves = np.stack([np.stack(self.unpack(w, dtype), -1) for w in words], -2)
            halves = halves.reshape(*warps.shape[:2], 8, 4, 2, 2)
            return halves.transpose(0, 1, 2, 4, 3, 5).reshape(*warps.shape[:2], 8, 16)

        with np.errstate(all="ignore"):
            product = tile(a) @ tile(b).swapaxes(-1, -2)
            pairs = product.reshape(*self._shape, 2)
            return [acc[n] + pairs[..., n] for n in range(2)]

    def ballot(self, where: Any) -> Any:
        bits = (where & self._active).reshape(self._shape[0], -1, 32).astype(np.uint32)
        word = np.sum(bits << np.arange(32, dtype=np.uint32), axis=-1, dtype=np.uint32)
        return np.repeat(word, 32, axis=-1).view(np.int32)

    def match(self, word: Any) -> Any:
        warps = word.reshape(self._shape[0], -1, 32)
        same = (warps[..., :, None] == warps[..., None, :]).astype(np.uint32)
        bits = np.sum(same << np.arange(32, dtype=np.uint32), axis=-1, dtype=np.uint32)
        return bits.reshape(self._shape).view(np.int32)

    # ----------------------------------------------------------------------------- device memory

    def address(self, ref: Any, row: Any, stride: int) -> Address:
        start, dtype = ref
        return Address(start + np.asarray(row, np.int64) * (stride * dtype.itemsize), dtype)

    def ahead(self, address: Address, offset: Any) -> Address:
        step = np.asarray(offset, np.int64) * address.dtype.itemsize
        return address._replace(first=address.first + step)

    def _words(self, address: Address, offset: Any, count: int, where: Any) -> Any:
        first = address.first + np.asarray(offset, np.int64) * address.dtype.itemsize
        first = np.broadcast_to(first, self._shape)
        use = np.broadcast_to(where & self._active, self._shape)
        assert np.all(first[use] % min(4 * count, 16) == 0), "not aligned"
        index = first[use][:, None] // 4 + np.arange(count)
        assert np.all(index >= 0) and np.all(self._memory.inside[index]), "outside of all arrays"
        return use, index

    def load(self, address: Address, offset: Any, where: Any, *, fixed: bool = True) -> Any:
        use, index = self._words(address, offset, 1, where)
        found = np.zeros(self._shape, np.int32)
        found[use] = self._memory.words[index[:, 0]]
        return found

    def store(self, address: Address, offset: Any, words: Sequence[Any], where: Any) -> None:
        use, index = self._words(address, offset, len(words), where)
        assert np.unique(index).size == index.size, "two lanes store to one word"
        self._memory.words[index] = np.stack(words, axis=-1)[use]

    # ----------------------------------------------------------------------------- shared memory

    def _places(self, block: Any, word: Any, count: int, where: Any) -> Any:
        first = np.broadcast_to(word, self._shape)
        use = np.broadcast_to(where & self._active, self._shape)
        assert np.all(first[use] % count == 0), "not aligned"
        index = first[use][:, None] + np.arange(count)
        assert np.all((index >= 0) & (index < self._shared.shape[1])), "outside of shared memory"
        lane = self.tid[use][:, None]
        return use, (np.broadcast_to(block, self._shape)[use][:, None], index), lane

    def _check(self, owner: Any, at: Any, lane: Any) -> None:
        """Since the last barrier none but the lane may have touched these words."""
        now = owner[at]
        mine = (now == self._NOBODY) | (now == lane) | (now == self._WARP - lane // 32)
        assert np.all(mine), "a barrier is missing"

    def get(self, word: Any, count: int) -> list[Any]:
        use, at, lane = self._places(self._block, word, count, True)
        self._check(self._writer, at, lane)
        assert not np.any(self._foreign[at]), "read before the cluster's barrier"
        self._in_use[at] = True
        self._read(at, lane)
        found = np.zeros((*self._shape, count), np.int32)
        found[use] = self._shared[at]
        return [found[..., n] for n in range(count)]

    def _read(self, at: Any, lane: Any) -> None:
        """Notes who reads: one lane, several of a warp (until its barrier), or several warps."""
        code = (at[0] * self._shared.shape[1] + at[1]).reshape(-1)
        warp = np.broadcast_to(lane // 32, at[1].shape).reshape(-1)
        first, last = np.full(self._reader.size, 1 << 30), np.full(self._reader.size, -1)
        np.minimum.at(first, code, warp)
        np.maximum.at(last, code, warp)
        owner = self._reader.reshape(-1)
        several = (first != last)[code]
        before = owner[code]
        reading = self._READING - warp
        free = (before == self._NOBODY) | (before == reading) | (before == self._WARP - warp)
        owner[code] = np.where(free & ~several, reading, self._EVERYONE)

    def put(self, word: Any, words: Sequence[Any], where: Any = True) -> None:
        use, at, lane = self._places(self._block, word, len(words), where)
        self._write(at, lane, np.stack(words, axis=-1)[use])

    def push(self, block: Any, word: Any, words: Sequence[Any], where: Any) -> None:
        assert self._begun, "the block may not have begun"
        use, at, lane = self._places(block, word, len(words), where)
        assert not np.any(self._in_use[at]), "pushed without a barrier of the cluster since a read"
        self._write(at, lane, np.stack(words, axis=-1)[use])
        self._foreign[at] = True

    def _write(self, at: Any, lane: Any, values: Any) -> None:
        self._check(self._reader, at, lane)
        self._check(self._writer, at, lane)
        code = at[0] * self._shared.shape[1] + at[1]
        assert np.unique(code).size == code.size, "two lanes put to one word"
        self._writer[at] = lane
        self._shared[at] = values

    def copy(self, word: Any, address: Address, offset: Any, where: Any) -> None:
        _, at, lane = self._places(self._block, word, 4, True)
        use, index = self._words(address, offset, 4, where)
        values = np.zeros((*self._shape, 4), np.int32)
        values[use] = self._memory.words[index]
        self._write(at, lane, np.full(at[1].shape, 0x7FC00000, np.int32))
        self._groups[-1].append((at, values[self._active]))

    def commit(self) -> None:
        self._groups.append([])

    def arrived(self, pending: int) -> None:
        """What is on its way is NaN until here."""
        done = len(self._groups) - 1 - pending
        for group in self._groups[: max(0, done)]:
            for at, values in group:
                self._shared[at] = values
        self._groups = self._groups[max(0, done) :]

    # ------------------------------------------------------------------------------------- order

    def _whole(self, lanes: int) -> Any:
        units = self._active.reshape(self._shape[0], -1, lanes)
        assert np.all(units == units[..., :1]), f"{lanes} lanes diverge at a barrier"
        return units[..., 0]

    def barrier(self) -> None:
        done = self._whole(self._shape[1])
        self._writer[done & ~self._foreign] = self._NOBODY
        self._reader[np.broadcast_to(done, self._reader.shape)] = self._NOBODY

    def warp_barrier(self) -> None:
        warps = self._whole(32)
        for owner in (self._writer, self._reader):
            for block, warp in np.argwhere(warps):
                row = owner[block]
                by_lane = (row >= warp * 32) & (row < warp * 32 + 32)
                row[by_lane | (row == self._READING - warp)] = self._WARP - warp

    def begun(self) -> None:
        self._begun = True

    def cluster_barrier(self) -> None:
        assert np.all(self._active), "blocks of a cluster diverge at its barrier"
        assert self._begun, "a barrier of the cluster within another"
        self._writer[:], self._reader[:] = self._NOBODY, self._NOBODY
        self._foreign[:], self._in_use[:] = False, False

    def leave(self, where: Any) -> None:
        assert np.all(where) or not np.any(where), "a cluster's lanes do not agree"
        if np.all(where):
            raise Left

    def when(self, where: Any, do: Callable[[], None]) -> None:
        before, self._active = self._active, self._active & where
        if np.any(self._active):
            do()
        self._active = before

    def loop(self, count: Any, do: Callable[..., list[Any]], carry: list[Any]) -> list[Any]:
        def turn() -> None:
            nonlocal carry
            new = do(self.integer(i), carry)
            carry = [np.where(self._active, a, b) for a, b in zip(new, carry)]

        for i in range(int(np.max(np.where(self._active, count, 0)))):
            self.when(i < np.asarray(count), turn)
        return carry
