"""Times SkyRL-tx's steps with its own `apply_lora`, and with ours in its place.

    PYTHONPATH=.peers/projects/skyrl:. python3 benchmarks/peers/skyrl_steps.py

(`tests/peers/run.sh skyrl` fetches SkyRL.) The model is SkyRL-tx's Llama 3 with four layers of
Llama-3-8B's sizes and 8 adapters of rank 16, bfloat16, weights random. Times are milliseconds of
the median of seven runs, in turns: 4096 tokens forward; the same with the gradients of all
adapters; and a decode step of 64 rows, in a jitted loop of 32 as in SkyRL-tx's generator.
"""

import argparse
import concurrent.futures
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from skyrl.tx.layers import lora
from skyrl.tx.models.configs import Llama3Config
from skyrl.tx.models.llama3 import Llama3ForCausalLM
from skyrl.tx.utils.generator import KVCache
from transformers import LlamaConfig

from jax_lora.integrations import skyrl

ADAPTERS, RANK, STEPS = 8, 16, 32
SIZES: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16",
}  # fmt: skip
SMALL = {
    **SIZES, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
THEIRS = lora.LoRALinear.apply_lora
Step = jax.stages.Wrapped


def make(sizes: dict[str, Any]) -> Llama3ForCausalLM:
    config = Llama3Config(
        LlamaConfig(**sizes, tie_word_embeddings=False),
        max_lora_adapters=ADAPTERS,
        max_lora_rank=RANK,
        shard_attention_heads=False,
    )
    return Llama3ForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def steps(graphdef: nnx.GraphDef[Llama3ForCausalLM]) -> dict[str, Step]:
    """Jitted functions of (adapters, rest, tokens, adapter of each row); traced when first called,
    with the `apply_lora` of then."""

    def loss(own: nnx.State, rest: nnx.State, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, own, rest)
        mask = jnp.ones_like(tokens)
        out = model(tokens, attention_mask=mask, adapter_indices=ids, is_training=True)
        logits = model.compute_logits(out.last_hidden_state, ids).astype(jnp.float32)
        targets = jnp.take_along_axis(logits, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - targets)

    def decode(own: nnx.State, rest: nnx.State, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, own, rest)
        config, (rows, room) = model.config, tokens.shape
        shape = rows, room, config.num_key_value_heads, config.head_dim
        empty = [jnp.zeros(shape, jnp.bfloat16)] * config.num_hidden_layers
        cache = KVCache(list(empty), list(empty), jnp.zeros(rows, jnp.int32))
        layers = model.get_decode_layers()  # once, outside of the loop

        def turn(n: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            token, cache = carry
            position = jnp.full((rows, 1), n)
            mask = jnp.broadcast_to(jnp.arange(room) <= n, (rows, room)).astype(jnp.int32)
            out = model(
                token, attention_mask=mask, positions=position, kv_cache=cache,
                adapter_indices=ids, decode_layers=layers,
            )  # fmt: skip
            logits = model.compute_logits(out.last_hidden_state, ids)
            return jnp.argmax(logits, -1).astype(jnp.int32), out.kv_cache

        return jax.lax.fori_loop(0, STEPS, turn, (tokens[:, :1], cache))[0]

    return {
        "forward": jax.jit(loss),
        "backward": jax.jit(jax.grad(loss)),
        "decode": jax.jit(decode),
    }


def rows_of(step: str, small: bool) -> tuple[jax.Array, jax.Array]:
    rows, length = (64, 128) if step == "decode" else (8, 512)
    if small:
        rows, length = 8, 64
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, 256)
    return tokens, jnp.arange(rows, dtype=jnp.int32) % ADAPTERS


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return (time.perf_counter() - start) * 1e3 / repeats


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--small", action="store_true", help="sizes for a CPU, which proves nothing"
    )
    small = parser.parse_args().small
    started = time.perf_counter()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = make(SMALL if small else SIZES)
        graphdef, *(own, rest) = nnx.split(model, model.is_lora_param, ...)
        own = jax.tree.map(lambda t: t + jnp.asarray(0.001, t.dtype), own)
        lowered, arguments = {}, {}
        for whose, apply in (("theirs", THEIRS), ("ours", skyrl.apply_lora)):
            lora.LoRALinear.apply_lora = apply
            for name, step in steps(graphdef).items():
                arguments[name, whose] = own, rest, *rows_of(name, small)
                lowered[name, whose] = step.lower(*arguments[name, whose])
        with concurrent.futures.ThreadPoolExecutor() as threads:
            compiled = dict(zip(lowered, threads.map(lambda one: one.compile(), lowered.values())))
        calls = {key: functools.partial(compiled[key], *arguments[key]) for key in compiled}
        print(f"compiled after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        repeats = 1 if small else 5
        found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(2 if small else 7):
            for key, call in calls.items():
                found[key].append(
                    milliseconds(call, repeats) / (STEPS if key[0] == "decode" else 1)
                )
    for (name, whose), times in found.items():
        row = {"step": name, "apply_lora": whose, "ms": round(statistics.median(times), 3)}
        print(json.dumps({**row, "device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    main()
