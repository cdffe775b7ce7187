"""Trained tokens of an adapter as whole weights: the base model's, with other rows."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jax_lora.adapters import Adapter, AdapterHeader, FullModule
from jax_lora.bank.sites import Site


def check_tokens(name: str, header: AdapterHeader, sites: Mapping[str, Site]) -> None:
    """ValueError where the model has no room for an adapter's trained tokens, or no such tokens."""
    for module, tokens in header.tokens.items():
        for place in _places(module, header, sites):
            what = f"adapter {name!r} has trained tokens of {place} (trainable_token_indices)"
            site = sites.get(place)
            if site is None or not hasattr(site.layer, "full"):
                last = place.rpartition(".")[2]
                raise ValueError(
                    f"{what}, which take a full slot there, and this model has none; give "
                    f"apply_lora full_slots={{{last!r}: 1}}, if it has the layer"
                )
            if place in header.modules or place in header.full:
                raise ValueError(
                    f"{what}, which is tied to {module}, and LoRA or a whole weight of it too"
                )
            vocabulary, features = site.layer.full.slots[0].weight.get_value().shape
            if tokens.shape[1] != features or max(tokens.indices) >= vocabulary:
                raise ValueError(
                    f"{what} up to {max(tokens.indices)} of {tokens.shape[1]} features, but the "
                    f"model's has {vocabulary} tokens of {features}; tokens that were added for "
                    "the training need a base model that has them"
                )


def with_whole_tokens(adapter: Adapter, sites: Mapping[str, Site]) -> Adapter:
    """The adapter with whole weights instead of trained tokens."""
    full = dict(adapter.full)
    for module, tokens in adapter.tokens.items():
        for place in _places(module, adapter.header, sites):
            base = sites[place].own_weights()
            weight = np.array(base.weight)
            weight[[*tokens.indices]] = tokens.rows.astype(weight.dtype)
            full[place] = FullModule(weight, base.bias)
    return dataclasses.replace(adapter, full=full, tokens={})


def _places(module: str, header: AdapterHeader, sites: Mapping[str, Site]) -> list[str]:
    """The layers that have the trained tokens of one: itself, and the output layer that is tied to
    it, as PEFT ties them, unless that has tokens of its own."""
    head = getattr(sites[module].layer, "head", None) if module in sites else None
    if head is None:
        return [module]
    tied = [other for other, site in sites.items() if site.layer is head] or ["lm_head"]
    return [module, *(other for other in tied if other not in header.tokens)]
