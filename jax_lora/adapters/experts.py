"""LoRA of experts in files: of a parameter that holds all experts' weights, or of stacked modules.

PEFT 0.18 and later store the former. `target_parameters` names such a parameter,
`experts.gate_up_proj` or `experts.down_proj`. PEFT wraps the module that holds it, once for each
parameter. So tensors are called `experts.base_layer` for the inner one, which is `gate_up_proj`
where both are adapted, and `experts` for the outer one.
Here each expert gets modules of its own, `experts.3.gate_proj`, as older PEFT and Transformers had
them.

SGLang, vLLM and Megatron-Bridge have stacked modules: `experts.gate_proj`, or `experts.w1`, whose A
is `[experts, r, H]` and B `[experts, N, r]`. A half that all experts share is `[1, ...]`. The other
half may then stand in modules of each expert. PEFT does not know these modules.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from jax_lora.adapters.config import EXPERT_PARAMETERS
from jax_lora.adapters.halves import ExpertHalf, Fused, Half, Stacked, StackedHalf
from jax_lora.adapters.names import config_of, renamed_config
from jax_lora.adapters.types import (
    EXPERT,
    Adapter,
    LoRAConfig,
    LoRAWeights,
    SharedHalf,
    expert_stack,
)
from jax_lora.messages import shown

type Pair = dict[str, Half]
"""The halves "A" and "B" of a module."""

_MAX_EXPERTS = 4096
_STACKED = re.compile(r"(?:.*\.)?experts\.[^.\d][^.]*")  # without a number


class Apart(NamedTuple):
    """An adapter whose experts have modules of their own.

    Attributes:
      halves: of all modules.
      experts: the names of those that stood together.
      shared: the half that experts have in common, by the name of each one's module.
    """

    config: LoRAConfig
    halves: dict[str, Pair]
    experts: frozenset[str]
    shared: dict[str, SharedHalf]


def apart(config: LoRAConfig, halves: Mapping[str, Pair], targets: Sequence[str]) -> Apart:
    """The experts' LoRA, module by module.

    Args:
      halves: of the modules as the file names them.
      targets: the config's `target_parameters`.

    Raises:
      ValueError: the tensors of a parameter fit neither each other nor the config.
    """
    found: dict[str, Pair] = {}
    experts: dict[str, str] = {}  # the parameter, or stack, that a module's LoRA was part of
    stacks = {module: pair for module, pair in halves.items() if _is_stacked(module, pair)}
    for module, pair in halves.items():
        if module in stacks:
            continue
        parameter = _parameter(module, halves, targets)
        if parameter is None:
            found[module] = pair
            continue
        if not {"A", "B"} <= pair.keys():
            raise ValueError(f"{module} lacks a half of its LoRA; save the adapter again")
        for name, own in _modules(config, parameter, pair):
            found[name], experts[name] = own, parameter
    shared: dict[str, SharedHalf] = {}
    singles = _singles(found)
    for module, pair in stacks.items():
        for name, own in _spread(module, pair, singles.get(module, [])).items():
            if both := sorted(own.keys() & found.setdefault(name, {}).keys()):
                raise ValueError(
                    f"{name} and {module} both have lora_{both[0]}; save the adapter again"
                )
            found[name].update(own)
            experts[name] = module
            if _is_shared(pair.get("A")) or _is_shared(pair.get("B")):
                shared[name] = "A" if _is_shared(pair.get("A")) else "B"
    if not experts:
        return Apart(config, found, frozenset(), {})
    own_names = found.keys() & halves.keys()
    return Apart(_config(config, found, experts, own_names), found, frozenset(experts), shared)


def _is_stacked(module: str, pair: Pair) -> bool:
    return (
        _STACKED.fullmatch(module) is not None
        and pair.keys() <= {"A", "B"}
        and any(len(half.shape) == 3 for half in pair.values())
    )


def _is_shared(half: Half | None) -> bool:
    return half is not None and half.shape[:1] == (1,)


def _singles(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules of single experts, by what all of them are called."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if EXPERT.fullmatch(module):
            found.setdefault(expert_stack(module), []).append(module)
    return found


def _spread(module: str, pair: Pair, singles: Sequence[str]) -> dict[str, Pair]:
    """What a stacked module has of each expert, by name. `singles`: modules of single experts,
    which have the other half of one that they share."""
    sizes = [half.shape for half in pair.values()]
    counts = {size[0] if len(size) == 3 else 0 for size in sizes}
    if singles:
        fits = counts == {1} and len(pair) == 1
    else:
        fits = len(counts - {1}) == 1 and len(pair) == 2 and 1 < max(counts) <= _MAX_EXPERTS
    if not fits:
        halves = {f"lora_{half}": [*stored.shape] for half, stored in pair.items()}
        raise ValueError(
            f"{module}: lora_A of experts must be [experts, r, H] and lora_B [experts, N, r], of "
            "which one that they share is [1, ...] and may be the only one, if modules of single "
            f"experts have the other; got {shown(halves)} and {len(singles)} of those modules"
        )
    holder, _, last = module.rpartition(".")
    names = singles or [f"{holder}.{expert}.{last}" for expert in range(max(counts))]
    stacks = {half: Stacked(stored) for half, stored in pair.items()}
    return {
        name: {
            half: StackedHalf(
                stored.file, stored.key, stacks[half], 0 if _is_shared(stored) else expert
            )
            for half, stored in pair.items()
        }
        for expert, name in enumerate(names)
    }


def _parameter(module: str, halves: Mapping[str, Pair], targets: Sequence[str]) -> str | None:
    """The name of the parameter that a wrapped module stands for; None for another module."""
    holder = module.removesuffix(".base_layer")
    if holder.rpartition(".")[2] != "experts":
        return None
    names = [f"{holder}.{name}" for name in EXPERT_PARAMETERS]
    adapted = [n for n in names if any(f".{n}".endswith(f".{target}") for target in targets)]
    if f"{holder}.base_layer" in halves and len(adapted) == 2:
        return adapted[0] if module != holder else adapted[1]
    if module != holder or len(adapted) != 1:
        raise ValueError(
            f"target_parameters={shown([*targets])} must name the parameters of {holder} that have "
            f"LoRA, of {', '.join(EXPERT_PARAMETERS)}, got tensors of {module}"
        )
    return adapted[0]


def _modules(config: LoRAConfig, parameter: str, pair: Pair) -> Iterator[tuple[str, Pair]]:
    """The modules of a parameter, by name: of each expert one, or two that share A."""
    a, b, rank = pair["A"], pair["B"], config.rank_of(parameter)
    holder, _, last = parameter.rpartition(".")
    names = EXPERT_PARAMETERS[last]
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and 0 not in b.shape
    count = a.shape[0] // rank if fits else 0
    fits = 0 < count <= _MAX_EXPERTS and a.shape[0] == count * rank
    if not fits or b.shape[0] % len(names):
        raise ValueError(
            f"{parameter}: lora_A must be [experts * {rank}, H] and lora_B [N, {rank} * experts], "
            f"got {shown([*a.shape])} and {shown([*b.shape])}"
        )
    of_a, of_b = Fused(a, count, is_b=False), Fused(b, count, is_b=True)
    width = b.shape[0] // len(names)
    for expert in range(count):
        for nth, name in enumerate(names):
            rows = slice(nth * width, (nth + 1) * width)
            yield (
                f"{holder}.{expert}.{name}",
                {
                    "A": ExpertHalf(a.file, a.key, of_a, expert, slice(0, rank)),
                    "B": ExpertHalf(b.file, b.key, of_b, expert, rows),
                },
            )


def _config(
    config: LoRAConfig,
    halves: Mapping[str, Pair],
    experts: Mapping[str, str],
    own_names: Set[str],
) -> LoRAConfig:
    """The config of these modules, under their new names. Patterns may also name those experts
    that stand in the file by themselves, beside what they share.

    The rank of gate and up is the config's own: PEFT reads modules of experts as a parameter again,
    whose rank it takes for twice the config's, whatever patterns say of the modules.
    """
    values = {}
    for module in halves:
        own, of_stack = (
            (config.rank_of(name), config.alpha_of(name))
            for name in (module, experts.get(module, module))
        )
        is_named = module in own_names and own != (config.rank, config.alpha)
        values[module] = own if is_named else of_stack
    fused = [values[m] for m in experts if m.endswith(("gate_proj", "up_proj"))]
    ((usual, _),) = Counter(fused or values.values()).most_common(1)
    patterns: dict[str, tuple[int, float]] = {}
    for module, value in values.items():
        if patterns.setdefault(re.escape(module.rpartition(".")[2]), value) != value:
            ranks, alphas = ({m: v[n] for m, v in values.items()} for n in (0, 1))
            return config_of(ranks, alphas, rslora=config.rslora)  # type: ignore[arg-type]
    patterns = {last: value for last, value in patterns.items() if value != usual}
    return dataclasses.replace(
        config,
        rank=usual[0],
        alpha=usual[1],
        target_modules=None,
        rank_pattern={last: rank for last, (rank, _) in patterns.items()},
        alpha_pattern={last: alpha for last, (_, alpha) in patterns.items()},
    )


def of_parameter[T](values: Mapping[str, T], usual: T) -> dict[str, T]:
    """The pattern for the parameter that PEFT makes of Mixtral's `w2`, which another name has.

    Args:
      values: the rank, or alpha, of each module. usual: of those without a pattern.
    """
    found = next((v for m, v in values.items() if re.search(r"\.experts\.\d+\.w2$", m)), usual)
    return {} if found == usual else {"down_proj": found}


def stacked(adapter: Adapter) -> tuple[LoRAConfig, dict[str, LoRAWeights]]:
    """An adapter's config and modules as a file has them: experts that share a half are one module,
    of A `[1, r, H]` and B `[experts, N, r]`, or of A `[experts, r, H]` and B `[1, N, r]`.

    Experts whose numbers leave some out, or whose ranks or scales differ, stay modules of their
    own.
    """
    config, shared = adapter.config, adapter.header.shared
    names, modules = {module: module for module in adapter.modules}, dict(adapter.modules)
    for stack, singles in _singles(shared).items():
        ordered = sorted(singles, key=_number)
        numbers, own = list(map(_number, ordered)), [adapter.modules[name] for name in ordered]
        alike = len({(weights.rank, weights.scale) for weights in own}) == 1
        if numbers != list(range(len(own))) or not alike or config.dora or stack in modules:
            continue
        for name in ordered:
            names[name] = stack
            del modules[name]
        is_a = shared[ordered[0]] == "A"
        halves_a, halves_b = ([w.a for w in own], [w.b for w in own])
        a = np.stack(halves_a[:1] if is_a else halves_a)
        b = np.stack(halves_b if is_a else halves_b[:1])
        modules[stack] = LoRAWeights(a, b, own[0].scale)
    if any(
        (config.rank_of(new), config.alpha_of(new)) != (config.rank_of(old), config.alpha_of(old))
        for old, new in names.items()
    ):
        config = renamed_config(config, names)
    return config, modules


def _number(module: str) -> int:
    """The number of the expert whose module it is."""
    match = EXPERT.fullmatch(module)
    return int(match[2]) if match else -1
