"""How the kernels lay out arrays in shared memory and registers, and cut columns."""

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
from jaxtyping import Array, DTypeLike

from pallas_kernels.manual import untyped
from pallas_kernels.mosaic_gpu.chip import MOST_BLOCKS
from pallas_kernels.routing import tables_alone

# A Pallas ref, to device memory, shared memory, or barriers: JAX types none of them.
type Ref = Any
# Shared memory that a kernel asks for; it gets a `Ref` to it.
type Memory = pl.MemoryRef

# One value per row of a wgmma product, in the registers of the threads that hold the row.
ROWS = plgpu.Layout.WGMMA.reduce(1)
# And one per column.
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# JAX leaves a method of these abstract, which mypy minds.
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform


def body_of(body: Callable[..., None]) -> Callable[..., None]:
    """A kernel's body, or an empty one where `Segments.with_tables` asks which tables a loop's turn
    needs. Bodies take most of the time of a trace, and this one is dropped."""
    return _empty if tables_alone() else body


def _empty(*refs: Ref) -> None:
    pass


def in_place(
    kernel: Callable[..., None], ys: tuple[Array, ...], *operands: Array
) -> tuple[Array, ...]:
    """ys as `kernel(*y_refs, *operands)` leaves them, in their memory where XLA can donate that.

    XLA fuses slices of operands, and updates of slices, into a custom call. Where y is a slice, or
    an update takes what the call makes, XLA forgets that the call changes its operand: under
    `jax.vmap`, or where `lax.scan` slices or stacks ys, the result was zeros (jax 0.11.2, H200).
    Barriers keep these out. Slices of other operands may come in: a scan over layers copies no
    stack then.
    """
    ys = lax.optimization_barrier(ys)
    refs = [jax.new_ref(untyped(y)) for y in ys]
    kernel(*refs, *operands)
    return lax.optimization_barrier(tuple(jax.freeze(ref) for ref in refs))


def place_of(adapter: Array, shared: int) -> Array:
    """Where an adapter's A, or B, stands in a stack in which `shared` adapters have one."""
    return lax.div(adapter, jnp.int32(shared)) if shared > 1 else adapter


def interpreted() -> bool:
    """Whether Pallas's interpret mode is on."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def grid_of(**axes: int) -> dict[str, Any]:
    """The arguments of a kernel for a grid of these axes, which it knows by name. One with more
    blocks than others may have comes last."""
    order = sorted(axes, key=lambda name: axes[name] > MOST_BLOCKS)
    return {"grid": tuple(axes[name] for name in order), "grid_names": tuple(order)}


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


class Band(NamedTuple):
    """Columns that TMA copies at once: `size` of them from `first` on."""

    first: int
    size: int


def bands(width: int, itemsize: int) -> list[Band]:
    """`width` columns as bands of 128 bytes, then one each of 64, 32 and 16: a swizzled row of
    shared memory has one of these sizes."""
    cut, first = [], 0
    for row_bytes in (128, 64, 32, 16):
        size = row_bytes // itemsize
        while width - first >= size:
            cut.append(Band(first, size))
            first += size
    return cut


def pad_to(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    """x with `value` behind it, up to a multiple of `multiple` along `axis`."""
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
    """x with `operand_rows` rows along `axis`."""
    return x if operand_rows(x.shape[axis]) == x.shape[axis] else pad_to(x, axis, 8)


def operand_layout(dtype: DTypeLike, columns: int) -> tuple[plgpu.Transform, ...]:
    """wgmma's operands in shared memory: tiles of 8 rows with the widest swizzle that fits."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if columns * size % s == 0)
    return _Tiling((8, swizzle // size)), _Swizzle(swizzle)


def plain_layout(row_bytes: int) -> tuple[plgpu.Transform, ...]:
    """Rows of `row_bytes` in shared memory, swizzled but not tiled: TMA then takes any T."""
    return () if row_bytes == 16 else (_Swizzle(row_bytes),)


def shared_bytes(arrays: Iterable[Memory]) -> int:
    """Shared memory of these arrays, of which each takes whole KiB."""
    sizes = (math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)
    return sum(-(-size // 1024) * 1024 for size in sizes)


def eight_bit_layout(columns: int) -> tuple[plgpu.Transform, ...]:
    """Stacks in 8 bits in shared memory: the tiles that the same columns have in bfloat16, whose
    rows have half of the bytes."""
    line = next(n for n in (64, 32, 16) if columns % n == 0)
    return _Tiling((8, line)), *plain_layout(line)


def store_rows(ref: Ref, value: Array) -> None:
    """ref[...] = value, also where rows are narrower than 128 bytes and banks conflict."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on, a plain store refuses bank conflicts
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def accumulator(rows: int, columns: int) -> plgpu.WGMMAAccumulatorRef:
    """wgmma's accumulator: `[rows, columns]` of float32 in registers, tile after tile."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


@plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
def cluster_barrier(_: Any) -> None:
    """Waits for all blocks of the cluster. What they wrote to shared memory before is then seen.

    plgpu.ClusterBarrier orders memory at the scope of a block: on an H100 peers read stale sums.
    """
    mgpu.utils.inline_ptx(
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
        convergent=True,
    )


@plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
def end_group(_: Ref) -> None:
    """Ends a group of what lanes copy by themselves: the copies since the last one."""
    mgpu.utils.inline_ptx("cp.async.commit_group;", convergent=True)


def wait_for_groups(pending: int) -> None:
    """Waits for all groups of copies but the last `pending`; wgmma may then read the others."""

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def inline(_: Ref) -> None:
        mgpu.utils.inline_ptx(f"cp.async.wait_group {pending};", convergent=True)

    inline()
    plgpu.commit_smem()
