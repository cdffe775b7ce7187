"""Gradients of an adapter in a mixed batch: those of PEFT, and the same bits beside any neighbours.

The bits are those of XLA's forms, which a CPU runs; `tests/gpu` holds the kernels to the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import Mlp, make_adapter
from torch_mlp import peft_run
from training_run import CONFIGS, ROWS, ROWS_OF, TARGETS, X, assert_same

import pallas_kernels as pk
from jax_lora import AdapterBank, apply_lora, use


@pytest.mark.ci
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_each_adapter_has_the_gradients_that_peft_gives_it_alone(tmp_path, phase):
    model = Mlp(nnx.Rngs(0))
    apply_lora(model, slots=2, buckets=(8, 16))
    bank = AdapterBank(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        options = {"alpha": config.alpha, "rslora": config.rslora}
        patterns = {"rank_pattern": config.rank_pattern}
        bank.load(name, make_adapter(seed, config.rank, **options, **patterns))
        bank.save(name, tmp_path / name)
    names = [next(n for n in ROWS_OF if row in ROWS_OF[n]) for row in range(ROWS)]
    weights = np.array([1 / len(ROWS_OF[name]) for name in names], np.float32)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradients(lora, batch):
        def loss(lora):
            with use(batch):
                y = nnx.merge(graphdef, lora, rest)(X)
            return (((y - TARGETS) ** 2).mean(-1) * weights).sum()

        return jax.grad(loss)(lora)

    found = gradients(lora, bank.batch(names, phase=phase))
    for name, config in CONFIGS.items():
        rows, entry = ROWS_OF[name], bank._entry(name)
        run = peft_run(
            model,
            tmp_path / name,
            lambda p: torch.optim.SGD(p, 0.0),
            1,
            X[rows],
            TARGETS[rows],
        )
        stack = (8, 16).index(entry.bucket)
        for module in ("up", "down"):
            layer = getattr(run.base_model.model, module)
            rank = config.rank_of(module)
            halves = found[module]["stacks"][stack]
            a, b = (np.asarray(halves[half][...])[entry.slot] for half in ("lora_a", "lora_b"))
            right_a, right_b = (
                half["default"].weight.grad.numpy() for half in (layer.lora_A, layer.lora_B)
            )
            np.testing.assert_allclose(a[:rank], right_a, atol=2e-6, rtol=1e-5)
            np.testing.assert_allclose(b[:, :rank], right_b, atol=2e-6, rtol=1e-5)
            assert not a[rank:].any() and not b[:, rank:].any()


TOKENS, FEATURES, WIDTH, RANK, SLOTS = 300, 40, 24, 8, 5


@jax.jit
def op_gradients(x, a, b, ids, dy, y):
    out, pull = jax.vjp(lambda x, a, b: pk.add_lora(y, x, a, b, ids), x, a, b)
    return out, *pull(dy)


def operands(seed, dtype):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (TOKENS, FEATURES),
        "a": (SLOTS, RANK, FEATURES),
        "b": (SLOTS, WIDTH, RANK),
        "dy": (TOKENS, WIDTH),
        "y": (TOKENS, WIDTH),
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("own", [1, 7, 150], ids="{} tokens".format)
def test_an_adapters_bits_do_not_depend_on_its_neighbours(dtype, own):
    """Nor on where in the batch its tokens are, while their order and the batch's size stay."""
    rng, mine = np.random.default_rng(own), 2

    def run(seed, where, others):
        values, first = operands(seed, dtype), operands(0, dtype)
        ids = others(np.random.default_rng(seed))
        ids[where] = mine
        for name in ("x", "dy", "y"):
            values[name][where] = first[name][:own]
        for name in ("a", "b"):
            values[name][mine] = first[name][mine]
        out, dx, da, db = op_gradients(**values, ids=ids)
        return {"y": out[where], "dx": dx[where], "da": da[mine], "db": db[mine]}

    def strangers(rng):
        ids = rng.integers(-1, SLOTS, TOKENS).astype(np.int32)
        return np.where(ids == mine, -1, ids)

    def alone(_):
        return np.full(TOKENS, -1, np.int32)

    first = np.arange(own)
    right = run(0, first, alone)
    assert all(np.asarray(value).any() for value in right.values())
    assert_same(run(0, first, alone), right)
    for seed in (1, 2, 3):
        anywhere = np.sort(rng.permutation(TOKENS)[:own])
        for where in (first, anywhere):
            assert_same(run(seed, where, strangers), right)
