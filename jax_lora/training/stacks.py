"""The stacks of adapters in a tree of parameters, and one slot of them."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import Array, PyTree

from jax_lora.messages import shown


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of a tree of parameters belongs.

    Attributes:
      bucket: the rank bucket of its stack. slots: of the bucket.
      name: what it is called in a slot: "layers.q_proj.0.lora_a", of the layer `layers.q_proj`,
        output slice 0.
      axis: of the slots, from behind, so that it is the same without axes in front.
    """

    bucket: int
    slots: int
    name: str
    axis: int


def places_of(params: PyTree) -> list[Place]:
    """The place of each array, in the order of the tree's leaves.

    Raises:
      ValueError: an array is no stack of adapters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [_stack_of(_parts(path)) for path, _ in leaves]
    of_a, of_b = (
        {where[:2]: leaf for where, (_, leaf) in zip(found, leaves) if where and where[2] == name}
        for name in ("lora_a", "lora_b")
    )
    # From B where it is there: A of experts has a row of each rank of each expert.
    buckets = {stack: a.shape[-2] for stack, a in of_a.items()}
    buckets |= {stack: b.shape[-1] for stack, b in of_b.items()}
    numbers = collections.defaultdict[tuple[str, int], list[int]](list)
    for layer, number in sorted(buckets):
        numbers[layer, buckets[layer, number]].append(number)
    arrays, places = of_a | of_b, []
    for where, (path, leaf) in zip(found, leaves):
        if where is None or where[:2] not in arrays:
            raise ValueError(
                f"{'.'.join(_parts(path)):.300} is no stack of adapters; per_adapter takes those "
                "alone, so give it no base weights and no full slots"
            )
        layer, number, name = where
        stack, bucket = arrays[layer, number], buckets[layer, number]
        nth, slots = numbers[layer, bucket].index(number), stack.shape[-3]
        places.append(Place(bucket, slots, f"{layer}.{nth}.{name}", stack.ndim - 3 - leaf.ndim))
    return places


def _parts(path: Sequence[object]) -> list[str]:
    """The names on a path of JAX's; without what a variable calls the array in it."""
    keys = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
    names = [str(key) for key in keys]
    ends = [end for end, name in enumerate(names, 1) if name.startswith("lora_")]
    return names[: ends[-1]] if ends else names


def _stack_of(parts: list[str]) -> tuple[str, int, str] | None:
    """A layer's path, the number of one of its stacks, and which array of that it is."""
    if len(parts) < 3 or parts[-3] != "stacks" or not parts[-2].isdecimal():
        return None
    return ".".join(parts[:-3]), int(parts[-2]), parts[-1]


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape without one of its axes, which may be counted from behind."""
    sizes = list(shape)
    del sizes[axis]
    return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Stacks:
    """A tree of parameters, taken apart by rank bucket."""

    places: list[Place]
    treedef: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, params: PyTree) -> "Stacks":
        return cls(places_of(params), jax.tree.structure(params))

    @property
    def slots(self) -> dict[int, int]:
        """`{bucket: slots}`."""
        return {place.bucket: place.slots for place in self.places}

    def split(self, tree: PyTree) -> dict[int, dict[str, Array]]:
        """The arrays of each bucket by name, of a tree with the structure of the parameters."""
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(
                "gradients and parameters must have one structure, got "
                f"{shown(str(treedef), 200)} and {shown(str(self.treedef), 200)}"
            )
        by_bucket: dict[int, dict[str, Array]] = {bucket: {} for bucket in self.slots}
        for place, leaf in zip(self.places, leaves):
            by_bucket[place.bucket][place.name] = leaf
        return by_bucket

    def join(self, by_bucket: dict[int, dict[str, Array]]) -> PyTree:
        """The inverse of `split`."""
        leaves = [by_bucket[place.bucket][place.name] for place in self.places]
        return jax.tree.unflatten(self.treedef, leaves)

    def axes(self, bucket: int) -> dict[str, int]:
        """The axis of slots of each array of a bucket, by name."""
        return {place.name: place.axis for place in self.places if place.bucket == bucket}
