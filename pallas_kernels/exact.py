"""The exact form: a row has the same bits in a call of any size, by one program of few rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.routing import TokenIds, ids_of
from pallas_kernels.stacks import LoRAPart

# One launch of the decode kernel, whose rows are all multiplied by tensor cores. More would cost a
# decode step, fewer a training step.
ROWS = 64

_Delta = Callable[[Array, tuple[LoRAPart, ...], Array], tuple[Array, ...]]


def in_chunks(
    delta: _Delta, x: Array, parts: tuple[LoRAPart, ...], token_ids: TokenIds
) -> tuple[Array, ...]:
    """`delta(x, parts, ids)`, always of `ROWS` rows: of the tokens by turns, the last ones filled
    up with rows of no adapter.

    The program follows from shapes, and a row's result does not depend on the other rows of its
    call. So its bits are the same among eight tokens of a decode step and 8192 of a training step.
    """
    num_tokens, ids = x.shape[0], ids_of(token_ids)
    chunks = -(-num_tokens // ROWS)
    missing = chunks * ROWS - num_tokens
    x = jnp.pad(x, ((0, missing), (0, 0))).reshape(chunks, ROWS, -1)
    ids = jnp.pad(ids, (0, missing), constant_values=-1).reshape(chunks, ROWS)
    deltas = jax.lax.map(lambda some: delta(some[0], parts, some[1]), (x, ids))
    return tuple(one.reshape(-1, one.shape[-1])[:num_tokens] for one in deltas)
