"""The machine that emits instructions, where Pallas inlines Mosaic GPU code."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]
from jax._src.lib.mlir.dialects import arith, llvm
from jax._src.lib.mlir.dialects import math as mlir_math
from jax._src.lib.mlir.dialects import scf as scf_dialect
from jax.experimental.mosaic import gpu as mgpu

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

_ptx = mgpu.utils.inline_ptx
_PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}
scf: Any = scf_dialect  # its builders are typed as MLIR's generic ones, which take other arguments
_Op = Callable[[ir.Value, ir.Value], ir.Value]

# Two bytes of $1 as two bfloat16 in $0. The bits of float8_e4m3fn, moved to those of a bfloat16,
# are 2^-120 of it, subnormal ones too; $2 is 2^120, twice. Hopper converts to float16 alone.
WIDENS_FLOAT8 = [
    f"{{ .reg .b32 wide, digits; prmt.b32 wide, $1, 0, {which}; shr.u32 digits, wide, 4; "
    "and.b32 digits, digits, 0x07f007f0; lop3.b32 wide, wide, 0x80008000, digits, 0xea; "
    "mul.rn.bf16x2 $0, wide, $2; }"
    for which in ("0x1404", "0x3424")
]
# Four bytes of $2 as four bfloat16 in $0 and $1. With its first bit turned, an int8 n is the byte
# n + 128. As a bfloat16's low bits that byte reaches the last bit of the exponent alone, and below
# 2^-125 numbers stand 2^-133 apart: it is (n + 128) 2^-133. Times 2^127, less 2, that is n / 64,
# and 64 times this is n. Both have eight bits at most, so nothing is rounded.
WIDENS_INT8 = (
    "{ .reg .b32 bytes, low, high, power, bias, unit; mov.b32 power, 0x7f007f00; "
    "mov.b32 bias, 0xc000c000; mov.b32 unit, 0x42804280; xor.b32 bytes, $2, 0x80808080; "
    "prmt.b32 low, bytes, 0, 0x4140; prmt.b32 high, bytes, 0, 0x4342; "
    "fma.rn.bf16x2 low, low, power, bias; fma.rn.bf16x2 high, high, power, bias; "
    "mul.rn.bf16x2 $0, low, unit; mul.rn.bf16x2 $1, high, unit; }"
)


class MemRef(NamedTuple):
    """An array in device memory, as Pallas passes it."""

    memref: ir.Value
    dtype: np.dtype


class Register:
    """A lane's integer, float or predicate, with the operators of `values`."""

    __slots__ = ("ir",)

    def __init__(self, value: ir.Value) -> None:
        self.ir = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.ir.type, ir.FloatType)

    def meet(self, other: Operand) -> ir.Value:
        """`other` as an operand beside this one: a constant has its type."""
        return mgpu.c(other, self.ir.type) if isinstance(other, int) else _of(other).ir

    def _do(self, op: _Op, other: Operand) -> "Register":
        return Register(op(self.ir, self.meet(other)))

    def __add__(self, other: Operand) -> "Register":
        return self._do(arith.addf if self.is_float else arith.addi, other)

    def __sub__(self, other: Operand) -> "Register":
        return self._do(arith.subi, other)

    def __mul__(self, other: Operand) -> "Register":
        return self._do(arith.mulf if self.is_float else arith.muli, other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Operand) -> "Register":
        return Register(self.meet(other)) - self

    def __floordiv__(self, other: Operand) -> "Register":
        return self._do(arith.divui, other)

    def __mod__(self, other: Operand) -> "Register":
        return self._do(arith.remui, other)

    def __and__(self, other: Operand) -> "Register":
        return self._do(arith.andi, other)

    def __or__(self, other: Operand) -> "Register":
        return self._do(arith.ori, other)

    def __xor__(self, other: Operand) -> "Register":
        return self._do(arith.xori, other)

    def __lshift__(self, other: Operand) -> "Register":
        return self._do(arith.shli, other)

    def __rshift__(self, other: Operand) -> "Register":
        return self._do(arith.shrui, other)

    def __invert__(self) -> "Register":
        return self._do(arith.xori, True)

    def _compare(self, how: arith.CmpIPredicate, other: Operand) -> "Register":
        return Register(arith.cmpi(how, self.ir, self.meet(other)))

    def __lt__(self, other: Operand) -> "Register":
        return self._compare(arith.CmpIPredicate.slt, other)

    def __ge__(self, other: Operand) -> "Register":
        return self._compare(arith.CmpIPredicate.sge, other)

    def equals(self, other: Operand) -> "Register":
        return self._compare(arith.CmpIPredicate.eq, other)


def _of(value: Int | Real | Flag) -> Register:
    """A kernel's values are this machine's own."""
    return cast(Register, value)


def _vector(first: int, words: int) -> tuple[str, str]:
    """PTX's type of so many words, and their operands."""
    names = ", ".join(f"${first + n}" for n in range(words))
    return ("b32", names) if words == 1 else (f"v{words}.b32", f"{{{names}}}")


def _flag(where: Flag) -> Register:
    """A predicate as an operand of PTX, which takes no single bits."""
    return Register(arith.extui(ir.IntegerType.get_signless(32), _of(where).ir))


def _does(text: str, *args: Int | Real | Flag) -> None:
    """Emits PTX that is there for its effect."""
    _ptx(text, *(_of(arg).ir for arg in args), convergent=True)


def _gives(
    text: str, types: tuple[ir.Type, ...], *args: Int | Real | Flag, effects: bool = False
) -> list[Register]:
    """Emits PTX for its results; with `effects` it stays where it is, used or not."""
    out = _ptx(
        text, *(_of(arg).ir for arg in args), result_types=types if len(types) > 1 else types[0],
        has_side_effects=effects, convergent=effects,
    )  # fmt: skip
    return [Register(one) for one in (out if isinstance(out, tuple) else (out,))]


def take_over_start() -> bool:
    """Removes Mosaic's wait at a kernel's start, until all blocks of the cluster have begun.

    Returns whether there was one. `Gpu.begun` then waits instead, before the first push. A block
    that pushes nothing may end without waiting: the hardware counts it as arrived.
    """
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


class Gpu:
    """Emits an instruction or a few for each method; `values.Machine` says what they do."""

    def __init__(self, shared: ir.Value, *, begins: bool = True) -> None:
        """The lanes of a block, with `shared` as its shared memory. `begins`: the machine is all of
        the kernel, and `begun` says when to wait for the cluster; else Mosaic waits at the start.
        """
        self._i32 = ir.IntegerType.get_signless(32)
        self._i64 = ir.IntegerType.get_signless(64)
        self._f32 = ir.F32Type.get()
        pointer = mgpu.utils.memref_ptr(shared)
        self._shared = Register(llvm.ptrtoint(self._i32, pointer))
        [self._tid] = _gives("mov.u32 $0, %tid.x;", (self._i32,))
        self._waits = begins and take_over_start()

    @property
    def tid(self) -> Register:
        return self._tid

    # -------------------------------------------------------------------------------- arithmetic

    def uniform(self, value: mgpu.FragmentedArray) -> Register:
        """A scalar of Pallas."""
        return Register(value.registers.item())

    def integer(self, value: int) -> Register:
        return Register(mgpu.c(value, self._i32))

    def real(self, value: float) -> Register:
        return Register(mgpu.c(value, self._f32))

    def select(self, where: Flag, a: Chosen, b: Chosen | int) -> Chosen:
        chosen = Register(arith.select(_of(where).ir, _of(a).ir, _of(a).meet(b)))
        return cast(Chosen, chosen)

    def minimum(self, a: Int, b: Number) -> Register:
        return Register(arith.minsi(_of(a).ir, _of(a).meet(b)))

    def equal(self, a: Int, b: Number) -> Register:
        return _of(a).equals(b)

    def fma(self, a: Real, b: Real, c: Real) -> Register:
        return Register(llvm.intr_fma(_of(a).ir, _of(b).ir, _of(c).ir))

    def ones(self, word: Int) -> Register:
        return Register(mlir_math.ctpop(_of(word).ir))

    def as_word(self, value: Real) -> Register:
        return Register(arith.bitcast(self._i32, _of(value).ir))

    def as_real(self, word: Int) -> Register:
        return Register(arith.bitcast(self._f32, _of(word).ir))

    def pack(self, low: Real, high: Real, dtype: np.dtype) -> Register:
        kind = _PTX_TYPE[dtype.name]
        [word] = _gives(f"cvt.rn.{kind}x2.f32 $0, $2, $1;", (self._i32,), low, high)
        return word

    def unpack(self, word: Int, dtype: np.dtype) -> list[Real]:
        if dtype.name == "bfloat16":
            return [self.as_real(word << 16), self.as_real(word & -65536)]
        text = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
            "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        return [*_gives(text, (self._f32, self._f32), word)]

    def widen(self, word: Int, dtype: np.dtype) -> list[Int]:
        if dtype == np.int8:
            return [*_gives(WIDENS_INT8, (self._i32, self._i32), word)]
        power = self.integer(0x7B807B80)  # 2^120, twice
        return [one for text in WIDENS_FLOAT8 for one in _gives(text, (self._i32,), word, power)]

    def mma(self, acc: list[Real], a: list[Int], b: list[Int], dtype: np.dtype) -> list[Real]:
        kind = _PTX_TYPE[dtype.name]
        text = (
            "{ .reg .b32 zero; .reg .f32 low, high; mov.b32 zero, 0; mov.b32 low, 0; "
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, low, high}, {$2, zero, $3, zero}, {$4, $5}, {$6, $7, low, low}; }"
        )
        return [*_gives(text, (self._f32, self._f32), *a, *b, *acc)]

    def ballot(self, where: Flag) -> Register:
        text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        [lanes] = _gives(text, (self._i32,), _flag(where), effects=True)
        return lanes

    def match(self, word: Int) -> Register:
        text = "match.any.sync.b32 $0, $1, 0xffffffff;"
        [lanes] = _gives(text, (self._i32,), word, effects=True)
        return lanes

    # ----------------------------------------------------------------------------- device memory

    def address(self, ref: Ref, row: Int, stride: int) -> Address:
        memref, dtype = cast(MemRef, ref)
        row64 = arith.extui(self._i64, _of(row).ir)
        step = mgpu.c(stride * dtype.itemsize, self._i64)
        base = llvm.ptrtoint(self._i64, mgpu.utils.memref_ptr(memref))
        return Address(Register(arith.addi(base, arith.muli(row64, step))), dtype)

    def ahead(self, address: Address, offset: Number) -> Address:
        return address._replace(first=self._at(address, offset))

    def _at(self, address: Address, offset: Number) -> Register:
        first = _of(address.first)
        if isinstance(offset, int):
            return first + offset * address.dtype.itemsize
        wide = Register(arith.extui(self._i64, _of(offset).ir))
        return first + wide * address.dtype.itemsize

    def load(
        self, address: Address, offset: Number, where: Flag, *, fixed: bool = True
    ) -> Register:
        kind = "global.nc" if fixed else "global"
        # Volatile, lest it be moved to where its value is used.
        loaded = llvm.inline_asm(
            self._i32,
            [self._at(address, offset).ir, _flag(where).ir],
            f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.{kind}.b32 $0, [$1]; }}",
            "=&r,l,r",
            has_side_effects=True,
        )
        return Register(loaded)

    def store(self, address: Address, offset: Number, words: Sequence[Int], where: Flag) -> None:
        if len(words) > 4:
            for first in range(0, len(words), 4):
                element = first * 4 // address.dtype.itemsize
                self.store(address, offset + element, words[first : first + 4], where)
            return
        self._put("global", self._at(address, offset), words, where)

    # ----------------------------------------------------------------------------- shared memory

    def _word(self, word: Number) -> Register:
        return self._shared + word * 4

    def copy(self, word: Number, address: Address, offset: Number, where: Flag) -> None:
        size = _flag(where) * 16
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        _does(text, self._word(word), self._at(address, offset), size)

    def commit(self) -> None:
        _does("cp.async.commit_group;")

    def arrived(self, pending: int) -> None:
        _does(f"cp.async.wait_group {pending};")

    def get(self, word: Number, count: int) -> list[Int]:
        kind, names = _vector(0, count)
        text = f"ld.shared.{kind} {names}, [${count}];"
        return [*_gives(text, (self._i32,) * count, self._word(word), effects=True)]

    def put(self, word: Number, words: Sequence[Int], where: Flag | None = None) -> None:
        self._put("shared", self._word(word), words, where)

    def peek(self, block: int, word: Number, count: int) -> list[Int]:
        kind, names = _vector(0, count)
        there = self._there(self.integer(block), word)
        text = f"ld.shared::cluster.{kind} {names}, [${count}];"
        return [*_gives(text, (self._i32,) * count, there, effects=True)]

    def push(self, block: Int, word: Number, words: Sequence[Int], where: Flag) -> None:
        # Not `st.async`, which would need no barrier of the cluster: the receiver counts each 16
        # bytes, one after the other. H100, T=64, 64 adapters of R=128: 79 us so, 58 with this.
        self._put("shared::cluster", self._there(block, word), words, where)

    def _there(self, block: Int, word: Number) -> Register:
        """Where another block has a word, as an address of the cluster."""
        text = "mapa.shared::cluster.u32 $0, $1, $2;"
        [there] = _gives(text, (self._i32,), self._word(word), block)
        return there

    def _put(self, space: str, place: Int, words: Sequence[Int], where: Flag | None) -> None:
        kind, names = _vector(1, len(words))
        store, args = f"st.{space}.{kind} [$0], {names};", [place, *words]
        if where is not None:
            store = f"{{ .reg .pred p; setp.ne.b32 p, ${len(args)}, 0; @p {store} }}"
            args.append(_flag(where))
        _does(store, *args)

    # ------------------------------------------------------------------------------------- order

    def begun(self) -> None:
        # Mosaic's own wait comes before anything that we do; a load may as well be on its way.
        if self._waits:
            self._waits = False
            _does("barrier.cluster.wait.aligned;")

    def barrier(self) -> None:
        _does("bar.sync 0;")

    def warp_barrier(self) -> None:
        _does("bar.warp.sync 0xffffffff;")

    def cluster_barrier(self) -> None:
        _does("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;")

    def leave(self, where: Flag) -> None:
        _does("{ .reg .pred p; setp.ne.b32 p, $0, 0; @p exit; }", _flag(where))

    def when(self, where: Flag, do: Callable[[], None]) -> None:
        branch = scf.IfOp(_of(where).ir)
        with ir.InsertionPoint(branch.then_block):
            do()
            scf.yield_([])

    def loop(
        self, count: Number, do: Callable[[Int, list[Carry]], list[Carry]], carry: list[Carry]
    ) -> list[Carry]:
        stop = mgpu.c(count, self._i32) if isinstance(count, int) else _of(count).ir
        body = scf.ForOp(
            mgpu.c(0, self._i32), stop, mgpu.c(1, self._i32), [_of(value).ir for value in carry]
        )
        with ir.InsertionPoint(body.body):
            values = cast(list[Carry], [Register(value) for value in body.inner_iter_args])
            done = do(Register(body.induction_variable), values)
            scf.yield_([_of(value).ir for value in done])
        return cast(list[Carry], [Register(result) for result in body.results])
