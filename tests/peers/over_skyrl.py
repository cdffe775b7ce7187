"""A plugin of pytest: SkyRL-tx's linear layers get our `apply_lora`.

Its tests name models of Hugging Face's hub. They find small ones, with random weights, under the
same names in a cache of this process.
"""

import os
import pathlib
import tempfile

_CACHE = tempfile.TemporaryDirectory()
os.environ |= {"HF_HOME": _CACHE.name, "HF_HUB_OFFLINE": "1"}

import jax  # noqa: E402
import transformers  # noqa: E402
from skyrl.tx.layers import lora  # noqa: E402

from jax_lora.integrations import skyrl  # noqa: E402

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "dtype": "bfloat16",
}  # fmt: skip


def cache(name: str, config: transformers.PretrainedConfig) -> None:
    """Puts a model with random weights where the hub's library looks for `name`."""
    home = pathlib.Path(_CACHE.name, "hub", "models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(home / "snapshots" / ("0" * 40))


cache("unsloth/Llama-3.2-1B", transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
cache("Qwen/Qwen3-0.6B", transformers.Qwen3Config(**SIZES, tie_word_embeddings=True))
jax.config.update("jax_num_cpu_devices", 2)  # as their conftest does
calls: list[None] = []


def counted(*args):
    calls.append(None)
    return skyrl.apply_lora(*args)


def pytest_sessionfinish():
    """The tests would pass without our call too."""
    assert calls


lora.LoRALinear.apply_lora = counted
