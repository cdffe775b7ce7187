"""Names of modules in other people's files: wrappers, renaming, and which name was meant."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from jax_lora.adapters.types import Adapter, LoRAConfig, check_module
from jax_lora.messages import shown

type Rename = Mapping[str, str] | Callable[[str], str]
"""How a caller renames modules; see `load_peft`."""

# What torch.compile, FSDP and activation checkpointing put between the names of modules. No model
# has modules of these names, so that they can be left out unasked.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OUTER = re.compile(r"(?:module\.)+(?=base_model\.)")


def unwrapped(name: str) -> str:
    """The name without the names of wrappers, or the whole key of a file without them.

    `module.` (DDP) is left out only in front of PEFT's own `base_model.`: elsewhere a model may
    have a module of this name.
    """
    return _OUTER.sub("", ".".join(part for part in name.split(".") if part not in _WRAPPERS), 1)


def new_names(modules: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """The new name of each module.

    Raises:
      TypeError: `rename` is, or gives, something else than names.
      ValueError: a new name is no module's name, or two modules get the same.
    """
    if rename is None:
        return {module: module for module in modules}
    change = _by_prefix(rename) if isinstance(rename, Mapping) else rename
    if not callable(change):
        raise TypeError(
            f"rename must map prefixes of names to new ones, or be a function, got {shown(rename)}"
        )
    names: dict[str, str] = {}
    olds: dict[str, str] = {}
    for old in modules:
        new = change(old)
        if not isinstance(new, str):
            raise TypeError(f"rename gives {shown(new)} for {shown(old)}; it must give a name")
        check_module(new)
        if new in olds:
            raise ValueError(f"rename gives {shown(olds[new])} and {shown(old)} one name, {new}")
        names[old], olds[new] = new, old
    return names


def _by_prefix(prefixes: Mapping[str, str]) -> Callable[[str], str]:
    pairs = {}
    for old, new in prefixes.items():
        if not (isinstance(old, str) and isinstance(new, str)):
            raise TypeError(f"rename must map text to text, got {shown(old)}: {shown(new)}")
        pairs[old.strip(".")] = new.strip(".")

    def change(name: str) -> str:
        parts = name.split(".")
        for end in range(len(parts), -1, -1):  # the longest prefix counts
            if (new := pairs.get(".".join(parts[:end]))) is not None:
                return ".".join(filter(None, (new, *parts[end:])))
        return name

    return change


def renamed_config(config: LoRAConfig, names: Mapping[str, str]) -> LoRAConfig:
    """The config with the ranks and alphas of the old names under the new ones."""
    if all(old == new for old, new in names.items()):
        return config
    ranks = {new: config.rank_of(old) for old, new in names.items()}
    alphas = {new: config.alpha_of(old) for old, new in names.items()}
    return dataclasses.replace(config_of(ranks, alphas, rslora=config.rslora), dora=config.dora)


def config_of(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool = False
) -> LoRAConfig:
    """The config of modules whose ranks and alphas are given by their whole names."""

    def patterns[T](values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
        ((usual, count),) = Counter(values.values()).most_common(1)
        if count == len(values):
            return usual, {}
        # A pattern matches ends of names too, and the first counts. So a name comes before its
        # ends, and all names are there.
        longest = sorted(values, key=len, reverse=True)
        return usual, {name.replace(".", r"\."): values[name] for name in longest}

    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    return LoRAConfig(rank, alpha, rslora, tuple(ranks), rank_pattern, alpha_pattern)


def renamed(adapter: Adapter, rename: Rename | None) -> Adapter:
    """The adapter under other names; see `load_peft`. Raises as `new_names`."""
    if rename is None:
        return adapter
    names = new_names([*adapter.modules, *adapter.full, *adapter.tokens], rename)
    modules = {names[old]: weights for old, weights in adapter.modules.items()}
    full = {names[old]: weights for old, weights in adapter.full.items()}
    tokens = {names[old]: rows for old, rows in adapter.tokens.items()}
    own = {old: names[old] for old in adapter.modules}
    return Adapter(renamed_config(adapter.config, own), modules, full, tokens)


def meant(modules: Collection[str], known: Collection[str]) -> str:
    """Which known name an unknown module is closest to, and a `rename=` that mends all modules.

    The closest has most in common at its end and its start. "" if none is close.
    """
    unknown = set(modules).difference(known)
    if not (unknown and known):
        return ""
    first = min(unknown)
    closest = max(known, key=lambda name: _likeness(first, name))
    old, new = _differing(first, closest)
    text = f"the closest to {shown(first)} is {shown(closest)}"
    change = _by_prefix({old: new})
    fits = {change(module) for module in modules}
    if old != first and len(fits) == len(modules) and fits.issubset(known):
        text += f"; give rename={{{shown(old)}: {shown(new)}}}, by which all its modules fit"
    return text


def _likeness(name: str, other: str) -> tuple[int, int]:
    """Characters in common at the end, in whole parts, and then at either side."""
    old, _ = _differing(name, other)
    return len(name) - len(old), _common(name[::-1], other[::-1]) + _common(name, other)


def _common(text: str, other: str) -> int:
    """How many characters at the start are the same."""
    pairs = enumerate(zip(text, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _differing(name: str, other: str) -> tuple[str, str]:
    """What stands in front of the last parts that two names have in common."""
    parts, others = name.split("."), other.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return ".".join(parts), ".".join(others)
