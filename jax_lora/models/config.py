"""What a Llama's forward depends on, read from the files of Hugging Face."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from jax_lora.adapters import read_json


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies; see Hugging Face's `rope_type="llama3"`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _check_positive(name, value)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a Llama's forward depends on, named as in the `config.json` of Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.max_position_embeddings is not None:
            _check_size("max_position_embeddings", self.max_position_embeddings)
        for name in ("rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if (value := getattr(self, name)) not in (True, False):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of a `config.json`.

        Raises:
          ValueError: a key is missing, or asks for something that is not implemented.
        """
        for key, allowed in _IMPLEMENTED.items():
            if key in values and values[key] not in allowed:
                raise ValueError(
                    f"{key}={values[key]!r} is not supported; it must be one of {list(allowed)}"
                )
        if missing := [name for name in _SIZES[:5] if values.get(name) is None]:
            raise ValueError(f"config.json lacks {missing}; is it that of a Llama?")
        found = {
            f.name: values[f.name]
            for f in dataclasses.fields(cls)
            if values.get(f.name) is not None
        }
        for name in _SIZES[:5]:
            _check_size(name, found[name])
        heads = found["num_attention_heads"]
        found.setdefault("num_key_value_heads", heads)
        found.setdefault("head_dim", found["hidden_size"] // heads)
        rope = _rope_values(values)
        return cls(
            **found
            | {
                "rope_theta": rope.get("rope_theta", found.get("rope_theta", 10000.0)),
                "rope_scaling": _rope_scaling(rope, values),
                "eos_token_id": end_tokens(found.get("eos_token_id", ())),
            }
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """From a folder's `config.json`, with the end tokens of its `generation_config.json`.

        As in Transformers, the `eos_token_id` of the latter replaces that of the former.

        Raises:
          FileNotFoundError: there is no such folder, or no `config.json` in it.
          ValueError: a file is malformed, or asks for something that is not implemented.
        """
        folder, generation = Path(path), "generation_config.json"
        config = cls.from_dict(read_json(folder, "config.json"))
        if not os.path.lexists(folder / generation):
            return config
        if (ends := read_json(folder, generation).get("eos_token_id")) is None:
            return config
        try:
            return dataclasses.replace(config, eos_token_id=end_tokens(ends))
        except ValueError as error:
            raise ValueError(f"{folder / generation}: {error}") from None


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Keys by which a checkpoint may ask for what is not implemented. Whatever else config.json holds,
# the forward of Hugging Face's Llama doesn't read.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
}


def end_tokens(value: object) -> tuple[int, ...]:
    """One token, or several, as an `eos_token_id` gives them.

    Raises:
      ValueError: it holds something else than integers.
    """
    tokens = (value,) if isinstance(value, int | np.integer) else value
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if not isinstance(tokens, list | tuple):
        raise ValueError(f"eos_token_id must be an integer or several, got {value!r:.100}")
    for token in tokens:
        is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not (is_integer and abs(token) <= _INT32_MAX):
            raise ValueError(f"eos_token_id must hold integers of 32 bits, got {token!r:.100}")
    return tuple(map(int, tokens))


_INT32_MAX = 2**31 - 1


def _rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # Transformers 5 writes rope_parameters, with rope_theta among them; older versions rope_scaling
    # beside rope_theta. Where a config has both, both versions read rope_scaling alone.
    for key in ("rope_scaling", "rope_parameters"):
        if rope := values.get(key):
            if not isinstance(rope, dict):
                raise ValueError(f"{key} must be an object, got {rope!r:.100}")
            return rope
    return {}


def _rope_scaling(rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; it must be 'default' or 'llama3'")
    parameters: dict[str, Any] = {f.name: rope.get(f.name) for f in dataclasses.fields(RopeScaling)}
    if parameters["original_max_position_embeddings"] is None:
        parameters["original_max_position_embeddings"] = values.get("max_position_embeddings")
    return RopeScaling(**parameters)


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive number, got {value!r}")
