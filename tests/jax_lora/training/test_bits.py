"""Gradients of an adapter in a mixed batch: those of PEFT, and the same bits beside any neighbours.

The bits are those of XLA's forms, which a CPU runs; `tests/gpu` holds the kernels to the same.
"""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from neighbours import Neighbours
from tiny import Mlp, make_adapter
from torch_mlp import peft_run
from training_run import CONFIGS, ROWS, ROWS_OF, TARGETS, X, assert_same

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


@pytest.mark.ci
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("own", [1, 7, 150], ids="{} tokens".format)
def test_an_adapters_bits_do_not_depend_on_its_neighbours(dtype, own):
    """Nor on where in the batch its tokens are, while their order and the batch's size stay."""
    rng, case = np.random.default_rng(own), Neighbours(300, 40, 24, 8, dtype)
    first = np.arange(own)
    right = case.run(0, first, alone=True)
    assert all(value.any() for value in right.values())
    assert_same(case.run(0, first, alone=True), right)
    for seed in (1, 2, 3):
        anywhere = np.sort(rng.permutation(case.tokens)[:own])
        for where in (first, anywhere):
            assert_same(case.run(seed, where), right)
