"""Reports of `python -m benchmarks kernels`: targets, files, joined parts, pictures."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import kernels, pictures
from benchmarks import report as r
from benchmarks.__main__ import app
from benchmarks.cases import SETS, Case
from benchmarks.report import Report, Result


def result(case: Case, ours: float | None, xla: float = 900.0, **peers: float) -> Result:
    return Result(case, 20.0, 10.0, ours, xla, None, peers, [])


RUNS, SHUFFLED = Case(512, 32, 16), Case(512, 32, 16, shuffle=True)
RESULTS = [
    result(Case(256, 8, 16), 24.0, vllm=48.0),
    result(RUNS, 26.0, vllm=52.0, sgl_v2=39.0),
    result(SHUFFLED, 34.0, csgmv=33.0),
    result(Case(2048, 8, 16), 30.0),
    result(Case(2048, 8, 16, shuffle=True), 61.0, xla=60.0),
    result(Case(1024, 64, 16), None, vllm=1.0),
]


def report(results: list[Result] = RESULTS, name: str | None = "grid") -> Report:
    return Report(name, "H200", "2026-01-01", 4.0e12, 6e14, list(results))


def test_each_target_tells_which_cases_miss_it() -> None:
    found = {verdict.target: verdict for verdict in report().verdicts}
    assert {target: (verdict.cases, verdict.missed) for target, verdict in found.items()} == {
        "1.05 x floor + 3 us up to T=256": (1, []),
        "1.05 x floor of this device + 3 us up to T=256": (
            1, ["T=256 D=8 r=16: 24.00 us, 1.78 x 13.50 (floor 10.00)"]
        ),
        "1.08 x floor + 5 us beyond T=256": (
            2, ["T=2048 D=8 r=16: 30.00 us, 1.13 x 26.60 (floor 20.00)"]
        ),
        "1.08 x floor of this device + 5 us beyond T=256": (
            2,
            [
                "T=2048 D=8 r=16: 30.00 us, 1.90 x 15.80 (floor 10.00)",
                "T=512 D=32 r=16: 26.00 us, 1.65 x 15.80 (floor 10.00)",
            ],
        ),
        "shuffled at most 1.3 x the same in runs up to T=1024": (
            1, ["T=512 D=32 r=16 shuffled: 34.00 us, 1.01 x 33.80 (1.3 x 26.00 in runs)"]
        ),
        "shuffled at most 2 x the same in runs beyond T=1024": (
            1, ["T=2048 D=8 r=16 shuffled: 61.00 us, 1.02 x 60.00 (2 x 30.00 in runs)"]
        ),
        "no slower than the best of vLLM, SGLang and XLA": (
            5,
            [
                "T=512 D=32 r=16 shuffled: 34.00 us, 1.03 x 33.00 (csgmv)",
                "T=2048 D=8 r=16 shuffled: 61.00 us, 1.02 x 60.00 (XLA)",
            ],
        ),
        "no slower than with twice the tokens": (1, []),
    }  # fmt: skip
    assert [verdict.met for verdict in report().verdicts].count(True) == 2


def test_shuffled_tokens_are_held_against_the_same_in_runs() -> None:
    whole = report()
    assert [whole.aim(one) for one in whole.results] == pytest.approx(
        [24.0, 26.6, 33.8, 26.6, 60.0, 26.6]
    )
    assert [whole.met(one) for one in whole.results] == [True, True, False, False, False, None]
    alone = report([RESULTS[2]])
    assert (alone.aim(RESULTS[2]), alone.met(RESULTS[2])) == (None, None)


def test_a_cliff_is_a_case_slower_than_one_with_twice_the_tokens() -> None:
    cases = [Case(t, min(t, 8), 16) for t in (4, 8, 16, 32)]
    times = [4.0, 4.0, 5.0, 4.85]  # the last two differ by less than 2 % of noise
    steady = report([result(case, us) for case, us in zip(cases, times)], "sweep")
    [verdict] = [v for v in steady.verdicts if "twice" in v.target]
    assert (verdict.cases, verdict.missed) == (
        3, ["T=16 D=8 r=16: 5.00 us, 1.01 x 4.95 (1.02 x that of T=32 D=8)"]
    )  # fmt: skip
    apart = report([result(Case(8, 8, 16), 9.0), result(Case(16, 4, 16), 1.0)])
    assert not [v for v in apart.verdicts if "twice" in v.target]


def test_the_mean_between_decode_and_prefill_has_an_aim_of_its_own() -> None:
    more = result(Case(4096, 1, 16), 10.0, vllm=1000.0)
    [mean] = report([*RESULTS, more]).means
    assert (mean.name, mean.cases, mean.aim, mean.met) == ("65 <= T <= 3072", 3, 1.4, True)
    assert mean.speed_up == pytest.approx((2.0 * 1.5 * 33 / 34) ** (1 / 3))
    assert [mean.name for mean in report(name=None).means] == ["decode", "prefill"]


def test_a_saved_report_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    mixed = result(Case(9, 2, 16, lengths=(8, 1), ranks=(8, 16)), 1.0)
    whole = dataclasses.replace(report([*RESULTS, mixed]), failed=["T=1: wrong"])
    whole.save(path)
    assert Report.load(path) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    saved = json.loads(path.read_text())
    assert saved["results"][2]["aim"] == pytest.approx(33.8)
    assert [verdict["met"] for verdict in saved["verdicts"]].count(True) == 2


def test_parts_are_joined_and_shuffled_cases_find_their_runs() -> None:
    halves = report(RESULTS[:2]), dataclasses.replace(report(RESULTS[2:]), copy_rate=4.2e12)
    whole = r.join(halves)
    assert whole.copy_rate == pytest.approx(4.1e12)
    assert dataclasses.replace(whole, copy_rate=4.0e12) == report()
    with pytest.raises(ValueError, match=r"T=256 D=8 r=16 is in several of the reports"):
        r.join([report(), report(RESULTS[:1])])
    other = dataclasses.replace(report(RESULTS[2:]), device="H100")
    with pytest.raises(ValueError, match="different devices can't be joined: H100, H200"):
        r.join([halves[0], other])


def test_join_prints_saved_parts_as_one(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    report(RESULTS[:2]).save(paths[0])
    report(RESULTS[2:]).save(paths[1])
    joined = CliRunner().invoke(app, ["join", *map(str, paths)])
    assert joined.exit_code == 0, joined.output
    told = " ".join(joined.stdout.split())
    for line in (
        "missed: 1.08 x floor + 5 us beyond T=256, in 1 of 2 cases",
        "T=2048 D=8 r=16: 30.00 us, 1.13 x 26.60 (floor 20.00)",
        "met: 65 <= T <= 3072, over the best peer: 1.43 in the geometric mean of 3 cases; aim 1.4",
        "This run copied at 4.00 TB/s and multiplied at 600 TFLOP/s. Floors take 2.40 TB/s, and "
        "those of this device 3.20",
    ):
        assert line in told
    (tmp_path / "bad.json").write_text("[]")
    for name, message in (("bad.json", "is no saved report of kernels"), ("no", "No such file")):
        refused = CliRunner().invoke(app, ["join", str(tmp_path / name)])
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_a_run_that_is_cut_off_leaves_what_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([{"xla": 5.0}])
    monkeypatch.setattr(kernels, "time_case", lambda case, on_gpu, turns: (next(times), []))
    cases = [Case(8, 4, 16), Case(16, 4, 16)]
    with pytest.raises(StopIteration):
        kernels.run(cases, None, lambda text: None, name="grid", save=tmp_path / "a.json")
    left = Report.load(tmp_path / "a.json")
    assert (left.name, [one.case for one in left.results]) == ("grid", cases[:1])
    assert left.results[0].xla == 5.0


@pytest.mark.ci
def test_a_sweep_is_drawn_over_its_tokens(tmp_path: Path) -> None:
    results = [result(case, 3 + case.T / 100, vllm=9.0) for case in SETS["sweep"]]
    pictures.draw(report(results, "sweep"), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
