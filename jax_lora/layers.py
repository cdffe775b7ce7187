"""NNX layers that hold stacks of LoRA adapters beside their kernel, and `apply_lora`."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jax_lora.batch import AdapterBatch, Guard, current, use
from jax_lora.process import check_process
from pallas_kernels import LoRAPart, StackView, add_lora_multi
from pallas_kernels.ranks import DEFAULT_BUCKETS, check_buckets

Slots = int | Mapping[int, int]

# In a flat variable stacks start at multiples of so many elements, as kernels read whole lines.
_LINE = 64


class LoRAScale(nnx.Variable[Array]):
    """Scale of each slot of a layer's stacks, one stack behind the other, alpha / r of the true
    rank: `[S]` float32. No Param: it is not trained."""

    # One array, as a step pays for each: H100, 16 layers with five buckets, 1,827 arguments, 5.7 to
    # 6.3 ms of the host's time; without 558 of the scales 3.9 to 5.1.


class StackShape(NamedTuple):
    """One stack of a layer.

    Attributes:
      slots: L. bucket: R. features: H and the width n of the slice.
      y_offset: first of the layer's output columns that the stack adds to.
      scales_offset: where its scales start in the layer's.
      flat_offsets: where A and B start in the layer's `flat`, if it has one.
    """

    slots: int
    bucket: int
    features: tuple[int, int]
    y_offset: int
    scales_offset: int
    flat_offsets: tuple[int, int]

    @property
    def sizes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of A `[L, R, H]` and of B `[L, n, R]`."""
        in_features, out_features = self.features
        return (self.slots, self.bucket, in_features), (self.slots, out_features, self.bucket)


class LoRAStack(nnx.Module):
    """The adapters of one rank bucket and one output slice of a layer.

    Attributes:
      lora_a: `[L, R, H]`, `lora_b`: `[L, n, R]`; zeros where empty. None where the layer's `flat`
        holds them.
      shape: what is static about it.
    """

    lora_a: nnx.LoRAParam[Array] | None
    lora_b: nnx.LoRAParam[Array] | None

    def __init__(self, shape: StackShape, dtype: Any, *, flat: bool) -> None:
        self.shape = shape
        self.lora_a, self.lora_b = (
            None if flat else nnx.LoRAParam(jnp.zeros(size, dtype)) for size in shape.sizes
        )

    @property
    def bucket(self) -> int:
        return self.shape.bucket

    @property
    def slots(self) -> int:
        return self.shape.slots

    @property
    def y_offset(self) -> int:
        return self.shape.y_offset


class Matrices(NamedTuple):
    """A or B of all adapters of a stack, and the variable that holds them.

    Attributes:
      variable: of `shape`, or flat.
      shape: `(L, R, H)` or `(L, n, R)`.
      first: where they start in a flat variable; None where they are all of it.
    """

    variable: nnx.LoRAParam[Array]
    shape: tuple[int, int, int]
    first: int | None

    @property
    def value(self) -> Array | StackView:
        array = self.variable[...]
        return array if self.first is None else StackView(array, self.first, self.shape)

    def _start(self, slot: Any) -> tuple[Any, ...]:
        _, rows, columns = self.shape
        if self.first is not None:
            return (self.first + slot * (rows * columns),)
        slot = jnp.asarray(slot)
        zero = jnp.zeros_like(slot)  # a 0 would be of another dtype where jax_enable_x64 is set
        return slot, zero, zero

    def slot(self, array: Array, slot: Any) -> Array:
        """One adapter's, where `array` is the variable's."""
        _, rows, columns = self.shape
        size = (1, rows, columns) if self.first is None else (rows * columns,)
        return jax.lax.dynamic_slice(array, self._start(slot), size).reshape(rows, columns)

    def set_slot(self, array: Array, slot: Any, new: Array) -> Array:
        """`array`, where it is the variable's, with one adapter's replaced."""
        new = new[None] if self.first is None else new.reshape(-1)
        return jax.lax.dynamic_update_slice(array, new, self._start(slot))


def stack_part(
    lora_a: Array | StackView,
    lora_b: Array | StackView,
    scales: Array,
    shape: StackShape,
    batch: AdapterBatch,
    lead: tuple[int, ...],
) -> LoRAPart:
    """What a stack adds to its layer's output, for an `x` of `[*lead, H]`."""
    segments = batch.segments(shape.bucket, lead, shape.slots)
    return LoRAPart(lora_a, lora_b, segments, scales, shape.y_offset, shape.scales_offset)


def stack_shapes(
    features: tuple[int, int], slots: Slots, buckets: Sequence[int], slices: Sequence[int]
) -> list[StackShape]:
    """The stacks of a layer: by bucket, and of each bucket by slice."""
    in_features, out_features = features
    if sum(slices) != out_features or any(n < 1 for n in slices):
        raise ValueError(f"slices {tuple(slices)} must be positive and sum to {out_features}")
    offsets = itertools.accumulate(slices, initial=0)
    columns = list(zip(slices, offsets))
    shapes: list[StackShape] = []
    scales_offset = flat_offset = 0
    for bucket, n in check_slots(slots, buckets).items():
        for width, y_offset in columns:
            a_size, b_size = (
                -(-n * bucket * size // _LINE) * _LINE for size in (in_features, width)
            )
            flat_offsets = flat_offset, flat_offset + a_size
            shapes.append(
                StackShape(n, bucket, (in_features, width), y_offset, scales_offset, flat_offsets)
            )
            scales_offset, flat_offset = scales_offset + n, flat_offsets[1] + b_size
    return shapes


def _flat_size(shapes: Sequence[StackShape]) -> int:
    """Elements of a variable that holds these stacks."""
    size = shapes[-1].flat_offsets[1] + math.prod(shapes[-1].sizes[1])
    if size >= 2**31:  # places in it are int32
        raise ValueError(f"flat stacks may hold fewer than 2**31 elements, these have {size:,}")
    return size


def empty_scales(shapes: Sequence[StackShape]) -> Array:
    """The scales of a layer with these stacks."""
    return jnp.zeros(sum(shape.slots for shape in shapes), jnp.float32)


class LoRALayer(nnx.Module):
    """What the LoRA layers share; mixed in before the layer of Flax that each extends.

    A subclass says how its `x` and `y` read as `[T, H]` and `[T, N]` matrices.

    Attributes:
      guard: of the model that it is in; None where neither `apply_lora` nor a bank has seen it.
    """

    guard: Guard | None
    stacks: nnx.List[LoRAStack]
    flat: nnx.LoRAParam[Array] | None
    scales: LoRAScale
    slices: tuple[int, ...]

    def features(self) -> tuple[int, int]:
        """`(H, N)` of the layer read as a matrix.

        Raises:
          ValueError: it is not a matrix.
        """
        raise NotImplementedError

    def x_matrix(self, x: Array) -> Array:
        """x as `[*lead, H]`, where `lead` are the axes that tokens are made of."""
        raise NotImplementedError

    def y_matrix(self, y: Array) -> Array:
        """y as `[*lead, N]`."""
        return y

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        """The inverse of `y_matrix`: `y_matrix` in the shape of y."""
        return y_matrix.reshape(y.shape)

    def kernel_matrix(self) -> Array:
        """The kernel as `[H, N]`."""
        return cast(Any, self).kernel[...].reshape(self.features())

    def kernel_tensor(self, matrix: Array) -> Array:
        """The inverse of `kernel_matrix`: `matrix` in the shape of the kernel."""
        return matrix.reshape(cast(Any, self).kernel.shape)

    def add_stacks(
        self,
        slots: Slots,
        buckets: Sequence[int],
        slices: Sequence[int] | None,
        dtype: Any,
        *,
        flat: bool = False,
    ) -> None:
        """Allocates empty stacks, one per bucket and slice; if `flat`, in one variable."""
        check_process()
        slices = (self.features()[1],) if slices is None else tuple(slices)
        shapes = stack_shapes(self.features(), slots, buckets, slices)
        dtype = stack_dtype(dtype)
        self.slices, self.guard = slices, None
        self.stacks = nnx.List(LoRAStack(shape, dtype, flat=flat) for shape in shapes)
        self.flat = nnx.LoRAParam(jnp.zeros(_flat_size(shapes), dtype)) if flat else None
        self.scales = LoRAScale(empty_scales(shapes))

    def matrices(self, stack: LoRAStack) -> tuple[Matrices, Matrices]:
        """A and B of one of the layer's stacks."""
        size_a, size_b = stack.shape.sizes
        if self.flat is None:
            a, b = cast(Any, stack.lora_a), cast(Any, stack.lora_b)
            return Matrices(a, size_a, None), Matrices(b, size_b, None)
        first_a, first_b = stack.shape.flat_offsets
        return Matrices(self.flat, size_a, first_a), Matrices(self.flat, size_b, first_b)

    def parts(self, batch: AdapterBatch, lead: tuple[int, ...]) -> list[LoRAPart]:
        """What the stacks add to the output, for an `x` of `[*lead, H]`."""
        batch.check_guard(self.guard, type(self).__name__)
        scales, parts = self.scales[...], []
        for stack in self.stacks:
            a, b = (matrices.value for matrices in self.matrices(stack))
            parts.append(stack_part(a, b, scales, stack.shape, batch, lead))
        return parts

    def __call__(
        self, x: Array, adapters: AdapterBatch | None = None, *, out_sharding: Any = None
    ) -> Array:
        """The base layer's output, plus each row's adapter.

        Args:
          x: as the base layer takes it.
          adapters: which adapter each row uses; None for the batch of `jax_lora.use`, if any.
          out_sharding: as in the base layer.

        Raises:
          TypeError: `adapters` is no AdapterBatch.
          ValueError: it is of another bank, or does not fit the layer's buckets or the rows of x.
        """
        adapters = batch_for(self, adapters)
        base = cast(Any, super())
        y = base.__call__(x, out_sharding=out_sharding)
        return y if adapters is None else self._add_lora(y, x, adapters)

    def _add_lora(self, y: Array, x: Array, adapters: AdapterBatch) -> Array:
        (x,) = cast(Any, self).promote_dtype((x,), dtype=y.dtype)
        in_features, out_features = self.features()
        x = self.x_matrix(x)
        parts = self.parts(adapters, x.shape[:-1])
        y_matrix = self.y_matrix(y)
        out = add_lora_multi(
            y_matrix.reshape(-1, out_features),
            x.reshape(-1, in_features),
            parts,
            phase=adapters.phase,
            fuse=True,
            exclusive=True,
        )
        return self.y_tensor(out.reshape(y_matrix.shape), y)


def batch_for(layer: Any, adapters: Any) -> AdapterBatch | None:
    """The batch that a layer was called with, or the ambient one."""
    check_process()
    if not isinstance(adapters, AdapterBatch | None):
        raise TypeError(
            f"{type(layer).__name__} takes an AdapterBatch as its second argument, got "
            f"{type(adapters).__name__}; other arguments go by keyword"
        )
    return current() if adapters is None else adapters


class LoRADense(LoRALayer, nnx.Linear):  # type: ignore[misc]
    """`nnx.Linear` with stacks of LoRA adapters: `y[t] = x[t] W + b + s (x[t] A^T) B^T`.

    Example::

        layer = LoRADense(512, 512, slots=4, buckets=(16,), rngs=nnx.Rngs(0))
        y = layer(x)             # as nnx.Linear
        y = layer(x, adapters)   # row b with the adapter that `adapters` gives it

    Attribute names and state paths of kernel and bias are those of `nnx.Linear`.

    Args:
      in_features, out_features: as in `nnx.Linear`.
      slots: adapters per bucket, an int or `{bucket: n}`.
      buckets: ranks that the stacks are allocated with; `pallas_kernels.rank_bucket`.
      slices: widths of the projections packed side by side in the output (QKV, gate/up), each
        with adapters of its own; None for one.
      lora_dtype: dtype of the stacks; None for `param_dtype`.
      flat: hold all stacks in one variable; see `apply_lora`.
      rngs, **linear: as in `nnx.Linear`.

    Raises:
      ValueError: `slices` do not sum to `out_features`; `buckets` or `slots` that can't be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        slots: Slots = 8,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        slices: Sequence[int] | None = None,
        lora_dtype: Any = None,
        flat: bool = False,
        rngs: nnx.Rngs,
        **linear: Any,
    ) -> None:
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **linear)
        self.add_stacks(slots, buckets, slices, lora_dtype or self.kernel.dtype, flat=flat)

    def features(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def x_matrix(self, x: Array) -> Array:
        return x


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
    # A prefill takes two launches, which want one y: to lay its large outputs side by side costs
    # more than launches.
    if (
        batch is None
        or batch.phase == "prefill"
        or not any(isinstance(layer, LoRADense) for layer in layers)
    ):
        return tuple(layer(x) for layer in layers)
    with use(None):
        ys = [layer(x) for layer in layers]
    (x,) = layers[0].promote_dtype((x,), dtype=ys[0].dtype)
    ends = list(itertools.accumulate(layer.out_features for layer in layers))
    parts = [
        part._replace(y_offset=start + part.y_offset)
        for layer, start in zip(layers, [0, *ends])
        if isinstance(layer, LoRADense)
        for part in layer.parts(batch, x.shape[:-1])
    ]
    # Layers with unlike numbers of slots have lists of ids of their own for one bucket.
    lists = {(part.lora_a.shape[1], part.lora_a.shape[0]) for part in parts}
    exclusive = len(lists) == len({bucket for bucket, _ in lists})
    matrices = tuple(y.reshape(-1, y.shape[-1]) for y in ys)
    x = x.reshape(-1, x.shape[-1])
    out = add_lora_multi(matrices, x, parts, phase=batch.phase, fuse=True, exclusive=exclusive)
    return tuple(new.reshape(y.shape) for new, y in zip(out, ys))


class LoRADenseGeneral(LoRALayer, nnx.LinearGeneral):  # type: ignore[misc]
    """`nnx.LinearGeneral` with stacks of LoRA adapters over its flattened features.

    Made by `apply_lora`. PEFT's A is `[r, prod(in_features)]`, its B `[prod(out_features), r]`.
    """

    def features(self) -> tuple[int, int]:
        if self.batch_axis:
            raise ValueError(f"LoRA does not cover batch_axis, got {dict(self.batch_axis)}")
        return math.prod(self.in_features), math.prod(self.out_features)

    def x_matrix(self, x: Array) -> Array:
        axes = tuple(sorted(axis % x.ndim for axis in self.axis))  # as LinearGeneral does
        lead = tuple(axis for axis in range(x.ndim) if axis not in axes)
        return x.transpose(*lead, *axes).reshape(*(x.shape[axis] for axis in lead), -1)

    def y_matrix(self, y: Array) -> Array:
        return y.reshape(*y.shape[: y.ndim - len(self.out_features)], -1)


def _einsum_labels(einsum_str: str | None) -> tuple[str, str, str, str, str]:
    """Labels of kernel and output; of the tokens, of H and of N."""
    operands, _, out = (einsum_str or "").partition("->")
    lhs, _, kernel = operands.partition(",")
    summed = "".join(c for c in kernel if c in lhs and c not in out)
    kept = "".join(c for c in kernel if c in out and c not in lhs)
    lead = "".join(c for c in lhs if c not in summed)
    is_product = sorted(summed + kept) == sorted(kernel) and sorted(lead + kept) == sorted(out)
    labels = lhs.replace("...", "")
    if not (is_product and kept) or any(len({*s}) < len(s) for s in (labels, kernel)):
        raise ValueError(
            f"LoRA covers einsums that are a product with a matrix, not {einsum_str!r}"
        )
    return kernel, out, lead, summed, kept


class LoRAEinsum(LoRALayer, nnx.Einsum):  # type: ignore[misc]
    """`nnx.Einsum` with stacks of LoRA adapters, where it is a matrix product in disguise.

    Each axis of the kernel is either summed with the input (together they are H, in the kernel's
    order) or appears in the output (together N). Made by `apply_lora`.
    """

    def features(self) -> tuple[int, int]:
        kernel, _, _, summed, kept = _einsum_labels(self.einsum_str)
        size = dict(zip(kernel, self.kernel_shape))
        return math.prod(size[c] for c in summed), math.prod(size[c] for c in kept)

    def x_matrix(self, x: Array) -> Array:
        _, _, lead, summed, _ = _einsum_labels(self.einsum_str)
        lhs = (self.einsum_str or "").partition(",")[0]
        x = jnp.einsum(f"{lhs}->{lead}{summed}", x)
        return x.reshape(*x.shape[: x.ndim - len(summed)], -1)

    def y_matrix(self, y: Array) -> Array:
        _, out, lead, _, kept = _einsum_labels(self.einsum_str)
        y = jnp.einsum(f"{out}->{lead}{kept}", y)
        return y.reshape(*y.shape[: y.ndim - len(kept)], -1)

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        kernel, out, lead, _, kept = _einsum_labels(self.einsum_str)
        size = dict(zip(kernel, self.kernel_shape))
        y_matrix = y_matrix.reshape(*y_matrix.shape[:-1], *(size[c] for c in kept))
        return jnp.einsum(f"{lead}{kept}->{out}", y_matrix)

    def kernel_matrix(self) -> Array:
        kernel, _, _, summed, kept = _einsum_labels(self.einsum_str)
        return jnp.einsum(f"{kernel}->{summed}{kept}", self.kernel[...]).reshape(self.features())

    def kernel_tensor(self, matrix: Array) -> Array:
        kernel, _, _, summed, kept = _einsum_labels(self.einsum_str)
        size = dict(zip(kernel, self.kernel_shape))
        tensor = matrix.reshape([size[c] for c in summed + kept])
        return jnp.einsum(f"{summed}{kept}->{kernel}", tensor)


_LORA_CLASS: dict[type[nnx.Module], type[LoRALayer]] = {
    nnx.Linear: LoRADense,
    nnx.LinearGeneral: LoRADenseGeneral,
    nnx.Einsum: LoRAEinsum,
}


def check_slots(slots: Slots, buckets: Sequence[int]) -> dict[int, int]:
    """`{bucket: slots}` in the order of `buckets`.

    Raises:
      TypeError: a number of slots is no int.
      ValueError: a number is below 1, or a dict does not name exactly the buckets.
    """
    checked = check_buckets(buckets)
    if isinstance(slots, Mapping):
        if set(slots) != set(checked):
            raise ValueError(f"slots name buckets {sorted(slots)}, buckets are {checked}")
        by_bucket = {bucket: slots[bucket] for bucket in checked}
    else:
        by_bucket = dict.fromkeys(checked, slots)
    for bucket, n in by_bucket.items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"slots must be an int or {{bucket: int}}, got {n!r}")
        if n < 1:
            raise ValueError(f"bucket {bucket} must have at least 1 slot, got {n}")
    return by_bucket


def stack_dtype(dtype: Any) -> Any:
    """`dtype`, or a ValueError if stacks can't have it."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"stacks are float32, bfloat16 or float16, not {dtype}; give their dtype")
    return jnp.dtype(dtype)


def path_name(path: Sequence[Any]) -> str:
    """An NNX path as PEFT names modules: joined by dots."""
    return ".".join(map(str, path))


def apply_lora(
    model: nnx.Module,
    *,
    slots: Slots = 8,
    target: str | Sequence[str] | None = None,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    dtype: Any = None,
    flat: bool = False,
) -> int:
    """Gives the linear layers of `model` room for LoRA adapters, in place.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` become `LoRADense`, `LoRADenseGeneral` and
    `LoRAEinsum`: the same objects with the same kernels under the same paths, and stacks of
    `slots` adapters per rank bucket beside them, all zero. Other layers stay untouched.

    The stacks take `slots * bucket * (H + N)` elements per layer and bucket: the defaults come to
    about 10 GB on an 8B Llama in bfloat16. Name the buckets and slots that you need
    (`plan_slots` proposes them from a folder of adapters).

    Example::

        nbytes = apply_lora(model, slots={16: 32, 64: 4}, buckets=(16, 64), target="[qkvo]_proj")

    Args:
      model: any NNX model.
      slots: adapters per bucket, an int or `{bucket: n}`.
      target: which layers: a regular expression, or several, that matches the end of a layer's
        dotted path from a dot on ("q_proj", "layers.0.*"); None for every layer of the types above.
        Of what an expression matches, layers of other types stay as they are.
      buckets: ranks that the stacks are allocated with.
      dtype: dtype of the stacks; None for each kernel's own.
      flat: each layer holds its stacks in one variable, `flat` `[S]`, one behind the other. A step
        pays the host for each of its arguments: with five buckets an 8B Llama has 2,240 A and B,
        flat 224. Decode steps on a GPU read them where they lie, all else cuts them out. Such a
        variable has no axis of adapters to mask or shard; `layer.matrices(stack)` says where its
        stacks are.

    Returns:
      The bytes that the stacks take.

    Raises:
      TypeError: `target` is of another type, or one of its expressions matches layers of other
        types alone.
      ValueError: nothing matches (the paths are listed); a matched layer has LoRA already, is not
        a matrix product, or its kernel has an unexpected shape or dtype. The model is unchanged.
    """
    by_bucket = check_slots(slots, buckets)
    layers = _matched_layers(model, target)
    for name, layer in layers.items():
        _check_layer(name, layer, by_bucket, dtype, flat)
    guard = Guard()
    for layer in layers.values():
        # The object stays the one that its parents and tied references know.
        layer.__class__ = _LORA_CLASS[type(layer)]
        layer.add_stacks(by_bucket, buckets, None, dtype or layer.kernel.dtype, flat=flat)
        layer.guard = guard
    return sum(
        variable.nbytes
        for layer in layers.values()
        for variable in jax.tree.leaves(nnx.state(layer, nnx.LoRAParam))
    )


def _matched_layers(model: nnx.Module, target: str | Sequence[str] | None) -> dict[str, Any]:
    modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
    linear = [name for name, module in modules.items() if type(module) in _LORA_CLASS]
    if target is None:
        matched = {name: modules[name] for name in linear}
    else:
        found: set[str] = set()
        for pattern in _target_patterns(target):
            found |= _matched(modules, pattern)
        matched = {name: module for name, module in modules.items() if name in found}
    if not matched:
        done = [name for name, module in modules.items() if isinstance(module, LoRALayer)]
        have = f"; with LoRA already: {', '.join(done)}" if done else ""
        there = f"linear layers: {', '.join(linear) or 'none'}{have}"
        raise ValueError(f"no layer matches target={target!r}; {there}")
    for name, module in matched.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} has LoRA stacks already")
    return matched


def _matched(modules: Mapping[str, Any], pattern: re.Pattern[str]) -> set[str]:
    """The linear layers that match, unless layers of other types alone do."""
    layers = {
        name: module
        for name, module in modules.items()
        if pattern.fullmatch(name) and not isinstance(module, LoRAStack) and _has_kernel(module)
    }
    linear = {
        name
        for name, module in layers.items()
        if type(module) in _LORA_CLASS or isinstance(module, LoRALayer)
    }
    if layers and not linear:
        name, module = next(iter(layers.items()))
        raise TypeError(
            f"{name} is a {type(module).__name__}; LoRA covers nnx.Linear, nnx.LinearGeneral and "
            "nnx.Einsum"
        )
    return linear


def _target_patterns(target: str | Sequence[str]) -> list[re.Pattern[str]]:
    targets = [target] if isinstance(target, str) else target
    if not (isinstance(targets, Sequence) and all(isinstance(t, str) for t in targets)):
        raise TypeError(f"target must be a regular expression or a list of them, got {target!r}")
    try:
        return [re.compile(rf"(?:.*\.)?(?:{t})") for t in targets]
    except re.error as error:
        raise ValueError(f"target={target!r} is no regular expression: {error}") from None


def _has_kernel(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _check_layer(name: str, layer: Any, slots: Mapping[int, int], dtype: Any, flat: bool) -> None:
    if isinstance(layer, nnx.Linear):
        expected: tuple[int, ...] = (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.LinearGeneral):
        expected = (*layer.in_features, *layer.out_features)
    else:
        expected = tuple(layer.kernel_shape)
    try:
        features = _LORA_CLASS[type(layer)].features(layer)
        stack_dtype(dtype or layer.kernel.dtype)
        if flat:
            _flat_size(stack_shapes(features, slots, tuple(slots), features[1:]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if layer.kernel.shape != expected:
        raise ValueError(
            f"{name}: kernel {list(layer.kernel.shape)} should be {list(expected)}; layers stacked "
            "for a scan are not covered yet"
        )
