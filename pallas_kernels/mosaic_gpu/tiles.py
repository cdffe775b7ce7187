"""Pieces that the kernels share: the route of a tile, cuts of columns, layouts in shared memory."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config as jax_config  # the interpret mode in force; JAX has no public getter
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, DTypeLike, Int

from pallas_kernels.mosaic_gpu.config import TILE
from pallas_kernels.segments import Segments

# -1s behind a route's adapters, so that kernels may look ahead.
_LOOK_AHEAD = 96
# Elements that TMA copies at once along an axis, at most.
_COPIED = 256
ROWS = plgpu.Layout.WGMMA.reduce(1)
# JAX leaves a method of these abstract, which mypy minds.
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform


def in_place(
    kernel: Callable[..., None], ys: tuple[Array, ...], *operands: Array
) -> tuple[Array, ...]:
    """ys as `kernel(*y_refs, *operands)` leaves them, in their memory where XLA can donate that.

    XLA fuses slices of operands and updates of slices into a custom call, and forgets there that
    this one changes its operand: under `jax.vmap`, or where `lax.scan` slices or stacks something,
    the result was zeros (jax 0.11.2, H200). Barriers keep the slices out.
    """
    ys, operands = lax.optimization_barrier((ys, operands))
    refs = [jax.new_ref(y) for y in ys]
    kernel(*refs, *operands)
    return lax.optimization_barrier(tuple(jax.freeze(ref) for ref in refs))


def interpreted() -> bool:
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def routes(segments: Segments, rows: int = TILE) -> Int[Array, "blocks W"]:
    """Per `rows` consecutive tokens: their adapters, how many distinct ones, which, then -1.

    So word `rows` holds the count, and the distinct adapters start behind it.
    """
    ids = pad_to(segments.indices, 0, rows, -1).reshape(-1, rows)
    if segments.num_tokens <= rows:
        distinct = segments.group_adapters[None]
    else:
        token = jnp.arange(rows, dtype=jnp.int32)[None]
        is_before = (token < token.T)[None]
        first = (ids >= 0) & ~jnp.any((ids[:, :, None] == ids[:, None, :]) & is_before, axis=2)
        place = jnp.sum(first[:, None, :] & is_before, axis=2, dtype=jnp.int32)
        # XLA computed each place once per slot: T=4096, 1 slot, H100, 91 us.
        place = lax.optimization_barrier(jnp.where(first, place, rows))
        slot = jnp.arange(min(rows, segments.num_adapters), dtype=jnp.int32)
        here = place[:, None, :] == slot[None, :, None]
        distinct = jnp.max(jnp.where(here, ids[:, None, :], -1), axis=2)
    count = jnp.sum(distinct >= 0, axis=1, keepdims=True, dtype=jnp.int32)
    pad = route_words(segments, rows) - (rows + 1 + distinct.shape[1])
    tail = jnp.full((ids.shape[0], pad), -1, jnp.int32)
    return jnp.concatenate([ids, count, distinct, tail], axis=1)


def route_words(segments: Segments, rows: int) -> int:
    """W of `routes`: TMA wants whole 128 bytes."""
    words = rows + 1 + min(rows, segments.num_tokens, segments.num_adapters) + _LOOK_AHEAD
    return -(-words // 32) * 32


def route_memory(segments: Segments, rows: int) -> Any:
    """What holds a block's route."""
    return plgpu.SMEM((route_words(segments, rows),), jnp.int32)


def shared_bytes(arrays: Iterable[Any]) -> int:
    """Of arrays in shared memory, where each takes whole KiB."""
    sizes = (math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)
    return sum(-(-size // 1024) * 1024 for size in sizes)


def copy_route(table: Any, block: Array, route: Any, barrier: Any) -> None:
    """Copies a block's route to shared memory, in `route_copies` copies."""
    words = route.shape[0]
    for first in range(0, words, _COPIED):
        piece = pl.ds(first, min(_COPIED, words - first))
        plgpu.copy_gmem_to_smem(table.at[block, piece], route.at[piece], barrier)


def route_copies(segments: Segments, rows: int) -> int:
    return -(-route_words(segments, rows) // _COPIED)


class Cut(NamedTuple):
    """Columns [start, stop) of y and the parts that add to all of them."""

    start: int
    stop: int
    parts: tuple[int, ...]


def cuts(spans: tuple[tuple[int, int], ...]) -> list[Cut]:
    """The columns that the parts' spans cover, cut at each other's edges."""
    edges = sorted({edge for span in spans for edge in span})
    found = []
    for start, stop in itertools.pairwise(edges):
        covering = tuple(i for i, (a, b) in enumerate(spans) if a <= start and stop <= b)
        if covering:
            found.append(Cut(start, stop, covering))
    return found


def row_mask(ids: Int[Array, " rows"], adapter: Array, columns: int) -> Bool[Array, "rows columns"]:
    """True in the rows of `adapter`; nowhere if that is -1."""
    adapter = jnp.where(adapter < 0, jnp.int32(-2), adapter)
    return lax.broadcast_in_dim(ids == adapter, (ids.shape[0], columns), (0,))


def pad_to(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    pad = -x.shape[axis] % multiple
    if pad == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    return jnp.pad(x, widths, constant_values=value)


def operand_rows(num_tokens: int) -> int:
    """Rows of a wgmma operand in device memory: TMA cuts them into eights if there are more."""
    return num_tokens if num_tokens <= 8 else -(-num_tokens // 8) * 8


def pad_rows(x: Array, axis: int = 0) -> Array:
    return x if operand_rows(x.shape[axis]) == x.shape[axis] else pad_to(x, axis, 8)


def operand_layout(dtype: DTypeLike, columns: int) -> tuple[plgpu.Transform, ...]:
    """wgmma's operands in shared memory: tiles of 8 rows with the widest swizzle that fits."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    return _Tiling((8, swizzle // size)), _Swizzle(swizzle)


def pieces(width: int, itemsize: int) -> list[tuple[int, int]]:
    """`width` columns as (first, size) pieces of 128 bytes, then one each of 64, 32 and 16."""
    cut, first = [], 0
    for row_bytes in (128, 64, 32, 16):
        size = row_bytes // itemsize
        while width - first >= size:
            cut.append((first, size))
            first += size
    return cut


def plain_layout(row_bytes: int) -> tuple[plgpu.Transform, ...]:
    """Rows of `row_bytes` in shared memory, swizzled but not tiled: TMA then takes any T."""
    return () if row_bytes == 16 else (_Swizzle(row_bytes),)


def store_rows(ref: Any, value: Array) -> None:
    """ref[...] = value, also where rows are narrower than 128 bytes and banks conflict."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on, a plain store refuses bank conflicts
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def accumulator(rows: int, columns: int) -> Any:
    """wgmma's accumulator: `[rows, columns]` of float32 in registers, the tiles one by one."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


@plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
def cluster_barrier(_: Any) -> None:
    # A ClusterBarrier orders at the scope of a block: seen on an H100, peers then read stale sums.
    mgpu.utils.inline_ptx(
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
        convergent=True,
    )
