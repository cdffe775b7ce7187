"""What the commands share: options, progress, errors of the input, JSON."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from jax_lora.messages import without_controls

stdout, stderr = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

Links = Annotated[
    bool,
    typer.Option(
        "--allow-links",
        help="Follow symbolic links out of adapters' folders, such as Hugging Face's cache has.",
    ),
]


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """Tells stderr what is being done: a spinner on a terminal, a line each elsewhere."""
    if not stderr.is_terminal:
        yield lambda text: stderr.print(f"{text} ...", highlight=False, markup=False)
        return
    with stderr.status("starting") as status:
        yield lambda text: status.update(Text(f"{text} ..."))


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Mistakes in what the user gave: the message alone, and status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, KeyError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        text = without_controls(text)
        stderr.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)
        raise typer.Exit(2) from None


def print_json(value: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
