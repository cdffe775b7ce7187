"""qwix's LoRA with several adapters in one batch: a provider for the products of any model."""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jaxtyping import Array, DTypeLike
from qwix._src.core.einsum_info import EinsumInfo
from qwix._src.providers import lora as qwix_lora
from qwix._src.providers import ptq
from qwix._src.utils import flax_util

from jax_lora.batch import AdapterBatch, current, use
from jax_lora.nn.einsum import einsum_labels, x_as_matrix, y_from_matrix
from pallas_kernels import LoRAPart, Mix, Segments, lora_delta, rank_bucket

_Initializer = Callable[[Array, Sequence[int], DTypeLike], Array]


class _Matrix(NamedTuple):
    """How a product multiplies with a parameter that is a matrix, and qwix's shapes of its LoRA.

    Attributes:
      einsum: the product, as an einsum.
      shapes: of A and B.
      axes: of the parameter, which give the axes of A and B their shardings.
      of_lora: qwix's einsum of x, A and B, if the product is one.
    """

    einsum: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    axes: tuple[tuple[int | None, ...], tuple[int | None, ...]]
    of_lora: str = ""


class _Product(NamedTuple):
    """A product with a parameter to which a rule gives LoRA, by its name in the module."""

    rule: qwix.LoraRule
    name: str
    matrix: _Matrix


class MultiLoraProvider(qwix.LoraProvider):  # type: ignore[misc]
    """`qwix.LoraProvider` with `slots` adapters per product, of which each row has its own.

    It covers each `jax.lax.dot_general` and `jnp.einsum` of a model with a parameter, whatever
    module calls it, under `nnx.remat` too. Names, initial values and shardings of the parameters
    are qwix's (`kernel_lora_a`, `w_lora_b`), with an axis of slots in front. Rows take their
    adapters from `jax_lora.use`, or from `set_rows`; without either they have none.

    Example::

        provider = MultiLoraProvider(module_path=".*q_proj", rank=16, alpha=32, slots=4)
        model = qwix.apply_lora_to_model(model, provider, tokens, rngs=nnx.Rngs(0))
        with jax_lora.use(provider.batch([0, None, 3, 3])):
            y = model(tokens)

    Args:
      rules, disable_jit, **rule: as in `qwix.LoraProvider`.
      slots: adapters per product. None for qwix's one, which all rows have, without the axis.

    Raises:
      ValueError: `slots` is below 1; when the model is called, a product that no adapter of a row
        covers: a convolution, or one with axes of a batch in the parameter, as experts have; or a
        batch of another number of slots.
    """

    def __init__(
        self,
        rules: Sequence[qwix.LoraRule] | None = None,
        *,
        slots: int | None = None,
        disable_jit: bool = False,
        **rule: object,
    ) -> None:
        if slots is not None and slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        super().__init__(rules, disable_jit=disable_jit, **rule)
        self.slots = slots

    @property
    def ranges(self) -> tuple[tuple[int, int]]:
        """The `ranges` of an `AdapterBatch` for the model."""
        ranks = [rule.rank for rule in self._rules if isinstance(rule, qwix.LoraRule)]
        return ((rank_bucket(max(ranks)), self.slots or 1),)

    def batch(self, rows: Sequence[int | None], lengths: Array | None = None) -> AdapterBatch:
        """The batch in which row b has the adapter of slot `rows[b]`; None for the base model.

        Raises:
          ValueError: there is no such slot.
        """
        return AdapterBatch(self._ids(rows), lengths, ranges=self.ranges, phase="prefill")

    def _ids(self, rows: Sequence[int | None]) -> np.ndarray:
        slots = self.slots or 1
        if wrong := [row for row in rows if row is not None and not 0 <= row < slots]:
            raise ValueError(f"rows must be slots from 0 to {slots - 1} or None, got {wrong}")
        return np.array([-1 if row is None else row for row in rows], np.int32)

    def dot_general(
        self,
        lhs: Array,
        rhs: Array,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        precision: jax.lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        out_sharding: jax.sharding.NamedSharding | None = None,
    ) -> Array:
        """What qwix calls in the place of `jax.lax.dot_general`."""
        operands = lhs, rhs, dimension_numbers, precision, preferred_element_type
        of_matrix = functools.partial(_of_dot_general, lhs, rhs, dimension_numbers)
        product = self._covered("dot_general", rhs, of_matrix)
        if product is None:
            return super().dot_general(*operands, out_sharding=out_sharding)
        y = super(qwix.LoraProvider, self).dot_general(*operands, out_sharding=out_sharding)
        return self._add_lora(y, lhs, product)

    def einsum(self, einsum_str: str, *operands: Array, **kwargs: object) -> Array:
        """What qwix calls in the place of `jnp.einsum`."""
        product = None
        if len(operands) == 2:
            of_matrix = functools.partial(_of_einsum, einsum_str, *operands)
            product = self._covered("einsum", operands[1], of_matrix)
        if product is None:
            return super().einsum(einsum_str, *operands, **kwargs)
        y = super(qwix.LoraProvider, self).einsum(einsum_str, *operands, **kwargs)
        return self._add_lora(y, operands[0], product)

    def conv_general_dilated(
        self, lhs: Array, rhs: Array, *args: object, **kwargs: object
    ) -> Array:
        """What qwix calls in the place of `jax.lax.conv_general_dilated`."""
        self._covered("conv_general_dilated", rhs, lambda rank: None)
        return super().conv_general_dilated(lhs, rhs, *args, **kwargs)

    def _covered(
        self, op: str, rhs: Array, of_matrix: Callable[[int], _Matrix | None]
    ) -> _Product | None:
        """The product with `rhs`, if that is a parameter to which a rule gives LoRA, and a matrix;
        None for those that are left to qwix. `of_matrix` is for a rank."""
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        name = flax_util.find_param(rhs, ptq.WithAux) if isinstance(rule, qwix.LoraRule) else None
        if name is None:
            return None
        if (matrix := of_matrix(rule.rank)) is not None:
            return _Product(rule, name, matrix)
        if self.slots is None:
            return None
        path = "/".join(map(str, flax_util.get_current_module_path()))
        raise ValueError(
            f"slots={self.slots}: the {op} of {path or 'the model'} with {name} is no product with "
            "one matrix, so rows can't have adapters of their own in it; let no rule match it"
        )

    def _add_lora(self, y: Array, x: Array, product: _Product) -> Array:
        lora_a, lora_b = self._parameters(product)
        batch, rule, einsum = current(), product.rule, product.matrix.einsum
        if batch is None and self.slots is not None:
            return y
        if rule.dropout > 0:
            rngs = flax_util.make_rng("dropout")
            x = nnx.Dropout(rule.dropout, deterministic=False)(x, rngs=rngs)
        matrix = x_as_matrix(einsum, x)
        lead_shape = matrix.shape[:-1]
        slots, rank = self.slots or 1, rule.rank
        part = LoRAPart(
            lora_a.reshape(slots, -1, rank),
            lora_b.reshape(slots, rank, -1),
            rule.alpha / rank,
            transposed=True,
        )
        ids: Array | Segments | Mix
        if batch is None:
            ids = jnp.zeros(math.prod(lead_shape), jnp.int32)
        elif batch.num_slots == slots:
            ids = batch.segments(lead_shape)
        else:
            raise ValueError(
                f"the batch is of a model with {batch.num_slots} slots, but the provider has "
                f"slots={slots}; make it by the provider's batch()"
            )
        matrix = matrix.reshape(-1, part.features)
        delta = lora_delta(matrix, [part], ids, part.width, dtype=y.dtype)
        size = dict(zip(einsum_labels(einsum)[1], y.shape))
        return y + y_from_matrix(einsum, delta.reshape(*lead_shape, -1), size)

    def _parameters(self, product: _Product) -> tuple[Array, Array]:
        """A and B, which the first call makes, beside the parameter."""
        rule, name, matrix = product
        (shape_a, shape_b), (axes_a, axes_b) = matrix.shapes, matrix.axes
        if matrix.of_lora:  # for those who debug, as qwix does
            setattr(flax_util.get_current_module(), f"{name}_lora_einsum_str", matrix.of_lora)
        if self.slots is not None:
            shape_a, shape_b = (self.slots, *shape_a), (self.slots, *shape_b)
            axes_a, axes_b = (None, *axes_a), (None, *axes_b)
            rule = dataclasses.replace(
                rule,
                lora_a_initializer=_for_each_slot(rule.lora_a_initializer),
                lora_b_initializer=_for_each_slot(rule.lora_b_initializer),
            )
        return qwix_lora._get_or_create_lora_params(
            name=name,
            rule=rule,
            a_shape=shape_a,
            b_shape=shape_b,
            a_sharding_transpose=axes_a,
            b_sharding_transpose=axes_b,
        )


def _for_each_slot(initializer: _Initializer) -> _Initializer:
    """Numbers for each slot as `initializer` makes them for one."""

    def each(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
        def one(key: Array) -> Array:
            return initializer(key, shape[1:], dtype)

        return jax.vmap(one)(jax.random.split(key, shape[0]))

    return each


def _of_einsum(einsum_str: str, lhs: Array, rhs: Array, rank: int) -> _Matrix | None:
    """None where it is no product with one matrix."""
    info = EinsumInfo.parse(einsum_str, ndims=(lhs.ndim, rhs.ndim))
    full = f"{info.lhs},{info.rhs}->{info.out}"
    if not _is_matrix(full):
        return None
    of_lora = qwix_lora._parse_einsum_str_for_lora(lhs.shape, rhs.shape, einsum_str, rank)
    shape_a, shape_b, name, axes_a, axes_b = of_lora
    return _Matrix(full, (shape_a, shape_b), (axes_a, axes_b), name)


def _of_dot_general(
    lhs: Array, rhs: Array, dimension_numbers: jax.lax.DotDimensionNumbers, rank: int
) -> _Matrix | None:
    """None where it is no product with one matrix, with its axes in order."""
    (lhs_summed, rhs_summed), (lhs_batch, _) = dimension_numbers
    of_x, of_kernel = (list(string.ascii_letters[:26]), list(string.ascii_letters[26:]))
    of_x, of_kernel = of_x[: lhs.ndim], of_kernel[: rhs.ndim]
    for mine, others in zip(lhs_summed, rhs_summed):
        of_kernel[others] = of_x[mine]
    lead = [label for label in of_x if label not in of_kernel]
    kept = [label for label in of_kernel if label not in of_x]
    full = "".join([*of_x, ",", *of_kernel, "->", *lead, *kept])
    # qwix lays A out in the order in which axes are named, which need not be the parameter's.
    if lhs_batch or [*rhs_summed] != sorted(rhs_summed) or not _is_matrix(full):
        return None
    behind = [axis for axis in range(rhs.ndim) if axis not in rhs_summed]
    sizes = [[rhs.shape[axis] for axis in axes] for axes in (rhs_summed, behind)]
    shape_a, axes_a, shape_b, axes_b = qwix_lora._create_lora_layer_shapes(
        rhs_summed, (), behind, sizes[0], (), sizes[1], rank
    )
    return _Matrix(full, (shape_a, shape_b), (axes_a, axes_b))


def _is_matrix(einsum_str: str) -> bool:
    try:
        einsum_labels(einsum_str)
    except ValueError:
        return False
    return True


class RowSlots(nnx.Variable[Array]):
    """The slot of each row, as part of a model's state; see `set_rows`."""


class _HasRows(nnx.Module):
    row_slots: RowSlots


def set_rows(model: nnx.Module, provider: MultiLoraProvider, rows: Sequence[int | None]) -> None:
    """Has every call of `model` use the adapter of slot `rows[b]` for row b; None for none.

    For loops that take the model's state alone, as Tunix's sampler does: the slots are a variable
    of it, `row_slots`. A call again, with as many rows, changes only that, and retraces nothing. A
    batch of `jax_lora.use` comes first.

    Args:
      model: changed in place; what `qwix.apply_lora_to_model` made with `provider`.

    Raises:
      ValueError: there is no such slot.
    """
    slots, known = jnp.asarray(provider._ids(rows)), getattr(model, "row_slots", None)
    if known is not None:
        known.set_value(slots)
        return
    model.row_slots = RowSlots(slots)  # type: ignore[attr-defined]
    model.__class__ = _with_rows(type(model), provider.ranges)


@functools.cache
def _with_rows(kind: type[nnx.Module], ranges: tuple[tuple[int, int]]) -> type[nnx.Module]:
    """`kind`, whose calls are inside of `jax_lora.use` of its own rows."""

    @functools.wraps(kind.__call__)
    def call(self: _HasRows, *args: object, **kwargs: object) -> object:
        own = AdapterBatch(self.row_slots.get_value(), ranges=ranges, phase="prefill")
        with use(current() or own):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
