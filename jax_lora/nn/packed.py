"""Projections of one input, with the adapters of all of them in one op."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jax_lora.batch import AdapterBatch, current, use
from jax_lora.nn.dora import rescaled
from jax_lora.nn.layer import on_shards
from jax_lora.nn.linear import LoRADense
from jax_lora.nn.ops import add_in_step, delta_ahead
from jax_lora.sharding import shards_of


def call_packed(layers: Sequence[Any], x: Array) -> tuple[Array, ...]:
    """`layer(x)` of each layer; in a decode step, with the adapters of all of them in one op.

    For projections of one input: query, key and value, or gate and up. Takes the batch of
    `jax_lora.use`.

    Example::

        q, k, v = call_packed((self.q_proj, self.k_proj, self.v_proj), x)

    Args:
      layers: `nnx.Linear` layers, with stacks (`LoRADense`) or without, of one dtype.
      x: as each of them takes it.

    Raises:
      TypeError: a layer is of another type.
      ValueError: the batch does not fit a layer's buckets or the rows of x.
    """
    for layer in layers:
        if not isinstance(layer, nnx.Linear):
            raise TypeError(f"call_packed takes nnx.Linear layers, got {type(layer).__name__}")
    batch = current()
    lora = [layer for layer in layers if isinstance(layer, LoRADense)]
    # A prefill takes two launches, which want one y: to lay its large outputs side by side costs
    # more than launches.
    if (
        batch is None
        or batch.phase != "decode"
        or not lora
        or any(hasattr(layer, "full") for layer in lora)
    ):
        return tuple(layer(x) for layer in layers)
    divided = [shards_of(layer, jnp.asarray(x)) for layer in lora]
    if (shards := divided[0]) is None:
        return _packed(layers, x, batch)
    if shards.fully or any(other != shards for other in divided):
        return tuple(layer(x) for layer in layers)
    ys = iter(on_shards(lora, shards, jnp.asarray(x), batch, _packed))
    return tuple(next(ys) if isinstance(layer, LoRADense) else layer(x) for layer in layers)


def _packed(layers: Sequence[Any], x: Array, batch: AdapterBatch) -> tuple[Array, ...]:
    """The layers' ys, by one op for the adapters of all."""

    def base(x: Array) -> list[Array]:
        with use(None):
            return [layer(x) for layer in layers]

    shapes = jax.eval_shape(base, x)
    (matrix,) = layers[0].promote_dtype((x,), dtype=shapes[0].dtype)
    ends = list(itertools.accumulate(layer.out_features for layer in layers))
    parts_of = [layer.parts(batch) if isinstance(layer, LoRADense) else [] for layer in layers]
    parts = [
        dataclasses.replace(part, y_offset=start + part.y_offset)
        for mine, start in zip(parts_of, [0, *ends])
        for part in mine
    ]
    segments = batch.segments(matrix.shape[:-1])
    matrix = matrix.reshape(-1, matrix.shape[-1])
    rows = [jax.ShapeDtypeStruct((matrix.shape[0], y.shape[-1]), y.dtype) for y in shapes]
    x, deltas = delta_ahead(x, matrix, parts, segments, rows, phase=batch.phase)
    ys = base(x)
    matrices = tuple(y.reshape(-1, y.shape[-1]) for y in ys)
    out = add_in_step(matrices, matrix, parts, segments, phase=batch.phase, deltas=deltas)
    out = tuple(
        rescaled(layer, new, mine, segments) if mine else new
        for layer, new, mine in zip(layers, out, parts_of)
    )
    return tuple(new.reshape(y.shape) for new, y in zip(out, ys))
