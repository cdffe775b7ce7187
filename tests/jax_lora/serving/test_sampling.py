"""Which tokens may be drawn, how often, and that a row draws for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.serving.engine.step import Choice, choose

SIZE = 50


def choice(rows, temperature=1.0, top_k=SIZE, top_p=1.0, seeds=None):
    seeds = np.arange(rows, dtype=np.uint32) if seeds is None else seeds
    return Choice(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, np.float32),
        seeds,
        np.zeros(rows, np.int32),
    )


chosen = jax.jit(choose)


def logits_of(rows, seed=0):
    row = np.random.default_rng(seed).normal(0, 2, SIZE).astype(np.float32)
    return np.repeat(row[None], rows, axis=0)


def may_be_drawn(logits, top_k, top_p):
    order = np.argsort(-logits)[:top_k]
    shares = np.exp(logits[order].astype(np.float64))
    before = np.cumsum(shares / shares.sum()) - shares / shares.sum()
    return {*order[before < top_p].tolist()}


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(SIZE, 1.0), (5, 1.0), (1, 1.0), (SIZE, 0.6), (8, 0.7), (SIZE, 1e-6)]
)
def test_those_drawn_are_those_that_may_be(top_k, top_p):
    logits = logits_of(4000)
    tokens = np.asarray(chosen(logits, choice(4000, 1.0, top_k, top_p)))
    allowed = may_be_drawn(logits[0], top_k, top_p)
    assert {*tokens.tolist()} <= allowed
    shares = np.exp(logits[0].astype(np.float64)) * [n in allowed for n in range(SIZE)]
    shares /= shares.sum()
    counts = np.bincount(tokens, minlength=SIZE)
    # Five standard deviations of a binomial count.
    limit = 5 * np.sqrt(4000 * shares * (1 - shares)) + 1
    assert (np.abs(counts - 4000 * shares) <= limit).all()


def test_temperature():
    logits = logits_of(2000)
    greedy = int(logits[0].argmax())
    assert (np.asarray(chosen(logits, choice(2000, 0.0))) == greedy).all()
    share = {
        t: (np.asarray(chosen(logits, choice(2000, t))) == greedy).mean() for t in (0.3, 1.0, 3.0)
    }
    for t, found in share.items():
        weights = np.exp(np.float64(logits[0]) / t)
        assert abs(found - weights[greedy] / weights.sum()) < 0.06
    assert share[0.3] > share[1.0] > share[3.0]


def test_a_row_draws_for_itself():
    """Whatever the others want, cut or not, drawn or not."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (8, SIZE)).astype(np.float32)
    mixed = Choice(
        np.float32([0, 1, 0.5, 2, 0, 1, 1, 1]),
        np.int32([SIZE, 3, SIZE, SIZE, 2, 7, SIZE, SIZE]),
        np.float32([1, 1, 0.5, 1, 0.3, 0.9, 1, 0.01]),
        np.arange(8, dtype=np.uint32),
        np.arange(8, dtype=np.int32),
    )
    together = np.asarray(chosen(logits, mixed))
    order = rng.permutation(8)
    shuffled = chosen(logits[order], jax.tree.map(lambda x: x[order], mixed))
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(8):
        alone = jax.tree.map(lambda x, row=row: np.repeat(x[row : row + 1], 8), mixed)
        assert (
            np.asarray(chosen(np.repeat(logits[row : row + 1], 8, 0), alone)) == together[row]
        ).all()


def test_tokens_as_likely_as_the_last_one_are_kept():
    logits = np.repeat(np.float32([[1, 3, 3, 0, 3]]), 500, axis=0)
    given = choice(500, 1.0, 2)._replace(top_k=np.full(500, 2, np.int32))
    assert {*np.asarray(chosen(logits, given)).tolist()} == {1, 2, 4}


def test_logits_of_minus_infinity_and_of_both_signs():
    logits = np.repeat(np.float32([[-jnp.inf, -5, -4, -jnp.inf, -7]]), 500, axis=0)
    assert {*np.asarray(chosen(logits, choice(500, 1.0, 2)._replace())).tolist()} == {1, 2}
    logits = np.repeat(np.float32([[-0.5, 0.0, 0.25, -3, -4]]), 500, axis=0)
    assert {*np.asarray(chosen(logits, choice(500, 1.0, 3))).tolist()} == {0, 1, 2}
