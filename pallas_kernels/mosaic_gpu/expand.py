"""y[t, offset:][:N] (+)= v[t] @ B[i].T: a block owns 64 or 128 tokens times a few columns of y."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.config import MAX_COLUMNS, TILE, Config
from pallas_kernels.mosaic_gpu.tiles import (
    ROWS,
    Cut,
    accumulator,
    copy_route,
    cuts,
    in_place,
    operand_layout,
    pieces,
    plain_layout,
    route_copies,
    route_memory,
    routes,
    row_mask,
    shared_bytes,
)
from pallas_kernels.segments import Segments

# Of y in shared memory: one is being stored, one added to, and one loaded.
_Y_STAGES = 3
# Where a block takes part after part it has room for the largest, and a block more on each
# multiprocessor gains more than a third stage. H100, T=4096, ranks 8, 16, 32, 64 and 128: 28.9 us
# with three, 26.3 with two.
_Y_STAGES_IN_TURNS = 2
# Shared memory that a block may fill beside its barriers, by arrays of whole KiB.
_SHARED_BYTES = 226 * 1024


class ExpandPart(NamedTuple):
    """One stack: v `[rows, max(R, 16)]` in B's dtype, lora_b `[L, N, R]`, the tokens' adapters,
    first column."""

    v: Float[Array, "rows K"]
    lora_b: Float[Array, "L N R"]
    segments: Segments
    y_offset: int
    config: Config


def expand_kernel(
    y: Float[Array, "T Ny"],
    parts: tuple[ExpandPart, ...],
    *,
    add_inputs: bool,
    exclusive: bool = False,
) -> Float[Array, "T Ny"]:
    """y' in place where XLA can: y plus the float32 sum of the parts' products, rounded once.

    A block adds part after part if `exclusive`: no token is in several lists of ids. And so where
    shared memory doesn't hold all of them: then it rounds after each of several turns.
    """
    itemsize = y.dtype.itemsize
    spans = cuts(tuple((p.y_offset, p.y_offset + p.lora_b.shape[1]) for p in parts))
    turns = {cut: _turns(cut.parts, parts, exclusive, itemsize) for cut in spans}
    widest = max(cut.stop - cut.start for cut in spans)
    configs = [part.config for part in parts]
    row_tiles = min(part.config.expand_row_tiles for part in parts)
    # Of the parts whose tiles the launch takes: others count on more rows for each load of B.
    columns = max(c.expand_columns for c in configs if c.expand_row_tiles == row_tiles)
    at_once = {turn for of_cut in turns.values() for turn in of_cut}
    in_turns = any(len(of_cut) > 1 for of_cut in turns.values())
    most_ys = _Y_STAGES_IN_TURNS if in_turns else _Y_STAGES
    most_at_once = max(map(len, at_once))
    if columns > 1 and most_at_once > 2:
        # v and B of all of them fill shared memory, so that few blocks are there at once. H100,
        # T=4096, ranks 8, 16, 32, 64 and 128: 69.5 us with 4, 65.2 with 8, 76.8 with 16.
        columns = max(columns, min(2 * columns, 8))
    columns = max(1, min(columns, widest // min(part.config.block_n for part in parts)))
    rows, block_n, columns, parts = _fitting(parts, at_once, columns, most_ys, itemsize)
    y_stages = min(most_ys, columns)
    wholes = [(cut.stop - cut.start) // block_n for cut in spans]
    groups = [-(-whole // columns) for whole in wholes]  # blocks of whole columns
    rests = [(cut.stop - cut.start) % block_n for cut in spans]

    def route_arrivals(cut: Cut) -> int:
        return sum(route_copies(parts[i].segments, rows) for i in cut.parts)

    most_routes = max(map(route_arrivals, spans))
    y_arrivals = max(len(pieces(width, itemsize)) for width in (block_n, *rests))

    def body(y_ref: Any, *refs: Any) -> None:
        inputs = [refs[3 * i : 3 * i + 3] for i in range(len(parts))]
        routes_loaded, v_loaded, y_loaded, *b_loaded = refs[3 * len(parts) :]
        tile, block = lax.axis_index("tile"), lax.axis_index("block")
        row_start = tile * rows

        def columns_body(cut: Cut, width: int, column: Array, count: Array) -> None:
            """`count` times `width` columns from `column` on."""
            y_cut = pieces(width, itemsize)

            def y_piece(n: Array | int, first: int, size: int) -> Any:
                start = column + n * width + first
                return y_ref.at[pl.ds(row_start, rows), pl.ds(start, size)]

            def with_memory(y_smem: Any, *all_routes: Any) -> None:
                route_of = dict(zip(cut.parts, all_routes))

                def fetch_y(n: Array | int, slot: Array | int) -> None:
                    for (first, size), piece in zip(y_cut, y_smem):
                        plgpu.copy_gmem_to_smem(
                            y_piece(n, first, size), piece.at[slot], y_loaded.at[slot]
                        )
                    for _ in range(len(y_cut), y_arrivals):
                        plgpu.barrier_arrive(y_loaded.at[slot])

                def fetch_first_ys() -> None:
                    for n in range(y_stages):
                        pl.when(n < count)(functools.partial(fetch_y, n, n))

                def fetch_v(turn: tuple[int, ...], memory: Any) -> None:
                    for i, (v_smem, *_) in zip(turn, memory):
                        v_ref = inputs[i][0]
                        plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(row_start, rows)], v_smem, v_loaded)
                    for _ in range(len(turn), most_at_once):
                        plgpu.barrier_arrive(v_loaded)

                def memory_of(turn: tuple[int, ...]) -> list[Any]:
                    return [_memory(parts[i], rows, width) for i in turn]

                def is_used(turn: tuple[int, ...]) -> Array:
                    return functools.reduce(jnp.maximum, [route_of[i][rows] for i in turn]) > 0

                def update(turn: tuple[int, ...], memory: Any) -> None:
                    deltas, used = [], []
                    for i, (v_smem, *b_smem) in zip(turn, memory):
                        ids = plgpu.load(route_of[i].at[pl.ds(0, rows)], layout=ROWS)
                        feature = column - parts[i].y_offset
                        deltas.append(
                            _deltas(
                                v_smem, inputs[i][1], ids, route_of[i], feature, width, count,
                                b_loaded[i], b_smem, parts[i].config,
                            )
                        )  # fmt: skip
                        used.append(ids >= 0)
                    touched = functools.reduce(jnp.logical_or, used)
                    plgpu.barrier_wait(v_loaded)

                    def add(n: Array, _: None) -> None:
                        delta = functools.reduce(jnp.add, [of(n) for of in deltas])
                        slot = lax.rem(n, jnp.int32(y_stages))
                        plgpu.barrier_wait(y_loaded.at[slot])
                        for (first, size), piece in zip(y_cut, y_smem):
                            here = piece.at[slot]
                            old = plgpu.load(here, layout=plgpu.Layout.WGMMA, optimized=False)
                            new = delta[:, first : first + size]
                            if add_inputs:
                                new = old.astype(jnp.float32) + new
                            mask = lax.broadcast_in_dim(touched, (rows, size), (0,))
                            here[...] = jnp.where(mask, new.astype(y.dtype), old)
                        plgpu.commit_smem()
                        for (first, size), piece in zip(y_cut, y_smem):
                            plgpu.copy_smem_to_gmem(piece.at[slot], y_piece(n, first, size))
                        if y_stages > 1:  # what was stored before this makes room
                            plgpu.wait_smem_to_gmem(len(y_cut), wait_read_only=True)
                            ahead = n + (y_stages - 1)
                            pl.when((n > 0) & (ahead < count))(
                                lambda: fetch_y(ahead, lax.rem(ahead, jnp.int32(y_stages)))
                            )

                    lax.fori_loop(0, count, add, None)
                    plgpu.wait_smem_to_gmem(0)

                def only_one(turn: tuple[int, ...], memory: Any) -> None:
                    fetch_v(turn, memory)
                    fetch_first_ys()
                    plgpu.barrier_wait(routes_loaded)
                    pl.when(is_used(turn))(functools.partial(update, turn, memory))
                    pl.when(~is_used(turn))(lambda: plgpu.barrier_wait(v_loaded))

                def one_of_several(n: int, turn: tuple[int, ...]) -> None:
                    def run(memory: Any) -> None:
                        fetch_v(turn, memory)
                        update(turn, memory)

                    pl.run_scoped(run, memory_of(turn))
                    if later := [is_used(other) for other in turns[cut][n + 1 :]]:
                        pl.when(functools.reduce(jnp.logical_or, later))(fetch_first_ys)

                for i in cut.parts:
                    copy_route(inputs[i][2], tile, route_of[i], routes_loaded)
                for _ in range(route_arrivals(cut), most_routes):
                    plgpu.barrier_arrive(routes_loaded)
                if len(turns[cut]) == 1:
                    pl.run_scoped(functools.partial(only_one, cut.parts), memory_of(cut.parts))
                else:
                    fetch_first_ys()
                    plgpu.barrier_wait(routes_loaded)
                    for n, turn in enumerate(turns[cut]):
                        pl.when(is_used(turn))(functools.partial(one_of_several, n, turn))

                # A block must not end before what it has copied is here.
                unused = ~is_used(cut.parts)
                for n in range(y_stages):
                    pl.when(unused & (n < count))(
                        functools.partial(plgpu.barrier_wait, y_loaded.at[n])
                    )

            pl.run_scoped(
                with_memory,
                [
                    plgpu.SMEM(
                        (y_stages, rows, size), y.dtype, transforms=plain_layout(size * itemsize)
                    )
                    for _, size in y_cut
                ],
                *(route_memory(parts[i].segments, rows) for i in cut.parts),
            )

        first = 0
        for cut, whole, count, rest in zip(spans, wholes, groups, rests):
            if whole:
                nth = (block - first) * columns
                run = functools.partial(
                    columns_body,
                    cut,
                    block_n,
                    cut.start + nth * block_n,
                    jnp.minimum(whole - nth, columns),
                )
                pl.when((block >= first) & (block < first + count))(run)
            if rest:
                column = jnp.int32(cut.start + whole * block_n)
                run = functools.partial(columns_body, cut, rest, column, jnp.int32(1))
                pl.when(block == first + count)(run)
            first += count + (rest > 0)

    ranks = "_".join(f"r{part.lora_b.shape[2]}" for part in parts)
    kernel = plgpu.kernel(
        body,
        scratch_types=[
            plgpu.Barrier(num_arrivals=most_routes),
            plgpu.Barrier(num_arrivals=most_at_once),
            plgpu.Barrier(num_barriers=y_stages, num_arrivals=y_arrivals),
            *(
                plgpu.Barrier(
                    num_barriers=part.config.expand_stages, num_arrivals=part.config.expand_stack
                )
                for part in parts
            ),
        ],
        grid=(-(-y.shape[0] // rows), sum(groups) + sum(rest > 0 for rest in rests)),
        grid_names=("tile", "block"),
        kernel_name=f"lora_expand_{ranks}",
    )
    operands = (array for p in parts for array in (p.v, p.lora_b, routes(p.segments, rows)))
    [y] = in_place(kernel, (y,), *operands)
    return y


def _stacked(config: Config, rows: int, width: int) -> int:
    """Adapters that a block multiplies at once."""
    return min(config.expand_stack, MAX_COLUMNS * TILE // rows // width)


def _memory(part: ExpandPart, rows: int, width: int) -> tuple[Any, ...]:
    """Of a part, in shared memory: v, a ring of B, and of rank 8 B as wgmma takes it."""
    (_, width_v), dtype, rank = part.v.shape, part.v.dtype, part.lora_b.shape[2]
    wide, stages = _stacked(part.config, rows, width) * width, part.config.expand_stages
    v = plgpu.SMEM((rows, width_v), dtype, transforms=operand_layout(dtype, width_v))
    if rank > 8:
        layout = operand_layout(dtype, rank)
        return v, plgpu.SMEM((stages, wide, rank), dtype, transforms=layout)
    wide = -(-wide // TILE) * TILE  # the WGMMA layout comes in 64 rows
    b16 = plgpu.SMEM((wide, 16), dtype, transforms=operand_layout(dtype, 16))
    return v, plgpu.SMEM((stages, wide, rank), dtype), b16


def _nbytes(
    turn: tuple[int, ...], parts: tuple[ExpandPart, ...], rows: int, block_n: int, y_stages: int,
    itemsize: int,
) -> int:  # fmt: skip
    """Of shared memory, in a turn of these parts."""
    memory = [ref for i in turn for ref in _memory(parts[i], rows, block_n)]
    memory += [route_memory(part.segments, rows) for part in parts]
    return shared_bytes(memory) + rows * block_n * y_stages * itemsize


def _turns(
    of_cut: tuple[int, ...], parts: tuple[ExpandPart, ...], exclusive: bool, itemsize: int
) -> list[tuple[int, ...]]:
    """The parts that a block holds v and B of at once: as many as can fit, or each alone."""
    least = _with(parts, expand_stages=1)
    turns: list[tuple[int, ...]] = []
    for i in of_cut:
        together = (*turns[-1], i) if turns and not exclusive else ()
        if together and _nbytes(together, least, TILE, 8, 1, itemsize) <= _SHARED_BYTES:
            turns[-1] = together
        else:
            turns.append((i,))
    return turns


def _fitting(
    parts: tuple[ExpandPart, ...], at_once: set[tuple[int, ...]], columns: int, most_ys: int,
    itemsize: int,
) -> tuple[int, int, int, tuple[ExpandPart, ...]]:  # fmt: skip
    """Rows and columns of a block, how many times it takes those in turn, and the parts, with
    configs whose shared memory fits, of those that a block holds at once; `itemsize` is y's."""
    given, row_tiles = parts, min(part.config.expand_row_tiles for part in parts)
    rows = row_tiles * TILE
    block_n = min(MAX_COLUMNS // row_tiles, *(part.config.block_n for part in parts))

    def is_too_large(turn: tuple[int, ...]) -> bool:
        y_stages = min(most_ys, columns)
        return _nbytes(turn, parts, rows, block_n, y_stages, itemsize) > _SHARED_BYTES

    while any(map(is_too_large, at_once)):
        if any(part.config.expand_stages > 1 for part in parts):
            parts = _with(parts, expand_stages=1)
        elif row_tiles > 1 and block_n <= 32:
            # With still fewer columns, wgmma would mostly wait for v.
            return _fitting(_with(given, expand_row_tiles=1), at_once, columns, most_ys, itemsize)
        elif block_n > 8:
            block_n = max(8, block_n // 16 * 8)
        elif columns > 1:
            columns = 1
        else:
            break  # more adapters of the highest ranks at once than fit, which Mosaic refuses
    return rows, block_n, columns, parts


def _with(parts: tuple[ExpandPart, ...], **fields: int) -> tuple[ExpandPart, ...]:
    return tuple(p._replace(config=dataclasses.replace(p.config, **fields)) for p in parts)


def _deltas(
    v_smem: Any, b_ref: Any, ids: Array, route: Any, first: Array, width: int, count: Array,
    loaded: Any, memory: Any, config: Config,
) -> Callable[[Array], Float[Array, "rows width"]]:  # fmt: skip
    """Of the nth time `width` features from `first` on, to be asked for in order: each row's
    product with its adapter; zero without one."""
    rows, rank, stages = ids.shape[0], b_ref.shape[2], config.expand_stages
    b_smem, stack = memory[0], _stacked(config, rows, width)
    rounds = lax.div(route[rows] + (stack - 1), jnp.int32(stack))
    total = count * rounds

    def fetch(item: Array | int, slot: Array | int) -> None:
        barrier = loaded.at[slot]
        n, nth = lax.div(jnp.int32(item), rounds), lax.rem(jnp.int32(item), rounds)
        for j in range(stack):
            adapter = route[rows + 1 + nth * stack + j]

            @pl.when(adapter >= 0)
            def _(j: int = j, adapter: Array = adapter) -> None:
                plgpu.copy_gmem_to_smem(
                    b_ref.at[adapter, pl.ds(first + n * width, width)],
                    b_smem.at[slot, pl.ds(j * width, width)],
                    barrier,
                )

            pl.when(adapter < 0)(lambda: plgpu.barrier_arrive(barrier))
        for _i in range(stack, config.expand_stack):
            plgpu.barrier_arrive(barrier)

    for item in range(stages):
        pl.when(item < total)(functools.partial(fetch, item, item))

    def of(n: Array) -> Array:
        def round_(nth: Array, delta: Array) -> Array:
            item = n * rounds + nth
            slot = lax.rem(item, jnp.int32(stages))
            plgpu.barrier_wait(loaded.at[slot])
            operand = b_smem.at[slot]
            if rank == 8:
                # Rows of 16 bytes cannot be swizzled, and wgmma's K is 16: widen them with zeros.
                b = plgpu.load(operand, layout=plgpu.Layout.WGMMA, optimized=False)
                memory[1][...] = jnp.concatenate([b, jnp.zeros_like(b)], axis=1)
                plgpu.commit_smem()
                operand = memory[1].at[pl.ds(0, stack * width)]

            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, v_smem, operand.T)
                return acc[...]

            products = pl.run_scoped(product, accumulator(rows, stack * width))
            for j in range(stack):
                mine = row_mask(ids, route[rows + 1 + nth * stack + j], width)
                delta = jnp.where(mine, products[:, j * width : (j + 1) * width], delta)
            pl.when(item + stages < total)(lambda: fetch(item + stages, slot))
            return delta

        return lax.fori_loop(0, rounds, round_, jnp.zeros((rows, width), jnp.float32))

    return of
