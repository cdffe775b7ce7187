"""The cases of `python -m benchmarks kernels`: uneven, shuffled, mixed; the grid and its parts."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases as c
from benchmarks import kernels
from benchmarks.cases import Case
from benchmarks.peer_runs import for_peers

MIXED = Case(20, 4, 32, 64, 128, 8, lengths=(9, 1, 8, 2), ranks=(16, 32, 16, 8))


def test_ids_hold_each_adapter_as_often_as_its_length_says() -> None:
    ids = Case(20, 3, 16, L=8, lengths=(1, 5, 14)).ids()
    assert np.diff(np.flatnonzero(np.diff(ids, prepend=-1, append=-1))).tolist() == [1, 5, 14]
    shuffled = Case(20, 3, 16, L=8, lengths=(1, 5, 14), shuffle=True).ids()
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(ids))
    assert np.count_nonzero(np.diff(shuffled)) > 2
    assert Case(7, 3, 8, L=4).runs == (3, 2, 2)


def test_ids_of_mixed_ranks_count_through_the_buckets() -> None:
    assert MIXED.slots == {8: 2, 16: 2, 32: 2}
    assert MIXED.first_slots == {8: 0, 16: 2, 32: 4}
    ranks = np.array(for_peers(MIXED)["ranks"])
    assert ranks.tolist() == [8, 8, 16, 16, 32, 32]
    assert ranks[MIXED.ids()].tolist() == [16] * 9 + [32] + [16] * 8 + [8] * 2
    assert len({*MIXED.ids()}) == 4
    crowded = Case(8, 4, 32, L=4, ranks=(16, 16, 16, 32))
    assert crowded.slots == {16: 3, 32: 2}


def test_the_floor_of_a_mix_counts_the_adapters_in_use_at_their_own_ranks() -> None:
    rank_bytes, x_bytes, y_bytes = 2 * (16 + 32 + 16 + 8), 2 * 20, 4 * 20
    moved = rank_bytes * (64 + 128) + x_bytes * 64 + y_bytes * 128
    assert MIXED.floor_us(float("inf"), 1e12) == pytest.approx(moved / 1e6)
    products = 9 * 16 + 1 * 32 + 8 * 16 + 2 * 8
    assert MIXED.floor_us(1e6, 1e12) == pytest.approx(2 * products * (64 + 128))
    assert dataclasses.replace(MIXED, shuffle=True).floor_us(6e14) == MIXED.floor_us(6e14)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": (3, 4)}, "lengths must sum to T=8, they sum to 7"),
        ({"lengths": (8,)}, "lengths must hold D=2 ints, got 1"),
        ({"lengths": (9, -1)}, "lengths must be a list of ints of at least 1"),
        ({"lengths": "44"}, "lengths must be a list of ints of at least 1"),
        ({"ranks": (8, 16)}, "r=8 must be the largest of ranks, 16"),
        ({"ranks": (8, True)}, "ranks must be a list of ints of at least 1"),
        ({"shuffle": 1}, "shuffle must be true or false, got 1"),
        ({"T": "\n" * 999}, r"T must be an int of at least 1, got '\\n"),
        ({"T": 1}, "D=2 must be at most T=1 and L=64"),
    ],
)
def test_cases_that_cannot_be(given: dict[str, object], message: str, tmp_path: Path) -> None:
    case = {"T": 8, "D": 2, "r": 8, **given}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    with pytest.raises(ValueError, match=message) as caught:
        c.cases_of(str(tmp_path / "cases.json"))
    assert len(str(caught.value)) < 200


def test_cases_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps([dataclasses.asdict(MIXED)]))
    assert c.cases_of(str(tmp_path / "cases.json")) == [MIXED]


def test_labels_tell_what_a_case_is() -> None:
    assert MIXED.label == "T=20 D=4 r=8/16/32 64x128 1-9 each"
    assert Case(512, 32, 16, shuffle=True).label == "T=512 D=32 r=16 shuffled"


def test_the_grid_has_its_corners_and_the_mixes_and_depends_on_the_seed_alone() -> None:
    cases = c.cases_of("grid")
    assert len(cases) == len({*cases}) == 120
    assert cases == c.grid(0, 120)
    other = c.grid(1, 130)
    assert len(other) == len({*other}) == 130
    for found in (cases, other):
        for t in (65, 4096):
            for d, r in ((1, 16), (1, 128), (64, 16), (64, 128)):
                shapes = {(k.H, k.N) for k in found if (k.T, k.D, k.r) == (t, d, r)}
                assert shapes >= {(h, n) for h in (2048, 28672) for n in (2048, 28672)}
        for chunk in (192, 448, 1984):
            lengths = (1,) * 63 + (chunk + 1,)
            assert Case(64 + chunk, 64, 16, lengths=lengths) in found
        assert Case(512, 32, 16, shuffle=True) in found
        assert {k.T for k in found} == {*c.TOKENS}
        assert {k.r for k in found} == {*c.RANKS}
        assert {k.in_runs for k in found if k.shuffle} <= {*found}
        assert any(k.ranks for k in found[50:])
    assert len({*cases} & {*other}) < 70


def test_zipf_lengths_fall_and_leave_none_without_a_token() -> None:
    for tokens, adapters in ((65, 64), (2048, 16), (3072, 2)):
        lengths = c.zipf(tokens, adapters)
        assert (sum(lengths), len(lengths), min(lengths) > 0) == (tokens, adapters, True)
        assert list(lengths) == sorted(lengths, reverse=True)
    assert c.zipf(3072, 2)[0] == pytest.approx(2048, abs=2)


def test_parts_hold_each_case_once_and_shuffled_ones_beside_their_runs() -> None:
    cases = c.cases_of("grid")
    parts = [c.part_of(cases, f"{nth}/3") for nth in (1, 2, 3)]
    assert sorted(repr(k) for part in parts for k in part) == sorted(map(repr, cases))
    for part in parts:
        assert 35 < len(part) < 45
        assert {case.in_runs for case in part} <= {*part}


@pytest.mark.parametrize("part", ["3/2", "0/2", "1", "a/b", "1/2/3", "1/99999"])
def test_parts_that_cannot_be(part: str) -> None:
    with pytest.raises(ValueError, match=f"part must be K/N with K from 1 to N.*'{part}'"):
        c.part_of(c.CASES, part)


def test_a_part_without_a_case() -> None:
    with pytest.raises(ValueError, match="part 3/3 of 2 cases holds none"):
        c.part_of(c.CASES[:2], "3/3")


def test_the_sweep_holds_pairs_of_which_one_has_twice_the_tokens() -> None:
    cases = c.cases_of("sweep")
    tokens = {case.T for case in cases}
    assert (min(tokens), max(tokens)) == (1, 8192)
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 65, 257} <= {
        t for t in tokens if 2 * t in tokens
    }


@pytest.mark.parametrize(
    ("cases", "seed", "message"),
    [
        ("grid", -1, "seed must be at least 0, got -1"),
        ("grid:49", None, "the grid has from 50 to 1000 cases, got 49"),
        ("grid:1001", 1, "the grid has from 50 to 1000 cases, got 1001"),
        ("grid:", 1, "the grid is named grid, or grid:200 for 200 cases, got 'grid:'"),
        ("sweep", 1, "a seed is for the cases named grid, got cases 'sweep'"),
    ],
)
def test_grids_that_cannot_be(cases: str, seed: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c.cases_of(cases, seed)


def test_sets_have_names_and_files_have_none() -> None:
    names = ("grid", "grid:60", "sweep", "a.json", "sweep:3", None)
    assert [c.name_of(name) for name in names] == ["grid", "grid", "sweep", None, None, None]
    assert len(c.cases_of("grid:60", 4)) == 60


def test_no_two_adapters_or_operands_hold_the_same_numbers() -> None:
    case = Case(64, 2, 64, 512, 512, 200)
    y, x, a, b = kernels.operands(case)
    assert (y.shape, x.shape, a.shape, b.shape) == (
        (64, 512), (64, 512), (200, 64, 512), (200, 512, 64),
    )  # fmt: skip
    assert a.size > kernels._NOISE
    assert len({one.tobytes() for one in (*a, *b.reshape(a.shape), *y[None], *x[None])}) == 402
    assert np.std(a.astype(np.float32)) == pytest.approx(512**-0.5, rel=0.01)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_call_of_mixed_ranks_gives_what_numpy_expects(shuffle: bool) -> None:
    case = dataclasses.replace(MIXED, shuffle=shuffle)
    given = kernels.operands(case)
    want = kernels.expected(case, given)
    y, x, *stacks = (t.astype(np.float32) for t in given)
    weights = {}  # of each slot, B A
    for (first, slots), a, b in zip(
        zip(case.first_slots.values(), case.slots.values()), stacks[::2], stacks[1::2]
    ):
        weights.update({first + n: b[n] @ a[n] for n in range(slots)})
    rows = [y[t] + weights[slot] @ x[t] for t, slot in enumerate(case.ids())]
    np.testing.assert_allclose(want, np.stack(rows), rtol=1e-4, atol=1e-4)
    call = kernels.call_of(case, kernels.segments_of(case), "decode")
    kernels.check("ours", jax.jit(call)(*map(jnp.asarray, given)), want)
    with pytest.raises(RuntimeError, match="ours is wrong: relative error"):
        kernels.check("ours", jnp.asarray(given[0]), want)


def test_xla_is_timed_by_the_form_that_may_win() -> None:
    assert kernels._xla_phases(Case(512, 1, 16)) == ["prefill"]
    assert kernels._xla_phases(Case(65, 64, 16, 2048, 2048)) == ["decode"]
    assert kernels._xla_phases(Case(256, 1, 128)) == ["decode", "prefill"]
