"""The benchmark of forward and backward: its floor, and that it runs without a GPU."""

import json

import numpy as np
import pytest

from benchmarks import gradients
from benchmarks.gradients import CASES, Case


def test_floor_is_that_of_the_contract() -> None:
    assert round(Case(8192, 8, 16).floor_us) == 170
    assert round(Case(8192, 32, 16).floor_us) == 178
    assert round(Case(1024, 8, 16).floor_us) == 24
    assert round(Case(64, 8, 16).floor_us) == 4
    assert Case(8192, 8, 16).aim_us == pytest.approx(1.5 * Case(8192, 8, 16).floor_us + 20)
    shuffled = Case(8192, 8, 16, order="shuffled")
    assert shuffled.aim_us == pytest.approx(2 * shuffled.floor_us + 20)


def test_zeros_of_absent_slots_count() -> None:
    few = Case(512, 8, 128, L=64)
    assert few.written_zeros_us == pytest.approx(117.44 / 2.4, rel=0.01)  # 117 MB for 56 slots
    assert few.aim_us > Case(512, 8, 128).aim_us
    assert few.compact_aim_us == Case(512, 8, 128).aim_us


def test_compact_gradients_have_an_aim_of_their_own() -> None:
    case = Case(512, 8, 128, L=64, order="shuffled")
    aim = 2 * case.floor_us + 20
    assert case.compact_aim_us == pytest.approx(aim) and case.aim_us > aim + 50

    def result(ours: float, compact: float) -> gradients.Result:
        return gradients.Result(case, {"ours": ours, "compact": compact}, {}, [])

    assert result(case.aim_us, aim - 1).verdict == "met, compact met"
    assert result(case.aim_us, aim + 1).verdict == "met, compact missed"
    assert result(case.aim_us + 1, aim - 1).verdict == "missed, compact met"
    assert f"(compact {aim:.1f})" in result(1, 1).line
    assert result(1, 1).to_dict()["compact_aim"] == case.compact_aim_us


def test_dense_may_be_faster_by_some() -> None:
    def verdict(**others: float) -> str:
        return gradients.Result(Case(8192, 8, 16), {"ours": 200.0, **others}, {}, []).verdict

    assert verdict(dense=175, ragged=201) == "met"
    assert (
        verdict(dense=173, ragged=199, xla=3)
        == "met, slower than xla, slower than ragged, slower than dense"
    )


def test_every_case_uses_all_of_its_adapters() -> None:
    for case in CASES:
        assert set(case.ids()) == set(range(case.D)), case


def test_a_sample_is_of_all_sizes_and_the_seeds() -> None:
    cases = gradients.cases_of("sample:90", 3)
    assert len({*cases}) == 90 and cases == gradients.cases_of("sample:90", 3)
    assert cases != gradients.cases_of("sample:90", 4)
    tokens = [case.T for case in cases]
    assert {tokens.count(n) for n in tokens} == {10} and {64, 16384} <= {*tokens}
    for name, count in (("D", 7), ("r", 5), ("H", 4), ("N", 4), ("order", 3), ("L", 2)):
        assert len({getattr(case, name) for case in cases}) == count, name
    assert all(set(case.ids()) == set(range(case.D)) for case in cases)
    with pytest.raises(ValueError, match="1 to 1000 cases and a seed from 0, got 0, 0"):
        gradients.cases_of("sample:0")


@pytest.mark.slow
def test_it_runs_without_a_gpu(tmp_path) -> None:
    out = tmp_path / "results.jsonl"
    cases = [Case(12, 3, 8, 64, 64, order="shuffled", L=5)]
    gradients.run_in_processes(cases, ("ours", "compact", "xla", "ragged", "dense"), 60, out, 1)
    [result] = map(json.loads, out.read_text().splitlines())
    assert (
        set(result["us"]) == {"ours", "compact", "xla", "ragged", "dense"} and not result["notes"]
    )
    assert set(result["error"]) == {"y", "dx", "dA", "dB"} and max(result["error"].values()) == 0
    assert result["label"] == "T=12 D=3 of 5 r=8 64x64 shuffled"
    assert np.isfinite(list(result["us"].values())).all()
