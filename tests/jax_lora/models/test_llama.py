"""The decoder against Hugging Face's, in float32."""

import contextlib
import dataclasses
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jax_lora
from jax_lora import llama
from jax_lora.nn.names import array_shapes, numbered_names, path_name, with_numbers
from jax_lora.serving.generate import cache_size
from jax_lora.serving.options import step_options

ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 24},
    "llama3_rope": {"num_key_value_heads": 2, "rope_parameters": ROPE3},
}


def save_reference(path, seed=0, **changes):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            **changes,
        }
    )
    torch.manual_seed(seed)
    reference = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms and biases start at ones and zeros, which hide mistakes
        for name, weight in reference.named_parameters():
            if "norm" in name or "bias" in name:
                weight += 0.3 * torch.randn_like(weight)
    reference.save_pretrained(path)
    return reference


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A grouped, llama3-scaled model of Hugging Face's, and ours."""
    path = tmp_path_factory.mktemp("base")
    reference = save_reference(path, **VARIANTS["llama3_rope"])
    return reference, llama.Llama.from_pretrained(path)


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(3, 61, shape).astype(np.int32)


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    reference = save_reference(tmp_path, **VARIANTS[variant])
    model = llama.Llama.from_pretrained(tmp_path)
    tokens = tokens_of((2, 29))
    expected = reference_logits(reference, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, tokens), expected, atol=1e-4)


def test_the_old_form_of_rope_scaling_is_the_same(tmp_path):
    reference = save_reference(tmp_path, rope_parameters=ROPE3)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    file.write_text(json.dumps(values))
    tokens = tokens_of((1, 20))
    logits = llama.Llama.from_pretrained(tmp_path)(tokens)
    np.testing.assert_allclose(logits, reference_logits(reference, tokens), atol=1e-4)


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers(tmp_path):
    save_reference(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    file, tokens = tmp_path / "config.json", tokens_of((1, 40))
    saved = json.loads(file.read_text())
    scaling = {name: value for name, value in ROPE3.items() if name != "rope_theta"}
    results = []
    for changes in ({}, {"rope_scaling": scaling}, {"rope_scaling": scaling, "rope_theta": 300.0}):
        file.write_text(json.dumps(saved | changes))
        reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        results.append(llama.Llama.from_pretrained(tmp_path)(tokens))
        np.testing.assert_allclose(results[-1], reference_logits(reference, tokens), atol=1e-4)
    assert np.abs(results[0] - results[1]).max() > 0.1 < np.abs(results[1] - results[2]).max()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (2,)),
        ("{}", (2,)),
        ('{"eos_token_id": null}', (2,)),
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": [7, 2, 9]}', (7, 2, 9)),
    ],
)
def test_end_tokens_of_generation_config_replace_those_of_config(tmp_path, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 2}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert llama.LlamaConfig.from_json(tmp_path).eos_token_id == expected


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_a_malformed_generation_config_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        llama.LlamaConfig.from_json(tmp_path)


def test_sharded_checkpoint(tmp_path):
    reference = save_reference(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (llama.Llama.from_pretrained(tmp_path / name) for name in ("whole", "shards"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(shards))


def test_bfloat16(tmp_path):
    reference = save_reference(tmp_path, initializer_range=0.1)
    tokens = tokens_of((2, 9))
    model = llama.Llama.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    logits = np.asarray(model(tokens), np.float32)
    expected = reference_logits(reference, tokens)
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    again = llama.Llama.from_pretrained(tmp_path)  # takes the dtype of the file
    np.testing.assert_array_equal(np.asarray(again(tokens), np.float32), logits)


def test_paths_are_the_names_of_transformers(pair):
    reference, model = pair
    linear = {name for name, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    numbered = {*layer_names(model, nnx.Linear)}
    assert numbered == linear and "model.layers.1.self_attn.q_proj" in numbered


def layer_names(model, kind):
    """The names of a model's layers of a kind, each by its number where they are stacked."""
    found = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, kind)}
    leads = {path: layer.kernel.shape[:-2] for path, layer in found.items()}
    names = numbered_names(array_shapes(model), leads)
    for path, lead in leads.items():
        yield from with_numbers(names[path_name(path)], lead).values()


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One checkpoint with its layers scanned, and one by one, each with the same adapters."""
    path = tmp_path_factory.mktemp("forms")
    save_reference(path, **VARIANTS["biases"], num_hidden_layers=3)
    models = [llama.Llama.from_pretrained(path, scan=scan) for scan in (True, False)]
    banks = []
    for model in models:
        jax_lora.apply_lora(model, slots=2, buckets=(8, 16))
        banks.append(jax_lora.AdapterBank(model))
        banks[-1].load("a", random_adapter(0, 5, "q_proj"))
        banks[-1].load("b", random_adapter(1, 16, "down_proj"))
        banks[-1].load("c", random_adapter(2, 8, "lm_head"))
    return models, banks


@pytest.mark.ci
def test_scanned_layers_compute_what_unrolled_ones_do(forms):
    tokens, lengths = tokens_of((4, 7)), np.array([7, 2, 5, 1], np.int32)

    @jax.jit
    def run(split, batch):
        model = nnx.merge(*split)
        with jax_lora.use(batch):
            logits, cache = llama.prefill(model, model.init_cache(4, 12), tokens, lengths)
            followed = llama.decode(model, cache, tokens[:, 0])
        return logits, followed[0], jnp.stack(followed[1].keys), jnp.stack(followed[1].values)

    results = [
        run(nnx.split(model), bank.batch(["a", None, "b", "c"])) for model, bank in zip(*forms)
    ]
    for mine, theirs in zip(*results):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())
    base, _ = run(nnx.split(forms[0][0]), None)[:2]
    assert (np.abs(results[0][0] - base).max(axis=1) > 1e-2).tolist() == [True, False, True, True]


@pytest.mark.ci
def test_gradients_of_scanned_layers_are_those_of_unrolled_ones(forms):
    tokens = tokens_of((3, 6))

    @jax.jit
    @jax.grad
    def gradient(stacks, rest, batch):
        with jax_lora.use(batch):
            logits = nnx.merge(*rest[:1], stacks, *rest[1:])(tokens)
        return jnp.sum(jnp.sin(logits))

    gradients = []
    for model, bank in zip(*forms):
        graphdef, stacks, rest = nnx.split(model, nnx.LoRAParam, ...)
        found = gradient(stacks, (graphdef, rest), bank.batch(["a", "b", None]))
        gradients.append(dict(nnx.to_flat_state(found)))
    scanned, unrolled = gradients
    for path, mine in scanned.items():
        theirs = (
            np.stack([unrolled[*path[:2], n, *path[2:]][...] for n in range(3)])
            if path[1] == "layers"
            else unrolled[path][...]
        )
        np.testing.assert_allclose(mine[...], theirs, atol=1e-4 * max(1, np.abs(theirs).max()))
    used = [path for path, gradient in scanned.items() if np.abs(gradient[...]).max() > 0]
    assert {path[-4] for path in used} == {"q_proj", "down_proj"} and len(used) == 4


def test_a_model_of_one_layer(tmp_path):
    reference = save_reference(tmp_path, num_hidden_layers=1)
    model, tokens = llama.Llama.from_pretrained(tmp_path), tokens_of((1, 5))
    assert model.model.layers.mlp.up_proj.kernel.shape == (1, 32, 48)
    np.testing.assert_allclose(model(tokens), reference_logits(reference, tokens), atol=1e-4)


def test_a_full_cache_is_not_extended(pair):
    _, model = pair
    tokens = tokens_of((2, 4))
    _, cache = llama.prefill(model, model.init_cache(2, 4), tokens, np.array([4, 3]))
    _, after = nnx.jit(llama.decode)(model, cache, tokens[:, 0])
    for old, new in ((cache.keys, after.keys), (cache.values, after.values)):
        np.testing.assert_array_equal(new[:, 0], old[:, 0])
        np.testing.assert_array_equal(new[:, 1, :, :3], old[:, 1, :, :3])
        assert np.abs(new[:, 1, :, 3] - old[:, 1, :, 3]).min() > 0


def test_prefill_and_decode_equal_the_full_forward(pair):
    _, model = pair
    tokens, lengths = tokens_of((3, 14)), np.array([4, 1, 7], np.int32)
    full = model(tokens)
    run_prefill, run_decode = nnx.jit(llama.prefill), nnx.jit(llama.decode)
    # What follows a prompt is padding to prefill, whatever it is.
    logits, cache = run_prefill(model, model.init_cache(3, 14), tokens[:, :7], lengths)
    rows = np.arange(3)
    for step in range(7):
        np.testing.assert_allclose(logits, full[rows, lengths + step - 1], atol=1e-4)
        logits, cache = run_decode(model, cache, tokens[rows, lengths + step])
    np.testing.assert_array_equal(cache.lengths, lengths + 7)


def test_a_reused_cache_keeps_nothing(pair):
    _, model = pair
    prompt, lengths = tokens_of((2, 5)), np.array([5, 3], np.int32)
    clean = model.init_cache(2, 8)
    dirty = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 7), clean
    )
    results = []
    for cache in (clean, dirty):
        logits, cache = nnx.jit(llama.prefill)(model, cache, prompt, lengths)
        results.append((logits, *nnx.jit(llama.decode)(model, cache, prompt[:, 0])))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.isfinite(results[0][1]).all()


def test_a_row_does_not_depend_on_padding_or_on_other_rows(pair):
    _, model = pair
    prompt = tokens_of((1, 6))
    expected = llama.generate(model, prompt, [6], max_new_tokens=5, eos_id=())
    padded = np.concatenate([prompt, tokens_of((1, 9), seed=1)], axis=1)
    batch = np.concatenate([tokens_of((2, 15), seed=2), padded])
    together = llama.generate(model, batch, [15, 2, 6], max_new_tokens=5, eos_id=())
    np.testing.assert_array_equal(together[2:], expected)


def test_generate_equals_transformers(pair):
    reference, model = pair
    prompt = tokens_of((2, 6), seed=3)
    expected = reference.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(2, 6),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 6:].numpy()
    got = llama.generate(model, prompt, [6, 6], max_new_tokens=8, eos_id=())
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)


def test_generate_stops_at_the_end_of_each_row(pair):
    _, model = pair
    prompt = tokens_of((2, 6), seed=3)
    free = llama.generate(model, prompt, [6, 6], max_new_tokens=8, eos_id=())
    first, second = int(free[0, 1]), int(free[1, 3])
    ended = llama.generate(model, prompt, [6, 6], max_new_tokens=8, eos_id=[first, second])
    for row, expected in zip(ended, free, strict=True):
        stop = int(np.flatnonzero(np.isin(expected, [first, second]))[0])
        np.testing.assert_array_equal(row[: stop + 1], expected[: stop + 1])
        assert (row[stop:] == expected[stop]).all()


@contextlib.contextmanager
def compilations():
    """The compilations of the process inside the block."""
    compiled = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_generate_compiles_once_per_shape(pair):
    _, model = pair
    other = nnx.clone(model)
    other.lm_head.kernel[...] = -other.lm_head.kernel[...]
    prompt = tokens_of((2, 6))
    llama.generate(model, prompt, [6, 6], max_new_tokens=3)
    with compilations() as compiled:
        a = llama.generate(model, prompt, [6, 2], max_new_tokens=3, eos_id=())
        b = llama.generate(other, prompt[::-1], [1, 6], max_new_tokens=3, eos_id=())
        assert not np.array_equal(a, b)
        assert not compiled
        llama.generate(model, tokens_of((2, 5)), [5, 5], max_new_tokens=3)
        assert len(compiled) == 1  # the prefill alone


def test_caches_have_few_sizes():
    sizes = {n: cache_size(n) for n in (1, 256, 257, 700, 1024, 1025, 2049, 100_000)}
    assert sizes == {
        1: 256, 256: 256, 257: 512, 700: 1024, 1024: 1024, 1025: 2048, 2049: 3072, 100_000: 100_352
    }  # fmt: skip


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_models_structure_is_a_key_for_jit(is_tied):
    config = llama.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=is_tied,
    )
    structures = [nnx.split(llama.Llama(config, rngs=nnx.Rngs(n)))[0] for n in range(2)]
    assert len(set(structures)) == 1


def test_only_a_gpu_gets_compiler_options(monkeypatch):
    assert step_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = step_options()
    assert options["xla_gpu_command_buffer_scheduling_mode"] == "CONCURRENT"
    assert options["xla_gpu_enable_triton_gemm"] is False
    options.clear()  # the caller's own
    assert step_options()


def random_adapter(seed, rank, target):
    rng = np.random.default_rng(seed)
    config = jax_lora.LoRAConfig(rank, 4 * rank)
    sizes = {"q_proj": (32, 32), "down_proj": (48, 32), "lm_head": (32, 61)}
    names = {
        "q_proj": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)],
        "down_proj": ["model.layers.1.mlp.down_proj"],
        "lm_head": ["lm_head"],
    }[target]
    inputs, outputs = sizes[target]
    return jax_lora.Adapter(
        config,
        {
            name: jax_lora.LoRAWeights(
                *(
                    (rng.standard_normal(shape) / rank**0.5).astype(np.float32)
                    for shape in ((rank, inputs), (outputs, rank))
                ),
                config.scale_of(name),
            )
            for name in names
        },
    )


@pytest.mark.ci
def test_generate_with_adapters_equals_merged_models(pair):
    model = nnx.clone(pair[1])
    jax_lora.apply_lora(model, slots=2, buckets=(8, 16))
    bank = jax_lora.AdapterBank(model)
    prompt, lengths = tokens_of((4, 6)), [6, 2, 5, 3]

    def run(names):
        return llama.generate(
            model, prompt, lengths, adapters=bank.batch(names), max_new_tokens=6, eos_id=()
        )

    bank.load("a", random_adapter(0, 3, "q_proj"))
    run(["a", None, None, "a"])
    others = {
        "b": random_adapter(1, 12, "down_proj"),
        "c": random_adapter(2, 8, "lm_head"),
        "d": random_adapter(3, 8, "q_proj"),
    }
    with compilations() as compiled:
        for name, adapter in others.items():  # d evicts a
            bank.load(name, adapter)
        together = run(["d", None, "b", "c"])
        assert not compiled
    plain = llama.generate(pair[1], prompt, lengths, max_new_tokens=6, eos_id=())
    np.testing.assert_array_equal(together[1], plain[1])
    for row, name in ((0, "d"), (2, "b"), (3, "c")):
        merged = nnx.clone(pair[1])
        nnx.update(merged, bank.merge(name))
        expected = llama.generate(merged, prompt, lengths, max_new_tokens=6, eos_id=())
        np.testing.assert_array_equal(together[row], expected[row])
        assert not np.array_equal(expected[row], plain[row])


@pytest.mark.ci
def test_threads_may_load_while_others_generate(pair):
    model = nnx.clone(pair[1])
    jax_lora.apply_lora(model, slots={8: 3, 16: 1}, buckets=(8, 16))
    bank = jax_lora.AdapterBank(model)
    bank.load("mine", random_adapter(0, 8, "q_proj"))
    bank.load("theirs", random_adapter(1, 5, "down_proj"))
    prompt, lengths = tokens_of((3, 6)), [6, 3, 4]

    def run(batch):
        return llama.generate(model, prompt, lengths, adapters=batch, max_new_tokens=30, eos_id=())

    batch = bank.batch(["mine", None, "theirs"])
    expected = run(batch)
    bank.unload("mine")  # its slot and that of "theirs" stay leased: one is left, and the bucket 16
    bank.unload("theirs")
    others = [random_adapter(seed, rank, "q_proj") for seed, rank in ((2, 8), (3, 6), (4, 12))]
    loads, stop = [0], threading.Event()

    def load():
        while not stop.is_set():
            for name, adapter in zip("abc", others, strict=True):  # a and b evict each other
                bank.load(name, adapter, replace=True)
                loads[0] += 1

    with ThreadPoolExecutor(3) as threads:
        loading = threads.submit(load)
        try:
            results = [run(batch), *threads.map(run, [batch, batch])]
            while loads[0] <= 10:
                results.append(run(batch))
        finally:
            stop.set()
        loading.result()
    for got in results:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.ci
def test_generate_takes_what_is_loaded_between_its_calls(pair):
    model = nnx.clone(pair[1])
    jax_lora.apply_lora(model, slots=1, buckets=(8,))
    bank, prompt = jax_lora.AdapterBank(model), tokens_of((1, 6))
    results = []
    for seed in (0, 1):
        bank.load("a", random_adapter(seed, 8, "q_proj"), replace=True)
        with bank.batch(["a"]) as batch:
            results.append(
                llama.generate(model, prompt, [6], adapters=batch, max_new_tokens=8, eos_id=())
            )
    assert not np.array_equal(*results)


def test_generate_in_a_forked_child_is_refused(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of the fork itself
        child = os.fork()
    if child == 0:
        try:
            llama.generate(pair[1], [[3]], [1], max_new_tokens=1)
        except RuntimeError as error:
            os._exit(0 if "forked from one that had used JAX" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.ci
def test_a_decode_without_adapters_in_its_batch_runs_the_plain_model(pair):
    model = nnx.clone(pair[1])
    jax_lora.apply_lora(model, slots=1, buckets=(8,))
    bank = jax_lora.AdapterBank(model)
    bank.load("a", random_adapter(0, 8, "q_proj"))
    _, cache = llama.prefill(pair[1], pair[1].init_cache(2, 8), tokens_of((2, 6)), np.array([6, 3]))

    @jax.jit
    def step(split, batch):
        with jax_lora.use(batch):
            return llama.decode(nnx.merge(*split), cache, jnp.array([5, 7]))

    plain, after = step(nnx.split(pair[1]), None)
    nowhere, same = step(nnx.split(model), bank.batch([None, None]))
    with compilations() as compiled:
        adapted, _ = step(nnx.split(model), bank.batch(["a", None]))
    assert not compiled
    for got, expected in zip(jax.tree.leaves((nowhere, same)), jax.tree.leaves((plain, after))):
        np.testing.assert_array_equal(got, expected)
    assert np.abs(adapted - plain)[0].max() > 1e-3


@pytest.mark.parametrize(
    ("tokens", "lengths", "new", "message"),
    [
        ([[1, 2]], [3], 1, r"lengths must lie in \[1, 2\], got 3 to 3"),
        ([[1, 2]], [0], 1, "lengths must lie in"),
        ([[1, 61]], [2], 1, r"tokens must lie in \[0, 61\), got 1 to 61"),
        ([[1, -1]], [1], 1, "tokens must lie in"),
        ([1, 2], [2], 1, r"tokens must be \[B, S\]"),
        ([[1, 2]], [2, 2], 1, r"lengths \[B\]"),
        (np.zeros((0, 2), int), [], 1, "tokens must be"),
        ([[1, 2]], [2], 0, "max_new_tokens must be at least 1, got 0"),
        (np.ones((2, 70), int), [3, 65], 1, "prompt of row 1 has 65 tokens; .* at most 64"),
    ],
)
def test_generate_refuses(pair, tokens, lengths, new, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(pair[1], tokens, lengths, max_new_tokens=new)


def test_new_tokens_may_lead_beyond_the_positions(pair):
    prompt = tokens_of((1, 60))
    short = llama.generate(pair[1], prompt, [60], max_new_tokens=4, eos_id=())
    long = llama.generate(pair[1], prompt, [60], max_new_tokens=8, eos_id=())
    np.testing.assert_array_equal(long[:, :4], short)


def test_types_and_sizes_are_checked(pair):
    with pytest.raises(TypeError, match=r"must be an integer, got 2\.5"):
        llama.generate(pair[1], [[1]], [1], max_new_tokens=2.5)
    with pytest.raises(ValueError, match=r"must hold integers of 32 bits, got 1\.5"):
        llama.generate(pair[1], [[1]], [1], max_new_tokens=1, eos_id=[1, 1.5])
    with pytest.raises(TypeError, match="must be integers, got float64"):
        llama.generate(pair[1], [[1.0]], [1], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts of 9 tokens exceed the cache's 8 positions"):
        llama.prefill(pair[1], pair[1].init_cache(1, 8), tokens_of((1, 9)), np.array([9]))


LONGROPE = {
    "type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 2.0],
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_config_defaults():
    config = llama.LlamaConfig.from_dict(CONFIG | {"eos_token_id": [1, 2], "use_cache": False})
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (2, 4, 10000.0)
    assert config.eos_token_id == (1, 2) and config.rope_scaling is None
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; .* llama, mistral, qwen2"),
        ({"model_type": "gemma3"}, "model_type='gemma3' .*; of Gemma 3 the models without images"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised by 'bitsandbytes' .*; give the unquantised model .*, or dequantise it",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised by 'bitsandbytes'"),
        *[
            ({"quantization_config": {"quant_method": q}}, f"by '{q}' .* give the unquantised")
            for q in ("gptq", "awq", "fp8", "compressed-tensors")
        ],
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        (
            {"rope_scaling": {"type": "proportional"}},
            "rope_type='proportional' is not supported; known are default, linear, dynamic",
        ),
        ({"rope_scaling": {"type": "linear"}}, "scaling of rotary embeddings lacks factor"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "lacks high_freq_factor, low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "lacks original_max_position_embeddings",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "must be at most 1, got 1.5"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported for LlamaForCausalLM",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.8}, "got 4 of which 3 rotate"),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            "long_factor must have a number for each of the 2 rotary frequencies, got 1",
        ),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0, "x"]}}, "short_factor must be a pos"),
        ({"rope_scaling": LONGROPE | {"short_factor": 2}}, "short_factor must be a list of numb"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters by kind of layer are not supported",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["global"]},
            "layer_types must hold full_attention or sliding_attention for each of the 1 layers",
        ),
        ({"model_type": "gemma2", "layer_types": [[]]}, r"layer_types must be a list .*\[\[\]\]"),
        ({"model_type": "gemma2", "sliding_window_pattern": 0}, "sliding_window_pattern must be a"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "1"},
            "max_window_layers must be an integer of at least 0, got '1'",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 1}},
            "rope_parameters by kind of layer must be objects",
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                },
                "rope_theta": 1.0,
            },
            "rope_theta=1.0 and YarnScaling.* give no frequencies: float division by zero",
        ),
        ({"vocab_size": "\x1b" * 999}, r"vocab_size must be a positive integer, got '\\x1b"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive int"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"head_dim": 3}, "head_dim must be even.*3"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({"num_hidden_layers": "1"}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers must be .*, at most 4096, got 11805"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"mlp_bias": "no"}, "mlp_bias must be true or false, got 'no'"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number, got 'big'"),
        (
            {"rope_parameters": ROPE3 | {"high_freq_factor": 1.0}},
            "high_freq_factor=1.0 must exceed",
        ),
        ({"eos_token_id": "end"}, "eos_token_id must be .* got 'end'"),
        (
            {"eos_token_id": [2, 2**31]},
            "eos_token_id must hold integers of 32 bits, got 2147483648",
        ),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a positive integer"),
        ({"rope_scaling": [2.0]}, r"rope_scaling must be an object, got \[2.0\]"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        llama.LlamaConfig.from_dict(CONFIG | changes)


def test_config_without_sizes():
    with pytest.raises(ValueError, match=r"lacks \['hidden_size'\]"):
        llama.LlamaConfig.from_dict({k: v for k, v in CONFIG.items() if k != "hidden_size"})


def test_weights_that_do_not_fit_the_config(tmp_path):
    save_reference(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \['model.layers.2.input_layernorm.weight'"):
        llama.Llama.from_pretrained(tmp_path)
    file.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"has \['model.layers.1.*too many"):
        llama.Llama.from_pretrained(tmp_path)
    file.write_text(json.dumps(values | {"intermediate_size": 47}))
    with pytest.raises(ValueError, match=r"mlp.*has shape .*48.*holds .*47"):
        llama.Llama.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        llama.Llama.from_pretrained(tmp_path.parent)
