"""The engine's step on the device: prompts' next tokens and decoding, sampling included."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jax_lora.batch import AdapterBatch, Guard, use
from jax_lora.models.llama import Llama
from jax_lora.models.pages import Lanes, Pages, is_used
from jax_lora.serving.live import Structure
from jax_lora.serving.options import step_options

# Up to so many tokens a batch counts as "decode".
_DECODE_TOKENS = 256


class Choice[A](NamedTuple):
    """How each row chooses its token.

    Attributes:
      temperature: `[R]`; 0 for the most likely token.
      top_k: `[R]`; the number of tokens to choose from, the vocabulary's size for all.
      top_p: `[R]`; the least mass of the tokens to choose from, 1 for all.
      seeds: `[R]`. counts: `[R]`, how many tokens the row has chosen before.
    """

    temperature: A
    top_k: A
    top_p: A
    seeds: A
    counts: A


class Inputs[A](NamedTuple):
    """What a step does.

    Attributes:
      rows: `[R]` lanes of one token, which the row chose in the step before.
      lanes: `[C]` lanes of up to S tokens of prompts.
      prompt: `[C, S]`, their tokens. targets: those that follow them.
      owners: `[C]`, the row of each lane.
      adapters: `[R]`, the id of each row's adapter, or -1.
      sources: `[R]`, the number of the token behind which each row chooses one, or -1.
      choice: how.
    """

    rows: Lanes[A]
    lanes: Lanes[A]
    prompt: A
    targets: A
    owners: A
    adapters: A
    sources: A
    choice: Choice[A]


class Outputs(NamedTuple):
    """What a step gives.

    Attributes:
      tokens: `[R]`, that of each row that had a source; the one before of the others.
      logprobs: `[R]`, the logarithm of its probability by the logits as they are.
      are_finite: `[R]`, whether the logits were.
      prompt_logprobs: `[C, S]` of the targets, or None where nobody may ask.
    """

    tokens: Int[Array, " R"]
    logprobs: Float[Array, " R"]
    are_finite: Bool[Array, " R"]
    prompt_logprobs: Float[Array, "C S"] | None


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about an engine's steps, but for the shapes of `Inputs`.

    Attributes:
      ranges, guard: as in `AdapterBatch`; None where the model has no LoRA layers.
      room: positions that scaled rotary embeddings are for.
      prompt_logprobs: whether steps compute them.
      in_place: whether a kernel reads the blocks of decoding rows, as in `Decoder.paged`.
    """

    ranges: tuple[tuple[int, int], ...] | None
    guard: Guard | None
    room: int
    prompt_logprobs: bool
    in_place: bool

    def batch(self, indices: Array) -> AdapterBatch | None:
        """The adapters of tokens with these ids. The engine's requests hold the leases."""
        if self.ranges is None:
            return None
        phase = "decode" if indices.shape[0] <= _DECODE_TOKENS else "prefill"
        return AdapterBatch(indices, ranges=self.ranges, phase=phase, guard=self.guard)


def _step(
    structure: Structure,
    form: Form,
    leaves: list[Array],
    pages: Pages,
    last: Int[Array, " R"],
    inputs: Inputs[Array],
) -> tuple[Pages, Outputs]:
    model = structure.merge(leaves)
    width = inputs.prompt.shape[1]
    tokens = jnp.concatenate([last, inputs.prompt.reshape(-1)])
    of_lanes = jnp.where(is_used(inputs.lanes, width), inputs.adapters[inputs.owners][:, None], -1)
    of_rows = jnp.where(inputs.rows.counts > 0, inputs.adapters, -1)
    kinds = ((inputs.rows, 1), (inputs.lanes, width))
    with use(form.batch(jnp.concatenate([of_rows, of_lanes.reshape(-1)]))):
        used = kinds if inputs.prompt.shape[0] else kinds[:1]
        hidden, pages = model.model.paged(
            tokens, pages, used, room=form.room, in_place=form.in_place
        )
    is_chosen = inputs.sources >= 0
    ids = jnp.where(is_chosen, inputs.adapters, -1)
    logits = _logits(model, form, hidden[jnp.maximum(inputs.sources, 0)], ids)
    chosen = jnp.where(is_chosen, choose(logits, inputs.choice), last)
    logprobs, are_finite = _logprobs(logits, chosen)
    of_prompts = None
    if form.prompt_logprobs:
        lanes = hidden[last.shape[0] :].reshape(*inputs.prompt.shape, hidden.shape[-1])

        # One by one: the logits of a lane are S x V.
        def of_lane(lane: tuple[Array, Array, Array]) -> Array:
            hidden, ids, targets = lane
            return _logprobs(_logits(model, form, hidden, ids), targets)[0]

        of_prompts = jax.lax.map(of_lane, (lanes, of_lanes, inputs.targets))
    return pages, Outputs(chosen, logprobs, are_finite, of_prompts)


def _logits(model: Llama, form: Form, hidden: Float[Array, "R H"], ids: Array) -> Array:
    with use(form.batch(ids)):
        return model.logits(hidden).astype(jnp.float32)


def _logprobs(
    logits: Float[Array, "R V"], tokens: Int[Array, " R"]
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """The logarithm of each token's probability, and whether its logits are finite."""
    sums = jax.scipy.special.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return own - sums, jnp.isfinite(sums)


def choose(logits: Float[Array, "R V"], choice: Choice[Array]) -> Int[Array, " R"]:
    """A token for each row. A row's depends on nothing but its logits and its own choice."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_drawn = choice.temperature > 0

    def drawn() -> Array:
        scaled = logits / jnp.where(is_drawn, choice.temperature, 1.0)[:, None]
        is_cut = (choice.top_k < logits.shape[1]) | (choice.top_p < 1)
        kept = jax.lax.cond(
            jnp.any(is_cut & is_drawn), lambda: _cut(scaled, choice), lambda: scaled
        )
        noise = jax.vmap(functools.partial(_noise, logits.shape[1]))(choice.seeds, choice.counts)
        return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)

    return jnp.where(is_drawn, jax.lax.cond(jnp.any(is_drawn), drawn, lambda: greedy), greedy)


def _noise(size: int, seed: Array, count: Array) -> Array:
    # Not JAX's default kind of keys, which a user may set to one whose rows depend on each other.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _cut(logits: Float[Array, "R V"], choice: Choice[Array]) -> Float[Array, "R V"]:
    """-inf for all but the `top_k` best, and of those all but the best that have `top_p` together.

    Tokens as likely as the last one that is kept are kept too.
    """
    order = _ordered(logits)
    ones = jnp.ones((), jnp.float32)
    kept = jnp.where(order >= _least(order, ones, choice.top_k), logits, -jnp.inf)
    shares = jax.nn.softmax(kept, axis=-1)
    is_kept = order >= _least(order, shares, choice.top_p)
    return jnp.where(is_kept | (choice.top_p >= 1)[:, None], kept, -jnp.inf)


def _ordered(x: Float[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Integers in the order of the numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _least(order: UInt32[Array, "R V"], weights: Array, target: Array) -> UInt32[Array, "R 1"]:
    """The largest number such that those from it on weigh at least `target`, for each row.

    Bit by bit: a sort of a large vocabulary takes far longer.
    """
    target = target.astype(jnp.float32)[:, None]

    def turn(n: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= tried, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= target, tried, found)

    return jax.lax.fori_loop(0, 32, turn, jnp.zeros((order.shape[0], 1), jnp.uint32))


@functools.cache
def compiled_step() -> jax.stages.Wrapped:
    """The step, jitted: `(structure, form, leaves, pages, last, inputs)`, pages donated."""
    # By the first call: before, nobody knows whether JAX will run on a GPU.
    return jax.jit(
        _step,
        static_argnames=("structure", "form"),
        donate_argnames="pages",
        compiler_options=step_options(),
    )


def no_work(rows: int, lanes: int, width: int, blocks: int, vocabulary: int) -> Inputs[np.ndarray]:
    """Inputs of a step that does nothing, in NumPy, to be filled in.

    Args:
      width: S. blocks: W, the length of a table.
    """

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    def no_lanes(count: int) -> Lanes[np.ndarray]:
        return Lanes(zeros(count, blocks), zeros(count), zeros(count))

    choice = Choice(
        np.zeros(rows, np.float32),
        np.full(rows, vocabulary, np.int32),
        np.ones(rows, np.float32),
        np.zeros(rows, np.uint32),
        zeros(rows),
    )
    return Inputs(
        no_lanes(rows),
        no_lanes(lanes),
        zeros(lanes, width),
        zeros(lanes, width),
        zeros(lanes),
        zeros(rows) - np.int32(1),
        zeros(rows) - np.int32(1),
        choice,
    )
