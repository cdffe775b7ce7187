"""`jax-lora generate --requests`: a file of requests, with live progress."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from jax_lora.cli.programs import keep_programs
from jax_lora.cli.terminal import start_jax, stderr

if TYPE_CHECKING:
    from jax_lora.serving.jobs import JobProgress

_SECONDS = 10.0  # between two lines of progress, where there is no terminal


def answer_file(
    base: str,
    adapters: Mapping[str, str],
    requests: Path,
    resume: bool,
    chat: bool,
    dtype: str | None,
    allow_links: bool,
) -> None:
    """Answers the requests of a file into the file beside it. Ends with status 1 if one fails."""
    with _shown() as (told, progress):
        progress("starting JAX")
        keep_programs()
        start_jax()
        from jax_lora.serving.jobs import Job, run_job

        answers = requests.with_name(f"{requests.name}.answers")
        job = Job(base, adapters, requests, answers, resume, chat, dtype, allow_links)
        state = run_job(job, told, progress=progress)
    failed = f", {state.failed} failed" if state.failed else ""
    stderr.print(f"{state.answered} of {state.total} answered{failed}: {answers}", highlight=False)
    if state.failed:
        raise typer.Exit(1)


@contextmanager
def _shown() -> Iterator[tuple[Callable[["JobProgress"], None], Callable[[str], None]]]:
    """What shows how far a job is, and what is being done: a bar, or lines of text."""
    start: float | None = None  # of the first answer: what compiling takes is no part of the rate

    def rate(state: "JobProgress") -> str:
        nonlocal start
        if start is None and state.tokens:
            start = time.monotonic()
        seconds = 0.0 if start is None else time.monotonic() - start
        return f"{state.tokens / seconds:,.0f} tokens/s" if seconds > 1 else "- tokens/s"

    if not stderr.is_terminal:
        last = time.monotonic()

        def say(state: "JobProgress") -> None:
            nonlocal last
            text = f"{state.answered} of {state.total} answered, {rate(state)}"
            if time.monotonic() - last >= _SECONDS:
                last = time.monotonic()
                stderr.print(text, highlight=False)

        yield say, lambda text: stderr.print(f"{text} ...", highlight=False, markup=False)
        return
    # Here, as `--help` of any command would wait for it.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=stderr) as bar:
        task = bar.add_task("starting", total=None)

        def draw(state: "JobProgress") -> None:
            done = state.answered + state.failed
            bar.update(task, completed=done, total=state.total, description=rate(state))

        yield draw, lambda text: bar.update(task, description=text)
