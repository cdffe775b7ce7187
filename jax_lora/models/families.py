"""The families of models: what each fixes, and what its config.json may leave out.

All of them are one decoder. A row of the table says by which features of `LlamaConfig` a family
differs from Llama; whatever else its config.json holds, its forward doesn't read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_lora.messages import shown

type Json = Mapping[str, Any]
"""An object of a JSON file."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      architecture: the class of Transformers that computes it.
      fixed: features that all its models have; fields of `LlamaConfig`.
      defaults: values of keys that a config.json may leave out.
      reads: keys that its forward reads, beside those that every family has.
    """

    architecture: str
    fixed: Json = dataclasses.field(default_factory=dict)
    defaults: Json = dataclasses.field(default_factory=dict)
    reads: frozenset[str] = frozenset()


_GEMMA_FIXED: Json = {
    "zero_centered_norms": True,
    "sandwich_norms": True,
    "scaled_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA_DEFAULTS: Json = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA_READS = {"attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"}
_WINDOWS = {"sliding_window", "layer_types"}
_QWEN_DEFAULTS: Json = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", reads=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        reads=frozenset({"sliding_window"}),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        reads=frozenset(_WINDOWS),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        reads=frozenset({"attention_bias", *_WINDOWS}),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        fixed={"mixtral_names": True, "norm_topk_prob": True},
        defaults={
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        reads=frozenset({"sliding_window", "num_experts_per_tok"}),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fixed={"qk_norm": True},
        defaults={**_QWEN_DEFAULTS, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
        reads=frozenset(
            {"attention_bias", "sliding_window", "num_experts_per_tok", "norm_topk_prob"}
        ),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed=_GEMMA_FIXED,
        defaults={
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        reads=frozenset({"attn_logit_softcapping", *_GEMMA_READS, *_WINDOWS}),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={**_GEMMA_FIXED, "qk_norm": True},
        defaults={
            **_GEMMA_DEFAULTS,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        reads=frozenset({*_GEMMA_READS, *_WINDOWS}),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        fixed={"packed_projections": True},
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        reads=frozenset({"sliding_window", "partial_rotary_factor"}),
    ),
}

# Keys by which a checkpoint may ask for what no family implements.
_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "pretraining_tp": (1, None),
    "use_bidirectional_attention": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}

_DEQUANTISE = (
    "dequantise it where its tools run, in Python: from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained(MODEL).dequantize().save_pretrained(FOLDER)"
)
_UNQUANTISED = "give the unquantised model that it was made from"
_REMEDIES = {"bitsandbytes": f"{_UNQUANTISED}, or {_DEQUANTISE}"}


def family_of(values: Json) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: it is of none, its weights are quantised, or it asks for something that is not
        implemented.
    """
    kind = values.get("model_type", "llama")
    if not (isinstance(kind, str) and kind in FAMILIES):
        more = "; of Gemma 3 the models without images are" if kind == "gemma3" else ""
        raise ValueError(
            f"model_type={shown(kind)} is not supported{more}; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    if values.get("architectures") not in ([family.architecture], None):
        raise ValueError(
            f"architectures={shown(values['architectures'])} is not supported; it must be "
            f"{[family.architecture]}"
        )
    _refuse_quantised(values.get("quantization_config"))
    for key, allowed in _IMPLEMENTED.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"{key}={shown(values[key])} is not supported; leave it out")
    # Gemma's configs have both keys, and the second counts.
    key = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    expected = family.fixed.get("hidden_act", "silu")
    if values.get(key) not in (expected, None):
        raise ValueError(f"{key}={shown(values[key])} is not supported; it must be {expected!r}")
    return family


def _refuse_quantised(quantization: object) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method is None and isinstance(quantization, dict) and "load_in_4bit" in quantization:
        method = "bitsandbytes"
    remedy = _REMEDIES.get(str(method), _UNQUANTISED)
    raise ValueError(
        f"the weights are quantised by {shown(method)} (quantization_config), which is not "
        f"supported; {remedy}"
    )
