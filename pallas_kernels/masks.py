"""Which elements of the ys the parts of a call add to."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from pallas_kernels.routing import Segments, SlotRange, TokenIds, ids_of
from pallas_kernels.stacks import LoRAPart


@dataclasses.dataclass(frozen=True)
class InUse:
    """Which tokens have an adapter of a range. As a table, a loop over layers makes it once."""

    slots: SlotRange

    def make(self, segments: Segments) -> tuple[Bool[Array, " T"]]:
        return (self.slots.holds(segments.indices),)


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
    found = [jnp.zeros((1, 1), bool)] * len(widths)
    for slots, columns in covered.items():
        used = _in_use(token_ids, slots)[:, None]
        for n, mine in enumerate(np.split(columns, edges[:-1])):
            if mine.any():
                found[n] |= used if mine.all() else used & mine
    return found


def _in_use(token_ids: TokenIds, slots: SlotRange) -> Bool[Array, " T"]:
    if isinstance(token_ids, Segments):
        [used] = token_ids.table(InUse(slots))
        return used
    return slots.holds(ids_of(token_ids))


def masked(
    deltas: tuple[Array, ...], parts: tuple[LoRAPart, ...], token_ids: TokenIds
) -> tuple[Array, ...]:
    """The deltas of all ys, and -0.0, whose addition changes no number, where no part adds."""
    where = changed(tuple(delta.shape[1] for delta in deltas), parts, token_ids)
    return tuple(
        jnp.where(mine, delta, jnp.asarray(-0.0, delta.dtype)) for mine, delta in zip(where, deltas)
    )
