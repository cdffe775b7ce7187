"""How many slots a server's model has, and which of them are kept for tenants."""

import collections
from collections.abc import Iterable, Sequence

from jax_lora.bank.reservations import Reservations
from jax_lora.messages import shown
from jax_lora.serving.server.reserve import Reserve
from jax_lora.serving.text import fitting_slots
from pallas_kernels import padded_rank
from pallas_kernels.ranks import rank_bucket

Kept = dict[str, dict[int, int]]


def planned_slots(
    ranks: Sequence[int], most: int, max_rank: int | None, reserves: Iterable[Reserve]
) -> tuple[dict[int, int], Kept]:
    """The slots of each rank bucket; and those that are kept, by prefix, for `AdapterBank.reserve`.

    Args:
      ranks: of the adapters that are there.
      most: slots of a bucket.
      max_rank: of adapters that come later; None for the largest of `ranks`, or 64.

    Raises:
      ValueError: a rank is above all buckets; two options keep slots of one bucket for one prefix;
        a prefix is malformed or begins with another; or nothing is left for other adapters.
    """
    counts = fitting_slots(ranks)
    largest = max(counts, default=padded_rank(64))
    if max_rank is not None:
        largest = max(largest, padded_rank(max_rank))
    kept = _kept(reserves, sorted({*counts, largest}))
    total: collections.Counter[int] = collections.Counter()
    for own in kept.values():
        total.update(own)
    for bucket, count in total.items():
        if count >= most:
            raise ValueError(
                f"--reserve keeps {count} slots of bucket {bucket}, and with --slots {most} none "
                f"is left for other adapters; keep fewer, or give --slots {count + 1} or more"
            )
    # What is kept comes on top: else adapters that fit without it would take turns.
    slots = {bucket: min(n + total[bucket], most) for bucket, n in counts.items()}
    # The largest bucket takes any adapter that is loaded later.
    slots[largest] = most
    reservations = Reservations(slots)  # the bank's own check, before there is a model
    for prefix, own in kept.items():
        reservations.put(prefix, own)
    return slots, kept


def _kept(reserves: Iterable[Reserve], buckets: Sequence[int]) -> Kept:
    kept: Kept = {}
    for prefix, count, rank in reserves:
        own = kept.setdefault(prefix, {})
        if rank is not None and rank > buckets[-1]:
            raise ValueError(
                f"--reserve {shown(prefix)} is for rank {rank}, but the server takes ranks up to "
                f"{buckets[-1]}; give --max-rank {rank}"
            )
        for bucket in buckets if rank is None else [rank_bucket(rank, buckets=tuple(buckets))]:
            if bucket in own:
                raise ValueError(
                    f"two --reserve options keep slots of bucket {bucket} for {shown(prefix)}; "
                    "give one"
                )
            own[bucket] = count
    return kept
