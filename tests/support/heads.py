"""A PEFT model with adapters of heads and embeddings, its folders, and a bank that serves them."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx

import jax_lora
from jax_lora.llama import Llama

LENGTH = 9


class Pair:
    """One model in torch, with an adapter of each of some options, and in JAX."""

    def __init__(
        self, folder: Path, family: str, adapters: dict[str, dict[str, Any]], **options: Any
    ) -> None:
        families.write_config(folder / "base", family)
        base = families.reference_of(folder / "base").eval()
        base.save_pretrained(folder / "base")
        if (labels := options.get("num_labels")) is not None:
            auto = transformers.AutoModelForSequenceClassification
            base = auto.from_pretrained(folder / "base", num_labels=labels).eval()
        self.folder, self.torch = folder, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, and of what save_pretrained adds
            for name, lora in adapters.items():
                config = peft.LoraConfig(**{"init_lora_weights": False, **lora})
                if self.torch is None:
                    kinds = {"SEQ_CLS": peft.PeftModelForSequenceClassification}
                    kind = kinds.get(lora.get("task_type"), peft.PeftModel)
                    self.torch = kind(base, config, adapter_name=name)
                else:
                    self.torch.add_adapter(name, config)
            self.change()
            self.torch.save_pretrained(folder)
        of_model = {key: options.pop(key) for key in ("scan", "num_labels") if key in options}
        self.model = Llama.from_pretrained(folder / "base", dtype=jnp.float32, **of_model)
        jax_lora.apply_lora(self.model, **options)
        self.bank = jax_lora.AdapterBank(self.model)
        self._forward = nnx.jit(_forward)

    def change(self) -> None:
        """Gives what PEFT has copied from the base other values, as a training does."""
        generator = torch.Generator().manual_seed(1)
        for key, value in self.torch.named_parameters():
            if "modules_to_save" in key or "trainable_tokens_delta" in key:
                value.data += 0.3 * torch.randn(value.shape, generator=generator)

    def load(self, *names: str, **options: Any) -> None:
        for name in names:
            self.bank.load(name, self.folder / name, **options)

    def logits(self, names: list[str | None], tokens: np.ndarray, phase: str) -> np.ndarray:
        return np.asarray(self._forward(self.model, tokens, self.bank.batch(names, phase=phase)))

    def expected(self, name: str | None, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            if name is None:
                with self.torch.disable_adapter():
                    return self.torch(torch.tensor(tokens)).logits.numpy()
            self.torch.set_adapter(name)
            return self.torch(torch.tensor(tokens)).logits.numpy()

    def check(self, names: list[str | None], seed: int, phase: str = "prefill") -> None:
        """Each row is what PEFT computes with its adapter alone, and none is the base model's."""
        tokens = np.random.default_rng(seed).integers(3, 61, (len(names), LENGTH), dtype=np.int32)
        tokens[:, :4] = [4, 7, 9, 20]  # those that adapters train are among them
        got = self.logits(names, tokens, phase)
        for row, name in enumerate(names):
            one = tokens[row : row + 1]
            want, plain = self.expected(name, one), self.expected(None, one)
            np.testing.assert_allclose(got[row : row + 1], want, atol=1e-4, err_msg=f"{name}")
            assert name is None or np.abs(want - plain).max() > 1e-2


def _forward(model: Llama, tokens: jax.Array, batch: jax_lora.AdapterBatch) -> jax.Array:
    with jax_lora.use(batch):
        return model(tokens)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiles while the block runs."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
