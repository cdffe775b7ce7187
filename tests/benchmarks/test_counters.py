"""The benchmark of counters: it reads what `ncu` writes, and its cases run without a GPU."""

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import counters, gradients, kernels
from benchmarks.cases import Case
from benchmarks.counters import METRICS, Launch, Profiled

TIME, DRAM = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
SHARED = "launch__shared_mem_per_block_dynamic"

# As `ncu --csv --page raw --log-file` writes it; units vary with `--print-units`.
COLUMNS = {"ID": "", "Process Name": "", "Kernel Name": "", "Grid Size": "", TIME: "us",
           READ: "Mbyte", WRITTEN: "byte", DRAM: "%", SHARED: "Kbyte/block",
           "sm__cycles_active.avg": "cycle", "lts__t_sectors.sum": "sector"}  # fmt: skip
ROWS = [
    ["0", "python3.12", "lora_r48_mosaic_gpu_kernel", "(8, 1, 1)", "2.50", "0.01", "1,024", "0.10",
     "1.5", "1,000.50", "12"],
    ["1", "python3.12", "lora_shrink_r16_r32_mosaic_gpu_kernel", "(132, 1, 1)", "1,020.00", "3,060",
     "1,024,000", "71.25", "200.70", "n/a", "1,000,000"],
]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    quoted = [",".join(f'"{cell}"' for cell in row) for row in [[*COLUMNS], [*COLUMNS.values()]]]
    quoted += [",".join(f'"{cell}"' for cell in row) for row in rows]
    said = "==PROF== Connected to process 12 (/usr/bin/python3.12)\n==PROF== Profiling: 100%\n"
    return said + "\n".join(quoted) + "\n==WARNING== the clocks are not locked\n"


def test_launches_are_read_in_seconds_and_bytes() -> None:
    first, second = counters.launches_of(table(ROWS))
    assert first.kernel == "lora_r48_mosaic_gpu_kernel" and first.is_mark
    assert not second.is_mark
    assert second[TIME] == pytest.approx(1.02e-3) and second[READ] == pytest.approx(3.06e9)
    assert second[WRITTEN] == 1_024_000 and second[DRAM] == 71.25
    assert second[SHARED] == pytest.approx(200_700)
    assert first["sm__cycles_active.avg"] == 1000.5 and math.isnan(second["sm__cycles_active.avg"])
    assert set(second.counters) == {name for name in COLUMNS if "__" in name} - {
        "sm__cycles_active.avg"
    }
    derived = second.derived()
    assert derived["us"] == pytest.approx(1020) and derived["bound"] == "dram"
    assert derived["dram_tb_s"] == pytest.approx((3.06e9 + 1.024e6) / 1.02e-3 / 1e12)
    assert derived["l2_tb_s"] == pytest.approx(32e6 / 1.02e-3 / 1e12)
    assert "1020.00 us  dram 3.00 TB/s 71 %" in second.line and second.line.endswith("=> dram")


def test_a_log_without_a_table_has_no_launches() -> None:
    assert counters.launches_of("") == []
    assert counters.launches_of("==ERROR== Failed to initialize the profiler\n") == []
    assert counters.launches_of(table([])) == []


def test_marking_launches_tell_the_cases_apart() -> None:
    names = "lora_r8 lora_r48 lora_shrink_r16 lora_expand_r16 lora_r48 lora_r48_x lora_r480".split()
    grouped = counters.by_case([Launch(name, {}) for name in names])
    assert [[one.kernel for one in case] for case in grouped] == [
        ["lora_r8"], ["lora_shrink_r16", "lora_expand_r16"], [], ["lora_r480"],
    ]  # fmt: skip


def test_the_busiest_part_bounds_a_kernel_or_none_does() -> None:
    def launch(dram: float, l2: float, l1: float, sm: float, tensor: float) -> Launch:
        elapsed = "pct_of_peak_sustained_elapsed"
        return Launch("lora_r8", {
            DRAM: dram, f"lts__throughput.avg.{elapsed}": l2, f"sm__throughput.avg.{elapsed}": sm,
            "l1tex__throughput.avg.pct_of_peak_sustained_active": l1,
            f"sm__pipe_tensor_cycles_active.avg.{elapsed}": tensor,
            "sm__cycles_active.avg": 500.0, "sm__cycles_elapsed.max": 1000.0,
        })  # fmt: skip

    assert launch(59, 40, 90, 30, 10).bound == "latency"  # half of the time, 90 % are 45
    assert launch(61, 40, 90, 30, 10).bound == "dram"
    assert launch(61, 75, 90, 30, 10).bound == "l2"
    assert launch(30, 30, 30, 80, 70).bound == "sm"
    assert launch(30, 30, 30, 80, 80).bound == "tensor"
    assert launch(30, 30, 30, 80, 80).busy["l1"] == 15 and launch(1, 1, 1, 1, 1).active == 50
    assert Launch("lora_r8", {}).bound == "?"


def test_reasons_to_wait_are_shares_and_selected_is_none() -> None:
    waits = {"selected": 1.0, "long_scoreboard": 5.0, "barrier": 2.0, "wait": 0.0, "sleeping": 2.5}
    limits = {f"launch__occupancy_limit_{name}": n for name, n in (("warps", 4.0), ("blocks", 32))}
    launch = Launch("lora_r8", {STALL.format(n): v for n, v in waits.items()} | limits)
    assert list(launch.stalls) == ["long_scoreboard", "sleeping", "barrier", "selected"]
    assert sum(launch.stalls.values()) == pytest.approx(100) and launch.limit == (4.0, "warps")
    assert "waits: long_scoreboard 48 %, sleeping 24 %" in launch.line
    assert "4/SM by warps" in launch.line
    assert {STALL.format(name) for name in waits} | set(limits) <= set(METRICS)


def test_all_cases_by_name_are_there_and_survive_json(tmp_path: Path) -> None:
    counts = {name: len(cases) for name, cases in counters.GROUPS.items()}
    assert counts == {"missed": 6, "bits": 3, "gradients": 4, "peers": len(counters._LOST)}
    cases = [one for names in counters._DEFAULT for one in counters.cases_of(names)]
    assert len({one.label for one in cases}) == len(cases) == sum(counts.values())
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([one.to_dict() for one in cases]))
    assert counters.cases_of(str(file)) == cases
    assert counters.cases_of(f"bits,{file}") == counters.GROUPS["bits"] + cases


def test_cases_that_can_not_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no case may have rank 48: T=2 D=2 r=16/48"):
        Profiled(Case(2, 2, 48, ranks=(48, 16)))
    with pytest.raises(ValueError, match="no case may have rank 48"):
        Profiled.of({"what": "gradients", "T": 2, "D": 2, "r": 48})
    with pytest.raises(ValueError, match=r"what must be one of .*, got 'forward'"):
        Profiled.of({"what": "forward", "T": 2, "D": 2, "r": 8})
    with pytest.raises(FileNotFoundError, match=r"cases must be missed, bits, .*, got 'nothing'"):
        counters.cases_of("bits,nothing")
    file = tmp_path / "cases.json"
    file.write_text('[{"tokens": 4}]')
    with pytest.raises(ValueError, match="must be a JSON list of cases"):
        counters.cases_of(str(file))


def test_the_marking_launch_is_one_kernel_of_its_rank() -> None:
    mark = counters.MARK
    step = kernels.call_of(mark, kernels.segments_of(mark), mark.phase)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in kernels.shapes_of(mark)]
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    [name] = set(re.findall(r"(lora_\w+)_mosaic_gpu\b", text))
    assert Launch(f"{name}_mosaic_gpu_kernel", {}).is_mark


def test_cases_run_without_a_gpu() -> None:
    small = [
        Profiled(Case(6, 3, 16, 64, 64, L=4, ranks=(8, 16, 16))),
        *(Profiled(Case(6, 3, 16, 64, 64, L=4), dtype) for dtype in ("bfloat16", "float8_e4m3fn")),
        Profiled(gradients.Case(6, 3, 8, 64, 32, "shuffled", L=4), "gradients"),
    ]
    done = counters.run_all(small, time.time() + 300)
    assert done == {"device": jax.devices()[0].device_kind, "started": 4, "failed": {}}
    assert counters.run_all(small, time.time() - 1)["started"] == 0


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [Profiled(Case(2, 1, 8, 32, 32, L=1)), Profiled(Case(3, 1, 8, 32, 32, L=1))]
    step_of = counters.step_of

    def failing(profiled: Profiled) -> counters.Step:
        if profiled.case.T == 2:
            raise RuntimeError("no\n memory")
        return step_of(profiled)

    monkeypatch.setattr(counters, "step_of", failing)
    done = counters.run_all(small, time.time() + 300)
    assert (done["started"], done["failed"]) == (2, {0: "RuntimeError: no memory"})


FAKE = """#!{python}
import json, pathlib, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
log = pathlib.Path(options["--log-file"])
if {lacking!r} in options["--metrics"].split(","):
    log.write_text("==ERROR== Failed to find metric {lacking}\\n")
    sys.exit(1)
job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
pathlib.Path(job["done"]).write_text(json.dumps({{"device": "H200", "started": 1, "failed": {{}}}}))
log.write_text({log!r})
"""


def fake_ncu(folder: Path, log: str) -> str:
    file = folder / "ncu"
    file.write_text(FAKE.format(python=sys.executable, lacking="sm__cycles_elapsed.max", log=log))
    file.chmod(0o755)
    return str(file)


def test_a_run_drops_what_ncu_lacks_and_saves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--ncu", fake_ncu(tmp_path, table(ROWS)), "--cases", "bits", "--out", str(out)]
    assert counters.main(arguments) == 0
    said = capsys.readouterr().out
    assert "ncu lacks sm__cycles_elapsed.max" in said and "H200, jax" in said
    assert "T=64 D=64 r=64 bfloat16\n  lora_shrink_r16_r32 " in said
    assert "T=64 D=64 r=64 float8_e4m3fn: not started" in said
    first, *_, second = json.loads(out.read_text())["cases"]
    [launch] = first["launches"]
    assert launch["counters"][TIME] == pytest.approx(1.02e-3) and launch["sm_active"] is None
    assert (first["what"], second["launches"], second["note"]) == ("bfloat16", [], "not started")


def test_what_ncu_said_is_shown_where_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded.\n"
    assert counters.main(["--ncu", fake_ncu(tmp_path, said), "--cases", "bits"]) == 1
    assert "ncu listed no launch. It said:\n==ERROR== Failed to init" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        counters.main(["--ncu", str(tmp_path / "none")])
    assert "is not on the PATH: give --ncu" in capsys.readouterr().err


def test_cases_of_a_run_that_crashes_are_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []

    def profile(
        batch: Sequence[Profiled], end: float, **_: str
    ) -> tuple[str, list[counters.Result]]:
        runs.append([one.what for one in batch])
        if batch[-1].what == "int8" or len(batch) > 1:
            raise RuntimeError("ncu listed no launch")
        return "H200", [counters.Result(one, []) for one in batch]

    monkeypatch.setattr(counters, "profile", profile)
    assert counters.main(["--ncu", fake_ncu(tmp_path, ""), "--cases", "bits"]) == 1
    alone = ["bfloat16", "int8", "float8_e4m3fn"]
    assert runs == [alone, *([one] for one in alone)]
    assert "T=64 D=64 r=64 int8: ncu listed no launch" in capsys.readouterr().out


def test_lacking_metrics_are_found_in_either_message() -> None:
    log = "==ERROR== Failed to find metric a__b.sum\n"
    log += "==ERROR== Failed to access the following 2 metrics: c__d.sum, e__f.pct\n"
    assert counters.unknown_metrics(log) == {"a__b.sum", "c__d.sum", "e__f.pct"}


def test_the_command_leaves_the_clocks_alone() -> None:
    command = counters.ncu_command("ncu", METRICS, "lora", "all", Path("log"), Path("job"))
    options = dict(itertools.pairwise(command))
    assert options["--clock-control"] == "none" and options["--cache-control"] == "all"
    assert options["--kernel-name"] == "regex:lora" and options["--page"] == "raw"
    assert options["--metrics"].split(",") == [*METRICS] and len(set(METRICS)) == len(METRICS)
    assert command[-2:] == ["--child", "job"] and command[-7] == sys.executable
