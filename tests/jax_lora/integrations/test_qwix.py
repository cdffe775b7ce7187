"""qwix's provider interface, with several adapters in a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from meshes import assert_equal

import jax_lora
from jax_lora import AdapterBatch
from jax_lora.integrations.qwix import MultiLoraProvider, set_rows

# qwix itself calls much that Flax has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

B, S, D, SLOTS = 4, 3, 16, 3
RULE = {"module_path": ".*", "rank": 2, "alpha": 4.0}
ROWS = [2, None, 0, 2]


class Einsum(nnx.Module):
    """A module of a user's own, such as Tunix's, that Flax knows nothing of."""

    def __init__(self, einsum_str: str, *shape: int) -> None:
        self.einsum_str = einsum_str
        rng = np.random.default_rng(shape)
        self.w = nnx.Param(jnp.asarray(rng.normal(size=shape) / 8, jnp.float32))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Net(nnx.Module):
    """The ways in which a parameter is multiplied."""

    def __init__(self, remat=False):
        self.q = Einsum("BTD,NDH->BTNH", 2, D, 4)
        self.o = Einsum("BTNH,NHD->BTD", 2, 4, D)
        self.kernel = nnx.Param(jnp.asarray(np.eye(D), jnp.float32))
        self.dense = nnx.Linear(D, D, use_bias=False, rngs=nnx.Rngs(0))
        self.remat = remat

    def block(self, x):
        x = x + self.o(self.q(x))
        return jax.lax.dot_general(self.dense(x), self.kernel[...], (((2,), (1,)), ((), ())))

    def __call__(self, x):
        return (nnx.remat(Net.block) if self.remat else Net.block)(self, x)


def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


def filled(provider, remat=False):
    model = qwix.apply_lora_to_model(Net(remat), provider, x(), rngs=nnx.Rngs(0))
    lora = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(1)
    nnx.update(
        model, jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape) / 4, t.dtype), lora)
    )
    return model


@nnx.jit
def call(model, x, batch):
    with jax_lora.use(batch):
        return model(x)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_each_row_gets_what_qwix_gives_it_alone(remat):
    provider = MultiLoraProvider(**RULE, slots=SLOTS)
    model, single = filled(provider, remat), filled(qwix.LoraProvider(**RULE))
    stacks = nnx.state(model, nnx.LoRAParam)
    names = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(stacks)}
    assert names == {
        "q/w_lora_a": (SLOTS, D, 2), "q/w_lora_b": (SLOTS, 2, 2, 4),
        "o/w_lora_a": (SLOTS, 2, 4, 2), "o/w_lora_b": (SLOTS, 2, D),
        "dense/kernel_lora_a": (SLOTS, D, 2), "dense/kernel_lora_b": (SLOTS, 2, D),
        "kernel_lora_a": (SLOTS, D, 2), "kernel_lora_b": (SLOTS, 2, D),
    }  # fmt: skip
    got = call(model, x(), provider.batch(ROWS))
    for row, slot in enumerate(ROWS):
        if slot is None:
            want = Net()(x())
        else:
            nnx.update(single, jax.tree.map(lambda t, slot=slot: t[slot], stacks))
            want = single(x())
        np.testing.assert_allclose(got[row], want[row], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model(x()), Net()(x()))  # without a batch


@pytest.mark.ci
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_stay_with_the_slots_of_the_rows(remat):
    provider = MultiLoraProvider(**RULE, slots=SLOTS)
    model, batch = filled(provider, remat), provider.batch(ROWS)

    @nnx.jit
    def gradient(model, x, batch):
        def loss(model):
            with jax_lora.use(batch):
                return jnp.sum(jnp.square(model(x)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    for leaf in jax.tree.leaves(gradient(model, x(), batch)):
        assert np.abs(leaf[0]).max() > 0 and np.abs(leaf[2]).max() > 0
        assert not leaf[1].any()


def test_rows_in_the_models_state():
    """Another call of `set_rows` compiles nothing, and a batch of `use` comes first."""
    provider = MultiLoraProvider(**RULE, slots=SLOTS)
    model, traces = filled(provider), []
    want = [call(model, x(), provider.batch(rows)) for rows in (ROWS, ROWS[::-1])]

    @nnx.jit
    def plain(model, x):
        traces.append(None)
        return model(x)

    set_rows(model, provider, ROWS)
    assert_equal(plain(model, x()), want[0])
    set_rows(model, provider, ROWS[::-1])
    assert_equal(plain(model, x()), want[1])
    assert len(traces) == 1
    assert_equal(call(model, x(), provider.batch(ROWS)), want[0])
    assert_equal(call(nnx.clone(model), x(), provider.batch(ROWS)), want[0])


@pytest.mark.ci
def test_slots_have_numbers_of_their_own_as_large_as_qwixs():
    """He's bound depends on the size of one A, not of all slots'."""
    many = MultiLoraProvider(**RULE, slots=50)
    model = qwix.apply_lora_to_model(Net(), many, x(), rngs=nnx.Rngs(0))
    a = np.asarray(model.dense.kernel_lora_a[...])
    assert len({slot.tobytes() for slot in a}) == 50
    np.testing.assert_allclose(np.abs(a).max(), np.sqrt(6 / D), rtol=0.02)
    assert not model.dense.kernel_lora_b[...].any()


class Experts(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((B, D, D)))

    def __call__(self, x):
        return jnp.einsum("BTD,BDF->BTF", x, self.w[...])


class OutOfOrder(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((D, S, D)))

    def __call__(self, x):
        return jax.lax.dot_general(x, self.w[...], (((1, 2), (1, 0)), ((), ())))


def test_what_no_row_can_have_an_adapter_of_its_own_in():
    apply = qwix.apply_lora_to_model
    with pytest.raises(ValueError, match="slots=3: the einsum of the model with w is no product"):
        apply(Experts(), MultiLoraProvider(**RULE, slots=3), x(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the dot_general of the model with w is no product"):
        apply(OutOfOrder(), MultiLoraProvider(**RULE, slots=3), x(), rngs=nnx.Rngs(0))
    one = apply(Experts(), MultiLoraProvider(**RULE), x(), rngs=nnx.Rngs(0))  # left to qwix
    assert one.w_lora_b.shape == (2, D)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        MultiLoraProvider(**RULE, slots=0)
    provider = MultiLoraProvider(**RULE, slots=SLOTS)
    with pytest.raises(ValueError, match=r"slots from 0 to 2 or None, got \[3, -1\]"):
        provider.batch([0, 3, None, -1])
    other = AdapterBatch(np.zeros(B, np.int32), ranges=((8, 5),))
    with pytest.raises(ValueError, match="a model with 5 slots, but the provider has slots=3"):
        call(filled(provider), x(), other)
