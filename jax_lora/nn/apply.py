"""`apply_lora`: room for adapters in the linear layers of a model that knows none."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, DTypeLike

from jax_lora.adapters.types import SharedHalf
from jax_lora.batch import Guard
from jax_lora.nn.einsum import EinsumLayer, LoRAEinsum, own_einsum
from jax_lora.nn.embed import LoRAEmbed, LoRAHead, LoRATiedEmbed, TiedEmbed, TiedHead
from jax_lora.nn.experts import Experts, LoRAExperts
from jax_lora.nn.full import FullWeights
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.linear import LoRADense, LoRADenseGeneral
from jax_lora.nn.names import (
    ModulePath,
    Shape,
    along_second,
    array_shapes,
    numbered_names,
    path_name,
    with_numbers,
)
from jax_lora.nn.stacks import FLAT_IS_GONE, LoRAStack, Slots, check_slots, stack_dtype
from pallas_kernels.ranks import DEFAULT_BUCKETS
from pallas_kernels.renamed import removed_keywords
from pallas_kernels.stacks import is_eight_bits

_Tied = nnx.Embed | TiedHead  # by name alone, as their stacks are as wide as a vocabulary
_LORA_CLASS: dict[type[nnx.Module], type[LoRALayer]] = {
    nnx.Linear: LoRADense,
    nnx.LinearGeneral: LoRADenseGeneral,
    nnx.Einsum: LoRAEinsum,
    nnx.Embed: LoRAEmbed,
    TiedEmbed: LoRATiedEmbed,
    TiedHead: LoRAHead,
    Experts: LoRAExperts,
}


@removed_keywords(flat=FLAT_IS_GONE)
def apply_lora(
    model: nnx.Module,
    *,
    slots: Slots = 8,
    target: str | Sequence[str] | None = None,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    dtype: DTypeLike | None = None,
    dora: bool = False,
    fully_sharded: bool = False,
    full_slots: Mapping[str, int] | None = None,
    experts_share: Mapping[str, SharedHalf] | None = None,
) -> int:
    """Gives the linear layers of `model` room for LoRA adapters, in place.

    `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` become `LoRADense`, `LoRADenseGeneral` and
    `LoRAEinsum`: the same objects with the same kernels under the same paths, and stacks of
    `slots` adapters per rank bucket beside them, all zero. So does a module of your own that holds
    one matrix, if its attribute `einsum_str` says what its call returns, as that of `nnx.Einsum`
    does: "...d,df->...f" for `x @ w`, by whatever function it computes that. So do `nnx.Embed`,
    which becomes `LoRAEmbed`, and the head of a tied embedding (`tie_head`), but only where
    `target` names them, as their stacks are as wide as the vocabulary. Other layers stay untouched.

    Layers may be stacked for a scan, by `nnx.vmap` of what makes one: their kernels, and so their
    stacks, have axes of layers in front. `jax_lora.scan_layers` runs them. Where a `target` matches
    the name of one of them ("layers.0.q_proj" of the path "layers.q_proj"), all have room.

    The stacks take `slots * bucket * (H + N)` elements per layer and bucket: the defaults come to
    about 10 GB on an 8B Llama in bfloat16. Name those that you need (`plan_slots` proposes them).

    Example::

        nbytes = apply_lora(model, slots={16: 32, 64: 4}, buckets=(16, 64), target="[qkvo]_proj")

    Args:
      model: any NNX model.
      slots: adapters per bucket, an int or `{bucket: n}`.
      target: which layers: a regular expression, or several, that matches the end of a layer's
        dotted path, or of the name that the model's `peft_names` gives it, from a dot on
        ("q_proj", "layers.0.*"); None for every linear layer. Layers of other types stay as they
        are, also where an expression matches them.
      buckets: ranks that the stacks are allocated with.
      dtype: dtype of the stacks; None for each kernel's own. "int8" and "float8_e4m3fn" round
        adapters when they are loaded (`AdapterBank.load`): not to train, nor on several devices.
        Embeddings and full slots then have their kernel's.
      dora: whether adapters with DoRA (PEFT's `use_dora`) may be loaded too. It takes `slots * N`
        float32 more per layer and bucket, and each step some time.
      fully_sharded: on a mesh that divides a layer's kernel, divide its stacks wholly: also A's
        ranks in a column-parallel layer and B's in a row-parallel one, of which each device
        otherwise holds all. A call then has one small exchange more, of `[tokens, ranks]`. Buckets
        are multiples of 8 times the devices, as `pallas_kernels.padded_rank` pads a rank.
      full_slots: from an expression, as in `target`, to the full slots of the layers that match it:
        `{"lm_head": 2}`. So many adapters may have a whole weight of their own at once, which PEFT
        calls `modules_to_save`. These layers have room for LoRA too.
      experts_share: from an expression to "A" or "B", which the experts of a layer then share: a
        slot has one for all, and takes adapters alone whose experts have it in common.

    Returns:
      The bytes that stacks and full slots take.

    Raises:
      TypeError: an argument is of another type (`full_slots` and `experts_share` are mappings), or
        an expression matches other layers alone.
      ValueError: nothing matches (the paths are listed); a matched layer has LoRA already, is not
        a matrix product, its kernel has an unexpected shape or dtype, or what it has does not
        divide over its mesh; full slots of a layer that is no `nnx.Linear`, embedding or head of
        one, or less than one; experts that share both halves, or what is neither "A" nor "B". The
        model is unchanged.
    """
    by_bucket = check_slots(slots, buckets)
    layers = _matched_layers(model, target, f"target={target!r}")
    full = _full_slots(model, {} if full_slots is None else full_slots)
    layers |= {name: layer for name, (layer, _) in full.items()}
    shared = _experts_share(model, layers, {} if experts_share is None else experts_share)
    _check_layers(model, layers, dtype, buckets, fully_sharded, dora)
    guard = Guard()
    for name, layer in layers.items():
        _add_stacks(layer, shared.get(name), by_bucket, buckets, dtype, fully_sharded)
        layer.guard = guard
        if dora and isinstance(layer, LoRADense | LoRADenseGeneral | EinsumLayer):
            layer.add_rescales()
    for layer, count in full.values():
        layer.add_full(count, sum(by_bucket.values()), _dtype(layer, dtype, False))
    return sum(layer.room_bytes for layer in layers.values())


def _add_stacks(
    layer: Any, shared: SharedHalf | None, slots: Slots, buckets: Sequence[int],
    dtype: DTypeLike | None, fully_sharded: bool,
) -> None:  # fmt: skip
    lead = _lead(layer)
    # The object stays the one that its parents and tied references know.
    layer.__class__ = _lora_class(layer)
    if shared is not None:
        layer.shared = shared
    own = _dtype(layer, dtype, layer.takes_eight_bits)
    layer.add_stacks(slots, buckets, None, own, lead, fully_sharded)


def _dtype(layer: LoRALayer, dtype: DTypeLike | None, takes_eight_bits: bool) -> DTypeLike:
    """The kernel's own for None, and for 8 bits where these are not taken."""
    if dtype is not None and (takes_eight_bits or not is_eight_bits(dtype)):
        return dtype
    own: DTypeLike = layer.kernel.dtype
    return own


def _check_dora(name: str, layer: LoRALayer, dora: bool) -> None:
    if dora and isinstance(layer, EinsumLayer) and layer.bias is not None:
        raise ValueError(f"{name}: DoRA does not cover an nnx.Einsum with a bias")


def left_alone(model: nnx.Module) -> dict[str, str]:
    """The modules that hold a matrix and have no LoRA, each with its type, by dotted path.

    They are layers that `apply_lora`'s `target` did not match, and modules of types that it does
    not know. `jax_lora.integrations.qwix` gives those LoRA too.
    """
    return {
        path_name(path): type(module).__name__
        for path, module in nnx.iter_modules(model)
        if not isinstance(module, LoRALayer | LoRAStack | FullWeights)
        and any(
            isinstance(value, nnx.Param) and len(jnp.shape(value.get_value())) >= 2
            for value in vars(module).values()
        )
    }


def _matched_layers(
    model: nnx.Module, target: str | Sequence[str] | None, said: str
) -> dict[str, Any]:
    """The layers that match, by name; `said`: what an error calls `target`."""
    modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
    fitting = {name for name, module in modules.items() if _lora_class(module)}
    tied = [name for name in modules if name in fitting and isinstance(modules[name], _Tied)]
    linear = [name for name in modules if name in fitting.difference(tied)]
    if target is None:
        matched = {name: modules[name] for name in linear}
    else:
        found, names = set[str](), _other_names(model)
        for pattern in _target_patterns(target, said):
            found |= _matched(modules, names, pattern)
        matched = {name: module for name, module in modules.items() if name in found}
    if not matched:
        done = [name for name, module in modules.items() if isinstance(module, LoRALayer)]
        there = f"linear layers: {', '.join(linear) or 'none'}"
        for what, some in (("embeddings and heads", tied), ("with LoRA already", done)):
            there += f"; {what}: {', '.join(some)}" if some else ""
        raise ValueError(f"no layer matches {said}; {there}")
    for name, module in matched.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name} has LoRA stacks already")
    return matched


def _full_slots(model: nnx.Module, given: Mapping[str, int]) -> dict[str, tuple[Any, int]]:
    """The layers with full slots, and how many."""
    if not isinstance(given, Mapping):
        raise TypeError(f"full_slots must map expressions to numbers of slots, got {given!r:.300}")
    found: dict[str, tuple[Any, int]] = {}
    for target, count in given.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"full_slots[{target!r}] must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"full_slots[{target!r}] must be at least 1, got {count}")
        matched = _matched_layers(model, target, f"full_slots' key {target!r}")
        for name, layer in matched.items():
            with _with_lora(layer):
                kernel = _kernel(layer)
            home = getattr(kernel.get_value(), "sharding", None)
            if isinstance(home, NamedSharding) and home.mesh.size > 1:
                raise ValueError(
                    f"full_slots[{target!r}] matches {name}, which is on a mesh of "
                    f"{home.mesh.size} devices; full slots are for models on one device"
                )
            if not isinstance(layer, nnx.Linear | _Tied) or _lead(layer):
                raise ValueError(
                    f"full_slots[{target!r}] matches {name}, a {type(layer).__name__} of kernel "
                    f"{list(kernel.shape)}; full slots are for nnx.Linear, embeddings and "
                    "their heads, and not for layers stacked for a scan"
                )
            found[name] = layer, count
    return found


def _experts_share(
    model: nnx.Module, layers: Mapping[str, nnx.Module], given: Mapping[str, SharedHalf]
) -> dict[str, SharedHalf]:
    """The half that experts share, by the name of their layer, which is one of `layers`."""
    if not isinstance(given, Mapping):
        raise TypeError(f'experts_share must map expressions to "A" or "B", got {given!r:.300}')
    found: dict[str, SharedHalf] = {}
    for target, half in given.items():
        if half not in ("A", "B"):
            raise ValueError(f'experts_share[{target!r}] must be "A" or "B", got {half!r:.300}')
        matched = _matched_layers(model, target, f"experts_share's key {target!r}")
        sharing = [n for n, layer in matched.items() if isinstance(layer, Experts) and n in layers]
        if not sharing:
            experts = [name for name, layer in layers.items() if isinstance(layer, Experts)]
            raise TypeError(
                f"experts_share[{target!r}] matches no experts that have room for LoRA; these "
                f"have: {', '.join(experts) or 'none'}"
            )
        for name in sharing:
            if found.setdefault(name, half) != half:
                raise ValueError(
                    f"experts_share gives {name} both halves, but nothing would then be an "
                    "expert's own; share one of them"
                )
    return found


def _other_names(model: nnx.Module) -> dict[str, list[str]]:
    """Names of layers beside their paths, by path: of those that are stacked for a scan, and those
    that the model gives to layers alone."""
    given: Mapping[str, object] = getattr(model, "peft_names", {})
    found = {path: [name] for path, name in given.items() if isinstance(name, str)}
    return found | _names_of_stacked(model, {path: name for path, (name,) in found.items()})


def _names_of_stacked(model: nnx.Module, given: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of layers that are stacked for a scan, by the path that they share; `given`: names
    of some, with a `{}` for each number."""
    leads = _leads(model)
    names = numbered_names(array_shapes(model), leads) if leads else {}
    leads_by_name = {path_name(path): lead for path, lead in leads.items()}
    return {
        path: [
            numbered
            for one in dict.fromkeys((name, given.get(path, name)))
            for numbered in with_numbers(one, leads_by_name[path]).values()
        ]
        for path, name in names.items()
    }


def _leads(model: nnx.Module) -> dict[ModulePath, Shape]:
    """The axes of layers of all that are stacked for a scan."""
    return {
        path: lead
        for path, module in nnx.iter_modules(model)
        if _lora_class(module) and not isinstance(module, _Tied) and (lead := _lead(module))
    }


def _matched(
    modules: Mapping[str, Any], names: Mapping[str, Sequence[str]], pattern: re.Pattern[str]
) -> set[str]:
    """The linear layers that match, unless layers of other types alone do."""
    layers = {
        path: module
        for path, module in modules.items()
        if any(map(pattern.fullmatch, (path, *names.get(path, ()))))
        and not isinstance(module, LoRAStack | FullWeights)
        and _has_kernel(module)
    }
    linear = {
        name
        for name, module in layers.items()
        if _lora_class(module) or isinstance(module, LoRALayer)
    }
    if layers and not linear:
        name, module = next(iter(layers.items()))
        raise TypeError(
            f"{name} is a {type(module).__name__}; LoRA covers nnx.Linear, nnx.LinearGeneral, "
            "nnx.Einsum and nnx.Embed, and modules of one matrix and an attribute einsum_str; "
            "jax_lora.integrations.qwix covers all others"
        )
    return linear


def _target_patterns(target: str | Sequence[str], said: str) -> list[re.Pattern[str]]:
    targets = [target] if isinstance(target, str) else target
    if not (isinstance(targets, Sequence) and all(isinstance(t, str) for t in targets)):
        raise TypeError(f"{said} must be a regular expression or a list of them")
    try:
        return [re.compile(rf"(?:.*\.)?(?:{t})") for t in targets]
    except re.error as error:
        raise ValueError(f"{said} is no regular expression: {error}") from None


def _has_kernel(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _lora_class(module: nnx.Module) -> type[LoRALayer] | None:
    """What `apply_lora` makes of a layer; None of those that it does not know."""
    return _LORA_CLASS.get(type(module)) or own_einsum(module)


@contextlib.contextmanager
def _with_lora(layer: Any) -> Iterator[None]:
    """Within, the layer is of its class with LoRA, which knows how features are axes."""
    plain, with_lora = type(layer), _lora_class(layer)
    layer.__class__ = with_lora
    try:
        yield
    finally:
        layer.__class__ = plain


def _check_layers(
    model: nnx.Module, layers: Mapping[str, Any], dtype: DTypeLike | None, buckets: Sequence[int],
    fully_sharded: bool, dora: bool,
) -> None:  # fmt: skip
    for name, layer in layers.items():
        with _with_lora(layer):
            _check_layer(name, layer, dtype, buckets, fully_sharded)
            _check_dora(name, layer, dora)
    _check_axis(model, layers)


def _check_layer(
    name: str, layer: Any, dtype: DTypeLike | None, buckets: Sequence[int], fully_sharded: bool
) -> None:
    """ValueError where a layer with LoRA is no matrix, its kernel has an unexpected shape, or is on
    a mesh over which its stacks do not divide."""
    expected, kernel = _kernel_shape(layer), _kernel(layer)
    lead = _lead_of(kernel, expected)
    try:
        layer.matrix_shape()
        dtype = stack_dtype(_dtype(layer, dtype, layer.takes_eight_bits), eight_bits=True)
        if kernel.shape == (*lead, *expected):
            layer.check_room(dtype, len(lead), buckets, fully_sharded)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if kernel.shape != (*lead, *expected):
        raise ValueError(
            f"{name}: kernel {list(kernel.shape)} should be {list(expected)}; of layers "
            "stacked for a scan, the axes of layers come in front of these"
        )


def _check_axis(model: nnx.Module, layers: Mapping[str, Any]) -> None:
    """ValueError where layers are stacked along their second axis.

    An `einsum_str` says how many axes a kernel has, but not how large: features would be layers.
    """
    stacked = {path: path_name(path) for path, lead in _leads(model).items() if len(lead) == 1}
    einsums = set[str]()
    for name, layer in layers.items():
        if (made := _lora_class(layer)) is not None and issubclass(made, EinsumLayer):
            einsums.add(name)
    matched = [path for path, name in stacked.items() if name in einsums]
    shapes = array_shapes(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))) if matched else {}
    for path in matched:
        if along_second(path, shapes, stacked):
            with _with_lora(layer := layers[stacked[path]]):
                kernel = _kernel(layer).shape
            raise ValueError(
                f"{stacked[path]}: kernel {list(kernel)} is of layers stacked along axis 1, as the "
                "parameters beside it show; stack them along axis 0 (out_axes=0 of nnx.vmap, "
                "param_scan_axis=0 of MaxText)"
            )


def _kernel(layer: Any) -> nnx.Variable[Array]:
    return layer.embedding if isinstance(layer, _Tied) else layer.kernel


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    """The kernel's shape, of a layer alone."""
    if isinstance(layer, nnx.Linear | Experts):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.in_features, *layer.out_features
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    if isinstance(layer, TiedHead):
        return tuple(layer.embedding.shape[-2:])
    return tuple(layer.sizes().values())


def _lead(layer: Any) -> tuple[int, ...]:
    """The axes of layers that are stacked for a scan."""
    with _with_lora(layer):
        return _lead_of(_kernel(layer), _kernel_shape(layer))


def _lead_of(kernel: nnx.Variable[Array], expected: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(kernel.shape)
    return shape[: max(0, len(shape) - len(expected))]
