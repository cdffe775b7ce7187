"""y += scale * (x A^T) B^T in one launch: a cluster per few tokens that share adapters."""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]
from jax._src.lib.mlir.dialects import arith, gpu
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.chunks import Route, wgmma_columns
from pallas_kernels.mosaic_gpu.config import SPLIT_UNIT, TILE, Config
from pallas_kernels.mosaic_gpu.tiles import (
    cluster_barrier,
    cuts,
    in_place,
    interpreted,
    operand_layout,
    plain_layout,
    store_rows,
)

# Columns that the tensor cores add up before a sum moves to float32, as in the shrink.
_SPAN = 2048
_COLUMN = plgpu.Layout.WGMMA.reduce(0)
SHARED_BYTES = 220 * 1024
LINE = 128  # bytes


class FusedPart(NamedTuple):
    """One stack: lora_a `[L, R, H]`, lora_b `[L, N, R]`, scales `[1]` or `[L]`, first column."""

    lora_a: Float[Array, "L R H"]
    lora_b: Float[Array, "L N R"]
    scales: Float[Array, " S"]
    y_offset: int


def _push(value: Array, target: Any, me: Array, split: int) -> None:
    """target[me] = value in every block of the cluster: stores wait for nothing, loads would."""
    layout: Any = operand_layout(jnp.float32, value.shape[1])

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(layout), plgpu.Layout.WG_SPLAT)
    )
    def push(_: Any, value: Any, target: Any, me: Any) -> None:
        mine = mgpu.memref_slice(target, arith.index_cast(ir.IndexType.get(), me.registers.item()))
        for block in range(split):
            index = mgpu.c(block, ir.IndexType.get())
            peer = mgpu.utils.get_cluster_ref(mine, gpu.Dimension.x, index, generic=False)
            value.store_tiled(peer, swizzle=layout[1].swizzle, optimized=False)

    push(value, target, me)


class Plan(NamedTuple):
    """Sizes that follow from shapes and config."""

    tokens: int  # of a chunk
    columns: int  # of wgmma, for those tokens
    share: int  # of H, per block
    block_k: int
    a_stages: int
    tile: int  # columns of y
    b_stages: int
    y_slots: int


def whole_tiles(y: Array, tokens: int) -> bool:
    """Whether tiles of 8 rows cover x and y, as TMA wants them. Else rows are copied one by one."""
    if interpreted() and tokens % 8:  # no second view of shared memory there, for parts of a tile
        return False
    line = LINE // y.dtype.itemsize
    return (y.shape[0] % 8 == 0 or y.shape[0] < 8) and y.shape[1] % line == 0


def _stack(rank: int) -> int:
    """Adapters that fill wgmma's 64 rows."""
    return TILE // rank if rank <= 32 else 1


def _rank_blocks(rank: int) -> int:
    return -(-rank // TILE)


def plan(
    features: int, y_itemsize: int, parts: tuple[tuple[int, int, int], ...], config: Config
) -> Plan | None:
    """The sizes for parts of (R, N, y_offset); None if shared memory can't hold them."""
    spans = cuts(tuple((offset, offset + width) for _, width, offset in parts))
    edges = [edge * y_itemsize for cut in spans for edge in cut[:2]]
    # Rows of x and y come to shared memory in lines of 128 bytes, as TMA aligns its copies there.
    if config.tokens is None or (features * 2) % LINE or any(edge % LINE for edge in edges):
        return None
    columns = wgmma_columns(config.tokens)
    share = -(-features // (SPLIT_UNIT * config.split)) * SPLIT_UNIT
    block_k = min(config.block_k, share)
    if share % block_k:
        block_k = SPLIT_UNIT
    if any((cut.start - parts[i][2]) % 8 for cut in spans for i in cut.parts):
        return None  # B comes in tiles of 8 rows
    ranks = [rank for rank, _, _ in parts]
    if any(max(*ranks, 16) % rank for rank in ranks):
        return None  # slots for B of every rank share memory, and must lie alike
    fixed = 8 * 1024  # the route, barriers, alignment
    slots = sum(_rank_blocks(rank) for rank in ranks)  # of v: the block's sums, all blocks', v
    fixed += slots * TILE * columns * (4 + 4 * config.split + 2)
    blocks = config.split * config.column_clusters
    widest = max(cut.stop - cut.start for cut in spans)
    most = min(config.block_n, 256)  # TMA: a box has at most 256 rows
    tile = min(most, -(-widest // (blocks * TILE)) * TILE)
    a_stage = (TILE + columns) * block_k * 2
    while True:
        slot = tile * max(*ranks, 16) * 2
        y_slots = min(3, -(-widest // (tile * blocks)))
        y_bytes = y_slots * columns * tile * y_itemsize
        for a_stages in range(config.stages, 1, -1):
            room = SHARED_BYTES - fixed - a_stages * a_stage
            b_stages = min(config.expand_stages, (room // len(spans) - y_bytes) // slot)
            if b_stages >= 2:
                return Plan(
                    config.tokens, columns, share, block_k, a_stages, tile, b_stages, y_slots
                )
        if tile == TILE:
            return None
        tile = max(TILE, tile // 2 // TILE * TILE)


def fused_kernel(
    y: Float[Array, "T Ny"],
    x: Float[Array, "T H"],
    parts: tuple[FusedPart, ...],
    routes: Int[Array, "chunks W"],
    config: Config,
    sizes: Plan,
) -> Float[Array, "T Ny"]:
    """y' in place where XLA can: y plus the float32 sum of the parts' products, rounded once."""
    dtype, itemsize, twin = x.dtype, y.dtype.itemsize, interpreted()
    shapes = tuple((p.lora_a.shape[1], p.lora_b.shape[1], p.y_offset) for p in parts)
    split, blocks = config.split, config.split * config.column_clusters
    tokens, columns, tile, y_slots = sizes.tokens, sizes.columns, sizes.tile, sizes.y_slots
    a_stages, b_stages = sizes.a_stages, sizes.b_stages
    spot = Route(tokens, len(parts))
    ranks = [rank for rank, _, _ in shapes]
    rank_blocks = [_rank_blocks(rank) for rank in ranks]
    first_slot = list(itertools.accumulate(rank_blocks, initial=0))
    stacks = [_stack(rank) for rank in ranks]
    spans = cuts(tuple((offset, offset + width) for _, width, offset in shapes))
    block_k = sizes.block_k
    steps, span_steps = sizes.share // block_k, _SPAN // block_k
    x_line, y_line = LINE // 2, LINE // itemsize  # columns of a line
    y_lines = tile // y_line
    tiles = whole_tiles(y, tokens)

    def body(y_ref: Any, x_ref: Any, route_ref: Any, *refs: Any) -> None:
        inputs = [refs[3 * i : 3 * i + 3] for i in range(len(parts))]
        scratch = refs[3 * len(parts) :]
        route, a_smem, x_views, part_smem, all_smem, v_smem, cut_smem, *others = scratch
        route_loaded, a_loaded, x_loaded, x_rows_loaded, cut_barriers, *wide_smem = others
        x_smem = x_views[0]
        me, chunk = lax.axis_index("split"), lax.axis_index("chunk")
        block = lax.axis_index("columns") * split + me

        plgpu.copy_gmem_to_smem(route_ref.at[chunk], route, route_loaded)
        plgpu.barrier_wait(route_loaded)
        counts = [route[spot.count(p)] for p in range(len(parts))]
        run, scattered = route[spot.run] >= 0, route[spot.run] < 0
        run_start = pl.multiple_of(jnp.maximum(route[spot.run], 0), 8)

        def scale_of(p: int, k: Array | int) -> Array:
            scale_ref = inputs[p][2]
            adapter = jnp.maximum(route[spot.adapters(p) + k], 0)
            return scale_ref[adapter if scale_ref.shape[0] > 1 else 0]

        # Loaded one adapter ahead, these have arrived when they are used.
        first_scales = [scale_of(p, 0) for p in range(len(parts))]

        # ------------------------------------------------------------- v = x A^T, a share of H

        # A unit is a stack of adapters (or one, or 64 ranks of one): wgmma's 64 rows.
        units = [
            lax.div(count + (stack - 1), jnp.int32(stack)) * blocks_
            for count, stack, blocks_ in zip(counts, stacks, rank_blocks)
        ]
        first_unit = list(itertools.accumulate(units, initial=jnp.int32(0)))
        items = first_unit[-1] * steps

        def of_stack(unit: Array, do: Any) -> None:
            """do(p, j, adapter, rank_block) for the unit's adapters."""

            def of_part(p: int) -> None:
                local = unit - first_unit[p]
                nth, rank_block = lax.div(local, rank_blocks[p]), lax.rem(local, rank_blocks[p])
                for j in range(stacks[p]):
                    adapter = route[spot.adapters(p) + nth * stacks[p] + j]
                    pl.when(adapter >= 0)(functools.partial(do, p, j, adapter, rank_block))

            for p in range(len(parts)):
                mine = (unit >= first_unit[p]) & (unit < first_unit[p + 1])
                pl.when(mine)(functools.partial(of_part, p))

        def issue_a(i: Array, k_start: Array | int) -> None:
            unit, k, slot = lax.div(i, steps), lax.rem(i, steps), lax.rem(i, a_stages)
            column = k_start + k * block_k

            def weights(p: int, j: int, adapter: Array, rank_block: Array) -> None:
                height = min(ranks[p], TILE)
                plgpu.copy_gmem_to_smem(
                    inputs[p][0].at[
                        adapter, pl.ds(rank_block * TILE, height), pl.ds(column, block_k)
                    ],
                    a_smem.at[slot, pl.ds(j * height, height)],
                    a_loaded.at[slot * max(stacks) + j],
                )

            of_stack(unit, weights)

            def rows() -> None:
                def row(i: Array, _: None) -> None:
                    source = jnp.maximum(route[i], 0)
                    for n in range(block_k // x_line):
                        if twin:
                            target = x_smem.at[slot, pl.ds(i, 1), pl.ds(n * x_line, x_line)]
                        else:
                            at = slot * (columns // 8) + lax.div(i, 8)
                            at = at * (block_k // x_line) + n
                            target = x_views[1].at[pl.ds(at * 8 + lax.rem(i, 8), 1)]
                        plgpu.copy_gmem_to_smem(
                            x_ref.at[pl.ds(source, 1), pl.ds(column + n * x_line, x_line)],
                            target,
                            x_rows_loaded.at[slot],
                        )

                lax.fori_loop(0, tokens, row, None)

            tile_rows = functools.partial(
                plgpu.copy_gmem_to_smem,
                x_ref.at[pl.ds(run_start, columns), pl.ds(column, block_k)],
                x_smem.at[slot],
                x_loaded.at[slot],
            )
            by_run(tile_rows, rows)

        def by_run(whole: Any, rows: Any) -> None:
            if tiles:
                pl.when(run)(whole)
                pl.when(scattered)(rows)
            else:
                rows()

        def part_of(unit: Array, values: list[Any]) -> Any:
            chosen = values[0]
            for p in range(1, len(parts)):
                chosen = jnp.where(unit >= first_unit[p], jnp.int32(values[p]), chosen)
            return chosen

        def consume_unit(unit: Array, sums: Any, k_start: Array | int) -> None:
            local = unit - part_of(unit, first_unit[:-1])
            count = part_of(unit, rank_blocks)
            nth, rank_block = lax.div(local, count), lax.rem(local, count)
            slot = part_of(unit, first_slot[:-1]) + rank_block
            shift = part_of(
                unit, [min(r, TILE).bit_length() - 1 if s > 1 else 6 for r, s in zip(ranks, stacks)]
            )
            place = plgpu.load(
                route.at[pl.ds(part_of(unit, [spot.place(p) for p in range(len(parts))]), columns)],
                layout=_COLUMN,
            )
            row = plgpu.broadcasted_iota(jnp.int32, (TILE, columns), 0, layout=plgpu.Layout.WGMMA)
            nth_of_row = lax.shift_right_logical(
                row, jnp.full(row.shape, shift, jnp.int32)
            ) + nth * part_of(unit, stacks)
            mine = nth_of_row == lax.broadcast_in_dim(place, row.shape, (1,))

            def step(acc: Any, k: Array) -> None:
                i = unit * steps + k
                slot = lax.rem(i, a_stages)
                of_stack(
                    unit, lambda p, j, *_: plgpu.barrier_wait(a_loaded.at[slot * max(stacks) + j])
                )
                by_run(
                    lambda: plgpu.barrier_wait(x_loaded.at[slot]),
                    lambda: plgpu.barrier_wait(x_rows_loaded.at[slot]),
                )
                plgpu.wgmma(acc, a_smem.at[slot], x_smem.at[slot].T)
                ahead = i - 1 + a_stages

                @pl.when((i > 0) & (ahead < items))
                def _() -> None:
                    plgpu.wgmma_wait(1)  # the step before this one is done with its slot,
                    plgpu.commit_smem()  # in all warps
                    issue_a(ahead, k_start)

            def span(n: Array | int) -> None:
                def product(acc: Any) -> Array:
                    start = n * span_steps
                    stop = jnp.minimum(start + span_steps, steps)
                    lax.fori_loop(start, stop, lambda k, _: step(acc, k), None)
                    return acc[...]

                new = pl.run_scoped(
                    product, plgpu.WGMMAAccumulatorRef((TILE, columns), jnp.float32)
                )
                for s, total in enumerate(sums):

                    @pl.when(slot == s)
                    def _(total: Any = total) -> None:
                        old = total[...]
                        total[...] = jnp.where(mine, old + new, old)

            if steps <= span_steps:
                span(0)
            else:
                lax.fori_loop(0, -(-steps // span_steps), lambda n, _: span(n), None)

        def shrink(share: Array | int, sums: Any) -> None:
            k_start = share * sizes.share
            for total in sums:
                total[...] = jnp.zeros((TILE, columns), jnp.float32)

            first = jnp.minimum(items, a_stages)
            lax.fori_loop(0, first, lambda i, _: issue_a(i, k_start), None)
            if not twin or share == 0:
                for c in range(len(spans)):  # B and y come while A is multiplied
                    prefetch(c)

            lax.fori_loop(0, first_unit[-1], lambda u, _: consume_unit(u, sums, k_start), None)

        # ------------------------------------------------------- y += v B^T, a share of the columns

        def tiles_of(c: int) -> Array:
            """Column tiles of the cut that are this block's: block, block + blocks, ..."""
            total = -(-(spans[c].stop - spans[c].start) // tile)
            return jnp.maximum(lax.div(total - block + (blocks - 1), jnp.int32(blocks)), 0)

        def column_of(c: int, t: Array) -> Array:
            return spans[c].start + (block + t * blocks) * tile

        def total_of(c: int) -> tuple[list[Array], Array]:
            starts = list(
                itertools.accumulate((counts[p] for p in spans[c].parts), initial=jnp.int32(0))
            )
            return starts, starts[-1]

        def issue_b(c: int, i: Array) -> None:
            starts, total = total_of(c)
            t, m, slot = lax.div(i, total), lax.rem(i, total), lax.rem(i, b_stages)
            b_views = cut_smem[c][0]
            for n, p in enumerate(spans[c].parts):

                @pl.when((m >= starts[n]) & (m < starts[n + 1]))
                def _(n: int = n, p: int = p) -> None:
                    adapter = route[spot.adapters(p) + m - starts[n]]
                    first = column_of(c, t) - parts[p].y_offset
                    plgpu.copy_gmem_to_smem(
                        inputs[p][1].at[adapter, pl.ds(first, tile)],
                        b_views[n].at[slot, pl.ds(0, tile)],
                        cut_barriers[c][0].at[slot],
                    )

        def y_row(c: int, slot: Array, i: Array, n: int) -> Any:
            """Line n of row i of a tile of y in shared memory."""
            if twin:
                return y_whole(c, slot).at[pl.ds(i, 1), pl.ds(n * y_line, y_line)]
            at = (slot * (columns // 8) + lax.div(i, 8)) * y_lines + n
            return cut_smem[c][1][1].at[pl.ds(at * 8 + lax.rem(i, 8), 1)]

        def y_whole(c: int, slot: Array) -> Any:
            return cut_smem[c][1][0].at[slot]

        def copy_run(c: int, slot: Array, column: Array, copy: Any) -> None:
            """copy(y, shared memory) of a run's rows. No other row: it is another cluster's."""
            if tokens % 8 == 0:
                where = y_ref.at[pl.ds(run_start, columns), pl.ds(column, tile)]
                copy(where, y_whole(c, slot))
                return
            for n in range(y_lines):  # a part of a tile of rows, line by line
                first = (slot * y_lines + n) * 8 + route[spot.shift]
                where = y_ref.at[
                    pl.ds(run_start + route[spot.shift], tokens),
                    pl.ds(column + n * y_line, y_line),
                ]
                copy(where, cut_smem[c][1][1].at[pl.ds(first, tokens)])

        def issue_y(c: int, t: Array) -> None:
            slot, column = lax.rem(t, y_slots), column_of(c, t)

            def row(i: Array, _: None) -> None:
                source = jnp.maximum(route[i], 0)
                for n in range(y_lines):
                    # Columns behind the cut come too, or zeros behind y's end; none is written.
                    plgpu.copy_gmem_to_smem(
                        y_ref.at[pl.ds(source, 1), pl.ds(column + n * y_line, y_line)],
                        y_row(c, slot, i, n),
                        cut_barriers[c][2].at[slot],
                    )

            by_run(
                lambda: copy_run(
                    c,
                    slot,
                    column,
                    lambda y, smem: plgpu.copy_gmem_to_smem(y, smem, cut_barriers[c][1].at[slot]),
                ),
                lambda: lax.fori_loop(0, tokens, row, None),
            )

        def prefetch(c: int) -> None:
            _, total = total_of(c)
            mine = tiles_of(c)
            lax.fori_loop(0, jnp.minimum(mine * total, b_stages), lambda i, _: issue_b(c, i), None)
            loads = jnp.where(total > 0, jnp.minimum(mine, y_slots), 0)
            lax.fori_loop(0, loads, lambda t, _: issue_y(c, t), None)

        def consume_tile(c: int, t: Array) -> None:
            starts, total = total_of(c)
            b_views = cut_smem[c][0]
            delta = jnp.zeros((tile, columns), jnp.float32)
            for n, p in enumerate(spans[c].parts):
                rank = ranks[p]
                place = plgpu.load(route.at[pl.ds(spot.place(p), columns)], layout=_COLUMN)

                def adapter_body(
                    k: Array, carry: Any, n: int = n, p: int = p, rank: int = rank,
                    place: Array = place,
                ) -> Any:  # fmt: skip
                    delta, scale = carry
                    i = t * total + starts[n] + k
                    slot = lax.rem(i, b_stages)
                    next_scale = scale_of(p, k + 1)
                    plgpu.barrier_wait(cut_barriers[c][0].at[slot])
                    operand = b_views[n].at[slot, pl.ds(0, tile)]
                    within = lax.rem(k, stacks[p])
                    if rank == 8:
                        # Rows of 16 bytes cannot be swizzled, and wgmma's K is 16: zeros beside
                        # them, in registers. v's 16 ranks are those of two adapters.
                        b = plgpu.load(operand, layout=plgpu.Layout.WGMMA, optimized=False)
                        zero = jnp.zeros_like(b)
                        even = lax.broadcast(lax.rem(within, 2) == 0, b.shape)
                        operand = jnp.concatenate(
                            [jnp.where(even, b, zero), jnp.where(even, zero, b)], axis=1
                        )
                        first = lax.div(within, 2) * 16
                        if twin:  # the interpreter takes wgmma's operands from memory alone
                            wide_smem[0][...] = operand
                            operand = wide_smem[0]
                    else:
                        first = within * rank
                    v = v_smem[p].at[:, pl.ds(first, max(rank, 16))]

                    def product(acc: Any) -> Array:
                        plgpu.wgmma(acc, operand, v.T)
                        return acc[...]

                    new = pl.run_scoped(
                        product, plgpu.WGMMAAccumulatorRef((tile, columns), jnp.float32)
                    )
                    ahead = i + b_stages

                    @pl.when(ahead < tiles_of(c) * total)
                    def _() -> None:
                        plgpu.commit_smem()  # all warps are done with the slot
                        issue_b(c, ahead)

                    mine = lax.broadcast_in_dim(place == k, (tile, columns), (1,))
                    return jnp.where(mine, delta + new * scale, delta), next_scale

                delta, _ = lax.fori_loop(0, counts[p], adapter_body, (delta, first_scales[p]))

            slot, column = lax.rem(t, y_slots), column_of(c, t)
            by_run(
                lambda: plgpu.barrier_wait(cut_barriers[c][1].at[slot]),
                lambda: plgpu.barrier_wait(cut_barriers[c][2].at[slot]),
            )
            pieces = [y_whole(c, slot).at[:, pl.ds(m * TILE, TILE)].T for m in range(tile // TILE)]
            news = []
            for m, piece in enumerate(pieces):
                old = plgpu.load(piece, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
                old = plgpu.layout_cast(old, plgpu.Layout.WGMMA).astype(jnp.float32)
                new = (old + delta[m * TILE : (m + 1) * TILE]).astype(y.dtype)
                news.append(plgpu.layout_cast(new, plgpu.Layout.WGMMA_TRANSPOSED))
            for piece, new in zip(pieces, news):
                store_rows(piece, new)
            plgpu.commit_smem()

            def row(i: Array, _: None) -> None:
                used = [route[spot.place(p) + i] >= 0 for p in spans[c].parts]

                def line(n: int) -> None:
                    first = column + n * y_line
                    source, where = y_row(c, slot, i, n), pl.ds(first, y_line)
                    pl.when(first < spans[c].stop)(
                        lambda: plgpu.copy_smem_to_gmem(source, y_ref.at[pl.ds(route[i], 1), where])
                    )

                def lines() -> None:
                    for n in range(y_lines):
                        line(n)

                pl.when(functools.reduce(jnp.logical_or, used))(lines)

            def rows() -> None:
                lax.fori_loop(0, columns, row, None)

            if tiles:
                full = [route[spot.full(p)] == 1 for p in spans[c].parts]
                whole = run & functools.reduce(jnp.logical_or, full)
                whole &= column + tile <= spans[c].stop
                store = functools.partial(
                    copy_run, c, slot, column, lambda y, smem: plgpu.copy_smem_to_gmem(smem, y)
                )
                pl.when(whole)(store)
                pl.when(jnp.logical_not(whole))(rows)
            else:
                rows()

            def next_tile() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                issue_y(c, t + y_slots)

            pl.when(t + y_slots < tiles_of(c))(next_tile)

        # ------------------------------------------------------------------------------ both halves

        def active(do: Any) -> None:
            """do(part, its slots) for the parts in use."""
            for p in range(len(parts)):
                pl.when(counts[p] > 0)(
                    functools.partial(do, p, range(first_slot[p], first_slot[p + 1]))
                )

        def send(_: int, slots: range) -> None:
            for slot in slots:
                _push(part_smem[0][slot][...], all_smem[slot], me, split)

        def sum_shares(p: int, slots: range) -> None:
            for b, slot in enumerate(slots):
                if twin or split == 1:
                    shares = [sums[slot] for sums in part_smem]
                else:
                    shares = [all_smem[slot].at[s] for s in range(split)]
                loads = [plgpu.load(share, layout=plgpu.Layout.WGMMA) for share in shares]
                value = functools.reduce(jnp.add, loads).astype(dtype)
                store_rows(
                    v_smem[p].at[:, pl.ds(b * TILE, TILE)].T,
                    plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED),
                )

        @pl.when(functools.reduce(jnp.maximum, counts) > 0)
        def _() -> None:
            if twin:  # without peers a block takes their shares too
                for share in range(split):
                    shrink(share, part_smem[share])
            else:
                shrink(me, part_smem[0])
                if split > 1:
                    active(send)
                    cluster_barrier()
            active(sum_shares)
            plgpu.commit_smem()
            for c in range(len(spans)):
                _, total = total_of(c)

                @pl.when(total > 0)
                def _(c: int = c) -> None:
                    lax.fori_loop(0, tiles_of(c), lambda t, _: consume_tile(c, t), None)

            plgpu.wait_smem_to_gmem(0)

    a_layout = operand_layout(dtype, x_line)
    x_tiled = plgpu.SMEM((a_stages, columns, block_k), dtype, transforms=a_layout)
    x_rows = plgpu.SMEM(
        (a_stages * columns * block_k // x_line, x_line), dtype, transforms=plain_layout(LINE)
    )
    y_tiled = plgpu.SMEM(
        (y_slots, columns, tile), y.dtype, transforms=operand_layout(y.dtype, y_line)
    )
    y_rows = plgpu.SMEM(
        (y_slots * columns * y_lines, y_line), y.dtype, transforms=plain_layout(LINE)
    )

    def sum_smem(*leading: int) -> Any:
        layout = operand_layout(jnp.float32, columns)
        return plgpu.SMEM((*leading, TILE, columns), jnp.float32, transforms=layout)

    def union(*views: Any) -> Any:
        """Views of one memory; in the interpreter, which has no such views, memory of its own."""
        return list(views) if twin or len(views) == 1 else plgpu.RefUnion(*views)

    def cut_scratch(cut: Any) -> Any:
        widest = max(max(ranks), 16)
        views = [
            plgpu.SMEM(
                (b_stages, tile * (widest // ranks[p]), ranks[p]),
                dtype,
                transforms=() if ranks[p] == 8 else operand_layout(dtype, ranks[p]),
            )
            for p in cut.parts
        ]
        return [union(*views), union(y_tiled) if twin else union(y_tiled, y_rows)]

    place: dict[str, Any] = dict(
        grid=(routes.shape[0], config.column_clusters), grid_names=("chunk", "columns")
    )
    if twin:
        place = dict(grid=(*place["grid"], split), grid_names=(*place["grid_names"], "split"))
    else:
        place.update(cluster=(split,), cluster_names=("split",))
    kernel = plgpu.kernel(
        body,
        scratch_types=[
            plgpu.SMEM((routes.shape[1],), jnp.int32),
            plgpu.SMEM((a_stages, TILE, block_k), dtype, transforms=a_layout),
            union(x_tiled) if twin else union(x_tiled, x_rows),
            [[sum_smem() for _ in range(first_slot[-1])] for _ in range(split if twin else 1)],
            [] if twin or split == 1 else [sum_smem(split) for _ in range(first_slot[-1])],
            [
                plgpu.SMEM(
                    (columns, n * TILE), dtype, transforms=operand_layout(dtype, max(rank, 16))
                )
                for n, rank in zip(rank_blocks, ranks)
            ],
            [cut_scratch(cut) for cut in spans],
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=a_stages * max(stacks)),
            plgpu.Barrier(num_barriers=a_stages),
            plgpu.Barrier(num_barriers=a_stages, num_arrivals=tokens * block_k // x_line),
            [
                [
                    plgpu.Barrier(num_barriers=b_stages),
                    plgpu.Barrier(
                        num_barriers=y_slots, num_arrivals=1 if tokens % 8 == 0 else y_lines
                    ),
                    plgpu.Barrier(num_barriers=y_slots, num_arrivals=tokens * y_lines),
                ]
                for _ in spans
            ],
            *([plgpu.SMEM((tile, 16), dtype)] if twin else []),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="lora_" + "_".join(f"r{rank}" for rank in ranks),
        **place,
    )
    return in_place(kernel, y, x, routes, *(array for part in parts for array in part[:3]))
