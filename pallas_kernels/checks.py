"""Checks of what a caller gives, once, at the public ops; messages hold the values."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, DTypeLike

from pallas_kernels.routing import (
    AnyIds,
    Mix,
    Segments,
    SlotRange,
    TokenIds,
    WideIndices,
    checked_indices,
    num_tokens_of,
    static,
    unsorted_mix,
)
from pallas_kernels.stacks import EIGHT_BITS_NAMES, LayerStacks, LoRAPart, is_eight_bits

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def floats(name: str, value: ArrayLike, axes: str, *, eight_bits: bool = False) -> Array:
    """`value` as an array with these axes; TypeError where it is none of the three floats, nor,
    where there may be `eight_bits`, one of a byte."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    if dtype not in _FLOATS and not (eight_bits and is_eight_bits(dtype)):
        also = f", or {EIGHT_BITS_NAMES} with scales" if eight_bits else ""
        raise TypeError(f"{name} must be float32, bfloat16 or float16{also}, got {dtype}")
    array = jnp.asarray(value)
    if array.ndim != len(axes.split()):
        raise ValueError(
            f"{name} must have shape [{axes.replace(' ', ', ')}], got {list(array.shape)}"
        )
    return array


def float_dtype(name: str, value: DTypeLike) -> np.dtype:
    """`value` as a dtype; TypeError where it is none of the three floats."""
    dtype = jnp.dtype(value)
    if dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    return dtype


def stack(name: str, value: ArrayLike, axes: str, *, of_part: bool = False) -> Array:
    """An `[L, a, b]` stack; LoRAX's `[L, 1, a, b]` loses its second axis. Those `of_part` may be of
    experts, `[slots, experts, a, b]`, which are read so, and in 8 bits."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array and jnp.ndim(value) == 4 and (of_part or jnp.shape(value)[1] == 1):
        value = value.reshape(-1, *jnp.shape(value)[2:])  # type: ignore[union-attr]
    checked = floats(name, value, axes, eight_bits=of_part)
    if 0 in checked.shape:
        raise ValueError(f"{name} must not have an empty axis, got {list(checked.shape)}")
    return checked


def same(what: str, expected: int, got: int) -> None:
    if expected != got:
        raise ValueError(f"{what}: {expected} and {got}")


def columns(shape: Sequence[int], y_offset: int, size: int) -> int:
    """`y_offset`, if `size` columns from there on lie in y."""
    y_offset = static("y_offset", y_offset)
    if not 0 <= y_offset <= shape[1] - size:
        raise ValueError(f"columns [{y_offset}, {y_offset + size}) leave y of shape {list(shape)}")
    return y_offset


def scales(name: str, value: ArrayLike, *, size: int | None) -> Array:
    """`value` as float32: a number or, if `size` is given, `[size]`."""
    if value is None:
        raise TypeError(f"{name} must be real numbers, got None")
    if isinstance(value, Segments):
        raise TypeError(
            f"{name} must be real numbers, got Segments; a part has no ids of its own: give them "
            "to add_lora_multi(y, x, parts, indices)"
        )
    array = jnp.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    allowed = [()] if size is None else [(), (size,)]
    if array.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {shapes}, got {list(array.shape)}")
    return array.astype(jnp.float32)


def token_ids(indices: ArrayLike | TokenIds, num_tokens: int, num_adapters: int) -> TokenIds:
    """The ids of one stack's tokens, which count from the stack's first adapter."""
    if isinstance(indices, Segments):
        same("segments and stack differ in adapters", indices.num_adapters, num_adapters)
    return _ids(indices, num_tokens, num_adapters)


def shared_ids(
    indices: ArrayLike | AnyIds,
    weights: ArrayLike | None,
    num_tokens: int,
    ranges: Sequence[SlotRange],
) -> AnyIds:
    """The ids of the tokens of a call with parts of these ranges; with weights, those of a mix."""
    if weights is not None:
        if isinstance(indices, Segments | Mix | WideIndices):
            raise TypeError(
                f"weights go with indices [T, K], not with {type(indices).__name__}; "
                "make_mix(indices, weights, num_adapters) sorts both for several calls"
            )
        indices = unsorted_mix(indices, weights)
    if not isinstance(indices, Mix):
        return _shared_token_ids(indices, num_tokens, ranges)
    same("mix and tensor differ in tokens", indices.num_tokens, num_tokens)
    columns = tuple(_shared_token_ids(one, num_tokens, ranges) for one in indices.columns)
    return dataclasses.replace(indices, columns=columns)


def _shared_token_ids(
    indices: ArrayLike | TokenIds, num_tokens: int, ranges: Sequence[SlotRange]
) -> TokenIds:
    stop = max((slots.stop for slots in ranges), default=1)
    if isinstance(indices, Segments) and indices.num_adapters < stop:
        raise ValueError(
            f"segments describe {indices.num_adapters} slots, but the parts have slots up to "
            f"{stop}; give make_segments num_adapters={stop}"
        )
    return _ids(indices, num_tokens, stop)


def _ids(indices: ArrayLike | TokenIds, num_tokens: int, num_adapters: int) -> TokenIds:
    """Int32 arrays of JAX stay as they are: kernels treat ids outside of a range as none."""
    if isinstance(indices, LoRAPart):
        raise TypeError("indices must be integers or Segments, got a LoRAPart")
    if isinstance(indices, Mix):
        raise TypeError(
            "one half of a LoRA takes one adapter per token, got a Mix; add_lora, add_lora_multi "
            "and lora_delta take several"
        )
    if isinstance(indices, Segments):
        same("segments and tensor differ in tokens", num_tokens_of(indices), num_tokens)
        return indices
    if not isinstance(indices, WideIndices):
        is_plain = (
            isinstance(indices, jax.Array) and indices.dtype == jnp.int32 and indices.ndim == 1
        )
        if not is_plain:
            indices = checked_indices(indices, num_adapters)
        indices = jnp.asarray(indices)
    same("indices and tensor differ in tokens", num_tokens_of(indices), num_tokens)
    return indices


def part(n: int, given: LoRAPart, features: int, y_shape: Sequence[int]) -> LoRAPart:
    """The nth part with arrays that fit x of `features` and y of `y_shape`."""
    if not isinstance(given, LoRAPart):
        raise TypeError(f"parts[{n}] must be a LoRAPart, got {type(given).__name__}")
    transposed = bool(given.transposed)
    of_a, of_b = ("L H R", "L R N") if transposed else ("L R H", "L N R")
    a = stack(f"parts[{n}].lora_a", given.lora_a, of_a, of_part=True)
    b = stack(f"parts[{n}].lora_b", given.lora_b, of_b, of_part=True)
    found = LoRAPart(a, b, transposed=transposed)
    same(f"x and parts[{n}].lora_a differ in features H", features, found.features)
    if found.slots % a.shape[0] or found.slots % b.shape[0]:
        raise ValueError(
            f"parts[{n}]: lora_a and lora_b differ in adapters L: {a.shape[0]} and {b.shape[0]}; "
            "only experts share them, one slot's all, so one number must divide the other"
        )
    same(
        f"parts[{n}]: lora_a and lora_b differ in rank R",
        found.rank,
        b.shape[1 if transposed else 2],
    )
    if any(is_eight_bits(t.dtype) for t in (a, b)) and (a.dtype != b.dtype or transposed):
        raise ValueError(
            f"parts[{n}] has lora_a of {a.dtype} and lora_b of {b.dtype}, "
            f"transposed={transposed}; stacks in 8 bits are both so, and as rows"
        )
    first_slot = static(f"parts[{n}].first_slot", given.first_slot)
    if not 0 <= first_slot <= jnp.iinfo(jnp.int32).max - found.slots:
        raise ValueError(
            f"parts[{n}].first_slot must be between 0 and 2**31 - 1 - {found.slots}, got "
            f"{first_slot}"
        )
    factors, offset = _part_scales(f"parts[{n}]", given, found)
    y_offset = columns(y_shape, given.y_offset, found.width)
    if (layers := given.layers) is not None:
        if transposed:
            raise ValueError(f"parts[{n}] is transposed, so it can't have layers")
        _check_layers(f"parts[{n}]", layers, (a, b, factors), offset)
    return LoRAPart(a, b, factors, first_slot, y_offset, offset, layers, transposed)


def _check_layers(
    name: str, layers: LayerStacks, own: tuple[Array, Array, Array], scales_offset: int | None
) -> None:
    """ValueError if a part's own arrays can't stand among those of several layers."""
    if scales_offset is None:
        raise ValueError(f"{name} has layers, so it needs a scales_offset")
    given = layers.lora_a, layers.lora_b, layers.scales
    for what, one, mine in zip(("lora_a", "lora_b", "scales"), given, own):
        if one.shape[1:] != mine.shape or one.dtype != mine.dtype:
            raise ValueError(
                f"{name}.layers.{what} must have shape {['layers', *mine.shape]} and dtype "
                f"{mine.dtype}, got {list(one.shape)} and {one.dtype}"
            )
        same(f"{name}.layers: lora_a and {what} differ in layers", len(given[0]), len(one))
    if jnp.shape(layers.layer) != () or jnp.result_type(layers.layer) != jnp.int32:
        raise ValueError(
            f"{name}.layers.layer must be one int32, got {jnp.result_type(layers.layer)} "
            f"{list(jnp.shape(layers.layer))}"
        )


def _part_scales(name: str, given: LoRAPart, found: LoRAPart) -> tuple[Array, int | None]:
    """A part's scales, and where its own start in them; `found` has its checked stacks."""
    if given.scales_offset is None and found.is_eight_bits:
        shape = () if given.scales is None else jnp.shape(given.scales)
        if shape != (found.slots, found.rank):
            raise ValueError(
                f"{name}.scales must have shape {[found.slots, found.rank]}, one for each rank "
                f"column, as the stacks are {found.dtype}; got {list(shape)}"
            )
        flat = jnp.asarray(given.scales).reshape(-1)
        return scales(f"{name}.scales", flat, size=found.num_scales), 0
    if given.scales_offset is None:
        factors = 1.0 if given.scales is None else given.scales
        return scales(f"{name}.scales", factors, size=found.slots), None
    offset = static(f"{name}.scales_offset", given.scales_offset)
    shape = () if given.scales is None else jnp.shape(given.scales)
    size = shape[0] if len(shape) == 1 else 0
    if not 0 <= offset <= size - found.num_scales:
        raise ValueError(
            f"{name} has scales [{offset}, {offset + found.num_scales}) by its scales_offset, but "
            f"scales have shape {list(shape)}"
        )
    if found.is_eight_bits and (offset % 4 or (given.layers is not None and size % 4)):
        raise ValueError(
            f"{name}.scales_offset, and S of several layers, must be multiples of 4, as the stacks "
            f"are {found.dtype}; got {offset} and {size}"
        )
    return scales(f"{name}.scales", given.scales, size=size), offset  # type: ignore[arg-type]


def slot_ranges(parts: Sequence[LoRAPart]) -> list[SlotRange]:
    """The range of slots of each part. ValueError where two overlap and are not equal."""
    ranges = [SlotRange(p.first_slot, p.slots) for p in parts]
    distinct = sorted(set(ranges))
    for one, other in itertools.pairwise(distinct):
        if other.first < one.stop:
            m, n = ranges.index(one), ranges.index(other)
            raise ValueError(
                f"slots of parts must be equal or disjoint: parts[{m}] has [{one.first}, "
                f"{one.stop}), parts[{n}] has [{other.first}, {other.stop})"
            )
    return ranges


def width(name: str, value: int) -> int:
    """A number of columns, or an error."""
    found = static(name, value)
    if found < 1:
        raise ValueError(f"{name} must be at least 1, got {found}")
    return found
