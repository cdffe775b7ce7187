"""Reading `adapter_config.json`: what PEFT means by it, or which feature is refused."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Self

from jax_lora.adapters.files import JsonObject
from jax_lora.adapters.patterns import Expression, Names
from jax_lora.adapters.types import (
    OUTPUT_LAYERS,
    LoRAConfig,
    finite_number,
    matcher,
    names_of,
    rank_in,
)
from jax_lora.messages import printable, shown

_MAX_PARENTS = 16
_MAX_PARTS = 8  # of a layer, in enable_lora
_PARENT = re.compile(r"\w{1,512}", re.ASCII)

# Keys of adapter_config.json that change nothing about what a saved adapter computes, whatever
# their value: they matter to training, to how PEFT finds modules (the weights' own names say
# which), or to how weights were initialised (see _EXACT_INITS). fan_in_fan_out describes how the
# base stores its weight; A and B are stored alike. merge_weights and enable_lora are PEFT 0.2's;
# `enabled_parts` reads the latter. `Choice` reads ensure_weight_tying.
# The weights say which of modules_to_save the base has. `token_indices` reads the tokens, and
# `target_parameters` the parameters.
IRRELEVANT = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights target_modules
    exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out megatron_core
    loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
    merge_weights enable_lora use_dora ensure_weight_tying modules_to_save trainable_token_indices
    target_parameters lora_dtype lorap_lr_ratio lorap_emb_lr
    """.split()  # the last line is ms-swift's
)

# Keys that change what an adapter computes, or which weights it has, and what to do about each.
MERGE = "merge it into the base with peft's merge_and_unload and serve that"
UNSUPPORTED = {
    "lora_bias": f"biases of lora_B are not supported; {MERGE}",
    "layer_replication": f"replicated layers are not supported; {MERGE}",
    "megatron_config": "Megatron's parallel layers are not supported; save the adapter without "
    "them",
    "alora_invocation_tokens": "aLoRA is not supported; train a plain LoRA",
    "use_qalora": "QA-LoRA is not supported; train a plain LoRA",
    "use_bdlora": "BD-LoRA's block-diagonal weights are not supported; train a plain LoRA",
    "arrow_config": "Arrow routing is not supported; load the adapters that it routes to",
    "velora_config": "VeLoRA is not supported; train a plain LoRA",
    "kasa_config": f"KaSA changes the base weights and is not supported; {MERGE}",
    "monteclora_config": "MonteCLoRA is not supported; train a plain LoRA",
}

EXPERT_PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters that hold the weights of all experts of a layer, and an expert's modules in each."""

# Initialisations that leave the base weights alone, so that the saved A and B say everything. The
# others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract something from the base.
_EXACT_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def read_config(values: JsonObject) -> LoRAConfig:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {shown(values.get('peft_type'))}; only 'LORA' is supported")
    for key, value in values.items():
        if not value or key in IRRELEVANT:
            continue  # None, False and empty switch a feature off, also one not invented yet
        remedy = UNSUPPORTED.get(
            key, "this key is unknown, so that its meaning would be lost; remove it if it has none"
        )
        raise ValueError(f"{printable(key, 100)}={shown(value)}: {remedy}")
    target_parameters(values)
    if values.get("bias") not in (None, "none"):
        raise ValueError(f"bias={shown(values['bias'])}: trained biases are not supported; {MERGE}")
    init = values.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _EXACT_INITS:
        raise ValueError(
            f"init_lora_weights={shown(init)} is unknown or changed the base weights, so that the "
            "adapter doesn't fit the original base; convert it with peft's save_pretrained(path, "
            "path_initial_model_for_weight_conversion=...)"
        )
    if "r" not in values or "lora_alpha" not in values:
        raise ValueError(
            "r and lora_alpha are required; save the adapter with peft's save_pretrained"
        )
    return LoRAConfig(
        rank=rank_in(values["r"], "r"),
        alpha=finite_number(values["lora_alpha"], "lora_alpha"),
        rslora=values.get("use_rslora") or False,
        target_modules=values.get("target_modules"),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        dora=values.get("use_dora") or False,
        modules_to_save=values.get("modules_to_save") or (),
    )


def target_parameters(values: JsonObject) -> tuple[str, ...]:
    """The names, or ends of names, of parameters with LoRA: of experts, and of their router.

    Raises:
      ValueError: others are among them.
    """
    names = tuple(names_of(values.get("target_parameters") or [], "target_parameters"))
    for name in names:
        parts = name.split(".")
        if parts[-1] not in EXPERT_PARAMETERS and parts[-2:] != ["gate", "weight"]:
            raise ValueError(
                f"target_parameters={shown([*names])}: LoRA of bare parameters is not supported, "
                f"but for experts' {', '.join(EXPERT_PARAMETERS)} and gate.weight; {MERGE}"
            )
    return names


def token_indices(values: JsonObject, module: str) -> tuple[int, ...]:
    """The tokens of a module that has trained ones.

    Raises:
      ValueError: the config does not list them.
    """
    given = values.get("trainable_token_indices")
    tokens = given
    if isinstance(given, dict):
        tokens = next((some for name, some in given.items() if module.endswith(name)), None)
    if not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise ValueError(
            f"{module} has trained tokens, but trainable_token_indices={shown(given)} does not "
            "list them"
        )
    return tuple(tokens)


def enabled_parts(values: JsonObject) -> tuple[bool, ...] | None:
    """Which of a layer's equal parts have LoRA, as in PEFT 0.2; None if it is not asked for."""
    parts = values.get("enable_lora")
    if not parts:
        return None
    if not (
        isinstance(parts, list)
        and len(parts) <= _MAX_PARTS
        and all(isinstance(part, bool) for part in parts)
        and any(parts)
    ):
        raise ValueError(
            f"enable_lora={shown(parts)} must say of each part of a layer, at most {_MAX_PARTS}, "
            "whether it has LoRA, and one must have it"
        )
    return tuple(parts)


def dense_config(config: LoRAConfig, count: int) -> LoRAConfig:
    """The config of the dense form of layers of which `count` parts have LoRA: the same scale."""
    if config.rslora or config.dora or config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "enable_lora is PEFT 0.2's, which has no use_rslora, use_dora, rank_pattern or "
            "alpha_pattern; remove them"
        )
    rank = rank_in(config.rank * count, f"r times the {count} parts of enable_lora")
    return dataclasses.replace(config, rank=rank, alpha=config.alpha * count)


@dataclass(frozen=True)
class Choice:
    """Which modules PEFT adapts, of those that have weights.

    Attributes:
      parameters: names, or ends of names, of bare parameters that it adapts too.
      ties: whether an output layer has the adapter of the embedding that it is tied to, which PEFT
        saves under either name.
    """

    config: LoRAConfig
    excluded: Names | Expression | None
    layers: frozenset[int] | None
    parents: tuple[str, ...]
    ties: bool = False
    parameters: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: JsonObject, config: LoRAConfig) -> Self:
        excluded = values.get("exclude_modules") or None
        if excluded is not None and not isinstance(excluded, str):
            excluded = tuple(names_of(excluded, "exclude_modules"))
        layers = values.get("layers_to_transform")
        parents = values.get("layers_pattern") or []
        parents = [parents] if isinstance(parents, str) else names_of(parents, "layers_pattern")
        if len(parents) > _MAX_PARENTS or not all(_PARENT.fullmatch(name) for name in parents):
            raise ValueError(
                f"layers_pattern={shown(parents)} must be at most {_MAX_PARENTS} names of one part "
                "each, such as 'layers': letters, digits and '_'"
            )
        chosen = None
        if layers is not None and layers != []:
            numbers = layers if isinstance(layers, list) else [layers]
            if any(type(number) is not int for number in numbers):
                raise TypeError(
                    f"layers_to_transform must be an integer or a list of them, got {shown(layers)}"
                )
            if isinstance(config.target_modules, str):
                raise ValueError(
                    f"layers_to_transform={shown(layers)} goes with a list of target_modules, not "
                    f"with {shown(config.target_modules)}"
                )
            chosen = frozenset(numbers)
        excludes = None if excluded is None else matcher(excluded)
        ties = bool(values.get("ensure_weight_tying"))
        return cls(config, excludes, chosen, tuple(parents), ties, target_parameters(values))

    def work(self, length: int) -> int:
        """Steps that a module whose name has this length takes."""
        return len(self.parents) + (self.excluded.work(length) if self.excluded else 0)

    def adapts(self, module: str) -> bool:
        if self.ties and module.rpartition(".")[2] in OUTPUT_LAYERS:
            return True
        if self.excluded is not None and self.excluded.matches(module):
            return False
        if any(f".{module}.weight".endswith(f".{name}") for name in self.parameters):
            return True
        names = self.config.target_modules
        if not self.config.targets(module):
            return False
        if self.layers is None or names is None or module in names:
            return True
        index = self._layer(module)
        return index is not None and index in self.layers

    def _layer(self, module: str) -> int | None:
        """The number that PEFT takes for the layer's: the first behind a parent, and not last."""
        parts = module.split(".")
        for parent in self.parents or (None,):
            # Without layers_pattern any part but the first of all is a parent.
            for at in range(0 if parent else 1, len(parts) - 2):
                if parent in (None, parts[at]) and parts[at + 1].isdecimal():
                    return int(parts[at + 1])
        return None
