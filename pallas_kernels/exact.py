"""The exact form: a row has the same bits in a call of any size, by one program of few rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.routing import AnyIds, Mix, columns_of, ids_of
from pallas_kernels.stacks import LoRAPart

# One launch of the decode kernel, whose rows are all multiplied by tensor cores. More would cost a
# decode step, fewer a training step.
ROWS = 64

_Delta = Callable[[Array, tuple[LoRAPart, ...], AnyIds], tuple[Array, ...]]


def in_chunks(
    delta: _Delta, x: Array, parts: tuple[LoRAPart, ...], ids: AnyIds
) -> tuple[Array, ...]:
    """`delta(x, parts, ids)`, always of `ROWS` rows: of the tokens by turns, the last ones filled
    up with rows of no adapter.

    The program follows from shapes, and a row's result does not depend on the other rows of its
    call. So its bits are the same among eight tokens of a decode step and 8192 of a training step.
    """
    num_tokens = x.shape[0]
    chunks = -(-num_tokens // ROWS)
    missing = chunks * ROWS - num_tokens

    def cut(rows: Array, fill: int = 0) -> Array:
        room = [(0, missing), *[(0, 0)] * (rows.ndim - 1)]
        return jnp.pad(rows, room, constant_values=fill).reshape(chunks, ROWS, *rows.shape[1:])

    columns = tuple(cut(ids_of(column.token_ids), -1) for column in columns_of(ids))
    weights = cut(ids.weights) if isinstance(ids, Mix) else None

    def chunk(some: tuple[Array, tuple[Array, ...], Array | None]) -> tuple[Array, ...]:
        x, columns, weights = some
        return delta(x, parts, columns[0] if weights is None else Mix(columns, weights))

    deltas = jax.lax.map(chunk, (cut(x), columns, weights))
    return tuple(one.reshape(-1, one.shape[-1])[:num_tokens] for one in deltas)
