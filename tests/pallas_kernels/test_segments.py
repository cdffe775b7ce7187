"""Segments against a model in plain Python: what a batch means, token by token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import in_ci

import pallas_kernels as pk

# Few shapes, so that jit compiles little; all contents.
# The first example of a shape compiles, so no deadline.
examples = settings(deadline=None, max_examples=30)
SHAPES = [(0, 1), (0, 3), (1, 1), (1, 4), (5, 1), (9, 2), (9, 40), (40, 7)]


@st.composite
def batches(draw):
    num_tokens, num_adapters = draw(st.sampled_from(SHAPES))
    near = st.integers(-3, num_adapters + 2)
    ids = st.one_of(near, st.sampled_from([2**31 - 1, -(2**31)]))
    return draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens)), num_adapters


@functools.partial(jax.jit, static_argnums=1)
def jitted(indices, num_adapters):
    return pk.make_segments(indices, num_adapters)


@functools.partial(jax.jit, static_argnums=1)
def tiles_of(segments, block):
    tiles = segments.tiles(block)
    return tiles.adapter, tiles.start, tiles.stop, tiles.count


def check(segments, wanted, num_adapters):
    """`segments` describes tokens whose adapters are `wanted`."""
    num_tokens, groups = len(wanted), min(len(wanted), num_adapters)
    assert segments.num_adapters == num_adapters and segments.num_tokens == num_tokens
    shapes = [(num_tokens,), (num_tokens,), (groups,), (groups + 1,)]
    assert [leaf.shape for leaf in jax.tree.leaves(segments)] == shapes
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(segments))

    used = sorted({i for i in wanted if i >= 0})
    tokens = {i: [t for t, j in enumerate(wanted) if j == i] for i in [*used, -1]}
    assert segments.indices.tolist() == wanted
    assert segments.rows.tolist() == list(itertools.chain(*tokens.values()))
    assert segments.group_adapters.tolist() == used + [-1] * (groups - len(used))
    sizes = [len(tokens[i]) for i in used] + [0] * (groups - len(used))
    assert segments.group_sizes.tolist() == sizes
    assert segments.group_starts.tolist() == [0, *np.cumsum(sizes, dtype=int)]


@examples
@given(batches())
def test_make_segments(batch):
    ids, num_adapters = batch
    wanted = [i if 0 <= i < num_adapters else -1 for i in ids]
    check(pk.make_segments(ids, num_adapters), wanted, num_adapters)
    check(jitted(jnp.array(ids, jnp.int32), num_adapters), wanted, num_adapters)


@pytest.mark.parametrize("num_tokens", [255, 256, 257, 700])
@pytest.mark.parametrize("num_adapters", [in_ci(1), 5, in_ci(900)])
def test_segments_of_more_tokens_than_are_compared_in_pairs(num_tokens, num_adapters):
    ids = np.random.default_rng(num_tokens).integers(-2, num_adapters + 2, num_tokens)
    wanted = [i if 0 <= i < num_adapters else -1 for i in ids.tolist()]
    check(jitted(jnp.asarray(ids, jnp.int32), num_adapters), wanted, num_adapters)


@examples
@given(batches(), st.sampled_from([1, 4, 16]))
def test_tiles_cover_each_token_once(batch, block):
    segments = pk.make_segments(*batch)
    adapter, start, stop, count = (np.asarray(a).tolist() for a in tiles_of(segments, block))
    assert not any(stop[count:]) and not any(start[count:]) and set(adapter[count:]) <= {-1}
    covered = []
    for i, a, b in zip(adapter[:count], start[:count], stop[:count]):
        assert 0 < b - a <= block
        rows = segments.rows[a:b]
        assert set(segments.indices[rows].tolist()) == {i}
        covered += rows.tolist()
    wanted = np.flatnonzero(segments.indices >= 0).tolist()
    assert sorted(covered) == wanted and len(set(covered)) == len(covered)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("num_adapters", [1, 200, 300])
@pytest.mark.parametrize("where", ["host", "jit"])
def test_no_width_or_sign_wraps_to_another_adapter(dtype, num_adapters, where):
    info = np.iinfo(dtype)
    near = {-2, -1, 0, 99, 100, 127, 128, 199, 255, 299, 300, 2**32 + 1, -(2**32), info.max}
    ids = np.array([i for i in sorted(near) if info.min <= i <= info.max], dtype)
    ids = np.resize(ids, 16)  # one shape for all
    wanted = [i if 0 <= i < num_adapters else -1 for i in ids.tolist()]
    with jax.enable_x64(ids.dtype.itemsize == 8 and where != "host"):
        if where == "host":
            segments = pk.make_segments(ids, num_adapters)
        else:
            segments = jitted(jnp.asarray(ids), num_adapters)
    check(segments, wanted, num_adapters)


@st.composite
def segmentations(draw):
    """Disjoint segments in any order, with gaps, empty ones and ones without adapter."""
    num_tokens = draw(st.sampled_from([0, 1, 12, 33]))
    num_adapters = 5
    cuts = draw(st.lists(st.integers(0, num_tokens), min_size=6, max_size=6).map(sorted))
    spans = draw(st.permutations(list(itertools.pairwise(cuts))))  # 5 of them
    adapters = draw(st.lists(st.integers(-2, num_adapters + 1), min_size=5, max_size=5))
    lengths = [draw(st.sampled_from([0, stop - start])) for start, stop in spans]
    starts = [
        start if n else draw(st.integers(0, num_tokens)) for (start, _), n in zip(spans, lengths)
    ]
    return starts, lengths, adapters, num_tokens, num_adapters


from_lengths = jax.jit(pk.segments_from_lengths, static_argnums=(3, 4))


@pytest.mark.parametrize(
    ("starts", "lengths", "covered"),
    [
        (jnp.array([-(2**31)]), jnp.array([2**31 - 1]), slice(0, 0)),
        (jnp.array([-(2**31)]), jnp.array([-2]), slice(0, 0)),
        (jnp.array([-3]), jnp.array([5]), slice(0, 2)),
        (jnp.array([5]), jnp.array([2**31 - 1]), slice(5, 7)),
        (np.array([2**32]), jnp.array([3]), slice(0, 0)),
        (jnp.array([2]), np.array([2**32 + 1]), slice(2, 7)),
    ],
)
def test_segments_of_device_arrays_are_clipped_to_the_tokens(starts, lengths, covered):
    segments = pk.segments_from_lengths(starts, lengths, jnp.array([1]), 7, 4)
    want = np.full(7, -1)
    want[covered] = 1
    np.testing.assert_array_equal(segments.indices, want)


@examples
@given(segmentations())
def test_segments_from_lengths(segmentation):
    starts, lengths, adapters, num_tokens, num_adapters = segmentation
    wanted = [-1] * num_tokens
    for start, length, adapter in zip(starts, lengths, adapters):
        known = adapter if 0 <= adapter < num_adapters else -1
        wanted[start : start + length] = [known] * length
    check(pk.segments_from_lengths(*segmentation), wanted, num_adapters)
    arrays = (jnp.array(a, jnp.int32) for a in segmentation[:3])
    check(from_lengths(*arrays, num_tokens, num_adapters), wanted, num_adapters)


@examples
@given(st.lists(st.integers(-40, 40), min_size=8, max_size=8))
def test_device_segments_that_are_no_segments_stay_within_the_tokens(values):
    starts, lengths = np.array(values[:4], np.int32), np.array(values[4:], np.int32)
    segments = from_lengths(starts, lengths, np.arange(4, dtype=np.int32), 12, 4)
    for token, adapter in enumerate(segments.indices.tolist()):
        if adapter >= 0:
            assert starts[adapter] <= token < starts[adapter] + lengths[adapter]
    check(segments, segments.indices.tolist(), 4)


def test_no_segments():
    check(pk.segments_from_lengths([], [], [], 3, 2), [-1, -1, -1], 2)


def test_segments_pass_through_jit_and_vmap():
    segments = pk.make_segments([1, -1, 0], 2)
    same = jax.jit(lambda s: s)(segments)
    check(same, [1, -1, 0], 2)
    ids = jnp.array([[1, -1, 0], [0, 0, 0]])
    both = jax.vmap(lambda ids: pk.make_segments(ids, 2))(ids)
    check(jax.tree.map(lambda leaf: leaf[1], both), [0, 0, 0], 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pk.make_segments([0.5], 2), TypeError, "indices must be integers, got float64"),
        (lambda: pk.make_segments([True], 2), TypeError, "indices must be integers, got bool"),
        (lambda: pk.make_segments(None, 2), TypeError, "indices must be integers, got object"),
        (lambda: pk.make_segments([[0]], 2), ValueError, r"shape \[T\], got \[1, 1\]"),
        (lambda: pk.make_segments(3, 2), ValueError, r"shape \[T\], got \[\]"),
        (lambda: pk.make_segments([0], 0), ValueError, "num_adapters must be at least 1, got 0"),
        (
            lambda: pk.segments_from_lengths([0, 3], [4, 2], [0, 1], 9, 2),
            ValueError,
            r"segments \[0, 4\) and \[3, 5\) overlap",
        ),
        (
            lambda: pk.segments_from_lengths([0, 5], [9, 1], jnp.array([0, 1]), 9, 2),
            ValueError,
            r"segments \[0, 9\) and \[5, 6\) overlap",
        ),
        (
            lambda: pk.segments_from_lengths([7], [4], [0], 9, 2),
            ValueError,
            "segment of 4 tokens at 7 leaves the 9 tokens",
        ),
        (
            lambda: pk.segments_from_lengths([2], [-1], [0], 9, 2),
            ValueError,
            "segment of -1 tokens at 2",
        ),
        (
            lambda: pk.segments_from_lengths([0], [1, 2], [0], 9, 2),
            ValueError,
            r"'starts': \[1\], 'lengths': \[2\], 'adapters': \[1\]",
        ),
        (
            lambda: pk.segments_from_lengths([0.0], [1], [0], 9, 2),
            TypeError,
            "starts must be integers, got float64",
        ),
        (
            lambda: pk.segments_from_lengths([0], [1], [0], 9.0, 2),
            TypeError,
            r"num_tokens must be a static int, got 9\.0",
        ),
        (
            lambda: pk.make_segments([0], 2.5),
            TypeError,
            r"num_adapters must be a static int, got 2\.5",
        ),
        (
            lambda: pk.segments_from_lengths([0], [1], [0], -1, 2),
            ValueError,
            "num_tokens >= 0 and num_adapters >= 1, got -1 and 2",
        ),
    ],
)
def test_errors_name_the_values(call, error, message):
    with pytest.raises(error, match=message):
        call()
