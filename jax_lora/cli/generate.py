"""`jax-lora generate`: prompts to a user's model and adapters, in one batch."""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from jax_lora.cli.mesh import on_mesh
from jax_lora.cli.programs import keep_programs
from jax_lora.cli.terminal import (
    Json,
    Links,
    input_errors,
    print_json,
    show_progress,
    start_jax,
    stdout,
)
from jax_lora.messages import shown, without_controls

if TYPE_CHECKING:
    from jax_lora.generation import Completion


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@on_mesh
def generate(
    base: Annotated[
        str,
        typer.Option(
            help="Folder of a model (config.json, tokenizer.json, model.safetensors), or its name "
            "on Hugging Face's hub, OWNER/NAME or OWNER/NAME@REVISION: Llama, Mistral, SmolLM2, "
            "Qwen2, Qwen3, Gemma 2 or 3, Phi-3.",
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
        typer.Option(
            help="NAME=DIR, a PEFT adapter (a folder, or OWNER/NAME on the hub) under a name of "
            "yours. Repeat it."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Each text is a message, put into the model's chat template."),
    ] = False,
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

    Compiled programs are kept in `~/.cache/jax-lora/programs` (or `$JAX_COMPILATION_CACHE_DIR`), so
    that the next start is faster; `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
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
        if place := keep_programs():
            progress(f"keeping compiled programs in {place}")
        start_jax()
        from jax_lora.generation import complete

        completions = complete(
            base,
            folders,
            [(name or None, text) for name, text in asked],
            chat=chat,
            max_new_tokens=max_new_tokens,
            dtype=None if dtype is None else dtype.value,
            allow_links=allow_links,
            progress=progress,
        )
    if as_json:
        print_json({"completions": [dataclasses.asdict(c) for c in completions]})
    else:
        _print(completions, "\n" if chat else "")


def _print(completions: Sequence["Completion"], separator: str) -> None:
    for completion in completions:
        name = (completion.adapter or "(base model)", "bold")
        prompt = without_controls(completion.prompt) + separator
        answer = without_controls(completion.text), "cyan"
        stdout.print(Text.assemble(name, ": ", prompt, answer), soft_wrap=True)


def _split(item: str, separator: str, form: str) -> tuple[str, str]:
    name, found, rest = item.partition(separator)
    if not found or (separator == "=" and not (name and rest)):
        base = f"; to ask the base model, write {shown(f':{item}')}" if separator == ":" else ""
        raise ValueError(f"{form} is the form, got {shown(item)}{base}")
    return name, rest
