"""The benchmark of experts: each way computes the same, and the floor counts what is in use."""

import jax
import numpy as np
import pytest

from benchmarks import experts


@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("way", experts.WAYS)
def test_each_way_is_right(way: str, shared: str) -> None:
    case = experts.ExpertsCase(5, 64, experts=6, slots=3, rank=8, shared=shared)
    operands = case._operands(0)
    given = experts._turned(operands) if way == "ragged_dot" else operands
    experts._check(way, case, got := jax.jit(experts.WAYS[way])(*given))
    with pytest.raises(RuntimeError, match="is wrong: relative error"):
        experts._check(way, case, got * 1.1)


def test_the_floor_counts_a_shared_half_once_for_each_slot() -> None:
    own, of_a = (
        experts.ExpertsCase(64, 64, experts=8, slots=2, shared=shared) for shared in ("", "A")
    )
    pairs, slots = (len(np.unique(own.ids() // shared)) for shared in (1, 8))
    assert slots == 2 < pairs
    saved = 2e6 * (pairs - slots) * own.rank * own.features / experts.COPY_RATE
    np.testing.assert_allclose(own.floor_us() - of_a.floor_us(), saved)
