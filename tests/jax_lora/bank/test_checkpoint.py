"""A bank's checkpoint: another process has the same adapters in the same slots, or an error."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import Mlp, forward, make_adapter, make_bank, tokens
from training_run import ADAMW, Run, assert_same

from jax_lora import Adapter, AdapterBank, apply_lora
from jax_lora.adapters import FullModule

ROOT = pathlib.Path(__file__).parents[3]
NAMES = ["b", None, "acme-c", "a"]

OTHER_PROCESS = """
import sys
import numpy as np
from tiny import forward, make_bank, tokens

model, bank = make_bank(slots=3, buckets=(8, 16))
bank.restore_checkpoint(sys.argv[1])
assert bank.names == ("b", "acme-c", "a"), bank.names
assert [bank._entry(name).slot for name in bank.names] == [1, 2, 0]
assert bank.reservations == {"acme-": {8: 1}}
assert bank.usage()[8].pinned == ("b",)
logits = forward(model, tokens(4), bank.batch(["b", None, "acme-c", "a"]))
np.save(sys.argv[2], np.asarray(logits))
"""


DAMAGED = """
import sys
from tiny import make_bank

model, bank = make_bank(slots=3, buckets=(8, 16))
try:
    bank.restore_checkpoint(sys.argv[1])
except ValueError as error:
    assert "is no checkpoint of a bank, or is damaged" in str(error), error
    assert bank.names == () and bank.reservations == {}
else:
    raise AssertionError("it was restored")
"""


def run(script, *arguments):
    """The script in a process of its own, which compiles as this one does."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    plain = str(jax.config.read("jax_disable_most_optimizations"))  # else sums are others
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": plain},
    )


def filled():
    """Three adapters, one pinned; slot 1 was another's before."""
    model, bank = make_bank(slots=3, buckets=(8, 16))
    bank.load("a", make_adapter(0, 16))
    for n, name in enumerate(("gone", "first", "acme-c")):
        bank.load(name, make_adapter(n + 1, 5, rslora=n == 2))
    bank.unload("first")
    bank.load("b", make_adapter(9, 3))
    bank.unload("gone")
    bank.pin("b")
    bank.reserve("acme-", {8: 1})
    bank.batch(["b", "acme-c", "a"])
    return model, bank


def stacks_of(bank):
    return [np.array(leaf) for leaf in jax.tree.leaves(bank.state)]


def test_a_new_process_goes_on_with_it(tmp_path):
    model, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    logits = np.asarray(forward(model, tokens(4), bank.batch(NAMES)))
    run(OTHER_PROCESS, tmp_path / "bank", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), logits)


def test_a_restored_bank_evicts_and_loads_as_the_one_before(tmp_path):
    _, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    _, other = make_bank(slots=3, buckets=(8, 16))
    events = []
    other.watch(events.append)
    other.restore_checkpoint(tmp_path / "bank")
    assert [event.name for event in events] == ["b", "acme-c", "a"]
    assert other.config("acme-c") == bank.config("acme-c")
    assert [other.rank(name) for name in other.names] == [3, 5, 16]
    for each in (bank, other):
        for n in range(3):
            each.load(f"x{n}", make_adapter(n, 8))
    assert other.names == bank.names == ("b", "acme-c", "a", "x2")
    for name in other.names:
        mine, theirs = bank._adapter(name), other._adapter(name)
        assert mine.modules.keys() == theirs.modules.keys()
        for module, weights in mine.modules.items():
            np.testing.assert_array_equal(weights.a, theirs.modules[module].a)
            np.testing.assert_array_equal(weights.b, theirs.modules[module].b)


def test_an_optimizer_knows_its_adapters_again(tmp_path):
    run = Run(ADAMW)
    run.create("first", "second")
    run.train(2, ["first", "second"])
    run.bank.save_checkpoint(tmp_path / "bank")
    other = Run(ADAMW)
    other.bank.restore_checkpoint(tmp_path / "bank")
    other.state = jax.tree.map(jnp.copy, run.state)
    for one in (run, other):
        one.train(2, ["first", "second"])
    for name in ("first", "second"):
        assert_same(other.weights(name), run.weights(name))
    # Numbers that the checkpoint has are nobody else's.
    other.create("third")
    numbers = [other.bank._entry(name).serial for name in other.bank.names]
    assert len({*numbers}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_whole_weights_and_all_dtypes(tmp_path, dtype):
    def make():
        model = Mlp(nnx.Rngs(0))
        apply_lora(model, slots=2, buckets=(8,), full_slots={"down": 2}, dtype=dtype)
        return model, AdapterBank(model)

    model, bank = make()
    rng = np.random.default_rng(0)
    adapter = make_adapter(0, 4, features={"up": (4, 6)})
    full = {"down": FullModule(rng.normal(size=(4, 6)).astype("f4"), np.ones(4, "f4"))}
    bank.load("lora", make_adapter(1, 4))
    bank.load("whole", Adapter(adapter.config, adapter.modules, full=full))
    bank.save_checkpoint(tmp_path / "bank")
    again, other = make()
    other.restore_checkpoint(tmp_path / "bank")
    if dtype == "float32":  # the model is, and does not mix
        rows = ["whole", "lora", None]
        x = tokens(3)
        np.testing.assert_array_equal(
            forward(again, x, other.batch(rows)), forward(model, x, bank.batch(rows))
        )
    for old, new in zip(stacks_of(bank), stacks_of(other)):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(
        other._adapter("whole").full["down"].weight, bank._adapter("whole").full["down"].weight
    )


def test_dora_comes_back(tmp_path):
    from jax_lora import LoRAWeights

    plain = make_adapter(0, 4, dora=False)
    config = make_adapter(0, 4).config
    config = type(config)(rank=4, alpha=2.0, dora=True)
    modules = {
        name: LoRAWeights(w.a, w.b, w.scale, magnitude=np.full(w.b.shape[0], 2.0, "f4"))
        for name, w in plain.modules.items()
    }
    model, bank = make_bank(dora=True)
    bank.load("dora", Adapter(config, modules))
    bank.save_checkpoint(tmp_path / "bank")
    again, other = make_bank(dora=True)
    other.restore_checkpoint(tmp_path / "bank")
    assert other.config("dora").dora
    x = tokens(2)
    np.testing.assert_array_equal(
        forward(again, x, other.batch(["dora", None])),
        forward(model, x, bank.batch(["dora", None])),
    )


def test_an_empty_bank_is_a_checkpoint_too(tmp_path):
    _, bank = make_bank()
    bank.save_checkpoint(tmp_path / "bank")
    _, other = make_bank()
    other.restore_checkpoint(tmp_path / "bank")
    assert other.names == ()


class Wide(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 5, rngs=rngs)
        self.down = nnx.Linear(5, 4, rngs=rngs)


def wide_bank():
    model = Wide(nnx.Rngs(0))
    apply_lora(model, slots=3, buckets=(8, 16))
    return model, AdapterBank(model)


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: make_bank(slots=2, buckets=(8, 16)), "bucket 8: 3 slots there, 2 slots here"),
        (lambda: make_bank(slots=3, buckets=(8, 32)), "bucket 16: 3 slots there, none here"),
        (
            lambda: make_bank(slots=3, buckets=(8, 16), dtype="bfloat16"),
            "arrays of bucket 8: float32 there, bfloat16 here",
        ),
        (wide_bank, r"down: \[6, 4\] as number 0 \[\] of its layer there, \[5, 4\] as"),
    ],
)
def test_another_model_is_told_with_values_and_left_alone(tmp_path, make, error):
    _, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    _, other = make()
    before = stacks_of(other)
    with pytest.raises(ValueError, match=f"another model; give apply_lora the same .*{error}"):
        other.restore_checkpoint(tmp_path / "bank")
    assert other.names == () and other.reservations == {}
    for old, new in zip(before, stacks_of(other)):
        np.testing.assert_array_equal(old, new)


def test_a_bank_in_use_is_left_alone(tmp_path):
    _, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    with pytest.raises(FileExistsError, match="is there already; give another folder"):
        bank.save_checkpoint(tmp_path / "bank")
    _, other = make_bank(slots=3, buckets=(8, 16))
    other.load("mine", make_adapter(0, 4))
    batch = other.batch(["mine"])
    with pytest.raises(ValueError, match="it has 'mine', and 1 batches lease slots"):
        other.restore_checkpoint(tmp_path / "bank")
    other.unload("mine")
    with pytest.raises(ValueError, match="it has none, and 1 batches lease slots"):
        other.restore_checkpoint(tmp_path / "bank")
    del batch
    other.restore_checkpoint(tmp_path / "bank")
    assert other.names == ("b", "acme-c", "a")


def test_damaged_files_are_told_and_change_nothing(tmp_path):
    _, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    _, other = make_bank(slots=3, buckets=(8, 16))
    before = stacks_of(other)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        other.restore_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no checkpoint of a bank, or is damaged"):
        other.restore_checkpoint(tmp_path / "empty")
    said = tmp_path / "bank/bank/metadata"
    values = json.loads(said.read_text())

    def refused(change, error):
        spoilt = json.loads(said.read_text())
        change(spoilt)
        said.write_text(json.dumps(spoilt))
        with pytest.raises(ValueError, match=error):
            other.restore_checkpoint(tmp_path / "bank")
        said.write_text(json.dumps(values))

    refused(lambda v: v.update(format=7), "of format 7; this version reads 1")
    refused(lambda v: v["adapters"][0].update(slot=3), "'b' has slot 3 of bucket 8")
    refused(lambda v: v["adapters"][0].update(slot=2), "'acme-c' has slot 2 of bucket 8")
    refused(lambda v: v["adapters"][0].update(bucket=16), r"should be float32 \[16, ")
    refused(lambda v: v["adapters"][0].update(modules=["x"]), "modules that the model lacks")
    refused(lambda v: v["adapters"][0].update(name="../x"), "name must be 1 to 255")
    refused(lambda v: v["adapters"][0]["config"].update(rank=0), "damaged: ValueError")
    refused(lambda v: v["adapters"][0].update(serial="x"), "damaged: ValueError")
    refused(lambda v: v.pop("reservations"), "damaged: KeyError: 'reservations'")
    refused(
        lambda v: v["reservations"]["acme-"].update({"8": 9}), "9 slots of bucket 8 for 'acme-'"
    )
    refused(lambda v: v["adapters"].append(v["adapters"][0]), "'b' has slot 1 of bucket 8")
    assert other.names == () and other.reservations == {}
    for old, new in zip(before, stacks_of(other)):
        np.testing.assert_array_equal(old, new)


def test_weights_that_are_cut_off_are_told(tmp_path):
    _, bank = filled()
    bank.save_checkpoint(tmp_path / "bank")
    # Those of a process too, to which nothing may point any more: no size tells them apart.
    for data in (tmp_path / "bank/adapters").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-9])
    # Orbax reads all arrays at a time, and leaves the errors of the others to Python's end.
    run(DAMAGED, tmp_path / "bank")
