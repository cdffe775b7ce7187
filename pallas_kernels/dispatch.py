"""Which backend runs a call, and the call under jit by a name that tells."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array

from pallas_kernels import loop, undivided, xla
from pallas_kernels.call import Backend, Call
from pallas_kernels.manual import varying
from pallas_kernels.mosaic_gpu import backend as mosaic_gpu
from pallas_kernels.mosaic_gpu import chip
from pallas_kernels.mosaic_gpu.config import Config
from pallas_kernels.ranks import kernels_disabled, select_kernel
from pallas_kernels.routing import AnyIds, Mix
from pallas_kernels.stacks import LoRAPart

Implementation = Literal["xla", "mosaic_gpu", "loop"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
BACKENDS: dict[str, Backend] = {"xla": xla, "mosaic_gpu": mosaic_gpu, "loop": loop}
Operation = Literal[
    "shrink",
    "expand",
    "add_lora",
    "lora_delta",
    "shrink_grad",
    "expand_grad",
    "add_lora_grad",
]

_HERE = os.path.dirname(__file__)  # warnings point at the first caller outside


@functools.cache
def warn_loop() -> None:
    warnings.warn(
        "LoRA runs as one dense product per adapter slot (implementation 'loop'): slow, meant for "
        "comparison. Unset JAX_LORA_DISABLE_KERNELS, or name another implementation.",
        skip_file_prefixes=(_HERE,),
    )


@functools.cache
def warn_other_gpu(capability: str) -> None:
    warnings.warn(
        f"the GPU has compute capability {capability}; jax-lora's kernels need Hopper's, "
        f"{chip.CAPABILITY}, so LoRA runs as plain XLA",
        skip_file_prefixes=(_HERE,),
    )


def gpu_capability() -> str | None:
    """Compute capability of the default device, such as "9.0"; None where that is no GPU."""
    device = jax.local_devices()[0]
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def choose(
    implementation: str | None, config: object, missing: str | None
) -> tuple[str, Config | None]:
    """The implementation that runs, by name ("auto" where the platform decides at lowering), and
    the config.

    `missing` says what the case asks of mosaic_gpu that it lacks. A named implementation never
    falls back.

    Raises:
      ValueError: an unknown name; a config for another implementation than mosaic_gpu.
      TypeError: `config` is no Config.
      NotImplementedError: the named implementation lacks what the case needs.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )
    if implementation is None:
        implementation = _best(missing)
    if implementation == "mosaic_gpu":
        _check_named_kernels(missing)
    elif config is not None:
        raise ValueError(f"config needs implementation='mosaic_gpu', got {config!r}")
    if not isinstance(config, Config | None):
        raise TypeError(f"config must be a mosaic_gpu.Config, got {config!r}")
    if implementation == "loop":
        warn_loop()
    return implementation, config


def _best(missing: str | None) -> str:
    if kernels_disabled():
        return "loop"
    capability = gpu_capability()
    if missing is not None:
        return "xla"
    if capability in (None, chip.CAPABILITY):
        return "auto"
    warn_other_gpu(str(capability))
    return "xla"


def _check_named_kernels(missing: str | None) -> None:
    capability = gpu_capability()
    if missing is not None:
        raise NotImplementedError(f"implementation 'mosaic_gpu' lacks {missing}")
    if capability not in (None, chip.CAPABILITY):
        raise NotImplementedError(
            f"implementation 'mosaic_gpu' needs compute capability {chip.CAPABILITY} (Hopper), "
            f"this GPU has {capability}"
        )


# By tokens, the least rank from which one call is faster by XLA's kernels, which deal A among all
# multiprocessors, than by clusters of eight. H100, T=1, mosaic_gpu and XLA: H=N=4096 R=64 3.79 and
# 3.33 us, R=32 2.89 and 3.16. T=2 R=128 5.9 and 4.1.
_XLA_FROM_RANK = {1: 64, 2: 128}


def prefers_xla(call: Call, num_tokens: int, parts: tuple[LoRAPart, ...], ids: AnyIds) -> bool:
    """Whether `add_lora` and `add_lora_multi` are "xla" on a GPU too, if not told otherwise.

    They are for a token or two of a high rank, where the only part adds to all columns of the only
    y: XLA's form is three launches then. All else stays with the one launch of the kernel. XLA
    would take three for each part and for each adapter of a mix, and copies for slices of y and for
    several ys. Stacks in 8 bits or transposed were not timed.

    `lora_delta` and layers stay with the kernel too: they run beside the product that makes y. One
    launch ahead of it is hidden by it. XLA's launches wait for each other, so all but the first
    start behind a product that fills the GPU.

    It is about the forward alone: gradients run as kernels, whose sums XLA makes in a loop.
    """
    if call.implementation != "auto" or len(parts) != 1 or isinstance(ids, Mix):
        return False
    [part] = parts
    least = _XLA_FROM_RANK.get(num_tokens)
    return (
        (least is not None and part.rank >= least)
        and call.kernels == ("bgmv",)
        and call.widths == (part.width,)
        and not (part.is_eight_bits or part.transposed)
    )


# With more tokens XLA would gather too many copies of adapters.
_MAX_DECODE_TOKENS = 256


def check_undivided(call: Call, *operands: Array) -> None:
    """NotImplementedError for a kernel outside of a `jax.shard_map`, where types or shardings say
    that operands are divided over a mesh. See `undivided` for those that neither tells."""
    if call.implementation in ("auto", "mosaic_gpu"):
        undivided.check(call.op, operands)


def phase_of(num_tokens: int) -> str:
    """The phase of a call that names none."""
    return "decode" if num_tokens <= _MAX_DECODE_TOKENS else "prefill"


def xla_kernel(rank: int, phase: str) -> str:
    """bgmv or sgmv; where kernels are off, the form that a named implementation still takes."""
    kernel = select_kernel(rank, phase)
    return "sgmv" if kernel == "loop" else kernel


@functools.cache
def compiled(operation: Operation, call: Call) -> Callable[..., Any]:
    """The operation of the call's backend, jitted by a name that tells in a jaxpr or a profile."""
    if call.implementation == "auto":
        on_gpu = compiled(operation, call._replace(implementation="mosaic_gpu"))
        elsewhere = compiled(operation, call._replace(implementation="xla"))
        if call.few and operation == "add_lora":
            return elsewhere
        return lambda *args: jax.lax.platform_dependent(*args, cuda=on_gpu, default=elsewhere)
    backend = BACKENDS[call.implementation]
    run = functools.partial(getattr(backend, operation), call)
    kernels = () if call.implementation == "loop" else tuple(dict.fromkeys(call.kernels))

    def named(*args: Any) -> Any:
        if call.implementation == "mosaic_gpu":
            args = undivided.in_program(call.op, args)
        return varying(run(*args), args)

    named.__name__ = "_".join((*kernels, operation, call.implementation))
    # A kernel launch has no batching rule of its own: under vmap it runs once per element.
    batched = sequential_vmap(named) if call.implementation == "mosaic_gpu" else named
    return jax.jit(batched)
