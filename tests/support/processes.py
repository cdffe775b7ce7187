"""What each of several processes does that hold an Mlp together; see `test_processes`."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import Mlp, logits_and_gradients, make_adapter, tokens

import jax_lora
from jax_lora import AdapterBank, LoRAConfig, apply_lora, llama
from jax_lora.models.parallel import placing
from jax_lora.sharding import put, whole

SPECS = {"up": P(None, "tp"), "down": P("tp", None)}


class Wide(Mlp):
    """Features that four processes divide."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)


FEATURES = {"up": (4, 8), "down": (8, 4)}


def adapter(seed, rank):
    return make_adapter(seed, rank, features=FEATURES)


def model_and_bank(mesh=None, buckets=(8, 16)):
    model = Wide(nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if mesh is not None:
            spec = SPECS[path[0]] if path[1] == "kernel" else P()
            variable.set_value(put(variable.get_value(), NamedSharding(mesh, spec)))
    apply_lora(model, slots=2, buckets=buckets)
    return model, AdapterBank(model)


@nnx.jit
def step(model, x, adapters):
    with jax_lora.use(adapters):
        return model(x)


@nnx.jit
def gradient_norms(model, x, adapters):
    """One number for each stack, which all processes have."""

    def loss(model):
        with jax_lora.use(adapters):
            return jnp.sum(jnp.square(model(x)))

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    return jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)])


def rows(model, bank, names, mesh=None):
    x = tokens(len(names))
    if mesh is not None:
        x = put(x, NamedSharding(mesh, P()))
    y = step(model, x, bank.batch(names))
    return np.asarray(y.addressable_data(0))


def error_of(call):
    """What a call raises, as text."""
    try:
        call()
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def loads_and_steps(model, bank, mesh, folder):
    """Loads, evicts, replaces, creates, saves and merges; what it computes on the way."""
    for seed, rank in ((0, 4), (1, 12), (2, 6)):
        bank.load(f"{seed}", adapter(seed, rank))
    found = {"first": rows(model, bank, ["0", "1", None, "2"], mesh)}
    bank.load("3", adapter(3, 8))  # evicts 0
    bank.load("1", adapter(4, 16), replace=True)
    bank.create("new", LoRAConfig(rank=10, alpha=2.0), rngs=nnx.Rngs(0))
    found["second"] = rows(model, bank, ["3", "1", "2", "new"], mesh)
    x = tokens(4) if mesh is None else put(tokens(4), NamedSharding(mesh, P()))
    norms = gradient_norms(model, x, bank.batch(["3", "1", "2", None]))
    found["gradients"] = np.asarray(norms.addressable_data(0))
    bank.save("3", folder)
    merged = bank.merge("1")["up"]["kernel"].get_value()
    found["merged"] = np.concatenate([s.data for s in merged.addressable_shards], axis=1)
    return found, [*bank.names]


def same(bank, mesh, model, folder):
    found, names = loads_and_steps(model, bank, mesh, folder / "saved")
    np.savez(folder / f"{jax.process_index()}.npz", **found)
    return names


def disagree(bank, mesh, model, folder):
    """What one process does otherwise fails on all, and changes nothing."""
    first = jax.process_index() == 0
    bank.load("a", adapter(0, 4))
    before = rows(model, bank, ["a"], mesh)
    errors = [
        error_of(lambda: bank.load("b" if first else "c", adapter(1, 4))),
        error_of(lambda: bank.load("b", adapter(1 if first else 2, 4))),
        error_of(lambda: bank.load("b", adapter(1, 4) if first else "no/such/folder")),
        error_of(lambda: bank.save("a" if first else "z", folder / "saved")),
    ]
    bank.load("b", adapter(1, 4))
    np.testing.assert_array_equal(rows(model, bank, ["a"], mesh), before)
    return [*errors, *bank.names]


# So large that Orbax does not put the shards of both processes into one file.
LARGE = (8, 512)
CHECKPOINT = ["b", "a", None]


def filled(mesh=None):
    """What a checkpoint of these tests holds: `b` is pinned and in slot 1."""
    model, bank = model_and_bank(mesh, LARGE)
    for name, seed, rank in (("gone", 3, 4), ("b", 0, 5), ("a", 1, 500)):
        bank.load(name, adapter(seed, rank))
    bank.unload("gone")
    bank.pin("b")
    bank.reserve("acme-", {8: 1})
    return model, bank


def places(bank):
    entries = [bank._entry(name) for name in bank.names]
    found = [[e.bucket, e.slot, e.serial, e.pinned] for e in entries]
    return [[*bank.names], found, bank.reservations == {"acme-": {8: 1}}]


def damaged(folder, kind, part):
    """A copy of a checkpoint, of which the largest file of a part has lost its end."""
    copy = folder.with_name(kind)
    if jax.process_index() == 0:
        shutil.copytree(folder, copy)
        file = max(copy.glob(part), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:9])
    multihost_utils.sync_global_devices(kind)
    return copy


def checkpoint(_, mesh, __, folder):
    """Saves and restores, and what goes wrong on one process or on both."""
    first, found = jax.process_index() == 0, {}
    _, own = model_and_bank()  # of this process alone; Orbax counts its save
    own.load("own", adapter(0, 4))
    found["own"] = error_of(lambda: own.save_checkpoint(folder / "own"))
    model, bank = filled(mesh)
    saved = folder / "saved"
    bank.save_checkpoint(saved)
    np.save(folder / f"{jax.process_index()}.npy", rows(model, bank, CHECKPOINT, mesh))
    found["there"] = error_of(lambda: bank.save_checkpoint(saved))
    found["others"] = error_of(lambda: bank.save_checkpoint(folder / f"{first}"))
    assert not (folder / f"{first}").exists()

    again, other = model_and_bank(mesh, LARGE)
    before = [np.array(leaf.addressable_data(0)) for leaf in jax.tree.leaves(other.state)]

    def refused(path):
        error = error_of(lambda: other.restore_checkpoint(path))
        assert other.names == () and other.reservations == {}
        for old, new in zip(before, jax.tree.leaves(other.state), strict=True):
            np.testing.assert_array_equal(new.addressable_data(0), old)
        return error

    found["missing"] = refused(folder / "nowhere")
    found["names"] = refused(damaged(saved, "names", "bank/metadata"))
    found["shards"] = refused(damaged(saved, "shards", "adapters/ocdbt.process_1/d/*"))
    found["one of two"] = refused(saved if first else folder / "nowhere")
    for path in (folder / "alone", saved):
        other.restore_checkpoint(path)
        found[path.name] = places(other)
        np.testing.assert_array_equal(
            rows(again, other, CHECKPOINT, mesh), rows(model, bank, CHECKPOINT, mesh)
        )
        for name in (*other.names, *other.reservations):
            other.reserve(name, {}) if name == "acme-" else other.unload(name)
    found["before"] = places(bank)
    return found


def die(bank, mesh, model, folder):
    """The last process is killed between two steps."""
    bank.load("a", adapter(0, 4))
    rows(model, bank, ["a"], mesh)
    if jax.process_index() == jax.process_count() - 1:
        os._exit(9)
    while True:
        bank.load("a", adapter(0, 4), replace=True)
        rows(model, bank, ["a"], mesh)
        time.sleep(0.1)


def run_steps(bank, mesh, model, folder):
    """Steps without end, for a process to be killed amid them."""
    bank.load("a", adapter(0, 4))
    rows(model, bank, ["a"], mesh)
    (folder / f"{jax.process_index()}.ready").touch()
    while True:
        rows(model, bank, ["a"], mesh)


LLAMA = llama.LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
RANKS = (3, 16, 40)
OF_ROWS = ["40", None, "3", "16"]


def of_llama(mesh=None):
    """Logits, and the gradients of all stacks, whole; ranks of several buckets in one batch."""
    model = llama.Llama(LLAMA, rngs=nnx.Rngs(0))
    if mesh is not None:
        with jax.set_mesh(mesh):
            place = placing(LLAMA)
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            variable.set_value(place(path, variable.get_value()))
    apply_lora(model, target="(q|o|up|down)_proj", slots=2, buckets=(16, 64))
    bank = AdapterBank(model)
    features = {name: site.features for name, site in bank._sites.items()}
    for rank in RANKS:
        bank.load(f"{rank}", make_adapter(rank, rank, features=features))
    ids = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (len(OF_ROWS), 5)).astype(np.int32)
    if mesh is not None:
        ids = put(ids, NamedSharding(mesh, P()))
    (_, logits), gradients = logits_and_gradients(model, ids, bank.batch(OF_ROWS))
    return [whole(array) for array in (logits, *jax.tree.leaves(gradients))]


def run_llama(_, mesh, __, folder):
    np.savez(folder / f"{jax.process_index()}.npz", *of_llama(mesh))


def main(act, process, count, port, folder):
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py does: XLA is faster
    address = f"localhost:{port}"
    jax.distributed.initialize(
        address, int(count), int(process), heartbeat_timeout_seconds=10, initialization_timeout=120
    )
    mesh = jax.make_mesh((int(count),), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    model, bank = model_and_bank(mesh)
    acts = {
        "same": same,
        "disagree": disagree,
        "checkpoint": checkpoint,
        "die": die,
        "steps": run_steps,
        "llama": run_llama,
    }
    print(json.dumps(acts[act](bank, mesh, model, Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
