"""DoRA adapters in and out of the stacks: a magnitude, and the norms that it is divided by."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jax_lora.adapters import Adapter
from jax_lora.bank.sites import Site, some
from jax_lora.bank.slots import Entry
from jax_lora.bank.writer import SlotOfLayer
from jax_lora.nn.layer import LoRALayer
from jax_lora.nn.stacks import get_slot
from pallas_kernels.stacks import is_eight_bits

# Elements of a weight whose norms are computed at once: float32 of it, twice, are 128 MiB.
_BLOCK = 2**24


def check_room(
    name: str, uses_dora: bool, modules: Iterable[str], sites: Mapping[str, Site]
) -> None:
    """ValueError if an adapter uses DoRA, and one of its modules has no room for it."""
    if not uses_dora:
        return
    without = [module for module in modules if not _has_room(sites[module])]
    if without:
        raise ValueError(
            f"adapter {name!r} uses DoRA, for which these modules have no room: {some(without)}; "
            "give apply_lora dora=True, which makes it in nnx.Linear, nnx.LinearGeneral and "
            "nnx.Einsum"
        )


def _has_room(site: Site) -> bool:
    return all(stack.rescale is not None for stack in site.stacks.values())


def check_alone(entries: Mapping[str, Entry], mixes: Iterable[Mapping[str, float]]) -> None:
    """ValueError if an adapter with DoRA is one of several of a row, or has a weight."""
    dora = {name for name, entry in entries.items() if entry.config.dora}
    for n, row in enumerate(mixes):
        if (mine := dora & row.keys()) and (len(row) > 1 or row[next(iter(mine))] != 1):
            raise ValueError(
                f"row {n}: {some(sorted(mine))} uses DoRA, which rescales the base layer's output "
                "too; it takes a row of its own, with weight 1"
            )


def put_rescale(
    values: Sequence[SlotOfLayer],
    adapter: Adapter,
    sites: Mapping[str, Site],
    layers: Sequence[LoRALayer],
) -> None:
    """Adds to what a slot of each layer is to hold what its columns are rescaled by."""
    slots = {id(layer): slot for layer, slot in zip(layers, values)}
    norms = {
        module: column_norms(site, *_halves(site, slots[id(site.layer)], weights.scale))
        for module, weights in adapter.modules.items()
        for site in [sites[module]]
    }
    for module, weights in adapter.modules.items():
        site, norm = sites[module], np.asarray(norms[module])
        assert weights.magnitude is not None  # the adapter's config says DoRA
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.float64(weights.magnitude) / np.float64(norm) - 1
        if not np.isfinite(change).all():
            raise ValueError(
                f"{module}: row {np.flatnonzero(~np.isfinite(change))[0]} of the whole weight has "
                "norm 0, or the magnitude of DoRA is not finite, so that it has no direction"
            )
        _, arrays = slots[id(site.layer)]
        cast(np.ndarray, arrays[2 * len(site.layer.slices) + site.nth])[*site.index, 0] = change


def _halves(site: Site, slot: SlotOfLayer, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A and B of a site, of one slot of its layer, and the adapter's scale; of stacks in 8 bits A
    as float32 with all scales, and B as float32."""
    scales, arrays = slot
    a, b = (np.asarray(half)[site.index] for half in arrays[2 * site.nth : 2 * site.nth + 2])
    if is_eight_bits(a.dtype):
        factors = np.asarray(scales)[*site.index, site.nth]
        return a.astype(np.float32) * factors[:, None], b.astype(np.float32), 1.0
    return a, b, scale


def magnitude_of(
    site: Site, entry: Entry, a: np.ndarray, b: np.ndarray, scale: float
) -> np.ndarray:
    """The magnitude by which an adapter, whose whole slots a and b are, computes what its rows
    do."""
    rescale = site.stacks[entry.bucket].rescale
    assert rescale is not None  # an adapter with DoRA is there
    change = np.asarray(get_slot(rescale.get_value(), np.int32(entry.slot)))[*site.index, 0]
    norm = np.asarray(column_norms(site, a, b, scale))
    return ((np.float64(change) + 1) * norm).astype(np.float32)


class _Kernel(NamedTuple):
    """A layer's kernel, and what says how to read it: all of the layer but its other arrays, which
    another thread's load may donate."""

    graphdef: nnx.GraphDef[LoRALayer]
    state: nnx.State
    blank: nnx.State

    @classmethod
    def of(cls, layer: LoRALayer) -> "_Kernel":
        graphdef, *states = nnx.split(layer, lambda path, _: path == ("kernel",), ...)
        return cls(graphdef, states[0], jax.tree.map(lambda _: np.float32(0), states[1]))


def compile_norms(sites: Iterable[Site]) -> None:
    """Compiles what loads of DoRA adapters run."""
    done = set()
    for site in filter(_has_room, sites):
        if any(site.index):
            continue
        kernel = _Kernel.of(site.layer)
        for bucket, stack in site.stacks.items():
            of_a, of_b = (size[1:] for size in stack.shape.sizes)
            key = kernel.graphdef, site.layer.kernel.shape, site.columns.start, bucket
            if key not in done:
                dtype = stack.lora_a.dtype
                dtype = np.float32 if is_eight_bits(dtype) else dtype
                a, b = (np.zeros(size, dtype) for size in (of_a, of_b))
                column_norms(site, a, b, 1.0)
            done.add(key)


def column_norms(site: Site, a: np.ndarray, b: np.ndarray, scale: float) -> Float[Array, " n"]:
    """The norm of each row of `W + scale * b @ a`, of a site's base weight W `[n, H]`."""
    graphdef, kernel, blank = _Kernel.of(site.layer)
    index = tuple(map(np.int32, site.index))
    columns = site.columns.start, site.columns.stop
    return _norms(graphdef, columns, (kernel, blank), index, a, b, np.float32(scale))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _norms(
    graphdef: nnx.GraphDef[LoRALayer],
    columns: tuple[int, int],
    states: tuple[nnx.State, nnx.State],
    index: tuple[Array, ...],
    a: Float[Array, "R H"],
    b: Float[Array, "n R"],
    scale: Float[Array, ""],
) -> Float[Array, " n"]:
    layer = nnx.merge(graphdef, *states)
    matrix = layer.kernel_matrix(index)[:, slice(*columns)]
    features, width = matrix.shape
    block = min(width, max(1, _BLOCK // features))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def of_block(n: Int[Array, ""], norms: Array) -> Array:
        first = jnp.minimum(n * block, width - block)  # the last one overlaps the one before
        of_w = lax.dynamic_slice_in_dim(matrix, first, block, axis=1).astype(jnp.float32)
        of_b = lax.dynamic_slice_in_dim(b, first, block)
        delta = jnp.matmul(a.T, of_b.T, precision=lax.Precision.HIGHEST)
        found = jnp.sqrt(jnp.sum(jnp.square(of_w + scale * delta), axis=0))
        return lax.dynamic_update_slice_in_dim(norms, found, first, axis=0)

    return lax.fori_loop(0, -(-width // block), of_block, jnp.zeros(width, jnp.float32))
