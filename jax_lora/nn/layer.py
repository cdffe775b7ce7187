"""What the LoRA layers share."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, DTypeLike

from jax_lora.batch import AdapterBatch, Guard, current
from jax_lora.nn.divided import add_by_ranks
from jax_lora.nn.dora import refuse_divided, rescaled
from jax_lora.nn.full import FullRoom, FullWeights
from jax_lora.nn.names import ModulePath, array_of
from jax_lora.nn.ops import add_in_step, delta_ahead
from jax_lora.nn.stacks import (
    InPlace,
    LoRAScale,
    LoRAStack,
    Slots,
    StackArrays,
    StackShape,
    empty_scales,
    slots_of,
    stack_dtype,
    stack_shapes,
)
from jax_lora.process import check_process
from jax_lora.sharding import (
    Labels,
    Shards,
    by_shard,
    placement_of,
    put,
    resharded,
    shards_of,
)
from pallas_kernels import LoRAPart
from pallas_kernels.routing import Mix, Segments
from pallas_kernels.stacks import LayerStacks, is_eight_bits


class LoRALayer(nnx.Module):
    """What the LoRA layers share; mixed in before the layer of Flax that each extends.

    A subclass says how its `x` and `y` read as `[T, H]` and `[T, N]` matrices.

    On a mesh of devices it follows its kernel. Where that is divided over columns, so are B and the
    output. Where it is divided over rows, so are A and the input, and the sum over the devices
    that the base layer needs has the adapters in it. Weights that are divided over the mesh's axis
    of the tokens are gathered for each call. The types of explicit axes say how x is divided;
    automatic axes over which no weights are divided are left to XLA.

    Like layers may be stacked for a scan: their arrays have axes in front (`scan_layers`).

    Attributes:
      fully_sharded: whether a mesh divides the ranks of its stacks too; see `apply_lora`.
      kernel_name: of the attribute that holds the kernel.
      takes_eight_bits: whether its stacks may be in 8 bits.
      is_transposed: whether PEFT stores the kernel's matrix as `[N, H]`, as all but embeddings.
      placement: of the kernel of one layer, over a mesh, when its stacks were made.
      guard: of the model that it is in; None where neither `apply_lora` nor a bank has seen it.
      in_place: in a turn of `scan_layers`, the scales of all layers, and the layer's number.
      full: room for whole weights of adapters' own, if `apply_lora` gave it some.
    """

    kernel_name = "kernel"
    takes_eight_bits = True
    is_transposed = True
    guard: Guard | None
    fully_sharded: bool = False
    placement: NamedSharding | None
    in_place: nnx.List[InPlace]
    kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None
    stacks: nnx.List[LoRAStack]
    scales: LoRAScale
    slices: tuple[int, ...]
    full: FullRoom

    def matrix_shape(self) -> tuple[int, int]:
        """`(H, N)` of the layer read as a matrix.

        Raises:
          ValueError: it is not a matrix.
        """
        raise NotImplementedError

    def x_matrix(self, x: Array) -> Array:
        """x as `[*lead, H]`, where `lead` are the axes that tokens are made of."""
        return x

    def y_matrix(self, y: Array) -> Array:
        """y as `[*lead, N]`."""
        return y

    def y_tensor(self, y_matrix: Array, y: Array) -> Array:
        """The inverse of `y_matrix`: `y_matrix` in the shape of y."""
        return y_matrix.reshape(y.shape)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes of layers that are stacked; () for a layer alone."""
        return tuple(self.scales.get_value().shape[:-1])

    @property
    def buckets(self) -> tuple[int, ...]:
        """The ranks that its stacks are allocated with."""
        return tuple(slots_of(stack.shape for stack in self.stacks))

    def labels(self, x_ndim: int) -> Labels:
        """The layer read as an einsum, of an x with so many axes."""
        lead = tuple(range(x_ndim - 1))
        return Labels((*lead, "h"), ("h", "n"), (*lead, "n"))

    def resize(self) -> None:
        """Takes the sizes of what it holds, a shard, for its own."""
        raise NotImplementedError

    def kernel_matrix(self, index: tuple[int | Array, ...] = ()) -> Array:
        """The kernel of the layer at `index` of `lead` as `[H, N]`."""
        return self.kernel[index].reshape(self.matrix_shape())

    def kernel_tensor(self, matrix: Array) -> Array:
        """The inverse of `kernel_matrix`: `matrix` in the shape of a kernel."""
        return matrix.reshape(self.kernel.shape[len(self.lead) :])

    def add_stacks(
        self,
        slots: Slots,
        buckets: Sequence[int],
        slices: Sequence[int] | None,
        dtype: DTypeLike,
        lead: tuple[int, ...] = (),
        fully_sharded: bool = False,
    ) -> None:
        """Allocates empty stacks, one per bucket and slice."""
        check_process()
        slices = (self.matrix_shape()[1],) if slices is None else tuple(slices)
        dtype = stack_dtype(dtype, eight_bits=True)
        shapes = self._stack_shapes(slots, buckets, slices, dtype)
        self.slices, self.guard, self.placement = slices, None, None
        self.fully_sharded = fully_sharded
        shards = self.check_room(dtype, len(lead), buckets, fully_sharded)
        self.stacks = nnx.List([])
        for shape in shapes:
            a, b = (jnp.zeros(size, dtype) for size in shape.arrays(lead))
            self.stacks.append(LoRAStack(shape, a, b))
            self._place(shards, self.stacks[-1])
        self.scales = LoRAScale(empty_scales(shapes, lead))
        self._place(shards, self)

    def _stack_shapes(
        self, slots: Slots, buckets: Sequence[int], slices: Sequence[int], dtype: DTypeLike
    ) -> list[StackShape]:
        return stack_shapes(self.matrix_shape(), slots, buckets, slices, dtype)

    def check_room(
        self, dtype: DTypeLike, lead: int, buckets: Sequence[int], fully_sharded: bool
    ) -> Shards | None:
        """Where its stacks go; None where they are not on a mesh.

        Raises:
          ValueError: they do not divide over the mesh, or are in 8 bits.
        """
        shards = placement_of(self, lead, buckets, fully=fully_sharded)
        if is_eight_bits(dtype) and shards is not None and shards.mesh.size > 1:
            raise ValueError(
                f"the {type(self).__name__} is on a mesh of {shards.mesh.size} devices, where "
                f"stacks are not {jnp.dtype(dtype)}; give apply_lora another dtype=, or leave the "
                "layer out of target"
            )
        return shards

    def add_rescales(self) -> None:
        """Makes room for DoRA."""
        for stack in self.stacks:
            stack.add_rescale()

    def add_full(self, count: int, ids: int, dtype: DTypeLike) -> None:
        """Allocates full slots, for adapters of so many ids."""
        inputs, outputs = self.matrix_shape()
        shape = (outputs, inputs) if self.is_transposed else (inputs, outputs)
        self.full = FullRoom(count, shape, self.bias is not None, stack_dtype(dtype), ids)

    @property
    def room_bytes(self) -> int:
        """The bytes of its stacks and full slots."""
        full = self.full.slots if hasattr(self, "full") else ()
        held = nnx.state(self.stacks, (nnx.LoRAParam, LoRAScale))
        stacks = (variable.nbytes for variable in jax.tree.leaves(held))
        return sum(stacks) + sum(weights.nbytes for weights in full)

    def place(self) -> None:
        """Moves the stacks to where the kernel is, each device's shards to that device.

        Raises:
          ValueError: features do not divide over the mesh, or ranks that are to.
        """
        dtype = self.stacks[0].lora_a.dtype
        shards = self.check_room(dtype, len(self.lead), self.buckets, self.fully_sharded)
        for holder in (*self.stacks, self):
            self._place(shards, holder)

    def _place(self, shards: Shards | None, holder: nnx.Module) -> None:
        if shards is None:
            return
        if hasattr(self, "full") and shards.mesh.size > 1:
            raise ValueError(
                f"the {type(self).__name__} has full slots, which a mesh of {shards.mesh.size} "
                "devices does not divide; leave them out of apply_lora's full_slots"
            )
        self.placement = NamedSharding(shards.mesh, shards.spec(shards.labels.kernel))
        for name in ("lora_a", "lora_b", "scales", "rescale"):
            if (variable := getattr(holder, name, None)) is not None:
                spec = shards.of_variable(name, variable.ndim)
                sharding = NamedSharding(shards.mesh, spec)
                variable.set_value(put(variable.get_value(), sharding))
                variable.set_metadata(out_sharding=tuple(spec))

    def parts(self, batch: AdapterBatch) -> list[LoRAPart]:
        """What the stacks add to the output."""
        batch.check_guard(self.guard, type(self).__name__)
        first_slots = batch.first_slots(slots_of(stack.shape for stack in self.stacks))
        return [
            self._arrays(stack).part(stack.shape, first_slots[stack.bucket])
            for stack in self.stacks
        ]

    def _arrays(self, stack: LoRAStack) -> StackArrays:
        arrays = StackArrays(stack.lora_a[...], stack.lora_b[...], self.scales[...])
        if not hasattr(self, "in_place"):
            return arrays
        whole = [variable.get_value() for variable in (*stack.in_place, *self.in_place)]
        return arrays._replace(layers=LayerStacks(*whole))

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
          ValueError: it is of another bank, or does not fit the layer's buckets or the rows of x;
            on a mesh, the layer would gather x, or its features do not divide over the devices.
        """
        if self.lead:
            raise ValueError(
                f"the {type(self).__name__} is {list(self.lead)} layers, stacked for a scan; run "
                "them by jax_lora.scan_layers, nnx.scan or nnx.vmap"
            )
        adapters = batch_for(self, adapters)
        if adapters is not None and (shards := shards_of(self, jnp.asarray(x))):
            y = self._on_shards(shards, jnp.asarray(x), adapters)
            return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
        if adapters is None:
            return self._base(x, out_sharding)
        base_x, deltas = self._ahead(x, adapters)
        y = self._base(base_x, out_sharding)
        if hasattr(self, "full"):
            ids = adapters.segments(y.shape[:-1])
            y = self.full.put_in(y, ids, functools.partial(self.by_full, x=jnp.asarray(x)))
        return self._add_lora(y, x, adapters, deltas=deltas)

    def _ahead(self, x: Array, adapters: AdapterBatch) -> tuple[Array, tuple[Array, ...] | None]:
        """`delta_ahead` of the layer."""
        if adapters.phase != "decode":
            return x, None
        shape = jax.eval_shape(lambda x: self._rows_of_y(self._base(x)), x)
        matrix, parts, segments = self._operands(x, shape.dtype, adapters)
        return delta_ahead(x, matrix, parts, segments, (shape,), phase=adapters.phase)

    def _operands(
        self, x: Array, dtype: DTypeLike, adapters: AdapterBatch
    ) -> tuple[Array, list[LoRAPart], Segments | Mix]:
        """x as a matrix, the parts, and the adapters of its rows."""
        (x,) = cast(Any, self).promote_dtype((x,), dtype=dtype)
        x = self.x_matrix(x)
        segments = adapters.segments(x.shape[:-1])
        return x.reshape(-1, self.matrix_shape()[0]), self.parts(adapters), segments

    def _rows_of_y(self, y: Array) -> Array:
        return self.y_matrix(y).reshape(-1, self.matrix_shape()[1])

    def by_full(self, weights: FullWeights, x: Array) -> Array:
        """The layer's output with other weights."""
        raise NotImplementedError

    def _base(self, x: Array, out_sharding: object = None) -> Array:
        """The base layer's output."""
        base = cast(Any, super())
        return base.__call__(x, out_sharding=out_sharding)

    def _on_shards(self, shards: Shards, x: Array, adapters: AdapterBatch) -> Array:
        """The call, divided over a mesh."""

        def call(layers: Sequence[LoRALayer], x: Array, batch: AdapterBatch) -> tuple[Array]:
            [own] = layers
            return (
                own._add_lora(own._base(x), x, batch, shards) if shards.fully else own(x, batch),
            )

        [y] = on_shards((self,), shards, x, adapters, call)
        return y

    def _add_lora(
        self,
        y: Array,
        x: Array,
        adapters: AdapterBatch,
        shards: Shards | None = None,
        deltas: tuple[Array, ...] | None = None,
    ) -> Array:
        """`shards`: of a layer whose ranks are divided too. `deltas`: of `_ahead`."""
        matrix, parts, segments = self._operands(x, y.dtype, adapters)
        rows, phase = self._rows_of_y(y), adapters.phase
        if shards is None:
            [out] = add_in_step((rows,), matrix, parts, segments, phase=phase, deltas=deltas)
            out = rescaled(self, out, parts, segments)
        elif isinstance(segments, Mix):
            raise ValueError(
                "layers whose ranks are divided over a mesh take one adapter per row, not mixes; "
                "give apply_lora no fully_sharded=True"
            )
        elif phase == "exact":
            raise ValueError(
                "the phase 'exact' does not cover layers whose ranks are divided over a mesh; give "
                "apply_lora no fully_sharded=True"
            )
        else:
            out = add_by_ranks(rows, matrix, parts, segments, phase, shards)
        return self.y_tensor(out.reshape(self.y_matrix(y).shape), y)


def on_shards[L: LoRALayer](
    layers: Sequence[L],
    shards: Shards,
    x: Array,
    adapters: AdapterBatch,
    call: Callable[[Sequence[L], Array, AdapterBatch], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """`call(layers, x, adapters)`, in which each device has the layers that its shards make up.

    Args:
      layers: of one x, divided alike.
      call: gives the ys of all layers.
    """
    if shards.inputs or shards.outputs:
        for layer in layers:
            refuse_divided(layer)
    graphdef, state = nnx.split(list(layers))
    paths, leaves = zip(*nnx.to_flat_state(state))
    names = [_name(layers[cast(int, path[0])], path[1:]) for path in paths]
    specs = [shards.of_variable(name, leaf.ndim) for name, leaf in zip(names, leaves)]
    of_x, of_y = shards.spec(shards.labels.x), shards.spec(shards.labels.y)
    tokens, labels = shards.tokens, shards.labels
    lead = tuple(size for size, label in zip(x.shape, labels.x) if label in labels.lead)
    segments = adapters.segments(lead, tokens)

    def local(arrays: list[Array], x: Array, segments: Segments) -> list[Array]:
        arrays, x, segments = shards.varying((arrays, x, segments))
        if shards.inputs:  # the sum over devices has a bias once
            is_first = jax.lax.axis_index(shards.inputs) == 0
            arrays = [
                jnp.where(is_first, t, jnp.zeros_like(t)) if name == "bias" else t
                for name, t in zip(names, arrays)
            ]
        own = [
            (path, leaf.replace(t) if isinstance(leaf, nnx.Variable) else t)
            for path, leaf, t in zip(paths, leaves, arrays)
        ]
        mine: list[L] = nnx.merge(graphdef, nnx.from_flat_state(own))
        for layer in mine:
            layer.resize()
        batch = adapters.with_segments(mine[0].x_matrix(x).shape[:-1], segments)
        return [shards.total(y) for y in call(mine, x, batch)]

    arrays = list(map(array_of, leaves))
    mapped = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(specs, of_x, by_shard(tokens)),
        out_specs=[of_y] * len(layers),
        axis_names=shards.manual,
    )
    ys: list[Array] = jax.jit(mapped)(
        [resharded(t, NamedSharding(shards.mesh, spec)) for t, spec in zip(arrays, specs)],
        resharded(x, NamedSharding(shards.mesh, of_x)),
        segments,
    )
    return tuple(ys)


def _name(layer: LoRALayer, path: ModulePath) -> Hashable:
    """What a variable of a layer holds; see `LoRAStack.in_place`."""
    if path == (layer.kernel_name,):
        return "kernel"
    is_of_stacks = path[0] == "stacks" and "in_place" in path
    return ("lora_a", "lora_b")[path[-1] == 1] if is_of_stacks else path[-1]


def batch_for(layer: Any, adapters: Any) -> AdapterBatch | None:
    """The batch that a layer was called with, or the ambient one."""
    check_process()
    if not isinstance(adapters, AdapterBatch | None):
        raise TypeError(
            f"{type(layer).__name__} takes an AdapterBatch as its second argument, got "
            f"{type(adapters).__name__}; other arguments go by keyword"
        )
    return current() if adapters is None else adapters
