"""Adapters out of the stacks: as they stand there, and folded into base weights."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_lora.adapters import Adapter, FullModule, LoRAConfig, LoRAWeights
from jax_lora.bank.dora import magnitude_of
from jax_lora.bank.shared import widest, with_one
from jax_lora.bank.sites import Site
from jax_lora.bank.slots import Entry
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.names import path_name
from jax_lora.sharding import put


def as_adapter(
    entry: Entry, slots: Mapping[str, tuple[np.ndarray, np.ndarray]], sites: Mapping[str, Site]
) -> Adapter:
    """The adapter that whole slots of A and B hold, at the rank at which it stands there.

    That is the config's, or larger where training has filled columns behind it. With DoRA, its
    magnitudes are those by which it computes what its rows do.
    """
    config = entry.config
    ranks = {
        module: max(config.rank_of(module), _rank_of(a, b)) for module, (a, b) in slots.items()
    }
    ranks = widest(ranks, sites)
    config = _widened(config, ranks)
    modules = {}
    for module, (a, b) in slots.items():
        scale, magnitude = config.scale_of(module), None
        if config.dora:
            magnitude = magnitude_of(sites[module], entry, a, b, scale)
        a, b = a[: ranks[module]], b[:, : ranks[module]]
        modules[module] = LoRAWeights(a, b, scale, sites[module].is_embedding, magnitude)
    return Adapter(config, with_one(modules, sites))


def _rank_of(a: np.ndarray, b: np.ndarray) -> int:
    """The rank of whole slots: behind it, each column is zero in A or in B."""
    live = np.flatnonzero((a != 0).any(axis=1) & (b != 0).any(axis=0))
    return int(live[-1]) + 1 if live.size else 0


def _widened(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """`config` with these ranks, and the scales that it has."""
    if all(config.rank_of(module) == rank for module, rank in ranks.items()):
        return config
    # The first pattern that matches counts, and a name also matches longer ones that end in it.
    order = sorted(ranks, key=len, reverse=True)
    alphas = {
        module: config.scale_of(module)
        * (math.sqrt(ranks[module]) if config.rslora else ranks[module])
        for module in order
    }
    return dataclasses.replace(
        config,
        rank_pattern={re.escape(module): ranks[module] for module in order},
        alpha_pattern={re.escape(module): alphas[module] for module in order},
    )


def merged(model: nnx.Module, adapter: Adapter, sites: Mapping[str, Site]) -> nnx.State:
    """The model's base parameters with the adapter folded in; see `AdapterBank.merge`."""
    by_layer: dict[int, list[tuple[Site, LoRAWeights]]] = {}
    for peft_name, weights in adapter.modules.items():
        site = sites[peft_name]
        by_layer.setdefault(id(site.layer), []).append((site, weights))
    full = {id(sites[module].layer): whole for module, whole in adapter.full.items()}
    modules = dict(nnx.iter_modules(model))
    holders = collections.Counter(
        id(variable) for module in modules.values() for variable in vars(module).values()
    )
    base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    state = dict(nnx.to_flat_state(nnx.clone(nnx.state(model, base))))
    for path, module in modules.items():
        if id(module) not in by_layer and id(module) not in full:
            continue
        layer = cast(LoRALayer, module)
        if holders[id(layer.kernel)] > 1:
            raise ValueError(f"{path_name(path)} shares its kernel with another layer")
        if id(module) in full:
            for name, array in _whole(layer, full[id(module)]).items():
                state[*path, name].set_value(array)
            continue
        kernels = [
            _merged_kernel(layer, index, [own for own in adapted if own[0].index == index])
            for adapted in [by_layer[id(module)]]
            for index in np.ndindex(*layer.lead)
        ]
        kernel = jnp.stack(kernels).reshape(layer.kernel.shape) if layer.lead else kernels[0]
        state[*path, layer.kernel_name].set_value(kernel)
    return nnx.from_flat_state(state)


def _whole(layer: LoRALayer, full: FullModule) -> dict[str, Array]:
    """What an adapter has in the place of a layer's variables."""
    weight = jnp.asarray(full.weight.T if layer.is_transposed else full.weight)
    found = {layer.kernel_name: weight.astype(layer.kernel.dtype)}
    if full.bias is not None and layer.bias is not None:
        found["bias"] = jnp.asarray(full.bias).astype(layer.bias.dtype)
    return found


def _placed(matrix: Array, a: np.ndarray, b: np.ndarray) -> tuple[Array, Array]:
    """The factors of what is added to `matrix`, sharded as it is."""
    if not isinstance(matrix.sharding, NamedSharding):
        return jnp.asarray(a), jnp.asarray(b)
    mesh, spec = matrix.sharding.mesh, matrix.sharding.spec
    rows, columns = (*spec, None, None)[:2]
    of_a, of_b = PartitionSpec(rows, None), PartitionSpec(None, columns)
    return put(a, NamedSharding(mesh, of_a)), put(b, NamedSharding(mesh, of_b))


def _merged_kernel(
    layer: LoRALayer, index: tuple[int, ...], adapted: list[tuple[Site, LoRAWeights]]
) -> Array:
    """The kernel of one layer, of those that are stacked, with what adapts it folded in."""
    if not adapted:
        return layer.kernel[index]
    matrix = layer.kernel_matrix(index).astype(jnp.float32)
    for site, weights in adapted:
        wide = np.zeros((weights.rank, matrix.shape[1]), np.float32)
        wide[:, site.columns] = weights.b.T
        a, b = _placed(matrix, np.asarray(weights.a).T.astype(np.float32), wide)
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        matrix += delta * jnp.float32(weights.scale)
        if weights.magnitude is not None:
            own = matrix[:, site.columns]
            norm = jnp.linalg.norm(own, axis=0)
            matrix = matrix.at[:, site.columns].set(own * (weights.magnitude / norm))
    return layer.kernel_tensor(matrix).astype(layer.kernel.dtype)
