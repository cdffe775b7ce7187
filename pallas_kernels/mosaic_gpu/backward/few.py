"""What kernels of tiles with few tokens share: blocks of lanes, without squares, and their launch.

A square has 64 tokens. Where most tiles have a few, blocks of squares are many, and each waits for
its tokens and computes little. Here a lane has 8 columns, so that a block has eight times as many,
and lanes multiply as many tokens as there are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic_gpu.lanes import ArrayMemory, Emulator, Gpu, MemRef
from pallas_kernels.mosaic_gpu.lanes.values import Int, Machine, Real, Ref
from pallas_kernels.mosaic_gpu.layouts import Ref as PallasRef
from pallas_kernels.mosaic_gpu.layouts import body_of, interpreted

WARPS = 4
THREADS = 32 * WARPS
EACH = 8  # columns of a lane: 16 bytes
CHUNK = 32 * EACH  # columns of a warp
COLUMNS = WARPS * CHUNK  # and of a block

# What a block does: it gets its machine, the operands and what comes out, and its number.
type Body = Callable[[Machine, Sequence[Ref], Int], None]


def halves(m: Machine, place: Int, dtype: np.dtype) -> list[Real]:
    """The eight that lie in 16 bytes of shared memory."""
    return [half for word in m.get(place, 4) for half in m.unpack(word, dtype)]


def packed(m: Machine, values: Sequence[Real], dtype: np.dtype) -> list[Int]:
    """Eight of them, rounded, as 16 bytes."""
    return [m.pack(low, high, dtype) for low, high in itertools.batched(values, 2)]


def place_of(m: Machine, first: Ref, nth: Int, shared: int) -> Int:
    """Where the nth adapter's A, or B, stands: in a stack whose first one stands at `first`, and in
    which `shared` adapters have one."""
    place = nth + m.load(m.address(first, m.integer(0), 1), 0, m.tid >= 0)
    return place // shared if shared > 1 else place


def launch(
    name: str, body: Body, blocks: int, words: int, operands: Sequence[Array],
    outs: list[jax.ShapeDtypeStruct],
) -> list[Array]:  # fmt: skip
    """What so many blocks with so many words of shared memory make of the operands."""
    if interpreted():
        run = functools.partial(_emulate, body, blocks, words, outs)
        return list(jax.pure_callback(run, list(outs), *operands, vmap_method="sequential"))
    dtypes = [np.dtype(one.dtype) for some in (operands, outs) for one in some]

    def kernel_body(*refs: PallasRef) -> None:
        @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
            arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT)
        )
        def inline(_: object, *args: PallasRef) -> None:
            m = Gpu(args[len(dtypes)], begins=False)
            arrays: list[Ref] = [MemRef(*array) for array in zip(args, dtypes)]
            body(m, arrays, m.uniform(args[-1]))

        inline(*refs, lax.axis_index("block"))

    kernel = plgpu.kernel(
        body_of(kernel_body),
        out_type=list(outs),
        scratch_types=[plgpu.SMEM((words,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
    out: list[Array] = kernel(*operands)
    return out


def _emulate(
    body: Body, blocks: int, words: int, outs: list[jax.ShapeDtypeStruct], *operands: Array
) -> tuple[np.ndarray, ...]:
    """The kernel carried out in numpy, a block after the other. NaN shows what no block stores."""
    empty: list[np.ndarray] = [np.full(out.shape, np.nan, out.dtype) for out in outs]
    memory = ArrayMemory([*(np.asarray(array) for array in operands), *empty])
    for nth in range(blocks):
        m = Emulator(memory, words, 1, THREADS)
        body(m, memory.refs, m.integer(nth))
    return tuple(memory.array(len(operands) + i) for i in range(len(outs)))
