"""What the lanes of a cluster's warps do, one instruction at a time: the interface of a machine.

The decode kernel is written once, against `Machine`. `gpu.Gpu` emits an instruction for each
method; `emulator.Emulator` carries it out in numpy for all lanes of a cluster at once. Pallas has
no such level: its arrays belong to whole warpgroups, so a lane can neither gather rows nor load an
operand of `mma` from where it lies.

A word is 32 bits: an integer, a float32, or two halves. Shared memory is counted in words, device
memory in elements of its arrays.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np


class Flag(Protocol):
    """A predicate of each lane."""

    def __and__(self, other: "Flag", /) -> "Flag": ...
    def __or__(self, other: "Flag", /) -> "Flag": ...
    def __invert__(self) -> "Flag": ...


class Real(Protocol):
    """A float32 of each lane."""

    def __add__(self, other: "Real", /) -> "Real": ...
    def __mul__(self, other: "Real", /) -> "Real": ...


class Int(Protocol):
    """An integer of each lane, or a word as it is. Division and shifts take it as unsigned."""

    def __add__(self, other: "Int | int", /) -> "Int": ...
    def __radd__(self, other: int, /) -> "Int": ...
    def __sub__(self, other: "Int | int", /) -> "Int": ...
    def __rsub__(self, other: int, /) -> "Int": ...
    def __mul__(self, other: "Int | int", /) -> "Int": ...
    def __rmul__(self, other: int, /) -> "Int": ...
    def __floordiv__(self, other: "Int | int", /) -> "Int": ...
    def __mod__(self, other: "Int | int", /) -> "Int": ...
    def __and__(self, other: "Int | int", /) -> "Int": ...
    def __or__(self, other: "Int | int", /) -> "Int": ...
    def __xor__(self, other: "Int | int", /) -> "Int": ...
    def __lshift__(self, other: "Int | int", /) -> "Int": ...
    def __rshift__(self, other: "Int | int", /) -> "Int": ...
    def __lt__(self, other: "Int | int", /) -> Flag: ...
    def __ge__(self, other: "Int | int", /) -> Flag: ...


# What an operator of a machine's own values may meet.
Operand = Int | Real | Flag | int
# A number that is alike in all lanes and known when the kernel is traced, or a lane's own.
Number = Int | int
Carry = TypeVar("Carry", Int, Real)
Chosen = TypeVar("Chosen", Int, Real)


class Ref(Protocol):
    """An array in device memory."""

    @property
    def dtype(self) -> np.dtype: ...


class Address(NamedTuple):
    """A place in device memory, in bytes; offsets from it count elements."""

    first: Int
    dtype: np.dtype


class Machine(Protocol):
    """The lanes of a cluster, as `gpu.Gpu` and `emulator.Emulator` have them."""

    @property
    def tid(self) -> Int:
        """A lane's number in its block."""

    # -------------------------------------------------------------------------------- arithmetic

    def integer(self, value: int, /) -> Int: ...
    def real(self, value: float, /) -> Real: ...
    def select(self, where: Flag, a: Chosen, b: Chosen | int, /) -> Chosen: ...
    def minimum(self, a: Int, b: Number, /) -> Int: ...
    def equal(self, a: Int, b: Number, /) -> Flag: ...

    def fma(self, a: Real, b: Real, c: Real, /) -> Real:
        """a b + c, rounded once. The emulator rounds a b too: it must be exact, as of halves."""

    def ones(self, word: Int, /) -> Int:
        """How many of its bits are set."""

    def as_word(self, value: Real, /) -> Int:
        """The same 32 bits."""

    def as_real(self, word: Int, /) -> Real:
        """The same 32 bits."""

    def pack(self, low: Real, high: Real, dtype: np.dtype, /) -> Int:
        """Two halves of `dtype` in one word, rounded to the nearest."""

    def unpack(self, word: Int, dtype: np.dtype, /) -> list[Real]:
        """The low half of a word and the high one."""

    def widen(self, word: Int, dtype: np.dtype, /) -> list[Int]:
        """Four numbers of a `dtype` of 8 bits as two words of bfloat16, exactly; no NaN."""

    def mma(self, acc: list[Real], a: list[Int], b: list[Int], dtype: np.dtype, /) -> list[Real]:
        """acc + a b by m16n8k16. a and acc are the upper 8 rows; the lower ones are zero."""

    def ballot(self, where: Flag, /) -> Int:
        """The lanes of the warp, as bits, where it holds."""

    def match(self, word: Int, /) -> Int:
        """The lanes of the warp, as bits, that have the same word."""

    # ----------------------------------------------------------------------------- device memory

    def address(self, ref: Ref, row: Int, stride: int, /) -> Address:
        """The first element of a row of `stride` elements."""

    def ahead(self, address: Address, offset: Number, /) -> Address:
        """So many elements further on."""

    def load(self, address: Address, offset: Number, where: Flag, /, *, fixed: bool = True) -> Int:
        """The word there; zero where not `where`. `fixed`: nobody writes it."""

    def store(
        self, address: Address, offset: Number, words: Sequence[Int], where: Flag, /
    ) -> None: ...

    # ----------------------------------------------------------------------------- shared memory

    def copy(self, word: Number, address: Address, offset: Number, where: Flag, /) -> None:
        """Starts to copy 16 bytes, or zeros where not `where`. `arrived` waits for them."""

    def commit(self) -> None:
        """Closes this lane's group of copies."""

    def arrived(self, pending: int, /) -> None:
        """Waits for this lane's groups of copies; the last `pending` may still be on their way."""

    def get(self, word: Number, count: int, /) -> list[Int]: ...
    def put(self, word: Number, words: Sequence[Int], where: Flag | None = None, /) -> None: ...

    def peek(self, block: int, word: Number, count: int, /) -> list[Int]:
        """`get` from the shared memory of another block of the cluster, after its barrier."""

    def push(self, block: Int, word: Number, words: Sequence[Int], where: Flag, /) -> None:
        """`put` into the shared memory of another block of the cluster."""

    # ------------------------------------------------------------------------------------- order

    def barrier(self) -> None:
        """All lanes of the block are here, and see what each has put."""

    def warp_barrier(self) -> None:
        """All lanes of the warp are here, and see what each has put or had copied."""

    def cluster_barrier(self) -> None:
        """All lanes of the cluster are here, and what they pushed."""

    def begun(self) -> None:
        """All blocks of the cluster have begun, so that they may be pushed to."""

    def leave(self, where: Flag, /) -> None:
        """Ends the blocks where it holds. It must be the same for all lanes of a cluster."""

    def when(self, where: Flag, do: Callable[[], None], /) -> None:
        """do() in the warps where it holds. It must be the same for all lanes of a warp."""

    def loop(
        self, count: Number, do: Callable[[Int, list[Carry]], list[Carry]],
        carry: list[Carry], /,
    ) -> list[Carry]:  # fmt: skip
        """carry = do(i, carry) for i in range(count), the same count for all lanes of a warp."""
