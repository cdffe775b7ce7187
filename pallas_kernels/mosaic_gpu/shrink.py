"""v = scale * x @ A[i].T: a cluster per 64 or 128 tokens splits H, sums through shared memory."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.mosaic_gpu.config import (
    MAX_COLUMNS,
    MULTIPROCESSORS,
    SPLIT_UNIT,
    TILE,
    Config,
    rank_width,
)
from pallas_kernels.mosaic_gpu.tiles import (
    ROWS,
    accumulator,
    cluster_barrier,
    copy_route,
    interpreted,
    operand_layout,
    operand_rows,
    pieces,
    plain_layout,
    route_copies,
    route_memory,
    routes,
    row_mask,
    shared_bytes,
    store_rows,
)
from pallas_kernels.segments import Segments

# Shared memory of a block that pipeline and output may fill, and that these may fill together with
# the routes, in whole KiB; there are 227 KiB in all.
_PIPELINE_BYTES = 208 * 1024
_SHARED_BYTES = 226 * 1024
# Columns of H, of all planes, that the tensor cores add up. They round towards zero, so that the
# error grows with the number of additions (H100: 1.8e-5 of v after 16384 columns): spans are added
# in float32.
_SPAN = 2048


class ShrinkPart(NamedTuple):
    """One stack: lora_a `[L, R, H]`, scales `[1]` or `[S]`, of which the stack has L from
    `first_scale` on, the tokens' adapters, and v's dtype."""

    lora_a: Float[Array, "L R H"]
    scales: Float[Array, " S"]
    segments: Segments
    dtype: DTypeLike
    config: Config
    first_scale: int = 0


def shrink_kernel(
    x: Float[Array, "P T H"], parts: tuple[ShrinkPart, ...], num_tokens: int, *, zero_rows: bool
) -> list[Array]:
    """v of each part, summed over the planes of x. T is `num_tokens` or padded.

    Returns one array per part: `[num_tokens, R]` in float32; in half precision, as the expand takes
    it, `[operand_rows, max(R, 16)]`; in interpret mode `[split, num_tokens, R]`, float32 partial
    sums. Rows of -1 are zero if `zero_rows` (not in interpret mode), else undefined.
    """
    planes, _, features = x.shape
    twin = interpreted()  # no peer's shared memory there: partial sums go through device memory
    split = min(part.config.split for part in parts)
    share = -(-features // (SPLIT_UNIT * split)) * SPLIT_UNIT
    widths = [rank_width(p.lora_a.shape[1], p.config.rank_block) for p in parts]
    row_tiles = min(min(p.config.row_tiles for p in parts), MAX_COLUMNS // max(widths))
    rows = row_tiles * TILE  # tokens of a block
    tiles = -(-num_tokens // rows)
    rank_blocks = [p.lora_a.shape[1] // width for p, width in zip(parts, widths)]
    chunks = [p.config.chunks for p in parts]
    most = MAX_COLUMNS // row_tiles
    stacks = [min(p.config.stack, most // width) for p, width in zip(parts, widths)]
    wides = [stack * width for stack, width in zip(stacks, widths)]
    dtypes = [jnp.dtype(jnp.float32 if twin else part.dtype) for part in parts]
    # A block without peers puts out all of its rows, others one tile, where those they own are.
    alone = twin or split == 1
    out_rows = rows if alone else TILE
    out_memory = [_out_memory(out_rows, max(16, width), of) for width, of in zip(widths, dtypes)]
    out_bytes = max(shared_bytes(itertools.chain(*memory)) for memory in out_memory)
    routes_bytes = shared_bytes(route_memory(p.segments, rows) for p in parts)
    room = min(_PIPELINE_BYTES, _SHARED_BYTES - routes_bytes) - out_bytes

    def fit(ranks: int) -> int:
        """Columns of H in a pipeline with so many rows of A, at most."""
        return room // ((planes * rows + ranks) * x.dtype.itemsize)

    # Of several planes a block's are added one after the other: there block_k is part of the order,
    # which must not follow from how much fits.
    block_k = 128 if planes == 1 and fit(max(wides)) >= 2 * 128 else 64
    steps = share // block_k

    def stages_of(ranks: int) -> int:
        return min(max(p.config.stages for p in parts), fit(ranks) // block_k, steps)

    span_steps = _SPAN // (planes * block_k)
    arrivals = planes + max(stacks)
    blocks = [chunk * rank_block for chunk, rank_block in zip(chunks, rank_blocks)]
    # Where tiles alone keep most multiprocessors busy, a tile's blocks take part after part: with a
    # block for each, most would start, find that their tile has none of their adapters, and end.
    in_turn = tiles * split > MULTIPROCESSORS * 3 // 4
    firsts = [0 if in_turn else sum(blocks[:i]) for i in range(len(parts))]

    outs = []
    for part in parts:
        rank = part.lora_a.shape[1]
        if twin:
            outs.append(jax.ShapeDtypeStruct((split, num_tokens, rank), jnp.float32))
        elif part.dtype == jnp.float32:
            outs.append(jax.ShapeDtypeStruct((num_tokens, rank), jnp.float32))
        else:
            outs.append(jax.ShapeDtypeStruct((operand_rows(num_tokens), max(rank, 16)), part.dtype))

    def body(x_ref: Any, *refs: Any) -> None:
        inputs = [refs[3 * i : 3 * i + 3] for i in range(len(parts))]
        *out_refs, loaded, tile_routes = refs[3 * len(parts) :]
        tile, block = lax.axis_index("tile"), lax.axis_index("block")
        runs = [(block >= n) & (block < n + count) for n, count in zip(firsts, blocks)]
        # All routes are on their way before the first is waited for.
        for run, (*_, route_ref), (route, arrived) in zip(runs, inputs, tile_routes):
            pl.when(run)(functools.partial(copy_route, route_ref, tile, route, arrived))
        for i, run in enumerate(runs):
            refs_of_part = x_ref, *inputs[i][:2], *tile_routes[i], out_refs[i], loaded
            pl.when(run)(functools.partial(part_body, i, block - firsts[i], *refs_of_part))

    def part_body(
        i: int, block: Array, x_ref: Any, a_ref: Any, scale_ref: Any, route: Any,
        route_loaded: Any, v_ref: Any, loaded: Any,
    ) -> None:  # fmt: skip
        stack, width, dtype = stacks[i], widths[i], outs[i].dtype
        tile, me = lax.axis_index("tile"), lax.axis_index("split")
        per_chunk = jnp.int32(rank_blocks[i])
        chunk, rank_start = lax.div(block, per_chunk), lax.rem(block, per_chunk) * width
        row_start, k_start = tile * rows, me * share
        row_width = width if rank_blocks[i] > 1 else outs[i].shape[-1]
        cut = pieces(row_width, dtype.itemsize)
        own = rows if twin else rows // split  # rows that this block writes
        out_start = 0 if out_rows == rows else lax.div(me * own, jnp.int32(TILE)) * TILE

        def with_memory(out_smem: Any) -> None:
            plgpu.barrier_wait(route_loaded)
            ids = plgpu.load(route.at[pl.ds(0, rows)], layout=ROWS)

            def partial_v(adapters: list[Array], x_smem: Any, a_smem: Any) -> Array:
                """This block's share of H: each row's sum with its own adapter, scaled, or zero."""
                stages, wide = x_smem.shape[0], a_smem.shape[1]

                def fetch(k: Array | int, slot: Array | int) -> None:
                    barrier, columns = loaded.at[slot], pl.ds(k_start + k * block_k, block_k)
                    for p in range(planes):
                        plgpu.copy_gmem_to_smem(
                            x_ref.at[p, pl.ds(row_start, rows), columns],
                            x_smem.at[slot, p],
                            barrier,
                        )
                    for j, adapter in enumerate(adapters):

                        @pl.when(adapter >= 0)
                        def _(j: int = j, adapter: Array = adapter) -> None:
                            plgpu.copy_gmem_to_smem(
                                a_ref.at[adapter, pl.ds(rank_start, width), columns],
                                a_smem.at[slot, pl.ds(j * width, width)],
                                barrier,
                            )

                        pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(barrier))
                    for _i in range(planes + len(adapters), arrivals):
                        plgpu.barrier_arrive(barrier)

                def step(acc: Any, k: Array) -> None:
                    slot = lax.rem(jnp.int32(k), jnp.int32(stages))
                    plgpu.barrier_wait(loaded.at[slot])
                    for p in range(planes):
                        plgpu.wgmma(acc, x_smem.at[slot, p], a_smem.at[slot].T)
                    if steps > stages:
                        # This step still reads its slot; the next copy goes to that of the step
                        # before it. With one stage it is the same slot, so this one must be done.
                        running = min(1, stages - 1)
                        plgpu.wgmma_wait(planes * running)
                        ahead = k + (stages - running)
                        pl.when((k >= running) & (ahead < steps))(
                            lambda: fetch(ahead, lax.rem(jnp.int32(ahead), jnp.int32(stages)))
                        )

                def span(n: Array | int, total: Array) -> Array:
                    """`total` and the next `span_steps` steps, which the tensor cores add up."""

                    def product(acc: Any) -> Array:
                        start = n * span_steps
                        stop = jnp.minimum(start + span_steps, steps)
                        lax.fori_loop(start, stop, lambda k, _: step(acc, k), None)
                        return acc[...]

                    return total + pl.run_scoped(product, accumulator(rows, wide))

                for k in range(stages):
                    fetch(k, k)
                zeros = jnp.zeros((rows, wide), jnp.float32)
                if steps <= span_steps:
                    products = span(0, zeros)
                else:
                    products = lax.fori_loop(0, -(-steps // span_steps), span, zeros)
                v = jnp.zeros((rows, width), jnp.float32)
                for j, adapter in enumerate(adapters):
                    slot = jnp.maximum(adapter, 0) if scale_ref.shape[0] > 1 else 0
                    scale = scale_ref[parts[i].first_scale + slot]
                    mine = products[:, j * width : (j + 1) * width] * scale
                    v = jnp.where(row_mask(ids, adapter, width), mine, v)
                return v

            # Then a row without an adapter in this round has none: whole tiles may be stored.
            whole = (route[rows] <= stack) & (outs[i].shape[-2] > 1)

            def stage_out(v: Array) -> None:
                v = v.astype(dtype)
                if row_width > width:  # rank 8 in half precision: the expand's K is 16
                    v = jnp.concatenate([v, jnp.zeros_like(v)], axis=1)
                for (first, size), (piece, *tile) in zip(cut, out_smem):
                    columns = v[:, first : first + size]
                    by_row = functools.partial(store_rows, piece.at[:, pl.ds(0, size)], columns)
                    if tile:
                        pl.when(whole)(functools.partial(store_rows, tile[0], columns))
                        pl.when(jnp.logical_not(whole))(by_row)
                    else:
                        by_row()

            def exchange(v: Array, part_smem: Any) -> None:
                """Sums what the cluster's blocks have, in their order: of a tile, all rows."""
                for start, piece in zip(range(0, rows, TILE), part_smem):
                    piece[...] = v[start : start + TILE]
                cluster_barrier()
                # A peer's memory cannot be sliced (JAX 0.11), so each tile has its own.
                for start, piece in zip(range(0, rows, TILE), part_smem):

                    @pl.when(out_start == start)
                    def _(piece: Any = piece) -> None:
                        peers = [plgpu.cluster_ref(piece, {"split": s}) for s in range(split)]
                        loads = [plgpu.load(peer, layout=plgpu.Layout.WGMMA) for peer in peers]
                        stage_out(functools.reduce(jnp.add, loads))

                cluster_barrier()  # peers read part_smem until here

            def round_of(count: int, n: Array) -> None:
                adapters = [route[rows + 1 + n * stack + j] for j in range(count)]
                stages, wide = stages_of(count * width), count * width
                v = pl.run_scoped(
                    functools.partial(partial_v, adapters),
                    plgpu.SMEM((stages, planes, rows, block_k), x.dtype, transforms=layout),
                    plgpu.SMEM((stages, wide, block_k), x.dtype, transforms=layout),
                )
                if alone:
                    stage_out(v)
                else:
                    transforms = operand_layout(jnp.float32, width)
                    pl.run_scoped(
                        functools.partial(exchange, v),
                        [plgpu.SMEM((TILE, width), jnp.float32, transforms=transforms)] * row_tiles,
                    )
                plgpu.commit_smem()

                target = v_ref.at[me] if twin else v_ref
                first_row = 0 if twin else me * own

                def store_tile() -> None:
                    for (first, size), memory in zip(cut, out_smem):
                        plgpu.copy_smem_to_gmem(
                            memory[-1].at[pl.ds(first_row - out_start, own)],
                            target.at[
                                pl.ds(row_start + first_row, own), pl.ds(rank_start + first, size)
                            ],
                        )

                def store_row(r: Array, carry: None) -> None:
                    row = first_row + r
                    adapter = route[row]
                    mine = [(adapter == a) & (a >= 0) for a in adapters]
                    if zero_rows:
                        mine.append((adapter < 0) & (n == 0))

                    # TMA clips rows behind the last one, but not where there is one row in all.
                    @pl.when(
                        functools.reduce(jnp.logical_or, mine) & (row_start + row < num_tokens)
                    )
                    def _() -> None:
                        for (first, size), (piece, *_) in zip(cut, out_smem):
                            plgpu.copy_smem_to_gmem(
                                piece.at[pl.ds(row - out_start, 1), pl.ds(0, size)],
                                target.at[
                                    pl.ds(row_start + row, 1), pl.ds(rank_start + first, size)
                                ],
                            )

                pl.when(whole)(store_tile)
                pl.when(jnp.logical_not(whole))(lambda: lax.fori_loop(0, own, store_row, None))
                plgpu.wait_smem_to_gmem(0)

            def round_(n: Array) -> None:
                if stages_of(width) == stages_of(stack * width):
                    return round_of(stack, n)
                # Room for more adapters costs stages, and most tiles have one.
                is_one = route[rows] - n * stack <= 1
                pl.when(is_one)(functools.partial(round_of, 1, n))
                pl.when(~is_one)(functools.partial(round_of, stack, n))

            rounds = lax.div(route[rows] + (stack - 1), jnp.int32(stack))
            if zero_rows:
                rounds = jnp.maximum(rounds, 1)
            # The rounds chunk, chunk + chunks, ... are this block's.
            mine = lax.div(rounds - chunk + (chunks[i] - 1), jnp.int32(chunks[i]))
            lax.fori_loop(0, mine, lambda n, _: round_(chunk + n * chunks[i]), None)

        pl.run_scoped(
            with_memory,
            _out_memory(out_rows, row_width, dtype),
        )

    layout = operand_layout(x.dtype, math.gcd(features, 64))
    grid, names = (tiles, max(map(sum, zip(firsts, blocks)))), ("tile", "block")
    place: dict[str, Any] = dict(grid=grid, grid_names=names)
    if twin:
        place = dict(grid=(*grid, split), grid_names=(*names, "split"))
    else:
        place.update(cluster=(split,), cluster_names=("split",))
    ranks = "_".join(f"r{part.lora_a.shape[1]}" for part in parts)
    return plgpu.kernel(
        body,
        out_type=outs,
        scratch_types=[
            plgpu.Barrier(num_barriers=max(map(stages_of, widths)), num_arrivals=arrivals),
            [
                (
                    route_memory(p.segments, rows),
                    plgpu.Barrier(num_arrivals=route_copies(p.segments, rows)),
                )
                for p in parts
            ],
        ],
        kernel_name=f"lora_shrink_{ranks}",
        **place,
    )(x, *(array for p in parts for array in (p.lora_a, p.scales, routes(p.segments, rows))))


def _out_memory(rows: int, columns: int, dtype: Any) -> list[list[Any]]:
    """Per piece of the columns: to store row by row, and, if that is another array, whole tiles.
    TMA wants rows that it copies one by one 128 bytes apart, those of a tile side by side."""
    memory = []
    for _, size in pieces(columns, dtype.itemsize):
        nbytes = size * dtype.itemsize
        tile = plgpu.SMEM((rows, size), dtype, transforms=plain_layout(nbytes))
        by_row = plgpu.SMEM((rows, 128 // dtype.itemsize), dtype)
        memory.append([tile] if nbytes == 128 else [by_row, tile])
    return memory
