"""`jax-lora inspect`: what adapters hold, and which kernels would run them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from jax_lora.cli.mesh import MeshOption, devices_of
from jax_lora.cli.terminal import Json, Links, input_errors, print_json, stdout
from jax_lora.messages import printable, without_controls

if TYPE_CHECKING:
    from jax_lora.inspection import AdapterReport


def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of PEFT adapters, at any depth.", show_default=False),
    ],
    mesh: MeshOption = None,
    eight_bits: Annotated[
        bool,
        typer.Option(
            "--eight-bits",
            help="Read the weights: how far are stacks of int8 and float8_e4m3fn from them?",
        ),
    ] = False,
    allow_links: Links = False,
    as_json: Json = False,
) -> None:
    """Show what adapters hold, which kernels would run them, and what to change for speed.

    One line per kind of module: true rank and scale, LoRAX's tier, the bucket that jax-lora
    allocates, the kernel of either phase, how much of the bucket is padding, bytes; then modules
    that the adapter has whole, and what LoRAX would do with it. With --mesh, what each device holds
    of it. With --eight-bits, how much stacks in 8 bits change what its modules add.

    An adapter that can't be read is shown in its place, with the reason, and the status is 2.
    """
    from jax_lora.inspection import BrokenAdapter, inspect_below

    with input_errors():
        devices = devices_of(mesh)
        reports = [
            report
            for path in folders
            for report in inspect_below(
                path, allow_links=allow_links, devices=devices, eight_bits=eight_bits
            )
        ]
        if as_json:
            print_json({"adapters": [report.to_dict() for report in reports]})
        for report in () if as_json else reports:
            if isinstance(report, BrokenAdapter):
                reason = without_controls(report.error)
                _print_title(report.path, Text.assemble(("can't be read: ", "bold red"), reason))
                stdout.print()
            else:
                _print_report(report)
        broken = sum(isinstance(report, BrokenAdapter) for report in reports)
        if broken:
            raise ValueError(
                f"{broken} of {len(reports)} adapters can't be read; the reasons are above"
            )


def _print_title(path: Path, text: Text) -> None:
    stdout.print(Text.assemble((printable(path), "bold"), ": ", text), soft_wrap=True)


def _print_report(report: "AdapterReport") -> None:
    size = f"{report.nbytes / 1e6:.2f} MB of {report.dtype}, {len(report.modules)} modules"
    _print_title(report.path, Text(f"rank {report.rank}, {size}"))
    headings = "module rank scale tier bucket decode prefill padding kB".split()
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for count, group in report.groups():
        kind = f"{group.kind} (embedding)" if group.is_embedding else group.kind
        cells = [f"{kind} x{count}", group.rank, f"{group.scale:.4g}", group.tier]
        cells += [group.bucket, group.decode_kernel, group.prefill_kernel]
        cells += [f"{group.padding:.0%}", f"{count * group.nbytes / 1e3:.0f}"]
        table.add_row(*(Text(str(cell)) for cell in cells))
    stdout.print(table)
    for full in report.full:
        size = f"{' x '.join(map(str, full.shape))}{' and bias' if full.has_bias else ''}"
        what = "Tokens" if full.is_tokens else "Whole"
        line = f"  {what}: {full.name}, {size}, {full.nbytes / 1e6:.2f} MB, takes a full slot"
        stdout.print(Text(line), soft_wrap=True)
    for dtype, held in (report.eight_bits or {}).items():
        taken = "" if held.is_taken else ", which a bank refuses"
        line = f"changes what {held.module} adds by {held.largest:.1%}, others less{taken}"
        line = "holds no embedding, and there is no other module" if held.module is None else line
        stdout.print(Text(f"  8 bits: {dtype} {line}"), soft_wrap=True)
    labelled = ("LoRAX", report.lorax), ("For speed", report.advice), ("Mesh", report.mesh)
    for label, lines in labelled:
        for line in lines:
            stdout.print(Text(f"  {label}: {line}"), soft_wrap=True)
    stdout.print()
