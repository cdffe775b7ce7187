"""What stands behind attention in a decoder's layer: an MLP, or a mixture of such experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jax_lora.models.config import LlamaConfig
from jax_lora.nn.experts import Experts, Pairs, call_experts, pairs_of
from jax_lora.nn.packed import call_packed


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    # JAX's default for float32 on GPUs is TF32, which keeps 10 bits.
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(inputs: int, outputs: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=precision_of(dtype),
        rngs=rngs,
    )


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`: SwiGLU, or with GELU."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_packed = config.packed_projections
        self.hidden_act = config.hidden_act
        if self.is_packed:
            self.gate_up_proj = linear(hidden, 2 * inner, bias, dtype, rngs)
        else:
            self.gate_proj = linear(hidden, inner, bias, dtype, rngs)
            self.up_proj = linear(hidden, inner, bias, dtype, rngs)
        self.down_proj = linear(inner, hidden, bias, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        if self.is_packed:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = call_packed((self.gate_proj, self.up_proj), x)
        return self.down_proj(_ACTIVATIONS[self.hidden_act](gate) * up)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class ExpertMLPs(nnx.Module):
    """An `MLP` of each expert, for pairs of a token and an expert."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def experts(inputs: int, outputs: int) -> Experts:
            return Experts(
                config.num_experts,
                inputs,
                outputs,
                dtype=dtype,
                param_dtype=dtype,
                precision=precision_of(dtype),
                rngs=rngs,
            )

        hidden, inner = config.hidden_size, config.intermediate_size
        self.hidden_act = config.hidden_act
        self.gate_proj, self.up_proj = experts(hidden, inner), experts(hidden, inner)
        self.down_proj = experts(inner, hidden)

    def __call__(self, x: Float[Array, "P H"], pairs: Pairs) -> Float[Array, "P H"]:
        gate, up = call_experts((self.gate_proj, self.up_proj), x, pairs)
        return self.down_proj(_ACTIVATIONS[self.hidden_act](gate) * up, pairs)


class SparseMLP(nnx.Module):
    """A mixture of experts: the sum of K of E MLPs, which a router chooses and weighs for each
    token."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.num_experts, self.num_chosen = config.num_experts, config.num_experts_per_tok
        self.is_normalised = config.norm_topk_prob
        self.gate = linear(config.hidden_size, self.num_experts, False, dtype, rngs)
        self.experts = ExpertMLPs(config, dtype, rngs)

    def __call__(self, x: Float[Array, "*lead H"]) -> Float[Array, "*lead H"]:
        logits = self.gate(x).reshape(-1, self.num_experts)
        weights, chosen = jax.lax.top_k(
            jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.num_chosen
        )
        if self.is_normalised:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        pairs = pairs_of(chosen, self.num_experts, x.shape[:-1])
        y = self.experts(pairs.gathered(x.reshape(-1, x.shape[-1])), pairs)
        return pairs.summed(y, weights).reshape(x.shape)
