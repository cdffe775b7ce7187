"""Small models of each family: config.json files of the hub with smaller numbers, random weights.

The keys are those of the files that the models' authors published, as far as a forward could read
them; only sizes are changed, and windows and contexts with them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**keys: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, **keys,
    }  # fmt: skip


def qwen(kind: int, **keys: Any) -> dict[str, Any]:
    return {
        "architectures": [f"Qwen{kind}ForCausalLM"], "model_type": f"qwen{kind}",
        "hidden_act": "silu", "max_window_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, **keys,
    }  # fmt: skip


def phi3(**keys: Any) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False,
        "embd_pdrop": 0.0, "hidden_act": "silu", "original_max_position_embeddings": 32,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, **keys,
    }  # fmt: skip


LONG = {"short_factor": [1.0, 1.1, 1.25, 1.5], "long_factor": [1.1, 1.9, 4.0, 7.5]}

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-1": {k: v for k, v in llama().items() if k not in ("mlp_bias", "attention_bias")}
    | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "Llama-3.2": llama(
        head_dim=8, rope_theta=500000.0, tie_word_embeddings=True, eos_token_id=[2, 3],
        rope_scaling={
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16, "rope_type": "llama3",
        },
    ),
    "SmolLM2": llama(
        is_llama_config=True, rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True,
        num_attention_heads=3, num_key_value_heads=1, hidden_size=24,
    ),
    "Llama-linear": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "Llama-dynamic": llama(
        rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=16
    ),
    "Llama-yarn": llama(
        rope_scaling={
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True
        }
    ),
    "Mistral-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 7,
        "tie_word_embeddings": False,
    },
    "Mistral-Nemo": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Qwen2.5": qwen(2),
    "Qwen2-window": qwen(2, use_sliding_window=True, sliding_window=6, tie_word_embeddings=False),
    "Qwen2.5-yarn": qwen(
        2, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}
    ),
    "Qwen3": qwen(3, attention_bias=False, head_dim=16, rope_scaling=None),
    "Mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "num_experts_per_tok": 2, "num_local_experts": 5, "output_router_logits": False,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "Qwen3-MoE": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 16, "hidden_act": "silu",
        "max_window_layers": 2, "mlp_only_layers": [], "moe_intermediate_size": 24,
        "norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    },
    "Gemma-2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
        "attn_logit_softcapping": 5.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 3.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 7,
    },
    "Gemma-3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 100, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 7, "sliding_window_pattern": 3,
    },
    "Gemma-3-linear": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 5,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
    },
    "Phi-3-4k": phi3(sliding_window=9),
    "Phi-3-128k": phi3(rope_scaling=LONG | {"type": "longrope"}),
    "Phi-3-128k-yarn": phi3(rope_scaling=LONG | {"type": "yarn"}, sliding_window=50),
    "Phi-4-mini": phi3(
        rope_scaling={
            "type": "longrope", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.1, 4.0, 7.5]
        },
        partial_rotary_factor=0.75, tie_word_embeddings=True,
    ),
}  # fmt: skip


def write_config(folder: Path, name: str) -> None:
    """The config.json of a family, as its author wrote it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | CONFIGS[name]))


def reference_of(folder: Path, seed: int = 0) -> Any:
    """A random model of Transformers for the config.json of the folder, without the weights' file.

    Norms and biases start at ones and zeros, which would hide mistakes; here they are random.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(seed)
    # Eager, as the fused attention of torch leaves the soft cap of the scores out.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight += 0.3 * torch.randn_like(weight)
    return model
