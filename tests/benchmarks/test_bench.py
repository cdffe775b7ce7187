"""`python -m benchmarks` without a GPU: cases, floors, peers, tables, pictures; the whole step."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import Result as Output
from typer.testing import CliRunner

from benchmarks import forms, kernels, launches, step, timing
from benchmarks.__main__ import app
from benchmarks.cases import CASES, SETS, Case, cases_of
from benchmarks.peer_runs import run_peers
from benchmarks.report import Report, Result

TINY = [
    {"T": 8, "D": 4, "r": 16, "H": 64, "N": 128, "L": 8},
    {"T": 300, "D": 2, "r": 8, "H": 64, "N": 64, "L": 8},
]


def run(tmp_path: Path, *args: object) -> Output:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(TINY))
    return CliRunner().invoke(app, ["kernels", "--cases", str(cases), *map(str, args)])


def peers(tmp_path: Path, body: str) -> Path:
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "peer_bench.py").write_text(f"import json, sys\nout = sys.argv[4]\n{body}\n")
    return folder


def test_the_floor_counts_each_byte_once_and_operations_where_they_bound() -> None:
    case = Case(64, 8, 16)
    moved = 2 * (8 * 16 * (4096 + 4096) + 64 * (4096 + 2 * 4096))
    assert case.floor_us(float("inf")) == pytest.approx(moved / 2.40e12 * 1e6)
    large = Case(4096, 1, 512)
    operations = 2 * (2 * 4096 * 512 * 4096)
    assert large.floor_us(1e12) == pytest.approx(operations / 1e12 * 1e6)
    shrink_bytes = 2 * (512 * 4096 + 4096 * 4096)
    between = 2 * 4096 * 512 * 4096 / (shrink_bytes / 2.40e12) / 1.2  # shrink by operations
    expand_bytes = shrink_bytes + 2 * 4096 * 4096
    expected = 1.2 * shrink_bytes / 2.40e12 + expand_bytes / 2.40e12
    assert large.floor_us(between) == pytest.approx(expected * 1e6)
    assert timing.copy_rate_here(3.00e12) == pytest.approx(2.40e12)


def test_there_are_the_peers_35_cases() -> None:
    assert len(set(CASES)) == 35
    assert {case.phase for case in CASES if case.T > 256} == {"prefill"}


@pytest.mark.parametrize("text", ["{", "[1]", '[{"T": 1}]', '[{"T": 1, "D": 1, "r": 8, "x": 1}]'])
def test_malformed_case_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(ValueError, match="must be a JSON list of objects"):
        cases_of(str(tmp_path / "cases.json"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--plot", "x.foo"), "plot 'x.foo' must end with one of ."),
        (("--plot", "no/such/x.png"), "there is no folder 'no/such'"),
        (("--cases", "."), "Is a directory"),
        (("--cases", '[{"T": 64}]'), "cases must be one of grid, large, between, sweep, or a file"),
        (("--save", "no/such/x.json"), "save 'no/such/x.json': there is no such folder"),
        (("--part", "3/2"), "part must be K/N with K from 1 to N, such as 1/2, got '3/2'"),
        (("--seed", "3"), "a seed is for the cases named grid, got cases None"),
        (("--cases", "grid:x"), "the grid is named grid, or grid:200 for 200 cases, got 'grid:x'"),
    ],
)
def test_bad_files_are_refused_before_anything_is_timed(
    args: tuple[str, str], message: str
) -> None:
    result = CliRunner().invoke(app, ["kernels", *args])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "timing" not in result.stderr


@pytest.mark.ci
def test_without_a_gpu_xla_is_timed_and_the_rest_is_said_to_be_missing(tmp_path: Path) -> None:
    result = run(tmp_path, "--plot", tmp_path / "bench.png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] == "cpu"
    assert [row["ours"] for row in report["results"]] == [None, None]
    assert all(row["xla"] > 0 for row in report["results"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("backend", "calls", "turns"), [("cpu", 1, 1), ("gpu", 64, 8), ("gpu", 999, 1)]
)
def test_a_loop_takes_turns_and_keeps_the_carry_that_it_was_given(
    backend: str, calls: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loop = timing.Loop(lambda carry, step: [carry[0] + step], calls)
    carry = [jnp.zeros(3)]
    assert loop.us(carry, jnp.float32(2), least_ms=1) > 0
    np.testing.assert_array_equal(loop(carry, jnp.float32(2))[0], np.full(3, 2 * turns))
    np.testing.assert_array_equal(carry[0], np.zeros(3))


def take_from(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that take these times."""
    monkeypatch.setattr(timing.Loop, "us", lambda loop, carry: times.pop(0))


@pytest.mark.parametrize(
    ("times", "xla", "ours"),
    [
        ([6.0, 8.0, 5.0], 5.0, 6.0),  # close to ours, so with as many calls as ours
        ([6.0, 90.0], 6.0, 6.0),  # too long to be, but ours is one of XLA's forms
        ([6.0, 8.0, 6.1], 6.0, 6.0),
    ],
)
def test_xla_is_timed_with_many_calls_where_it_is_close_to_ours(
    times: list[float], xla: float, ours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(times)
    take_from(left, monkeypatch)
    found, [note] = kernels.time_case(Case(1, 1, 64, 64, 128, 8), True)
    assert (found["xla"], found["ours"], left) == (xla, ours, [])
    assert "XLA's form" in note


def test_without_a_gpu_each_form_of_xla_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [900.0, 20.0]
    take_from(left, monkeypatch)
    assert kernels.time_case(Case(64, 1, 128, 256, 256, 2), False)[0]["xla"] == 20.0
    assert left == []


def test_progress_tells_times_as_they_are_taken() -> None:
    lines: list[str] = []
    [result] = kernels.run([Case(8, 4, 16, 64, 128, 8)], None, lines.append).results
    label = "T=8 D=4 r=16 64x128"
    assert lines == [f"timing {label}", f"{label} takes {result.xla:,.2f} us"]


@pytest.mark.ci
def test_tokamax_is_timed_and_checked_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ragged_dot", jax.lax.ragged_dot)
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert all(row["tokamax"] > 0 for row in json.loads(result.stdout)["results"])
    assert "tokamax" in run(tmp_path).stdout
    monkeypatch.setattr(
        kernels, "ragged_dot", lambda *args, **how: 2 * jax.lax.ragged_dot(*args, **how)
    )
    wrong = run(tmp_path, "--save", tmp_path / "report.json")
    assert wrong.exit_code == 1
    assert "failed: T=8 D=4 r=16 64x128: tokamax is wrong: relative error" in wrong.stdout
    left = Report.load(tmp_path / "report.json")
    assert (len(left.failed), left.results) == (2, [])


def test_peers_are_asked_for_the_same_cases_and_a_failing_one_is_a_note(tmp_path: Path) -> None:
    body = """
cases = json.load(open(sys.argv[2]))
rows = [dict(case, vllm=10.0, csgmv="fails: OSError", sgl_v2=5.0) for case in cases]
json.dump(dict(rows=rows), open(out, "w"))"""
    result = run(tmp_path, "--peers", peers(tmp_path, body))
    assert result.exit_code == 0, result.output
    assert "10.00" in result.stdout
    assert "T=8 D=4 r=16 64x128: csgmv fails: OSError" in result.stdout
    assert "No GPU: the kernels and the peers were not measured" in result.stdout


def test_a_folder_without_peers_and_peers_that_fail(tmp_path: Path) -> None:
    for processes in (1, 2):
        result = run(tmp_path, "--peers", tmp_path, "--processes", processes)
        assert result.exit_code == 2
        assert "peer_bench.py' is missing; make the folder with benchmarks/peers/fetch.sh" in (
            result.stderr
        )
    with pytest.raises(RuntimeError, match="no CUDA here"):
        kernels.run(CASES[:1], peers(tmp_path, "sys.exit('no CUDA here')"), lambda text: None)


def test_peers_that_end_early_leave_the_rows_that_they_wrote(tmp_path: Path) -> None:
    body = """
json.dump(dict(rows=[dict(vllm=10.0, csgmv=9.0)]), open(out, "w"))
sys.exit("illegal address")"""
    lines: list[str] = []
    rows = run_peers(CASES[:2], peers(tmp_path, body), lines.append, kernels.ALONE)
    assert rows[0] == {"vllm": 10.0, "csgmv": 9.0}
    assert rows[1]["sgl_v2"] == "fails: its process ended before"
    assert "illegal address\n\nThe peers ran 1 of 2 cases" in lines[-1]


def result(case: Case, ours: float | None, xla: float, **peers: float) -> Result:
    return Result(case, 10.0, None, ours, xla, None, peers, [])


RESULTS = [
    result(Case(64, 8, 16), 13.5, 20.0, vllm=27.0, sgl_v2=40.0),
    result(Case(256, 64, 16), 20.0, 15.0, vllm=10.0, csgmv=19.0, sgl_v2=30.0),
    result(Case(4096, 1, 16), 15.9, 900.0, sgl_v2=19.875),
    result(Case(4096, 1, 64), None, 900.0, vllm=17.0),
    result(Case(1, 1, 16), 4.0, 3.9),
]


def test_a_result_says_whether_the_aim_is_met_and_what_is_faster() -> None:
    whole = Report(None, "H100", "2026-01-01", 2.4e12, 6e14, RESULTS)
    assert [whole.aim(r) for r in RESULTS] == [13.5, 13.5, 15.8, 15.8, 13.5]
    assert [whole.met(r) for r in RESULTS] == [True, False, False, None, True]
    assert [r.slower_than for r in RESULTS] == [[], ["XLA", "vllm", "csgmv"], [], [], ["XLA"]]
    assert [r.speed_up for r in RESULTS] == [2.0, 0.5, 1.25, None, None]


def test_the_report_holds_geometric_means_against_the_aims(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(None, "H100", "2026-01-01", 2.4e12, 6e14, RESULTS)
    decode, prefill = report.means
    assert (decode.name, decode.cases, decode.aim, decode.met) == ("decode", 2, 1.8, False)
    assert decode.speed_up == pytest.approx(1.0)  # of 2 and 1/2
    assert (prefill.name, prefill.cases, prefill.aim, prefill.met) == ("prefill", 1, 1.15, True)
    assert prefill.speed_up == pytest.approx(1.25)
    assert Report(None, "H100", "2026-01-01", None, None, RESULTS[3:]).means == []
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert [mean["met"] for mean in as_dict["means"]] == [False, True]
    row = as_dict["results"][1]
    assert (row["aim"], row["met"], row["speed_up"]) == (13.5, False, 0.5)
    assert row["slower_than"] == ["XLA", "vllm", "csgmv"]

    asked = []
    monkeypatch.setattr(kernels, "run", lambda cases, *_, **__: asked.append(cases) or report)
    printed = CliRunner().invoke(app, ["kernels", "--cases", "large"])
    assert printed.exit_code == 0, printed.output
    assert asked == [SETS["large"]]
    lines = printed.stdout.splitlines()
    assert lines[1].split()[3:] == "10.00 13.50 20.00 27.00 - 40.00 2.00 13.50 met".split()
    row = "10.00 20.00 15.00 10.00 19.00 30.00 0.50 13.50 missed XLA, vllm, csgmv"
    assert lines[2].split()[3:] == row.split()
    told = " ".join(printed.stdout.split())
    for line in (
        "missed: decode, over the best peer: 1.00 in the geometric mean of 2 cases; aim 1.8",
        "met: prefill, over the best peer: 1.25 in the geometric mean of 1 cases; aim 1.15",
        "missed: 1.05 x floor + 3 us up to T=256, in 2 of 3 cases "
        "T=256 D=64 r=16: 20.00 us, 1.48 x 13.50 (floor 10.00)",
        "missed: 1.08 x floor + 5 us beyond T=256, in 0 of 1 cases",
        "missed: no slower than the best of vLLM, SGLang and XLA, in 2 of 4 cases",
    ):
        assert line in told


def test_the_sets_of_cases_that_have_a_name() -> None:
    assert {(c.T, c.D, c.r) for c in SETS["large"]} == {
        (64, 8, 256), (64, 8, 512), (4096, 8, 256), (4096, 8, 512), (8192, 32, 16), (8192, 1, 128),
    }  # fmt: skip
    assert {(c.T, c.D, c.r) for c in SETS["between"]} == {
        (256, 8, 128), (512, 4, 16), (512, 32, 16), (512, 8, 64),
        (1024, 8, 16), (1024, 64, 64), (2048, 8, 16),
    }  # fmt: skip
    for name, cases in SETS.items():
        assert cases_of(name) is cases
        assert name == "sweep" or not set(cases) & set(CASES)
    assert cases_of(None) is CASES


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("kernels", "step", "torch"):
        assert command in result.stdout


STEP = ["step", "--layers", "1", "--batch", "16", "--context", "8", "--prefill", "16"]


@pytest.mark.slow
def test_step_times_a_small_model_without_a_gpu_and_holds_it_against_nothing() -> None:
    result = CliRunner().invoke(app, [*STEP, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["name"] for row in report["rows"]] == [
        "no LoRA",
        "prefill of 16 tokens, no LoRA",
        "no adapter in the batch, bucket 16",
        "8 adapters of rank 16",
        "16 adapters of rank 16",
        "prefill of 16 tokens, 8 adapters of rank 16",
        "no adapter in the batch, buckets 8, 16, 32, 64, 128",
        "8 adapters of ranks 8, 8, 16, 16, 32, 64, 64, 128",
        *[
            f"one call of 16 tokens, {adapters}"
            for _ in ("decode", "prefill")
            for adapters in (
                "7 adapters of rank 48",
                "8 adapters of ranks 8, 8, 16, 16, 32, 64, 64, 128",
            )
        ],
        "one call of 16 tokens, 8 adapters of rank 16",
        "one call of 16 tokens, 8 adapters of rank 16, 4 buckets without a token",
        "one call of q, k, v, 8 adapters of rank 16",
        "one call of gate, up, 8 adapters of rank 16",
        "segments of 256 tokens",
        "segments of 8192 tokens",
    ]
    assert all(row["us"] > 0 and row["ratio"] is None for row in report["rows"])
    assert (report["device"], report["launches"]) == ("cpu", [])
    hidden, inner, keys, vocabulary = 64, 128, 32, 256
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * inner + 2 * hidden
    assert report["weight_bytes"] == 2 * (layer + hidden + hidden * vocabulary)
    assert report["cache_bytes"] == 2 * 16 * 8 * 2 * keys


def test_one_bucket_has_the_bytes_of_the_mixed_ones() -> None:
    one = launches.Launch(64, 4096, (4096,), step.ONE_BUCKET)
    assert one.floor_us == launches.Launch(64, 4096, (4096,), step.MIXED_RANKS).floor_us
    # 336 ranks of A and B, x, and y twice, in 2 bytes each
    assert one.floor_us == pytest.approx(2 * (336 * 8192 + 64 * 3 * 4096) / 2.40e6)


@pytest.mark.parametrize("tokens", [16, 512])
def test_every_token_of_a_launch_has_one_adapter(tokens: int) -> None:
    launch = launches.Launch(tokens, 64, (64, 32), (8, 8, 16), empty=(64,))
    assert launch.slots() == {8: 2, 16: 1, 64: 1}
    assert launch.first_slots() == {8: 0, 16: 2, 64: 3}
    used = np.stack([launch.indices() == slot for slot in range(3)])
    assert (used.sum(axis=0) == 1).all()
    assert used.sum(axis=1).tolist() in ([6, 5, 5], [171, 171, 170])
    runs = (np.diff(used.argmax(axis=0)) != 0).sum()
    assert runs == (2 if tokens == 512 else 15)


def report() -> step.Report:
    rows = [
        step.Row("no LoRA", 10.0, 1.0, 20.0, "20", (step.Kernel("gemm", 7.0, 9.0),)),
        step.Row("with", 30.0, 1.0, 20.0, "20"),
    ]
    counted = [step.Launches("no LoRA", 584, 64, 1, 3)]
    shape = step.Shape.of_this_machine(scan=False)
    return step.Report("H100", "2026-01-01", shape, 1, rows, counted)


def test_step_says_what_is_met_and_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "run", lambda shape, progress, profile: report())
    result = CliRunner().invoke(app, ["step"])
    assert result.exit_code == 0, result.output
    met, missed = result.stdout.splitlines()[1:3]
    assert met.split() == ["no", "LoRA", "10.00", "20.00", "0.50", "met", "1.00"]
    assert missed.split() == ["with", "30.00", "20.00", "1.50", "missed", "1.00"]
    told = " ".join(result.stdout.split())
    assert "584 launches, 32 of them LoRA kernels of each layer; 1 CUDA graphs, 3 launches" in told
    assert "no LoRA: 9.0 us, 7 x gemm" in told
    assert "No GPU" not in told


def test_forms_say_what_a_scan_takes_over_layers_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    us: dict[forms.Form, float] = {"scan_layers": 103.0, "lax.scan": 150.0, "one by one": 100.0}
    rows = [
        forms.Row("slow", us | {"scan_layers": 103.1}, on_gpu=True),
        forms.Row("as fast", us, on_gpu=True),
        forms.Row("on a CPU", us, on_gpu=False),
    ]
    report = forms.Report("H200", "2026-01-01", step.Shape.of_this_machine(), rows)
    monkeypatch.setattr(forms, "run", lambda shape, progress, rounds: report)
    lines = CliRunner().invoke(app, ["forms"]).stdout.splitlines()
    for name, verdict in ("slow", "missed"), ("as fast", "met"), ("on a CPU", "1.030"):
        assert next(line for line in lines if name in line).strip(" │┃").endswith(verdict)


@pytest.mark.slow
def test_forms_times_every_form_of_a_small_model() -> None:
    size = ["--layers", "2", "--batch", "16", "--context", "8", "--prefill", "16", "--rounds", "1"]
    result = CliRunner().invoke(app, ["forms", *size, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 8
    for row in rows:
        assert list(row["us"]) == list(forms.FORMS)
        assert min(row["us"].values()) > 0


def test_steps_that_cannot_be() -> None:
    for option in ("--batch", "--prefill"):
        result = CliRunner().invoke(app, ["step", option, "12"])
        assert result.exit_code == 2
        assert f"{option[2:]} must be a positive multiple of 8, got 12" in result.stderr
    result = CliRunner().invoke(app, ["step", "--profile"])
    assert result.exit_code == 2
    assert "a profile needs a GPU" in result.stderr


def test_launches_are_those_of_the_longest_path() -> None:
    graph = """
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | next=006 (1)] loop_select_fusion grid: [1, 1, 1]
    006: kConditional [prev=001 (1) | next=007 (1)]
      false_branch:
        002: kCustomCall [source | next=003 (1)] kCustomCall
        003: kCublasLtMatmul [prev=002 (1) | sink] kCublasLtMatmul
      true_branch:
        004: kCublasLtMatmul [source | sink] kCublasLtMatmul
    007: kCustomKernel [prev=006 (1) | sink] loop_add_fusion grid: [1, 1, 1]
"""
    assert step.Launches.of_thunks("a", graph) == step.Launches("a", 4, 1, 1, 0)
    outside = """
001: kCustomCall [source | next=000 (1)] kCustomCall
000: kCommandBuffer [prev=001 (1) | next=003 (1)]
    002: kCustomKernel [source | sink] loop_select_fusion grid: [1, 1, 1]
003: kCustomCall [prev=000 (1) | next=000 (1)] kCustomCall
000: kCommandBuffer [prev=003 (1) | sink]
    004: kCustomKernel [source | sink] loop_select_fusion grid: [1, 1, 1]
"""
    assert step.Launches.of_thunks("b", outside) == step.Launches("b", 4, 2, 2, 2)
