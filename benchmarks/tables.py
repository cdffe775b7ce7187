"""Prints the reports as tables."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.report import PEERS, Report
from benchmarks.timing import COPY_RATE, copy_rate_here

if TYPE_CHECKING:
    from benchmarks import (
        chaos,
        endpoint,
        forms,
        idle,
        mesh,
        serve,
        soak,
        step,
        torch_calls,
        train,
    )

_stdout = Console()


def print_kernels(report: Report) -> None:
    """A row per case, what was left out, and each target with what missed it."""
    others = ["tokamax"] if any(result.tokamax for result in report.results) else []
    others += PEERS
    names = ["case", "floor", "ours", "XLA", *others, "speed-up", "aim", "", "slower than"]
    table = _table(names, range(1, len(names) - 2))
    for result in report.results:
        times = [result.floor, result.ours, result.xla]
        times += [{"tokamax": result.tokamax, **result.peers}.get(other) for other in others]
        times += [result.speed_up, report.aim(result)]
        met = report.met(result)
        table.add_row(
            result.case.label,
            *("-" if t is None else f"{t:.2f}" for t in times),
            "" if met is None else _verdict(met),
            ", ".join(result.slower_than),
        )
    # Each row stands on a line of its own, which a narrow terminal may wrap.
    Console(width=max(_stdout.width, 160)).print(table)
    for result in report.results:
        for note in result.notes:
            _say(f"{result.case.label}: {note}")
    for mean in report.means:
        _say(
            f"{_verdict(mean.met)}: {mean.name}, over the best peer: {mean.speed_up:.2f} in the "
            f"geometric mean of {mean.cases} cases; aim {mean.aim:g}"
        )
    for verdict in report.verdicts:
        _say(
            f"{_verdict(verdict.met)}: {verdict.target}, in "
            f"{verdict.cases - len(verdict.missed)} of {verdict.cases} cases"
        )
        for missed in verdict.missed:
            _say(f"    {missed}")
    for failed in report.failed:
        _say(f"failed: {failed}")
    _say(f"{report.device}, {report.date}; microseconds.")
    _say_rates(report)


def _say_rates(report: Report) -> None:
    if report.copy_rate is None or report.matmul_rate is None:
        _say(
            "No GPU: the kernels and the peers were not measured, XLA ran on the CPU, and the "
            "floor is an H100's."
        )
    else:
        here = copy_rate_here(report.copy_rate)
        _say(
            f"This run copied at {report.copy_rate / 1e12:.2f} TB/s and multiplied at "
            f"{report.matmul_rate / 1e12:.0f} TFLOP/s. Floors take {COPY_RATE / 1e12:.2f} TB/s, "
            f"and those of this device {here / 1e12:.2f}: the same share of what it copies at."
        )


def print_train(report: "train.Report") -> None:
    """A row per way to train, what publishing takes, and the profiles."""
    from benchmarks.train import MORE_BYTES, TARGETS, WAYS

    names = ["step", "ms", "x frozen", "target", "", "GB", "adapters", "optimizer", "more"]
    table = _table(names, (1, 2, 3, 5, 6, 7, 8))
    on_gpu = report.device != "cpu"
    for row in report.rows:
        ratio, target, more = report.ratio(row), TARGETS.get(row.way), report.more_bytes(row)
        met = ""
        if on_gpu and target and ratio and more is not None:
            met = _verdict(ratio <= target and more <= MORE_BYTES)
        sizes = (row.peak, row.adapters, row.optimizer, more)
        table.add_row(
            WAYS[row.way],
            f"{row.ms:,.1f}",
            *("-" if value is None else f"{value:.2f}" for value in (ratio, target)),
            met,
            *("-" if size is None else f"{size / 1e9:.2f}" for size in sizes),
        )
    Console(width=max(_stdout.width, 140)).print(table)
    layers, tokens = report.shape.config.num_hidden_layers, report.shape.tokens
    _say(f"{layers} layers, {tokens} tokens; {report.device}, {report.date}.")
    for row in report.rows:
        if row.way == "frozen":
            rate = report.shape.product_flops / row.ms / 1e9
            _say(f"The frozen step's products with weights alone make {rate:.1f} TFLOP/s of it.")
        if row.kernels:
            _say(f"Kernels of {WAYS[row.way]}:")
        for kernel in row.kernels[:20]:
            _say(f"    {kernel.us:10,.0f} us in {kernel.launches:6g} launches  {kernel.name:.100}")
    if report.publish_us is not None:
        host, whole = report.publish_us
        _say(f"publish takes the host {host:,.0f} us, and {whole:,.0f} us until the copy is there.")


def print_step(report: "step.Report") -> None:
    """A row per step and single call, what a decode step launches, and the profiles."""
    table = _table(["step", "us", "target", "x target", "", "host us"], (1, 2, 3, 5))
    for row in report.rows:
        cells = [row.us, row.target_us, row.ratio, row.host_us]
        us, target, ratio, host = ("-" if cell is None else f"{cell:,.2f}" for cell in cells)
        met = "" if row.ratio is None else _verdict(row.ratio <= 1)
        table.add_row(row.name, us, target, ratio, met, host)
    _stdout.print(table)
    for launches in report.launches:
        # A scan's turn is listed once.
        layers = 1 if report.shape.scan else report.shape.config.num_hidden_layers
        per_layer = launches.custom_calls / layers
        _say(
            f"Decode, {launches.program}: {launches.launches} launches, {per_layer:g} of them LoRA "
            f"kernels of each layer; {launches.graphs} CUDA graphs, {launches.outside} launches "
            "outside of them."
        )
    for row in report.rows:
        for kernel in row.kernels[:15]:
            _say(f"{row.name}: {kernel.us:10.1f} us, {kernel.launches:g} x {kernel.name}")
    _say(f"{report.device}, {report.date}; microseconds.")
    if any(row.target_us is None for row in report.rows if row.target):
        _say(
            "No GPU: a small model ran, held against no target, and neither launches nor CUDA "
            "graphs were counted."
        )


def print_idle(profile: "idle.Profile") -> None:
    """How long the GPU waits for the engine, and what a step launches."""
    judged = "no GPU, so nothing is judged"
    if profile.idle is not None:
        judged = (
            f"the GPU idles {profile.idle:.2%} of them, at most 2% should be: "
            f"{_verdict(bool(profile.is_met))}"
        )
    for kernel in profile.kernels[:30]:
        _say(f"{kernel.us:10.1f} us, {kernel.launches:g} x {kernel.name}")
    launches = sum(kernel.launches for kernel in profile.kernels)
    busy = sum(kernel.us for kernel in profile.kernels)
    _say(
        f"{launches:,.0f} launches of a step, {busy:,.0f} us together, in the mean of "
        f"{profile.profiled} steps."
    )
    _say(
        f"{profile.steps} steps of {profile.rows} rows in an engine: {judged}. A step takes "
        f"{profile.step_ms:.2f} ms while it is traced, and {profile.untraced_ms:.2f} else. "
        f"{profile.device}."
    )


def print_forms(report: "forms.Report") -> None:
    """A row per step, a column per form."""
    names = list(report.rows[0].us)
    table = _table(
        ["step", *(f"{name}, us" for name in names), "scan / one by one", ""],
        range(1, len(names) + 2),
    )
    for row in report.rows:
        times = (f"{us:,.0f}" for us in row.us.values())
        met = "" if row.is_met is None else _verdict(row.is_met)
        table.add_row(row.name, *times, f"{row.ratio:.3f}", met)
    _stdout.print(table)
    _say(f"{report.device}, {report.date}; at most {report.rows[0].most:g} x is the aim.")


def print_mesh(report: "mesh.Report") -> None:
    """A row per step and number of GPUs."""
    headings = ["step", "GPUs", "us", "LoRA", "target", "", "collectives", "error"]
    table = _table(headings, (1, 2, 3, 4, 6, 7))
    for row in report.rows:
        target = "-" if row.target_us is None else f"{row.target_us / row.base_us - 1:.1%}"
        met = "" if row.target_us is None else _verdict(row.us <= row.target_us)
        exchanged = "-"
        if row.exchanges is not None:
            counts = (f"{count} {name}" for name, count in row.exchanges.items())
            exchanged = ", ".join(counts) or "none"
        if row.exchange_us is not None:
            exchanged = f"{row.exchange_us / row.us:.1%}, {exchanged}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        cells = [f"{row.us:,.0f}", f"{row.lora_share:.1%}", target, met, exchanged, error]
        table.add_row(f"{row.phase}, {row.adapters}", f"{row.gpus}", *cells)
    _stdout.print(table)
    form = "ranks divided too" if report.fully_sharded else "ranks whole"
    _say(
        f"{report.device}, {report.date}; microseconds of {report.shape.config.num_hidden_layers} "
        f"layers; {form}. Collectives: their share of the step, and how many its program has: "
        "those of a scan's turn, or of two where XLA unrolls it, and of each branch."
    )


def print_torch(report: "torch_calls.Report") -> None:
    """A row per op and path, and why a path did not take an op."""
    print(f"{report.shape}; microseconds per call")
    print(f"{'op':12} {'path':8} {'host best':>11} {'host median':>11} {'device':>8}")
    for row in report.rows:
        times = row.host, row.host_median, row.device
        best, median, gpu = ("-" if t is None else f"{t:.1f}" for t in times)
        print(f"{row.op:12} {row.path:8} {best:>11} {median:>11} {gpu:>8}")
    for note in dict.fromkeys(row.note for row in report.rows if row.note):
        print(note)
    print(f"{report.device}, {report.date}, jax {report.jax}, torch {report.torch}")


def _table(headings: Sequence[str], numbers: Iterable[int]) -> Table:
    """A table without lines, whose columns `numbers` are flush right."""
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in numbers:
        table.columns[column].justify = "right"
    return table


def _say(text: str) -> None:
    _stdout.print(Text(text), soft_wrap=True)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def print_serve(report: "serve.Report") -> None:
    """A row per workload."""
    names = ["workload", "tokens/s", "of base", "with prompts", "first ms", "p99", "next ms", "p99"]
    table = _table([*names, "step ms", "loads"], range(1, 10))
    for row in report.rows:
        share = "" if row.of_base is None else f"{row.of_base:.1%}"
        table.add_row(
            row.name,
            f"{row.tokens_per_s:,.0f}",
            share,
            f"{row.total_per_s:,.0f}",
            *(f"{ms:.1f}" for ms in (*row.first_ms, *row.next_ms, row.step_ms)),
            f"{row.loads}",
        )
    Console(width=max(_stdout.width, 140)).print(table)
    for kept in report.kept:
        met = f", at least {kept.least:.0%} should be: {_verdict(kept.is_met)}"
        _say(
            f"{kept.name}: {kept.share:.1%} of the tokens/s with {kept.few}"
            f"{met if report.is_judged else ''}."
        )
    for first in report.first_tokens:
        met = f", at most {first.most_ms:.0f} should be: {_verdict(first.is_met)}"
        _say(
            f"First token of rank {first.rank}: {first.on_device_ms:.1f} ms with the adapter in "
            f"its slot, {first.from_host_ms:.1f} with it on the host, {first.later_ms:.1f} "
            f"later{met if report.is_judged else ''}."
        )
    _say(
        f"{report.device}, {report.date}; {report.rows[0].requests} requests each, seed "
        f"{report.seed}; compiled and run once in {report.warmup_s:.1f} s; {report.shape}"
    )


def print_http(report: "endpoint.Report") -> None:
    """A row per turn, and what is lost."""
    table = _table(["way", "tokens/s", "first ms", "step ms", "HTTP's ms of a step"], range(1, 5))
    for turn in report.turns:
        numbers = (turn.first_ms, turn.step_ms, turn.http_ms)
        table.add_row(turn.way, f"{turn.tokens_per_s:,.0f}", *(f"{ms:.2f}" for ms in numbers))
    _stdout.print(table)
    _say(
        f"HTTP loses {report.lost:.1%} of the engine's tokens per second, by the medians. "
        f"{report.device}, {report.date}; {report.layers} layers, {report.streams} streams, "
        f"{report.requests} requests in each turn."
    )


def print_chaos(summary: "chaos.Summary") -> None:
    """How often what happened, and what is wrong."""
    for what, count in sorted(summary.counts.items()):
        _say(f"{count:8,} {what}")
    behind_flood, end = summary.host_bytes
    _say(f"Bytes of the process: {behind_flood:,} behind the first flood, {end:,} at the end.")
    for wrong in summary.wrong:
        _say(f"wrong: {wrong}")
    _say("all right" if summary.ok else "WRONG")


def print_soak(summary: "soak.Summary") -> None:
    """What came of the requests, and what is wrong."""
    _say(
        f"{summary.requests} requests: {summary.answered} answered, {summary.cancelled} cancelled, "
        f"{summary.failed} failed as they should; {summary.replacements} adapters replaced; "
        f"{summary.tokens} tokens in {summary.steps} steps and {summary.seconds:.0f} s; "
        f"{summary.compilations} programs compiled."
    )
    for what, (half, end) in (("devices", summary.device_bytes), ("process", summary.host_bytes)):
        _say(f"Bytes of the {what}: {half:,} halfway, {end:,} at the end.")
    for wrong in (*summary.wrong, *summary.grown):
        _say(f"wrong: {wrong}")
    _say(f"{summary.device}: {'all right' if summary.ok else 'WRONG'}")
