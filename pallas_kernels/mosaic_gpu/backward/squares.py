"""Squares: 64 x 64 elements of half precision, the unit of all copies and products of a backward
kernel.

A row of a square has 128 bytes, the widest swizzle. So a square lies in shared memory in the same
order whether TMA copies it as 64 rows, from any row on, or wgmma multiplies it as eight tiles of
eight rows; and wgmma takes it as either operand, transposed or not. Where an array ends inside of a
square, TMA fills in zeros, and stores nothing there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike

from pallas_kernels.mosaic_gpu.chip import TILE
from pallas_kernels.mosaic_gpu.layouts import (
    Memory,
    Ref,
    accumulator,
    interpreted,
    operand_layout,
    plain_layout,
)

SIDE = TILE
ROW_BYTES = 2 * SIDE


def squares_of(size: int) -> int:
    """How many squares `size` rows or columns take."""
    return -(-size // SIDE)


def squares(*shape: int, dtype: DTypeLike) -> Memory:
    """Shared memory of so many squares, to ask for; `Squares.of` takes what comes."""
    tiles = plgpu.SMEM((*shape, SIDE, SIDE), dtype, transforms=operand_layout(dtype, SIDE))
    if interpreted():  # it has neither tiles nor a second name for the same memory
        return tiles
    rows = plgpu.SMEM((*shape, SIDE, SIDE), dtype, transforms=plain_layout(ROW_BYTES))
    return plgpu.RefUnion(tiles, rows)


class Squares(NamedTuple):
    """Squares in shared memory, `[..., 64, 64]`, under two names: as `tiles` registers and wgmma
    take them, as `rows` TMA copies them, or any rows of one."""

    tiles: Ref
    rows: Ref

    @classmethod
    def of(cls, memory: Ref) -> "Squares":
        """What `squares` asked for."""
        return cls(memory, memory) if interpreted() else cls(*memory)


def accumulators(count: int) -> list[plgpu.WGMMAAccumulatorRef]:
    """Registers of the sums of so many squares."""
    return [accumulator(SIDE, SIDE)] * count


def take_steps(
    steps: Array | int,
    stages: int,
    products: int,
    fetch: Callable[[Array, Array], None],
    multiply: Callable[[Array, Array], None],
    close: Callable[[], None] = lambda: None,
) -> None:
    """A ring of at least two stages, or of one step.

    `fetch(k, slot)` starts the copies of step k. `multiply(k, slot)` waits for them, and starts so
    many products. `close()` follows each place for a fetch, whether there is one or not.
    """

    def first(k: Array, _: None) -> None:
        pl.when(k < steps)(lambda: fetch(k, k))
        close()

    def step(k: Array, _: None) -> None:
        multiply(k, lax.rem(k, jnp.int32(stages)))
        # These products still read their slot. Those before have ended, and theirs is free.
        plgpu.wgmma_wait(products)
        ahead = k + (stages - 1)
        pl.when((k > 0) & (ahead < steps))(lambda: fetch(ahead, lax.rem(ahead, jnp.int32(stages))))
        close()

    # int32 where 64 bits are enabled too, as all numbers of a kernel.
    lax.fori_loop(jnp.int32(0), jnp.int32(stages), first, None)
    lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, None)
