"""Greedy completions of a batch: one compiled prefill, one compiled decode step."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from jax_lora.batch import AdapterBatch, use
from jax_lora.models.config import LlamaConfig, end_tokens
from jax_lora.models.llama import KVCache, Llama, decode, prefill
from jax_lora.process import check_process
from jax_lora.serving.live import LiveModel, Structure
from jax_lora.serving.options import step_options

_Stepped = tuple[KVCache, Array, Array]  # the cache, each row's token, and whether it has ended


def _first_token(
    structure: Structure,
    leaves: list[Array],
    tokens: Array,
    lengths: Array,
    eos: Array,
    adapters: AdapterBatch | None,
    max_length: int,
) -> _Stepped:
    model = structure.merge(leaves)
    with use(adapters):
        logits, cache = prefill(
            model, model.init_cache(tokens.shape[0], max_length), tokens, lengths
        )
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return cache, token, (token[:, None] == eos[None]).any(axis=-1)


def _next_token(
    structure: Structure,
    leaves: list[Array],
    cache: KVCache,
    token: Array,
    done: Array,
    eos: Array,
    adapters: AdapterBatch | None,
) -> _Stepped:
    with use(adapters):
        logits, cache = decode(structure.merge(leaves), cache, token)
    token = jnp.where(done, token, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return cache, token, done | (token[:, None] == eos[None]).any(axis=-1)


@functools.cache
def _steps() -> tuple[Callable[..., _Stepped], Callable[..., _Stepped]]:
    # Jitted by the first call: before, nobody knows whether JAX will run on a GPU.
    options = step_options()
    first = jax.jit(
        _first_token, static_argnames=("structure", "max_length"), compiler_options=options
    )
    following = jax.jit(
        _next_token, static_argnames="structure", donate_argnames="cache", compiler_options=options
    )
    return first, following


def cache_size(positions: int) -> int:
    """The size of a cache that holds so many positions.

    Few sizes, as each has its own compiled decode step: 256, 512, 1024, 2048, 3072 and so on.
    """
    small = max(256, 1 << (positions - 1).bit_length())
    return min(small, -(-positions // 1024) * 1024) if positions > 1024 else small


def check_prompts(
    config: LlamaConfig, tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int
) -> None:
    """Whether `generate` takes these arguments for a model of this config; raises as it does."""
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or tokens.size == 0:
        raise ValueError(
            f"tokens must be [B, S] and lengths [B], got {tokens.shape} and {lengths.shape}"
        )
    if not (np.issubdtype(tokens.dtype, np.integer) and np.issubdtype(lengths.dtype, np.integer)):
        raise TypeError(f"tokens and lengths must be integers, got {tokens.dtype}, {lengths.dtype}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokens must lie in [0, {config.vocab_size}), got {tokens.min()} to {tokens.max()}"
        )
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(
            f"lengths must lie in [1, {tokens.shape[1]}], got {lengths.min()} to {lengths.max()}"
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r:.100}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    positions = config.max_position_embeddings
    if positions is not None and lengths.max() > positions:
        raise ValueError(
            f"the prompt of row {lengths.argmax()} has {lengths.max()} tokens; the model takes at "
            f"most {positions} (max_position_embeddings)"
        )


def generate(
    model: Llama,
    tokens: ArrayLike,
    lengths: ArrayLike,
    *,
    adapters: AdapterBatch | None = None,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
) -> np.ndarray:
    """Greedy completions of a batch of prompts, by one compiled prefill and one compiled decode.

    Nothing compiles again for another batch of the same shape, whatever its adapters. For prompts
    of another length the prefill does, and the decode where the cache is of another size, of which
    there are few. Other threads may load and evict adapters meanwhile; those of the batch stay as
    they are.

    Args:
      model: see `Llama`; with LoRA layers or without.
      tokens: `[B, S]` prompts, padded on the right with any valid tokens.
      lengths: `[B]` true lengths, 1 to S.
      adapters: each row's adapter, in either phase; None for the plain model.
      max_new_tokens: columns of the result; fewer are computed if all rows end before. It may lead
        beyond the config's `max_position_embeddings`, where a model computes what it was not
        trained for.
      eos_id: the token, or tokens, that end a row; None for those of the config, `()` for none.

    Returns:
      `[B, max_new_tokens]` int32. A row that has ended repeats its last token.

    Raises:
      TypeError: tokens, lengths or `max_new_tokens` are not integers.
      ValueError: shapes, lengths or tokens are out of range; or a prompt is longer than the
        config's `max_position_embeddings`.
      RuntimeError: this process was forked from one that had used JAX.
    """
    check_process()
    prompts, sizes = np.asarray(tokens), np.asarray(lengths)
    check_prompts(model.config, prompts, sizes, max_new_tokens)
    max_new_tokens = int(max_new_tokens)
    ends = model.config.eos_token_id if eos_id is None else end_tokens(eos_id)
    eos = np.asarray(ends or (-1,), np.int32)
    by_phase = (
        {"prefill": None, "decode": None}
        if adapters is None
        else {
            # Through "decode", which drops the lengths of a flat layout: here rows are [B, S].
            phase: adapters.with_phase("decode").with_phase(phase)
            for phase in ("prefill", "decode")
        }
    )
    live = LiveModel(model)
    first_token, next_token = _steps()
    cache, token, done = live.call(
        functools.partial(first_token, max_length=cache_size(prompts.shape[1] + max_new_tokens)),
        prompts.astype(np.int32),
        sizes.astype(np.int32),
        eos,
        by_phase["prefill"],
    )
    columns = [token]
    while len(columns) < max_new_tokens and not (ends and np.asarray(done).all()):
        cache, token, done = live.call(next_token, cache, token, done, eos, by_phase["decode"])
        columns.append(token)
    columns += [token] * (max_new_tokens - len(columns))
    return np.stack([np.asarray(column) for column in columns], axis=1)
