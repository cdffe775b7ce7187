"""The tokens of an x: which rows of a batch they belong to, and how adapters take them."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from jax_lora.sharding import by_shard, resharded
from pallas_kernels.routing import Mix, Segments, make_mix, make_segments, nearest_int32

Ranges = tuple[tuple[int, int], ...]


class Rows(NamedTuple):
    """What a batch says of its rows; see `AdapterBatch`."""

    indices: Array | np.ndarray
    lengths: Array | np.ndarray | None
    weights: Array | np.ndarray | None


class Tokens(NamedTuple):
    """The id of each token, `[*lead]`; with weights both are `[*lead, K]`."""

    ids: Array
    weights: Array | None


def first_ids(ranges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The id of each bucket's first slot. Ids count through the slots of one bucket after another.

    Args:
      ranges: `(bucket, slots)`, in the order of ids.
    """
    buckets, slots = zip(*ranges)
    return dict(zip(buckets, itertools.accumulate(slots, initial=0)))


def concrete(array: Array | np.ndarray | None) -> Array | np.ndarray | None:
    """The values of `array`; None where they are not known while a function is traced."""
    return array.to_concrete_value() if isinstance(array, jax.core.Tracer) else array


def has_traced_order(segments: Segments | Mix) -> bool:
    """Whether the order of tokens is known in a compiled function alone."""
    first = segments.columns[0] if isinstance(segments, Mix) else segments
    return isinstance(first, Segments) and isinstance(first.rows, jax.core.Tracer)


def spread(rows: Rows, lead: tuple[int, ...]) -> Tokens:
    """The tokens of an x of `[*lead, H]`.

    Raises:
      ValueError: the rows do not spread over `lead`.
    """
    indices = jnp.asarray(rows.indices)
    weights = None if rows.weights is None else jnp.asarray(rows.weights)
    num_rows, columns = indices.shape[0], indices.shape[1:]
    if rows.lengths is not None:
        row = _row_of_tokens(rows.lengths, lead)
        # One row more, which the tokens behind the last row belong to.
        none = jnp.full((1, *columns), -1, indices.dtype)
        ids = jnp.concatenate([indices, none])[row]
        if weights is not None:
            weights = jnp.concatenate([weights, jnp.zeros((1, *columns), weights.dtype)])[row]
        return Tokens(ids, weights)
    if (lead[0] if lead else 1) != num_rows:
        raise ValueError(
            f"a batch of {num_rows} rows takes x of [{num_rows}, ..., features], got "
            f"[{', '.join(map(str, lead))}, features]; for flat tokens give lengths"
        )
    shape = (num_rows, *[1] * (len(lead) - 1)) if lead else ()

    def over_tokens(t: Array) -> Array:
        return jnp.broadcast_to(t.reshape(*shape, *columns), (*lead, *columns))

    return Tokens(over_tokens(indices), None if weights is None else over_tokens(weights))


def _row_of_tokens(lengths: Array | np.ndarray, lead: tuple[int, ...]) -> Array:
    """The row of each flat token; the number of rows behind the last."""
    if len(lead) != 1:
        raise ValueError(
            "a batch with lengths takes flat x of [T, features], got "
            f"[{', '.join(map(str, (*lead, 'features')))}]"
        )
    num_tokens = math.prod(lead)
    if (known := concrete(lengths)) is not None:
        if np.any(np.asarray(known) < 0):
            raise ValueError(f"lengths must not be negative, got {np.asarray(known).tolist()}")
        total = int(np.sum(np.asarray(known), dtype=np.int64))
        if total > num_tokens:
            raise ValueError(f"lengths sum to {total}, but x has {num_tokens} tokens")
    # In a compiled function there may be any lengths, of any integers. If a sum wrapped around,
    # tokens would belong to other rows.
    ends = jnp.cumsum(jnp.clip(nearest_int32(lengths), 0, num_tokens))
    return jnp.searchsorted(ends, jnp.arange(num_tokens, dtype=ends.dtype), side="right")


def sorted_tokens(tokens: Tokens, ranges: Ranges) -> Segments | Mix:
    """The tokens sorted by adapter, those of each bucket apart."""
    slots = sum(count for _, count in ranges)
    found: Segments | Mix
    if tokens.weights is None:
        found = make_segments(tokens.ids.reshape(-1), slots)
    else:
        columns = tokens.ids.shape[-1]
        found = make_mix(
            tokens.ids.reshape(-1, columns), tokens.weights.reshape(-1, columns), slots
        )
    if len(ranges) > 1:
        first = first_ids(ranges)
        found = found.split((first[bucket], count) for bucket, count in ranges)
    return found


def sorted_shards(tokens: Tokens, ranges: Ranges, sharding: NamedSharding) -> Segments | Mix:
    """`sorted_tokens` of each shard, behind each other."""

    def local(tokens: Tokens) -> Segments | Mix:
        return sorted_tokens(tokens, ranges)

    shards = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=by_shard(sharding),
        check_vma=False,  # integers, which nobody differentiates, and weights that stay theirs
    )
    return shards(jax.tree.map(lambda t: resharded(t, sharding), tokens))
