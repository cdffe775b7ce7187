"""The main job: prompts for every bundled adapter and for the base model, in one batch."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_lora.adapters import load_peft
from jax_lora.bank import AdapterBank
from jax_lora.batch import AdapterBatch, use
from jax_lora.demo import tasks
from jax_lora.generation import decode as decode_text
from jax_lora.generation import encode, fitting_slots, load_tokenizer
from jax_lora.llama import Llama, decode, prefill
from jax_lora.nn.apply import apply_lora
from jax_lora.nn.stacks import LoRAScale
from pallas_kernels import rank_tier, select_kernel

FOLDER = Path(__file__).parent
MAX_NEW_TOKENS = 17  # eight letters, each twice or with a hyphen, and the end

# Two float32 computations of the same logits, which reach about 30 in magnitude.
MAX_LOGIT_DIFFERENCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of the batch, and what came of it."""

    prompt: str
    adapter: str | None
    rank: int | None
    tier: str | None
    bucket: int | None
    decode_kernel: str | None
    prefill_kernel: str | None
    completion: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jax-lora demo` shows.

    Attributes:
      compilations: programs that XLA compiled for the first batch, one prefill and one decode.
      recompilations: programs that it compiled after every adapter had been evicted and loaded
        into another slot, and the rows had been shuffled.
      same_after_reload: whether the completions of that second batch were the same.
      max_logit_difference: over all rows and steps, between the batch and the models with each
        adapter merged into the weights.
    """

    rows: list[Row]
    adapters: int
    ranks: list[int]
    compilations: int
    recompilations: int
    same_after_reload: bool
    max_logit_difference: float

    @property
    def ok(self) -> bool:
        return (
            all(row.right for row in self.rows)
            and (self.compilations, self.recompilations) == (2, 0)
            and self.same_after_reload
            and self.max_logit_difference <= MAX_LOGIT_DIFFERENCE
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok}


class Steps:
    """The compiled prefill and decode of a model whose arrays are passed in at each step."""

    def __init__(self, graphdef: nnx.GraphDef[Llama], rows: int, length: int) -> None:
        def run_prefill(
            state: Any, tokens: jax.Array, lengths: jax.Array, adapters: AdapterBatch | None
        ) -> Any:
            model = nnx.merge(graphdef, *state)
            with use(adapters):
                return prefill(model, model.init_cache(rows, length), tokens, lengths)

        def run_decode(
            state: Any, cache: Any, tokens: jax.Array, adapters: AdapterBatch | None
        ) -> Any:
            with use(adapters):
                return decode(nnx.merge(graphdef, *state), cache, tokens)

        self.prefill = jax.jit(run_prefill)
        self.decode = jax.jit(run_decode, donate_argnums=1)

    def logits(
        self,
        state: Any,
        prompts: np.ndarray,
        lengths: np.ndarray,
        adapters: AdapterBatch | None = None,
        forced: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits and greedy tokens of each step, `[steps, B, V]` and `[steps, B]`.

        `forced` tokens, where given, are fed instead of the greedy ones.
        """
        decode_adapters = None if adapters is None else adapters.with_phase("decode")
        logits, cache = self.prefill(state, prompts, lengths, adapters)
        steps, tokens = [np.asarray(logits)], []
        while True:
            tokens.append(np.argmax(steps[-1], -1).astype(np.int32))
            if len(steps) == MAX_NEW_TOKENS:
                return np.stack(steps), np.stack(tokens)
            fed = tokens[-1] if forced is None else forced[len(steps) - 1]
            logits, cache = self.decode(state, cache, fed, decode_adapters)
            steps.append(np.asarray(logits))


@contextmanager
def counted_compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled since the block was entered, in the whole process."""
    count = 0

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def adapter_paths() -> dict[str, Path]:
    """The bundled adapters' folders by name."""
    return {path.name: path for path in sorted((FOLDER / "adapters").iterdir()) if path.is_dir()}


def run(progress: Callable[[str], None]) -> Report:
    """Runs the main job. `progress` is told what is being done."""
    progress("loading the base model and its adapters")
    model = Llama.from_pretrained(FOLDER / "base", dtype=jnp.float32)
    tokenizer = load_tokenizer(FOLDER / "base")
    eos_ids = np.atleast_1d(model.config.eos_token_id)
    plain_graphdef, plain_state = nnx.split(nnx.clone(model))
    # Installers may link a package's files to their cache.
    adapters = {name: load_peft(path, allow_links=True) for name, path in adapter_paths().items()}
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    slots = fitting_slots(list(ranks.values()))
    apply_lora(model, slots=slots, buckets=tuple(slots))
    bank = AdapterBank(model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)

    names = [*adapters, None] * 2
    words = [word for word in tasks.EVERYDAY_WORDS if tasks.is_clear(word)][:: len(names)]
    # The first half asks every adapter about the same word, the second each about its own.
    asked = ["window"] * (len(names) // 2) + words[: len(names) // 2]
    prompts, lengths = encode(tokenizer, [tasks.prompt(word) for word in asked])
    # The stacks are left out: bank.state is their live form.
    graphdef, *(_, rest) = nnx.split(model, nnx.Any(nnx.LoRAParam, LoRAScale), ...)
    length = prompts.shape[1] + MAX_NEW_TOKENS
    steps = Steps(graphdef, len(names), length)

    progress("compiling prefill and decode, generating")
    with counted_compilations() as count:
        batch = bank.batch(names, phase="prefill")
        logits, tokens = steps.logits((bank.state, rest), prompts, lengths, batch)
        compilations = count()

    progress("evicting and reloading every adapter, shuffling the rows, generating again")
    order = np.random.default_rng(0).permutation(len(names))
    with counted_compilations() as count:
        for name in adapters:
            bank.unload(name)
        del batch
        for name in reversed(adapters):
            bank.load(name, adapters[name])
        again = bank.batch([names[i] for i in order], phase="prefill")
        _, other = steps.logits((bank.state, rest), prompts[order], lengths[order], again)
        recompilations = count()
    same = all(np.array_equal(other[:, row], tokens[:, i]) for row, i in enumerate(order))

    progress("comparing logits with each adapter merged into the weights")
    merged_steps = Steps(plain_graphdef, len(names), length)
    difference = 0.0
    for merged_name in (*adapters, None):
        state = plain_state if merged_name is None else bank.merge(merged_name)
        merged, _ = merged_steps.logits((state,), prompts, lengths, forced=tokens)
        rows = [row for row, asked_name in enumerate(names) if asked_name == merged_name]
        live = _live(tokens[:, rows], eos_ids)
        difference = max(difference, float(np.abs(merged - logits)[:, rows][live].max()))

    return Report(
        rows=[
            _row(bank, name, word, decode_text(tokenizer, tokens[:, row], eos_ids))
            for row, (name, word) in enumerate(zip(names, asked))
        ],
        adapters=len(adapters),
        ranks=sorted(set(ranks.values())),
        compilations=compilations,
        recompilations=recompilations,
        same_after_reload=same,
        max_logit_difference=difference,
    )


def _live(tokens: np.ndarray, eos_ids: np.ndarray) -> np.ndarray:
    """Steps of each row up to its end token; what follows is never read."""
    ended = np.cumsum(np.isin(tokens, eos_ids), axis=0)
    return np.asarray(np.vstack([np.zeros_like(ended[:1]), ended[:-1]]) == 0)


def _row(bank: AdapterBank, name: str | None, word: str, completion: str) -> Row:
    right = completion == tasks.task_of(name).complete(word)
    if name is None:
        return Row(tasks.prompt(word), None, None, None, None, None, None, completion, right)
    bucket, rank = bank.bucket(name), bank.rank(name)
    return Row(
        prompt=tasks.prompt(word),
        adapter=name,
        rank=rank,
        tier=rank_tier(rank).value,
        bucket=bucket,
        decode_kernel=select_kernel(bucket, "decode"),
        prefill_kernel=select_kernel(bucket, "prefill"),
        completion=completion,
        right=right,
    )
