"""Where a model holds the modules that PEFT names."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array

from jax_lora.adapters import meant
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import with_numbers
from jax_lora.nn.stacks import LoRAStack, slots_of

PeftNames = Mapping[str, str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Site:
    """One PEFT module: an output slice of a layer, with its stack in each bucket.

    Attributes:
      nth: which of the layer's slices.
      index: which layer of those that are stacked for a scan; () for a layer alone.
    """

    layer: LoRALayer
    stacks: Mapping[int, LoRAStack]
    nth: int = 0
    index: tuple[int, ...] = ()

    @property
    def features(self) -> tuple[int, int]:
        """H, and the width of the slice."""
        return self._first.shape.features

    @property
    def columns(self) -> slice:
        """The columns of the layer's output that it adds to."""
        return slice(self._first.y_offset, self._first.y_offset + self.features[1])

    def base_weight(self) -> np.ndarray:
        """The model's own weight of the module, `[N, H]`."""
        return np.asarray(self.layer.kernel_matrix(self.index)[:, self.columns]).T

    @property
    def variables(self) -> tuple[nnx.LoRAParam[Array], nnx.LoRAParam[Array]]:
        """A and B of some bucket; all have one dtype."""
        return self._first.variables

    @property
    def _first(self) -> LoRAStack:
        return next(iter(self.stacks.values()))


def find_sites(
    layers: Mapping[str, LoRALayer], peft_names: PeftNames, own_names: Mapping[str, str]
) -> dict[str, Site]:
    """The sites of a model's layers, by PEFT's names.

    Args:
      layers: by their dotted paths.
      peft_names: PEFT's name for a path, or its names for a layer with slices; see `AdapterBank`.
      own_names: each path as a name; of layers stacked for a scan, with a `{}` for each number.

    Raises:
      ValueError: `peft_names` does not fit the layers.
    """
    unknown = sorted(
        key for key in peft_names if not any(f"{path}.".startswith(f"{key}.") for path in layers)
    )
    if unknown:
        raise ValueError(f"peft_names has paths without a LoRA layer: {some(unknown, str)}")
    sites: dict[str, Site] = {}
    for path, layer in layers.items():
        count = len(layer.slices)
        for nth, name in enumerate(_names(path, layer, peft_names, own_names[path])):
            stacks = {stack.bucket: stack for stack in list(layer.stacks)[nth::count]}
            for index, numbered in with_numbers(name, layer.lead).items():
                if numbered in sites:
                    raise ValueError(f"two layers or slices are called {numbered!r} by peft_names")
                sites[numbered] = Site(layer, stacks, nth, index)
    return sites


def _names(path: str, layer: LoRALayer, peft_names: PeftNames, own_name: str) -> list[str]:
    """PEFT's name of each slice of a layer, with a `{}` for each axis of stacked layers."""
    count, given = len(layer.slices), peft_names.get(path)
    if given is None:
        name = _below(path, peft_names) or own_name
        given = name if count == 1 else [f"{name}.{i}" for i in range(count)]
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has {count} slices, peft_names gives {names}")
    axes = len(layer.lead)
    if axes and any(name.count("{}") != axes for name in names):
        raise ValueError(
            f"{path} is layers stacked along {axes} axes, so peft_names must give it names with "
            f"{axes} times '{{}}', where their numbers stand, got {names}"
        )
    return names


def _below(path: str, peft_names: PeftNames) -> str | None:
    """The name that `peft_names` gives to the innermost module around a layer, and what follows."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (name := peft_names.get(".".join(parts[:end]))) is not None:
            if not isinstance(name, str):
                raise ValueError(
                    f"peft_names must give {'.'.join(parts[:end])}, which holds layers, one name, "
                    f"got {list(name)}"
                )
            return ".".join((name, *parts[end:]))
    return None


def common_slots(layers: Mapping[str, LoRALayer]) -> dict[int, int]:
    """`{bucket: slots}` of all layers. ValueError where they differ, or a layer's arrays do."""
    by_layer = {
        name: slots_of(stack.shape for stack in layer.stacks) for name, layer in layers.items()
    }
    first, slots = next(iter(by_layer.items()))
    for name, other in by_layer.items():
        if other != slots:
            raise ValueError(
                f"all layers must have the same slots per bucket: {first} has {slots}, {name} has "
                f"{other}"
            )
    for name, layer in layers.items():
        _check_lead(name, layer)
    return slots


def _check_lead(name: str, layer: LoRALayer) -> None:
    """ValueError where layers are stacked along other axes than those in front."""
    for stack in layer.stacks:
        for variable, size in zip(stack.variables, stack.shape.sizes):
            if (shape := variable.get_value().shape) != (expected := (*layer.lead, *size)):
                raise ValueError(
                    f"{name}: its stacks are {list(shape)} and should be {list(expected)}; of "
                    "layers stacked for a scan, the axes of layers come first in each array"
                )


def check_fit(
    name: str, features: Mapping[str, tuple[int, int]], sites: Mapping[str, Site]
) -> None:
    """ValueError where a module of an adapter is not in the model, or has other features.

    `features` are H and N of each of its modules.
    """
    unknown = sorted(set(features) - set(sites))
    if unknown:
        raise ValueError(
            f"adapter {name!r} adapts modules without LoRA in this model: {some(unknown, str)}; "
            f"it has {some(sites, str)}; {meant(features, sites)}"
        )
    for module, (inputs, outputs) in features.items():
        in_features, out_features = sites[module].features
        if (inputs, outputs) != (in_features, out_features):
            raise ValueError(
                f"adapter {name!r}: {module} maps {in_features} to {out_features} features, but "
                f"the adapter's lora_A has {inputs} and its lora_B {outputs}"
            )


def some(names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The names, or the first of many, for a message."""
    shown = [f"{show(name):.80}" for name in names]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return (", ".join(shown[:8]) or "none") + more
