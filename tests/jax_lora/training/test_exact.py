"""The phase "exact": one program of a few rows, whatever the size of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from neighbours import check_exact, exact, rows_of_two_ranks
from tiny import Mlp, expected, forward, make_adapter, tokens

from jax_lora import AdapterBank, apply_lora, use
from pallas_kernels import LoRAPart
from pallas_kernels.ops import add_in_step
from pallas_kernels.routing import make_mix


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [16, 144])
def test_rows_have_the_same_bits_in_batches_of_any_size(dtype, rank):
    """One token to several chunks, anywhere in them; rank 144 takes XLA's other form."""
    check_exact(*rows_of_two_ranks(200, 96, 80, (8, rank), dtype), sizes=(1, 8, 64, 130))


@pytest.mark.ci
def test_mixes_of_adapters_have_the_same_bits_too():
    y, x, parts, _ = rows_of_two_ranks(100, 96, 80, (8, 16), "bfloat16")
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 6, (100, 2)).astype(np.int32)
    weights = rng.normal(size=(100, 2)).astype(np.float32)
    whole = np.asarray(exact(y, x, parts, make_mix(ids, weights, 6)))
    some = rng.permutation(100)[:9]
    few = exact(y[some], x[some], parts, make_mix(ids[some], weights[some], 6))
    np.testing.assert_array_equal(few, whole[some])
    assert (whole != np.asarray(y)).any()


def test_embeddings_are_refused_by_name():
    class Lookup(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(10, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.embed(x)

    model = Lookup()
    apply_lora(model, slots=1, buckets=(8,), target="embed")
    bank = AdapterBank(model)
    with pytest.raises(ValueError, match="'exact' does not cover LoRA of embeddings"):
        forward(model, np.array([[1]]), bank.batch([None], phase="exact"))


@pytest.mark.ci
def test_layers_take_it_and_give_the_gradients_that_they_give_else():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank = AdapterBank(model)
    adapters = {"a": make_adapter(1, 5), "b": make_adapter(2, 12)}
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    names = ["a", "b", None] * 3
    x = tokens(len(names))
    batches = [bank.batch(names, phase=phase) for phase in ("exact", "prefill")]
    y = forward(model, x, batches[0])
    np.testing.assert_allclose(y, expected(model, x, [adapters.get(n) for n in names]), atol=1e-5)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradients(lora, batch):
        def loss(lora):
            with use(batch):
                return (nnx.merge(graphdef, lora, rest)(x) ** 2).sum()

        return jax.grad(loss)(lora)

    for one, other in zip(*(jax.tree.leaves(gradients(lora, batch)) for batch in batches)):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.asarray(one).any()


@pytest.mark.ci
@pytest.mark.parametrize("num_tokens", [8, 1000])
def test_it_lowers_for_a_gpu_as_the_same_kernel(num_tokens):
    shapes = [(num_tokens, 128), (num_tokens, 256), (3, 16, 256), (3, 128, 16)]
    y, x, a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)

    def run(y, x, a, b, ids):
        return add_in_step((y,), x, (LoRAPart(a, b),), ids, phase="exact")

    text = jax.jit(run).trace(y, x, a, b, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1 and "tensor<64x256xbf16>" in text
    assert f"tensor<{num_tokens}x256xbf16>, tensor<3x16x256xbf16>" not in text


def test_an_unknown_phase_is_refused():
    bank = AdapterBank(_with_room())
    with pytest.raises(ValueError, match="phase must be"):
        bank.batch([None], phase="exactly")


def _with_room():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,))
    return model
