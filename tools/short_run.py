"""Each kernel once, on small shapes, checked: what compute-sanitizer runs (see sanitize.sh)."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

import jax
import jax.numpy as jnp
import numpy as np
from eight_bit_cases import EightBitCase, Stack
from mosaic_cases import Case, as_jax, parts_in_float64, products, relative_error

from pallas_kernels import LoRAPart, make_segments
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import Config, backend

DEFAULT = Call("add_lora", "mosaic_gpu", ("bgmv",))
TWO_LAUNCHES = DEFAULT._replace(config=Config(split=4, expand_columns=4))
TWO_TILES = DEFAULT._replace(
    config=Config(split=2, expand_columns=2, row_tiles=2, expand_row_tiles=2)
)


@jax.jit
def run(y, x, a, b, scales, ids):
    slots = a.shape[0]
    segments = make_segments(ids, slots)
    part = LoRAPart(a, b, scales)
    # The same adapters in two ranges: tokens of odd ids take those of the second.
    both = part, LoRAPart(a, b, scales, first_slot=slots)
    used = (ids >= 0) & (ids < slots)
    in_both = make_segments(jnp.where(used, ids + slots * (ids % 2), -1), 2 * slots)
    delta_call = DEFAULT._replace(op="lora_delta", widths=(y.shape[1],), dtype=y.dtype)
    [delta] = backend.lora_delta(delta_call, x, both, in_both)
    v = backend.shrink(DEFAULT, None, x, a, segments, scales)
    return (
        v,
        backend.shrink(TWO_LAUNCHES, None, x, a, segments, scales),
        *backend.add_lora(DEFAULT, (y,), x, (part,), segments),
        *backend.add_lora(TWO_LAUNCHES, (y,), x, (part,), segments),
        *backend.add_lora(TWO_TILES, (y,), x, (part,), segments),
        y + delta,
        backend.expand(DEFAULT, v, b, segments, y),
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

for case in (
    EightBitCase(150, 1040, (Stack(8, 3, 200),)),
    EightBitCase(300, 1024, (Stack(64, 5, 192),)),
):
    (x, y), parts, ids = case.rows(), tuple(case.parts()), case.ids
    delta, _ = parts_in_float64(x, parts, ids, case.columns)
    segments = make_segments(jnp.asarray(ids), case.stacks[0].slots)
    for call in DEFAULT, TWO_LAUNCHES, TWO_TILES:
        add = jax.jit(functools.partial(backend.add_lora, call))
        [new] = add((jnp.asarray(y),), jnp.asarray(x), parts, segments)
        assert relative_error(np.asarray(new), y.astype(np.float64) + delta) < 4e-3
    print("ok", case)
