"""Keys and values in blocks, which the rows of a batch share: memory follows what is in use.

A request has a table: the numbers of its blocks, in the order of its tokens. Tables are data, so no
table compiles anything. Each layer first writes its tokens' keys and values to their blocks, then
reads those that its tokens see: XLA gathers them; on a Hopper GPU a kernel reads those of lanes of
one token where they stand. Thus a token reads a position from one place, whichever step wrote it,
and whatever else that step did.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.models.config import LlamaConfig
from pallas_kernels import dispatch
from pallas_kernels.mosaic_gpu import chip
from pallas_kernels.ranks import kernels_disabled


class Lanes[A](NamedTuple):
    """`B` lanes, each of up to `S` tokens of one request that follow each other.

    Attributes:
      tables: `[B, W]` int32, the blocks of each lane's request; any numbers behind its last one.
      starts: `[B]` int32, the position of each lane's first token.
      counts: `[B]` int32, tokens of each lane; 0 for one that is not used.
    """

    tables: A
    starts: A
    counts: A


def positions_of(lanes: Lanes[Array], width: int) -> Int[Array, "B S"]:
    """The position of each token of the lanes."""
    return lanes.starts[:, None] + jnp.arange(width, dtype=jnp.int32)


def is_used(lanes: Lanes[Array], width: int) -> Bool[Array, "B S"]:
    """Which of a lane's `width` tokens there are."""
    return jnp.arange(width, dtype=jnp.int32) < lanes.counts[:, None]


class Span(NamedTuple):
    """The positions that lanes of one token see: from `first` on, those before `length`; `[B]`."""

    first: Array
    length: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The blocks of all layers, one layer behind the other.

    Attributes:
      keys, values: `[layers * blocks, num_key_value_heads, block, head_dim]`.
      blocks: how many a layer has (static).
    """

    keys: Array
    values: Array
    blocks: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: LlamaConfig,
        blocks: int,
        block: int,
        dtype: DTypeLike,
        sharding: Sharding | None = None,
    ) -> Self:
        """`blocks` blocks of `block` tokens in each layer, placed as `sharding` says."""
        layers = config.num_hidden_layers
        shape = (layers * blocks, config.num_key_value_heads, block, config.head_dim)
        keys, values = (jnp.zeros(shape, dtype, device=sharding) for _ in range(2))
        return cls(keys, values, blocks)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[-2]


@dataclasses.dataclass(frozen=True)
class PagedTokens:
    """The tokens of one step: those of all lanes, one kind of lanes behind the other.

    Attributes:
      lanes: each kind, and its S.
      places: `[T]`, the block that each token's keys and values go to; beyond all for none.
      offsets: `[T]`, where in the block.
      in_place: whether a kernel reads the blocks of lanes with S = 1 where they stand.
    """

    lanes: tuple[tuple[Lanes[Array], int], ...]
    places: Array
    offsets: Array
    in_place: bool = False

    @classmethod
    def of(
        cls,
        lanes: tuple[tuple[Lanes[Array], int], ...],
        pages: Pages,
        *,
        in_place: bool = False,
    ) -> Self:
        places, offsets = [], []
        for some, width in lanes:
            positions = positions_of(some, width)
            numbers = jnp.minimum(positions // pages.block, some.tables.shape[1] - 1)
            found = jnp.take_along_axis(some.tables, numbers, axis=1)
            places.append(jnp.where(is_used(some, width), found, -1).reshape(-1))
            offsets.append((positions % pages.block).reshape(-1))
        place = jnp.concatenate(places)
        # Each beyond all layers at a place of its own: then no two tokens have one place.
        nowhere = pages.keys.shape[0] + jnp.arange(place.shape[0], dtype=jnp.int32)
        place = jnp.where(place < 0, nowhere, place)
        return cls(lanes, place, jnp.concatenate(offsets), in_place)

    @property
    def positions(self) -> Int[Array, " T"]:
        return jnp.concatenate(
            [positions_of(some, width).reshape(-1) for some, width in self.lanes]
        )

    def masks(self, size: int, window: int | None) -> tuple[Bool[Array, "B S X"] | Span, ...]:
        """Which positions each token sees, for each kind of lanes; `size`: tokens of a block."""
        masks: list[Array | Span] = []
        for some, width in self.lanes:
            if self.in_place and width == 1:
                least = 0 if window is None else some.starts - (window - 1)
                first = jnp.maximum(jnp.zeros_like(some.starts), least)
                masks.append(Span(first, some.starts + some.counts))
                continue
            known = jnp.arange(some.tables.shape[1] * size, dtype=jnp.int32)
            distances = positions_of(some, width)[:, :, None] - known
            is_seen = distances >= 0
            masks.append(is_seen if window is None else is_seen & (distances < window))
        return tuple(masks)

    def split(self, x: Array) -> list[Array]:
        """`[B, S, ...]` of each kind of lanes, from `[T, ...]`."""
        parts, start = [], 0
        for some, width in self.lanes:
            count = some.starts.shape[0]
            part = jax.lax.slice_in_dim(x, start, start + count * width)
            parts.append(part.reshape(count, width, *x.shape[1:]))
            start += count * width
        return parts


class LayerPages(NamedTuple):
    """What one layer sees of the blocks in a step."""

    pages: Pages
    layer: int | Array
    tokens: PagedTokens

    def with_tokens(self, k: Float[Array, "T N D"], v: Float[Array, "T N D"]) -> "LayerPages":
        """With the keys and values of the step's tokens. In place, where the pages are donated."""
        pages, tokens = self.pages, self.tokens
        places = tokens.places + jnp.int32(self.layer) * pages.blocks

        def put(old: Array, new: Array) -> Array:
            at = old.at[places, :, tokens.offsets]
            return at.set(new, mode="drop", unique_indices=True)

        keys, values = put(pages.keys, k), put(pages.values, v)
        return self._replace(pages=Pages(keys, values, pages.blocks))

    def read_in_place(
        self, q: Float[Array, "B 1 N G D"], lanes: Lanes[Array], span: Span, scale: float
    ) -> Float[Array, "B 1 N G D"]:
        """What the queries of lanes with one token see, by a kernel."""
        from pallas_kernels.mosaic_gpu.paged import paged_attention

        pages = self.pages
        tables = lanes.tables + jnp.int32(self.layer) * pages.blocks
        keys, values = pages.keys, pages.values
        return paged_attention(q[:, 0], keys, values, tables, *span, scale=scale)[:, None]

    def of_lanes(
        self, lanes: Lanes[Array]
    ) -> tuple[Float[Array, "B N X D"], Float[Array, "B N X D"]]:
        """Keys and values of the lanes' requests, by position; values are 0 behind the last."""
        pages = self.pages
        tables = lanes.tables + jnp.int32(self.layer) * pages.blocks
        heads = jnp.arange(pages.keys.shape[1], dtype=jnp.int32)

        def gathered(blocks: Array) -> Array:
            # By head and block: of blocks with all heads, XLA would transpose what it gathers.
            found = blocks.at[tables[:, None], heads[None, :, None]].get(mode="clip")
            return found.reshape(*found.shape[:2], -1, found.shape[-1])

        keys, values = gathered(pages.keys), gathered(pages.values)
        # What another request left there, NaN maybe, is multiplied with a weight of 0.
        known = jnp.arange(values.shape[2], dtype=jnp.int32)
        is_own = known < (lanes.starts + lanes.counts)[:, None]
        return keys, jnp.where(is_own[:, None, :, None], values, jnp.zeros((), values.dtype))


def blocks_of(tokens: int, block: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // block)


def lacks_in_place(config: LlamaConfig, rows: int, block: int, dtype: DTypeLike) -> str | None:
    """Why no kernel reads the blocks of `rows` decoding rows where they stand; None if one does."""
    from pallas_kernels.mosaic_gpu.paged import lacks_paged_attention

    heads = config.num_key_value_heads
    if dispatch.gpu_capability() != chip.CAPABILITY or kernels_disabled():
        return "a Hopper GPU with kernels"
    if config.attn_logit_softcapping is not None:
        return "scores that are capped"
    if 2 * rows * heads < chip.MULTIPROCESSORS:
        return f"so few programs as {rows} rows of {heads} heads are"  # each reads a row alone
    group = config.num_attention_heads // heads
    return lacks_paged_attention(group, config.head_dim, block, dtype)
