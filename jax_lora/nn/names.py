"""Where the number of a layer stands in its name, if like layers are stacked in one module."""

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array

ModulePath = tuple[Hashable, ...]
Shape = tuple[int, ...]


def path_name(path: Sequence[Hashable]) -> str:
    """An NNX path as PEFT names modules: joined by dots."""
    return ".".join(map(str, path))


def array_of(leaf: nnx.Variable[Array] | Array) -> Array:
    """What a leaf of a state holds: a model may hold arrays in no variable, by `nnx.data`."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def array_shapes(model: nnx.Module, kind: nnx.filterlib.Filter = ...) -> dict[ModulePath, Shape]:
    """The shapes of all of a model's arrays of a kind, by path."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {path: np.shape(array_of(leaf)) for path, leaf in flat}


def numbered_names(
    shapes: Mapping[ModulePath, Shape], leads: Mapping[ModulePath, Shape]
) -> dict[str, str]:
    """`{"layers.q": "layers.{}.q"}`: the name of each layer, with a `{}` for each axis of `lead`.

    The number stands behind the highest module, below the model itself, all of whose arrays have
    the axis: there PEFT's model has a list of layers.

    Args:
      shapes: of all arrays of the model, by path.
      leads: the axes of layers in front of a layer's arrays, by the layer's path.
    """
    common: dict[ModulePath, Shape] = {}  # the axes that all arrays below a module have in front
    for path, shape in shapes.items():
        for end in range(1, len(path)):
            common[path[:end]] = _common(common.get(path[:end], shape), shape)
    names = {}
    for path, lead in leads.items():
        parts, done = list[Hashable](), 0
        for end, part in enumerate(path, 1):
            here = len(_common(common.get(path[:end], lead), lead))
            parts += [part, *["{}"] * (here - done)]
            done = max(done, here)
        names[path_name(path)] = path_name(parts)
    return names


def _common(one: Shape, other: Shape) -> Shape:
    pairs = list(zip(one, other))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return one[:same]


def along_second(
    path: ModulePath, shapes: Mapping[ModulePath, Shape], stacked: Collection[ModulePath]
) -> bool:
    """Whether shapes tell that the layer at `path` is stacked along the second axis.

    Parameters that are stacked together share the axis of layers. So it is the second where that is
    the same in all of a module around the layer, and the first differs between stacked layers.

    Args:
      shapes: of all parameters of the model, by path.
      stacked: the layers whose kernels have one axis too many.
    """
    for end in range(len(path), -1, -1):
        below = {of: shape for of, shape in shapes.items() if of[:end] == path[:end]}
        if len({shape[1:2] for shape in below.values()}) > 1:
            return False  # and all modules around this one have its parameters too
        if len({shape[:1] for of, shape in below.items() if of[:-1] in stacked}) > 1:
            return True
    return False


def with_numbers(name: str, lead: Shape) -> dict[Shape, str]:
    """The name of each layer, by its place in `lead`, where `name` has a `{}` for each axis."""
    names = {}
    for index in np.ndindex(*lead):
        numbered = name
        for number in index:
            numbered = numbered.replace("{}", str(number), 1)
        names[index] = numbered
    return names
