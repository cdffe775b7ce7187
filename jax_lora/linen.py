"""LoRA for Flax Linen: the layer, and the bank over a Linen model's variables."""

import dataclasses
import functools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, serialization
from flax.linen.spmd import logical_to_mesh
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, DTypeLike

from jax_lora import bank
from jax_lora.bank.owner import StackOwner
from jax_lora.batch import AdapterBatch, Guard
from jax_lora.nn.layer import LoRALayer, batch_for
from jax_lora.nn.names import ModulePath, Shape
from jax_lora.nn.stacks import (
    LoRAScale,
    LoRAStack,
    Slots,
    StackShape,
    empty_scales,
    stack_dtype,
    stack_shapes,
)
from pallas_kernels.ranks import DEFAULT_BUCKETS


@jax.tree_util.register_static
class _Held:
    """A guard as a part of variables: a pytree without leaves. None where no bank has them yet.

    None equals any guard, so that what `init` returns has the structure of a bank's variables; the
    guards of two banks differ, so that a function is traced for each.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        return self.guard is other.guard or None in (self.guard, other.guard)

    def __hash__(self) -> int:
        return hash(_Held)


# What a checkpoint holds of a guard, which is of one process: nothing.
serialization.register_serialization_state(
    _Held, ty_to_state_dict=lambda held: {}, ty_from_state_dict=lambda held, state: held
)


MaybeBoxed = Array | nn.meta.AxisMetadata[Array]


class _Base(nnx.Module):
    """What `LoRALayer` extends: the `Dense` of Linen, with arrays of its own.

    Attributes:
      dense: as the user made it, but for what it holds.
    """

    dense: nn.Dense
    kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None

    def __call__(self, x: Array, out_sharding: None = None) -> Array:
        params = {"kernel": self.kernel.get_value()}
        if self.bias is not None:
            params["bias"] = self.bias.get_value()
        dense = self.dense.clone(features=self.kernel.shape[-1])  # of a shard, where it is one
        return jnp.asarray(dense.apply({"params": params}, x))

    def promote_dtype(self, arrays: tuple[Array], *, dtype: DTypeLike) -> tuple[Array]:
        [array] = arrays
        return (jnp.asarray(array, dtype),)


class _Dense(LoRALayer, _Base):  # type: ignore[misc]
    """The arrays of a Linen layer as a layer of NNX, which knows meshes and has a bank.

    Args:
      params: its collection `params`; what boxes say of a mesh is kept.
      stacks: A and B of each stack, by its number.
    """

    def __init__(
        self,
        dense: nn.Dense,
        params: Mapping[str, MaybeBoxed],
        shapes: Sequence[StackShape],
        stacks: Mapping[int, Mapping[str, Array]],
        scales: Array,
    ) -> None:
        kernel, bias = nn.meta.unbox(params["kernel"]), nn.meta.unbox(params.get("bias"))
        self.dense, self.kernel = dense, nnx.Param(kernel)
        if axes := _mesh_axes(params["kernel"]):
            self.kernel.set_metadata(out_sharding=axes)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        arrays = [[stacks[i][name] for name in ("lora_a", "lora_b")] for i in range(len(shapes))]
        self.stacks = nnx.List([LoRAStack(shape, a, b) for shape, (a, b) in zip(shapes, arrays)])
        self.scales = LoRAScale(scales)
        self.slices = tuple(
            shape.features[1] for shape in shapes if shape.bucket == shapes[0].bucket
        )
        self.guard = self.placement = None

    def matrix_shape(self) -> tuple[int, int]:
        in_features, out_features = self.kernel.shape[-2:]
        return in_features, out_features

    def resize(self) -> None:
        """Its sizes are those of the kernel."""


_Dense.__name__ = "LoRADense"  # errors call it what the user calls it


def _mesh_axes(kernel: object) -> tuple[object, ...]:
    """Over which axes of a mesh Flax's metadata divide a kernel; () where it has none."""
    if not isinstance(kernel, nn.meta.AxisMetadata):
        return ()
    spec = nn.get_partition_spec(kernel)
    return tuple(logical_to_mesh(spec) if isinstance(kernel, nn.LogicallyPartitioned) else spec)


class LoRADense(nn.Dense):
    """`flax.linen.Dense` with stacks of LoRA adapters: `y[t] = x[t] W + b + s (x[t] A^T) B^T`.

    Example::

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x, adapters=None):
                return linen.LoRADense(512, slots=4, buckets=(16,), name="proj")(x, adapters)

        variables = model.init(jax.random.key(0), x)
        bank = linen.AdapterBank(variables)
        bank.load("french", "adapters/french")
        batch = bank.batch(["french", None])
        y = model.apply({"params": variables["params"], **bank.variables}, x, batch)

    Kernel and bias are those of `Dense`, in the collection `params`. The stacks are in `lora`,
    which may be trained, their scales in `lora_scale`; neither is needed without adapters.

    On a mesh of devices it follows its kernel, as `jax_lora.LoRADense` does. Arrays inside of `jit`
    tell how explicit axes divide the kernel. `kernel_init=nn.with_partitioning(...)` tells it of
    automatic axes, where the mesh is that of `jax.set_mesh`.

    Attributes:
      slots, buckets, slices, lora_dtype: as in `jax_lora.LoRADense`. The others: as in `Dense`.
    """

    slots: Slots = 8
    buckets: Sequence[int] = DEFAULT_BUCKETS
    slices: Sequence[int] | None = None
    lora_dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array, adapters: AdapterBatch | None = None) -> Array:
        """The base layer's output, plus each row's adapter; as `jax_lora.LoRADense`."""
        adapters = batch_for(self, adapters)
        if adapters is None or self.is_initializing():
            y = super().__call__(inputs)
            if not self.is_initializing():
                return y
        dtype = stack_dtype(self.lora_dtype or self.param_dtype)
        slices = (self.features,) if self.slices is None else self.slices
        features = (jnp.shape(inputs)[-1], self.features)
        shapes = stack_shapes(features, self.slots, self.buckets, slices)

        def empty() -> dict[int, dict[str, Array]]:
            return {
                i: {
                    name: jnp.zeros(size, dtype)
                    for name, size in zip(("lora_a", "lora_b"), shape.sizes)
                }
                for i, shape in enumerate(shapes)
            }

        stacks = self.variable("lora", "stacks", empty).value
        scales = self.variable("lora_scale", "scales", empty_scales, shapes).value
        if self.is_initializing():
            self.variable("lora_scale", "guard", _Held)
        if adapters is None:
            return y
        layer = _Dense(self._plain(), self._params(features), shapes, stacks, scales)
        layer.guard = self.get_variable("lora_scale", "guard", _Held()).guard
        return layer(inputs, adapters)

    def _plain(self) -> nn.Dense:
        """The layer without LoRA."""
        fields = {field.name for field in dataclasses.fields(nn.Dense)} - {"parent", "name"}
        return nn.Dense(**{name: getattr(self, name) for name in fields}, parent=None)

    def _params(self, features: tuple[int, int]) -> dict[str, MaybeBoxed]:
        """Its collection `params`, with what `kernel_init` says of a mesh, also if unboxed."""
        params: dict[str, MaybeBoxed] = {
            name: self.get_variable("params", name) for name in ("kernel", "bias")
        }
        said = jax.eval_shape(
            lambda: self.kernel_init(jax.random.key(0), features, self.param_dtype)
        )
        if isinstance(said, nn.meta.AxisMetadata):
            params["kernel"] = said.replace_boxed(nn.meta.unbox(params["kernel"]))
        return params


def _layer_of(
    path: str, params: Mapping[str, MaybeBoxed], stacks: Mapping[int, Any], scales: Array
) -> _Dense:
    """What the bank has of a layer.

    Raises:
      ValueError: its arrays do not have the same axes of layers, in front.
    """
    kernel = nn.meta.unbox(params["kernel"])
    lead = kernel.shape[:-2]
    ordered = [stacks[i] for i in range(len(stacks))]
    if any(s["lora_a"].shape[:-3] != lead for s in ordered) or scales.shape[:-1] != lead:
        raise ValueError(
            f"{path}: kernel {list(kernel.shape)} and stacks {list(ordered[0]['lora_a'].shape)}"
            " must have the same axes of layers, in front: give nn.scan variable_axes with 0 "
            'for "params", "lora" and "lora_scale"'
        )
    buckets = [stack["lora_a"].shape[-2] for stack in ordered]
    slices = [s["lora_b"].shape[-2] for s, bucket in zip(ordered, buckets) if bucket == buckets[0]]
    slots = {bucket: s["lora_a"].shape[-3] for s, bucket in zip(ordered, buckets)}
    shapes = stack_shapes(kernel.shape[-2:], slots, tuple(slots), slices)
    own = {i: {name: _own(value) for name, value in stack.items()} for i, stack in stacks.items()}
    return _Dense(nn.Dense(sum(slices)), params, shapes, own, _own(scales))


def _own(value: Any) -> Array:
    """`value` as JAX's: a copy where it is NumPy's, which others may write."""
    return value if isinstance(value, jax.Array) else jnp.asarray(np.array(value))


# Those that live, to find the one that has taken over some variables.
_LINEN_BANKS: weakref.WeakSet["AdapterBank"] = weakref.WeakSet()


class AdapterBank(bank.AdapterBank):
    """`jax_lora.AdapterBank` over the variables of a Linen model.

    PEFT's module names are the layers' paths in `params`, joined by dots.

    Args:
      variables: what `model.init` returned. The bank takes over the stacks: from now on they are
        in `bank.variables`.
      peft_names: where names differ; as the model's attribute in `jax_lora.AdapterBank`.
      adapters_per_row: as in `jax_lora.AdapterBank`.

    Variables have one bank. A new one over the same takes over from it, as for an NNX model; it
    must be given `bank.variables` once the first has loaded something.

    Raises:
      ValueError: there are no LoRA layers, or they lack scales; another bank has taken the
        variables over and changed them; and as `jax_lora.AdapterBank`.
    """

    def __init__(
        self,
        variables: Mapping[str, Any],
        *,
        peft_names: Mapping[str, Any] | None = None,
        adapters_per_row: int = 1,
    ) -> None:
        def is_layer(path: Any, value: Any) -> bool:
            return "stacks" in value

        model: Any = nnx.Module()
        layers = flatten_dict(variables.get("lora", {}), is_leaf=is_layer)
        scales = flatten_dict(variables.get("lora_scale", {}))
        params = variables.get("params", {})
        if any(
            isinstance(leaf, jax.Array) and leaf.is_deleted()
            for leaf in jax.tree.leaves((layers, scales))
        ):
            raise ValueError(
                "the stacks in variables were deleted, by a load of the bank that took them over, "
                "or by a step that donated them; give that bank's `variables`"
            )
        if () in layers:
            raise ValueError("a LoRADense alone has no path for PEFT to name; put it in a module")
        for path, layer in layers.items():
            parent = model
            for name in path[:-1]:
                if name not in vars(parent):
                    setattr(parent, name, nnx.Module())
                parent = getattr(parent, name)
            if (*path, "scales") not in scales:
                raise ValueError(f"variables have stacks, but no lora_scale, of {'.'.join(path)}")
            arrays = functools.reduce(operator.getitem, path, params), layer["stacks"]
            own = _layer_of(".".join(path), *arrays, scales[*path, "scales"])
            setattr(parent, path[-1], own)
        model.peft_names = nnx.static(dict(peft_names or {}))
        shapes = jax.tree.map(lambda value: tuple(jnp.shape(value)), nn.meta.unbox(params))
        self._shapes = flatten_dict(shapes)
        super().__init__(model, adapters_per_row=adapters_per_row)
        _LINEN_BANKS.add(self)

    def _array_shapes(self) -> dict[ModulePath, Shape]:
        return self._shapes

    def _owners_before(self) -> list[StackOwner]:
        mine = {id(array) for array in jax.tree.leaves(self.state)}
        return [
            other
            for other in list(_LINEN_BANKS)
            if other._is_current and mine & {id(array) for array in jax.tree.leaves(other.state)}
        ]

    @property
    def variables(self) -> dict[str, Any]:
        """The live collections `lora` and `lora_scale`, as `model.apply` takes them.

        Take it anew for each step: the next load donates the arrays that were in it.
        """
        lora, scales = {}, {}
        for path, variable in nnx.to_flat_state(self.state):
            if path[-1] == "scales":
                scales[path] = variable.get_value()
                scales[*path[:-1], "guard"] = _Held(self._guard)
            else:
                lora[path] = variable.get_value()
        return {"lora": unflatten_dict(lora), "lora_scale": unflatten_dict(scales)}

    def update(self, lora: Mapping[str, Any]) -> None:
        """Takes the collection `lora` back after training.

        NumPy arrays are copied. JAX's become the bank's: the next load donates them.

        Raises:
          ValueError: it is not of the structure and shapes of `variables["lora"]`, or arrays in it
            are deleted.
          RuntimeError: the thread holds `stepping`.

        In each case the bank is as it was.
        """
        stacks = {k: v for k, v in nnx.to_flat_state(self.state) if k[-1] != "scales"}
        new = {path: _own(value) for path, value in flatten_dict(lora).items()}

        def commit() -> None:
            if {k: (v.shape, v.dtype) for k, v in stacks.items()} != {
                k: (v.shape, v.dtype) for k, v in new.items()
            }:
                raise ValueError("lora must have the paths, shapes and dtypes of the bank's stacks")
            if any(value.is_deleted() for value in new.values()):
                raise ValueError("lora has deleted arrays; a load, or a donating step, took them")
            self._guard.writes += 1
            for path, variable in stacks.items():
                variable.set_value(new[path])

        self._write(commit)

    def merged_params(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with an adapter folded into the kernels; see `merge`."""
        kernels = flatten_dict(nnx.to_pure_dict(self.merge(name)))
        return unflatten_dict(flatten_dict(params) | kernels)
