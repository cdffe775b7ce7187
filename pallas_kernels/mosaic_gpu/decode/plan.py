"""What follows from shapes and config: how the work is cut, and how shared memory is used."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.mosaic_gpu.decode.config import MAX_DECODE_ROWS
from pallas_kernels.mosaic_gpu.decode.memory import MemoryMap
from pallas_kernels.mosaic_gpu.decode.work import (
    JOB_RANKS,
    OCTETS,
    Bundle,
    Case,
    Job,
    Part,
    Piece,
    Range,
    Strip,
    Work,
)
from pallas_kernels.mosaic_gpu.layouts import cuts
from pallas_kernels.stacks import Sharing, is_eight_bits

# Blocks that are there at once, with one on a multiprocessor: the multiprocessors of a GPC take
# whole clusters. H100, T=16, 16 adapters of R=128, 16 clusters of 8: 21.3 us with one block on a
# multiprocessor, 16.3 with two.
_AT_ONCE = 112
# Shared memory of a block where four, two or one are on a multiprocessor, less 1 KiB for each.
_SHARED_BYTES = (55 * 1024, 112 * 1024, 225 * 1024)

Y = Float[Array, "T _"] | jax.ShapeDtypeStruct


class DecodePart(NamedTuple):
    """A stack of L adapters: `scales * (x A^T) B^T` for tokens of ids [first_slot, first_slot + L).

    Without lora_a and scales, x is v `[T, R]`. Without lora_b, y is v, to which its sum is added.
    Where adapters share one A, or B, that stack has fewer: see `LoRAPart`.

    Attributes:
      lora_a: `[L, R, H]`.
      lora_b: `[L, N, R]`.
      scales: `[1]`, or `[S]`, of which the stack has L from `first_scale` on; in 8 bits L * R.
      first_slot: the id of its first adapter.
      y_offset: its first column in all ys side by side.
      first_scale: where its scales start.
      layers: of how many layers stacks and scales are, one behind the other.
    """

    lora_a: Float[Array, "L R H"] | None
    lora_b: Float[Array, "L N R"] | None
    scales: Float[Array, " S"] | None
    first_slot: int = 0
    y_offset: int = 0
    first_scale: int = 0
    layers: int = 1

    @property
    def slots(self) -> int:
        """L."""
        return max(stack.shape[0] for stack in self.stacks) // self.layers

    @property
    def sharing(self) -> Sharing:
        """How many adapters share one A, and one B."""
        places = self.slots * self.layers
        of_a, of_b = (1 if t is None else places // t.shape[0] for t in (self.lora_a, self.lora_b))
        return Sharing(of_a, of_b)

    @property
    def stacks(self) -> list[Array]:
        return [stack for stack in (self.lora_a, self.lora_b) if stack is not None]

    @property
    def operands(self) -> list[Array]:
        """What the kernel takes: the stacks and the scales."""
        return self.stacks if self.scales is None else [*self.stacks, self.scales]

    @property
    def rank(self) -> int:
        if self.lora_a is not None:
            return self.lora_a.shape[1]
        return self.stacks[0].shape[2]

    @property
    def width(self) -> int:
        return self.rank if self.lora_b is None else self.lora_b.shape[1]

    @property
    def static(self) -> Part:
        return Part(
            rank=self.rank,
            width=self.width,
            range=Range(self.first_slot, self.slots),
            sharing=self.sharing,
            own_scales=self.scales is not None and self.scales.size > 1,
            first_scale=self.first_scale,
            scales=0 if self.scales is None else self.scales.size // self.layers,
        )


class Plan(NamedTuple):
    """How the kernel does a case."""

    work: Work
    memory: MemoryMap

    @property
    def ranges(self) -> list[Range]:
        """The ranges of ids, (first, slots), that some part has."""
        return self.work.ranges


def plan(
    ys: Sequence[Y],
    x: Float[Array, "T H"],
    parts: tuple[DecodePart, ...],
    config: Config,
    *,
    add_inputs: bool = True,
    seated: bool = False,
    id_words: int = 1,
) -> Plan | None:
    """The plan of a case; None if the kernel does not take it.

    All parts have the same halves and number of layers. Their ranges of ids are equal or disjoint.

    Args:
      ys: arrays or shapes; of a shrink alone v.
      x: tokens; of an expand alone v. With fewer rows than the ys, T, token t reads row t % T.
      parts: what is added to the ys.
      config: of `decode_config`, or the caller's.
      add_inputs: parts add to what is in the ys; else the first one of a token's columns
        overwrites it.
      seated: instead of ids there is the table of `Seating`.
      id_words: words of an id, if not seated: 2 for 64 bits.
    """
    case = _case(ys, x, parts, add_inputs)
    pieces = _pieces(ys, parts)
    if config.warps is None or case is None or any((p.stop - p.start) % 8 for p in pieces):
        return None  # parts that overlap by other than multiples of 8 columns are not for it
    column_clusters = config.column_clusters if case.expands else 1
    work = Work(
        case=case,
        jobs=tuple(_jobs(case.parts, pieces, column_clusters)),
        seated=seated,
        id_words=id_words,
        split=config.split,
        warps=config.warps,
        column_clusters=column_clusters,
    )
    memory = _fitted(work, config)
    return None if memory is None else Plan(work, memory)


def _case(
    ys: Sequence[Y], x: Array, parts: tuple[DecodePart, ...], add_inputs: bool
) -> Case | None:
    """What the shapes say; None for numbers of tokens and dtypes that the kernel does not take."""
    shrinks, expands = parts[0].lora_a is not None, parts[0].lora_b is not None
    dtype = parts[0].stacks[0].dtype
    tokens = ys[0].shape[0]
    if not 1 <= tokens <= MAX_DECODE_ROWS:
        return None
    if any(stack.dtype != dtype for part in parts for stack in part.stacks):
        return None
    weights = jnp.dtype(dtype)
    if is_eight_bits(weights):  # rows of A are whole vectors of 16 bytes
        dtype = jnp.dtype(jnp.bfloat16)
        if x.shape[1] % 16:
            return None
    if len({y.dtype for y in ys}) > 1 or (shrinks and x.dtype != dtype):
        return None
    return Case(
        tokens=tokens,
        x_rows=x.shape[0],
        features=x.shape[1],
        y_widths=tuple(y.shape[1] for y in ys),
        dtype=jnp.dtype(dtype),
        weights=weights,
        x_dtype=jnp.dtype(x.dtype),
        y_dtype=jnp.dtype(ys[0].dtype),
        parts=tuple(part.static for part in parts),
        shrinks=shrinks,
        expands=expands,
        add_inputs=add_inputs,
        layers=parts[0].layers,
    )


def _fitted(work: Work, config: Config) -> MemoryMap | None:
    """As many copies as fit, up to the config's; None where one of each does not fit."""
    # More blocks than fit at once would wait for others to end, those without work too. H100, T=64,
    # 64 adapters of R=16: 14.4 us with three blocks on a multiprocessor, 12.0 with four.
    blocks = math.prod(work.grid) * work.split
    for many, room in zip((4, 2, 1), _SHARED_BYTES):
        if blocks <= many // 2 * _AT_ONCE:
            continue
        a, b = min(config.stages, work.units), config.expand_stages
        b_least = 1 if room == _SHARED_BYTES[-1] else min(2, b)
        while True:
            memory = MemoryMap(work, config.stages, a, b)
            if 4 * memory.words <= room:
                return memory
            if a > 1 and (memory.a_words >= memory.b_words or b <= b_least):
                a -= 1
            elif b > b_least:
                b -= 1
            else:
                break
    return None


def _pieces(ys: Sequence[Y], parts: tuple[DecodePart, ...]) -> list[Piece]:
    """What each part adds to, cut where another one starts or ends."""
    edges = list(itertools.accumulate((y.shape[1] for y in ys), initial=0))
    spans = [(p.y_offset, p.y_offset + p.width) for p in parts]
    # Each y is a span of its own, lest a piece go from one to the next.
    return [
        Piece(cut.start - edges[y], cut.stop - edges[y], p, y, cut.start - parts[p].y_offset)
        for cut in cuts((*spans, *itertools.pairwise(edges)))
        for y in [bisect.bisect(edges, cut.start) - 1]
        for p in cut.parts
        if p < len(parts)
    ]


def _jobs(parts: tuple[Part, ...], pieces: list[Piece], column_clusters: int) -> list[Job]:
    ranks: dict[Range, list[int]] = {}
    for part in parts:
        ranks.setdefault(part.range, []).append(part.rank)
    most = max(part.rank for part in parts)
    jobs: list[Job] = []
    for mine, some in ranks.items():
        # As many clusters as there is work for.
        clusters = pl.cdiv(column_clusters * max(some), most)
        # Whole pieces where one job can't hold all parts of a range: a cluster would take several
        # jobs in turn.
        for cluster, each, dealt in _dealt(pieces, clusters, whole=sum(some) > JOB_RANKS):
            used = {piece.part for piece in dealt}
            rest = [p for p, part in enumerate(parts) if part.range == mine and p in used]
            while rest:
                total = itertools.accumulate(parts[p].rank for p in rest)
                count = max(1, sum(ranks <= JOB_RANKS for ranks in total))
                jobs.append(_job(parts, tuple(rest[:count]), dealt, cluster, each))
                rest = rest[count:]
    return jobs


def _dealt(
    pieces: list[Piece], clusters: int, *, whole: bool
) -> list[tuple[int, int, list[Piece]]]:
    """(first cluster, how many, their pieces): all share each piece, or if `whole`, some have it.

    A cluster needs A of those parts alone whose columns it has. Parts of the same columns have the
    same clusters, as a token may have several of them: its columns must not be updated by two.
    """
    if not whole:
        return [(0, clusters, pieces)]
    starts = list(dict.fromkeys((piece.y, piece.start) for piece in pieces))
    each = max(1, clusters // len(starts))
    dealt: dict[int, list[Piece]] = {}
    for piece in pieces:
        first = starts.index((piece.y, piece.start)) * each % clusters
        dealt.setdefault(first, []).append(piece)
    return [(first, each, mine) for first, mine in dealt.items()]


def _job(
    parts: tuple[Part, ...],
    mine: tuple[int, ...],
    pieces: list[Piece],
    cluster: int,
    clusters: int,
) -> Job:
    octets = [(p, n) for p in mine for n in range(parts[p].rank // 8)]
    bundles = [
        Bundle(some, n * 8 * OCTETS) for n, some in enumerate(itertools.batched(octets, OCTETS))
    ]
    starts = itertools.accumulate((parts[p].rank for p in mine), initial=0)
    strips: list[Strip] = []
    for piece in pieces:
        if piece.part not in mine:
            continue
        for strip in strips:
            covered = any((other.y, other.start) == (piece.y, piece.start) for other in strip)
            if parts[strip[0].part].rank == parts[piece.part].rank and not covered:
                break
        else:
            strips.append(strip := [])
        strip.append(piece)
    return Job(mine, bundles, strips, dict(zip(mine, starts)), cluster, clusters)
