"""The command line: `jax-lora demo`, `generate`, `inspect`, `bench`."""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jax_lora.bench import Report
    from jax_lora.bench.tune import Tuned

# The commands import what they need themselves: `--help` need not wait for the bench or the model.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Many LoRA adapters of any rank over one base model, in one jitted batch.",
    epilog="Start with `jax-lora demo`. Errors of the input end with status 2.",
)

_stdout, _stderr = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tells stderr what is being done: a spinner on a terminal, a line each elsewhere."""
    if not _stderr.is_terminal:
        yield lambda text: _stderr.print(f"{text} ...", highlight=False, markup=False)
        return
    with _stderr.status("starting") as status:
        yield lambda text: status.update(Text(f"{text} ..."))


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Mistakes in what the user gave: the message alone, and status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, KeyError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        _stderr.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)
        raise typer.Exit(2) from None


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@app.command()
def demo(as_json: Json = False) -> None:
    """Run ten bundled adapters and the base model in **one batch**, and check the result.

    The bundled base model is a small Llama that was trained for this; its adapters, of ranks 4 to
    160, were trained by Hugging Face's PEFT. Their prompts go through one compiled prefill and one
    compiled decode step. Every completion is compared with what code computes from the prompt, and
    the logits with those of models that have each adapter merged into their weights.

    Status 1 if anything is wrong.
    """
    with _progress() as progress:
        progress("starting JAX")
        from jax_lora.demo import job

        report = job.run(progress)
    if as_json:
        _print_json(report.to_dict())
    else:
        headings = "prompt adapter rank tier bucket decode prefill completion right".split()
        # Eighty columns hold the longest words of the demo.
        table = Table(*headings, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for column in (2, 4):
            table.columns[column].justify = "right"
        for row in report.rows:
            cells = [row.prompt, row.adapter or "(base)", row.rank, row.tier, row.bucket]
            cells += [row.decode_kernel, row.prefill_kernel, row.completion]
            right = "[green]yes[/]" if row.right else "[bold red]no[/]"
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells), right)
        _stdout.print(table)
        limit = job.MAX_LOGIT_DIFFERENCE
        _stdout.print(
            f"One batch of {len(report.rows)} rows: {report.adapters} adapters of "
            f"{len(report.ranks)} ranks ({', '.join(map(str, report.ranks))}) and the base model.\n"
            f"XLA compiled {report.compilations} programs (one prefill, one decode), and "
            f"{report.recompilations} more when all adapters had been evicted and reloaded into "
            f"other slots and the rows shuffled; completions then: "
            f"{'the same' if report.same_after_reload else '[bold red]different[/]'}.\n"
            "Largest difference between the batch's logits and those of models with the adapter "
            f"merged into the weights: {report.max_logit_difference:.1e} (limit {limit:.0e}).",
            highlight=False,
        )
        wrong = sum(not row.right for row in report.rows)
        _stdout.print("[bold green]All right.[/]" if report.ok else
                      f"[bold red]Wrong[/]: {wrong} completions, or a figure above.")  # fmt: skip
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def generate(
    base: Annotated[
        Path,
        typer.Option(
            help="Folder of a Llama-family model: config.json, tokenizer.json, model.safetensors.",
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            help="NAME:text, the adapter that answers and what it is asked; `:text` asks the base "
            "model. Repeat it: all prompts share one batch.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR, a PEFT adapter folder under a name of yours. Repeat it."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per completion at most.")] = 64,
    dtype: Annotated[
        DType | None, typer.Option(help="Of weights and arithmetic; default: as stored.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Complete prompts with **your** base model and adapters, all in one batch, greedily.

    Example:

        jax-lora generate --base ./llama --adapter fr=./french --adapter de=./german
          --prompt "fr:Good morning" --prompt "de:Good morning" --prompt ":Good morning"
    """
    with _input_errors(), _progress() as progress:
        folders = dict(_split(item, "=", "--adapter NAME=DIR") for item in adapter or [])
        if len(folders) != len(adapter or []):
            raise ValueError("two --adapter options have the same name")
        asked = [_split(item, ":", "--prompt NAME:text") for item in prompt]
        unknown = sorted({name for name, _ in asked} - set(folders) - {""})
        if unknown:
            raise ValueError(
                f"no --adapter is called {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(map(repr, folders)) or 'none'}"
            )
        progress("starting JAX")
        from jax_lora.generation import complete

        completions = complete(
            base,
            {name: Path(folder) for name, folder in folders.items()},
            [(name or None, text) for name, text in asked],
            max_new_tokens=max_new_tokens,
            dtype=None if dtype is None else dtype.value,
            progress=progress,
        )
    if as_json:
        _print_json({"completions": [dataclasses.asdict(c) for c in completions]})
        return
    for completion in completions:
        name = (completion.adapter or "(base model)", "bold")
        line = Text.assemble(name, ": ", completion.prompt, (completion.text, "cyan"))
        _stdout.print(line, soft_wrap=True)


def _split(item: str, separator: str, form: str) -> tuple[str, str]:
    name, found, rest = item.partition(separator)
    if not found or (separator == "=" and not (name and rest)):
        raise ValueError(f"{form} is the form, got {item!r}")
    return name, rest


@app.command()
def inspect(
    adapters: Annotated[
        list[Path], typer.Argument(help="PEFT adapter folders.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Show what adapters hold, which kernels would run them, and what to change for speed.

    One line per kind of module: true rank and scale, LoRAX's tier, the bucket that jax-lora
    allocates, the kernel of either phase, how much of the bucket is padding, bytes; then what LoRAX
    would do with the adapter.
    """
    from jax_lora.inspection import inspect_adapter

    with _input_errors():
        reports = [inspect_adapter(path) for path in adapters]
    if as_json:
        _print_json({"adapters": [report.to_dict() for report in reports]})
        return
    for report in reports:
        size = f"{report.nbytes / 1e6:.2f} MB of {report.dtype}, {len(report.modules)} modules"
        title = Text.assemble((str(report.path), "bold"), f": rank {report.rank}, {size}")
        _stdout.print(title, soft_wrap=True)
        headings = "module rank scale tier bucket decode prefill padding kB".split()
        table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for count, group in report.groups():
            cells = [f"{group.kind} x{count}", group.rank, f"{group.scale:.4g}", group.tier]
            cells += [group.bucket, group.decode_kernel, group.prefill_kernel]
            cells += [f"{group.padding:.0%}", f"{count * group.nbytes / 1e3:.0f}"]
            table.add_row(*map(str, cells))
        _stdout.print(table)
        for label, lines in (("LoRAX", report.lorax), ("For speed", report.advice)):
            for line in lines:
                _stdout.print(Text(f"  {label}: {line}"), soft_wrap=True)
        _stdout.print()


_bench = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.add_typer(_bench, name="bench")


@_bench.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    peers: Annotated[
        Path | None,
        typer.Option(help="Folder that tests/peers/fetch.sh made: time vLLM and SGLang too."),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help='JSON file with a list of cases, e.g. [{"T": 64, "D": 8, "r": 16}], or `large`: '
            "ranks 256 and 512, and 8192 tokens. Default: 35; with --tune 26 of them."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw times and speed-ups into this image file.")
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            help="Try other configs for the cases' shapes instead, and write those that gain 3 % "
            "into this table; JAX_LORA_TUNING names it to the kernels."
        ),
    ] = None,
    tune_bits: Annotated[
        bool,
        typer.Option(
            "--tune-bits",
            help="With --tune: other orders of summation too, which change the bits of results.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the kernels against their floor, against XLA and against vLLM and SGLang.

    Microseconds per `y += (x A^T) B^T` in bfloat16, inside one jitted loop over weight sets that
    together exceed the L2 cache. T tokens use D adapters of rank r. The floor is what moving each
    byte once, or multiplying, takes at least, and the aim 1.05 x floor + 3 us. Each result is
    checked before it is timed. Where tokamax is installed, its `ragged_dot` is timed too.
    """
    if context.invoked_subcommand is not None:
        if peers or cases or plot or tune or tune_bits or as_json:
            raise typer.BadParameter("the options of a subcommand go behind its name")
        return
    with _input_errors(), _progress() as progress:
        if tune is not None and (peers or plot):
            raise ValueError("--tune takes no --peers and no --plot")
        if tune_bits and tune is None:
            raise ValueError("--tune-bits goes with --tune")
        progress("starting JAX")
        from jax_lora import bench as benchmark
        from jax_lora.bench import tune as tuning

        if plot is not None:
            benchmark.check_plot(plot)

        if cases is None:
            chosen = benchmark.CASES if tune is None else tuning.CASES
        else:
            chosen = benchmark.LARGE if cases == "large" else benchmark.read_cases(Path(cases))
        if tune is not None:
            tuned = tuning.run(chosen, tune, progress, change_bits=tune_bits)
        else:
            report = benchmark.run(chosen, peers, progress)
            if plot is not None:
                benchmark.plot(report, plot)
    if tune is not None:
        _print_tuned(tuned, tune, as_json)
    elif as_json:
        _print_json(report.to_dict())
    else:
        _print_bench(report)


def _print_bench(report: "Report") -> None:
    from jax_lora import bench as benchmark

    others = ["tokamax"] if any(result.tokamax for result in report.results) else []
    others += benchmark.PEERS
    names = ["case", "floor", "ours", "XLA", *others, "speed-up", "aim", "", "slower than"]
    table = Table(*names, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:-2]:
        column.justify = "right"
    for result in report.results:
        times = [result.floor, result.ours, result.xla]
        times += [{"tokamax": result.tokamax, **result.peers}.get(other) for other in others]
        times += [result.speed_up, result.aim]
        table.add_row(
            result.case.label,
            *("-" if t is None else f"{t:.2f}" for t in times),
            "" if result.met is None else _verdict(result.met),
            ", ".join(result.slower_than),
        )
    _print_wide(table)
    for result in report.results:
        for note in result.notes:
            _stdout.print(Text(f"{result.case.label}: {note}"))
    for mean in report.means:
        _stdout.print(
            f"{mean.phase}, over the best peer: {mean.speed_up:.2f} in the geometric mean of "
            f"{mean.cases} cases; aim {mean.aim:g}, {_verdict(mean.met)}.",
            highlight=False,
        )
    timed = [result for result in report.results if result.met is not None]
    if timed:
        _stdout.print(
            f"Of {len(timed)} cases, {sum(r.met is True for r in timed)} meet the aim of 1.05 x "
            f"floor + 3 us, {sum('XLA' in r.slower_than for r in timed)} are slower than XLA and "
            f"{sum(bool({*r.slower_than} & {*benchmark.PEERS}) for r in timed)} than a peer.",
            highlight=False,
        )
    _stdout.print(f"{report.device}, {report.date}; microseconds.", highlight=False)
    if report.tuning is not None:
        _stdout.print(Text(f"Tuned by {report.tuning}."), soft_wrap=True)
    if report.copy_rate is None or report.matmul_rate is None:
        _stdout.print(
            "No GPU: the kernels and the peers were not measured, XLA ran on the CPU, and the "
            "floor is an H100's.",
            highlight=False,
        )
    else:
        _stdout.print(
            f"This run copied at {report.copy_rate / 1e12:.2f} TB/s (floors take "
            f"{benchmark.COPY_RATE / 1e12:.2f}) and multiplied at "
            f"{report.matmul_rate / 1e12:.0f} TFLOP/s.",
            highlight=False,
        )


def _print_wide(table: Table) -> None:
    """Each row on a line of its own, which a narrow terminal may wrap."""
    Console(width=max(_stdout.width, 132)).print(table)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _print_tuned(tuned: "list[Tuned]", path: Path, as_json: bool) -> None:
    from jax_lora.bench.tune import described

    if as_json:
        _print_json({"table": str(path), "tuned": [each.to_dict() for each in tuned]})
        return
    headings = ["case", "default us", "best us", "changed", ""]
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:3]:
        column.justify = "right"
    for each in tuned:
        changed = described(each.fields) if each.fields else "-"
        bits = "changes bits" if each.changes_bits else ""
        for case in each.measured:
            table.add_row(case.case, f"{case.default_us:.2f}", f"{case.us:.2f}", changed, bits)
    _print_wide(table)
    for each in tuned:
        for note in each.notes:
            _stdout.print(Text(note), soft_wrap=True)
    _stdout.print(Text(f"JAX_LORA_TUNING={path} gives the kernels this table."), soft_wrap=True)


@_bench.command()
def step(
    layers: Annotated[int | None, typer.Option(min=1, help="Default: 32.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a decode step; default: 64.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each row; default: 1024.")] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of the prefill, in 8 prompts; default: 4096.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="List each step's kernels.")] = False,
    as_json: Json = False,
) -> None:
    """Time whole decode and prefill steps of a model shaped like Llama-3-8B.

    Random bfloat16 weights, LoRA on all seven projections. Each row is one compiled program in
    steady state: without LoRA; with LoRA, but no adapter in the batch; with 8 adapters, one per row
    and mixed ranks. Then single calls: mixed ranks beside one bucket of the same bytes, buckets
    without a token, projections of one input. Beside each stands its target, and whether that is
    met. Without a GPU a small model runs, and no target is held against it.
    """
    with _input_errors(), _progress() as progress:
        progress("starting JAX")
        from jax_lora.bench import step as benchmark

        shape = benchmark.Shape.of_this_machine(layers, batch, context, prefill)
        report = benchmark.run(shape, progress, profile=profile)
    if as_json:
        _print_json(report.to_dict())
        return
    headings = ["step", "us", "target", "x target", "", "host us"]
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in (1, 2, 3, 5):
        table.columns[column].justify = "right"
    for row in report.rows:
        cells = [row.us, row.target_us, row.ratio, row.host_us]
        us, target, ratio, host = ("-" if cell is None else f"{cell:,.2f}" for cell in cells)
        met = "" if row.ratio is None else _verdict(row.ratio <= 1)
        table.add_row(row.name, us, target, ratio, met, host)
    _stdout.print(table)
    for launches in report.launches:
        per_layer = launches.custom_calls / report.shape.config.num_hidden_layers
        _stdout.print(
            f"Decode, {launches.program}: {launches.launches} launches, {per_layer:g} of them LoRA "
            f"kernels of each layer; {launches.graphs} CUDA graphs, {launches.outside} launches "
            "outside of them.",
            highlight=False,
        )
    for row in report.rows:
        for kernel in row.kernels[:15]:
            us = f"{kernel.us:10.1f} us, {kernel.launches:g} x {kernel.name}"
            _stdout.print(Text(f"{row.name}: {us}"), soft_wrap=True)
    _stdout.print(f"{report.device}, {report.date}; microseconds.", highlight=False)
    if any(row.target_us is None for row in report.rows if row.target):
        _stdout.print(
            "No GPU: a small model ran, held against no target, and neither launches nor CUDA "
            "graphs were counted.",
            highlight=False,
        )


@_bench.command("torch")
def bench_torch(as_json: Json = False) -> None:
    """Time LoRAX's ops on PyTorch tensors: what a call costs the host and the GPU, by each path.

    64 tokens use 8 adapters of rank 16. "native" launches the kernels on torch's stream, "dlpack"
    goes through JAX's runtime, "public" is what a caller without this package would write. Ten
    seconds go in turns over these and over torch's own addition, as a host changes its speed: of
    its time the best is told and the median.
    """
    with _input_errors():
        if importlib.util.find_spec("torch") is None:
            raise ValueError("bench torch needs PyTorch: pip install 'jax-lora[torch]'")
    # A process of its own: nothing in this package imports torch.
    command = [sys.executable, "-m", "interop.bench", *(["--json"] if as_json else [])]
    raise typer.Exit(subprocess.run(command).returncode)
