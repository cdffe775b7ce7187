"""What a Hopper GPU runs for rows with several adapters, DoRA, or whole weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_lora
from jax_lora import AdapterBank, apply_lora

pytestmark = pytest.mark.ci


class Head(nnx.Module):
    def __init__(self):
        half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.lm_head = nnx.Linear(64, 128, **half, rngs=nnx.Rngs(0))


def lowered(adapters_per_row=1, **options):
    model = Head()
    apply_lora(model, slots=4, buckets=(16,), **options)
    batch = AdapterBank(model, adapters_per_row=adapters_per_row).batch([None] * 64)
    graphdef, state = nnx.split(model.lm_head)

    @jax.jit
    def step(state, x, batch):
        with jax_lora.use(batch):
            return nnx.merge(graphdef, state)(x)

    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return step.trace(state, x, batch).lower(lowering_platforms=("cuda",)).as_text()


def counts(module):
    return [module.count(f"stablehlo.{op}") for op in ("case", "dot_general")]


@pytest.mark.parametrize("options", [{"adapters_per_row": 4}, {"dora": True}], ids=str)
def test_they_take_the_launch_of_plain_rows(options):
    module = lowered(**options)
    assert set(re.findall(r"lora_?\w*_r\d+", module)) == {"lora_r16"}


def test_a_full_slot_is_one_product_that_is_left_out_where_no_row_has_it():
    module, plain = lowered(full_slots={"lm_head": 3}), lowered()
    assert set(re.findall(r"lora_?\w*_r\d+", module)) == {"lora_r16"}
    assert np.subtract(counts(module), counts(plain)).tolist() == [3, 3]
