"""What the commands share: options, progress, errors of the input, JSON."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from jax_lora.messages import printable, shown, without_controls

stdout, stderr = Console(), Console(stderr=True)

_FULL = "give --dtype bfloat16, fewer prompts and adapters, or a smaller --max-new-tokens"

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
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        if isinstance(error, RuntimeError):
            if "RESOURCE_EXHAUSTED" not in text:  # JAX's word for it
                raise
            text = f"the device's memory is full: {_FULL} ({shown(text, 200)})"
        text = without_controls(text)
        stderr.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)
        raise typer.Exit(2) from None


def why_jax_cannot_start() -> str | None:
    """In a sentence with the mend; None where JAX can start."""
    import jax  # `--help` need not wait for it

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX lacks its CUDA plugin
        reason = " ".join(str(error).split()) or "there is no such backend"
        chosen = os.environ.get("JAX_PLATFORMS")
        mend = f"unset JAX_PLATFORMS={printable(chosen, 50)}, or " if chosen else ""
        return f"JAX can't start: {printable(reason)}; {mend}install jax-lora[cuda13] for a GPU"
    return None


def start_jax() -> None:
    """ValueError where JAX can't start."""
    if reason := why_jax_cannot_start():
        raise ValueError(reason)


def print_json(value: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
