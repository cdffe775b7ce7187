"""Stacks in 8 bits for the Mosaic kernels' tests, on CPU and on a device, with their oracle."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from mosaic_cases import indices, signed

import pallas_kernels as pk


@dataclasses.dataclass(frozen=True)
class Stack:
    """One part: `slots` adapters of a rank, from column `y_offset` on."""

    rank: int
    slots: int
    width: int
    first_slot: int = 0
    y_offset: int = 0


@dataclasses.dataclass(frozen=True)
class EightBitCase:
    """A call; the scales of all parts lie in one array, behind others that are NaN."""

    tokens: int
    features: int
    stacks: tuple[Stack, ...]
    popularity: str = "uniform"
    y_dtype: str = "bfloat16"
    dtype: str = "float8_e4m3fn"

    def __str__(self) -> str:
        ranks = "-".join(f"r{one.rank}x{one.slots}+{one.y_offset}" for one in self.stacks)
        return (
            f"T{self.tokens}-H{self.features}-{ranks}-{self.popularity}-{self.y_dtype}-{self.dtype}"
        )

    @property
    def columns(self) -> int:
        return max(one.y_offset + one.width for one in self.stacks)

    @property
    def ids(self) -> np.ndarray:
        total = max(one.first_slot + one.slots for one in self.stacks)
        return indices(self.popularity, self.tokens, total)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y."""
        rng = np.random.default_rng(1)
        x = signed(rng, (self.tokens, self.features), "bfloat16")
        return x, signed(rng, (self.tokens, self.columns), self.y_dtype)

    def parts(self) -> list[pk.LoRAPart]:
        rng, held = np.random.default_rng(2), []
        for one in self.stacks:
            a = signed(rng, (one.slots, one.rank, self.features), "float32", self.features**-0.5)
            b = signed(rng, (one.slots, one.width, one.rank), "float32", one.rank**-0.5)
            a *= np.exp2(rng.integers(-9, 9, (one.slots, one.rank, 1))).astype(np.float32)
            held.append(pk.quantised(a, b, rng.uniform(0.5, 2, one.slots), self.dtype))
        scales = [np.full(8, np.nan, np.float32), *(one.scales.reshape(-1) for one in held)]
        starts = np.cumsum([len(own) for own in scales])
        flat = np.concatenate(scales)
        return [
            pk.LoRAPart(q.lora_a, q.lora_b, flat, one.first_slot, one.y_offset, int(start))
            for q, one, start in zip(held, self.stacks, starts)
        ]


def as_shapes(parts: Sequence[pk.LoRAPart]) -> Any:
    """The operands that `parts_of` takes."""
    return [(part.lora_a, part.lora_b) for part in parts], np.asarray(parts[0].scales)


def parts_of(like: Sequence[pk.LoRAPart], operands: Any) -> list[pk.LoRAPart]:
    """`like` with other arrays, of a jitted function's arguments."""
    stacks, scales = operands
    return [
        dataclasses.replace(part, lora_a=a, lora_b=b, scales=scales)
        for part, (a, b) in zip(like, stacks)
    ]
