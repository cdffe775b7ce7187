"""The command line: `jax-lora demo`, `generate`, `serve`, `inspect`, `convert`, `doctor`."""

from typing import Annotated

import typer

# The commands import what they need themselves: `--help` need not wait for the model.
from jax_lora.cli import convert, demo, doctor, generate, inspect, serve
from jax_lora.cli.terminal import input_errors

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Start with `jax-lora demo`. Errors of the input end with status 2.",
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(inspect.inspect)
app.command()(convert.convert)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"jax-lora {metadata.version('jax-lora')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """Many LoRA adapters of any rank over one base model, in one jitted batch."""


@app.command(
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench() -> None:
    with input_errors():
        raise ValueError(
            "the benchmarks are not installed with jax-lora: clone its repository and run "
            "`python -m benchmarks kernels` (or `step`, or `torch`) there"
        )
