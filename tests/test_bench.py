"""`jax-lora bench` without a GPU: cases, floors, the peers' protocol, the table, the pictures."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jax_lora import bench
from jax_lora.cli import app

TINY = [
    {"T": 8, "D": 4, "r": 16, "H": 64, "N": 128, "L": 8},
    {"T": 300, "D": 2, "r": 8, "H": 64, "N": 64, "L": 8},
]


def run(tmp_path: Path, *args: object) -> Result:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(TINY))
    return CliRunner().invoke(app, ["bench", "--cases", str(cases), *map(str, args)])


def peers(tmp_path: Path, body: str) -> Path:
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "peer_bench.py").write_text(f"import json, sys\nout = sys.argv[4]\n{body}\n")
    return folder


def test_the_floor_counts_each_byte_once_and_operations_where_they_bound() -> None:
    case = bench.Case(64, 8, 16)
    moved = 2 * (8 * 16 * (4096 + 4096) + 64 * (4096 + 2 * 4096))
    assert case.floor_us(float("inf")) == pytest.approx(moved / 2.40e12 * 1e6)
    large = bench.Case(4096, 1, 512)
    operations = 2 * (2 * 4096 * 512 * 4096)
    assert large.floor_us(1e12) == pytest.approx(operations / 1e12 * 1e6)
    shrink_bytes = 2 * (512 * 4096 + 4096 * 4096)
    between = 2 * 4096 * 512 * 4096 / (shrink_bytes / 2.40e12) / 1.2  # shrink by operations
    expand_bytes = shrink_bytes + 2 * 4096 * 4096
    expected = 1.2 * shrink_bytes / 2.40e12 + expand_bytes / 2.40e12
    assert large.floor_us(between) == pytest.approx(expected * 1e6)


def test_there_are_the_peers_35_cases() -> None:
    assert len(set(bench.CASES)) == 35
    assert {case.phase for case in bench.CASES if case.T > 256} == {"prefill"}


@pytest.mark.parametrize(
    "case", [{"T": 0, "D": 1, "r": 8}, {"T": 8, "D": 3, "r": 8}, {"T": 4, "D": 8, "r": 8}]
)
def test_cases_that_cannot_be(case: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 1|divide T"):
        bench.Case(**case)
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    result = CliRunner().invoke(app, ["bench", "--cases", str(tmp_path / "cases.json")])
    assert result.exit_code == 2


@pytest.mark.parametrize("text", ["{", "[1]", '[{"T": 1}]', '[{"T": 1, "D": 1, "r": 8, "x": 1}]'])
def test_malformed_case_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(ValueError, match="must be a JSON list of objects"):
        bench.read_cases(tmp_path / "cases.json")


def test_without_a_gpu_xla_is_timed_and_the_rest_is_said_to_be_missing(tmp_path: Path) -> None:
    result = run(tmp_path, "--plot", tmp_path / "bench.png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] == "cpu"
    assert [row["ours"] for row in report["results"]] == [None, None]
    assert all(row["xla"] > 0 for row in report["results"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


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
    result = run(tmp_path, "--peers", tmp_path)
    assert result.exit_code == 2
    assert "tests/peers/fetch.sh" in result.stderr
    with pytest.raises(RuntimeError, match="no CUDA here"):
        bench.run(bench.CASES[:1], peers(tmp_path, "sys.exit('no CUDA here')"), lambda text: None)
