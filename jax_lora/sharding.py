"""LoRA layers on a mesh of devices: each device runs the layer on its own shard."""

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_batching import sequential_vmap
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from pallas_kernels.ranks import padded_rank

AnyMesh = Mesh | AbstractMesh
Label = Hashable
MeshAxes = tuple[str, ...]


class Labels(NamedTuple):
    """A layer read as an einsum, `x, kernel -> y`: a name for each axis of the three arrays."""

    x: tuple[Label, ...]
    kernel: tuple[Label, ...]
    y: tuple[Label, ...]

    @property
    def lead(self) -> tuple[Label, ...]:
        """The axes that tokens are made of."""
        return tuple(label for label in self.x if label not in self.kernel)

    @property
    def summed(self) -> tuple[Label, ...]:
        """The axes that together are H, in the kernel's order."""
        return tuple(label for label in self.kernel if label in self.x)

    @property
    def kept(self) -> tuple[Label, ...]:
        """The axes that together are N."""
        return tuple(label for label in self.kernel if label not in self.x)


_ANY_NDIM = 16  # of an x: the labels of a kernel don't depend on it


class Placed(Protocol):
    """What this module needs of a LoRA layer."""

    kernel: nnx.Param[Array]
    slices: tuple[int, ...]
    fully_sharded: bool
    placement: NamedSharding | None

    @property
    def lead(self) -> tuple[int, ...]: ...

    @property
    def buckets(self) -> tuple[int, ...]: ...

    def labels(self, x_ndim: int) -> Labels: ...


class Shards(NamedTuple):
    """How a call of a layer is divided over a mesh.

    Attributes:
      axes: of the mesh, over which each label's axis is divided.
      manual: all axes of the mesh that the layer divides its work over by itself.
      fully: whether ranks are divided too: those of A where N is, those of B where H is.
    """

    mesh: AnyMesh
    labels: Labels
    axes: Mapping[Label, MeshAxes]
    manual: frozenset[str]
    fully: bool

    def spec(self, labels: Iterable[Label]) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(label, ()) or None for label in labels))

    def _along(self, labels: Sequence[Label]) -> MeshAxes:
        return tuple(axis for label in labels for axis in self.axes.get(label, ()))

    @property
    def inputs(self) -> MeshAxes:
        """Over which H is divided."""
        return self._along(self.labels.summed)

    @property
    def outputs(self) -> MeshAxes:
        """Over which N is divided."""
        return self._along(self.labels.kept)

    @property
    def tokens(self) -> NamedSharding | None:
        """How the tokens' ids, `[*lead]`, are divided; None where they are not."""
        return _divided(self.mesh, [self.axes.get(label, ()) for label in self.labels.lead])

    def varying[T](self, tree: T) -> T:
        """`tree` inside of the `shard_map`, each array different on each shard.

        The gradient of what several devices share is so the sum of theirs.
        """
        used = {axis for axes in self.axes.values() for axis in axes}

        def one(leaf: Array) -> Array:
            missing = tuple(sorted(used - jax.typeof(leaf).manual_axis_type.varying))
            if leaf.dtype in (jnp.bfloat16, jnp.float16):
                return _vary(missing, leaf) if missing else leaf
            return jax.lax.pcast(leaf, missing, to="varying")

        return jax.tree.map(one, tree)

    def total(self, y: Array) -> Array:
        """The sum of the devices' `y`, inside of the `shard_map`, where each has part of H."""
        return _total(self.inputs, y) if self.inputs else y

    def by_ranks(self, vs: Sequence[Array]) -> list[Array]:
        """What A's shards made of x, each `[T, R]`, as B's shards take it.

        Where N is divided, one exchange gathers the devices' ranks. Where H is, all devices have
        all ranks, each of its own part of x; one exchange scatters their sums.
        """
        if self.outputs:
            ranks = [v.shape[1] for v in vs]
            gathered = jax.lax.all_gather(jnp.concatenate(vs, axis=1), self.outputs, axis=1)
            ends = itertools.accumulate(ranks)
            vs = [
                gathered[:, :, end - rank : end].reshape(len(gathered), -1)
                for rank, end in zip(ranks, ends)
            ]
        if self.inputs:
            devices = self.devices(self.inputs)
            each = [v.reshape(len(v), devices, -1) for v in vs]
            total = jax.lax.psum_scatter(
                jnp.concatenate(each, axis=2), self.inputs, scatter_dimension=1
            )
            vs = jnp.split(total, list(itertools.accumulate(v.shape[2] for v in each))[:-1], axis=1)
        return list(vs)

    def devices(self, axes: MeshAxes) -> int:
        """How many parts these axes make of an array."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def of_variable(self, name: Hashable, ndim: int) -> PartitionSpec:
        """How a variable of the layer is divided, by its name. Axes of stacked layers are whole."""
        ends: dict[Hashable, tuple[MeshAxes | None, ...]] = {
            "lora_a": (None, (self.fully and self.outputs) or None, self.inputs or None),
            "lora_b": (None, self.outputs or None, (self.fully and self.inputs) or None),
            "kernel": tuple(self.spec(self.labels.kernel)),
            "bias": tuple(self.spec(x for x in self.labels.y if x in self.labels.kernel)),
        }
        end = ends.get(name, ())
        return PartitionSpec(*[None] * (ndim - len(end)), *end)


def _sum(axes: MeshAxes, x: Array) -> Array:
    """The sum over devices.

    XLA's CPU compiler aborts on sums in half precision over some of a mesh's axes, in jax 0.11.2
    ("Invalid binary instruction opcode copy"): a bfloat16 `psum` in a `shard_map` is enough whose
    `axis_names` lack an axis of the mesh.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return jax.lax.psum(x, axes)

    # Opaque, as JAX takes the choice itself out of a loop that it differentiates: XLA then has a
    # branch for each sum of a turn.
    @sequential_vmap  # type: ignore[untyped-decorator]
    def of_platform(x: Array) -> Array:
        return jax.lax.platform_dependent(
            x,
            cpu=lambda x: jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype),
            default=lambda x: jax.lax.psum(x, axes),
        )

    total: Array = of_platform(x)
    return total


# JAX's own gradient of a choice by platform keeps the choice, and a scan over layers has it as an
# array: a GPU then has branches for its sums. So each of these two is the other's gradient by name.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(axes: MeshAxes, x: Array) -> Array:
    """`_sum`, which is the same on all devices."""
    return _sum(axes, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vary(axes: MeshAxes, x: Array) -> Array:
    """x, which may be different on each device."""
    return jax.lax.pcast(x, axes, to="varying")


_total.defvjp(
    lambda axes, x: (_sum(axes, x), None),
    lambda axes, _, g: (jax.lax.pcast(g, axes, to="varying"),),
)
_vary.defvjp(
    lambda axes, x: (jax.lax.pcast(x, axes, to="varying"), None),
    lambda axes, _, g: (_sum(axes, g),),
)


def shards_of(layer: Placed, x: Array) -> Shards | None:
    """How a call is divided; None where it isn't, or where the caller's `shard_map` did that.

    Raises:
      ValueError: x is sharded over features, and the kernel is not: all of x would be gathered.
        Features do not divide over the mesh, nor ranks that are to.
    """
    mesh = _mesh(layer, x)
    if mesh is None:
        return None
    labels = layer.labels(x.ndim)
    of_x = dict(zip(labels.x, _explicit(x)))
    tokens = {label: of_x[label] for label in labels.lead if of_x.get(label)}
    taken = {axis for axes in tokens.values() for axis in axes}
    explicit = _explicit_axes(mesh)
    # What tokens are divided over, weights are gathered from: fully sharded data parallelism. XLA
    # can't sum over an automatic axis of one device.
    over = {a for a, size in mesh.shape.items() if size > 1 or a in explicit} - taken
    weights = {
        label: tuple(axis for axis in axes if axis in over)
        for label, axes in zip(labels.kernel, _kernel_axes(layer))
    }
    axes = tokens | weights
    used = {axis for some in axes.values() for axis in some}
    if not (explicit or used):
        return None
    alone = {axis for axis, size in mesh.shape.items() if size == 1}
    manual = frozenset(explicit | used | alone)
    shards = Shards(mesh, labels, axes, manual, layer.fully_sharded)
    _check(layer, shards, x, of_x)
    return shards


def _mesh(layer: Placed, x: Array) -> AnyMesh | None:
    """The mesh of the operands, of the context, or of the layer; None in a `shard_map`."""
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        return None
    meshes = list(map(_mesh_of, (x, layer.kernel.get_value())))
    meshes.append(context)
    if layer.placement is not None:
        meshes.append(layer.placement.mesh)
    return next((mesh for mesh in meshes if not mesh.empty), None)


def _mesh_of(array: Array) -> AnyMesh:
    """With its devices, if they are known; it is empty where `array` is on no mesh."""
    known = _sharding_of(array)
    return jax.typeof(array).sharding.mesh if known is None else known.mesh


def _sharding_of(array: Array) -> NamedSharding | None:
    """Where an array is; None of a tracer, or where it is on no mesh."""
    if isinstance(array, jax.core.Tracer):
        return None
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _divided(mesh: AnyMesh, axes: Sequence[MeshAxes]) -> NamedSharding | None:
    return NamedSharding(mesh, PartitionSpec(*(a or None for a in axes))) if any(axes) else None


def tokens_of(x: Array) -> NamedSharding | None:
    """How the tokens of an x `[*lead, H]` are divided, as far as types say so."""
    return _divided(_mesh_of(x), _explicit(x)[:-1])


def by_shard(tokens: NamedSharding | None) -> PartitionSpec:
    """How arrays are divided that hold something of each shard of the tokens, along axis 0."""
    if tokens is None:
        return PartitionSpec()
    return PartitionSpec(tuple(axis for entry in tokens.spec for axis in _names(entry)))


def put(value: Array | np.ndarray, sharding: Sharding) -> Array:
    """`value` as `sharding` says; of a process among several, its shards alone."""
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    # To put it there would first compare all processes' values, by an exchange between devices.
    own = np.asarray(value)
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def whole(array: Array) -> np.ndarray:
    """The values of an array; where processes have shards of it, by an exchange of all of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def resharded(value: Array, sharding: NamedSharding) -> Array:
    """`value` as a `shard_map` wants it: the types of explicit axes must be what it says."""
    explicit = _explicit_axes(sharding.mesh)
    if not explicit:
        return value
    entries = (tuple(a for a in _names(entry) if a in explicit) for entry in sharding.spec)
    spec = PartitionSpec(*(axes or None for axes in entries))
    return jax.sharding.reshard(value, NamedSharding(sharding.mesh, spec))


def _explicit_axes(mesh: AnyMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {axis for axis, kind in kinds if kind == AxisType.Explicit}


def _names(entry: object) -> MeshAxes:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(map(str, entry))  # type: ignore[call-overload]


def _explicit(array: Array) -> list[MeshAxes]:
    """The axes of the mesh that the type of `array` has, of each of its axes."""
    return list(map(_names, jax.typeof(array).sharding.spec))


def _kernel_axes(layer: Placed) -> list[MeshAxes]:
    """The mesh axes of each axis of one layer's kernel."""
    own = _explicit(layer.kernel.get_value())[len(layer.lead) :]
    if any(own):
        return own
    spec = annotated(layer.kernel) if layer.placement is None else layer.placement.spec
    return _per_axis(spec, len(own))


def _whole(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    return PartitionSpec(*spec, *[None] * (ndim - len(spec)))


def _per_axis(spec: PartitionSpec, ndim: int) -> list[MeshAxes]:
    """The mesh axes of each of the last axes. `spec` may lack those of stacked layers in front."""
    return list(map(_names, _whole(spec, ndim)))[-ndim:]


def annotated(kernel: nnx.Variable[Array]) -> PartitionSpec:
    """What Flax's metadata say, by the axes of the mesh."""
    if not kernel.has_metadata("out_sharding") or not kernel.out_sharding:
        return PartitionSpec()
    spec = nnx.get_partition_spec(kernel).get_value()
    return spec.spec if isinstance(spec, NamedSharding) else PartitionSpec(*spec)


def placement_of(layer: Placed, lead: int, buckets: Sequence[int], *, fully: bool) -> Shards | None:
    """How the kernel of one layer is divided, and its stacks are to be; None where no mesh is.

    Raises:
      ValueError: features, or the ranks of fully sharded stacks, do not divide over the mesh.
    """
    kernel = layer.kernel.get_value()
    mesh, spec = _mesh_of(kernel), annotated(layer.kernel)
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    elif (known := _sharding_of(kernel)) is not None:
        spec = _whole(known.spec, kernel.ndim)
    elif any(_explicit(kernel)):
        spec = jax.typeof(kernel).sharding.spec
    if mesh.empty or mesh.manual_axes:
        return None
    shape = jnp.shape(kernel)[lead:]
    labels = layer.labels(_ANY_NDIM)
    on_mesh = [
        tuple(axis for axis in axes if axis in mesh.axis_names)
        for axes in _per_axis(spec, len(shape))
    ]
    axes = dict(zip(labels.kernel, on_mesh))
    shards = Shards(mesh, labels, axes, frozenset(), fully)
    _check_divisible(type(layer).__name__, shards, dict(zip(labels.kernel, shape)))
    _check_ranks(type(layer).__name__, shards, buckets)
    return shards


def _check(layer: Placed, shards: Shards, x: Array, of_x: Mapping[Label, MeshAxes]) -> None:
    name = type(layer).__name__
    for label in shards.labels.summed:
        given, wanted = of_x.get(label, ()), shards.axes.get(label, ())
        if given != wanted and shards.devices(given) > 1:
            raise ValueError(
                f"{name} gets x {list(x.shape)} with features over {given} of the mesh, but its "
                f"kernel has them over {wanted or 'none'}, so all of x would be gathered; shard "
                "the kernel likewise, or give jax.sharding.reshard(x, "
                f"{shards.spec(shards.labels.x)})"
            )
    kernel = layer.kernel.get_value().shape[len(layer.lead) :]
    _check_divisible(name, shards, dict(zip(shards.labels.kernel, kernel)))
    _check_ranks(name, shards, layer.buckets)
    if len(layer.slices) > 1 and shards.devices(shards.outputs) > 1:
        raise ValueError(
            f"{name} has slices {layer.slices}, whose columns can't be divided over "
            f"{shards.outputs} of the mesh; make a layer of each"
        )


def _check_divisible(name: str, shards: Shards, sizes: Mapping[Label, int]) -> None:
    """ValueError where features do not divide over the mesh, or are divided in their midst."""
    for what, labels in (("input", shards.labels.summed), ("output", shards.labels.kept)):
        for nth, label in enumerate(labels):
            axes = shards.axes.get(label, ())
            devices = shards.devices(axes)
            if sizes[label] % devices:
                raise ValueError(
                    f"{name}: {sizes[label]} {what} features do not divide over the {devices} "
                    f"devices of mesh axes {axes}"
                )
            before = math.prod(sizes[other] for other in labels[:nth])
            if devices > 1 and before > 1:
                raise ValueError(
                    f"{name}: its {what} features are {[sizes[x] for x in labels]}, of which "
                    f"mesh axes {axes} divide the {sizes[label]}; divide the first of them"
                )


def _check_ranks(name: str, shards: Shards, buckets: Sequence[int]) -> None:
    """ValueError where ranks are divided, and a bucket is not what LoRAX pads a rank to."""
    for axes in (shards.inputs, shards.outputs):
        devices = shards.devices(axes) if shards.fully else 1
        padded = tuple(dict.fromkeys(padded_rank(bucket, devices) for bucket in buckets))
        if devices > 1 and padded != tuple(buckets):
            raise ValueError(
                f"{name}: buckets {tuple(buckets)} do not divide over the {devices} devices of "
                f"mesh axes {axes} into ranks that are multiples of 8, as fully_sharded asks; give "
                f"buckets={padded}"
            )
