"""y += scale * (x A^T) B^T in one launch, for few tokens: a cluster per 8 tokens of one adapter.
Or one half of it: v += scale * x A^T, y += v B^T. decode_tokens.py says which tokens.

A cluster's blocks share H, and their warps the share. A warp keeps a ring of copies in flight: of
its columns of A and x, then of its rows of B and columns of y, which come while sums are exchanged.
What it copies it alone reads, so no warp waits for another but to add up sums: those of warps, then
of blocks, through shared memory in a fixed order. Operands of `mma` come from there in vectors: as
a product adds up in any order, a lane's 8 consecutive columns serve two steps; and B's rows are
dealt to `mma`'s columns so that each lane ends with 8 consecutive columns of y.
"""

import contextlib
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu.decode_plan import (
    COLUMNS,
    TOKENS,
    UNIT,
    Bundle,
    DecodePart,
    Piece,
    Plan,
    turn_ranks,
)
from pallas_kernels.mosaic_gpu.decode_tokens import Seated, tokens_of
from pallas_kernels.mosaic_gpu.lanes import Emulator, Gpu, Left, Memory
from pallas_kernels.mosaic_gpu.tiles import in_place, interpreted

# Turns written out, of a kernel with one job: longer ones are loops. With more jobs all are, but
# those over A where all copies are on their way at once: code comes cold from device memory. H100,
# Llama-3-8B's projections with five buckets, one layer in a step: 186 us written out, 123 in loops.
_UNROLL = 8


def _kernel(
    m: Any, plan: Plan, cluster: Any, column_block: Any, share: Any,
    ys: list[Any], x: Any, ids: list[Any], parts: list[Any],
) -> None:  # fmt: skip
    """One cluster: `m` is its lanes (lanes.py), `share` the number of a block in it."""
    active, column_block, seat = tokens_of(m, plan, cluster, column_block, ids)
    # Clusters that leave later go on as if they had tokens.
    when = (lambda _, do: do()) if plan.leaves else m.when

    def work() -> None:
        seated = seat()
        if len(plan.jobs) > 1:
            m.begun()
        valid, slot = {}, {}
        for key, starts in zip(seated.keys, plan.keys):
            for i, start in starts.items():
                adapter = key - start if start else key
                valid[i] = adapter >= 0
                if len(starts) > 1:
                    valid[i] = valid[i] & (adapter < plan.lists[i])
                slot[i] = m.select(valid[i], adapter, 0)
        ran: list[Any] = []  # whether each job has
        for n, job in enumerate(plan.jobs):
            i, nth = plan.ids_of(n), column_block - job.cluster
            run = functools.partial(
                _run_job, m, plan, n, ran, slot[i], seated, active, nth, share, ys, x, parts
            )
            here = m.tid >= 0
            if len(plan.lists) > 1:  # else its adapter is in use, or the token led none
                here = valid[i]
            if job.clusters < plan.dealt(i):
                here = here & (nth >= 0) & (nth < job.clusters)
            ran.append(here)
            when(here, run)

    when(active, work)


def _run_job(
    m: Any, plan: Plan, number: int, ran: list[Any], slot: Any, seated: Seated, active: Any,
    column_block: Any, share: Any, ys: list[Any], x: Any, parts: list[Any],
) -> None:  # fmt: skip
    """One job's parts, for tokens of the adapter in `slot`.

    `column_block` is the number of this cluster among those of the job; `ran`: whether each job up
    to this one has run; `active`: whether the cluster has tokens, else it is to leave.
    """
    job = plan.jobs[number]
    lane, warp = m.tid % 32, m.tid // 32
    g, c = lane // 4, lane % 4  # row and column group of mma's operands
    threads, always, zero = 32 * plan.warps, m.tid >= 0, m.integer(0)
    rows, count = seated.rows, seated.count
    has = g < count  # this lane's row of a product is a token
    earlier = [ran[n] for n in plan.earlier(number)]
    if earlier and plan.shrinks:
        # All blocks are done with the sums that they received.
        m.when(functools.reduce(operator.or_, earlier), m.cluster_barrier)

    def stack(p: int, which: int, stride: int) -> Any:
        return m.ahead(m.address(parts[p][which], slot, stride), plan.parts[p].firsts[which])

    mine = {p: plan.parts[p] for p in job.parts}
    a_of, b_of, scales = {}, {}, {}
    for p, part in mine.items():
        if plan.shrinks:
            a_of[p] = stack(p, 0, part.rank * plan.features)
            one = m.address(parts[p][-1], slot, 1 if part.own_scales else 0)
            scales[p] = m.as_real(m.load(one, part.first_scale, always))
        if plan.expands:
            b_of[p] = stack(p, 1 if plan.shrinks else 0, part.rank * part.width)
    v_of = job.columns

    def token_row(r: Any, ref: Any, width: int) -> Any:
        """(the address of the r-th token's row, whether there is one)"""
        there = r < count
        return m.address(ref, m.select(there, m.get(rows + r, 1)[0], 0), width), there

    # ---------------------------------------------------------- v = x A^T, a share of it

    first_unit = share * plan.share_units
    end_unit = m.minimum(first_unit + plan.share_units, pl.cdiv(plan.features, UNIT))
    line, chunk = lane // 8, lane % 8  # a warp copies 4 lines of 8 times 16 bytes at once
    x_rows = [
        (m.address(x, m.select(token >= 0, token, 0), plan.features), token >= 0)
        for token in seated.copied
    ]
    ring = plan.warp_first + warp * plan.warp_words
    first_v = plan.v + (warp * (TOKENS * plan.v_stride) if plan.own_v else 0)
    a_stages = plan.a_stages(job) if plan.shrinks else 0

    def fill_a(bundle: Bundle, n: Any, slot: Any) -> None:
        k = (first_unit + n * plan.warps + warp) * UNIT + chunk * 8
        here = (k < end_unit * UNIT) & (k < plan.features)
        if plan.leaves:
            here = here & active
        # Rows of 128 bytes lie in the same banks: the halves of odd ones change places.
        place = ring + slot * plan.a_slot(job) + line * 32 + (chunk ^ line % 2 * 4) * 4
        for row, (address, there) in enumerate(x_rows):
            m.copy(place + row * 128, address, k, here & there)
        start = line * plan.features + k
        first_rows = {p: m.ahead(a_of[p], start) for p in sorted({p for p, _ in bundle.tiles})}
        for row, (p, tile) in enumerate(bundle.tiles):
            for half in range(2):
                to = place + (256 * (row + 1) + 128 * half)
                m.copy(to, first_rows[p], (8 * tile + 4 * half) * plan.features, here)

    def multiply_a(bundle: Bundle, slot: Any, acc: list[Any]) -> list[Any]:
        acc, row = list(acc), ring + slot * plan.a_slot(job) + g * 32 + c * 4
        for half in range(2):
            at = row + (g + half) % 2 * 16
            tokens = m.get(at, 4)
            for n in range(len(bundle.tiles)):
                ranks = m.get(at + 256 * (n + 1), 4)
                for step in (0, 2):
                    acc[2 * n : 2 * n + 2] = m.mma(
                        acc[2 * n : 2 * n + 2],
                        tokens[step : step + 2],
                        ranks[step : step + 2],
                        plan.dtype,
                    )
        return acc

    def fill_first_a(turns: list[tuple[Bundle, int]]) -> None:
        """Asks for the first copies, then does what need not wait for them."""
        if len(plan.jobs) > 1 or len(job.bundles) > 1:
            m.arrived(0)
            m.warp_barrier()  # the ring is free
        for slot, (bundle, n) in enumerate(turns[:a_stages]):
            fill_a(bundle, n, slot)
            m.commit()
        if plan.leaves:
            m.leave(~active)
        find_y_rows()
        m.begun()

    def shrink(bundles: list[Bundle]) -> list[list[Any]]:
        """The warp's sums for each bundle."""
        accs = [[m.real(0.0)] * (2 * len(bundle.tiles)) for bundle in bundles]
        if plan.units > max(unroll, a_stages):
            for nth, bundle in enumerate(bundles):
                accs[nth] = shrink_in_loop(bundle, accs[nth])
            return accs
        turns = list(itertools.product(bundles, range(plan.units)))
        fill_first_a(turns)
        for i, (bundle, _) in enumerate(turns):
            nth = i // plan.units
            m.arrived(a_stages - 1)
            m.warp_barrier()
            accs[nth] = multiply_a(bundle, i % a_stages, accs[nth])
            if i + a_stages < len(turns):
                m.warp_barrier()
                fill_a(*turns[i + a_stages], i % a_stages)
            m.commit()
        return accs

    def shrink_in_loop(bundle: Bundle, acc: list[Any]) -> list[Any]:
        fill_first_a([(bundle, n) for n in range(a_stages)])

        def turn(n: Any, acc: list[Any]) -> list[Any]:
            m.arrived(a_stages - 1)
            m.warp_barrier()
            acc = multiply_a(bundle, n % a_stages, acc)
            m.warp_barrier()
            fill_a(bundle, n + a_stages, n % a_stages)  # the last bring zeros
            m.commit()
            return acc

        return m.loop(plan.units, turn, acc)

    # --------------------------------------------------------- B and y, a share of the columns

    block = column_block * plan.split + share
    unroll = _UNROLL if len(plan.jobs) == 1 else 1
    y_chunks = COLUMNS * plan.y_dtype.itemsize // 16
    used_ys = sorted({piece.y for strip in job.strips for piece in strip})

    def y_row(r: Any) -> tuple[dict[int, Any], Any]:
        """(the address of the r-th token's row in each y, whether there is one)"""
        rows = {n: token_row(r, ys[n], plan.y_widths[n]) for n in used_ys}
        return {n: address for n, (address, _) in rows.items()}, rows[used_ys[0]][1]

    y_rows: list[Any] = []  # that this lane copies, and behind them the one that it adds to

    def find_y_rows() -> None:
        if plan.expands and not y_rows:
            copied = [lane // y_chunks + n * (32 // y_chunks) for n in range(y_chunks // 4)]
            y_rows.extend(map(y_row, [*copied, g]))

    def of_turn(strip: list[Piece], turn: Any, values: Any) -> Any:
        """values(piece, nth of its turns) of the piece whose turn it is."""
        found: Any = None
        before = 0
        for piece in strip:
            turns = pl.cdiv(plan.share(job, piece), plan.warps)
            if not isinstance(turn, int):
                here = values(piece, turn - before)
                if found is not None:
                    here = [m.select(turn >= before, new, old) for new, old in zip(here, found)]
                found = here
            elif before <= turn < before + turns:
                return values(piece, turn - before)
            before += turns
        return found

    def place_of(strip: list[Piece], turn: Any) -> Any:
        """Of a warp's turn: its first column of y, the columns left from there on in its piece
        (none: 0 or fewer), and where the piece's rows of B are, of which the turn's is the nth."""

        def values(piece: Piece, nth: Any) -> Any:
            part, each = plan.parts[piece.part], plan.share(job, piece)
            unit = nth * plan.warps + warp
            column = (block * each + unit) * COLUMNS
            left = m.select(unit < each, (piece.stop - piece.start) - column, 0)
            shift = piece.first * part.rank * plan.dtype.itemsize
            return column + piece.start, left, b_of[piece.part].first + shift, column

        column, left, first, nth_row = of_turn(strip, turn, values)
        return column, left, b_of[strip[0].part]._replace(first=first), nth_row

    def in_y(strip: list[Piece], turn: Any, rows: dict[int, Any]) -> Any:
        """The row of that y to which the turn's piece belongs."""
        if len(rows) == 1:
            return rows[used_ys[0]]
        [first] = of_turn(strip, turn, lambda piece, _: [rows[piece.y].first])
        return rows[used_ys[0]]._replace(first=first)

    def reads_y(strip: list[Piece]) -> bool:
        return plan.add_inputs or any(plan.before(number, piece) for piece in strip)

    def holds(piece: Piece, _: Any) -> list[Any]:
        """1 where a part has been added to the piece's columns, 0 where it is the first there."""
        there = [ran[n] for n in plan.before(number, piece)]
        return [m.select(functools.reduce(operator.or_, there), m.integer(1), 0) if there else zero]

    def fill_b(strip: list[Piece], turn: Any, chunk: int, slot: Any) -> None:
        rank = plan.parts[strip[0].part].rank
        ranks = turn_ranks(rank)
        column, left, address, b_row = place_of(strip, turn)
        place = ring + slot * plan.b_slot(strip)
        chunks = ranks // 8  # of a row of B, 16 bytes each

        def copy(row: Any, at: Any, source: Any, static_row: int, n: int) -> None:
            to = at ^ row % 2 * 4 if ranks % 64 == 0 else at
            m.copy(
                place + row * (ranks // 2) + to * 4 + n * 128, source, static_row * rank,
                row + static_row < left,
            )  # fmt: skip

        if 32 % chunks == 0:  # a warp copies whole rows at once
            row, at = lane // chunks, lane % chunks
            source = m.ahead(address, (b_row + row) * rank + (at * 8 + chunk * ranks))
            for n in range(chunks):
                copy(row, at, source, n * 32 // chunks, n)
        else:
            for n in range(chunks):
                row, at = (lane + 32 * n) // chunks, (lane + 32 * n) % chunks
                source = m.ahead(address, (b_row + row) * rank + (at * 8 + chunk * ranks))
                copy(row, at, source, 0, 0)
        if chunk != 0 or not reads_y(strip):
            return
        if not plan.add_inputs:
            [held] = of_turn(strip, turn, holds)
            left = m.select(held == 1, left, 0)
        wide = 16 // plan.y_dtype.itemsize
        at = lane % y_chunks * wide
        for n, (rows, there) in enumerate(y_rows[:-1]):
            to = place + (plan.b_rows(strip) + 128 * n) + lane * 4
            m.copy(to, in_y(strip, turn, rows), column + at, there & (at < left))

    def multiply_b(strip: list[Piece], turn: Any, chunk: int, slot: Any, acc: Any) -> Any:
        rank = plan.parts[strip[0].part].rank
        ranks, acc = turn_ranks(rank), list(acc)
        each = 8 if ranks % 32 == 0 else 4 if ranks % 16 == 0 else 2  # of a lane, at once
        words = each // 2
        [first] = of_turn(strip, turn, lambda piece, _: [m.integer(v_of[piece.part])])
        first = first + chunk * ranks
        rows = ring + slot * plan.b_slot(strip) + (g // 2 * 8 + g % 2) * (ranks // 2)
        for n in range(ranks // (4 * each)):
            v = m.get(first_v + g * plan.v_stride + (first + 4 * each * n) // 2 + c * words, words)
            for tile in range(4):
                at = c * words + 4 * words * n
                if ranks % 64 == 0:
                    at = c * 4 + (n // 2 * 2 + (g + n) % 2) * 16
                b = m.get(rows + tile * ranks + at, words)
                for step in range(0, words, 2):
                    pair = [[*r[step : step + 2], zero][:2] for r in (v, b)]
                    acc[2 * tile : 2 * tile + 2] = m.mma(
                        acc[2 * tile : 2 * tile + 2], *pair, plan.dtype
                    )
        return acc

    def y_words(strip: list[Piece], slot: Any) -> list[Any]:
        size = plan.y_dtype.itemsize * 2  # words of a lane's 8 columns
        if not reads_y(strip):
            return [zero] * size
        at = ring + slot * plan.b_slot(strip) + plan.b_rows(strip) + (g * 4 + c) * size
        return [word for n in range(0, size, 4) for word in m.get(at + n, 4)]

    def add(strip: list[Piece], turn: Any, old: list[Any], acc: list[Any]) -> None:
        column, left, *_ = place_of(strip, turn)
        if plan.y_dtype == np.float32:
            new = [m.as_word(m.as_real(word) + delta) for word, delta in zip(old, acc)]
        else:
            new = []
            for i, word in enumerate(old):
                low, high = m.unpack(word, plan.y_dtype)
                new.append(m.pack(low + acc[2 * i], high + acc[2 * i + 1], plan.y_dtype))
        m.store(in_y(strip, turn, y_rows[-1][0]), column + c * 8, new, has & (c * 8 < left))

    def fill_first(strip: list[Piece]) -> None:
        chunks = plan.chunks(strip)
        for n in range(plan.b_stages(job, strip)):
            fill_b(strip, n // chunks, n % chunks, n)

    def expand(strip: list[Piece]) -> None:
        chunks, total = plan.chunks(strip), plan.turns(job, strip)
        stages = plan.b_stages(job, strip)

        def turn(n: Any, _: list[Any]) -> list[Any]:
            acc: list[Any] = [m.real(0.0)] * 8
            old: list[Any] = []
            for chunk in range(chunks):
                item = n * chunks + chunk
                slot = item % stages
                m.arrived(stages - 1)
                m.warp_barrier()
                old = old or y_words(strip, slot)  # before the slot is filled again
                acc = multiply_b(strip, n, chunk, slot, acc)
                if stages == total * chunks:
                    continue  # all copies were under way from the start
                m.warp_barrier()
                if not isinstance(n, int) or item + stages < total * chunks:
                    ahead, next_chunk = divmod(chunk + stages, chunks)
                    fill_b(strip, n + ahead, next_chunk, slot)
                m.commit()
            add(strip, n, old, acc)
            return []

        if total * chunks > unroll:
            m.loop(total, turn, [])
        else:
            for n in range(total):
                turn(n, [])

    # ------------------------------------------------------------------- v, the sum of all shares

    def quads(start: Any, columns: int, times: int, do: Any, *, by_warp: bool = False) -> None:
        """do(nth, token, column of v, where) for nth < times and each 4 of `columns` from `start`
        on, dealt to the lanes of the block, or if `by_warp`, to those of each warp."""
        wide = columns // 4
        me, lanes = (lane, 32) if by_warp else (m.tid, threads)
        total = TOKENS * wide * times
        for first in range(0, total, lanes):
            i = me + first
            t = i // wide % TOKENS
            here = t < count if total % lanes == 0 else (t < count) & (i < total)
            do(i // (wide * TOKENS), t, i % wide * 4 + start, here)

    def added(place: Any, times: int, stride: int) -> list[Any]:
        total = [m.as_real(word) for word in m.get(place, 4)]
        for n in range(1, times):
            more = [m.as_real(word) for word in m.get(place + n * stride, 4)]
            total = [a + b for a, b in zip(total, more)]
        return total

    plane = TOKENS * plan.received_stride
    receivers = plan.split if plan.expands else 1
    own = plan.own_columns(job)

    def senders(columns: int) -> int:
        """How many lanes send the same columns, each to its own blocks: as many as there are."""
        most = min(receivers, threads // (TOKENS * columns // 4))
        return 1 << max(0, most.bit_length() - 1)

    def to_blocks(to_each: int, nth: Any, place: Any, words: list[Any], here: Any) -> None:
        for n in range(to_each):
            m.push(m.minimum(nth * to_each + n, receivers - 1), place, words, here)

    def send(to_each: int, nth: Any, t: Any, column: Any, here: Any) -> None:
        at = plan.warp_first + plan.sums + t * plan.sum_stride + column
        words = [m.as_word(s) for s in added(at, plan.warps, plan.warp_words)]
        place = plan.block_sums + share * plane + t * plan.received_stride
        if plan.scatters:
            m.push(column // own, place + column % own, words, here)
        else:
            to_blocks(to_each, nth, place + column, words, here)

    def operands(total: list[Any]) -> list[Any]:
        """Columns of v as the expand takes them."""
        return [m.pack(total[n], total[n + 1], plan.dtype) for n in (0, 2)]

    def place_of_v(t: Any, column: Any) -> Any:
        return first_v + t * plan.v_stride + column // 2

    def scaled(place: Any, column: Any, some: Sequence[int]) -> list[Any]:
        """Of columns of v that belong to one of these parts, what all blocks have together."""
        scale = scales[some[0]]
        for p in some[1:]:
            scale = m.select(column < v_of[p], scale, scales[p])
        return [s * scale for s in added(place, plan.split, plane)]

    def finish(bundle: Bundle, _: Any, t: Any, column: Any, here: Any) -> None:
        place = plan.block_sums + t * plan.received_stride + column
        total = scaled(place, column, sorted({p for p, _ in bundle.tiles}))
        if plan.expands:
            m.put(place_of_v(t, column), operands(total), here)
        else:
            add_to_v(t, column, total, here & (share == 0))

    def tell(to_each: int, nth: Any, t: Any, column: Any, here: Any) -> None:
        here = here & (column < plan.job_ranks(job))
        total = scaled(
            plan.block_sums + t * plan.received_stride + (column - share * own), column, job.parts
        )
        to_blocks(to_each, nth, place_of_v(t, column), operands(total), here)

    def words_of(ref: Any, width: int, t: Any, column: Any, here: Any) -> tuple[Any, list[Any]]:
        """A token's row, and in it the words of 4 columns."""
        row = m.address(ref, m.get(rows + t, 1)[0], width)
        each = 4 // row.dtype.itemsize  # columns of a word
        return row, [m.load(row, column + n, here, fixed=False) for n in range(0, 4, each)]

    def floats(words: list[Any], dtype: Any) -> list[Any]:
        if dtype == np.float32:
            return [m.as_real(word) for word in words]
        return [value for word in words for value in m.unpack(word, dtype)]

    def add_to_v(t: Any, column: Any, total: list[Any], here: Any) -> None:
        row, old = words_of(ys[0], plan.y_widths[0], m.select(here, t, 0), column, here)
        new = [a + b for a, b in zip(floats(old, plan.y_dtype), total)]
        if plan.y_dtype == np.float32:
            words = [m.as_word(value) for value in new]
        else:
            words = [m.pack(new[n], new[n + 1], plan.y_dtype) for n in (0, 2)]
        m.store(row, column, words, here)

    def load_v(_: Any, t: Any, column: Any, here: Any) -> None:
        _, words = words_of(x, plan.features, m.select(here, t, 0), column, here)
        m.put(place_of_v(t, column), operands(floats(words, plan.x_dtype)), here)

    def put_sums(bundle: Bundle, acc: list[Any]) -> None:
        at = ring + plan.sums + g * plan.sum_stride + bundle.first + c * 2
        for tile in range(len(bundle.tiles)):
            m.put(at + 8 * tile, [m.as_word(value) for value in acc[2 * tile : 2 * tile + 2]])

    if plan.shrinks:
        sums: list[list[Any]] = []
        if plan.holds_sums:
            sums = shrink(job.bundles)
        else:
            for bundle in job.bundles:
                put_sums(bundle, *shrink([bundle]))
        # Not earlier: A of all clusters then comes before B of any, and B while sums are exchanged.
        m.arrived(0)
    m.warp_barrier()
    find_y_rows()
    if plan.shrinks:
        for bundle, acc in zip(job.bundles, sums):
            put_sums(bundle, acc)
    if plan.expands:
        fill_first(job.strips[0])
    if plan.shrinks:
        m.barrier()
        for bundle in job.bundles:
            columns = 8 * len(bundle.tiles)
            lanes = 1 if plan.scatters else senders(columns)
            quads(bundle.first, columns, lanes, functools.partial(send, receivers // lanes))
        m.cluster_barrier()
    if plan.scatters:
        lanes = senders(own)
        quads(share * own, own, lanes, functools.partial(tell, receivers // lanes))
        m.cluster_barrier()
    else:
        for bundle in job.bundles:
            do = functools.partial(finish, bundle) if plan.shrinks else load_v
            quads(bundle.first, 8 * len(bundle.tiles), 1, do, by_warp=plan.own_v)
        if not plan.expands:
            return
        if plan.own_v:
            m.warp_barrier()
        else:
            m.barrier()

    # ------------------------------------------------------------------------------- y += v B^T

    for n, strip in enumerate(job.strips):
        if n > 0:
            m.arrived(0)
            m.warp_barrier()  # the ring is free, and the warp's columns of y may be copied again
            fill_first(strip)
        m.commit()
        m.arrived(0)
        expand(strip)


def decode_kernel(
    ys: tuple[Float[Array, "T _"] | jax.ShapeDtypeStruct, ...],
    x: Float[Array, "T H"],
    ids: tuple[Int[Array, " T"] | Int[Array, "T 2"] | Int[Array, "clusters 10"], ...],
    parts: tuple[DecodePart, ...],
    plan: Plan,
) -> tuple[Float[Array, "T _"], ...]:
    """ys' in place where XLA can. Rounded once for each part that adds to a token's columns.

    Where ys are shapes, of a plan without `add_inputs`: new arrays that hold what the parts add,
    undefined in elements that no part adds to.

    Ids outside of a part's slots are none. `[T, 2]` are words of 64-bit ids, the low one first. Of
    a seated plan ids are one table by `seating`.
    """
    operands = x, *ids, *(array for part in parts for array in part.operands)
    made = tuple(y for y in ys if isinstance(y, jax.ShapeDtypeStruct))
    given = tuple(y for y in ys if not isinstance(y, jax.ShapeDtypeStruct))
    if interpreted():
        # NaN shows who reads what is undefined.
        given = given or tuple(jnp.full(y.shape, jnp.nan, y.dtype) for y in made)
        shapes = tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys)
        run = functools.partial(_emulate, plan, len(ys), len(ids))
        return jax.pure_callback(run, shapes, *given, *operands, vmap_method="sequential")
    dtypes = [jnp.dtype(array.dtype) for array in (*ys, *operands)]

    def body(*refs: Any) -> None:
        if made:  # outputs come behind the operands
            refs = (*refs[len(operands) : -1], *refs[: len(operands)], refs[-1])
        places = [lax.axis_index(name) for name in ("cluster", "columns", "share")]

        @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
            arg_types=(*[plgpu.RefType()] * len(refs), *[plgpu.Layout.WG_SPLAT] * 3)
        )
        def inline(_: Any, *args: Any) -> None:
            m = Gpu(args[len(dtypes)])
            cluster, columns, share = (m.uniform(place) for place in args[-3:])
            refs_ = _sorted_out(list(zip(args, dtypes)), len(ys), len(ids), len(parts))
            _kernel(m, plan, cluster, columns, share, *refs_)

        inline(*refs, *places)

    groups, ranks = plan.warps // 4, [f"r{part.rank}" for part in plan.parts]
    threads: dict[str, Any] = dict(num_threads=groups, thread_name="group") if groups > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=made,
        scratch_types=[plgpu.SMEM((plan.words,), jnp.int32)],
        grid=plan.grid,
        grid_names=("cluster", "columns"),
        cluster=(plan.split,),
        cluster_names=("share",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="_".join([_NAMES[plan.shrinks, plan.expands], *ranks]),
        **threads,
    )
    if made:
        return tuple(kernel(*operands))
    return in_place(kernel, given, *operands)


_NAMES = {
    (True, True): "lora",
    (True, False): "lora_decode_shrink",
    (False, True): "lora_decode_expand",
}


def _sorted_out(refs: list[Any], num_ys: int, num_ids: int, num_parts: int) -> list[Any]:
    """ys, x, ids, and each part's stacks and scales."""
    ys, x, rest = refs[:num_ys], refs[num_ys], refs[num_ys + 1 :]
    ids, stacks = rest[:num_ids], rest[num_ids:]
    each = len(stacks) // num_parts
    return [ys, x, ids, list(itertools.batched(stacks, each))]


def _emulate(plan: Plan, num_ys: int, num_ids: int, *arrays: Any) -> Any:
    memory = Memory([np.asarray(array) for array in arrays])
    refs = _sorted_out(memory.refs, num_ys, num_ids, len(plan.parts))
    for cluster, columns in itertools.product(*map(range, plan.grid)):
        m = Emulator(memory, plan.words, plan.split, 32 * plan.warps)
        share = np.broadcast_to(np.arange(plan.split, dtype=np.int32)[:, None], m.tid.shape)
        with contextlib.suppress(Left):
            _kernel(m, plan, m.integer(cluster), m.integer(columns), share, *refs)
    return tuple(memory.array(n) for n in range(num_ys))
