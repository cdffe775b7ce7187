"""Where a model holds the modules that PEFT names."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array

from jax_lora.adapters import AdapterHeader, FullModule, FullShape, meant
from jax_lora.adapters.types import SharedHalf
from jax_lora.nn.embed import LoRAEmbed
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import with_numbers
from jax_lora.nn.stacks import LoRAStack, slots_of
from pallas_kernels.stacks import is_eight_bits

PeftNames = Mapping[str, str | Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Site:
    """One PEFT module: an output slice of a layer, with its stack in each bucket.

    Attributes:
      nth: which of the layer's slices.
      index: which layer of those that are stacked for a scan, and which expert; () for a layer
        alone.
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
    def shared(self) -> SharedHalf | None:
        """The half that it has in common with all other experts of its layer."""
        return self._first.shape.shared

    @property
    def places(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where its A and its B stand in a slot of its layer."""
        return self._first.shape.in_slot(self.index)

    @property
    def columns(self) -> slice:
        """The columns of the layer's output that it adds to."""
        return slice(self._first.y_offset, self._first.y_offset + self.features[1])

    @property
    def variables(self) -> tuple[nnx.LoRAParam[Array], nnx.LoRAParam[Array]]:
        """A and B of some bucket; all have one dtype."""
        return self._first.variables

    @property
    def dtype(self) -> np.dtype:
        """That of its stacks."""
        return self.variables[0].dtype

    @property
    def is_eight_bits(self) -> bool:
        """Whether its stacks are in 8 bits."""
        return is_eight_bits(self.dtype)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.layer, LoRAEmbed)

    def base_weight(self) -> Array:
        """The base model's weight as PEFT stores it: `[N, H]`; of an embedding, `[H, N]`."""
        matrix = self.layer.kernel_matrix(self.index)[:, self.columns]
        return matrix.T if self.layer.is_transposed else matrix

    def own_weights(self) -> FullModule:
        """The base model's weight and bias, as an adapter has them that saves the module."""
        bias = None if self.layer.bias is None else np.array(self.layer.bias.get_value())
        return FullModule(np.array(self.base_weight()), bias)

    @property
    def _first(self) -> LoRAStack:
        return next(iter(self.stacks.values()))


def find_sites(
    layers: Mapping[str, LoRALayer],
    peft_names: PeftNames,
    own_names: Mapping[str, str],
    others: Collection[str] = (),
) -> dict[str, Site]:
    """The sites of a model's layers, by PEFT's names.

    Args:
      layers: by their dotted paths.
      peft_names: PEFT's name for a path, or its names for a layer with slices; see `AdapterBank`.
      own_names: each path as a name; of layers stacked for a scan, with a `{}` for each number.
      others: paths of layers that could have LoRA, which `peft_names` may name too.

    Raises:
      ValueError: `peft_names` does not fit the layers.
    """
    unknown = sorted(
        key
        for key in peft_names
        if not any(f"{path}.".startswith(f"{key}.") for path in (*layers, *others))
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
        for variable, expected in zip(stack.variables, stack.shape.arrays(layer.lead)):
            if (shape := variable.get_value().shape) != expected:
                raise ValueError(
                    f"{name}: its stacks are {list(shape)} and should be {list(expected)}; of "
                    "layers stacked for a scan, the axes of layers come first in each array"
                )


def check_fit(name: str, header: AdapterHeader, sites: Mapping[str, Site]) -> None:
    """ValueError where a module of an adapter is not in the model, or of another kind or size."""
    unknown = sorted(set(header.modules) - set(sites))
    if unknown:
        raise ValueError(
            f"adapter {name!r} adapts modules without LoRA in this model: {some(unknown, str)}; "
            f"it has {some(sites, str)}; {meant(header.modules, sites)}"
        )
    for module, lora in header.modules.items():
        site = sites[module]
        if lora.is_embedding != site.is_embedding:
            kinds = {True: "an embedding", False: "a linear layer"}
            raise ValueError(
                f"adapter {name!r}: {module} is {kinds[site.is_embedding]}, but the adapter's LoRA "
                f"is that of {kinds[lora.is_embedding]}"
            )
        (in_features, out_features), outputs = site.features, lora.out_features
        if (lora.in_features, outputs) != (in_features, out_features):
            raise ValueError(
                f"adapter {name!r}: {module} maps {in_features} to {out_features} features, but "
                f"the adapter's lora_A has {lora.in_features} and its lora_B {outputs}"
            )

    for module, full in header.full.items():
        _check_full(name, module, full, sites.get(module))


def _check_full(name: str, module: str, full: FullShape, site: Site | None) -> None:
    """ValueError where the model has no room for a whole weight of an adapter."""
    what = f"adapter {name!r} has a whole weight for {module} (modules_to_save)"
    if site is None or not hasattr(site.layer, "full"):
        last = module.rpartition(".")[2]
        raise ValueError(
            f"{what}, for which this model has no full slots; give apply_lora "
            f"full_slots={{{last!r}: 1}}, if it has the layer"
        )
    weights = site.layer.full.slots[0]
    shape, has_bias = weights.weight.get_value().shape, weights.bias is not None
    if (full.shape, full.has_bias) != (shape, has_bias):
        bias = {True: "with", False: "without"}
        raise ValueError(
            f"{what} of {list(full.shape)} {bias[full.has_bias]} bias, but the model's is "
            f"{list(shape)} {bias[has_bias]} bias"
        )


def check_trained(name: str, dtypes: Iterable[np.dtype]) -> None:
    """ValueError where an adapter that is to be trained has stacks in 8 bits."""
    if small := [dtype for dtype in dtypes if is_eight_bits(dtype)]:
        raise ValueError(
            f"{name!r} is to be trained, but the stacks are {small[0]}; train it in a model with "
            "stacks of bfloat16 or float32 (apply_lora's dtype=), save it, and load it here"
        )


def check_same(sites: Mapping[str, Site], others: Mapping[str, Site]) -> None:
    """ValueError unless two models have the same LoRA layers, which hold the same modules.

    The message says "here" for what `sites` have, and "there" for `others`.
    """
    mine, theirs = (
        [(m, site.features, site.nth, site.index, site.shared) for m, site in found.items()]
        for found in (sites, others)
    )
    if mine != theirs:
        odd = sorted({name for name, *_ in {*mine} ^ {*theirs}})
        differ = (_difference(name, sites.get(name), others.get(name)) for name in odd)
        raise ValueError(
            "the two banks' models must have the same LoRA layers, stacked alike, whose experts "
            f"share the same halves; they differ in {some(differ, str)}"
        )


def _difference(name: str, here: Site | None, there: Site | None) -> str:
    """How a module of two models differs, by its features, or else by what tells them apart."""
    pairs = zip(_said(here), _said(there))
    mine, theirs = next((mine, theirs) for mine, theirs in pairs if mine != theirs)
    return f"{name}: {theirs} there, {mine} here"


def _said(site: Site | None) -> tuple[str, str, str]:
    if site is None:
        return "none", "none", "none"
    shared = f"share {site.shared}" if site.shared else "none"
    return f"{[*site.features]}", shared, f"number {site.nth} {[*site.index]} of its layer"


def some(names: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """The names, or the first of many, for a message."""
    shown = [f"{show(name):.80}" for name in names]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return (", ".join(shown[:8]) or "none") + more
