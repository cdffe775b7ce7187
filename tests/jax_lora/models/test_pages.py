"""Keys and values in blocks: the same logits as without a cache, wherever the blocks are."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_lora.llama import Llama, LlamaConfig
from jax_lora.models.pages import Lanes, Pages, blocks_of, lacks_in_place

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
WINDOWS = dataclasses.replace(
    CONFIG,
    sliding_window=3,
    layer_types=("full_attention", "sliding_attention", "full_attention"),
    attn_logit_softcapping=5.0,
)
BLOCK, CHUNK = 4, 3


@pytest.mark.ci
@pytest.mark.parametrize(
    ("config", "scan"), [(CONFIG, True), (CONFIG, False), (WINDOWS, True), (WINDOWS, False)]
)
def test_paged_steps_compute_what_the_whole_model_does(config, scan):
    model = Llama(config, rngs=nnx.Rngs(0), scan=scan)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 14)).astype(np.int32)
    right = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens))
    # The blocks of both rows are mixed, and all others hold NaN.
    pages = Pages.empty(config, 12, BLOCK, jnp.float32)
    pages = dataclasses.replace(pages, keys=pages.keys + jnp.nan, values=pages.values + jnp.nan)
    tables = np.array([[7, 0, 9, 4], [1, 8, 2, 5]], np.int32)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, pages, tokens, rows, lanes):
        model = nnx.merge(graphdef, state)
        kinds = ((rows, 1), (lanes, CHUNK))
        hidden, pages = model.model.paged(tokens, pages, kinds, room=16)
        return model.logits(hidden), pages

    def run(pages, decoded, prompts):
        """`decoded`: (row, position); `prompts`: (row, start, count)."""
        rows = Lanes(tables, np.zeros(2, np.int32), np.zeros(2, np.int32))
        lanes = Lanes(*(np.zeros(shape, np.int32) for shape in ((3, 4), 3, 3)))
        given = np.zeros(2 + 3 * CHUNK, np.int32)
        where = {}
        for row, position in decoded:
            rows.starts[row], rows.counts[row] = position, 1
            given[row] = tokens[row, position]
            where[row] = (row, position)
        for lane, (row, start, count) in enumerate(prompts):
            lanes.tables[lane], lanes.starts[lane], lanes.counts[lane] = tables[row], start, count
            for n in range(count):
                place = 2 + lane * CHUNK + n
                given[place] = tokens[row, start + n]
                where[place] = (row, start + n)
        logits, pages = step(state, pages, given, rows, lanes)
        for place, at in where.items():
            np.testing.assert_allclose(logits[place], right[at], atol=2e-5)
        return pages

    pages = run(pages, [], [(0, 0, 3), (0, 3, 3), (1, 0, 3)])  # two lanes of one prompt
    pages = run(pages, [], [(0, 6, 2), (1, 3, 1)])
    pages = run(pages, [(1, 4)], [(0, 8, 3)])  # one row decodes beside the other's prompt
    for position in range(11, 14):
        pages = run(pages, [(0, position), (1, position - 6)], [])
    # Blocks that are nobody's are as they were.
    kept = np.asarray(pages.values).reshape(3, 12, -1)[:, [3, 6, 10, 11]]
    assert np.isnan(kept).all()


@pytest.mark.ci
@pytest.mark.parametrize("scan", [True, False])
def test_a_step_writes_its_tokens_where_the_blocks_stand(scan):
    """It copies none of them, whether a scan runs the layers or not."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0), scan=scan)
    graphdef, state = nnx.split(model)
    rows = Lanes(np.zeros((5, 4), np.int32), np.zeros(5, np.int32), np.ones(5, np.int32))

    def step(state, pages, tokens):
        return nnx.merge(graphdef, state).model.paged(tokens, pages, ((rows, 1),), room=16)

    pages = Pages.empty(CONFIG, 12, BLOCK, jnp.float32)
    jitted = jax.jit(step, donate_argnames="pages")
    text = jitted.lower(state, pages, jnp.zeros(5, jnp.int32)).compile().as_text()
    shape = re.escape(f"f32[{','.join(map(str, pages.keys.shape))}]")
    assert re.search(rf"= {shape}\S* (scatter|fusion)\(", text)
    assert not re.search(rf"= {shape}\S* (copy|copy-start)\(", text)


@pytest.mark.ci
def test_a_kernel_reads_the_blocks_as_xla_does():
    """Decoding rows of a model with two kinds of layers, one of them of a window."""
    config = dataclasses.replace(
        WINDOWS, head_dim=64, attn_logit_softcapping=None, sliding_window=20
    )
    model = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graphdef, state = nnx.split(model)
    keys = jax.random.split(jax.random.key(0), 2)
    pages = Pages.empty(config, 20, 8, jnp.bfloat16)
    k, v = (jax.random.normal(key, pages.keys.shape, jnp.bfloat16) for key in keys)
    pages = Pages(k, v, pages.blocks)
    tables = np.arange(18, dtype=np.int32).reshape(2, 9)[:, ::-1]
    rows = Lanes(tables, np.array([70, 9], np.int32), np.ones(2, np.int32))

    def step(in_place, state, pages):
        decoder = nnx.merge(graphdef, state).model
        return decoder.paged(jnp.array([3, 5]), pages, ((rows, 1),), room=16, in_place=in_place)

    right, written = jax.jit(functools.partial(step, False))(state, pages)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found, by_kernel = step(True, state, pages)
    np.testing.assert_allclose(np.float32(found), np.float32(right), atol=0.05)
    np.testing.assert_allclose(np.float32(by_kernel.values), np.float32(written.values), atol=0.05)


def test_a_kernel_is_for_some_shapes_on_some_devices(monkeypatch):
    big = dataclasses.replace(CONFIG, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    of = functools.partial(lacks_in_place, big, 64, 32)
    assert of(jnp.bfloat16) == "a Hopper GPU with kernels"
    monkeypatch.setattr("pallas_kernels.dispatch.gpu_capability", lambda: "9.0")
    assert of(jnp.bfloat16) is None and of(jnp.float32) == "keys of float32"
    assert "4 rows of 8 heads" in lacks_in_place(big, 4, 32, jnp.bfloat16)
    capped = dataclasses.replace(big, attn_logit_softcapping=5.0)
    assert lacks_in_place(capped, 64, 32, jnp.bfloat16) == "scores that are capped"
    monkeypatch.setenv("JAX_LORA_DISABLE_KERNELS", "1")
    assert of(jnp.bfloat16) == "a Hopper GPU with kernels"


def test_blocks_of():
    assert [blocks_of(n, 4) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
