"""What a decoder's forward depends on, read from the files of Hugging Face."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from jax_lora.adapters import read_json
from jax_lora.messages import shown
from jax_lora.models.families import Family, Json, family_of
from jax_lora.models.rope import Rope, RopeScaling, check_positive


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a decoder's forward depends on, named as in the `config.json` of Hugging Face.

    The features that no config.json has a key for say how a family differs from Llama:

    Attributes:
      qkv_bias: biases of query, key and value alone; `attention_bias` is of the output too.
      qk_norm: queries and keys are normalised, head by head.
      packed_projections: query, key and value are one layer, gate and up another.
      mixtral_names: files call the experts' MLP `block_sparse_moe`, with `w1`, `w3` and `w2`.
      zero_centered_norms: norms multiply by 1 + scale, in float32.
      sandwich_norms: attention and MLP have a norm behind them too.
      scaled_embeddings: embeddings are multiplied by the root of `hidden_size`.
      layer_types: "sliding_attention" or "full_attention" of each layer; None for the first of all
        layers where there is a `sliding_window`, else for the second.
      local_rope: of the layers with sliding attention; None for that of the others.
      num_experts: in each layer, each with an MLP of `intermediate_size`; 0 for one plain MLP.
      num_experts_per_tok: how many of them a token has.
      norm_topk_prob: whether the weights of a token's experts sum to 1.
    """

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
    partial_rotary_factor: float = 1.0
    local_rope: Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    packed_projections: bool = False
    mixtral_names: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    zero_centered_norms: bool = False
    sandwich_norms: bool = False
    scaled_embeddings: bool = False
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        for name in ("max_position_embeddings", "sliding_window"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        _check_size("num_experts", self.num_experts, least=0)
        _check_size("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts_per_tok > max(self.num_experts, 1):
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be at most num_experts="
                f"{self.num_experts}"
            )
        check_positive("rms_norm_eps", self.rms_norm_eps)
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            if (number := getattr(self, name)) is not None:
                check_positive(name, number)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        for field in dataclasses.fields(self):
            if field.type is bool and (value := getattr(self, field.name)) not in (True, False):
                raise ValueError(f"{field.name} must be true or false, got {shown(value)}")
        for kind in self.attention_kinds:
            kind.rope.check(self.head_dim)

    @functools.cached_property
    def kinds_of_layers(self) -> tuple["AttentionKind", ...]:
        """How each layer attends."""
        rope = Rope(self.rope_theta, self.rope_scaling, self.partial_rotary_factor)
        kinds = {"full_attention": AttentionKind(rope, None)}
        if self.sliding_window is not None:
            local = AttentionKind(self.local_rope or rope, self.sliding_window)
            kinds["sliding_attention"] = local
        names = self.layer_types
        if names is None:
            names = (list(kinds)[-1],) * self.num_hidden_layers
        if len(names) != self.num_hidden_layers or not set(names) <= kinds.keys():
            raise ValueError(
                f"layer_types must hold {' or '.join(kinds)} for each of the "
                f"{self.num_hidden_layers} layers (sliding_window={self.sliding_window}), got "
                f"{shown(names)}"
            )
        return tuple(kinds[name] for name in names)

    @property
    def attention_kinds(self) -> tuple["AttentionKind", ...]:
        """The ways to attend that layers have, each once."""
        return tuple(dict.fromkeys(self.kinds_of_layers))

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """From the contents of a `config.json`.

        Raises:
          ValueError: a key is missing, or asks for something that is not implemented.
        """
        family = family_of(values)
        # Where a family has a default, null says something else.
        defaults = {key: value for key, value in family.defaults.items() if key not in values}
        given = defaults | {key: value for key, value in values.items() if value is not None}
        if missing := [name for name in _SIZES[:5] if name not in given]:
            raise ValueError(f"config.json lacks {missing}; is it that of a language model?")
        for name in _SIZES[:5]:
            _check_size(name, given[name])
        heads = given["num_attention_heads"]
        given.setdefault("num_key_value_heads", heads)
        given.setdefault("head_dim", given["hidden_size"] // heads)
        read = _READ | family.reads
        return cls(
            **{
                **{key: value for key, value in given.items() if key in read},
                **family.fixed,
                **_windows(family, given),
                **_experts(family, given),
                **_ropes(family, given),
                "eos_token_id": end_tokens(given.get("eos_token_id", ())),
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

# What every family has.
_READ = frozenset(
    {*_SIZES, "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "eos_token_id"}
)


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """How a layer attends: its rotary embedding, and how many tokens back it sees (None: all)."""

    rope: Rope
    window: int | None


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


def _windows(family: Family, given: Json) -> Json:
    """`sliding_window` and `layer_types`, from the forms that the families have for them."""
    if "sliding_window" not in family.reads:
        return {}
    window, types = given.get("sliding_window"), given.get("layer_types")
    if not given.get("use_sliding_window", True):  # Qwen's
        return {"sliding_window": None, "layer_types": None}
    if types is None and window is not None and "layer_types" in family.reads:
        layers = range(given["num_hidden_layers"])
        known = {**family.defaults, **given}  # here null says nothing
        if "max_window_layers" in family.defaults:  # Qwen's
            first = known["max_window_layers"]
            _check_size("max_window_layers", first, least=0)
            types = _types(i >= first for i in layers)
        else:
            pattern = known["sliding_window_pattern"]
            _check_size("sliding_window_pattern", pattern)
            types = _types((i + 1) % pattern != 0 for i in layers)
    elif types is not None:
        if not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
            raise ValueError(f"layer_types must be a list of names, got {shown(types)}")
        types = tuple(types)
    return {"sliding_window": window, "layer_types": types}


def _experts(family: Family, given: Json) -> Json:
    """How many experts there are, and their size, by the names that the families have for them."""
    if "num_experts_per_tok" not in family.reads:
        return {}
    counts = [given[name] for name in ("num_local_experts", "num_experts") if name in given]
    if not counts:
        raise ValueError("config.json lacks num_local_experts, or num_experts")
    size = given.get("moe_intermediate_size", given["intermediate_size"])
    return {"num_experts": counts[0], "intermediate_size": size}


def _types(are_sliding: Iterable[bool]) -> tuple[str, ...]:
    return tuple("sliding_attention" if s else "full_attention" for s in are_sliding)


def _ropes(family: Family, given: Json) -> Json:
    """The fields for rotary embeddings."""
    rope, local_theta = _rope_values(given), given.get("rope_local_base_freq")
    positions = given.get("max_position_embeddings")
    by_kind = {k: rope[k] for k in ("full_attention", "sliding_attention") if rope.get(k)}
    if not all(isinstance(kind, dict) for kind in by_kind.values()):
        raise ValueError(f"rope_parameters by kind of layer must be objects, got {shown(rope)}")
    if by_kind and local_theta is None:
        raise ValueError(f"rope_parameters by kind of layer are not supported: {shown(rope)}")
    beside = {k: given[k] for k in ("partial_rotary_factor",) if k in given}
    full = {**beside, **(by_kind.get("full_attention", {}) if by_kind else rope)}
    if "original_max_position_embeddings" in family.defaults:  # Phi-3 has it outside, and it counts
        name = "original_max_position_embeddings"
        full[name] = given.get(name, family.defaults[name])
    found = Rope.of(full, positions, given.get("rope_theta"))
    partial = found.partial_rotary_factor
    if partial != 1 and "partial_rotary_factor" not in family.reads:
        raise ValueError(
            f"partial_rotary_factor={partial} is not supported for {family.architecture}"
        )
    return {
        "rope_theta": found.theta,
        "rope_scaling": found.scaling,
        "partial_rotary_factor": partial,
        "local_rope": None
        if local_theta is None
        else Rope.of(by_kind.get("sliding_attention", {}), positions, local_theta),
    }


def _rope_values(values: Json) -> Json:
    # Transformers 5 writes rope_parameters, with rope_theta among them; older versions rope_scaling
    # beside rope_theta. Where a config has both, both versions read rope_scaling alone.
    for key in ("rope_scaling", "rope_parameters"):
        if rope := values.get(key):
            if not isinstance(rope, dict):
                raise ValueError(f"{key} must be an object, got {shown(rope)}")
            return rope
    return {}


_MAX_LAYERS = 4096  # what layers are is listed one by one


def _check_size(name: str, value: object, least: int = 1) -> None:
    most = _MAX_LAYERS if name == "num_hidden_layers" else _INT32_MAX
    if type(value) is not int or not least <= value <= most:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        bound = f", at most {most}" if type(value) is int and value > most else ""
        raise ValueError(f"{name} must be {what}{bound}, got {shown(value)}")
