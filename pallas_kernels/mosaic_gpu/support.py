"""What the kernels can't do, in words. Callers then take another implementation, or say it."""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels.mosaic_gpu.layouts import cuts
from pallas_kernels.stacks import LoRAPart, is_eight_bits

MAX_RANK = 512
MAX_FEATURES = 131072
MAX_WIDTH = 262144  # the largest vocabularies, of output layers


def missing(
    weight_dtype: DTypeLike,
    rank: int,
    features: int | None = None,
    width: int | None = None,
    y_dtype: DTypeLike | None = None,
    y_width: int | None = None,
    y_offset: int = 0,
) -> str | None:
    """What the kernels lack for a case, as the object of "lacks"; None if they take it.

    `features` is H (None for an expand), `width` N and `y_width` y's columns (None for a shrink).
    x may have any dtype of the ops.
    """
    if weight_dtype not in (jnp.bfloat16, jnp.float16) and not is_eight_bits(weight_dtype):
        return f"{jnp.dtype(weight_dtype).name} weights (it takes bfloat16 and float16)"
    if rank != 8 and (rank % 16 or not 16 <= rank <= MAX_RANK):
        return f"rank {rank} (it takes 8 and the multiples of 16 up to {MAX_RANK})"
    for name, size, most in (("H", features, MAX_FEATURES), ("N", width, MAX_WIDTH)):
        if size is not None and (size % 8 or not 64 <= size <= most):
            return f"{name}={size} (it takes multiples of 8 from 64 to {most})"
    if y_dtype is not None and y_width is not None:  # TMA copies and strides in units of 16 bytes
        row, first = (n * jnp.dtype(y_dtype).itemsize for n in (y_width, y_offset))
        if row % 16:
            return f"rows of y of {row} bytes (it takes multiples of 16)"
        if first % 16:
            return f"y_offset={y_offset}, {first} bytes into y (it takes multiples of 16)"
    return None


def missing_parts(
    parts: tuple[LoRAPart, ...], widths: tuple[int, ...], y_dtype: DTypeLike
) -> str | None:
    """What the kernels lack for a call with these parts, of checked shapes, that adds to ys of
    these widths; None if they take it."""
    lacks = []
    for part in parts:
        a, b = jnp.asarray(part.lora_a), jnp.asarray(part.lora_b)
        sizes = part.rank, part.features, part.width
        lacks += [
            missing(weights.dtype, *sizes, y_dtype, width, part.y_offset)
            for weights in (a, b)
            for width in (*widths, sum(widths))
        ]
        if a.dtype != b.dtype:
            lacks.append(f"{a.dtype} lora_a beside {b.dtype} lora_b (it takes both in one dtype)")
    spans = tuple((p.y_offset, p.y_offset + p.width) for p in parts)
    lacks.append(missing_together(spans))
    return next(filter(None, lacks), None)


def missing_together(spans: tuple[tuple[int, int], ...]) -> str | None:
    """What the kernels lack for parts that add to the columns [start, stop) of these spans, each of
    which they take alone; None if they take them together."""
    for cut in cuts(spans):
        if width := (cut.stop - cut.start) % 8:
            what = f"columns [{cut.start}, {cut.stop}) between edges of overlapping parts"
            return f"{what}, {width} more than a multiple of 8"
    return None


def missing_gradient(
    num_tokens: int, weights: Iterable[DTypeLike], **others: DTypeLike
) -> str | None:
    """What the gradients' kernels lack for stacks that the forward's take; XLA's form then runs.

    `weights` and `others`, x and y by name, are dtypes.
    """
    if num_tokens == 0:
        return "calls without a token"
    for dtype in weights:
        for name, other in others.items():
            if other != dtype:
                names = jnp.dtype(dtype).name, jnp.dtype(other).name
                return f"gradients of {names[0]} weights beside {names[1]} {name}"
    return None
