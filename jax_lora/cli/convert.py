"""`jax-lora convert`: other projects' LoRA as PEFT writes it, or PEFT's with other names."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from jax_lora.cli.terminal import Links, input_errors, stdout
from jax_lora.messages import printable, shown


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of mlx-lm, diffusers or PEFT, or a .safetensors file of diffusers or qwix "
            "(Tunix).",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path, typer.Argument(help="Folder to write, without an adapter.", show_default=False)
    ],
    alpha: Annotated[
        float | None,
        typer.Option(help="For files that don't say it: the scale is alpha / rank."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="OLD=NEW: how modules' names begin, and shall begin; either may be empty. Repeat "
            "it."
        ),
    ] = None,
    allow_links: Links = False,
) -> None:
    """Write another project's LoRA as **PEFT** would, where that is exact.

    A file for several models of a diffusers pipeline becomes a folder for each, in TARGET.

    Example:

        jax-lora convert ./mlx/adapters ./french --rename model=model.language_model
    """
    from jax_lora.adapters import is_foreign, load_peft, read_foreign, renamed, save_peft

    with input_errors():
        prefixes = dict(_prefix(item) for item in rename or [])
        if (source / "adapter_config.json").exists() and not is_foreign(source):
            if alpha is not None:
                raise ValueError(
                    f"alpha={alpha:g} is given, but PEFT's config says it; leave it out"
                )
            adapters = {"": load_peft(source, allow_links=allow_links)}
        else:
            adapters = read_foreign(source, alpha=alpha, allow_links=allow_links)
        written = {
            target / model if len(adapters) > 1 else target: renamed(adapter, prefixes)
            for model, adapter in adapters.items()
        }
        for folder in written:
            if (folder / "adapter_config.json").exists():
                raise ValueError(f"{shown(str(folder), 300)} holds an adapter; give a new folder")
        for folder, adapter in written.items():
            save_peft(adapter, folder)
            text = f": rank {adapter.rank}, {len(adapter.modules)} modules"
            stdout.print(Text.assemble((printable(folder), "bold"), text), soft_wrap=True)


def _prefix(item: str) -> tuple[str, str]:
    old, found, new = item.partition("=")
    if not found:
        raise ValueError(f"--rename OLD=NEW is the form, got {shown(item)}")
    return old, new
