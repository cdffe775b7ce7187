"""Nothing that a serving loop does with its adapters compiles anything, in the whole process."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import Mlp, expected, make_adapter, tokens

from jax_lora import AdapterBank, LoRAConfig, LoRAScale, apply_lora, save_peft, use

BUCKETS = (8, 16, 32, 64, 144)
RANKS = (1, 4, 8, 9, 12, 16, 17, 32, 33, 48, 64, 65, 128, 130, 144)


@contextlib.contextmanager
def compilations():
    """The programs that XLA compiles while the block runs, whoever asks for them."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Served:
    """A model, its bank, and a plain jitted step over pure arrays: prefill and decode."""

    def __init__(self):
        self.model = Mlp(nnx.Rngs(0))
        apply_lora(self.model, slots=2, buckets=BUCKETS)
        self.bank = AdapterBank(self.model)
        graphdef, _, self.rest = nnx.split(self.model, (nnx.LoRAParam, LoRAScale), ...)

        @jax.jit
        def step(state, rest, x, batch):
            with use(batch):
                return nnx.merge(graphdef, state, rest)(x)

        self.step = step
        self.x = tokens(12)

    def prefill(self, names):
        batch = self.bank.batch(names, [3, 1, 0, 8], phase="prefill")
        return np.asarray(self.step(self.bank.state, self.rest, self.x, batch))

    def decode(self, names):
        batch = self.bank.batch(names)
        return np.asarray(self.step(self.bank.state, self.rest, self.x[:4], batch))


@pytest.fixture(scope="module")
def served():
    served = Served()
    served.prefill([None] * 4)
    served.decode([None] * 4)
    return served


def test_the_listener_counts():
    with compilations() as compiled:
        jax.jit(lambda x: x * 17)(np.float32(1))
    assert compiled


def test_the_first_load_into_each_bucket_compiles_nothing():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=BUCKETS)
    bank = AdapterBank(model)
    with compilations() as compiled:
        for bucket in BUCKETS:
            bank.load(f"{bucket}", make_adapter(bucket, bucket))
    assert not compiled
    assert len(bank.names) == len(BUCKETS)


def test_nothing_recompiles(served, tmp_path):
    bank = served.bank
    adapters = {f"rank {rank}": make_adapter(rank, rank) for rank in RANKS}
    save_peft(make_adapter(0, 5), tmp_path)
    checked = []
    with compilations() as compiled:
        for name, adapter in adapters.items():  # loads, and evictions from the third in a bucket
            bank.load(name, adapter)
            checked.append(([name, None, name, None], served.decode([name, None, name, None])))
            served.prefill([None, name, None, name])
        mix = list(bank.names)  # two of each bucket: changes of mix, phase by phase
        assert len(mix) == 2 * len(BUCKETS)
        for n in range(len(mix)):
            names = [mix[n], mix[(3 * n + 1) % len(mix)], None, mix[(7 * n + 2) % len(mix)]]
            checked.append((names, served.decode(names)))
            served.prefill(names)
        served.decode([None] * 4)
        served.prefill([None] * 4)
        served.decode([mix[0]] * 4)
        bank.load("rank 130", make_adapter(1, 144), replace=True)  # within a bucket
        bank.load("rank 128", make_adapter(1, 2), replace=True)  # into another one
        bank.load("from disk", tmp_path)
        served.decode(["rank 130", "rank 128", "from disk", None])
        bank.pin("from disk")
        bank.unload("rank 130")
        bank.unpin("from disk")
        bank.load("rank 130", make_adapter(2, 130))
        with bank.batch(["rank 130"] * 4) as batch:
            served.step(bank.state, served.rest, served.x[:4], batch)
        kept = bank.batch(["from disk"] * 4)
        bank.unload("from disk")
        served.step(bank.state, served.rest, served.x[:4], kept)
        with pytest.raises(KeyError):
            served.decode(["from disk"] * 4)
    assert not compiled
    for names, got in checked:
        right = expected(served.model, served.x[:4], [adapters.get(name) for name in names])
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_another_number_of_rows_is_a_shape_of_its_own(served):
    with compilations() as compiled:
        batch = served.bank.batch([None] * 5)
    assert not compiled  # the batch itself is free
    with compilations() as compiled:
        served.step(served.bank.state, served.rest, served.x[:5], batch)
    assert compiled


def test_creating_compiles_no_program_per_rank():
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank, rngs = AdapterBank(model), nnx.Rngs(0)
    bank.create("first", LoRAConfig(3, 3), rngs=rngs)
    with compilations() as compiled:
        for rank in (1, 4, 8, 9, 15):
            bank.create(f"{rank}", LoRAConfig(rank, 3), rngs=rngs)
    assert not compiled


def test_saving_compiles_no_program_per_rank(tmp_path):
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank = AdapterBank(model)
    for rank in (16, 8):
        bank.load("a", make_adapter(rank, rank), replace=True)
        bank.save("a", tmp_path / "first")
    with compilations() as compiled:
        for rank in (1, 5, 9, 15):
            bank.load("a", make_adapter(rank, rank), replace=True)
            bank.save("a", tmp_path / f"{rank}")
    assert not compiled


def test_a_gradient_that_is_not_compiled_compiles_once(served):
    """Its tracers are new in each step, but the batch that they wrap is not."""

    def loss(x, batch):
        with use(batch):
            return jnp.where(x > 0, x, 0).sum() + jnp.sum(jnp.cumsum(x))

    def step(names):
        batch = served.bank.batch(names)
        jax.vjp(loss, jnp.asarray(served.x), batch)
        return jax.grad(loss, allow_int=True)(jnp.asarray(served.x), batch)

    step([None] * 4)
    with compilations() as compiled:
        for _ in range(3):
            step([None] * 4)
    assert not compiled
