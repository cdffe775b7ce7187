"""Pallas:Mosaic GPU kernels of a line or two, on float32 of shape [128]."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def _kernel(body, *arguments, out_type=()):
    return plgpu.kernel(body, out_type=out_type, grid=(1,), grid_names=("block",))(*arguments)


def double(x):
    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return _kernel(body, x, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))


def shift(x, by):
    """x + by, a number that the kernel reads from memory."""

    def body(x_ref, by_ref, out_ref):
        out_ref[...] = x_ref[...] + by_ref[0].astype(jnp.float32)

    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _kernel(body, x, by.reshape(1), out_type=out_type)


def add_in_place(y, x):
    """y + x in y's memory."""

    def body(y_ref, x_ref):
        y_ref[...] += x_ref[...]

    y_ref = jax.new_ref(y)
    _kernel(body, y_ref, x)
    return jax.freeze(y_ref)
