"""`jax-lora serve`: OpenAI's API over a user's model and adapters."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jax_lora.cli.generate import DType
from jax_lora.cli.programs import keep_programs
from jax_lora.cli.terminal import input_errors, start_jax, stderr
from jax_lora.messages import without_controls
from jax_lora.serving.server.reserve import Reserve


class EightBits(StrEnum):
    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"


ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        envvar="JAX_LORA_API_KEYS",
        help="A key that clients must send; repeat it for several. Clients with one may load "
        "and unload adapters below the folder.",
    ),
]
Reserves = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PREFIX=SLOTS[:RANK]",
        help="Keep slots on the device for a tenant, the adapters whose names begin with PREFIX: "
        "so many of each rank, or of RANK alone. Repeat it for several.",
    ),
]


def serve(
    base: Annotated[
        str | None, typer.Option(help="Folder of a model, or its name on Hugging Face's hub.")
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of adapters: each folder in it is one, and its name a `model`."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the bundled model and its ten adapters.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The base model's name for requests; default: the folder's.")
    ] = None,
    api_key: ApiKeys = None,
    slots: Annotated[int, typer.Option(min=1, help="Adapters of a rank on the device.")] = 16,
    reserve: Reserves = None,
    max_rank: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Largest rank of adapters that are loaded later."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that run at a time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait.")] = 1024,
    rows_per_key: Annotated[
        int | None, typer.Option(min=1, help="Answers of one key that may run or wait.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that SIGTERM leaves to answers under way.")
    ] = 30,
    dtype: Annotated[
        DType | None, typer.Option(help="Type of weights and arithmetic; default: as stored.")
    ] = None,
    eight_bits: Annotated[
        EightBits | None, typer.Option(help="Hold adapters in 8 bits of this type, rounded.")
    ] = None,
) -> None:
    """Serve **OpenAI's API**: the base model and each adapter is a `model`.

    Example:

        jax-lora serve --base ./llama --adapters ./adapters --port 8000

        jax-lora serve --demo

    A page at `/` shows answers side by side. SIGTERM takes no more requests, and ends when those
    under way have their answers.
    """
    with input_errors():
        if demo == (base is not None) or (demo and adapters is not None):
            raise ValueError("give either --demo, or --base and, if wanted, --adapters")
        kept = tuple(map(Reserve.parsed, reserve or ()))
        if kept and base and adapters is None:
            raise ValueError("--reserve keeps slots for adapters; give --adapters, too")
        _check_extra()
        from jax_lora.demo.job import FOLDER
        from jax_lora.serving.server import run
        from jax_lora.serving.server.app import Server
        from jax_lora.serving.server.limits import Limits

        with run.bound(host, port) as at:
            _told("starting JAX ...")
            keep_programs()
            start_jax()
            sizes = run.Sizes(slots, max_rank, max_length, rows, max_waiting, kept)
            if base is None:
                base, name, adapters = str(FOLDER / "base"), name or "demo", FOLDER / "adapters"
            types = dtype and dtype.value, eight_bits and eight_bits.value
            model = run.Model(base, name, adapters, sizes, *types)
            served = run.load(model, _told)
            limits = Limits(body_bytes=max_body, rows_per_key=rows_per_key)
            server = Server(served, api_key or [], limits)
            run.serve(served, server, at, drain, _told)


def _told(text: str) -> None:
    stderr.print(without_controls(text), highlight=False, markup=False, soft_wrap=True)


def _check_extra() -> None:
    try:
        import jax_lora.serving.server.run  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jax_lora"):
            raise
        raise ValueError(
            f"serving needs {error.name}; install it by: pip install 'jax-lora[serve]'"
        ) from None
