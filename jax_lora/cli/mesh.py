"""The option `--mesh`: over how many devices a model is divided."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jax_lora.cli.terminal import input_errors
from jax_lora.messages import shown

if TYPE_CHECKING:
    from jax.sharding import Mesh

MeshOption = Annotated[
    str | None,
    typer.Option(
        help="tp=N: divide the model's heads, its MLP and the adapters over N devices.",
        metavar="tp=N",
    ),
]


def devices_of(option: str | None) -> int:
    """N of `tp=N`; 1 where nothing is given.

    Raises:
      ValueError: the option has another form.
    """
    if option is None:
        return 1
    if not (found := re.fullmatch(r"tp=([1-9]\d{0,4})", option)):
        raise ValueError(f"--mesh takes tp=N, such as tp=2, got {shown(option)}")
    return int(found[1])


def on_mesh(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the option `--mesh`, run where `jax.set_mesh` has set that mesh."""

    @functools.wraps(command)
    def run(*, mesh: MeshOption = None, **options: object) -> None:
        with input_errors():
            devices = devices_of(mesh)
            if devices == 1:
                command(**options)
                return
            import jax

            with jax.set_mesh(_mesh_of(devices)):
                command(**options)

    # Not of run's own signature: `wraps` has given it the annotations of `command`.
    option = inspect.Parameter(
        "mesh", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=MeshOption
    )
    signature = inspect.signature(command)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    run.__annotations__ = {**command.__annotations__, "mesh": MeshOption}
    return run


def _mesh_of(devices: int) -> "Mesh":
    """A mesh of so many devices.

    Raises:
      ValueError: there are fewer.
    """
    import jax

    there = jax.devices()
    if devices > len(there):
        raise ValueError(
            f"--mesh tp={devices} asks for {devices} devices, but JAX has {len(there)} "
            f"({there[0].platform}); JAX_NUM_CPU_DEVICES={devices} makes as many of a CPU"
        )
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("tp",), axis_types=auto, devices=there[:devices])
