"""A decoder too small to be slow, random adapters for it, and its answers without an engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import make_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jax_lora import AdapterBank, apply_lora, use
from jax_lora.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_id=(0,),
)


def make_model(slots=2, buckets=(8, 16), *, config=CONFIG, scan=True):
    """With weights large enough that random adapters change what is said."""
    model = Llama(config, rngs=nnx.Rngs(0), scan=scan)
    apply_lora(model, slots=slots, buckets=buckets)
    return model, AdapterBank(model)


def decoder_adapter(seed, rank, *, config=CONFIG, alpha=None):
    """For all projections of all layers."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    sizes = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    layers = range(config.num_hidden_layers)
    features = {f"model.layers.{n}.{name}": size for n in layers for name, size in sizes.items()}
    return make_adapter(seed, rank, features=features, alpha=rank if alpha is None else alpha)


def letters():
    """A tokenizer of one character each: token n is chr(ord("@") + n), 0 an end token."""
    vocabulary = {"<end>": 0} | {chr(ord("@") + n): n for n in range(1, CONFIG.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens, batch):
    with use(batch):
        return nnx.merge(graphdef, state)(tokens)


SIZE = 64


def plain_logits(model, bank, adapter, tokens):
    """`[S, V]`: the model without a cache, with an adapter that is loaded."""
    padded = np.zeros((1, SIZE), np.int32)
    padded[0, : len(tokens)] = tokens
    batch = bank.batch([adapter], phase="prefill")
    return np.asarray(_logits(*nnx.split(model), padded, batch))[0, : len(tokens)]


def plain_answer(model, bank, adapter, prompt, count):
    """The most likely tokens, without the engine, up to an end token."""
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(int(plain_logits(model, bank, adapter, tokens)[-1].argmax()))
        if tokens[-1] in model.config.eos_token_id:
            break
    return tokens[len(prompt) :]


def plain_logprobs(model, bank, adapter, tokens):
    """The log-probability of each token but the first."""
    logits = jnp.asarray(plain_logits(model, bank, adapter, tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]]
