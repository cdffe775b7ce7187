"""y[t, offset:][:N] (+)= v[t] @ B[i].T: each block owns 64 tokens times a few columns of y."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.config import TILE, Config
from pallas_kernels.mosaic_gpu.tiles import (
    ADAPTERS,
    COUNT,
    ROWS,
    Cut,
    accumulator,
    cuts,
    in_place,
    operand_layout,
    pieces,
    plain_layout,
    row_mask,
)


class ExpandPart(NamedTuple):
    """One stack: v `[rows, max(R, 16)]` in B's dtype, lora_b `[L, N, R]`, routes, first column."""

    v: Float[Array, "rows K"]
    lora_b: Float[Array, "L N R"]
    routes: Int[Array, "tiles W"]
    y_offset: int
    config: Config


def expand_kernel(
    y: Float[Array, "T Ny"], parts: tuple[ExpandPart, ...], *, add_inputs: bool
) -> Float[Array, "T Ny"]:
    """y' in place where XLA can: y plus the float32 sum of the parts' products, rounded once."""
    tiles, itemsize = -(-y.shape[0] // TILE), y.dtype.itemsize
    block_n = min(part.config.block_n for part in parts)
    stages = max(part.config.expand_stages for part in parts)
    arrivals = max(part.config.expand_stack for part in parts)
    spans = cuts(tuple((p.y_offset, p.y_offset + p.lora_b.shape[1]) for p in parts))
    blocks = [-(-(cut.stop - cut.start) // block_n) for cut in spans]
    tile_arrivals = max(
        len(pieces(width, itemsize)) + 2 * len(cut.parts)
        for cut in spans
        for width in (min(block_n, cut.stop - cut.start), (cut.stop - cut.start) % block_n)
    )

    def body(y_ref: Any, *refs: Any) -> None:
        inputs = [refs[3 * i : 3 * i + 3] for i in range(len(parts))]
        tile_loaded, b_loaded = refs[-2:]
        tile, block = lax.axis_index("tile"), lax.axis_index("block")
        row_start = tile * TILE

        def columns_body(cut: Cut, width: int, nth: Array) -> None:
            column = cut.start + nth * block_n
            y_cut = pieces(width, itemsize)

            def y_piece(first: int, size: int) -> Any:
                return y_ref.at[pl.ds(row_start, TILE), pl.ds(column + first, size)]

            def with_tile(y_smem: Any, tile_smem: Any) -> None:
                for (first, size), piece in zip(y_cut, y_smem):
                    plgpu.copy_gmem_to_smem(y_piece(first, size), piece, tile_loaded)
                for i, (route, v_smem) in zip(cut.parts, tile_smem):
                    v_ref, _, route_ref = inputs[i]
                    plgpu.copy_gmem_to_smem(route_ref.at[tile], route, tile_loaded)
                    plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(row_start, TILE)], v_smem, tile_loaded)
                for _ in range(len(y_cut) + 2 * len(cut.parts), tile_arrivals):
                    plgpu.barrier_arrive(tile_loaded)
                plgpu.barrier_wait(tile_loaded)

                def update() -> None:
                    deltas, used = [], []
                    for i, (route, v_smem) in zip(cut.parts, tile_smem):
                        ids = plgpu.load(route.at[pl.ds(0, TILE)], layout=ROWS)
                        feature = column - parts[i].y_offset
                        b_ref, config = inputs[i][1], parts[i].config
                        deltas.append(
                            _delta(
                                v_smem,
                                b_ref,
                                ids,
                                route,
                                feature,
                                width,
                                b_loaded,
                                arrivals,
                                config,
                            )
                        )
                        used.append(ids >= 0)
                    delta = functools.reduce(jnp.add, deltas)
                    touched = functools.reduce(jnp.logical_or, used)
                    for (first, size), piece in zip(y_cut, y_smem):
                        old = plgpu.load(piece, layout=plgpu.Layout.WGMMA, optimized=False)
                        new = delta[:, first : first + size]
                        if add_inputs:
                            new = old.astype(jnp.float32) + new
                        mask = lax.broadcast_in_dim(touched, (TILE, size), (0,))
                        piece[...] = jnp.where(mask, new.astype(y.dtype), old)
                    plgpu.commit_smem()
                    for (first, size), piece in zip(y_cut, y_smem):
                        plgpu.copy_smem_to_gmem(piece, y_piece(first, size))
                    plgpu.wait_smem_to_gmem(0)

                counts = [route[COUNT] for route, _ in tile_smem]
                pl.when(functools.reduce(jnp.maximum, counts) > 0)(update)

            pl.run_scoped(
                with_tile,
                [
                    plgpu.SMEM((TILE, size), y.dtype, transforms=plain_layout(size * itemsize))
                    for _, size in y_cut
                ],
                [
                    (
                        plgpu.SMEM((parts[i].routes.shape[1],), jnp.int32),
                        plgpu.SMEM(
                            (TILE, parts[i].v.shape[1]),
                            parts[i].v.dtype,
                            transforms=operand_layout(parts[i].v.dtype, parts[i].v.shape[1]),
                        ),
                    )
                    for i in cut.parts
                ],
            )

        first = 0
        for cut, count in zip(spans, blocks):
            whole, rest = divmod(cut.stop - cut.start, block_n)
            if whole:
                run = functools.partial(columns_body, cut, block_n, block - first)
                pl.when((block >= first) & (block < first + whole))(run)
            if rest:
                run = functools.partial(columns_body, cut, rest, jnp.int32(whole))
                pl.when(block == first + whole)(run)
            first += count

    ranks = "_".join(f"r{part.lora_b.shape[2]}" for part in parts)
    kernel = plgpu.kernel(
        body,
        scratch_types=[
            plgpu.Barrier(num_arrivals=tile_arrivals),
            plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        ],
        grid=(tiles, sum(blocks)),
        grid_names=("tile", "block"),
        kernel_name=f"lora_expand_{ranks}",
    )
    [y] = in_place(kernel, (y,), *(array for part in parts for array in part[:3]))
    return y


def _delta(
    v_smem: Any, b_ref: Any, ids: Array, route: Any, first: Array, width: int, loaded: Any,
    arrivals: int, config: Config,
) -> Float[Array, "64 width"]:  # fmt: skip
    """Each row's product with features [first, first + width) of its adapter; zero without one."""
    rank, dtype, stages = b_ref.shape[2], b_ref.dtype, config.expand_stages
    stack = min(config.expand_stack, 256 // width)
    wide = stack * width
    rows = -(-wide // TILE) * TILE if rank == 8 else wide  # the WGMMA layout comes in 64 rows

    def with_b(b_smem: Any, wide_smem: Any = None) -> Array:
        def fetch(n: Array | int, slot: Array | int) -> None:
            barrier = loaded.at[slot]
            for j in range(stack):
                adapter = route[ADAPTERS + n * stack + j]

                @pl.when(adapter >= 0)
                def _(j: int = j, adapter: Array = adapter) -> None:
                    plgpu.copy_gmem_to_smem(
                        b_ref.at[adapter, pl.ds(first, width)],
                        b_smem.at[slot, pl.ds(j * width, width)],
                        barrier,
                    )

                pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(barrier))
            for _i in range(stack, arrivals):
                plgpu.barrier_arrive(barrier)

        rounds = lax.div(route[COUNT] + (stack - 1), jnp.int32(stack))
        for n in range(stages):
            pl.when(n < rounds)(functools.partial(fetch, n, n))

        def round_(n: Array, delta: Array) -> Array:
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(loaded.at[slot])
            operand = b_smem.at[slot]
            if rank == 8:
                # Rows of 16 bytes cannot be swizzled, and wgmma's K is 16: widen them with zeros.
                b = plgpu.load(operand, layout=plgpu.Layout.WGMMA, optimized=False)
                wide_smem[...] = jnp.concatenate([b, jnp.zeros_like(b)], axis=1)
                plgpu.commit_smem()
                operand = wide_smem.at[pl.ds(0, wide)]

            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, v_smem, operand.T)
                return acc[...]

            products = pl.run_scoped(product, accumulator(wide))
            for j in range(stack):
                mine = row_mask(ids, route[ADAPTERS + n * stack + j], width)
                delta = jnp.where(mine, products[:, j * width : (j + 1) * width], delta)
            pl.when(n + stages < rounds)(lambda: fetch(n + stages, slot))
            return delta

        return lax.fori_loop(0, rounds, round_, jnp.zeros((TILE, width), jnp.float32))

    if rank == 8:
        return pl.run_scoped(
            with_b,
            plgpu.SMEM((stages, rows, rank), dtype),
            plgpu.SMEM((rows, 16), dtype, transforms=operand_layout(dtype, 16)),
        )
    return pl.run_scoped(
        with_b, plgpu.SMEM((stages, wide, rank), dtype, transforms=operand_layout(dtype, rank))
    )
