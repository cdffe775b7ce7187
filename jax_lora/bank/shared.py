"""The half of a LoRA that experts of a layer share, so that a slot has one for all of them."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from jax_lora.adapters import LoRAWeights
from jax_lora.adapters.types import SharedHalf
from jax_lora.bank.sites import Site
from jax_lora.messages import shown


def widest(ranks: Mapping[str, int], sites: Mapping[str, Site]) -> dict[str, int]:
    """The rank of each module; of experts that share a half, the largest of theirs."""
    largest: dict[str, int] = {}
    firsts = {module: first for module, first, _ in _sharing(ranks, sites)}
    for module, first in firsts.items():
        largest[first] = max(ranks[module], largest.get(first, 0))
    return {m: largest[firsts[m]] if m in firsts else rank for m, rank in ranks.items()}


def with_one(
    modules: Mapping[str, LoRAWeights], sites: Mapping[str, Site]
) -> dict[str, LoRAWeights]:
    """The modules, where experts of a layer have the half that they share from the first."""
    found = dict(modules)
    for module, first, half in _sharing(modules, sites):
        own, one = modules[module], modules[first]
        a, b = (one.a, own.b) if half == "A" else (own.a, one.b)
        found[module] = dataclasses.replace(own, a=a, b=b)
    return found


def is_one(modules: Mapping[str, LoRAWeights], sites: Mapping[str, Site]) -> bool:
    """Whether what experts share is one array, and not several equal ones."""
    return all(
        _half(modules[module], half) is _half(modules[first], half)
        for module, first, half in _sharing(modules, sites)
    )


def check_ranks(name: str, ranks: Mapping[str, int], sites: Mapping[str, Site]) -> None:
    """ValueError where experts that share a half have several ranks."""
    for module, first, half in _sharing(ranks, sites):
        if ranks[module] != ranks[first]:
            raise ValueError(_differ(name, half, {m: ranks[m] for m in (first, module)}, sites))


def check_values(name: str, modules: Mapping[str, LoRAWeights], sites: Mapping[str, Site]) -> None:
    """ValueError where experts, all of one rank, differ in the half that they share."""
    for module, first, half in _sharing(modules, sites):
        own, one = _half(modules[module], half), _half(modules[first], half)
        if own is not one and not _same(np.asarray(own), np.asarray(one)):
            ranks = dict.fromkeys((first, module), modules[module].rank)
            raise ValueError(_differ(name, half, ranks, sites))


def _sharing(
    modules: Iterable[str], sites: Mapping[str, Site]
) -> Iterator[tuple[str, str, SharedHalf]]:
    """Each module of an expert that shares a half, the first of those that it shares with, and the
    half."""
    firsts: dict[tuple[int, int, tuple[int, ...]], str] = {}
    for module in modules:
        site = sites[module]
        if site.shared is not None:
            key = id(site.layer), site.nth, site.index[:-1]
            yield module, firsts.setdefault(key, module), site.shared


def _half(weights: LoRAWeights, half: SharedHalf) -> np.ndarray | jax.Array:
    return weights.a if half == "A" else weights.b


def _same(own: np.ndarray, one: np.ndarray) -> bool:
    """Whether they have the same bits: a NaN is like another."""
    if own.dtype != one.dtype:
        return False
    words = np.dtype(f"u{own.dtype.itemsize}")
    a, b = (np.ascontiguousarray(t).view(words) for t in (own, one))
    return np.array_equal(a, b)


def _differ(
    name: str, half: SharedHalf, ranks: Mapping[str, int], sites: Mapping[str, Site]
) -> str:
    shapes = []
    for module, rank in ranks.items():
        features, width = sites[module].features
        shapes.append(f"{shown(module)} {[rank, features] if half == 'A' else [width, rank]}")
    return (
        f"adapter {name!r}: lora_{half} of {' and '.join(shapes)} differ, but experts share "
        f"{half} there; load it into a model whose apply_lora has no experts_share for them"
    )
