"""An adapter to be trained, as PEFT initialises it."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from jax_lora.adapters import Adapter, LoRAConfig, LoRAWeights
from jax_lora.bank.shared import check_ranks, with_one
from jax_lora.bank.sites import Site, check_trained, some


def new_adapter(
    name: str, config: LoRAConfig, rngs: nnx.Rngs, sites: Mapping[str, Site]
) -> Adapter:
    """LoRA that adds nothing yet, and the base's whole weights, for the sites that the config
    names; see `AdapterBank.create`.

    Raises:
      TypeError: `config` or `rngs` is of another type.
      ValueError: the config targets no site, saves none with full slots, or asks for DoRA; the
        stacks are in 8 bits; experts that share a half would have several ranks.
    """
    check_trained(name, (site.dtype for site in sites.values()))
    for what, value, kind in (("config", config, LoRAConfig), ("rngs", rngs, nnx.Rngs)):
        if not isinstance(value, kind):
            raise TypeError(f"{what} must be {kind.__name__}, got {type(value).__name__}")
    if config.dora:
        raise ValueError("DoRA is not trained here; train it with PEFT, or give dora=False")
    # NumPy's generator, as JAX's would compile for each rank.
    generator = np.random.default_rng(np.asarray(jax.random.key_data(rngs.params())))
    rooms = [module for module, site in sites.items() if hasattr(site.layer, "full")]
    full = {module: sites[module].own_weights() for module in rooms if config.saves(module)}
    if config.modules_to_save and not full:
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r:.300} names none of the layers with full "
            f"slots: {some(rooms, str)}"
        )
    modules = {
        module: _weights(site, config, module, generator)
        for module, site in sites.items()
        if module not in full
        and config.targets(module)
        and not (site.is_embedding and config.all_linear)
    }
    if not modules:
        raise ValueError(
            f"target_modules={config.target_modules!r:.300} names none of {some(sites, str)}"
        )
    check_ranks(name, {module: weights.rank for module, weights in modules.items()}, sites)
    return Adapter(config, with_one(modules, sites), full)


def _weights(
    site: Site, config: LoRAConfig, module: str, generator: np.random.Generator
) -> LoRAWeights:
    """A module's LoRA as PEFT initialises it: it adds nothing."""
    (in_features, out_features), dtype = site.features, site.variables[0].dtype
    rank = config.rank_of(module)
    a, b = np.zeros((rank, in_features), dtype), np.zeros((out_features, rank), dtype)
    if site.is_embedding:
        b = np.asarray(generator.standard_normal(b.shape)).astype(dtype)
    else:
        bound = 1 / math.sqrt(in_features)
        a = np.asarray(generator.uniform(-bound, bound, a.shape)).astype(dtype)
    return LoRAWeights(a, b, config.scale_of(module), site.is_embedding)
