"""Each kernel once, on small shapes, checked: what compute-sanitizer runs (see sanitize.sh)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
from mosaic_cases import Case, as_jax, products, relative_error

from pallas_kernels import LoRAPart, make_segments, mosaic_gpu

TWO_LAUNCHES = mosaic_gpu.Config(split=4, expand_columns=4)
TWO_TILES = mosaic_gpu.Config(split=2, expand_columns=2, row_tiles=2, expand_row_tiles=2)


@jax.jit
def run(y, x, a, b, scales, ids):
    segments = make_segments(ids, a.shape[0])
    part = LoRAPart(a, b, segments, scales, 0)
    even, odd = (jnp.where(ids % 2 == n, ids, -1) for n in range(2))
    both = tuple(LoRAPart(a, b, some, scales, 0) for some in (even, odd))
    v = mosaic_gpu.shrink(x, a, segments, scales)
    return (
        v,
        mosaic_gpu.shrink(x, a, segments, scales, config=TWO_LAUNCHES),
        *mosaic_gpu.add_lora_multi((y,), x, (part,)),
        *mosaic_gpu.add_lora_multi((y,), x, (part,), config=TWO_LAUNCHES),
        *mosaic_gpu.add_lora_multi((y,), x, (part,), config=TWO_TILES),
        *mosaic_gpu.add_lora_multi((y,), x, both, fuse=True, exclusive=True),
        mosaic_gpu.expand(v, b, segments, y, 0, add_inputs=True),
    )


for case in (
    Case(5, 1024, 200, 8, 3),
    Case(64, 2048, 1200, 16, 9),
    Case(150, 1024, 192, 64, 5),
    Case(12, 2048, 200, 128, 3),  # blocks add up sums for each other
    Case(300, 512, 192, 16, 5),
    Case(3200, 256, 64, 16, 3),  # parts in turn
):
    arrays = case.arrays()
    device = as_jax(arrays)
    v, v_in_two, *ys = run(*(device[k] for k in ("y", "x", "a", "b", "scales", "ids")))
    want = products(arrays.x, arrays.a, arrays.ids)
    want *= arrays.scales[np.maximum(arrays.ids, 0)][:, None]
    assert relative_error(np.asarray(v), want) < 1e-5
    assert relative_error(np.asarray(v_in_two), want) < 1e-5
    delta = products(want, arrays.b, arrays.ids)
    for y in ys:
        assert relative_error(np.asarray(y.astype(jnp.float32)), arrays.y + delta) < 4e-3
    print("ok", case)
