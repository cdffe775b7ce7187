"""Which tokens a cluster of the decode kernel takes: up to eight that use the same adapters.

The first, the ninth, ... token of an adapter leads: it opens a cluster, for itself and the next
seven. Clusters are numbered in the order of their leaders. So an adapter is read once per eight of
its tokens, and clusters that have work start first.

With raw ids each cluster finds its tokens by itself. The layers of a step share `Segments`, from
which XLA finds the tokens once (`seating`); clusters then start sooner. That table also says which
columns of y a cluster has, where several have the same tokens. Tokens with many clusters come
first.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Int as Ints

from pallas_kernels.mosaic_gpu.decode.lane import Lane, Seated
from pallas_kernels.mosaic_gpu.decode.plan import Plan
from pallas_kernels.mosaic_gpu.decode.work import TOKENS, Range
from pallas_kernels.mosaic_gpu.lanes.values import Flag, Int, Machine, Ref
from pallas_kernels.routing import Segments


class Found(NamedTuple):
    """What a cluster finds.

    Attributes:
      active: whether it has tokens.
      column_block: its number among the clusters that deal the columns of y for these tokens.
      seat: puts the tokens to shared memory. kernel.py calls it where there are some.
    """

    active: Flag
    column_block: Int
    seat: Callable[[], Seated]


@dataclasses.dataclass(frozen=True)
class Seating:
    """The table of a seated plan: who sits in each cluster. XLA makes it, once for all layers whose
    plans have the same ranges and clusters.

    Attributes:
      clusters: of the launch.
      shares: each range, and how many clusters deal the columns of its tokens.
    """

    clusters: int
    shares: tuple[tuple[Range, int], ...]

    @classmethod
    def of(cls, plan: Plan) -> "Seating":
        work = plan.work
        return cls(work.grid[0], tuple((one, work.dealt(one)) for one in work.ranges))

    def make(self, segments: Segments) -> tuple[Array]:
        return (self.seat(segments.indices),)

    def seat(self, ids: Ints[Array, " T"] | Ints[Array, "T 2"]) -> Ints[Array, "clusters 10"]:
        """A row is a cluster's tokens, up to eight, then -1s; their id, -1 for a cluster without
        tokens; and the cluster's number among those that deal these tokens' columns of y. Tokens
        whose id is in no range have no seat. Those with many clusters come first, as they take
        longest.

        It is written for XLA to make few kernels of it: five up to 128 tokens of one range.
        """
        if ids.ndim == 2:
            ids = jnp.where(ids[:, 1] == 0, ids[:, 0], -1)
        shares = jnp.zeros(ids.shape[0], jnp.int32)  # clusters that deal a token's columns
        for one, share in self.shares:
            is_in = (ids >= one.first) & (ids < one.stop)
            shares = jnp.where(is_in, share, shares)
        has_seat = shares > 0
        token = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
        is_before = token < token.T
        number = jnp.sum((ids[None] == ids[:, None]) & is_before, axis=1, dtype=jnp.int32)
        leads = has_seat & (number & (TOKENS - 1) == 0)
        ids, number, leads, shares = (z[None] for z in (ids, number, leads, shares))
        is_ahead = is_before
        if len({share for _, share in self.shares}) > 1:
            is_ahead = (shares > shares.T) | ((shares == shares.T) & is_before)
        start = jnp.sum(jnp.where(leads & is_ahead, shares, 0), axis=1, dtype=jnp.int32)[None]
        column = jnp.arange(self.clusters, dtype=jnp.int32)[:, None] - start
        is_leader = leads & (column >= 0) & (column < shares)

        def of_leader(values: Array, none: int) -> Array:
            return jnp.max(jnp.where(is_leader, values, none), axis=1, keepdims=True)

        adapter = of_leader(ids, -1)
        seat = of_leader(number, 0)[:, :, None] + jnp.arange(TOKENS, dtype=jnp.int32)[None, :, None]
        is_mine = (has_seat & (ids == adapter))[:, None, :] & (number[None] == seat)
        tokens = jnp.max(jnp.where(is_mine, token[None], -1), axis=2)
        return jnp.concatenate([tokens, adapter, of_leader(column, 0)], axis=1)


def find(lane: Lane, cluster: Int, column_block: Int, ids: Ref) -> Found:
    """The tokens of a cluster; called by kernel.py first of all."""
    if lane.work.seated:
        return _in_table(lane, cluster, ids)
    tokens = _number(lane, _load_ids(lane, ids))
    masks = [lane.m.get(lane.at.masks + n, 1)[0] for n in range(pl.cdiv(lane.case.tokens, 32))]
    leader, active = _nth_bit(lane.m, masks, cluster)
    return Found(active, column_block, functools.partial(_seat, lane, tokens, leader))


def _in_table(lane: Lane, cluster: Int, table: Ref) -> Found:
    """By the table that `seating` made. In registers until they are seated."""
    m = lane.m
    row = m.address(table, cluster, TOKENS + 2)
    adapter, column_block = (m.load(row, TOKENS + n, lane.always) for n in range(2))
    rows = lane.at.rows + m.tid // 32 * TOKENS  # each warp's own
    token = m.load(row, m.minimum(lane.number, TOKENS), lane.always)
    copied = [m.load(row, lane.number // 8 + 4 * n, lane.always) for n in range(2)]

    def seat() -> Seated:
        count = m.ones(m.ballot((lane.number < TOKENS) & (token >= 0)))
        m.put(rows + lane.number, [token], lane.number < TOKENS)
        m.warp_barrier()
        return Seated(rows, count, adapter, copied)

    return Found(adapter >= 0, column_block, seat)


class _Token(NamedTuple):
    """The `place`th token, at which a lane looks.

    `number`: how many earlier ones have the same id.
    """

    place: Int
    inside: Flag  # whether there is such a token
    id: Int  # -1 if it is in no range
    number: Int


def _load_ids(lane: Lane, ids: Ref) -> list[_Token]:
    """All tokens' ids, dealt to the lanes of a block, and put to shared memory.

    A barrier of the block ends it.
    """
    m, words = lane.m, lane.work.id_words
    first_id = m.address(ids, m.integer(0), 0)
    tokens = []
    for first in range(0, lane.case.tokens, 32 * lane.work.warps):
        t = m.tid + first
        inside = t < lane.case.tokens
        word = m.load(first_id, t * words, inside)
        used = [inside & (word >= start) & (word < stop) for start, stop in lane.work.spans]
        valid = functools.reduce(operator.or_, used)
        if words == 2:
            valid = valid & m.equal(m.load(first_id, t * 2 + 1, inside), 0)
        own = m.select(valid, word, m.integer(-1))
        m.put(lane.at.ids + t, [own], t < lane.at.ids_stride)
        tokens.append(_Token(t, inside, own, m.integer(0)))
    m.put(lane.at.rows + m.tid, [m.integer(-1)], m.tid < TOKENS)
    m.barrier()
    return tokens


def _number(lane: Lane, tokens: list[_Token]) -> list[_Token]:
    """The tokens with their numbers, which go to shared memory, as do the masks of those that lead.

    A barrier of the block ends it.
    """
    m, at = lane.m, lane.at
    below = (m.integer(1) << lane.number) - 1
    numbered = []
    for token in tokens:
        t = token.place
        number = m.ones(m.match(token.id) & below)
        # Only for words that are there: a warp may have no token.
        words_before = m.select(t // 32 * 32 < lane.case.tokens, t // 32, 0)
        if lane.case.tokens > 32:
            count = functools.partial(_count_earlier, lane, token.id)
            [number] = m.loop(words_before, count, [number])
        leads = m.ballot(token.inside & (token.id >= 0) & m.equal(number % TOKENS, 0))
        m.put(at.masks + t // 32, [leads], m.equal(lane.number, 0) & token.inside)
        m.put(at.numbers + t, [number], token.inside)
        numbered.append(token._replace(number=number))
    m.barrier()
    return numbered


def _count_earlier(lane: Lane, own: Int, j: Int, carry: list[Int]) -> list[Int]:
    """The count plus those among the jth 32 tokens that have the same id."""
    m, [total] = lane.m, carry
    for n in range(0, 32, 4):
        for other in m.get(lane.at.ids + j * 32 + n, 4):
            total = m.select(m.equal(other, own), total + 1, total)
    return [total]


def _seat(lane: Lane, tokens: list[_Token], leader: Int) -> Seated:
    """Those of the leader's eight, put to shared memory. Each barrier is one of the block."""
    m, at = lane.m, lane.at
    mine = m.get(at.ids + leader, 1)[0]
    first = m.get(at.numbers + leader, 1)[0]
    for token in tokens:
        nth, same = token.number - first, m.equal(token.id, mine)
        m.put(at.rows + nth, [token.place], token.inside & same & (nth >= 0) & (nth < TOKENS))
    m.barrier()
    count = m.ones(m.ballot(m.get(at.rows + lane.number // 4, 1)[0] >= 0)) // 4
    copied = [m.get(at.rows + lane.number // 8 + 4 * n, 1)[0] for n in range(2)]
    return Seated(m.integer(at.rows), count, mine, copied)


def _nth_bit(m: Machine, masks: list[Int], n: Int) -> tuple[Int, Flag]:
    """The place of the nth bit that is set in the masks, and whether there is one."""
    bits, before, first, total = masks[0], n, m.integer(0), m.ones(masks[0])
    for word, mask in enumerate(masks[1:], 1):
        beyond = n >= total
        bits = m.select(beyond, mask, bits)
        before = m.select(beyond, n - total, before)
        first = m.select(beyond, m.integer(32 * word), first)
        total = total + m.ones(mask)
    bit, found = m.integer(0), n < total
    for width in (16, 8, 4, 2, 1):
        low = m.ones((bits >> bit) & ((1 << width) - 1))
        beyond = before >= low
        before = m.select(beyond, before - low, before)
        bit = m.select(beyond, bit + width, bit)
    return m.select(found, first + bit, 0), found
