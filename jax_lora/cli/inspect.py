"""`jax-lora inspect`: what adapters hold, and which kernels would run them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from jax_lora.cli.terminal import Json, Links, input_errors, print_json, stdout
from jax_lora.messages import printable


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

    with input_errors():
        reports = [inspect_adapter(path, allow_links=allow_links) for path in adapters]
    if as_json:
        print_json({"adapters": [report.to_dict() for report in reports]})
        return
    for report in reports:
        size = f"{report.nbytes / 1e6:.2f} MB of {report.dtype}, {len(report.modules)} modules"
        title = Text.assemble((printable(report.path), "bold"), f": rank {report.rank}, {size}")
        stdout.print(title, soft_wrap=True)
        headings = "module rank scale tier bucket decode prefill padding kB".split()
        table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for count, group in report.groups():
            cells = [f"{group.kind} x{count}", group.rank, f"{group.scale:.4g}", group.tier]
            cells += [group.bucket, group.decode_kernel, group.prefill_kernel]
            cells += [f"{group.padding:.0%}", f"{count * group.nbytes / 1e3:.0f}"]
            table.add_row(*(Text(str(cell)) for cell in cells))
        stdout.print(table)
        for label, lines in (("LoRAX", report.lorax), ("For speed", report.advice)):
            for line in lines:
                stdout.print(Text(f"  {label}: {line}"), soft_wrap=True)
        stdout.print()
