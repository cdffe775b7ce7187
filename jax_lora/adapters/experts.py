"""LoRA of experts as PEFT 0.18 and later store it: of a parameter that holds all experts' weights.

`target_parameters` names such a parameter, `experts.gate_up_proj` or `experts.down_proj`. PEFT
wraps the module that holds it, once for each parameter. So tensors are called `experts.base_layer`
for the inner one, which is `gate_up_proj` where both are adapted, and `experts` for the outer one.
Here each expert gets modules of its own, `experts.3.gate_proj`, as older PEFT and Transformers had
them.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jax_lora.adapters.config import EXPERT_PARAMETERS
from jax_lora.adapters.halves import ExpertHalf, Fused, Half
from jax_lora.adapters.names import config_of
from jax_lora.adapters.types import LoRAConfig
from jax_lora.messages import shown

type Pair = dict[str, Half]
"""The halves "A" and "B" of a module."""

_MAX_EXPERTS = 4096


class Apart(NamedTuple):
    """An adapter whose experts have modules of their own.

    Attributes:
      halves: of all modules.
      experts: the names of those that stood together.
    """

    config: LoRAConfig
    halves: dict[str, Pair]
    experts: frozenset[str]


def apart(config: LoRAConfig, halves: Mapping[str, Pair], targets: Sequence[str]) -> Apart:
    """The experts' LoRA, module by module.

    Args:
      halves: of the modules as the file names them.
      targets: the config's `target_parameters`.

    Raises:
      ValueError: the tensors of a parameter fit neither each other nor the config.
    """
    found: dict[str, Pair] = {}
    experts: dict[str, str] = {}  # the parameter that a module's LoRA was part of
    for module, pair in halves.items():
        parameter = _parameter(module, halves, targets)
        if parameter is None:
            found[module] = pair
            continue
        if not {"A", "B"} <= pair.keys():
            raise ValueError(f"{module} lacks a half of its LoRA; save the adapter again")
        for name, own in _modules(config, parameter, pair):
            found[name], experts[name] = own, parameter
    if not experts:
        return Apart(config, found, frozenset())
    return Apart(_config(config, found, experts), found, frozenset(experts))


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
    config: LoRAConfig, halves: Mapping[str, Pair], experts: Mapping[str, str]
) -> LoRAConfig:
    """The config of these modules, under their new names.

    The rank of gate and up is the config's own: PEFT reads modules of experts as a parameter again,
    whose rank it takes for twice the config's, whatever patterns say of the modules.
    """
    keys = {module: experts.get(module, module) for module in halves}
    values = {m: (config.rank_of(key), config.alpha_of(key)) for m, key in keys.items()}
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
