"""The benchmark of experts: each way computes the same, and the floor counts what is in use."""

import jax
import numpy as np
import pytest

from benchmarks import experts


@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("way", experts.WAYS)
def test_each_way_is_right(way: str, shared: str) -> None:
    case = experts.ExpertsCase(5, 64, experts=6, slots=3, rank=8, shared=shared)
    batch, bank = case.batch(0), case.banks()[0]
    given = experts._turned(bank) if way == "ragged_dot" else bank
    made = jax.jit(experts.WAYS[way])(batch.y, batch.x, *given, batch.ids, batch.weights)
    experts.check(way, case, batch, bank, got := np.asarray(made))
    with pytest.raises(RuntimeError, match="is wrong: relative error"):
        experts.check(way, case, batch, bank, got * 1.1)


def test_a_loop_takes_batches_and_banks_in_turn() -> None:
    case = experts.ExpertsCase(5, 64, experts=6, slots=3, rank=8)
    batches, banks = [case.batch(seed) for seed in range(3)], case.banks() * 2
    assert not np.array_equal(batches[0].ids, batches[1].ids)
    for way in experts.WAYS:
        assert experts.time_of(case, way, batches, banks) > 0


def test_the_floor_counts_a_shared_half_once_for_each_slot() -> None:
    own, of_a = (
        experts.ExpertsCase(64, 64, experts=8, slots=2, shared=shared) for shared in ("", "A")
    )
    pairs, slots = (len(np.unique(own.ids() // shared)) for shared in (1, 8))
    assert slots == 2 < pairs
    saved = 2e6 * (pairs - slots) * own.rank * own.features / experts.COPY_RATE
    np.testing.assert_allclose(own.floor_us() - of_a.floor_us(), saved)
