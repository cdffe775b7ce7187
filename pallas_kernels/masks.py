"""Which elements of the ys the parts of a call add to."""

import dataclasses
import functools
import operator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas_kernels.routing import Segments, SlotRange, TokenIds, ids_of
from pallas_kernels.stacks import LoRAPart


@dataclasses.dataclass(frozen=True)
class Holders:
    """The table of which tokens have an adapter of these ranges: `[T]` bool.

    In a loop over layers it is made once: XLA makes it a launch of its own in each turn.
    """

    ranges: tuple[SlotRange, ...]

    def make(self, segments: Segments) -> tuple[Array]:
        return (self.of(segments),)

    def of(self, token_ids: TokenIds) -> Bool[Array, " T"]:
        ids = ids_of(token_ids)
        return functools.reduce(operator.or_, (slots.holds(ids) for slots in self.ranges))


def _used(token_ids: TokenIds, *ranges: SlotRange) -> Bool[Array, "T 1"]:
    table = Holders(ranges)
    if isinstance(token_ids, Segments):
        [used] = token_ids.table(table)
        return used[:, None]
    return table.of(token_ids)[:, None]


def changed(
    widths: tuple[int, ...], parts: tuple[LoRAPart, ...], token_ids: TokenIds
) -> list[Bool[Array, "T _"]]:
    """For each y, which elements some part adds to; one column where all columns are alike."""
    edges = np.cumsum(widths)
    covered: dict[SlotRange, np.ndarray] = {}  # the columns that parts of a range add to
    for part in parts:
        slots = SlotRange(part.first_slot, part.slots)
        columns = covered.setdefault(slots, np.zeros(edges[-1], bool))
        columns[part.y_offset :][: part.width] = True
    found = []
    for n in range(len(widths)):
        own = {slots: np.split(columns, edges[:-1])[n] for slots, columns in covered.items()}
        whole = [slots for slots, mine in own.items() if mine.all()]
        masks = [_used(token_ids, *whole)] if whole else [jnp.zeros((1, 1), bool)]
        masks += [
            _used(token_ids, slots) & mine
            for slots, mine in own.items()
            if mine.any() and not mine.all()
        ]
        found.append(functools.reduce(operator.or_, masks))
    return found


def masked(
    deltas: tuple[Array, ...], parts: tuple[LoRAPart, ...], token_ids: TokenIds
) -> tuple[Array, ...]:
    """The deltas of all ys, and -0.0, whose addition changes no number, where no part adds."""
    where = changed(tuple(delta.shape[1] for delta in deltas), parts, token_ids)
    return tuple(
        jnp.where(mine, delta, jnp.asarray(-0.0, delta.dtype)) for mine, delta in zip(where, deltas)
    )
