"""The PTX by which lanes widen bytes, carried out on NumPy's words: no emulator runs its text."""

import operator
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np


def run(text: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All registers behind `text`, in words; `operands` are those before it, as "$1".

    A product or sum of bfloat16 that would be rounded is an error.
    """
    registers = dict(operands)
    for line in filter(None, map(str.strip, text.strip("{} ").split(";"))):
        name, *names = re.split(r"[\s,]+", line)
        if name != ".reg":
            target, *sources = names
            words = [registers[n] if n in registers else _constant(n) for n in sources]
            registers[target] = _INSTRUCTIONS[name](*words)
    return registers


def _constant(text: str) -> np.ndarray:
    return np.uint32([int(text, 0)])


def _prmt(low: np.ndarray, high: np.ndarray, which: np.ndarray) -> np.ndarray:
    places = [int(which[0]) >> 4 * n & 15 for n in range(4)]
    assert max(places) < 8, "copies of a sign are not known here"
    both = low.astype(np.uint64) | high.astype(np.uint64) << 32
    picked = [(both >> 8 * place & 255) << 8 * n for n, place in enumerate(places)]
    return np.bitwise_or.reduce(picked).astype(np.uint32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    found = np.zeros_like(a | b | c)
    for n in (n for n in range(8) if int(table[0]) >> n & 1):
        found |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return found


def _halves(word: np.ndarray) -> np.ndarray:
    return word[..., None].view(ml_dtypes.bfloat16).astype(np.float64)


def _exactly(do: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`do`, of numbers, for words of two bfloat16."""

    def of_words(*words: np.ndarray) -> np.ndarray:
        wide = do(*map(_halves, words))
        found = wide.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found.astype(np.float64), wide)
        return found.view(np.uint32)[..., 0]

    return of_words


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda word: word,
    "and.b32": operator.and_,
    "xor.b32": operator.xor,
    "shr.u32": operator.rshift,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mul.rn.bf16x2": _exactly(operator.mul),
    "fma.rn.bf16x2": _exactly(lambda a, b, c: a * b + c),
}
