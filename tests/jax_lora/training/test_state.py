"""An optimizer's state is saved and restored with its adapter."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import make_adapter
from training_run import ADAMW, CONFIGS, Run, assert_same

from jax_lora.training import load_state, per_adapter, save_state


@pytest.fixture
def trained(tmp_path):
    """A run in which two adapters have trained, and files of one of them."""
    run = Run(ADAMW)
    run.create("first", "second")
    run.train(3, ["first", "second"])
    run.bank.save("first", tmp_path)
    save_state(run.state, run.bank, "first", tmp_path / "optimizer.safetensors")
    return run, tmp_path


@pytest.mark.ci
def test_training_goes_on_where_it_stopped(trained):
    """In another slot, beside another adapter, bit for bit."""
    run, folder = trained
    other = Run(ADAMW)
    other.create("third")
    other.bank.create("before", CONFIGS["second"], rngs=nnx.Rngs(0))
    other.train(2, ["third"])
    other.bank.load("first", folder)
    assert other.bank._entry("first").slot != run.bank._entry("first").slot
    other.state = load_state(other.state, other.bank, "first", folder / "optimizer.safetensors")
    third = other.weights("third")
    for one, rates in ((run, None), (other, None)):
        one.train(3, ["first"], rates)
    assert_same(other.weights("first"), run.weights("first"))
    assert_same(other.weights("third"), third)
    other.bank.load("first", folder, replace=True)
    other.train(3, ["first"])  # without its state, which belongs to the weights that it had
    assert any(
        (now != run.weights("first")[path]).any() for path, now in other.weights("first").items()
    )


def test_flax_takes_a_restored_state(trained):
    run, folder = trained
    optimizer = nnx.Optimizer(run.model, run.tx, wrt=nnx.LoRAParam)
    before = jax.tree.structure(optimizer.opt_state)
    optimizer.opt_state = load_state(
        optimizer.opt_state, run.bank, "first", folder / "optimizer.safetensors"
    )
    assert jax.tree.structure(optimizer.opt_state) == before
    again = folder / "again.safetensors"
    save_state(optimizer.opt_state, run.bank, "first", again)
    assert again.read_bytes() == (folder / "optimizer.safetensors").read_bytes()

    @nnx.jit
    def rest(model, optimizer, gradients, trainees):
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients, trainees=trainees)

    gradients = jax.tree.map(np.zeros_like, nnx.state(run.model, nnx.LoRAParam))
    rest(run.model, optimizer, gradients, run.bank.trainees(["second"]))
    save_state(optimizer.opt_state, run.bank, "first", again)
    assert again.read_bytes() == (folder / "optimizer.safetensors").read_bytes()


def test_mistakes_are_told_and_change_nothing(trained):
    run, folder = trained
    file = folder / "optimizer.safetensors"
    with pytest.raises(KeyError, match="no adapter 'nobody'"):
        save_state(run.state, run.bank, "nobody", file)
    run.bank.load("second", make_adapter(0, 5), replace=True)
    with pytest.raises(ValueError, match="nothing of adapter 'second': no step has trained it"):
        save_state(run.state, run.bank, "second", file)
    with pytest.raises(ValueError, match="must hold one state of per_adapter, got 0"):
        load_state(optax.EmptyState(), run.bank, "first", file)
    with pytest.raises(FileNotFoundError):
        load_state(run.state, run.bank, "first", folder / "missing")
    (folder / "broken").write_bytes(b"\x1b[2J")
    with pytest.raises(ValueError, match=r"broken is no state of an adapter"):
        load_state(run.state, run.bank, "first", folder / "broken")
    run.create("third")
    with pytest.raises(ValueError, match=r"another rank bucket or dtype: its .* float32 \[8, 6\]"):
        load_state(run.state, run.bank, "third", file)
    other = per_adapter(optax.sgd(0.1, momentum=0.9)).init(nnx.state(run.model, nnx.LoRAParam))
    with pytest.raises(ValueError, match="another transformation or model: only the state has"):
        load_state(other, run.bank, "first", file)
    save_state(run.state, run.bank, "first", file)
