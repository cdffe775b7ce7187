"""y += v B^T: a warp takes 32 columns of y in turn, with their rows of B.

B's rows are dealt to `mma`'s columns so that each lane ends with 8 consecutive columns of y, which
it loads and stores in vectors.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Refs, Task, row_of
from pallas_kernels.mosaic_gpu.decode.work import COLUMNS, Piece, Strip, turn_ranks
from pallas_kernels.mosaic_gpu.lanes.values import Address, Flag, Int, Number, Real


class _Rows(NamedTuple):
    """A token's row in each y that the job adds to, and whether there is such a token."""

    ys: dict[int, Address]
    there: Flag


class _Turn(NamedTuple):
    """Where a warp's turn is."""

    column: Int  # its first column of y
    left: Int  # columns left from there on in its piece; 0 or fewer if it has none
    b: Address  # the piece's rows of B
    b_row: Int  # the first of them that is the turn's


class Expand:
    """The strips of a job; made by kernel.py, which calls `find_rows`, `first_copies` and `run`.

    In registers: the rows of y that the lane copies from and adds to, and a turn's sums. In shared
    memory, in the warp's ring: rows of B and, with the first ranks of them, columns of y.
    """

    def __init__(self, lane: Lane, task: Task, refs: Refs) -> None:
        self._lane, self._task, self._refs = lane, task, refs
        self._block = task.nth * lane.work.split + lane.share
        pieces = [piece for strip in task.job.strips for piece in strip]
        self._used_ys = sorted({piece.y for piece in pieces})
        self._y_vectors = COLUMNS * lane.case.y_dtype.itemsize // 16
        self._copied: list[_Rows] = []
        self._added: _Rows | None = None

    # ------------------------------------------------------------------------------ rows of y

    def find_rows(self) -> None:
        """Finds the rows of y, unless that is done: the tokens must be seated."""
        if not self._lane.case.expands or self._added is not None:
            return
        first, step = self._lane.number // self._y_vectors, 32 // self._y_vectors
        self._copied = [self._rows_of(first + n * step) for n in range(self._y_vectors // 4)]
        self._added = self._rows_of(self._lane.row)

    def _rows_of(self, nth: Int) -> _Rows:
        widths, tokens = self._lane.case.y_widths, self._task.tokens
        rows = {
            n: row_of(self._lane, tokens, nth, self._refs.ys[n], widths[n]) for n in self._used_ys
        }
        return _Rows({n: row for n, (row, _) in rows.items()}, rows[self._used_ys[0]][1])

    def _in_y(self, strip: Strip, turn: Number, rows: dict[int, Address]) -> Address:
        """The row of that y to which the turn's piece belongs."""
        if len(rows) == 1:
            return rows[self._used_ys[0]]
        [first] = self._of_turn(strip, turn, lambda piece, _: [rows[piece.y].first])
        return rows[self._used_ys[0]]._replace(first=first)

    # ---------------------------------------------------------------------------------- turns

    def _of_turn(
        self, strip: Strip, turn: Number, values: Callable[[Piece, Number], list[Int]]
    ) -> list[Int]:
        """values(piece, nth of its turns) of the piece whose turn it is."""
        m, found, before = self._lane.m, None, 0
        for piece in strip:
            turns = pl.cdiv(self._lane.work.share(self._task.job, piece), self._lane.work.warps)
            if isinstance(turn, int):
                if before <= turn < before + turns:
                    return values(piece, turn - before)
            else:
                here = values(piece, turn - before)
                is_mine = turn >= before
                found = (
                    here if found is None
                    else [m.select(is_mine, new, old) for new, old in zip(here, found)]
                )  # fmt: skip
            before += turns
        assert found is not None  # a turn that is known is some piece's
        return found

    def _place(self, strip: Strip, turn: Number) -> _Turn:
        lane, task = self._lane, self._task

        def values(piece: Piece, nth: Number) -> list[Int]:
            part, each = lane.case.parts[piece.part], lane.work.share(task.job, piece)
            unit = nth * lane.work.warps + lane.warp
            column = (self._block * each + unit) * COLUMNS
            left = lane.m.select(unit < each, (piece.stop - piece.start) - column, 0)
            shift = piece.first * part.rank * lane.case.weights.itemsize
            first = task.stacks.b[piece.part].first
            return [column + piece.start, left, first + shift, column]

        column, left, first, b_row = self._of_turn(strip, turn, values)
        return _Turn(column, left, task.stacks.b[strip[0].part]._replace(first=first), b_row)

    # --------------------------------------------------------------------------------- copies

    def first_copies(self, strip: Strip) -> None:
        """Asks for the strip's first copies, as one group, which the caller closes."""
        sections = self._lane.work.sections(strip)
        for n in range(self._lane.at.b_stages(self._task.job, strip)):
            self._ask(strip, n // sections, n % sections, n)

    def _ask(self, strip: Strip, turn: Number, section: int, slot: Number) -> None:
        """Copies a section of a turn's rows of B, and with the first one y's columns."""
        place, where = (
            self._lane.ring + slot * self._lane.at.b_slot(strip),
            self._place(strip, turn),
        )
        self._ask_b(strip, where, section, place)
        if section == 0 and self._lane.work.reads_y(self._task.number, strip):
            self._ask_y(strip, turn, where, place + self._lane.at.b_rows(strip))

    def _ask_b(self, strip: Strip, where: _Turn, section: int, place: Int) -> None:
        m, number, rank = self._lane.m, self._lane.number, self._lane.work.strip_rank(strip)
        each = 16 // self._lane.case.weights.itemsize  # ranks of a copy
        ranks, words = turn_ranks(rank), self._lane.at.b_row(strip)
        vectors = ranks // each  # of a row of B
        if vectors == 0:  # one copy has two rows, as they follow each other; half of the lanes do
            source = m.ahead(where.b, where.b_row * rank + number * each)
            m.copy(place + number * 4, source, 0, (number < 16) & (number * 2 < where.left))
            return

        def copy(row: Int, at: Int, source: Address, static_row: int, n: int) -> None:
            # Rows of 128 bytes lie in the same banks: the halves of odd ones change places.
            to = at ^ row % 2 * 4 if words == 32 else at
            m.copy(
                place + row * words + to * 4 + n * 128, source, static_row * rank,
                row + static_row < where.left,
            )  # fmt: skip

        if 32 % vectors == 0:  # a warp copies whole rows at once
            row, at = number // vectors, number % vectors
            source = m.ahead(where.b, (where.b_row + row) * rank + (at * each + section * ranks))
            for n in range(vectors):
                copy(row, at, source, n * 32 // vectors, n)
            return
        for n in range(vectors):
            row, at = (number + 32 * n) // vectors, (number + 32 * n) % vectors
            source = m.ahead(where.b, (where.b_row + row) * rank + (at * each + section * ranks))
            copy(row, at, source, 0, 0)

    def _ask_y(self, strip: Strip, turn: Number, where: _Turn, place: Int) -> None:
        m, left = self._lane.m, where.left
        if not self._lane.case.add_inputs:
            [held] = self._of_turn(strip, turn, self._holds)
            left = m.select(m.equal(held, 1), left, 0)
        wide = 16 // self._lane.case.y_dtype.itemsize
        at = self._lane.number % self._y_vectors * wide
        for n, (rows, there) in enumerate(self._copied):
            to = place + 128 * n + self._lane.number * 4
            m.copy(to, self._in_y(strip, turn, rows), where.column + at, there & (at < left))

    def _holds(self, piece: Piece, _: Number) -> list[Int]:
        """1 where a part has been added to the piece's columns, 0 where it is the first there."""
        m, before = self._lane.m, self._lane.work.before(self._task.number, piece)
        if not before:
            return [m.integer(0)]
        ran = functools.reduce(operator.or_, [self._task.ran[n] for n in before])
        return [m.select(ran, m.integer(1), 0)]

    # ------------------------------------------------------------------------------- products

    def run(self) -> None:
        """All strips, whose sums go to y; of the first one the first copies are on their way."""
        m = self._lane.m
        for n, strip in enumerate(self._task.job.strips):
            if n > 0:
                m.arrived(0)
                m.warp_barrier()  # the ring is free, and the warp's columns of y may be copied
                self.first_copies(strip)
            m.commit()
            m.arrived(0)
            total = self._lane.work.turns(self._task.job, strip)
            if total * self._lane.work.sections(strip) > self._lane.work.written_out:
                m.loop(total, functools.partial(self._looped, strip), list[Int]())
            else:
                for turn in range(total):
                    self._do_turn(strip, turn)

    def _looped(self, strip: Strip, turn: Int, _: list[Int]) -> list[Int]:
        self._do_turn(strip, turn)
        return []

    def _do_turn(self, strip: Strip, turn: Number) -> None:
        """32 columns of y, of all 8 tokens: a warp's turn."""
        m, job = self._lane.m, self._task.job
        sections, total = self._lane.work.sections(strip), self._lane.work.turns(job, strip)
        stages = self._lane.at.b_stages(job, strip)
        acc, old = [m.real(0.0)] * 8, list[Int]()
        for section in range(sections):
            item = turn * sections + section
            slot = item % stages
            m.arrived(stages - 1)
            m.warp_barrier()
            old = old or self._y_words(strip, slot)  # before the slot is filled again
            acc = self._multiply(strip, turn, section, slot, acc)
            if stages == total * sections:
                continue  # all copies were under way from the start
            m.warp_barrier()
            if not isinstance(item, int) or item + stages < total * sections:
                ahead, next_section = divmod(section + stages, sections)
                self._ask(strip, turn + ahead, next_section, slot)
            m.commit()
        self._add(strip, turn, old, acc)

    def _multiply(
        self, strip: Strip, turn: Number, section: int, slot: Number, acc: list[Real]
    ) -> list[Real]:
        """acc plus the products of a section: two sums of a lane for 8 columns of y each."""
        lane, m, acc = self._lane, self._lane.m, list(acc)
        ranks, columns = turn_ranks(lane.work.strip_rank(strip)), self._task.job.columns
        row_words = lane.at.b_row(strip)
        # A lane has 16 bytes of a row of B at once, or a quarter of the row if that is less.
        most = 16 // lane.case.weights.itemsize
        each = next(n for n in (most, 8, 4, 2) if ranks % (4 * n) == 0)
        [first] = self._of_turn(strip, turn, lambda piece, _: [m.integer(columns[piece.part])])
        first = first + section * ranks
        rows = lane.ring + slot * lane.at.b_slot(strip)
        rows = rows + (lane.row // 2 * 8 + lane.row % 2) * row_words
        for n in range(ranks // (4 * each)):
            place = lane.v + lane.row * lane.at.v_stride + (first + 4 * each * n) // 2
            v = self._v_words(place + lane.quad * (each // 2), each // 2)
            for octet in range(4):
                mine = slice(2 * octet, 2 * octet + 2)
                b = self._b_words(rows + octet * 2 * row_words, row_words, each, n)
                for step in range(0, each // 2, 2):
                    x, y = ([*r[step : step + 2], m.integer(0)][:2] for r in (v, b))
                    acc[mine] = m.mma(acc[mine], x, y, lane.case.dtype)
        return acc

    def _v_words(self, place: Int, count: int) -> list[Int]:
        m, most = self._lane.m, min(count, 4)
        return [word for n in range(0, count, most) for word in m.get(place + n, most)]

    def _b_words(self, row: Int, row_words: int, each: int, n: int) -> list[Int]:
        """The lane's nth `each` ranks of a row of B, as products take them."""
        lane, m = self._lane, self._lane.m
        words = each * lane.case.weights.itemsize // 4
        if words == 0:  # two ranks in 8 bits: half of a word
            [word] = m.get(row + lane.quad // 2, 1)
            return lane.operands([word >> lane.quad % 2 * 16])[:1]
        at = lane.quad * words + 4 * words * n
        if row_words == 32:  # halves change places in odd rows
            at = lane.quad * 4 + (n // 2 * 2 + (lane.row + n) % 2) * 16
        return lane.operands(m.get(row + at, words))

    def _y_words(self, strip: Strip, slot: Number) -> list[Int]:
        """The words of a lane's 8 columns of y."""
        lane, size = self._lane, self._lane.case.y_dtype.itemsize * 2
        if not lane.work.reads_y(self._task.number, strip):
            return [lane.m.integer(0)] * size
        at = lane.ring + slot * lane.at.b_slot(strip) + lane.at.b_rows(strip)
        at = at + (lane.row * 4 + lane.quad) * size
        return [word for n in range(0, size, 4) for word in lane.m.get(at + n, 4)]

    def _add(self, strip: Strip, turn: Number, old: list[Int], acc: list[Real]) -> None:
        """Stores old + acc, rounded once, to the lane's 8 columns of y."""
        lane, m, dtype = self._lane, self._lane.m, self._lane.case.y_dtype
        where = self._place(strip, turn)
        if dtype == np.float32:
            new = [m.as_word(m.as_real(word) + delta) for word, delta in zip(old, acc)]
        else:
            new = []
            for i, word in enumerate(old):
                low, high = m.unpack(word, dtype)
                new.append(m.pack(low + acc[2 * i], high + acc[2 * i + 1], dtype))
        assert self._added is not None
        row, columns = self._in_y(strip, turn, self._added.ys), lane.quad * 8
        is_token = lane.row < self._task.tokens.size
        m.store(row, where.column + columns, new, is_token & (columns < where.left))
