"""Reading and writing one slot of all of a model's stacks, in place and compiled once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from jax_lora.adapters import Adapter
from jax_lora.bank.eight_bits import unscaled
from jax_lora.bank.sites import Site
from jax_lora.bank.slots import Entry
from jax_lora.batch import Guard
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.stacks import LoRAScale, LoRAStack, get_scales, get_slot, set_slot
from jax_lora.sharding import put, whole
from pallas_kernels.eight_bits import Quantised
from pallas_kernels.stacks import is_eight_bits


class _Held(NamedTuple):
    """What holds one bucket of a layer: its scales, A and B of each of its stacks, and behind them,
    with room for DoRA, each one's `rescale`."""

    scales: LoRAScale
    stacks: list[nnx.LoRAParam[Array] | LoRAScale]

    @property
    def arrays(self) -> tuple[Array, list[Array]]:
        return self.scales.get_value(), [variable.get_value() for variable in self.stacks]


# One slot of a layer's bucket: the scale of each stack, `[*lead, stacks]`, or, in 8 bits, those of
# its rank columns, `[*lead, stacks, R]`; and A and B of each stack.
SlotOfLayer = tuple[np.ndarray | Array, list[np.ndarray | Array]]

# What a slot is to hold: that of each layer, or what another slot of the bucket holds.
SlotValues = list[SlotOfLayer] | int

OfLayers = list[tuple[Array, list[Array]]]


class _Arrays(NamedTuple):
    """What a write changes: the layers' scales and stacks, and the tables of their full slots."""

    layers: OfLayers
    tables: list[Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What one slot of each layer of a bucket is.

    Attributes:
      shapes: its scales and arrays, as `_Held` has them, and where they go.
      firsts: where the scales of each stack start in the layer's.
      columns: of a layer with stacks in 8 bits R, whose columns have scales; of others ().
    """

    shapes: list[tuple[jax.ShapeDtypeStruct, list[jax.ShapeDtypeStruct]]]
    firsts: list[np.ndarray]
    columns: list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter on the host as a slot of its bucket holds it: a load has it to copy, no more.

    Attributes:
      is_own: nobody else writes the adapter's arrays.
      guard: of the model that it is for.
      error: how far stacks in 8 bits are from it, as `AdapterBank.load` says; or None.
    """

    adapter: Adapter
    bucket: int
    values: list[SlotOfLayer]
    is_own: bool
    guard: Guard
    error: float | None = None

    @property
    def nbytes(self) -> int:
        """What a slot takes, however small its adapter's rank is, and what whole weights take."""
        return sum(array.nbytes for array in self._arrays())

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        words = (np.asarray(array).astype(np.float32, copy=False) for array in self._arrays())
        return all(np.isfinite(array).all() for array in words)

    def _arrays(self) -> list[np.ndarray | Array]:
        whole = [array for full in self.adapter.full.values() for array in full.arrays]
        return whole + [array for scales, arrays in self.values for array in (scales, *arrays)]


class SlotWriter:
    """Writes the slots of one rank bucket, all layers at once, by one compiled program."""

    def __init__(self, bucket: int, first_id: int, layers: Sequence[LoRALayer]) -> None:
        self.bucket, self._first_id = bucket, first_id
        self._tables = [layer.full.table for layer in layers if hasattr(layer, "full")]
        of_layers = [[s for s in layer.stacks if s.bucket == bucket] for layer in layers]
        self._held = [
            _Held(
                layer.scales,
                [
                    *(v for s in some for v in s.variables),
                    *(s.rescale for s in some if s.rescale is not None),
                ],
            )
            for layer, some in zip(layers, of_layers)
        ]
        self._of_layers = of_layers
        shapes = _slot_shapes(self.arrays, of_layers)
        columns = [_columns(some) for some in of_layers]
        self.layout = Layout(shapes, _scales_offsets(of_layers), columns)
        self._programs: list[_Program] = []
        self._program(self._arrays())

    @property
    def is_eight_bits(self) -> bool:
        """Whether stacks of a layer are."""
        return any(is_eight_bits(some[0].lora_a.dtype) for some in self._of_layers)

    @property
    def arrays(self) -> OfLayers:
        """The layers' scales and stacks, as the variables hold them now."""
        return self._arrays().layers

    def _arrays(self) -> _Arrays:
        tables = [table.get_value() for table in self._tables]
        return _Arrays([held.arrays for held in self._held], tables)

    def _program(self, arrays: _Arrays) -> "_Program":
        """The one for where the stacks are. A step may have moved them, to a mesh or to another
        device, and writes them back there: the first load after that compiles."""
        for program in self._programs:
            if program.fits(arrays):
                return program
        self._programs.append(_compile(arrays, self._of_layers, self._first_id))
        return self._programs[-1]

    def empty_slots(self) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """One slot of each layer, all zeros."""
        return [
            (np.zeros(scales.shape, scales.dtype), [np.zeros(a.shape, a.dtype) for a in arrays])
            for scales, arrays in self.layout.shapes
        ]

    def place(self, values: list[SlotOfLayer]) -> list[SlotOfLayer]:
        """`values` on the devices of the stacks, each with its shard."""
        return self._program(self._arrays()).place(values)

    def compile_copy(self) -> None:
        """Compiles what writes a copy of another slot, as the stacks are now."""
        _ = self._program(self._arrays()).copy

    def write(self, slot: int, values: SlotValues, full: Sequence[int] = ()) -> None:
        """Writes `values`, which are on the device. The arrays that were there are donated.

        `full` are the full slots of the slot's adapter, in the layers that have some.

        Raises:
          RuntimeError: the device failed and has consumed the stacks: they are lost.
          Exception: the device failed before that: all is as it was.
        """
        arrays = self._arrays()
        program = self._program(arrays)
        tables = [np.int32(n) for n in full]
        try:
            if isinstance(values, int):
                updated = program.copy(arrays, np.int32(slot), np.int32(values), tables)
            else:
                updated = program.run(arrays, np.int32(slot), program.place(values), tables)
        except Exception as error:
            if any(array.is_deleted() for array in jax.tree.leaves(arrays)):
                raise RuntimeError(
                    f"the stacks of bucket {self.bucket} are lost: the device failed while it "
                    "wrote them, or a step kept arrays from before a load; build the model and its "
                    "bank anew, and step under `with bank.stepping`"
                ) from error
            raise
        for table, new_table in zip(self._tables, updated.tables):
            table.set_value(new_table)
        for held, (scales, stacks) in zip(self._held, updated.layers):
            held.scales.set_value(scales)
            for variable, new in zip(held.stacks, stacks):
                variable.set_value(new)


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The compiled update of stacks that are where `homes` says; None of what is not committed.

    Attributes:
      values: where what is written goes, as `homes`.
      copying: `run` with what the slot of a number holds, not compiled yet.
    """

    homes: list[Sharding | None]
    values: list[Sharding | None]
    run: Callable[[_Arrays, np.int32, list[SlotOfLayer], list[np.int32]], _Arrays]
    copying: jax.stages.Lowered

    @functools.cached_property
    def copy(self) -> Callable[[_Arrays, np.int32, np.int32, list[np.int32]], _Arrays]:
        return self.copying.compile()

    def fits(self, arrays: _Arrays) -> bool:
        return all(
            home is there or (home and there and home.is_equivalent_to(there, array.ndim))
            for home, array in zip(self.homes, jax.tree.leaves(arrays))
            for there in [home_of(array)]
        )

    def place(self, values: list[SlotOfLayer]) -> list[SlotOfLayer]:
        leaves, tree = jax.tree.flatten(values)
        if all(sharding is None or sharding.is_fully_addressable for sharding in self.values):
            return jax.tree.unflatten(tree, jax.device_put(leaves, self.values))
        placed = [
            leaf if sharding is None else put(leaf, sharding)
            for leaf, sharding in zip(leaves, self.values)
        ]
        return jax.tree.unflatten(tree, placed)


def home_of(array: Array) -> Sharding | None:
    """Where an array is committed to be."""
    return array.sharding if array.committed else None


def _without_slots(array: Array, slots_axis: int) -> Sharding | None:
    """Where one slot of a stack goes, or the scales of one."""
    home = home_of(array)
    if not isinstance(home, NamedSharding):
        return home
    spec = [*home.spec, *[None] * (array.ndim - len(home.spec))]
    del spec[slots_axis]
    return NamedSharding(home.mesh, PartitionSpec(*spec))


def _slot_shapes(
    arrays: OfLayers, of_layers: list[list[LoRAStack]]
) -> list[tuple[jax.ShapeDtypeStruct, list[jax.ShapeDtypeStruct]]]:
    """What one slot of each layer is, and where it goes: scales, and A and B of each stack."""
    return [
        (
            jax.ShapeDtypeStruct(
                (*scales.shape[:-1], len(some), *_columns(some)),
                jnp.float32,
                sharding=home_of(scales),
            ),
            [
                jax.ShapeDtypeStruct(size, stack.dtype, sharding=_without_slots(stack, -3))
                for stack, size in zip(stacks, _slot_sizes(some, scales.shape[:-1]))
            ],
        )
        for some, (scales, stacks) in zip(of_layers, arrays)
    ]


def _slot_sizes(some: list[LoRAStack], lead: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of one slot of what `_Held.stacks` has; `lead` are the layer's."""
    halves = [
        (*axes, *size[1:])
        for stack in some
        for axes, size in zip(stack.shape.in_slot(lead), stack.shape.sizes)
    ]
    widths = [stack.shape.features[1] for stack in some if stack.rescale is not None]
    return halves + [(*lead, 1, width) for width in widths]


def _columns(some: list[LoRAStack]) -> tuple[int, ...]:
    """The rank columns of a bucket's stacks, if each has a scale."""
    each = some[0].shape.scales_per_slot
    return () if each == 1 else (each,)


def _scales_offsets(of_layers: list[list[LoRAStack]]) -> list[np.ndarray]:
    """Where the scales of each stack start in its layer's."""
    return [np.array([s.shape.scales_offset for s in some], np.int32) for some in of_layers]


def places_of(slot: Array, firsts: np.ndarray, columns: tuple[int, ...]) -> Array:
    """Where the scales of a slot of each stack stand in the layer's."""
    if not columns:
        return jnp.asarray(firsts) + slot
    (each,) = columns
    return (jnp.asarray(firsts) + slot * each)[:, None] + jnp.arange(each, dtype=jnp.int32)


def _compile(arrays: _Arrays, of_layers: list[list[LoRAStack]], first_id: int) -> _Program:
    places = list(zip(_scales_offsets(of_layers), map(_columns, of_layers)))

    def write_slot(
        arrays: _Arrays, slot: Array, values: list[SlotOfLayer], full: list[Array]
    ) -> _Arrays:
        written = []
        for (scales, stacks), (new_scales, new), place in zip(arrays.layers, values, places):
            scales = scales.at[..., places_of(slot, *place)].set(new_scales)
            written.append(
                (scales, [set_slot(s, slot, jnp.asarray(v)) for s, v in zip(stacks, new)])
            )
        tables = [t.at[first_id + slot].set(n) for t, n in zip(arrays.tables, full)]
        return _Arrays(written, tables)

    def copy_slot(arrays: _Arrays, slot: Array, source: Array, full: list[Array]) -> _Arrays:
        held: list[SlotOfLayer] = [
            (scales[..., places_of(source, *place)], [get_slot(s, source) for s in stacks])
            for (scales, stacks), place in zip(arrays.layers, places)
        ]
        return write_slot(arrays, slot, held, full)

    values = _slot_shapes(arrays.layers, of_layers)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    full = [number] * len(arrays.tables)
    # Stacks stay where they are, also where XLA would rather have them elsewhere.
    in_place = functools.partial(
        jax.jit, donate_argnums=0, out_shardings=jax.tree.map(home_of, arrays)
    )
    return _Program(
        [home_of(array) for array in jax.tree.leaves(arrays)],
        [value.sharding for value in jax.tree.leaves(values)],
        in_place(write_slot).lower(arrays, number, values, full).compile(),
        in_place(copy_slot).lower(arrays, number, number, full),
    )


def slot_values(
    name: str,
    adapter: Adapter,
    writer: SlotWriter,
    sites: Mapping[str, Site],
    layers: list[LoRALayer],
    *,
    is_own: bool,
    held: Mapping[str, Quantised],
) -> list[SlotOfLayer]:
    """What a slot of each layer is to hold: zeros behind the rank and where it adapts nothing.

    `held` are the modules of the adapter whose stacks are in 8 bits.

    Copies what is the caller's: JAX reads it later, or for ever, and the caller may go on writing.
    Where nobody else has the adapter's arrays (`is_own`), those of the bucket's rank are taken.

    Raises:
      ValueError: weights overflow the stacks' dtype.
    """
    slots = {id(layer): slot for layer, slot in zip(layers, writer.empty_slots())}
    written: set[tuple[int, tuple[int, ...]]] = set()
    for module, weights in adapter.modules.items():
        site = sites[module]
        scales, arrays = slots[id(site.layer)]
        mine = slice(2 * site.nth, 2 * site.nth + 2)
        dtype = arrays[mine][0].dtype
        if module in held:
            *halves, factors = held[module]
            scales[site.index][site.nth, : weights.rank] = factors
        else:
            scales[*site.index, site.nth] = weights.scale
            halves = as_stored(name, module, [weights.a, weights.b], dtype)
        if is_own and weights.rank == writer.bucket and not site.index:
            arrays[mine] = halves
            continue
        # As words: NumPy copies rows of bfloat16 one by one, several times slower.
        words, rank = np.dtype(f"u{dtype.itemsize}"), weights.rank
        spaces = np.s_[:rank], np.s_[:, :rank]
        for array, place, space, half in zip(arrays[mine], site.places, spaces, halves):
            if (id(array), place) not in written:  # what experts share they have in one place
                written.add((id(array), place))
                array[place].view(words)[space] = np.ascontiguousarray(half).view(words)
    return [(scales, list(arrays)) for scales, arrays in (slots[id(layer)] for layer in layers)]


def as_stored(
    name: str, module: str, weights: Sequence[np.ndarray | Array], dtype: np.dtype
) -> list[np.ndarray]:
    """An adapter's weights in the stacks' dtype."""
    given = [np.asarray(t) for t in weights]
    with np.errstate(over="ignore"):
        stored = [t.astype(dtype, copy=False) for t in given]
    for new, old in zip(stored, given):
        if new.dtype != old.dtype and np.any(np.isinf(new) & ~np.isinf(old)):
            raise ValueError(
                f"adapter {name!r}: weights of {module} overflow the stacks' {dtype}; give "
                "apply_lora another dtype="
            )
    return stored


def read_slots(sites: Mapping[str, Site], entry: Entry) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of one slot of each site, whole; out of stacks in 8 bits as float32.

    A slice by the true rank would compile for each rank. The slot is fetched alone: a stack of
    which NumPy holds a view, on the CPU, could not be updated in place.
    """
    fetched: dict[int, list[np.ndarray]] = {}  # layers stacked for a scan share theirs
    found, slot = {}, np.int32(entry.slot)
    for name, site in sites.items():
        stack = site.stacks[entry.bucket]
        if id(stack) not in fetched:
            sizes = _slot_sizes([stack], site.layer.lead)
            slots = [
                whole(get_slot(variable.get_value(), slot)).reshape(size)
                for variable, size in zip(stack.variables, sizes)
            ]
            if is_eight_bits(stack.lora_a.dtype):
                scales = get_scales(site.layer.scales.get_value(), stack.shape, slot)
                slots.append(whole(scales))
            fetched[id(stack)] = slots
        a, b, *factors = (
            array[place] for array, place in zip(fetched[id(stack)], (*site.places, site.index))
        )
        found[name] = a, b
        if factors:
            own = factors[0] / np.float32(entry.config.scale_of(name) or 1)
            found[name] = unscaled(a, b, own, site.shared)
    return found
