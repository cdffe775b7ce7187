"""What JAX makes of a kernel, kept for all programs that launch it.

JAX traces a kernel once, but lowers it anew for each program, such as an engine's steps. The
kernels of a prefill of five rank buckets take half a minute of a CPU.
"""

import dataclasses
import functools
import io
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jax._src.pallas.mosaic_gpu import lowering  # JAX has no public way to it
from jax.extend.core import Jaxpr
from jax.interpreters import mlir

_Result = lowering.LoweringResult
_kept: weakref.WeakKeyDictionary[Jaxpr, dict[Hashable, Callable[[], _Result]]]
_kept = weakref.WeakKeyDictionary()


def once(lower: Callable[..., _Result]) -> Callable[..., _Result]:
    """`lowering.lower_unpipelined_jaxpr_to_module`, which lowers a jaxpr once."""

    @functools.wraps(lower)
    def call(
        mesh: Hashable, jax_mesh: Hashable, jaxpr: Jaxpr, ins: Sequence[Hashable],
        outs: Sequence[Hashable], params: Hashable, **where: Any,
    ) -> _Result:  # fmt: skip
        own = _kept.setdefault(jaxpr, {})
        key = mesh, jax_mesh, tuple(ins), tuple(outs), params
        if key not in own:
            result = lower(mesh, jax_mesh, jaxpr, ins, outs, params, **where)
            own[key] = _maker(result)
            return result
        return own[key]()

    return call


def _maker(result: _Result) -> Callable[[], _Result]:
    """Makes the same result again: each program has an MLIR context, and a module, of its own."""
    bytecode = io.BytesIO()
    result.module.operation.write_bytecode(bytecode)
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    del fields["module"]
    return lambda: _Result(module=mlir.ir.Module.parse(bytecode.getvalue()), **fields)


def keep() -> None:
    """Gives JAX the function above for its own."""
    lowering.lower_unpipelined_jaxpr_to_module = once(lowering.lower_unpipelined_jaxpr_to_module)
