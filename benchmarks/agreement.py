"""How far the trainer's log-probabilities are from the sampler's, and the deltas of adapters too.

A rollout samples a token at a time, with a cache; training reads whole sequences. Both run the same
adapters, by other products of other shapes, and round in other places.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.pictures import check_path
from jax_lora.adapters import load_peft
from jax_lora.bank import AdapterBank
from jax_lora.batch import AdapterBatch, use
from jax_lora.demo import tasks
from jax_lora.demo.job import FOLDER, MAX_NEW_TOKENS, Steps, adapter_paths
from jax_lora.generation import encode, fitting_slots, load_tokenizer
from jax_lora.llama import Llama
from jax_lora.nn.apply import apply_lora
from jax_lora.nn.stacks import LoRAScale
from pallas_kernels import LoRAPart, lora_delta


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Log-probabilities of the tokens of rollouts.

    Attributes:
      dtype: of weights and computation.
      sampled, trained: of each token, by the decode steps and by the training forward.
      adapted: whether the token's row has an adapter.
    """

    dtype: str
    sampled: np.ndarray
    trained: np.ndarray
    adapted: np.ndarray

    def difference(self, *, adapted: bool) -> np.ndarray:
        """How far the two are apart, token by token: in rows with an adapter, or in those without,
        which tell what the base model's own rounding gives."""
        of_all: np.ndarray = np.abs(self.sampled - self.trained)
        return of_all[self.adapted == adapted]

    @property
    def line(self) -> str:
        with_, without = (self.difference(adapted=adapted) for adapted in (True, False))
        return (
            f"{self.dtype:9} {with_.size:5} tokens with an adapter: mean {with_.mean():.1e}, at "
            f"most {with_.max():.1e}; {without.size:4} without: mean {without.mean():.1e}, at most "
            f"{without.max():.1e}"
        )


def run(
    dtype: str,
    progress: Callable[[str], None],
    chosen: Collection[str] | None = None,
    rounds: int = 4,
) -> Agreement:
    """Rollouts of bundled adapters and of the base model, read again as a trainer does.

    Their tokens are drawn at random: of those that the model would choose it is so sure that no
    rounding shows.

    Args:
      chosen: names of the adapters; None for all.
      rounds: rows of each adapter, each about another word.
    """
    progress(f"sampling in {dtype}")
    model = Llama.from_pretrained(FOLDER / "base", dtype=jnp.dtype(dtype))
    bank, names = bank_of(model, chosen, rounds)
    words = [word for word in tasks.EVERYDAY_WORDS if tasks.is_clear(word)][: len(names)]
    prompts, lengths = encode(load_tokenizer(FOLDER / "base"), [f"{word}:" for word in words])
    graphdef, *(_, rest) = nnx.split(model, nnx.Any(nnx.LoRAParam, LoRAScale), ...)
    steps = Steps(graphdef, len(names), prompts.shape[1] + MAX_NEW_TOKENS)
    batch = bank.batch(names, phase="prefill")
    drawn = np.random.default_rng(0).integers(
        model.config.vocab_size, size=(MAX_NEW_TOKENS, len(names))
    )
    tokens = drawn.astype(np.int32)
    logits, _ = steps.logits((bank.state, rest), prompts, lengths, batch, forced=tokens)
    sampled = _chosen(logits, tokens).T  # [B, steps]
    progress(f"reading {sampled.size} tokens again")
    trained = _trained(model, batch, prompts, lengths, tokens.T)
    adapted = np.array([name is not None for name in names]).repeat(MAX_NEW_TOKENS)
    return Agreement(dtype, sampled.reshape(-1), trained.reshape(-1), adapted)


def bank_of(
    model: Llama, chosen: Collection[str] | None, rounds: int
) -> tuple[AdapterBank, list[str | None]]:
    """Bundled adapters, and which row has which."""
    paths = {n: path for n, path in adapter_paths().items() if chosen is None or n in chosen}
    adapters = {name: load_peft(path, allow_links=True) for name, path in paths.items()}
    slots = fitting_slots([adapter.rank for adapter in adapters.values()])
    apply_lora(model, slots=slots, buckets=tuple(slots))
    bank = AdapterBank(model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return bank, [*adapters, None] * rounds


def _chosen(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The log-probabilities of the tokens."""
    all_of_them = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    return np.take_along_axis(all_of_them, tokens[..., None], axis=-1)[..., 0]


def _trained(
    model: Llama,
    batch: AdapterBatch,
    prompts: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
) -> np.ndarray:
    """The log-probabilities of rollouts `[B, steps]`, by one forward over whole sequences."""
    rows, new = tokens.shape
    sequences = np.zeros((rows, prompts.shape[1] + new), np.int32)
    sequences[:, : prompts.shape[1]] = prompts
    places = lengths[:, None] + np.arange(new)
    np.put_along_axis(sequences, places, tokens, axis=1)
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: nnx.State, sequences: jax.Array, batch: AdapterBatch) -> jax.Array:
        with use(batch):
            return nnx.merge(graphdef, state)(sequences)

    logits = np.asarray(forward(state, sequences, batch))
    before = np.take_along_axis(logits, places[..., None] - 1, axis=1)
    return _chosen(before, tokens)


def delta_ulps(rows: int = 64, tokens: int = 512) -> float:
    """The largest difference of the two phases' deltas of the same bfloat16 rows, in units of
    bfloat16's spacing at the row's largest value."""
    features, width, rank, slots = 1024, 512, 16, 4
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, features), jnp.bfloat16)
    a = jax.random.normal(keys[1], (slots, rank, features), jnp.bfloat16) * features**-0.5
    b = jax.random.normal(keys[2], (slots, width, rank), jnp.bfloat16) * rank**-0.5
    ids = jax.random.randint(keys[3], (tokens,), 0, slots)
    part = LoRAPart(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    [whole] = lora_delta(x, [part], ids, (width,), phase="prefill")
    [some] = lora_delta(x[:rows], [part], ids[:rows], (width,), phase="decode")
    one, other = (np.asarray(delta, np.float32) for delta in (whole[:rows], some))
    largest = np.abs(one).max(axis=1, keepdims=True)
    spacing = 2.0 ** (np.floor(np.log2(largest)) - 7)  # bfloat16 has 8 bits
    return float((np.abs(one - other) / spacing).max())


def draw(agreements: list[Agreement], path: Path) -> None:
    """How many tokens differ by how much, with adapters and without.

    Raises:
      ValueError: as `pictures.check_path`.
    """
    check_path(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, found in zip(figure.subplots(1, len(agreements), squeeze=False)[0], agreements):
        of_rows = [found.difference(adapted=adapted) for adapted in (True, False)]
        least = max(
            min(difference[difference > 0].min(initial=1.0) for difference in of_rows), 1e-9
        )
        bins = np.geomspace(least, max(d.max() for d in of_rows) * 1.01 + least, 40)
        for difference, label in zip(of_rows, ("with an adapter", "base model alone")):
            share = np.full(difference.size, 1 / difference.size)
            ax.hist(np.maximum(difference, least), bins, weights=share, alpha=0.6, label=label)
        ax.set(xscale="log", xlabel="difference of log-probabilities", ylabel="share of the tokens")
        ax.set_title(found.dtype, loc="left")
        ax.legend(frameon=False)
    figure.suptitle(f"Decode steps and training forward on {jax.devices()[0].device_kind}")
    figure.savefig(path, dpi=120)
