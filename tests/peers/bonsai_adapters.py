"""Bonsai's models, unchanged, with adapters of several ranks: decoding, training, a mesh."""

import contextlib
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bonsai.models.gemma3 import modeling as gemma3
from bonsai.models.llada import modeling as llada
from bonsai.models.qwen3 import modeling as qwen3
from flax import nnx
from jax.sharding import AxisType

import jax_lora
from jax_lora.training import per_adapter

FSDP = qwen3.ShardConfig.default(use_fsdp=True, use_tp=False)
VOCABULARY, LENGTH, STEPS, BUCKETS = 64, 6, 3, (8, 32)
RANKS = {"four": 4, "eight": 8, "twenty": 20}
ROWS = ["four", None, "twenty", "eight", None, "four"]


def qwen3_config(**sharding):
    return qwen3.ModelConfig(
        num_layers=2, vocab_size=VOCABULARY, emb_dim=32, mlp_dim=64, num_heads=4, head_dim=8,
        num_kv_heads=2, rope_theta=10_000, rope_scaling_factor=8.0, local_rope_theta=1e4,
        norm_eps=1e-6, tie_word_embeddings=False, **sharding,
    )  # fmt: skip


def llada_config(sharding):
    return llada.ModelConfig(
        dtype=jnp.float32, d_model=32, n_heads=4, n_kv_heads=4, n_layers=2, embedding_dropout=0.0,
        max_sequence_length=64, rope_theta=1e4, include_qkv_bias=False, include_bias=False,
        vocab_size=VOCABULARY, embedding_size=VOCABULARY, mlp_hidden_size=64, shd_cfg=sharding,
        return_hidden_states=False,
    )  # fmt: skip


def gemma3_config():
    text = gemma3.TextConfig(
        attention_bias=False, attention_dropout=0.0, head_dim=8, hidden_size=32,
        intermediate_size=64, layer_types=gemma3._set_attention_modes(2, 2),
        max_position_embeddings=64, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_full_factor=8.0, rope_full_theta=1e6,
        rope_slide_factor=1.0, rope_slide_theta=1e4, sliding_window=4, vocab_size=VOCABULARY,
        norm_dtype=jnp.float32,
    )  # fmt: skip
    vision = gemma3.VisionConfig(
        attention_dropout=0.0, hidden_size=16, image_size=8, intermediate_size=32,
        layer_norm_eps=1e-6, num_attention_heads=2, num_channels=3, num_hidden_layers=1,
        patch_size=4, vision_use_head=False,
    )  # fmt: skip
    return gemma3.ModelConfig(
        vision, text, mm_tokens_per_image=4, dtype="float32", final_logit_softcapping=None
    )


class Qwen3:
    left, target = {"embedder": "Embed"}, None

    def __init__(self, **sharding):
        self.config = qwen3_config(**sharding)

    def make(self):
        return qwen3.Qwen3(self.config, rngs=nnx.Rngs(0))

    def cache(self):
        return qwen3.init_cache(self.config, len(ROWS), LENGTH, STEPS, jnp.float32)

    def call(self, model, tokens, cache):
        return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

    def last(self, model, tokens, cache):
        return qwen3.forward(model, cache, tokens, 0)

    def in_transformers(self, path):
        return path if path == "lm_head" else f"model.{path}".replace(".attn.", ".self_attn.")

    def rename(self, name):
        return name.removeprefix("model.").replace(".self_attn.", ".attn.")


class Gemma3:
    target = r"language_model\..*"
    left = {  # noqa: RUF012
        "embed_tokens.weight": "Embed",
        "multi_modal_projector": "Gemma3MultiModalProjector",
        "vision_tower.embeddings.patch_embedding": "Conv",
        "vision_tower.embeddings.position_embedding": "Embed",
    }
    rename = {"model.language_model": "language_model"}  # noqa: RUF012

    def make(self):
        return gemma3.Gemma3Model(gemma3_config(), rngs=nnx.Rngs(0))

    def cache(self):
        return gemma3.init_cache(gemma3_config(), len(ROWS), LENGTH, STEPS, jnp.float32)

    def call(self, model, tokens, cache):
        ones, zeros = jnp.ones_like(tokens), jnp.zeros_like(tokens)  # of one text, no image
        return model(tokens, None, cache=cache, segment_ids=ones, token_type_ids=zeros)

    def last(self, model, tokens, cache):
        ones, zeros = jnp.ones_like(tokens), jnp.zeros_like(tokens)
        return gemma3.forward(model, cache, tokens, None, ones, zeros)

    def in_transformers(self, path):
        return f"model.{path}"


class LLaDA:
    """Its layers are of a class of its own, which does not say its product."""

    left, target, rename = {"wte": "ShardedEmbedding"}, None, None

    def make(self):
        sharding = llada.ShardingConfig.default(use_fsdp=True, use_tp=False)
        model = llada.LLaDAModel(llada_config(sharding), rngs=nnx.Rngs(0))
        for _, module in nnx.iter_modules(model):
            if isinstance(module, llada.RMSNorm):  # made with zeros, as weights come from files
                module.weight.set_value(jnp.ones_like(module.weight[...]))
        return model

    def call(self, model, tokens, cache):
        return model(tokens, jnp.ones_like(tokens), jax.random.key(0))[0]

    def in_transformers(self, path):
        return path


class Setup:
    """A model with adapters that were loaded from PEFT's folders."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.random = kind, folder, np.random.default_rng(0)
        self.model = kind.make()
        jax_lora.apply_lora(self.model, slots=2, buckets=BUCKETS, target=kind.target)
        self.bank, self.weights = jax_lora.AdapterBank(self.model), {}
        for name, rank in RANKS.items():
            self.load(name, rank)

    def load(self, name, rank):
        """All layers have the adapter but one."""
        weights = {}
        for path, module in layers_of(self.model).items():
            h, n = module.matrix_shape()
            a, b = self.random.normal(size=(rank, h)), self.random.normal(size=(n, rank))
            weights[path] = (0.1 * a).astype(np.float32), (0.1 * b).astype(np.float32)
        del weights[min(weights)]
        config, as_named = jax_lora.LoRAConfig(rank, alpha=2 * rank), self.kind.in_transformers
        modules = {as_named(p): jax_lora.LoRAWeights(a, b, 2.0) for p, (a, b) in weights.items()}
        jax_lora.save_peft(jax_lora.Adapter(config, modules), self.folder / name)
        self.bank.load(name, self.folder / name, rename=self.kind.rename)
        self.weights[name] = weights

    def merged(self, name):
        """A model without LoRA, with A and B added into its kernels."""
        model = self.kind.make()
        modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
        for path, (a, b) in self.weights[name].items() if name else ():
            kernel = modules[path].kernel
            delta = jax.device_put(2.0 * (b @ a).T.reshape(kernel.shape), kernel.sharding)
            kernel.set_value(kernel[...] + delta)
        return model


def path_name(path):
    return ".".join(map(str, path))


def layers_of(model):
    modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
    return {path: module for path, module in modules.items() if hasattr(module, "stacks")}


@contextlib.contextmanager
def on_two_devices():
    kinds = (AxisType.Explicit, AxisType.Explicit)
    with jax.set_mesh(jax.make_mesh((2, 1), ("fsdp", "tp"), axis_types=kinds)):
        yield


def tokens_of(step=slice(None)):
    """The same numbers in each row, other ones in each step."""
    tokens = np.arange(len(ROWS) * LENGTH).reshape(len(ROWS), LENGTH) * 7 % (VOCABULARY - 1) + 1
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_put(tokens[:, step], None if mesh.empty else jax.P("fsdp"))


def generated(kind, call):
    """The logits of the last token of a prompt, and of each step after it."""
    cache, found = kind.cache(), []
    for step in [slice(None), *(slice(n, n + 1) for n in range(STEPS))]:
        logits, cache = call(tokens_of(step), cache)
        found.append(np.asarray(logits))
    return np.stack(found, 1)


@contextlib.contextmanager
def compilations():
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(params=["qwen3", "qwen3-fsdp", "gemma3"])
def setup(request, tmp_path):
    if request.param != "qwen3-fsdp":
        yield Setup({"qwen3": Qwen3, "gemma3": Gemma3}[request.param](), tmp_path)
    else:
        with on_two_devices():
            yield Setup(Qwen3(shd_cfg=FSDP), tmp_path)


def test_what_is_left_alone(setup):
    model = setup.kind.make()
    jax_lora.apply_lora(model, slots=1, buckets=(8,))
    assert jax_lora.left_alone(model) == setup.kind.left


def test_decoding(setup):
    """Prefill and steps, by Bonsai's own jitted `forward`, equal those of merged models."""
    kind = setup.kind

    @jax.jit
    def forward(model, tokens, cache, batch):
        with jax_lora.use(batch):
            return kind.last(model, tokens, cache)

    def run(rows):
        batch = setup.bank.batch(rows)
        return generated(kind, lambda *given: forward(setup.model, *given, batch))

    def expected(name):
        model = setup.merged(name)
        return generated(kind, lambda *given: kind.last(model, *given))

    def check(got, rows):
        for row, name in enumerate(rows):
            np.testing.assert_allclose(got[row], want[name][row], rtol=1e-4, atol=1e-4)
            assert name is None or (abs(got[row] - want[None][row]).max(1) > 0.01).all()

    want = {name: expected(name) for name in [None, *RANKS]}
    check(run(ROWS), ROWS)
    with compilations() as found:
        setup.bank.unload("eight")
        setup.load("three", 3)
        rows = ["twenty", "three", None, "three", "four", "twenty"]
        got = run(rows)
    assert not found
    want["three"] = expected("three")
    check(got, rows)


def test_training(setup):
    """A step moves the adapters of its batch, and nothing else."""
    kind, model, bank = setup.kind, setup.model, setup.bank
    optimizer = nnx.Optimizer(model, per_adapter(optax.adam(1e-2)), wrt=nnx.LoRAParam)
    rows = ["four", None, "twenty", "four", None, "twenty"]

    @nnx.jit
    def step(model, optimizer, tokens, batch, trainees):
        def loss_of(model):
            with jax_lora.use(batch):
                logits = kind.call(model, tokens, kind.cache())
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
            return -own.mean()

        on_stacks = nnx.DiffState(0, nnx.LoRAParam)
        loss, gradients = nnx.value_and_grad(loss_of, argnums=on_stacks)(model)
        optimizer.update(model, gradients, trainees=trainees)
        return loss

    def values():
        base = nnx.state(model, nnx.Not(nnx.LoRAParam))
        adapters = {name: bank.merge(name) for name in RANKS}
        return jax.tree.map(np.array, (base, adapters))

    given = tokens_of(), bank.batch(rows), bank.trainees(["four", "twenty"])
    (base, adapters), losses = values(), []
    for _ in range(3):
        losses.append(float(step(model, optimizer, *given)))
    base_after, adapters_after = values()
    assert losses[2] < losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, base_after, base)
    jax.tree.map(np.testing.assert_array_equal, adapters_after["eight"], adapters["eight"])
    for name in ("four", "twenty"):
        before, after = (nnx.to_flat_state(state[name]) for state in (adapters, adapters_after))
        moved = {
            path_name(path[:-1])
            for (path, a), (_, b) in zip(before, after)
            if (a[...] != b[...]).any()
        }
        assert moved == {*setup.weights[name]}


def test_a_class_that_says_its_product(tmp_path, monkeypatch):
    with on_two_devices():
        with pytest.raises(TypeError, match=r"is a ShardedLinear.*an attribute einsum_str"):
            jax_lora.apply_lora(LLaDA().make(), target="q_proj")
        monkeypatch.setattr(llada.ShardedLinear, "einsum_str", "...d,df->...f", raising=False)
        setup = Setup(LLaDA(), tmp_path)
        assert jax_lora.left_alone(setup.model) == LLaDA.left

        @jax.jit
        def run(model, tokens, batch):
            with jax_lora.use(batch):
                return setup.kind.call(model, tokens, None)

        got = np.asarray(run(setup.model, tokens_of(), setup.bank.batch(ROWS)))
        for row, name in enumerate(ROWS):
            want = np.asarray(run(setup.merged(name), tokens_of(), None))
            np.testing.assert_allclose(got[row], want[row], rtol=1e-4, atol=1e-4)
            assert abs(want[row]).max() > 0.1
