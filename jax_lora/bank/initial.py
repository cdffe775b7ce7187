"""An adapter to be trained, as PEFT initialises it."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from jax_lora.adapters import Adapter, LoRAConfig, LoRAWeights
from jax_lora.bank.sites import Site, some


def new_adapter(config: LoRAConfig, rngs: nnx.Rngs, sites: Mapping[str, Site]) -> Adapter:
    """A random, B zero, for the sites that the config targets; see `AdapterBank.create`.

    Raises:
      TypeError: `config` or `rngs` is of another type.
      ValueError: the config targets no site, or asks for DoRA.
    """
    for what, value, kind in (("config", config, LoRAConfig), ("rngs", rngs, nnx.Rngs)):
        if not isinstance(value, kind):
            raise TypeError(f"{what} must be {kind.__name__}, got {type(value).__name__}")
    if config.dora:
        raise ValueError("DoRA is not trained here; train it with PEFT, or give dora=False")
    # NumPy's generator, as JAX's would compile for each rank.
    generator = np.random.default_rng(np.asarray(jax.random.key_data(rngs.params())))
    modules = {}
    for module in filter(config.targets, sites):
        site = sites[module]
        (in_features, out_features), dtype = site.features, site.variables[0].dtype
        shape, bound = (config.rank_of(module), in_features), 1 / math.sqrt(in_features)
        a = generator.uniform(-bound, bound, shape).astype(dtype)
        b = np.zeros((out_features, shape[0]), dtype)
        modules[module] = LoRAWeights(a, b, config.scale_of(module))
    if not modules:
        raise ValueError(
            f"target_modules={config.target_modules!r:.300} names none of {some(sites, str)}"
        )
    return Adapter(config, modules)
