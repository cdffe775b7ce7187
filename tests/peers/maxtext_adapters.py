"""MaxText's NNX transformer, unchanged, scanned and not, with adapters of several ranks."""

import os
import pathlib
import string

os.environ["DECOUPLE_GCLOUD"] = "TRUE"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from maxtext import configs
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.configs import pyconfig
from maxtext.layers.linears import DenseGeneral
from maxtext.models import models
from maxtext.utils import maxtext_utils

import jax_lora
from jax_lora.training import per_adapter

RANKS = {"four": 4, "eight": 8, "twenty": 20}
ROWS = ["four", None, "twenty", "eight"]
LENGTH = 16


def product(layer):
    """What a `DenseGeneral` returns of x, as an einsum."""
    summed, kept = len(layer.in_features_shape), len(layer.out_features_shape)
    h, n = string.ascii_lowercase[:summed], string.ascii_lowercase[summed : summed + kept]
    return f"...{h},{h}{n}->...{n}"


class Setup:
    def __init__(self, scanned, folder):
        base = pathlib.Path(configs.__file__).with_name("base.yml")
        self.config = pyconfig.initialize(
            ["", str(base)], run_name="tiny", base_output_directory=str(folder),
            enable_checkpointing=False, skip_jax_distributed_system=True, hardware="cpu",
            decoder_block="llama2", attention="dot_product", matmul_precision="highest",
            base_emb_dim=32, base_mlp_dim=64, base_num_query_heads=4, base_num_kv_heads=2,
            head_dim=8, base_num_decoder_layers=2, vocab_size=64, max_target_length=LENGTH,
            max_prefill_predict_length=8, per_device_batch_size=4.0, dtype="float32",
            weight_dtype="float32", pure_nnx=True, enable_nnx=True, pure_nnx_decoder=True,
            scan_layers=scanned, param_scan_axis=0,
        )  # fmt: skip
        devices = maxtext_utils.create_device_mesh(self.config)
        self.mesh = Mesh(devices, self.config.mesh_axes)
        self.model = self.make()
        jax_lora.apply_lora(self.model, slots=2, buckets=(8, 32))
        self.bank, random = jax_lora.AdapterBank(self.model), np.random.default_rng(0)
        for name, rank in RANKS.items():
            config = jax_lora.LoRAConfig(rank, alpha=2 * rank)
            self.bank.create(name, config, rngs=nnx.Rngs(rank))
            self.bank.save(name, folder / name)
            new = {}
            for module, old in jax_lora.load_peft(folder / name).modules.items():
                a, b = (0.1 * random.normal(size=half.shape) for half in (old.a, old.b))
                halves = a.astype(np.float32), b.astype(np.float32)
                new[module] = jax_lora.LoRAWeights(*halves, old.scale)
            self.bank.load(name, jax_lora.Adapter(config, new), replace=True)

    def make(self):
        with self.mesh:
            rngs = nnx.Rngs(params=0, dropout=1)
            return models.Transformer(
                self.config, self.mesh, None, model_mode=MODEL_MODE_TRAIN, rngs=rngs
            )

    def logits(self, model):
        ones = jnp.ones((len(ROWS), LENGTH), jnp.int32)
        return model(
            tokens(),
            jnp.cumsum(ones, 1) - 1,
            decoder_segment_ids=ones,
            enable_dropout=False,
            model_mode=MODEL_MODE_TRAIN,
        )


def tokens():
    return jnp.arange(len(ROWS) * LENGTH).reshape(len(ROWS), LENGTH) % 63 + 1


@pytest.fixture(params=[False, True], ids=["unscanned", "scanned"])
def setup(request, tmp_path, monkeypatch):
    monkeypatch.setattr(DenseGeneral, "einsum_str", property(product), raising=False)
    setup = Setup(request.param, tmp_path)
    with setup.mesh:
        yield setup


def test_rows_equal_merged_models(setup):
    left = jax_lora.left_alone(setup.model)
    assert {*left.values()} <= {"Embed", "RMSNorm"}  # a scanned norm's scales are a matrix

    @jax.jit
    def run(model, batch):
        with jax_lora.use(batch):
            return setup.logits(model)

    base = np.asarray(setup.logits(setup.make()))
    got = np.asarray(run(setup.model, setup.bank.batch(ROWS)))
    programs = run._cache_size()
    other = np.asarray(run(setup.model, setup.bank.batch(ROWS[::-1])))
    assert run._cache_size() == programs
    for row, name in enumerate(ROWS):
        merged = setup.make()
        if name is not None:
            nnx.update(merged, setup.bank.merge(name))
        want = np.asarray(setup.logits(merged))
        np.testing.assert_allclose(got[row], want[row], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other[3 - row], want[3 - row], rtol=1e-4, atol=1e-4)
        assert name is None or abs(want[row] - base[row]).max() > 0.1


def test_training(setup):
    """A step moves the adapters of its batch, and nothing else."""
    model, bank = setup.model, setup.bank
    optimizer = nnx.Optimizer(model, per_adapter(optax.adam(1e-2)), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch, trainees):
        def loss_of(model):
            with jax_lora.use(batch):
                logs = jax.nn.log_softmax(setup.logits(model))
            return -jnp.take_along_axis(logs, tokens()[..., None], -1).mean()

        loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(
            model
        )
        optimizer.update(model, gradients, trainees=trainees)
        return loss

    def values():
        base = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
        merged = {name: jax.tree.leaves(bank.merge(name)) for name in RANKS}
        return jax.tree.map(np.array, (jax.tree.leaves(base), merged))

    given = bank.batch(["four", None, "twenty", "four"]), bank.trainees(["four", "twenty"])
    (base, before), losses = values(), []
    for _ in range(3):
        losses.append(float(step(model, optimizer, *given)))
    base_after, after = values()
    assert losses[2] < losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, base_after, base)
    jax.tree.map(np.testing.assert_array_equal, after["eight"], before["eight"])
    for name in ("four", "twenty"):
        assert any((one != other).any() for one, other in zip(before[name], after[name]))
