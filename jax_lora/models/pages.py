"""Keys and values in blocks, which the rows of a batch share: memory follows what is in use.

A request has a table: the numbers of its blocks, in the order of its tokens. Tables are data, so no
table compiles anything. Each layer first writes its tokens' keys and values to their blocks, then
gathers the blocks that its tokens see. Thus a token reads a position from one place, whichever step
wrote it, and whatever else that step did.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_lora.models.config import LlamaConfig


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
    def empty(cls, config: LlamaConfig, blocks: int, block: int, dtype: DTypeLike) -> Self:
        """`blocks` blocks of `block` tokens in each layer."""
        layers = config.num_hidden_layers
        shape = (layers * blocks, config.num_key_value_heads, block, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), blocks)

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
    """

    lanes: tuple[tuple[Lanes[Array], int], ...]
    places: Array
    offsets: Array

    @classmethod
    def of(cls, lanes: tuple[tuple[Lanes[Array], int], ...], pages: Pages) -> Self:
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
        return cls(lanes, jnp.where(place < 0, nowhere, place), jnp.concatenate(offsets))

    @property
    def positions(self) -> Int[Array, " T"]:
        return jnp.concatenate(
            [positions_of(some, width).reshape(-1) for some, width in self.lanes]
        )

    def masks(self, size: int, window: int | None) -> tuple[Bool[Array, "B S X"], ...]:
        """Which positions each token sees, for each kind of lanes; `size`: tokens of a block."""
        masks = []
        for some, width in self.lanes:
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
