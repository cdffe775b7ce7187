"""`jax-lora generate`: prompts to a user's model and adapters, in one batch."""

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from jax_lora.cli.answers import answer_file
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


Base = Annotated[
    str,
    typer.Option(
        help="Folder of a model (config.json, tokenizer.json, model.safetensors), or its name "
        "on Hugging Face's hub, OWNER/NAME or OWNER/NAME@REVISION: Llama, Mistral, SmolLM2, "
        "Qwen2, Qwen3, Gemma 2 or 3, Phi-3, Mixtral, Qwen3-MoE.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME:text, the adapter that answers and what it is asked; `:text` asks the base "
        "model. Repeat it: all prompts share one batch.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=DIR, a PEFT adapter (a folder, or OWNER/NAME on the hub) under a name of "
        "yours. Repeat it. `*=DIR` takes all adapters in a folder under their folders' names."
    ),
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Each text is a message, put into the model's chat template."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens per completion at most; default: 64, or what the model has room for.",
    ),
]
Requests = Annotated[
    Path | None,
    typer.Option(
        help="Instead of prompts, a file with a JSON object on each line: `prompt` and, if wanted, "
        "`adapter`, `id`, `max_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `stop`. The "
        "answers go to FILE.answers, a line for each as it comes.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on where `--requests` has ended early or was killed."),
]


@on_mesh
def generate(
    base: Base,
    prompt: Prompts = None,
    adapter: Adapters = None,
    requests: Requests = None,
    resume: Resume = False,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type of weights and arithmetic; default: as stored.")
    ] = None,
    allow_links: Links = False,
    as_json: Json = False,
) -> None:
    """Complete prompts with **your** base model and adapters, all in one batch, greedily.

    Example:

        jax-lora generate --base ./llama --adapter fr=./french --adapter de=./german
          --prompt "fr:Good morning" --prompt "de:Good morning" --prompt ":Good morning"

    With `--requests`, an engine answers as many requests as there are: they join and leave its
    batch at any step. Status 1 if one fails.

    Compiled programs are kept in `~/.cache/jax-lora/programs` (or `$JAX_COMPILATION_CACHE_DIR`), so
    that the next start is faster; `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    asked = list(prompt or [])
    with input_errors():
        if bool(asked) == (requests is not None):
            raise ValueError("give either --prompt or --requests")
        folders = _folders(adapter or [])
        if requests is not None:
            if max_new_tokens is not None or as_json:
                raise ValueError(
                    "--requests takes no --max-new-tokens and no --json: each line of the file has "
                    "a max_tokens of its own, and the answers are JSON"
                )
            value = None if dtype is None else dtype.value
            answer_file(base, folders, requests, resume, chat, value, allow_links)
            return
        if resume:
            raise ValueError("--resume needs --requests")
    with input_errors(), show_progress() as progress:
        split = [_split(item, ":", "--prompt NAME:text") for item in asked]
        unknown = sorted({name for name, _ in split} - set(folders) - {""})
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
            [(name or None, text) for name, text in split],
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


def _folders(adapters: Sequence[str]) -> dict[str, str]:
    """The adapters' folders, or their names on the hub, by name."""
    pairs: list[tuple[str, str]] = []
    for name, place in (_split(item, "=", "--adapter NAME=DIR") for item in adapters):
        if name != "*":
            pairs.append((name, place))
            continue
        found = sorted(file.parent for file in Path(place).glob("[!.]*/adapter_config.json"))
        if not found:
            raise ValueError(f"--adapter *={shown(place)}: there are no adapters in it")
        pairs += [(folder.name, str(folder)) for folder in found]
    folders = dict(pairs)
    if len(folders) != len(pairs):
        raise ValueError("two --adapter options have the same name")
    return folders


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
