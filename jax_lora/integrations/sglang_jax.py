"""sglang-jax's LoRA backend over these kernels."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from sgl_jax.srt.lora.backend.bgmv_backend import BgmvLoRABackend

from jax_lora.sharding import resharded
from pallas_kernels import (
    LoRAPart,
    add_lora_multi,
    bgmv_expand,
    bgmv_shrink,
    make_segments,
    sgmv_expand,
    sgmv_shrink,
)
from pallas_kernels.dispatch import phase_of


class KernelLoRABackend(BgmvLoRABackend):  # type: ignore[misc]
    """`BgmvLoRABackend` of sglang-jax, whose products read the adapters in use alone.

    sglang-jax multiplies each token with every slot, and with a one-hot matrix. Here a token reads
    its own adapter. Shapes, dtypes and shardings of arguments and results are sglang-jax's; so is
    what prepares a batch. Gradients are not of this interface.

    Each product runs in a `jax.shard_map` over the mesh of the sharding that it is given. Fused
    projections (`run_qkv_lora`, `run_gate_up_lora`) gather the columns of B and of the base
    output first where a mesh divides them, as their slices do not divide like the whole.

    Example::

        lora_manager.BgmvLoRABackend = KernelLoRABackend  # before an engine is made

    Source: sgl_jax/srt/lora/backend/base_backend.py.
    """

    name = "jax_lora"

    def run_lora_a_gemm(
        self,
        x: Array,
        weights: Array,
        sharding: NamedSharding,
        scalings: Array,
        token_indices: Array,
    ) -> Array:
        """scalings[t] * x[t] @ weights[i].T where i = token_indices[t]: `[T, R]` in x's dtype."""
        rows, summed = _axes(x)[0], _axes(weights)[2]

        def local(x: Array, a: Array, scalings: Array, ids: Array) -> Array:
            ids = _in_use(ids, scalings)
            if phase_of(len(x)) == "decode":
                v = bgmv_shrink(x, a, ids)
            else:
                v = sgmv_shrink(x, a, make_segments(ids, len(a)))
            v = v if summed is None else jax.lax.psum(v, summed)
            return (v * scalings[:, None]).astype(x.dtype)

        specs = P(rows, summed), P(None, None, summed), P(rows), P(rows)
        operands = x, weights, scalings, token_indices
        return _on_mesh(local, operands, specs, P(rows, None), sharding)

    def run_lora_b_gemm(
        self,
        x: Array,
        weights: Array,
        base_output: Array,
        sharding: NamedSharding,
        token_indices: Array,
    ) -> Array:
        """base_output[t] + x[t] @ weights[i].T where i = token_indices[t]: `[T, N]`."""
        rows, kept = _axes(base_output)[0], _axes(weights)[1]

        def local(v: Array, b: Array, y: Array, ids: Array) -> Array:
            if phase_of(len(v)) == "decode":
                return bgmv_expand(v, b, ids, y)
            return sgmv_expand(v, b, make_segments(ids, len(b)), y)

        specs = P(rows, None), P(None, kept, None), P(rows, kept), P(rows)
        operands = x, weights, base_output, token_indices
        return _on_mesh(local, operands, specs, P(rows, kept), sharding)

    def run_qkv_lora(
        self,
        x: Array,
        qkv_lora_a: Array,
        qkv_lora_b: Array | tuple[Array, Array],
        output_slices: tuple[int, ...],
        base_output: Array,
        lora_a_output_sharding: NamedSharding,
        lora_b_output_sharding: NamedSharding,
        scalings: Array,
        token_indices: Array,
    ) -> Array:
        """`base_output` plus the adapters of q, k and v, in one call of `add_lora_multi`.

        `qkv_lora_a` is `[L, 3 R, H]`. `qkv_lora_b` is `[L, Nq + 2 Nkv, R]`, or `[1, L, Nq, R]` and
        `[2, L, Nkv, R]`.
        """
        if isinstance(qkv_lora_b, tuple):
            (q,), (k, v) = qkv_lora_b
            stacks = [q, k, v]
        else:
            edges = list(itertools.accumulate(output_slices))[:-1]
            stacks = jnp.split(_array(qkv_lora_b), edges, axis=1)
        operands = x, qkv_lora_a, stacks, base_output, scalings, token_indices
        return _add_slices(*operands, lora_b_output_sharding)

    def run_gate_up_lora(
        self,
        x: Array,
        gate_up_lora_a: Array,
        gate_up_lora_b: Array | tuple[Array, Array],
        base_output: Array,
        lora_a_output_sharding: NamedSharding,
        lora_b_output_sharding: NamedSharding,
        scalings: Array,
        token_indices: Array,
    ) -> Array:
        """`base_output` plus the adapters of gate and up, in one call of `add_lora_multi`.

        `gate_up_lora_a` is `[L, 2 R, H]`. `gate_up_lora_b` is `[L, 2 N, R]`, or two `[L, N, R]`.
        """
        if isinstance(gate_up_lora_b, tuple):
            stacks = [*gate_up_lora_b]
        else:
            stacks = jnp.split(_array(gate_up_lora_b), 2, axis=1)
        operands = x, gate_up_lora_a, stacks, base_output, scalings, token_indices
        return _add_slices(*operands, lora_b_output_sharding)


def _add_slices(
    x: Array,
    lora_a: Array,
    stacks: Sequence[Array],
    base_output: Array,
    scalings: Array,
    token_indices: Array,
    sharding: NamedSharding,
) -> Array:
    """base_output with the nth of `stacks` added to the columns behind those of the ones before.

    The rows of the nth A stand behind those of the ones before, likewise.
    """
    rows, count = _axes(x)[0], len(stacks)
    starts = [0, *itertools.accumulate(b.shape[1] for b in stacks)]

    def local(x: Array, a: Array, y: Array, scalings: Array, ids: Array, *stacks: Array) -> Array:
        parts = [
            LoRAPart(own, b, y_offset=start)
            for own, b, start in zip(jnp.split(a, count, axis=1), stacks, starts)
        ]
        ids, weights = _in_use(ids, scalings)[:, None], scalings[:, None]
        return add_lora_multi(y, x, parts, ids, weights=weights)

    operands = x, lora_a, base_output, scalings, token_indices, *stacks
    by_row = P(rows, None), P(), P(rows, None), P(rows), P(rows)
    specs = *by_row, *[P()] * count
    return _on_mesh(local, operands, specs, P(rows, None), sharding)


def _in_use(ids: Array, scalings: Array) -> Array:
    """The ids, -1 for padding and for tokens of the base model, which sglang-jax scales by 0."""
    return jnp.where(scalings == 0, -1, ids)


def _on_mesh(
    local: Callable[..., Array],
    operands: Sequence[Array],
    specs: tuple[P, ...],
    out_spec: P,
    sharding: NamedSharding,
) -> Array:
    """`local` of each device's part of the operands, as `sharding` wants the result."""
    mesh = sharding.mesh
    on_mesh = [resharded(_array(t), NamedSharding(mesh, spec)) for t, spec in zip(operands, specs)]
    # The check has no types for what is written in place; no gradient depends on it here.
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)
    return resharded(jax.jit(run)(*on_mesh), sharding)


def _axes(array: Array) -> P:
    """The axes of the mesh that divide each axis of `array`, as far as its type says so."""
    return jax.typeof(_array(array)).sharding.spec


def _array(array: Array) -> Array:
    """`array`, out of the `nnx.Param` in which sglang-jax's layers hold their stacks."""
    return jnp.asarray(array)
