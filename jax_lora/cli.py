"""The command line: `jax-lora demo`, `generate`, `inspect`."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_lora.messages import printable, shown, without_controls

# The commands import what they need themselves: `--help` need not wait for the model.

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


Links = Annotated[
    bool,
    typer.Option(
        "--allow-links",
        help="Follow symbolic links out of adapters' folders, such as Hugging Face's cache has.",
    ),
]


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
        text = without_controls(text)
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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per completion at most; default: 64, or what the model has room for.",
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of weights and arithmetic; default: as stored.")
    ] = None,
    allow_links: Links = False,
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
            allow_links=allow_links,
            progress=progress,
        )
    if as_json:
        _print_json({"completions": [dataclasses.asdict(c) for c in completions]})
        return
    for completion in completions:
        name = (completion.adapter or "(base model)", "bold")
        answer = without_controls(completion.text), "cyan"
        line = Text.assemble(name, ": ", without_controls(completion.prompt), answer)
        _stdout.print(line, soft_wrap=True)


def _split(item: str, separator: str, form: str) -> tuple[str, str]:
    name, found, rest = item.partition(separator)
    if not found or (separator == "=" and not (name and rest)):
        raise ValueError(f"{form} is the form, got {shown(item)}")
    return name, rest


@app.command()
def inspect(
    adapters: Annotated[
        list[Path], typer.Argument(help="PEFT adapter folders.", show_default=False)
    ],
    allow_links: Links = False,
    as_json: Json = False,
) -> None:
    """Show what adapters hold, which kernels would run them, and what to change for speed.

    One line per kind of module: true rank and scale, LoRAX's tier, the bucket that jax-lora
    allocates, the kernel of either phase, how much of the bucket is padding, bytes; then what LoRAX
    would do with the adapter.
    """
    from jax_lora.inspection import inspect_adapter

    with _input_errors():
        reports = [inspect_adapter(path, allow_links=allow_links) for path in adapters]
    if as_json:
        _print_json({"adapters": [report.to_dict() for report in reports]})
        return
    for report in reports:
        size = f"{report.nbytes / 1e6:.2f} MB of {report.dtype}, {len(report.modules)} modules"
        title = Text.assemble((printable(report.path), "bold"), f": rank {report.rank}, {size}")
        _stdout.print(title, soft_wrap=True)
        headings = "module rank scale tier bucket decode prefill padding kB".split()
        table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for count, group in report.groups():
            cells = [f"{group.kind} x{count}", group.rank, f"{group.scale:.4g}", group.tier]
            cells += [group.bucket, group.decode_kernel, group.prefill_kernel]
            cells += [f"{group.padding:.0%}", f"{count * group.nbytes / 1e3:.0f}"]
            table.add_row(*(Text(str(cell)) for cell in cells))
        _stdout.print(table)
        for label, lines in (("LoRAX", report.lorax), ("For speed", report.advice)):
            for line in lines:
                _stdout.print(Text(f"  {label}: {line}"), soft_wrap=True)
        _stdout.print()


@app.command(
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench() -> None:
    with _input_errors():
        raise ValueError(
            "the benchmarks are not installed with jax-lora: clone its repository and run "
            "`python -m benchmarks kernels` (or `step`, or `torch`) there"
        )
