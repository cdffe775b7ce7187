"""The ops as Pallas:Mosaic GPU kernels for Hopper (sm_90).

`docs/kernels.md` draws them. In short: tokens are cut into tiles of 64 consecutive rows, which are
wgmma's M. All tokens of a tile are multiplied with every adapter that occurs in it, and each row
selects its own product afterwards. So tokens may come in any order, no row is ever gathered, each
tile reads each of its adapters once, and what a row gets depends on that row alone. What is wasted
is tensor-core work, which these kernels, bound by memory, have to spare.

Up to 256 tokens take one launch instead (`decode.py`), for either half or both, written lane by
lane (`lanes.py`): its clusters own a few tokens of one adapter rather than tiles, and gather them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, DTypeLike, Float

from pallas_kernels import xla
from pallas_kernels.mosaic_gpu.config import (
    MAX_FEATURES,
    Config,
    decode_config,
    default_config,
    missing,
)
from pallas_kernels.mosaic_gpu.decode import decode_kernel
from pallas_kernels.mosaic_gpu.decode_plan import DecodePart, plan
from pallas_kernels.mosaic_gpu.decode_tokens import seating
from pallas_kernels.mosaic_gpu.expand import ExpandPart, expand_kernel
from pallas_kernels.mosaic_gpu.shrink import ShrinkPart, shrink_kernel
from pallas_kernels.mosaic_gpu.tiles import cuts, interpreted, pad_rows, pad_to
from pallas_kernels.parts import LoRAPart, apart, side_by_side
from pallas_kernels.segments import Route, Segments, WideIndices, as_segments, raw_ids

__all__ = [
    "Config",
    "add_lora_multi",
    "default_config",
    "expand",
    "missing",
    "missing_together",
    "needs_hopper",
    "shrink",
]


def missing_together(spans: tuple[tuple[int, int], ...]) -> str | None:
    """What the kernels lack for parts that add to these columns, as `missing` does for one."""
    for cut in cuts(spans):
        if width := (cut.stop - cut.start) % 8:
            what = f"columns [{cut.start}, {cut.stop}) between edges of overlapping parts"
            return f"{what}, {width} more than a multiple of 8"
    return None


_needs_hopper_p = Primitive("lora_needs_hopper")
_needs_hopper_p.def_abstract_eval(lambda x: x)
_needs_hopper_p.def_impl(lambda x: jax.jit(_needs_hopper_p.bind)(x))
batching.primitive_batchers[_needs_hopper_p] = lambda args, axes: (
    _needs_hopper_p.bind(*args),
    axes[0],
)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "implementation 'mosaic_gpu' needs a Hopper GPU, or plgpu.force_gpu_interpret_mode(...)"
    )


mlir.register_lowering(_needs_hopper_p, _refuse)
mlir.register_lowering(_needs_hopper_p, lambda _, x: [x], platform="cuda")


def needs_hopper(x: Array) -> Array:
    """x; lowered for another platform than CUDA, outside of interpret mode, an error.

    Pallas raises a ValueError there that doesn't say whose kernel it is, and what runs it.
    """
    if interpreted():
        return x
    out: Array = _needs_hopper_p.bind(x)
    return out


def shrink(
    x: Float[Array, "T H"],
    lora_a: Float[Array, "L R H"],
    route: Route,
    scale: Float[Array, "*L"],
    v: Float[Array, "T R"] | None = None,
    *,
    config: Config | None = None,
) -> Float[Array, "T R"]:
    """v[t] += scale * x[t] @ lora_a[indices[t]].T, rounded once; rows of -1 keep v.

    Without v float32 zeros.
    """
    num_adapters, rank, features = lora_a.shape
    part = DecodePart(lora_a, None, scale.reshape(-1), 0, 0)
    old = jnp.zeros((x.shape[0], rank), jnp.float32) if v is None else v
    planned = _decode_plan((old,), x, (part,), [route], config)
    if planned is not None:
        [v] = decode_kernel((old,), x, *planned)
        return v
    segments = as_segments(route, num_adapters)
    config = config or _config(x, lora_a, features)
    [new] = _shrink_parts(x, [(lora_a, segments, scale, 0, config)], operands=False)
    return new if v is None else xla.add_rows(v, new, segments)


def expand(
    v: Float[Array, "T R"],
    lora_b: Float[Array, "L N R"],
    route: Route,
    y: Float[Array, "T Ny"],
    y_offset: int,
    *,
    add_inputs: bool,
    config: Config | None = None,
) -> Float[Array, "T Ny"]:
    """y[t, y_offset:][:N] (+)= v[t] @ lora_b[indices[t]].T, rounded once; rows of -1 keep y."""
    num_adapters, width, rank = lora_b.shape
    part = DecodePart(None, lora_b, None, 0, y_offset)
    planned = _decode_plan((y,), v, (part,), [route], config, add_inputs=add_inputs)
    if planned is not None:
        [y] = decode_kernel((y,), v, *planned)
        return y
    config = config or default_config(v.shape[0], MAX_FEATURES, width, rank, num_adapters)
    operand = _operand(v, lora_b.dtype)
    segments = as_segments(route, num_adapters)
    two = ExpandPart(operand, lora_b, segments, y_offset, config)
    return expand_kernel(y, (two,), add_inputs=add_inputs)


def add_lora_multi(
    ys: tuple[Float[Array, "T _"], ...],
    x: Float[Array, "T H"],
    parts: tuple[LoRAPart, ...],
    *,
    fuse: bool = False,
    exclusive: bool = False,
    config: Config | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """Both halves of every part, over the columns of the ys side by side.

    One launch where the decode kernel takes them all, else one or two for some of them at a time.
    `fuse`: XLA adds what the one launch makes. `exclusive`: no token is in several lists of ids.
    """
    planned = _add_lora_plan(ys, x, parts, config, add_inputs=not fuse, exclusive=exclusive)
    if planned is not None and fuse:
        shapes = tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys)
        deltas = decode_kernel(shapes, x, *planned)
        sums = [y.astype(jnp.float32) + d.astype(jnp.float32) for y, d in zip(ys, deltas)]
        return tuple(
            jnp.where(changed, total.astype(y.dtype), y)
            for y, total, changed in zip(ys, sums, _changed(ys, parts, exclusive))
        )
    if planned is not None:
        return decode_kernel(ys, x, *planned)
    y = side_by_side(ys)
    parts = tuple(part.cut_out() for part in parts)
    sorted_ids = {_list(part): as_segments(part.indices, part.lora_a.shape[0]) for part in parts}
    parts = tuple(part._replace(indices=sorted_ids[_list(part)]) for part in parts)
    for group in _launches(parts):
        planned = _add_lora_plan((y,), x, group, config, exclusive=exclusive)
        if planned is None:
            y = _two_launches(y, x, group, config, exclusive)
        else:
            [y] = decode_kernel((y,), x, *planned)
    return apart(y, ys)


# The kernels' code has a piece for each part, and lowering takes more than in proportion: 15 parts
# (five rank buckets of three slices) 79 s in one launch, 38 s in three (2 CPU cores).
_MOST_PARTS = 6


def _launches(parts: tuple[LoRAPart, ...]) -> list[tuple[LoRAPart, ...]]:
    """The parts, those of the same columns together, up to `_MOST_PARTS` per launch if they fit."""
    spans = tuple((p.y_offset, p.y_offset + p.lora_b.shape[1]) for p in parts)
    apart: list[set[int]] = []
    for cut in cuts(spans):
        touching = [group for group in apart if group & set(cut.parts)]
        apart = [group for group in apart if group not in touching]
        apart.append(set(cut.parts).union(*touching))
    launches: list[list[int]] = []
    for group in apart:
        if launches and len(launches[-1]) + len(group) <= _MOST_PARTS:
            launches[-1] += sorted(group)
        else:
            launches.append(sorted(group))
    return [tuple(parts[i] for i in launch) for launch in launches]


def _two_launches(
    y: Array, x: Array, parts: tuple[LoRAPart, ...], config: Config | None, exclusive: bool
) -> Array:
    configs = [config or _config(x, p.lora_a, p.lora_b.shape[1]) for p in parts]
    vs = _shrink_parts(
        x,
        [(p.lora_a, p.indices, p.scales, p.scales_offset or 0, c) for p, c in zip(parts, configs)],
        operands=True,
    )
    expands = tuple(
        ExpandPart(v, p.lora_b, p.indices, p.y_offset, c) for v, p, c in zip(vs, parts, configs)
    )
    return expand_kernel(y, expands, add_inputs=True, exclusive=exclusive)


def _list(part: LoRAPart) -> tuple[int, int]:
    """Tells lists of ids apart: parts of one projection mostly share theirs."""
    return id(part.indices), part.lora_a.shape[0]


def _changed(
    ys: tuple[Array, ...], parts: tuple[LoRAPart, ...], exclusive: bool
) -> list[Bool[Array, "T _"]]:
    """Of each y, which elements some part adds to; one column where all columns are alike."""
    edges = np.cumsum([y.shape[1] for y in ys])
    covered: dict[tuple[int, int], Any] = {}  # by each list of ids
    for part in parts:
        _, columns = covered.setdefault(_list(part), (part.indices, np.zeros(edges[-1], bool)))
        columns[part.y_offset :][: part.lora_b.shape[1]] = True
    changed = [jnp.zeros((1, 1), bool)] * len(ys)
    # Of exclusive lists the kernel takes the first, which matters if they cover other columns.
    alike = len({columns.tobytes() for _, columns in covered.values()}) == 1
    taken = jnp.zeros((1, 1), bool)
    for (_, num_adapters), (route, columns) in covered.items():
        has = _has_adapter(route, num_adapters)[:, None]
        used = has & ~taken if exclusive and not alike else has
        taken = taken | has
        for n, mine in enumerate(np.split(columns, edges[:-1])):
            if mine.any():
                changed[n] |= used if mine.all() else used & mine
    return changed


def _has_adapter(route: Route, num_adapters: int) -> Bool[Array, " T"]:
    ids = route.narrow() if isinstance(route, WideIndices) else raw_ids(route)
    return (ids >= 0) & (ids < num_adapters)


def _add_lora_plan(
    ys: tuple[Array, ...],
    x: Array,
    parts: tuple[LoRAPart, ...],
    config: Config | None,
    **how: bool,
) -> Any:
    lists: dict[tuple[int, int], Any] = {}
    for part in parts:
        lists.setdefault(_list(part), part.indices)
    order = list(lists)
    decode_parts = tuple(
        DecodePart(
            p.lora_a,
            p.lora_b,
            p.scales.reshape(-1),
            order.index(_list(p)),
            p.y_offset,
            p.scales_offset or 0,
        )
        for p in parts
    )
    return _decode_plan(ys, x, decode_parts, list(lists.values()), config, **how)


def _decode_plan(
    ys: tuple[Array, ...],
    x: Array,
    parts: tuple[DecodePart, ...],
    lists: list[Route],
    config: Config | None,
    *,
    add_inputs: bool = True,
    exclusive: bool = False,
) -> Any:
    """The decode kernel's ids, or the table of them, parts and plan; None where it does not take
    the case.

    Pallas's interpreter, whose race detection a caller asks for, cannot run lanes: there only a
    config that names the kernel gets it, by its own emulator.
    """
    if config is None and interpreted():
        return None
    if config is None:
        rank, width = max(part.rank for part in parts), sum(y.shape[1] for y in ys)
        shape = x.shape[0], x.shape[1], width, rank
        fuse = not add_inputs
        config = decode_config(*shape, buckets=len(lists), exclusive=exclusive, fuse=fuse)
    ids = tuple(raw_ids(route) for route in lists)
    id_words = tuple(words.ndim for words in ids)
    # One key per token is what a table of them needs.
    seated = all(isinstance(route, Segments) for route in lists) and (exclusive or len(lists) == 1)
    how: Any = dict(add_inputs=add_inputs, exclusive=exclusive, seated=seated, id_words=id_words)
    sizes = plan(ys, x, parts, config, **how)
    if sizes is not None and seated:
        [starts] = sizes.keys
        keys, shares = jnp.full(x.shape[0], -1, jnp.int32), jnp.zeros(x.shape[0], jnp.int32)
        for i, start in reversed(starts.items()):
            is_used = _has_adapter(lists[i], sizes.lists[i])
            keys = jnp.where(is_used, ids[i] + start, keys)
            shares = jnp.where(is_used, sizes.dealt(i), shares)
        ids = (seating(keys, shares, sizes.grid[0]),)
    return sizes and (ids, parts, sizes)


def _config(x: Array, lora_a: Array, width: int) -> Config:
    num_adapters, rank, features = lora_a.shape
    return default_config(x.shape[0], features, width, rank, num_adapters)


def _operand(v: Array, dtype: DTypeLike) -> Array:
    """v as the expand loads it: in B's dtype (LoRAX's CAST_TYPE) and at least 16 ranks wide."""
    return pad_rows(pad_to(v.astype(dtype), 1, 16))


def _shrink_parts(
    x: Array, parts: list[tuple[Array, Segments, Array, int, Config]], *, operands: bool
) -> list[Array]:
    """v of each (lora_a, segments, scales, first_scale, config): float32 `[T, R]`, zero in rows of
    -1; or, if `operands`, as the expand loads it, undefined in rows of -1."""
    num_tokens, twin = x.shape[0], interpreted()
    vs: dict[int, Array] = {}
    for dtype in dict.fromkeys(lora_a.dtype for lora_a, *_ in parts):
        which = [i for i, (lora_a, *_) in enumerate(parts) if lora_a.dtype == dtype]
        planes, factor = _planes(x, dtype)
        direct = operands and factor is None and not twin
        kernel_parts = tuple(
            # TMA's swizzle needs rows of 32 bytes: an H that is only a multiple of 8 is padded.
            ShrinkPart(
                pad_to(lora_a, 2, 16),
                scales.reshape(-1),
                segments,
                dtype if direct else jnp.dtype(jnp.float32),
                config,
                first_scale,
            )
            for lora_a, segments, scales, first_scale, config in (parts[i] for i in which)
        )
        padded = pad_to(pad_rows(planes, 1), 2, 16)
        out = shrink_kernel(padded, kernel_parts, num_tokens, zero_rows=not operands)
        for i, v in zip(which, out):
            if twin:
                used = parts[i][1].indices[:, None] >= 0
                v = jnp.where(used, functools.reduce(jnp.add, list(v)), 0.0)
            if factor is not None:
                v = v * factor[:, None]
            vs[i] = _operand(v, dtype) if operands and not direct else v
    return [vs[i] for i in range(len(parts))]


def _planes(x: Array, dtype: DTypeLike) -> tuple[Float[Array, "P T H"], Any]:
    """x as a sum of planes of `dtype`, exact to float32, and what to multiply its rows by.

    Planes are cut off, not rounded: that cannot overflow, and XLA, which may drop a conversion to
    half precision and back, cannot undo it. bfloat16 has float32's range and 8 bits a plane.
    float16 has 11 bits, but not the range: rows are scaled by a power of two to below 2^15.
    """
    if x.dtype == dtype:
        return x[None], None
    rest, factor = x.astype(jnp.float32), None
    if dtype == jnp.bfloat16:
        count, mask = (3 if x.dtype == jnp.float32 else 2), 0xFFFF0000
    else:
        count, mask = (3 if x.dtype == jnp.float32 else 1), 0xFFFFE000
        largest = jnp.max(jnp.abs(rest), axis=1)
        _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0))
        exponent = jnp.clip(exponent - 15, -126, 126)  # the power and its inverse are normal
        factor = jnp.ldexp(jnp.float32(1.0), exponent)
        rest = rest * jnp.ldexp(jnp.float32(1.0), -exponent)[:, None]
    planes = []
    for _ in range(count):
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(mask)
        top = lax.bitcast_convert_type(bits, jnp.float32)
        planes.append(top.astype(dtype))
        rest = jnp.where(jnp.isfinite(rest), rest - top, 0.0)
    return jnp.stack(planes), factor
