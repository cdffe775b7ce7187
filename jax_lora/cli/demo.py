"""`jax-lora demo`: the bundled adapters in one batch, and whether the result is right."""

import typer
from rich.table import Table
from rich.text import Text

from jax_lora.cli.terminal import (
    Json,
    input_errors,
    print_json,
    show_progress,
    start_jax,
    stdout,
)


def demo(as_json: Json = False) -> None:
    """Run ten bundled adapters and the base model in **one batch**, and check the result.

    The bundled base model is a small Llama that was trained for this; its adapters, of ranks 4 to
    160, were trained by Hugging Face's PEFT. Their prompts go through one compiled prefill and one
    compiled decode step. Every completion is compared with what code computes from the prompt, and
    the logits with those of models that have each adapter merged into their weights.

    Status 1 if anything is wrong.
    """
    with input_errors(), show_progress() as progress:
        progress("starting JAX")
        start_jax()
        from jax_lora.demo import job

        report = job.run(progress)
    if as_json:
        print_json(report.to_dict())
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
        stdout.print(table)
        limit = job.MAX_LOGIT_DIFFERENCE
        stdout.print(
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
        stdout.print("[bold green]All right.[/]" if report.ok else
                      f"[bold red]Wrong[/]: {wrong} completions, or a figure above.")  # fmt: skip
    if not report.ok:
        raise typer.Exit(1)
