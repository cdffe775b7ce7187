"""What files call the parameters of a decoder, and the tensors that each is made of."""

from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jax_lora.models.config import LlamaConfig
from jax_lora.nn.names import ModulePath, Shape, path_name, with_numbers

LAYERS = ("model", "layers")
_IN_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_OF_MIXTRAL = {name: own for own, name in _IN_MIXTRAL.items()}


def module_name(path: ModulePath, config: LlamaConfig, *, scan: bool) -> str:
    """What files call a module: its path, with a `{}` for the number of a layer that is stacked,
    and for that of an expert."""
    parts: list[object] = []
    for end, part in enumerate(path, 1):
        is_stack = (scan and path[:end] == LAYERS) or part == "experts"
        parts += [part, "{}"] if is_stack else [part]
    name = path_name(list(map(str, parts)))
    return mixtral_name(name) if config.mixtral_names else name


def mixtral_name(name: str) -> str:
    """The name that Mixtral's author gave to a module of the experts' MLP, by that of others."""
    layer, found, inside = name.partition(".mlp.")
    if not found:
        return name
    *parts, last = inside.split(".")
    return ".".join((layer, "block_sparse_moe", *parts, _IN_MIXTRAL.get(last, last)))


def expert_name(name: str) -> str:
    """The inverse of the last part of `mixtral_name`: vLLM's stacked modules of experts have the
    names of Mixtral's author in other models too."""
    holder, found, inside = name.partition(".experts.")
    number, _, last = inside.partition(".")
    return f"{holder}{found}{number}.{_OF_MIXTRAL[last]}" if last in _OF_MIXTRAL else name


def peft_names(config: LlamaConfig, *, scan: bool) -> dict[str, str]:
    """PEFT's names of the layers whose paths are others; see `AdapterBank`."""
    names = {"model.embed_tokens.head": "lm_head"} if config.tie_word_embeddings else {}
    if not config.num_experts:
        return names
    layers = [LAYERS] if scan else [(*LAYERS, n) for n in range(config.num_hidden_layers)]
    ends = [("gate",), *(("experts", name) for name in _IN_MIXTRAL)]
    paths = [(*layer, "mlp", *end) for layer in layers for end in ends]
    return names | {path_name(path): module_name(path, config, scan=scan) for path in paths}


class Stored(NamedTuple):
    """The tensors that a parameter is made of.

    Attributes:
      names: of each, in the order of `lead`.
      lead: the axes in front of the parameter, of layers and of experts; () for one tensor.
    """

    names: list[str]
    lead: Shape
    is_kernel: bool

    def shape(self, param: nnx.Variable[Array]) -> Shape:
        """The shape of one of the tensors. Files hold kernels as `[N, H]`."""
        own = tuple(param.shape[len(self.lead) :])
        return own[::-1] if self.is_kernel else own

    def read(self, tensors: MutableMapping[str, np.ndarray], dtype: np.dtype) -> Array:
        """The parameter. Takes its tensors out."""
        values = [jnp.array(tensors.pop(name), dtype) for name in self.names]
        if self.is_kernel:  # on the device: NumPy would walk them in strides
            values = [value.T for value in values]
        if not self.lead:
            return values[0]
        return jnp.stack(values).reshape(*self.lead, *values[0].shape)


def stored(path: ModulePath, config: LlamaConfig, *, scan: bool) -> Stored:
    """Where a parameter's values stand in a checkpoint."""
    lead = tuple(_lead(path, config, scan))
    kind = "bias" if path[-1] == "bias" else "weight"
    name = f"{module_name(path[:-1], config, scan=scan)}.{kind}"
    return Stored(list(with_numbers(name, lead).values()), lead, path[-1] == "kernel")


def _lead(path: ModulePath, config: LlamaConfig, scan: bool) -> Iterator[int]:
    if scan and path[:2] == LAYERS:
        yield config.num_hidden_layers
    if "experts" in path:
        yield config.num_experts
