"""The ops as `torch.ops.jax_lora`: what torch.compile records, and what autograd differentiates.

All change their first tensor, except `add_lora`, which returns the new value, for autograd.
"""

from typing import Any

import torch

from interop import checks, functions, ops
from interop.dlpack import may_be_exact, update, update_padded

_SEGMENTS = "Tensor starts, Tensor lengths, Tensor ids"
_SHRINK = "float scale, str? path"
_EXPAND = "SymInt? offset, bool add_inputs, str? path"
_ADD_LORA = (
    "Tensor x, Tensor lora_a, Tensor lora_b, Tensor ids, Tensor? scales, float? scale, "
    "SymInt? offset, str phase, str? path"
)


def _register(op: ops.Op, schema: str) -> None:
    def implementation(*args: Any) -> None:
        *static, path = args[op.tensors :]
        scale = static.pop(0) if op.scaled else None
        tensors = tuple(t.detach() for t in args[: op.tensors] if t is not None)
        ops.run(op, tensors, scale, path, tuple(static))

    def fake(*args: Any) -> None:
        static = args[op.tensors + op.scaled : -1]
        checks.path(args[-1])
        op.check(*args[: op.tensors], *static)

    custom = torch.library.custom_op(
        f"jax_lora::{op.name}", implementation, mutates_args=("output",), schema=f"({schema}) -> ()"
    )
    custom.register_fake(fake)


_OUTPUT = "Tensor(a!) output"
_register(ops.BGMV_SHRINK, f"{_OUTPUT}, Tensor x, Tensor lora_a, Tensor ids, {_SHRINK}")
_register(ops.SGMV_SHRINK, f"{_OUTPUT}, Tensor x, Tensor lora_a, {_SEGMENTS}, {_SHRINK}")
_register(ops.BGMV_EXPAND, f"{_OUTPUT}, Tensor v, Tensor lora_b, Tensor ids, {_EXPAND}")
_register(ops.SGMV_EXPAND, f"{_OUTPUT}, Tensor v, Tensor lora_b, {_SEGMENTS}, {_EXPAND}")
_register(ops.ADD_LORA, f"{_OUTPUT}, {_ADD_LORA}")


# ---------------------------------------------------------------------------------------- gradients


@torch.library.custom_op(
    "jax_lora::add_lora", mutates_args=(), schema=f"(Tensor y, {_ADD_LORA}) -> Tensor"
)
def _add_lora(y: torch.Tensor, *args: Any) -> torch.Tensor:
    new = y.clone()
    torch.ops.jax_lora.add_lora_(new, *args)
    return new


@_add_lora.register_fake
def _fake_add_lora(y: torch.Tensor, *args: Any) -> torch.Tensor:
    *tensors, _scale, offset, phase, path = args
    checks.path(path)
    ops.ADD_LORA.check(y, *tensors, offset, phase)
    return torch.empty_like(y)


@torch.library.custom_op(
    "jax_lora::add_lora_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, Tensor ids, Tensor scales, "
        "SymInt? offset, str phase) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _add_lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    ids: torch.Tensor,
    scales: torch.Tensor,
    offset: int | None,
    phase: str,
) -> tuple[torch.Tensor, ...]:
    gradients = tuple(torch.empty_like(t) for t in (x, lora_a, lora_b, scales))
    call = functions.bound(functions.add_lora_backward, offset=offset or 0, phase=phase)
    inputs = (dy.contiguous(), x, lora_a, lora_b, ids, scales)
    function = functions.jitted(call, len(gradients))
    if may_be_exact(function, inputs):
        update(function, gradients, inputs)
    else:
        update_padded(function, gradients, inputs, {0: 0, 4: 0, 5: 0, 8: -1})
    return gradients


@_add_lora_backward.register_fake
def _fake_add_lora_backward(dy: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    x, lora_a, lora_b, _ids, scales, *_static = args
    return tuple(torch.empty_like(t) for t in (x, lora_a, lora_b, scales))


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "add_lora has no second derivative: its gradients are constants to autograd; call backward "
        "or grad once, without differentiating their results"
    )


_add_lora_backward.register_autograd(_no_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, x, lora_a, lora_b, ids, scales, scale, offset, phase, _path = inputs
    ctx.given_scales = scales is not None
    if scales is None:
        scales = torch.full((), scale, dtype=torch.float32, device=y.device)
    ctx.save_for_backward(x, lora_a, lora_b, ids, scales)
    ctx.static = offset, phase


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, da, db, dscales = torch.ops.jax_lora.add_lora_backward(dy, *ctx.saved_tensors, *ctx.static)
    return dy, dx, da, db, None, dscales if ctx.given_scales else None, None, None, None, None


_add_lora.register_autograd(_backward, setup_context=_setup)
