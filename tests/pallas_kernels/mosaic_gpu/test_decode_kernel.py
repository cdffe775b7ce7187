"""The decode kernel by itself, carried out by its emulator, and its plans.

test_mosaic_gpu.py holds the ops that call it, and what is lowered for CUDA.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_cases import Case, bits, products, relative_error, y_tolerance

from pallas_kernels.mosaic_gpu import Config
from pallas_kernels.mosaic_gpu.decode import (
    DecodePart,
    Plan,
    Seating,
    decode_config,
    decode_kernel,
    plan,
)
from pallas_kernels.mosaic_gpu.decode.config import MAX_UNSEATED_TOKENS, most_unseated_tokens
from pallas_kernels.mosaic_gpu.decode.work import Work
from pallas_kernels.mosaic_gpu.lanes import Emulator, gpu

DECODE = Config(split=2, warps=4, stages=2, expand_stages=2)
ci = functools.partial(pytest.param, marks=pytest.mark.ci)


class Way(NamedTuple):
    """How a call passes its ids and gets its sums."""

    seated: bool = False
    delta: bool = False
    wide: bool = False


RAW = Way()
WAYS = [RAW, Way(wide=True), Way(delta=True), Way(seated=True), Way(True, True, True)]


def planned(
    ys: Sequence[jax.Array], x: jax.Array, parts: Sequence[DecodePart], config: Config, way: Way
) -> Plan:
    words = 2 if way.wide else 1
    found = plan(
        ys, x, tuple(parts), config, add_inputs=not way.delta, seated=way.seated, id_words=words
    )
    assert found is not None
    return found


def add(
    whole: np.ndarray, widths: Sequence[int], x: np.ndarray, ids: np.ndarray,
    parts: Sequence[DecodePart], config: Config = DECODE, way: Way = RAW,
) -> np.ndarray:  # fmt: skip
    """The ys side by side; of a delta NaN where it is undefined."""
    ys = tuple(map(jnp.asarray, np.split(whole, np.cumsum(widths)[:-1], axis=1)))
    given = jnp.asarray(ids.astype(np.int32))
    if way.wide:
        given = jnp.asarray(ids.astype(np.int64)[:, None].view(np.int32))
    sizes = planned(ys, jnp.asarray(x), parts, config, way)
    if way.delta:
        ys = tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys)
    route = Seating.of(sizes).seat(given) if way.seated else given
    out = decode_kernel(ys, jnp.asarray(x), route, tuple(parts), sizes)
    return np.concatenate([np.asarray(y) for y in out], axis=1)


def check(
    whole: np.ndarray, widths: Sequence[int], x: np.ndarray, ids: np.ndarray,
    parts: Sequence[DecodePart], config: Config = DECODE, way: Way = RAW,
) -> np.ndarray:  # fmt: skip
    """`add`, held against float64; what no part adds to keeps its bits, or is undefined."""
    out = add(whole, widths, x, ids, parts, config, way)
    want = np.zeros(whole.shape) if way.delta else whole.astype(np.float64)
    used = np.zeros(whole.shape, bool)
    for part in parts:
        a, b = map(np.asarray, part.stacks)
        slots = len(a)
        local = ids.astype(np.int64) - part.first_slot
        local = np.where((local >= 0) & (local < slots), local, -1)
        scales = np.asarray(part.scales)
        if scales.size > 1:
            scales = scales[part.first_scale :][:slots][np.maximum(local, 0)]
        v = products(x, a, local) * scales.reshape(-1, 1)
        columns = slice(part.y_offset, part.y_offset + b.shape[1])
        want[:, columns] += products(v, b, local)
        used[:, columns] |= (local >= 0)[:, None]
    assert used.any()
    found = np.where(used, out.astype(np.float64), want)
    assert relative_error(found, want) < y_tolerance("bfloat16")
    if way.delta:
        assert np.isnan(out.astype(np.float64)[~used]).all()
    else:
        np.testing.assert_array_equal(bits(out)[~used], bits(whole)[~used])
    return out


# ------------------------------------------------------------------------------- one id per token

RANKS = (8, 16, 32, 128)
# The ranges of four slots lie in any order, with a gap between ids 8 and 20.
FIRST_SLOTS = (4, 0, 24, 20)
IDS = np.array([4, 21, 0, 21, -1, 24, 21, 4, 21, 25, 20, 21, 21, 8, 19, 28, 7])


def four_ranges() -> tuple[np.ndarray, np.ndarray, list[DecodePart]]:
    """(y, x, a part of each rank for either of two ys), seven tokens of one adapter."""
    arrays = [Case(len(IDS), 128, 272, rank, 4, seed=rank).arrays() for rank in RANKS]
    scales = np.concatenate([z.scales for z in arrays])
    parts = [
        DecodePart(z.a, z.b[:, start:stop], scales, first, start, 4 * n)
        for n, (z, first) in enumerate(zip(arrays, FIRST_SLOTS))
        for start, stop in ((0, 72), (72, 272))
    ]
    return arrays[0].y, arrays[0].x, parts


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_token_uses_the_range_of_its_id(way: Way, emulated: None) -> None:
    y, x, parts = four_ranges()
    check(y, (72, 200), x, IDS, parts, way=way)


@pytest.mark.parametrize("column_clusters", [3, ci(8)])
def test_how_columns_are_dealt_changes_no_bit(column_clusters: int, emulated: None) -> None:
    y, x, parts = four_ranges()
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    outs = [add(y, (72, 200), x, IDS, parts)]
    outs += [add(y, (72, 200), x, IDS, parts, config, Way(seated=s)) for s in (False, True)]
    for out in outs[1:]:
        np.testing.assert_array_equal(bits(outs[0]), bits(out))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("first", [0, 5])
def test_ids_outside_of_one_range_are_none(first: int, way: Way, emulated: None) -> None:
    z = Case(9, 128, 64, 16, 3).arrays()
    outside = [first - 1, first + 3, -7, 2**31 - 1, -(2**31)]
    ids = np.array([first + 2, *outside, first, first, first + 2])
    if way.wide:
        ids[2:4] = first + 2**32, first - 2**32  # whose low word is a slot
    check(z.y, (64,), z.x, ids, [DecodePart(z.a, z.b, z.scales, first)], way=way)


@pytest.mark.ci
@pytest.mark.parametrize("way", [RAW, Way(wide=True)], ids=str)
def test_a_launch_finds_the_rows_of_as_many_tokens_as_it_may(way: Way, emulated: None) -> None:
    tokens = MAX_UNSEATED_TOKENS
    assert most_unseated_tokens(16) == tokens and most_unseated_tokens(256) == tokens // 2
    z = Case(tokens, 64, 64, 16, 3).arrays()
    ids = np.full(tokens, -1)
    used = np.array([0, 31, 32, 127, 128, 150, 191, 192, 240, 254, 255])
    ids[used] = [2, 0, 2, 1, 2, 2, 0, 2, 2, 2, 2]  # eight of one adapter, from first to last
    ids[129:134] = 2  # so that these lead a second cluster
    check(z.y, (64,), z.x, ids, [DecodePart(z.a, z.b, z.scales)], way=way)


@pytest.mark.parametrize("way", [Way(), Way(seated=True, delta=True)], ids=str)
def test_ranges_may_cover_other_columns(way: Way, emulated: None) -> None:
    """Columns that the range of a token's id does not cover are kept, or undefined."""
    arrays = [Case(9, 128, 72, rank, 2, seed=rank).arrays() for rank in (16, 8)]
    whole = Case(9, 128, 144, 8, 1).arrays().y
    ids = np.array([0, 2, 1, -1, 3, 4, 0, 3, 2])
    parts = [DecodePart(z.a, z.b, z.scales, 2 * n, 72 * n) for n, z in enumerate(arrays)]
    check(whole, (144,), arrays[0].x, ids, parts, way=way)


@pytest.mark.ci
@pytest.mark.parametrize("way", [Way(), Way(delta=True), Way(True, True)], ids=str)
@pytest.mark.parametrize("column_clusters", [1, 2])
@pytest.mark.parametrize("ranks", [ci((16, 16, 8)), (128, 8, 144)], ids=str)
def test_parts_of_one_range_add_up(
    ranks: tuple[int, ...], column_clusters: int, way: Way, emulated: None
) -> None:
    """In one job's strips and in jobs that follow each other: any may be the first to run."""
    whole, parts = Case(7, 128, 272, 8, 1, y_dtype="float32").arrays(), []
    # The second y is covered in part, the third not at all.
    for n, (start, stop) in enumerate([(0, 136), (64, 160), (40, 112)]):
        for which, rank in zip((0, 1, 2)[n % 2 :], ranks):
            z = Case(7, 128, stop - start, rank, 2, seed=n + rank).arrays()
            parts.append(DecodePart(z.a, z.b, z.scales, 2 * (which // 2), start))
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    ids = np.array([0, 3, 1, -1, 2, 0, 9])
    check(whole.y, (136, 64, 72), whole.x, ids, parts, config, way)


# ----------------------------------------------------------------------------------------- sums


@pytest.mark.ci
@pytest.mark.parametrize(
    ("case", "change"),
    [
        (Case(3, 1024, 72, 128, 2), {}),  # as ranks of 128 are
        (Case(9, 512, 64, 80, 3), {}),  # 20 columns in fours: three for each block, then too few
        (Case(5, 256, 64, 48, 2), dict(split=4, warps=8)),
        (Case(4, 512, 64, 48, 2), dict(column_clusters=2)),  # two blocks add up nothing
    ],
    ids=str,
)
def test_who_adds_up_sums_changes_no_bit(
    case: Case, change: dict[str, int], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, config, outs = case.arrays(), dataclasses.replace(DECODE, **change), []
    part = DecodePart(z.a, z.b, z.scales)
    for scatters in (True, False):
        monkeypatch.setattr(Work, "scatters", scatters)
        outs.append(check(z.y, (case.width,), z.x, z.ids, [part], config, Way(True)))
    np.testing.assert_array_equal(bits(outs[0]), bits(outs[1]))


@pytest.mark.parametrize("which", ["barrier", "warp_barrier", "cluster_barrier", "arrived"])
def test_the_emulator_finds_a_missing_barrier(
    which: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = Case(3, 640, 1032, 16, 2).arrays()
    call = z.y, (1032,), z.x, z.ids, [DecodePart(z.a, z.b, z.scales)]
    want = check(*call)
    monkeypatch.setattr(Emulator, which, lambda *_: None)
    if which == "arrived":  # what is on its way is NaN
        assert not np.array_equal(bits(add(*call)), bits(want))
    else:
        with pytest.raises(Exception, match="barrier"):
            add(*call)


def leave_out_a_barrier(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Each cluster goes past its nth barrier of the cluster."""
    calls: collections.Counter[int] = collections.Counter()
    barrier = Emulator.cluster_barrier

    def all_but_one(self: Emulator) -> None:
        calls[id(self)] += 1
        if calls[id(self)] != nth:
            barrier(self)

    monkeypatch.setattr(Emulator, "cluster_barrier", all_but_one)


def test_the_emulator_finds_a_missing_barrier_between_jobs(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job's sums would be pushed over those that others still read."""
    cases = [Case(3, 640, 72, rank, 2, seed=rank).arrays() for rank in (128, 16)]
    parts = [DecodePart(z.a, z.b, z.scales) for z in cases]
    call = cases[0].y, (72,), cases[0].x, np.zeros(3, np.int32), parts
    monkeypatch.setattr(Work, "scatters", False)
    check(*call)
    leave_out_a_barrier(monkeypatch, 2)
    with pytest.raises(Exception, match="pushed without a barrier of the cluster"):
        add(*call)


@pytest.mark.parametrize("missing", [1, 2])
def test_the_emulator_finds_a_missing_barrier_where_blocks_add_up_for_others(
    missing: int, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "scatters", True)
    z = Case(3, 640, 64, 32, 1, "identical").arrays()
    call = z.y, (64,), z.x, z.ids, [DecodePart(z.a, z.b, z.scales)]
    check(*call)
    leave_out_a_barrier(monkeypatch, missing)
    with pytest.raises(Exception, match="barrier"):
        add(*call)


# ---------------------------------------------------------------------------------------- plans


def shapes_of(ranks: Sequence[tuple[int, int]], features: int = 64) -> list[DecodePart]:
    """Parts of 64 columns for each (slots, rank), whose ranges follow each other."""
    starts = itertools.accumulate((slots for slots, _ in ranks), initial=0)
    return [
        DecodePart(jnp.zeros((n, r, features)), jnp.zeros((n, 64, r)), jnp.ones(1), first)
        for (n, r), first in zip(ranks, starts)
    ]


@pytest.mark.ci
@hypothesis.given(tokens=st.integers(1, 256), data=st.data())
@hypothesis.settings(max_examples=10, deadline=None)
def test_seating_gives_each_leader_its_clusters(tokens: int, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from([8, 16, 64, 128]), min_size=1, max_size=3))
    slots = [data.draw(st.sampled_from([1, 2, 3, 9, 40, 300])) for _ in ranks]
    parts, x = shapes_of(list(zip(slots, ranks))), jnp.zeros((tokens, 64))
    config = dataclasses.replace(DECODE, column_clusters=data.draw(st.sampled_from([1, 4, 12])))
    sizes = planned((x,), x, parts, config, Way(seated=True))
    some = st.integers(-2, sum(slots) + 1)
    used = data.draw(st.lists(some, min_size=1, max_size=tokens))
    ids = data.draw(hnp.arrays(np.int32, tokens, elements=st.sampled_from(used)))
    shares = {
        adapter: sizes.work.dealt(one)
        for one in sizes.ranges
        for adapter in range(one.first, one.stop)
    }
    number: collections.Counter[int] = collections.Counter()
    groups: dict[tuple[int, int], list[int]] = {}  # by id and eight, in the leaders' order
    for token, adapter in enumerate(ids.tolist()):
        if adapter in shares:
            groups.setdefault((adapter, number[adapter] // 8), []).append(token)
            number[adapter] += 1
    want = [
        [*mine, *[-1] * (8 - len(mine)), adapter, column]
        for (adapter, _), mine in sorted(groups.items(), key=lambda group: -shares[group[0][0]])
        for column in range(shares[adapter])
    ]
    clusters, columns = sizes.work.grid
    assert len(want) <= clusters and columns == 1
    want += [[-1] * 9 + [0]] * (clusters - len(want))
    words = np.stack([ids, np.where(ids < 0, -1, 0)], axis=1).astype(np.int32)
    seat = jax.jit(Seating.of(sizes).seat)  # else each of its steps would be compiled
    for given in (ids, words):
        np.testing.assert_array_equal(seat(jnp.asarray(given)), want)


def test_copies_of_a_are_at_once_with_two_blocks_on_a_multiprocessor() -> None:
    """With 16 clusters, one block on a multiprocessor, some would wait for others to end."""

    def plan_of(tokens: int, *ranks: int) -> Plan:
        x = jnp.zeros((tokens, 4096), jnp.bfloat16)
        parts = [
            DecodePart(
                jnp.zeros((64, rank, 4096), x.dtype), jnp.zeros((64, 4096, rank), x.dtype),
                jnp.ones(1), 64 * n,
            )
            for n, rank in enumerate(ranks)
        ]  # fmt: skip
        config = decode_config(tokens, 4096, max(ranks), buckets=len(ranks))
        return planned((x,), x, parts, config, Way(seated=True))

    for tokens, rank in itertools.product((1, 16, 64), (16, 64, 128)):
        work, memory = plan_of(tokens, rank)
        assert memory.a_stages(work.jobs[0]) == 2  # of two turns
        if tokens > 1:
            assert 2 * 4 * memory.words <= 226 * 1024
    # The memory that the highest rank asks for gives the others all that they use.
    work, memory = plan_of(64, 8, 16, 32, 64, 128)
    assert [memory.a_stages(job) for job in work.jobs[:4]] == [2] * 4
    assert [memory.b_stages(job, job.strips[0]) for job in work.jobs[:4]] == [4, 4, 4, 2]
    assert 4 * memory.words <= 80 * 1024  # what some products leave that it is to run beside


def test_ranges_share_clusters_by_rank() -> None:
    y, x = jnp.zeros((64, 400), jnp.bfloat16), jnp.zeros((64, 128), jnp.bfloat16)
    parts = [
        DecodePart(
            jnp.zeros((2, rank, 128), x.dtype), jnp.zeros((2, 200, rank), x.dtype), jnp.ones(1),
            2 * n, offset,
        )
        for n, rank in enumerate((8, 64, 128))
        for offset in (0, 200)
    ]  # fmt: skip
    config = dataclasses.replace(DECODE, column_clusters=6)
    work, _ = planned((y,), x, parts, config, Way())
    dealt = [(work.range_of(n).first, j.cluster, j.clusters) for n, j in enumerate(work.jobs)]
    # One slice of rank 128 is as much as a job holds, so that each half of the clusters has one.
    assert dealt == [(0, 0, 1), (2, 0, 3), (4, 0, 3), (4, 3, 3)]
    assert work.spans == [(0, 6)]
    assert work.grid == ((64 + 7 * 6) // 8, 6)
    # The first tokens of six adapters, and 58 more by eights, at worst all of rank 128.
    work, _ = planned((y,), x, parts, config, Way(seated=True))
    assert [work.dealt(one) for one in work.ranges] == [1, 3, 6]
    assert work.grid == (2 * (1 + 3 + 6) + 58 // 8 * 6, 1)


def test_a_range_of_many_clusters_and_few_slots_may_have_all_tokens() -> None:
    """57 tokens of one adapter are eight times its 12 clusters, 7 more have an adapter each."""
    x, parts = jnp.zeros((64, 64)), shapes_of([(64, 8), (1, 128)])
    config = dataclasses.replace(DECODE, column_clusters=12)
    work, _ = planned((x,), x, parts, config, Way(seated=True))
    assert [work.dealt(one) for one in work.ranges] == [1, 12]
    assert work.grid == (8 * 12 + 7, 1)


@pytest.mark.parametrize("column_clusters", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [(16, 16), (8, 16), (64, 128), (8, 128)], ids=str)
def test_columns_of_y_have_the_same_clusters_in_every_job_of_a_range(
    ranks: tuple[int, ...], column_clusters: int
) -> None:
    """Else two clusters might update the columns of a token."""
    y, x = jnp.zeros((9, 400), jnp.bfloat16), jnp.zeros((9, 128), jnp.bfloat16)
    parts = [
        DecodePart(
            jnp.zeros((2, rank, 128), x.dtype), jnp.zeros((2, width, rank), x.dtype), jnp.ones(1),
            0, offset,
        )
        for rank in ranks
        for offset, width in ((0, 200), (200, 72), (272, 128), (96, 208))
    ]  # fmt: skip
    config = dataclasses.replace(DECODE, column_clusters=column_clusters)
    work, _ = planned((y,), x, parts, config, Way())
    owners: dict[int, set[tuple[int, int]]] = {}
    seen: collections.Counter[int] = collections.Counter()
    for job in work.jobs:
        assert job.cluster >= 0 and job.cluster + job.clusters <= column_clusters
        for piece in itertools.chain(*job.strips):
            owners.setdefault(piece.start, set()).add((job.cluster, job.clusters))
            seen[piece.part] += piece.stop - piece.start
    assert all(len(of_column) == 1 for of_column in owners.values())
    assert seen == {n: part.width for n, part in enumerate(parts)}


# -------------------------------------------------------------------------------------- lowering


def lowered(tokens: int, ranks: Sequence[int], way: Way) -> str:
    """The module for Hopper of four adapters of each rank, H = N = 1024."""
    half, shape = jnp.bfloat16, jax.ShapeDtypeStruct

    def run(y: jax.Array, x: jax.Array, ids: jax.Array, stacks: list[tuple[jax.Array, ...]]):
        parts = [DecodePart(a, b, jnp.ones(1), 4 * n) for n, (a, b) in enumerate(stacks)]
        config = decode_config(tokens, 1024, max(ranks), buckets=len(ranks))
        sizes = planned((y,), x, parts, config, way)
        ys = (shape(y.shape, y.dtype),) if way.delta else (y,)
        route = Seating.of(sizes).seat(ids) if way.seated else ids
        return decode_kernel(ys, x, route, tuple(parts), sizes)

    stacks = [(shape((4, r, 1024), half), shape((4, 1024, r), half)) for r in ranks]
    ids = shape((tokens, 2) if way.wide else (tokens,), jnp.int32)
    operand = shape((tokens, 1024), half)
    return (
        jax.jit(run)
        .trace(operand, operand, ids, stacks)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ranges_are_one_launch_with_one_array_of_ids(way: Way) -> None:
    module = lowered(64, (8, 16, 128), way)
    assert module.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert "lora_r8_r16_r128" in module
    operands = module.split("custom_call @mosaic_gpu_v2(")[1].split(")")[0].split(",")
    # x, ids, three of each part, and y where it is added to.
    assert len(operands) == 2 + 9 + (not way.delta)


def test_mosaic_waits_for_the_cluster_where_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own wait is found and taken out, and ours is there."""
    found: list[bool] = []
    texts: list[str] = []
    take_over, asm = gpu.take_over_start, gpu._ptx
    monkeypatch.setattr(gpu, "take_over_start", lambda: found.append(take_over()) or found[-1])
    monkeypatch.setattr(gpu, "_ptx", lambda t, *a, **k: texts.append(t) or asm(t, *a, **k))
    for seated in (False, True):
        lowered(64, (16,), Way(seated))
        assert found and all(found)
        waits = ["cluster.arrive" in text for text in texts if "cluster.wait" in text]
        assert waits == [False, True]  # Mosaic has arrived already; then sums are exchanged
        texts.clear()
