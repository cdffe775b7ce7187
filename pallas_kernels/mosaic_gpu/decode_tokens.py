"""Which tokens a cluster of the decode kernel takes: up to eight that use the same adapters.

Among the tokens of the same adapters the first, the ninth, ... lead eight each, and the leaders'
order numbers the clusters: so each adapter is read once per eight of its tokens, and the clusters
that have work start first. Of a batch of raw ids each cluster finds its tokens by itself. Of
`Segments`, which the layers of a step share, XLA finds them once, and clusters start sooner. It
also tells clusters of the same tokens which columns of y they have; those that are many come first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.mosaic_gpu.decode_plan import TOKENS, Plan

# Whether a cluster has tokens; its number among those that deal the columns of y for them; and what
# then puts them to shared memory.
Tokens = tuple[Any, Any, Callable[[], "Seated"]]


class Seated(NamedTuple):
    """A cluster's tokens: their place and their number, the keys that name their adapters, and of
    those that this lane copies x for, numbers lane // 8 and 4 more, the token or -1."""

    rows: Any
    count: Any
    keys: list[Any]
    copied: list[Any]


def tokens_of(m: Any, plan: Plan, cluster: Any, column_block: Any, ids: list[Any]) -> Tokens:
    if plan.seated:
        return _seated(m, plan, cluster, ids)
    active, seat = _found(m, plan, cluster, ids)
    return active, column_block, seat


def seating(
    keys: Int[Array, " T"], shares: Int[Array, " T"], clusters: int
) -> Int[Array, "clusters 10"]:
    """Of each cluster its tokens, up to eight, then -1s, and behind them their key, -1 for none,
    and the cluster's number among the `shares` that deal these tokens' columns of y.

    Tokens of negative keys have no seat. Those with many shares come first, as they take longest.
    """
    token = jnp.arange(keys.shape[0], dtype=jnp.int32)[None]
    is_before = token < token.T
    number = jnp.sum((keys[None] == keys[:, None]) & is_before, axis=1, dtype=jnp.int32)
    leads = (keys >= 0) & (number % TOKENS == 0)
    keys, number, leads, shares = (z[None] for z in (keys, number, leads, shares))
    is_ahead = (shares > shares.T) | ((shares == shares.T) & is_before)
    start = jnp.sum(jnp.where(leads & is_ahead, shares, 0), axis=1, dtype=jnp.int32)[None]
    column = jnp.arange(clusters, dtype=jnp.int32)[:, None] - start
    is_leader = leads & (column >= 0) & (column < shares)

    def of_leader(values: Array, none: int) -> Array:
        return jnp.max(jnp.where(is_leader, values, none), axis=1, keepdims=True)

    key = of_leader(keys, -1)
    seat = of_leader(number, 0)[:, :, None] + jnp.arange(TOKENS, dtype=jnp.int32)[None, :, None]
    is_mine = ((keys >= 0) & (keys == key))[:, None, :] & (number[None] == seat)
    tokens = jnp.max(jnp.where(is_mine, token[None], -1), axis=2)
    return jnp.concatenate([tokens, key, of_leader(column, 0)], axis=1)


def _seated(m: Any, plan: Plan, cluster: Any, ids: list[Any]) -> Tokens:
    """By the table that `seating` made."""
    row, always = m.address(ids[0], cluster, TOKENS + 2), m.tid >= 0
    key, column_block = (m.load(row, TOKENS + n, always) for n in range(2))
    lane, rows = m.tid % 32, plan.rows + m.tid // 32 * TOKENS  # each warp's own
    token = m.load(row, m.minimum(lane, TOKENS), always)
    copied = [m.load(row, lane // 8 + 4 * n, always) for n in range(2)]

    def seat() -> Seated:
        count = m.ones(m.ballot((lane < TOKENS) & (token >= 0)))
        m.put(rows + lane, [token], lane < TOKENS)
        m.warp_barrier()
        return Seated(rows, count, [key], copied)

    return key >= 0, column_block, seat


def _found(m: Any, plan: Plan, cluster: Any, ids: list[Any]) -> tuple[Any, Callable[[], Seated]]:
    """By all tokens' ids."""

    def every(op: Any, values: Any) -> Any:
        return functools.reduce(op, values)

    lane, threads = m.tid % 32, 32 * plan.warps
    addresses = {i: m.address(ids[i], m.integer(0), 0) for i in plan.lists}
    places = [plan.ids + n * plan.ids_stride for n in range(len(plan.keys))]
    tokens: list[Any] = []  # of this lane: number, whether there is one, its keys
    for first in range(0, plan.tokens, threads):
        t = m.tid + first
        inside = t < plan.tokens
        own = []
        for place, starts in zip(places, plan.keys):
            key = m.integer(-1)
            for i, start in reversed(starts.items()):
                words = plan.id_words[i]
                word = m.load(addresses[i], t * words, inside)
                valid = inside & (word >= 0) & (word < plan.lists[i])
                if words == 2:
                    valid = valid & (m.load(addresses[i], t * 2 + 1, inside) == 0)
                key = m.select(valid, word + start if start else word, key)
            own.append(key)
            m.put(place + t, [key], t < plan.ids_stride)
        tokens.append((t, inside, own))
    m.put(plan.rows + m.tid, [m.integer(-1)], m.tid < TOKENS)
    m.barrier()
    below = (m.integer(1) << lane) - 1
    for n, (t, inside, own) in enumerate(tokens):
        # How many tokens before this one use the same adapters.
        number = m.ones(every(lambda a, b: a & b, [m.match(key) for key in own]) & below)

        def earlier(j: Any, carry: list[Any], own: list[Any] = own) -> list[Any]:
            theirs = [
                [key for n in range(0, 32, 4) for key in m.get(place + j * 32 + n, 4)]
                for place in places
            ]
            total = carry[0]
            for keys in zip(*theirs):
                same = every(lambda a, b: a & b, [a == b for a, b in zip(keys, own)])
                total = m.select(same, total + 1, total)
            return [total]

        # Only for words that are there: a warp may have no token.
        words_before = m.select(t // 32 * 32 < plan.tokens, t // 32, 0)
        if plan.tokens > 32:
            [number] = m.loop(words_before, earlier, [number])
        used = every(lambda a, b: a | b, [key >= 0 for key in own])
        leads = m.ballot(inside & used & (number % TOKENS == 0))
        m.put(plan.masks + t // 32, [leads], (lane == 0) & inside)
        m.put(plan.numbers + t, [number], inside)
        tokens[n] = t, inside, own, number
    m.barrier()
    masks = [m.get(plan.masks + n, 1)[0] for n in range(pl.cdiv(plan.tokens, 32))]
    leader, active = _nth_bit(m, masks, cluster)

    def seat() -> Seated:
        mine = [m.get(place + leader, 1)[0] for place in places]
        first = m.get(plan.numbers + leader, 1)[0]
        for t, inside, own, number in tokens:
            same = every(lambda a, b: a & b, [a == b for a, b in zip(own, mine)])
            nth = number - first
            m.put(plan.rows + nth, [t], inside & same & (nth >= 0) & (nth < TOKENS))
        m.barrier()
        count = m.ones(m.ballot(m.get(plan.rows + lane // 4, 1)[0] >= 0)) // 4
        copied = [m.get(plan.rows + lane // 8 + 4 * n, 1)[0] for n in range(2)]
        return Seated(m.integer(plan.rows), count, mine, copied)

    return active, seat


def _nth_bit(m: Any, masks: list[Any], n: Any) -> tuple[Any, Any]:
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
