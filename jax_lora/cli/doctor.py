"""`jax-lora doctor`: what JAX runs on here, what runs as kernels, and what to mend."""

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from jax_lora.cli.programs import place_of_programs
from jax_lora.cli.terminal import (
    Json,
    print_json,
    show_progress,
    stdout,
    why_jax_cannot_start,
)
from jax_lora.messages import printable, without_controls

DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("jax-lora", "jax", "jaxlib", "flax", "torch")
WEIGHTS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Form:
    """What LoRA with weights of a dtype runs as, "kernels", "XLA" or "loop", and why."""

    weights: str
    runs_as: str
    why: str


@dataclasses.dataclass
class Diagnosis:
    """What `jax-lora doctor` found. `problems` are sentences, each with its mend."""

    python: str
    versions: dict[str, str | None]
    programs: str | None
    backend: str | None = None
    devices: list[str] = dataclasses.field(default_factory=list)
    capability: str | None = None
    forms: list[Form] = dataclasses.field(default_factory=list)
    error: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def doctor(as_json: Json = False) -> None:
    """Show what JAX runs on here, what runs as **kernels** and what as XLA, and what to mend.

    It also computes a small batch and compares it with NumPy.

    Status 1 if there is something to mend.
    """
    with show_progress() as progress:
        progress("starting JAX")
        found = diagnose()
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(1)


def diagnose() -> Diagnosis:
    """Asks JAX, the files of the driver and the environment; compiles one small program."""
    import jax

    from pallas_kernels.dispatch import gpu_capability

    programs = place_of_programs()
    found = Diagnosis(
        platform.python_version(),
        {name: _version(name) for name in PACKAGES},
        None if programs is None else str(programs),
        problems=_of_programs(programs),
    )
    if reason := why_jax_cannot_start():
        found.problems.append(reason)
        return found
    found.backend = jax.default_backend()
    found.devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    found.capability = gpu_capability()
    found.problems += _of_backend(found.backend)
    try:
        found.forms = [_form(dtype, found.capability) for dtype in WEIGHTS]
        found.error = _error_of_a_batch()
    except (RuntimeError, ValueError) as failure:
        reason = printable(" ".join(str(failure).split()), 600)
        found.problems.append(f"a small batch fails: {reason}")
        return found
    found.problems += [f"LoRA is slow: {f.why}" for f in found.forms[:1] if f.runs_as == "loop"]
    if not found.error < 5e-3:
        found.problems.append(
            f"a small batch is wrong by {found.error:.1e}: report it with this output, and set "
            "JAX_LORA_DISABLE_KERNELS=1 until it is mended"
        )
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _of_backend(backend: str) -> list[str]:
    if backend == "gpu" or not DRIVER.exists():
        return []
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return [
            f"this machine has an NVIDIA GPU, but JAX_PLATFORMS={printable(chosen, 50)} keeps JAX "
            "from it: unset it"
        ]
    return [
        f"this machine has an NVIDIA GPU, but JAX runs on {backend}: "
        "pip install 'jax-lora[cuda13]' (or [cuda12], for a driver older than 580)"
    ]


def _of_programs(place: Path | None) -> list[str]:
    if place is None:
        return []
    above = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK):
        return []
    return [
        f"compiled programs can't be kept in {printable(place)}: set JAX_COMPILATION_CACHE_DIR to "
        "a folder that you may write"
    ]


def _form(dtype: str, capability: str | None) -> Form:
    import jax.numpy as jnp

    from pallas_kernels.mosaic_gpu import chip, support
    from pallas_kernels.ranks import kernels_disabled

    weights = jnp.dtype(dtype)
    lacks = support.missing(weights, 16, 4096, 4096, weights, 4096)
    if kernels_disabled():
        return Form(dtype, "loop", "JAX_LORA_DISABLE_KERNELS=1 is set; unset it for speed")
    if capability is None:
        return Form(dtype, "XLA", "JAX has no GPU here")
    if capability != chip.CAPABILITY:
        needs = f"the GPU has compute capability {capability}; the kernels need {chip.CAPABILITY}"
        return Form(dtype, "XLA", needs)
    if lacks is not None:
        return Form(dtype, "XLA", f"the kernels lack {lacks}")
    sizes = f"ranks 8, 16, 32 ... {support.MAX_RANK} and features that are multiples of 8"
    return Form(dtype, "kernels", f"for {sizes}; XLA for others")


def _error_of_a_batch() -> float:
    """The largest error of three rows with two adapters and none, as the layers run them."""
    import jax.numpy as jnp
    import numpy as np

    import pallas_kernels

    draw = np.random.default_rng(0)
    x, a, b = (draw.normal(size=size) / 8 for size in ((3, 64), (2, 16, 64), (2, 64, 16)))
    x, a, b = (t.astype(jnp.bfloat16) for t in (x, a, b))
    ids = np.array([1, -1, 0])
    got = pallas_kernels.add_lora(jnp.zeros((3, 64), jnp.float32), x, a, b, ids)
    a, b, x = (t.astype(np.float64) for t in (a, b, x))
    want = np.stack([b[i] @ (a[i] @ row) if i >= 0 else np.zeros(64) for i, row in zip(ids, x)])
    return float(np.abs(np.asarray(got, np.float64) - want).max())


def _print(found: Diagnosis) -> None:
    versions = ", ".join(
        f"{name} {version}" if version else f"no {name}" for name, version in found.versions.items()
    )
    lines = [("Versions", f"{versions}, Python {found.python}")]
    lines.append(("Backend", found.backend or "none"))
    lines += [("Device", device) for device in found.devices]
    if found.capability:
        lines.append(("Capability", found.capability))
    kept = found.programs or "nowhere (JAX_ENABLE_COMPILATION_CACHE=false)"
    lines.append(("Programs", f"kept in {kept}"))
    if found.error is not None:
        lines.append(("A batch", f"differs from NumPy's by {found.error:.1e} at most"))
    for label, text in lines:
        stdout.print(Text.assemble((f"{label:11}", "bold"), without_controls(text)), soft_wrap=True)
    if found.forms:
        table = Table("weights", "run as", "why", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for form in found.forms:
            table.add_row(Text(form.weights), Text(form.runs_as), Text(form.why))
        stdout.print()
        stdout.print(table)
    stdout.print()
    for problem in found.problems:
        stdout.print(Text.assemble(("to mend: ", "bold red"), problem), soft_wrap=True)
    if not found.problems:
        stdout.print("[bold green]Nothing to mend.[/]")
