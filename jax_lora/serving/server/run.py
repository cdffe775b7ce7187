"""From folders to a server that runs."""

import dataclasses
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from jax_lora.adapters import AdapterHeader, peft_header
from jax_lora.messages import printable
from jax_lora.models.hub import check_format, is_hub_name, local_folder
from jax_lora.models.llama import Llama
from jax_lora.serving.engine import AdapterLimits, Engine, StepShape
from jax_lora.serving.server.adapters import folder_adapters
from jax_lora.serving.server.app import Server
from jax_lora.serving.server.asking import Served
from jax_lora.serving.server.reserve import Reserve
from jax_lora.serving.server.slots import planned_slots
from jax_lora.serving.text import bank_for, load_tokenizer

Told = Callable[[str], None]

_READING_S = 60  # for an adapter that a client has loaded


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the engine.

    Attributes:
      slots: adapters of a rank bucket that are on the device at a time.
      max_rank: the largest that a client may have loaded; None for the folder's largest, or 64.
      max_length, rows: as in `StepShape`. max_waiting: as in `Engine`.
      reserve: slots that are kept for tenants.
    """

    slots: int = 16
    max_rank: int | None = None
    max_length: int | None = None
    rows: int = 64
    max_waiting: int = 1024
    reserve: tuple[Reserve, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
      base: folder, or name on the hub. name: for requests; None for the folder's or the hub's.
      adapters: the folder whose folders are adapters.
      dtype: of weights and arithmetic; None for the stored one.
      eight_bits: the dtype of 8 bits in which adapters are held; None for the weights' dtype.
    """

    base: str | Path
    name: str | None = None
    adapters: Path | None = None
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    dtype: str | None = None
    eight_bits: str | None = None


def load(model: Model, told: Told) -> Served:
    """The engine, compiled.

    Raises:
      FileNotFoundError, ValueError: as `complete`; an adapter has the base model's name; or the
        slots that are reserved can't be. All but what the weights tell, before they are read.
    """
    base, sizes = local_folder(model.base), model.sizes
    check_format(base)
    name = model.name or (str(model.base) if is_hub_name(model.base) else base.resolve().name)
    folders = _fitting(model, told)
    if name in folders:
        raise ValueError(f"the model and an adapter are both called {name!r}; give --name")
    headers = [header for _, header in folders.values()]
    ranks = [header.rank for header in headers]
    slots, kept = planned_slots(ranks, sizes.slots, sizes.max_rank, sizes.reserve)
    told(f"loading {base}")
    llama, bank = Llama.from_pretrained(base, dtype=model.dtype), None
    if model.adapters is not None:
        bank = bank_for(llama, headers, slots, dtype=model.eight_bits)
        for prefix, own in kept.items():
            bank.reserve(prefix, own)
    engine = Engine(
        llama,
        bank,
        load_tokenizer(base),
        adapters={name: folder for name, (folder, _) in folders.items()},
        shape=StepShape(rows=sizes.rows, max_length=sizes.max_length),
        limits=AdapterLimits(max_seconds=_READING_S),
        max_waiting=sizes.max_waiting,
    )
    told("compiling")
    try:
        engine.warmup()
    except BaseException:
        engine.close()
        raise
    return Served(engine, base, name, model.adapters)


def bound(host: str, port: int) -> socket.socket:
    """Takes an address, at which nobody is answered before `serve` listens; port 0 for a free one.

    Raises:
      OSError: it is in use, or not this machine's.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise OSError(f"can't listen at {printable(host)}:{port}: {error.strerror}") from None
    return taken


def serve(served: Served, server: Server, at: socket.socket, drain: int, told: Told) -> None:
    """Answers until SIGTERM or SIGINT: then it takes no more, and ends what is under way.

    Args:
      drain: seconds that answers under way have then.
    """
    # What uvicorn writes of requests would be text of clients.
    config = uvicorn.Config(
        server.app(),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain,
    )
    # Uvicorn raises the signal once more behind its end, which would be no orderly one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = at.getsockname()[:2]
    names = ", ".join(served.engine.adapters[:10]) or "none"
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _Listening(config, lambda: told(f"serving {served.name} at {where}, adapters: {names}")).run(
        sockets=[at]
    )


class _Listening(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, told: Callable[[], None]) -> None:
        super().__init__(config)
        self._told = told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._told()


def _fitting(model: Model, told: Told) -> dict[str, tuple[Path, AdapterHeader]]:
    """The folder's adapters; one that can't be read is told, and left out."""
    found: dict[str, tuple[Path, AdapterHeader]] = {}
    if model.adapters is None:
        return found
    if not model.adapters.is_dir():
        raise FileNotFoundError(f"there is no folder {printable(model.adapters)}")
    for name, folder in folder_adapters(model.adapters).items():
        try:
            found[name] = folder, peft_header(folder)
        except (ValueError, OSError) as error:
            told(f"leaving out {printable(name)}: {printable(str(error))}")
    return found
