"""`jax-lora generate`: prompts to a user's model and adapters, in one batch."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from jax_lora.cli.terminal import Json, Links, input_errors, print_json, show_progress, stdout
from jax_lora.messages import shown, without_controls


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    with input_errors(), show_progress() as progress:
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
        print_json({"completions": [dataclasses.asdict(c) for c in completions]})
        return
    for completion in completions:
        name = (completion.adapter or "(base model)", "bold")
        answer = without_controls(completion.text), "cyan"
        line = Text.assemble(name, ": ", without_controls(completion.prompt), answer)
        stdout.print(line, soft_wrap=True)


def _split(item: str, separator: str, form: str) -> tuple[str, str]:
    name, found, rest = item.partition(separator)
    if not found or (separator == "=" and not (name and rest)):
        raise ValueError(f"{form} is the form, got {shown(item)}")
    return name, rest
