"""Tuning tables: what they change and refuse, and `jax-lora bench --tune` with a made-up timer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from typer.testing import CliRunner

from jax_lora.bench import LARGE, Case, tune
from jax_lora.cli import app
from pallas_kernels import add_lora, mosaic_gpu
from pallas_kernels.mosaic_gpu import tuning
from pallas_kernels.mosaic_gpu.config import Config, decode_config, default_config
from pallas_kernels.mosaic_gpu.tuning import ShapeClass

DECODE = ShapeClass(64, 4096, 4096, 16)
PREFILL = ShapeClass(4096, 4096, 4096, 64)


def entry(shape: ShapeClass, changes_bits: object = False, **config: Any) -> dict[str, Any]:
    return {**shape._asdict(), "config": config, "changes_bits": changes_bits}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in force."""
    path = tmp_path / "table.json"
    entries = [
        entry(DECODE, column_clusters=4, stages=1),
        entry(PREFILL, True, block_n=128, split=8),
    ]
    path.write_text(json.dumps({"device": "cpu", "entries": entries}))
    monkeypatch.setenv("JAX_LORA_TUNING", str(path))
    return path


SIZES = st.integers(1, 200_000)


@given(SIZES, SIZES, SIZES, st.integers(1, 64))
def test_a_class_holds_the_shapes_up_to_its_bounds(t: int, h: int, n: int, r: int) -> None:
    shape = ShapeClass.of(t, h, n, r)
    assert ShapeClass.of(*shape) == shape and shape.rank == r
    for bound, size, base in zip(shape, (t, h, n), (4, 2, 2)):
        assert bound // base < size <= bound


def test_entries_are_for_their_class_alone(table: Path) -> None:
    for t, h, n in [(64, 4096, 4096), (17, 2049, 3000)]:
        default = decode_config(t, h, n, 16, tuned=False)
        want = dataclasses.replace(default, column_clusters=4, stages=1)
        assert decode_config(t, h, n, 16) == want != default
    for shape in [(65, 4096, 4096, 16), (16, 4096, 4096, 16), (64, 4104, 4096, 16)]:
        assert decode_config(*shape) == decode_config(*shape, tuned=False)
    for shape in [(64, 4096, 2048, 16), (64, 4096, 4096, 8)]:
        assert decode_config(*shape) == decode_config(*shape, tuned=False)
    default = default_config(4096, 4096, 4096, 64, 8, tuned=False)
    tuned = default_config(4096, 4096, 4096, 64, 8)
    assert tuned == dataclasses.replace(default, block_n=128, split=8) != default
    assert default_config(64, 4096, 4096, 16, 8) == default_config(
        64, 4096, 4096, 16, 8, tuned=False
    )  # entries of few tokens are the one launch's


def test_the_kernels_take_the_config_of_the_table(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []

    def plan(*args: Any, real: Any = mosaic_gpu.plan, **how: Any) -> Any:
        configs.extend(arg for arg in args if isinstance(arg, Config))
        return real(*args, **how)

    monkeypatch.setattr(mosaic_gpu, "plan", plan)
    shapes = (20, 2080), (20, 4000), (9, 16, 4000), (9, 2080, 16)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids = jax.ShapeDtypeStruct((20,), jnp.int32)
    call = jax.jit(lambda *args: add_lora(*args, implementation="mosaic_gpu"))
    call.trace(*arrays, ids)
    default = decode_config(20, 4000, 2080, 16, tuned=False)
    assert set(configs) == {dataclasses.replace(default, column_clusters=4, stages=1)}


@pytest.mark.parametrize("named", ["", "none"])
def test_no_table(named: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "NVIDIA_H100_80GB_HBM3.json"
    packaged.write_text(table.read_text())

    @dataclasses.dataclass
    class Device:
        platform: str = "gpu"
        device_kind: str = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(tuning, "_PACKAGED", tmp_path)
    monkeypatch.setenv("JAX_LORA_TUNING", named)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert tuning.table_path() is None
    monkeypatch.delenv("JAX_LORA_TUNING")
    assert tuning.table_path() == packaged
    assert decode_config(*DECODE).column_clusters == 4
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("gpu", "NVIDIA H200")])
    assert tuning.table_path() is None
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("cpu")])
    assert tuning.table_path() is None
    assert decode_config(*DECODE) == decode_config(*DECODE, tuned=False)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "'entries' is missing"),
        ({"tokens": 64}, "'features' is missing"),
        (entry(ShapeClass(60, 4096, 4096, 16), stages=1), "is no class of shapes"),
        (entry(ShapeClass(64, 4096, 4000, 16), stages=1), "is no class of shapes"),
        (entry(DECODE, stages=0), "stages must be between 1 and 64, got 0"),
        (entry(DECODE, stages=2.5), "must be integers"),
        (entry(DECODE, True, warps=True), "must be integers"),
        (entry(DECODE, block_m=64), "block_m"),
        (entry(DECODE, True, split=3), "split must be 1, 2, 4 or 8, got 3"),
        (entry(DECODE, False, split=4), "changes_bits must be true where"),
        (entry(DECODE, False, warps=8), "changes_bits must be true where"),
        (entry(DECODE, None, stages=2), "changes_bits must be true where"),
        (entry(DECODE, True, stages=2), "changes_bits must be true where"),
    ],
    ids=str,
)
def test_a_bad_table_is_an_error_that_names_it(
    text: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"entries": [text]}))
    monkeypatch.setenv("JAX_LORA_TUNING", str(path))
    for config_of in (lambda: decode_config(*DECODE), lambda: default_config(*PREFILL, 8)):
        with pytest.raises(ValueError, match=why) as raised:
            config_of()
        assert str(raised.value).startswith(f"{path} is no tuning table: ")


def test_a_table_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_LORA_TUNING", "/no/such.json")
    with pytest.raises(FileNotFoundError, match=r"no tuning table /no/such\.json"):
        decode_config(*DECODE)


def test_a_class_has_one_entry(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(json.dumps({"entries": [entry(DECODE, stages=1), entry(DECODE, stages=2)]}))
    with pytest.raises(ValueError, match="not its only entry"):
        tuning.read(path, Config)


def test_the_tables_of_this_package_are_sound_and_change_no_bits() -> None:
    for path in tuning._PACKAGED.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.stem == device.replace(" ", "_")
        for fields in tuning.read(path, Config).values():
            assert not tuning.ORDER_FIELDS & set(fields)


def test_only_the_fields_of_the_order_change_bits() -> None:
    """The one launch, by its emulator."""
    rng = np.random.default_rng(0)
    shapes = (3, 256), (3, 2048), (2, 32, 2048), (2, 256, 32)
    y, x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    # Halves of H that cancel out, in other columns: v is nothing but what rounding left.
    other = rng.permutation(1024)
    x = jnp.concatenate([x[:, :1024], -x[:, other]], axis=1)
    a = jnp.concatenate([a[:, :, :1024], a[:, :, other]], axis=2)
    ids = jnp.asarray([1, 0, 1])

    def bits(**fields: Any) -> bytes:
        config = Config(**{"split": 2, "warps": 4, **fields})
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            out = add_lora(
                y.astype(jnp.float32), x, a, b, ids, implementation="mosaic_gpu", config=config
            )
        return np.asarray(out).tobytes()

    default = bits()
    for same in (dict(stages=1), dict(expand_stages=1), dict(column_clusters=2)):
        assert bits(**same) == default, same
    for other in (dict(warps=8), dict(split=4)):
        assert bits(**other) != default, other


# ------------------------------------------------------------------------------------------ --tune

CASES = [Case(64, 64, 16), Case(64, 8, 16), Case(4096, 32, 64)]


class Timer:
    """10 us; half of that with two clusters, or 128 columns; more for two launches."""

    def __init__(self) -> None:
        self.asked: list[tuple[Case, Config]] = []

    def __call__(self, case: Case, config: Config) -> float:
        self.asked.append((case, config))
        if case.phase == "decode":
            us = 10.0 if config.column_clusters != 2 else 5.0
            return us * (2 if config.warps is None else 1) * (0.9 if config.warps == 8 else 1)
        return 10.0 if config.block_n != 128 else 5.0


def run(path: Path, timer: Any, cases: list[Case] = CASES, **how: Any) -> list[tune.Tuned]:
    return tune.run(cases, path, lambda text: None, timer=timer, **how)


def test_what_gains_is_written_and_then_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, timer = tmp_path / "table.json", Timer()
    decode, prefill = run(path, timer)
    assert (decode.fields, prefill.fields) == ({"column_clusters": 2}, {"block_n": 128})
    assert [tuple(m) for m in decode.measured] == [
        ("T=64 D=64 r=16", 10, 5),
        ("T=64 D=8 r=16", 10, 5),
    ]
    table = json.loads(path.read_text())
    assert table["device"] == jax.devices()[0].device_kind
    assert [e["changes_bits"] for e in table["entries"]] == [False, False]
    assert table["entries"][0]["measured"][1] == {
        "case": "T=64 D=8 r=16",
        "default_us": 10,
        "us": 5,
    }
    assert table["entries"][0]["date"]
    monkeypatch.setenv("JAX_LORA_TUNING", str(path))
    assert decode_config(64, 4096, 4096, 16).column_clusters == 2
    assert default_config(4096, 4096, 4096, 64, 64).block_n == 128
    # It tunes the heuristics, whatever table is in force, and tries no config of a class twice
    # but the best and the default.
    again = Timer()
    assert [t.fields for t in run(tmp_path / "other.json", again)] == [
        decode.fields,
        prefill.fields,
    ]
    assert again.asked == timer.asked
    default, best = (tune.config_of(CASES[0], f) for f in ({}, decode.fields))
    of_first = [config for case, config in timer.asked if case == CASES[0]]
    assert of_first[0] == default and of_first[-2:] == [best, default]
    assert len(of_first) == len(set(of_first)) + 2


def test_bits_change_where_that_is_asked_for_and_it_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    timer = Timer()
    run(path, timer)
    for case in CASES:
        default = tune.config_of(case, {})
        configs = [config for asked, config in timer.asked if asked == case]
        assert {(c.split, c.warps) for c in configs} == {(default.split, default.warps)}
    timer = Timer()
    [decode] = run(path, timer, CASES[:1], change_bits=True)
    assert decode.fields == {"warps": 8, "column_clusters": 2} and decode.changes_bits
    assert json.loads(path.read_text())["entries"][-1]["changes_bits"] is True
    assert {config.warps for _, config in timer.asked} == {4, 8, None}
    two = default_config(64, 4096, 4096, 16, 64, tuned=False)
    assert two in [config for _, config in timer.asked]  # as the kernels fall back to it


def test_less_than_three_percent_or_a_case_that_loses_is_no_gain(tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def little(case: Case, config: Config) -> float:
        return 9.75 if config.column_clusters == 2 else 10.0

    def at_the_cost_of_another(case: Case, config: Config) -> float:
        if config.column_clusters == 1:
            return 10.0
        return 2.0 if case.D == 64 else 10.5

    def once(case: Case, config: Config) -> float:  # a lucky measurement
        seen[config] = seen.get(config, 0) + 1
        return 5.0 if config.column_clusters == 2 and seen[config] == 1 else 10.0

    for timer in (little, at_the_cost_of_another, once):
        seen: dict[Config, int] = {}
        [found] = run(path, timer, CASES[:1] if timer is once else CASES[:2])
        assert found.fields == {}, timer
        assert all(m.us == m.default_us for m in found.measured)
        assert json.loads(path.read_text())["entries"] == []


def test_candidates_that_fail_are_told_and_passed_over(tmp_path: Path) -> None:
    def timer(case: Case, config: Config) -> float:
        if config.column_clusters == 2:
            raise RuntimeError("is wrong at [1, 2]")
        return {1: 10.0, 4: 8.0}[config.column_clusters]

    [found] = run(tmp_path / "table.json", timer, CASES[:1])
    assert found.fields == {"column_clusters": 4}
    assert found.notes == ["T=64 D=64 r=16: column_clusters=2: is wrong at [1, 2]"]

    def none_runs(case: Case, config: Config) -> float:
        raise NotImplementedError("needs Hopper")

    [found] = run(tmp_path / "table.json", none_runs, CASES[:1])
    assert (found.fields, found.measured) == ({}, [])
    assert found.notes == ["T=64 D=64 r=16: needs Hopper"]


def test_a_cut_run_keeps_what_it_has_and_another_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def cut(case: Case, config: Config) -> float:
        if case.T == 4096:
            raise KeyboardInterrupt
        return Timer()(case, config)

    with pytest.raises(KeyboardInterrupt):
        run(path, cut)
    assert set(tuning.read(path, Config)) == {DECODE}
    run(path, Timer(), CASES[2:])
    assert set(tuning.read(path, Config)) == {DECODE, PREFILL}
    run(path, lambda case, config: 1.0, CASES[:2])  # nothing gains now
    assert set(tuning.read(path, Config)) == {PREFILL}


def test_a_table_of_another_gpu_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"device": "NVIDIA H200", "entries": []}))
    with pytest.raises(ValueError, match=r"table\.json is a table of 'NVIDIA H200', this is 'cpu'"):
        run(path, Timer())
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"table\.json is no tuning table"):
        run(path, Timer())
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "no" / "table.json", Timer())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cases = tmp_path / "table.json", tmp_path / "cases.json"
    cases.write_text(json.dumps([{"T": 64, "D": 8, "r": 16}, {"T": 1, "D": 1, "r": 16}]))
    command = ["bench", "--cases", str(cases), "--tune", str(path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "tuning needs a GPU, JAX runs on cpu" in result.stderr
    assert not path.exists()
    monkeypatch.setattr(tune, "gpu_timer", Timer)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()[1:3]
    assert first.split() == "T=64 D=8 r=16 10.00 5.00 column_clusters=2".split()
    assert second.split() == "T=1 D=1 r=16 10.00 5.00 column_clusters=2".split()
    assert f"JAX_LORA_TUNING={path}" in result.stdout
    assert "T=64 D=8 r=16: 5.00 us with column_clusters=2" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, [*command, "--tune-bits"])
    assert "warps=8, column_clusters=2" in result.stdout and "changes bits" in result.stdout
    result = CliRunner().invoke(app, [*command, "--json"])
    report = json.loads(result.stdout)
    assert report["table"] == str(path)
    assert [t["config"] for t in report["tuned"]] == 2 * [{"column_clusters": 2}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tune", "a.json", "--plot", "b.png"], "--tune takes no --peers and no --plot"),
        (["--tune-bits"], "--tune-bits goes with --tune"),
    ],
)
def test_options_that_do_not_go_together(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_default_cases_and_every_candidate_is_a_config() -> None:
    classes = {ShapeClass.of(c.T, c.H, c.N, c.r) for c in tune.CASES}
    assert (len(tune.CASES), len(classes)) == (26, 15)
    for case in [*tune.CASES, *LARGE]:
        for name, values in tune._TRIED[case.phase].items():
            for value in values:
                assert isinstance(tune.config_of(case, {name: value}), mosaic_gpu.Config)


def test_the_timer_checks_what_it_times() -> None:
    """On a small case, in interpret mode."""
    case, timer = Case(3, 1, 16, 64, 64, 2), tune.CheckedTimer()
    one = Config(split=1, warps=4)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        assert timer(case, one) > 0
        assert timer(case, dataclasses.replace(one, stages=2)) > 0
        timer._first[case] = one, timer._first[case][1] * 1.01
        with pytest.raises(RuntimeError, match=r"wrong at|other bits than"):
            timer(case, one)
