"""The LoRA layers and apply_lora: what is covered, what is refused, how a batch reaches them."""

import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from marks import PHASES, spread
from tiny import Mlp, expected, forward, make_adapter, make_bank, tokens

import jax_lora
from jax_lora import (
    Adapter,
    AdapterBank,
    AdapterBatch,
    LoRAConfig,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAWeights,
    apply_lora,
    call_packed,
    left_alone,
    use,
)
from jax_lora.nn import layer as one_layer
from jax_lora.nn import packed as packed_layers
from pallas_kernels import routing

HALF_ULP = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def fill(layer, seed=0):
    """Random stacks and scales; returns them as float64, per stack."""
    rng = np.random.default_rng(seed)
    scales = rng.normal(size=layer.scales.shape).astype(np.float32)
    layer.scales.set_value(jax.device_put(scales))
    filled = []
    for stack in layer.stacks:
        for variable in (stack.lora_a, stack.lora_b):
            value = rng.normal(size=variable.shape) / np.sqrt(variable.shape[-1])
            variable.set_value(jax.device_put(value.astype(variable.dtype)))
        a, b = (np.float64(variable.get_value()) for variable in (stack.lora_a, stack.lora_b))
        filled.append((a, b, np.float64(scales[: stack.slots])))
        scales = scales[stack.slots :]
    return filled


def delta_of(layer, filled, x, indices):
    """float64 LoRA delta `[T, N]` of `x` `[T, H]`; indices `[K, T]` by bucket."""
    delta = np.zeros((len(x), sum(layer.slices)))
    for stack, (a, b, scales) in zip(layer.stacks, filled):
        bucket = sorted({s.bucket for s in layer.stacks}).index(stack.bucket)
        for t, slot in enumerate(indices[bucket]):
            if slot >= 0:
                columns = slice(stack.y_offset, stack.y_offset + b.shape[1])
                delta[t, columns] += scales[slot] * b[slot] @ (a[slot] @ np.float64(x[t]))
    return delta


@jax.jit
def _both(split, x, batch):
    layer = nnx.merge(*split)
    return layer(x), layer(x, batch)


def both(layer, x, batch):
    """Without and with the batch."""
    return _both(nnx.split(layer), x, batch)


def added(layer, x, batch):
    base, got = both(layer, x, batch)
    return got - base


def batch_of(rows, lengths=None, *, slots={8: 3, 16: 3}, phase="decode"):  # noqa: B006
    """A batch of `rows` `[K, B]`, the slot of each row in each bucket."""
    starts = np.cumsum([0, *slots.values()])[:-1, None]
    ids = np.where(np.asarray(rows) < 0, -1, rows + starts).max(axis=0, initial=-1)
    lengths = None if lengths is None else np.asarray(lengths)
    return AdapterBatch(ids.astype(np.int32), lengths, ranges=tuple(slots.items()), phase=phase)


ROWS = np.array([[0, -1, 2, -1, -1], [-1, -1, -1, 1, 0]], np.int32)  # of buckets 8 and 16
IDS = np.array([0, -1, 2, 4, 3], np.int32)


# -------------------------------------------------------------------------------------- LoRADense


def test_without_a_batch_it_is_nnx_linear():
    plain = nnx.Linear(5, 7, rngs=nnx.Rngs(3))
    layer = LoRADense(5, 7, slots=3, rngs=nnx.Rngs(3))
    fill(layer)
    x = tokens(4, features=5)
    np.testing.assert_array_equal(layer(x), plain(x))
    base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer, base), nnx.state(plain))
    assert isinstance(layer, nnx.Linear)
    assert [stack.bucket for stack in layer.stacks] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "lora_dtype"),
    [
        ("float32", None, "float32", None),
        ("bfloat16", None, "bfloat16", None),
        ("float32", "bfloat16", "float32", None),
        ("bfloat16", "float32", "bfloat16", None),
        ("float32", "float16", "float32", "float16"),
        ("float32", None, "float32", "bfloat16"),
    ],
)
def test_delta_equals_float64(phase, x_dtype, dtype, param_dtype, lora_dtype):
    layer = LoRADense(
        33,
        20,
        slots=3,
        buckets=(8, 16),
        use_bias=phase == "decode",
        dtype=dtype and jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        lora_dtype=lora_dtype and jnp.dtype(lora_dtype),
        rngs=nnx.Rngs(0),
    )
    assert layer.stacks[0].lora_a.dtype == (lora_dtype or param_dtype)
    filled = fill(layer)
    x = tokens(5, features=33).astype(jnp.dtype(x_dtype))
    base, got = both(layer, x, batch_of(ROWS, phase=phase))
    assert got.dtype == base.dtype == (dtype or x_dtype)
    delta = delta_of(layer, filled, x.astype(got.dtype), ROWS)
    limit = max(HALF_ULP[str(d)] for d in (got.dtype, lora_dtype or param_dtype))
    np.testing.assert_allclose(
        np.float64(got) - np.float64(base), delta, atol=limit * np.abs(np.float64(got)).max()
    )
    assert np.abs(delta).max() > 0.3
    np.testing.assert_array_equal(got[1], base[1])  # the row without an adapter


@pytest.mark.parametrize("phase", PHASES)
def test_packed_slices_of_unequal_widths(phase):
    layer = LoRADense(9, 12, slots=3, buckets=(8, 16), slices=(7, 1, 4), rngs=nnx.Rngs(0))
    assert [(s.bucket, s.y_offset, s.lora_b.shape[1]) for s in layer.stacks] == [
        (8, 0, 7),
        (8, 7, 1),
        (8, 8, 4),
        (16, 0, 7),
        (16, 7, 1),
        (16, 8, 4),
    ]
    filled = fill(layer)
    x = tokens(5, features=9)
    got = added(layer, x, batch_of(ROWS, phase=phase))
    np.testing.assert_allclose(got, delta_of(layer, filled, x, ROWS), atol=1e-5)


def test_out_sharding_is_a_keyword_of_the_base_layer():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = LoRADense(4, 6, slots=1, buckets=(8,), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
        y = layer(jnp.asarray(tokens(2)), out_sharding=sharding)
    assert y.sharding == sharding


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slices": (3, 4)}, ValueError, r"slices \(3, 4\) must be positive and sum to 6"),
        ({"slices": (6, 0)}, ValueError, "must be positive"),
        ({"slices": ()}, ValueError, "must be positive and sum to 6"),
        ({"buckets": ()}, ValueError, "buckets must be"),
        ({"buckets": (12,)}, ValueError, "multiples of 8"),
        ({"buckets": (16, 8)}, ValueError, "ascending"),
        ({"slots": 0}, ValueError, "bucket 8 must have at least 1 slot, got 0"),
        ({"slots": -1}, ValueError, "at least 1 slot, got -1"),
        ({"slots": 1.5}, TypeError, "slots must be an int"),
        ({"slots": True}, TypeError, "slots must be an int"),
        ({"slots": {8: 1}}, ValueError, r"slots name buckets \[8\], buckets are \(8, 16\)"),
        ({"slots": {8: 1, 16: "2"}}, TypeError, "got '2'"),
        ({"lora_dtype": jnp.uint8}, ValueError, "stacks are float32, bfloat16 or float16"),
    ],
)
def test_layers_that_cannot_be_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LoRADense(4, 6, **{"buckets": (8, 16), **arguments}, rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------- how rows spread over x


@pytest.fixture(scope="module")
def layer():
    layer = LoRADense(5, 6, slots=3, buckets=(8, 16), rngs=nnx.Rngs(0))
    return layer, fill(layer)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("between", [(), (3,), (2, 3)])
def test_rows_of_x(layer, phase, between):
    layer, filled = layer
    x = np.random.default_rng(0).normal(size=(5, *between, 5)).astype(np.float32)
    got = added(layer, x, batch_of(ROWS, phase=phase))
    each = int(np.prod(between))
    delta = delta_of(layer, filled, x.reshape(-1, 5), ROWS.repeat(each, axis=1))
    np.testing.assert_allclose(got, delta.reshape(*x.shape[:-1], 6), atol=1e-5)


@pytest.mark.parametrize("lengths", [[2, 0, 3, 1, 2], [0, 0, 0, 0, 1], [3, 3, 3, 1, 1]])
def test_flat_tokens_with_lengths(layer, lengths):
    layer, filled = layer
    x = tokens(11, features=5)
    rows = np.full((2, 11), -1, np.int32)
    spread = ROWS.repeat(lengths, axis=1)
    rows[:, : spread.shape[1]] = spread  # tokens behind the last row have no adapter
    got = added(layer, x, batch_of(ROWS, lengths, phase="prefill"))
    np.testing.assert_allclose(got, delta_of(layer, filled, x, rows), atol=1e-5)


def test_one_row_and_no_rows(layer):
    layer, filled = layer
    x = tokens(1, features=5)
    one = batch_of(ROWS[:, :1])
    got = layer(x[0], one) - layer(x[0])
    np.testing.assert_allclose(got, delta_of(layer, filled, x, ROWS[:, :1])[0], atol=1e-5)
    none = np.zeros((2, 0), np.int32)
    assert layer(x[:0], batch_of(none)).shape == (0, 6)
    no_lengths = batch_of(none, np.zeros(0, np.int32))
    np.testing.assert_array_equal(layer(x, no_lengths), layer(x))


def test_ids_outside_the_slots_are_no_adapter(layer):
    layer, _ = layer
    x = tokens(3, features=5)
    for ids in ([6, 99, -7], [-(2**31), 2**31 - 1, -1]):
        batch = AdapterBatch(np.array(ids, np.int32), ranges=((8, 3), (16, 3)))
        np.testing.assert_array_equal(layer(x, batch), layer(x))


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        (
            (4, 5),
            None,
            r"a batch of 5 rows takes x of \[5, \.\.\., features\], got \[4, features\]",
        ),
        ((5,), None, "a batch of 5 rows takes x of"),
        ((3, 5, 5), None, r"got \[3, 5, features\]"),
        ((5, 2, 5), [2] * 5, r"takes flat x of \[T, features\], got \[5, 2, features\]"),
    ],
)
def test_x_that_the_rows_do_not_fit_is_refused(layer, shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        layer[0](np.zeros(shape, np.float32), batch_of(ROWS, lengths))


@pytest.mark.parametrize("slots", [{8: 3}, {8: 3, 64: 3}, {8: 2, 16: 3}])
def test_a_batch_of_a_model_with_other_slots_is_refused(layer, slots):
    message = re.escape(f"slots {{8: 3, 16: 3}}, but the batch is of a model with {slots}")
    with pytest.raises(ValueError, match=message):
        layer[0](tokens(5, features=5), batch_of(np.full((len(slots), 5), -1), slots=slots))


def test_lengths_beyond_x(layer):
    """Refused where their values are known; in a compiled function, rows end with x."""
    x = tokens(4, features=5)
    for lengths in ([1, 1, 1, 1, 1], [2**31 - 1] * 5):
        with pytest.raises(ValueError, match=rf"lengths sum to {sum(lengths)}, but x has 4 tokens"):
            layer[0](x, batch_of(ROWS, lengths))
    cut = jax.jit(lambda x, batch: layer[0](x, batch))(x, batch_of(ROWS, [2, 5, 1, 1, 1]))
    right = layer[0](x, batch_of(ROWS, [2, 2, 0, 0, 0]))
    np.testing.assert_allclose(cut, right, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "tokens_of_rows"),
    [
        (np.array([2, 2**31 - 1, 2**31 - 1, 1, 1], np.int32), [2, 298, 0, 0, 0]),
        (np.array([2, -9, 298, -(2**31), 1], np.int32), [2, 0, 298, 0, 0]),
        (np.array([100, 0, 100, 90, 5], np.uint8), [100, 0, 100, 90, 5]),  # their sum is no uint8
    ],
)
def test_no_lengths_give_tokens_another_row(lengths, tokens_of_rows):
    @jax.jit
    def ids(batch):
        return batch.segments((300,)).indices

    want = np.append(np.repeat(IDS, tokens_of_rows), np.full(300 - sum(tokens_of_rows), -1))
    np.testing.assert_array_equal(ids(batch_of(ROWS, lengths)), want)


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match=r"must not be negative, got \[2, -1, 1, 1, 1\]"):
        batch_of(ROWS, [2, -1, 1, 1, 1]).segments((4,))


@pytest.mark.parametrize("adapters", ["a", 0, np.zeros((2, 5), np.int32), ROWS])
def test_other_second_arguments_are_refused_by_name(layer, adapters):
    with pytest.raises(TypeError, match="LoRADense takes an AdapterBatch as its second argument"):
        layer[0](tokens(5, features=5), adapters)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1],), TypeError, "indices must be an array of integers, got <class 'list'>"),
        ((np.zeros(3),), TypeError, "indices must be an array of integers, got float64"),
        ((np.zeros(3, bool),), TypeError, "got bool"),
        ((np.zeros((2, 3), np.int32),), ValueError, r"must have shape \[B\], got \[2, 3\]"),
        ((IDS, np.zeros(4, np.int32)), ValueError, r"lengths must have shape \[5\], got \[4\]"),
        ((IDS, np.zeros(5)), TypeError, "lengths must be an array of integers, got float64"),
    ],
)
def test_malformed_batches_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        AdapterBatch(*arguments, ranges=((8, 3), (16, 3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"phase": "train"}, ValueError, "phase must be 'decode' or 'prefill', got 'train'"),
        ({"ranges": ((8, 3), (15, 3))}, ValueError, "multiples of 8"),
        ({"ranges": ((16, 3), (8, 3))}, ValueError, "ascending"),
        ({"ranges": ((8, 0),)}, ValueError, r"at least 1 slot, got ranges=\(\(8, 0\),\)"),
        ({"ranges": (8, 16)}, TypeError, "pairs|iterable|unpack"),
        ({"ranges": ((8, 1.5),)}, TypeError, "slots must be a static int, got 1.5"),
        ({"buckets": (8, 16)}, TypeError, r"AdapterBatch takes no buckets= any more: indices are"),
    ],
)
def test_malformed_ranges_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        AdapterBatch(IDS, **{"ranges": ((8, 3), (16, 3)), **options})


# ------------------------------------------------------------------------------------ apply_lora


class Zoo(nnx.Module):
    """One of each, and things that are no linear layers."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(2))
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(6, 6, rngs=rngs)
        self.wide = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.mix = nnx.Einsum("bij,ijk->bk", (2, 4, 6), (6,), rngs=rngs)
        self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)


def paths(model):
    kinds = LoRADense | LoRADenseGeneral | LoRAEinsum
    return {".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, kinds)}


def stack_bytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def test_every_linear_layer_is_converted_in_place():
    model = Zoo(nnx.Rngs(0))
    before = nnx.to_flat_state(nnx.state(model))
    proj, kernel = model.blocks[0].proj, model.blocks[0].proj.kernel
    nbytes = apply_lora(model, slots=2, buckets=(8, 16))
    assert paths(model) == {
        "head",
        *(f"blocks.{n}.{name}" for n in range(2) for name in ("proj", "wide", "mix")),
    }
    assert model.blocks[0].proj is proj and proj.kernel is kernel and type(proj) is LoRADense
    after = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in before:
        np.testing.assert_array_equal(after[path][...], variable[...])
    new = {path for path in after if "stacks" in path or path[-1] == "scales"}
    assert len(after) == len(before) + len(new)
    assert not any(np.asarray(after[path][...]).any() for path in new)
    per_slot = 2 * (4 * (12 + 14 + 14)) + 2 * 9  # bytes per slot and rank; the head is bfloat16
    assert nbytes == stack_bytes(model) == 2 * (8 + 16) * per_slot
    assert model.head.stacks[0].lora_a.dtype == jnp.bfloat16
    assert isinstance(model.norm, nnx.LayerNorm) and type(model.blocks[0].conv) is nnx.Conv


@pytest.mark.parametrize(
    ("target", "matched"),
    [
        ("proj", {"blocks.0.proj", "blocks.1.proj"}),
        ("blocks.0.proj", {"blocks.0.proj"}),
        ("0.proj", {"blocks.0.proj"}),
        (["head", "mix"], {"head", "blocks.0.mix", "blocks.1.mix"}),
        ("blocks.1.(proj|wide)", {"blocks.1.proj", "blocks.1.wide"}),
        ("blocks.1.(proj|conv)", {"blocks.1.proj"}),  # a convolution stays as it is
        (r"blocks\.\d\.wide", {"blocks.0.wide", "blocks.1.wide"}),
        (
            ("proj|wide", "head"),
            {f"blocks.{n}.{x}" for n in (0, 1) for x in ("proj", "wide")} | {"head"},
        ),
    ],
)
def test_target_matches_ends_of_paths(target, matched):
    model = Zoo(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), target=target)
    assert paths(model) == matched


def test_what_apply_lora_left_alone():
    model = Zoo(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), target="proj|head")
    others = {"wide": "LinearGeneral", "mix": "Einsum", "conv": "Conv"}
    blocks = {f"blocks.{n}.{name}": kind for n in range(2) for name, kind in others.items()}
    assert left_alone(model) == {"embed": "Embed", **blocks}


def stacked():
    def make(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    class Model(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            make_all = nnx.vmap(make, out_axes=1)
            self.layers = make_all(jax.random.split(jax.random.key(0), 3))

    return Model()


class Mixer(nnx.Module):
    def __init__(self, layer):
        self.ok, self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), layer


def einsum(equation, shape):
    return Mixer(nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)))


def integers():
    return Mixer(nnx.Linear(4, 4, param_dtype=jnp.float16, dtype=jnp.float16, rngs=nnx.Rngs(0)))


REFUSED = {
    "none matches": (Zoo, {"target": "rpoj"}, ValueError, "target='rpoj'; linear layers: blocks.0"),
    "part of a name": (Zoo, {"target": "roj"}, ValueError, "no layer matches"),
    "no targets": (Zoo, {"target": []}, ValueError, r"no layer matches target=\[\]"),
    "target's type": (Zoo, {"target": 5}, TypeError, "target=5 must be a regular expression"),
    "targets' type": (Zoo, {"target": ["proj", 5]}, TypeError, r"', 5\] must be a regular"),
    "no expression": (Zoo, {"target": "(proj"}, ValueError, "is no regular expression"),
    "convolution": (Zoo, {"target": ["proj", "conv"]}, TypeError, r"conv is a Conv; LoRA covers"),
    "norm": (Zoo, {"target": "norm"}, TypeError, "norm is a LayerNorm"),
    "slots": (Zoo, {"slots": 0}, ValueError, "at least 1 slot"),
    "buckets": (Zoo, {"buckets": (10,)}, ValueError, "multiples of 8"),
    "dtype": (Zoo, {"dtype": jnp.int32}, ValueError, "stacks are float32, bfloat16 or float16"),
    "stacked along the second axis": (
        lambda _: stacked(),
        {},
        ValueError,
        r"layers: kernel \[4, 3, 4\] should be \[4, 4\]; of layers stacked for a scan, the axes",
    ),
    "batch axis": (
        lambda rngs: Mixer(nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs)),
        {},
        ValueError,
        r"layer: LoRA does not cover batch_axis, got \{0: 2\}",
    ),
    "batch label": (
        lambda _: einsum("nta,nab->ntb", (8, 2, 4)),
        {},
        ValueError,
        "product with a matrix, not 'nta,nab->ntb'",
    ),
    "summed token": (lambda _: einsum("nta,ab->nb", (2, 4)), {}, ValueError, "product with a matr"),
    "diagonal": (lambda _: einsum("naa,ab->nb", (2, 4)), {}, ValueError, "product with a matrix"),
    "no output": (lambda _: einsum("nta,ta->n", (3, 2)), {}, ValueError, "product with a matrix"),
    "no model": (lambda _: nnx.LayerNorm(3, rngs=nnx.Rngs(0)), {}, ValueError, "no layer matches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(case):
    make, arguments, error, message = REFUSED[case]
    model = make(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(error, match=message):
        apply_lora(model, **{"slots": 1, "buckets": (8,), **arguments})
    assert nnx.graphdef(model) == before
    assert not paths(model)


def test_an_equation_given_at_the_call_is_refused():
    model = einsum("ta,ab->tb", (4, 4))
    apply_lora(model, slots=1, buckets=(8,))
    with pytest.raises(TypeError, match="LoRAEinsum takes an AdapterBatch as its second argument"):
        model.layer(tokens(2), "ta,ab->tb")


def test_layers_are_converted_once():
    model = Zoo(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,), target="proj")
    with pytest.raises(ValueError, match=r"blocks\.0\.proj has LoRA stacks already"):
        apply_lora(model, slots=1, buckets=(8,), target=["proj", "wide"])
    assert paths(model) == {"blocks.0.proj", "blocks.1.proj"}
    apply_lora(model, slots=1, buckets=(8,))  # the others
    assert len(paths(model)) == 7
    with pytest.raises(ValueError, match="no layer matches"):
        apply_lora(model, slots=1, buckets=(8,))


def test_slots_per_bucket_and_stack_dtype():
    model = Mlp(nnx.Rngs(0))
    nbytes = apply_lora(model, slots={16: 3, 64: 1}, buckets=(16, 64), dtype=jnp.bfloat16)
    assert nbytes == stack_bytes(model) == 2 * (3 * 16 + 64) * (10 + 10)
    assert AdapterBank(model).slots == {16: 3, 64: 1}
    shapes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(model.up.stacks, nnx.LoRAParam))}
    assert shapes == {(3, 16, 4), (3, 6, 16), (1, 64, 4), (1, 6, 64)}


def test_tied_layers_are_one():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = Tied(nnx.Rngs(0))
    assert apply_lora(model, slots=1, buckets=(8,)) == 4 * 8 * 8
    assert model.a is model.b
    bank = AdapterBank(model)
    adapter = make_adapter(1, 4, features={"a": (4, 4)})
    bank.load("a", adapter)
    w = adapter.modules["a"]
    kernel = np.float64(model.a.kernel[...]) + w.scale * (np.float64(w.b) @ np.float64(w.a)).T
    x = tokens(1)
    got = forward(model, x, bank.batch(["a"]))
    np.testing.assert_allclose(got, x @ kernel @ kernel, atol=1e-5)


# ----------------------------------------------------------------- LinearGeneral, Einsum, attention


def converted(layer):
    model = Mixer(layer)
    apply_lora(model, slots=3, buckets=(8, 16), target="layer")
    return model.layer, fill(model.layer)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("in_features", "out_features", "axis", "shape", "phase"),
    spread(
        [
            (4, 6, -1, (5, 4)),
            ((2, 3), 4, (-2, -1), (5, 2, 3)),
            (4, (2, 3), -1, (5, 7, 4)),
            ((2, 3), (3, 2), (1, 3), (5, 2, 7, 3)),
            ((3, 3), (4,), (-1, 1), (5, 3, 3)),  # Flax sorts the axes
        ],
        ["decode", "prefill"],
    ),
)
def test_linear_general(phase, in_features, out_features, axis, shape):
    layer, filled = converted(
        nnx.LinearGeneral(in_features, out_features, axis=axis, rngs=nnx.Rngs(0))
    )
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    base, got = both(layer, x, batch_of(ROWS, phase=phase))
    axes = [axis] if isinstance(axis, int) else sorted(a % x.ndim for a in axis)
    flat = np.moveaxis(x, axes, range(-len(axes), 0))
    flat = flat.reshape(-1, int(np.prod(in_features)))
    delta = delta_of(layer, filled, flat, ROWS.repeat(len(flat) // 5, axis=1))
    np.testing.assert_allclose(got - base, delta.reshape(base.shape), atol=1e-5)


EINSUMS = {
    "ta,ab->tb": ((4, 6), (5, 4), ("ta", "tb")),
    "t...a,ab->t...b": ((4, 6), (5, 2, 3, 4), ("txya", "txyb")),
    "...a,ab->...b": ((4, 6), (5, 2, 4), ("txa", "txb")),
    "nta,hab->nthb": ((8, 2, 4), (5, 3, 2), ("nta", "nthb")),
    "nta,hab->nhtb": ((3, 2, 4), (5, 7, 2), ("nta", "nhtb")),
    "nthb,bhd->ntd": ((4, 3, 6), (5, 2, 3, 4), ("nthb", "ntd")),
    "nta,hab->bhtn": ((3, 2, 4), (5, 7, 2), ("nta", "bhtn")),
}


@pytest.mark.ci
@pytest.mark.parametrize(("equation", "phase"), spread(EINSUMS, ["decode", "prefill"]))
def test_einsum(phase, equation):
    kernel_shape, shape, (lhs, out) = EINSUMS[equation]
    layer, filled = converted(nnx.Einsum(equation, kernel_shape, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = added(layer, x, batch_of(ROWS, phase=phase))
    # Row by row, by an einsum with the kernel that the adapter adds.
    kernel = equation.partition("->")[0].partition(",")[2]
    summed = "".join(c for c in kernel if c in lhs)
    kept = "".join(c for c in kernel if c in out)
    size = dict(zip(kernel, kernel_shape))
    row = out.index(lhs[0])
    for n in range(5):
        update = np.zeros(kernel_shape)
        for indices, (a, b, scales) in zip(ROWS, filled):
            if (slot := indices[n]) >= 0:
                matrix = scales[slot] * (b[slot] @ a[slot]).T
                tensor = matrix.reshape([size[c] for c in summed + kept])
                update += np.einsum(f"{summed}{kept}->{kernel}", tensor)
        delta = np.einsum(f"{lhs},{kernel}->{out}", np.float64(x[n : n + 1]), update)
        np.testing.assert_allclose(np.take(got, [n], row), delta, atol=1e-5)


def test_a_bias_of_an_einsum_is_kept():
    layer, _ = converted(nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=nnx.Rngs(0)))
    layer.bias[...] = jnp.asarray(tokens(8))
    base = layer(tokens(5, features=2)[:, None])
    got = layer(tokens(5, features=2)[:, None], batch_of(ROWS))
    np.testing.assert_array_equal(got[1], base[1])


@pytest.mark.parametrize("phase", PHASES)
def test_multi_head_attention(phase):
    """Merged weights compute the same: rows of three adapters, one of them for two layers only."""

    class Model(nnx.Module):
        def __init__(self):
            self.attn = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.attn(x)

    model = Model()
    apply_lora(model, slots=2, buckets=(8, 16))
    assert paths(model) == {f"attn.{name}" for name in ("query", "key", "value", "out")}
    bank = AdapterBank(model)
    every = {f"attn.{name}": (6, 6) for name in ("query", "key", "value", "out")}
    some = {name: every[name] for name in ("attn.query", "attn.out")}
    bank.load("a", make_adapter(1, 3, features=every))
    bank.load("b", make_adapter(2, 12, features=every))
    bank.load("c", make_adapter(3, 8, features=some))
    names = ["a", None, "b", "c", "a"]
    x = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    got = forward(model, x, bank.batch(names, phase=phase))
    for row, name in enumerate(names):
        plain = Model()
        if name is not None:
            nnx.update(plain, bank.merge(name))
        np.testing.assert_allclose(got[row], plain(x[row : row + 1])[0], atol=1e-5)


# --------------------------------------------------------------------- ambient and transformations


@pytest.fixture(scope="module")
def served():
    model, bank = make_bank()
    adapters = {"a": make_adapter(1, 4), "b": make_adapter(2, 12)}
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return model, bank, adapters


X = tokens(3)
NAMES = ["b", None, "a"]


def right(served, names=NAMES, x=X):
    model, _, adapters = served
    return expected(model, x, [adapters.get(name) for name in names])


def test_argument_and_ambient_agree_and_the_argument_wins(served):
    model, bank, _ = served
    one, other = bank.batch(["a"] * 3), bank.batch(["b"] * 3)
    with use(one):
        by_use = model.up(X)
        by_argument = model.up(X, other)
    np.testing.assert_array_equal(by_use, model.up(X, one))
    np.testing.assert_array_equal(by_argument, model.up(X, other))
    assert np.abs(by_use - by_argument).max() > 0.1


def test_use_nests_and_none_switches_off(served):
    model, bank, _ = served
    base = model.up(X)
    one, other = bank.batch(["a"] * 3), bank.batch(["b"] * 3)
    with use(one):
        outer = model.up(X)
        with use(other):
            np.testing.assert_array_equal(model.up(X), model.up(X, other))
            with use(None):
                np.testing.assert_array_equal(model.up(X), base)
        np.testing.assert_array_equal(model.up(X), outer)
    np.testing.assert_array_equal(model.up(X), base)
    with pytest.raises(ZeroDivisionError), use(one):
        raise ZeroDivisionError
    np.testing.assert_array_equal(model.up(X), base)


@pytest.mark.parametrize("batch", ["a", [None], 0, ROWS])
def test_use_refuses_other_types(batch):
    with pytest.raises(TypeError, match="use takes an AdapterBatch, got"), use(batch):
        pass


def test_use_is_of_one_thread(served):
    model, bank, _ = served
    seen = []
    with use(bank.batch(["a"] * 3)):
        thread = threading.Thread(target=lambda: seen.append(model.up(X)))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(seen[0], model.up(X))


def with_jit_of_state(model, bank, batch):
    """A plain jax.jit loop over pure arrays."""
    graphdef, state, rest = nnx.split(model, (nnx.LoRAParam, jax_lora.LoRAScale), ...)
    assert jax.tree.structure(state) == jax.tree.structure(bank.state)

    @jax.jit
    def step(state, rest, x, batch):
        with use(batch):
            return nnx.merge(graphdef, state, rest)(x)

    return step(bank.state, rest, X, batch)


def with_nnx_jit(model, bank, batch):
    @nnx.jit
    def step(model, x, batch):
        with use(batch):
            return model(x)

    return step(model, X, batch)


def with_scan(model, bank, batch):
    """A decode loop: one token of each row per iteration, the batch outside and as a carry."""

    @nnx.jit
    def step(model, xs, batch):
        with use(batch):
            model(xs[0])  # sorts outside of the loop

            def body(batch, x):
                with use(batch):
                    inner = model(x)
                return batch, (model(x), inner)

            return jax.lax.scan(body, batch, xs)[1]

    ambient, carried = step(model, jnp.stack([X + 1, X]), batch)
    np.testing.assert_array_equal(ambient, carried)
    return ambient[1]


def with_vmap(model, bank, batch):
    """vmap over an axis that has nothing to do with rows."""

    @nnx.jit
    def step(model, xs, batch):
        def one(x, batch):
            with use(batch):
                return model(x)

        return jax.vmap(one, in_axes=(0, None))(xs, batch)

    return step(model, jnp.stack([X + 1, X]), batch)[1]


def with_remat(model, bank, batch):
    @nnx.jit
    def step(model, x, batch):
        with use(batch):
            y = nnx.remat(lambda model, x: model(x))(model, x)
            graphdef, state = nnx.split(model)
            again = jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
        return y, again

    y, again = step(model, X, batch)
    np.testing.assert_array_equal(y, again)
    return y


def with_inner_jit(model, bank, batch):
    inner = jax.jit(lambda split, x: nnx.merge(*split)(x))

    @jax.jit
    def step(split, x, batch):
        with use(batch):
            y = inner(split, x)
        with use(None):
            base = inner(split, x)
        return y, base

    y, base = step(nnx.split(model), X, batch)
    np.testing.assert_array_equal(base, forward(model, X))
    y2, _ = step(nnx.split(model), X, batch.with_phase("prefill"))  # a second trace
    np.testing.assert_allclose(y2, y, atol=1e-5)
    np.testing.assert_array_equal(inner(nnx.split(model), X), base)
    return y


def eagerly(model, bank, batch):
    with use(batch):
        return model(X)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("run", "phase"),
    spread(
        [
            eagerly,
            with_jit_of_state,
            with_nnx_jit,
            with_scan,
            with_vmap,
            with_remat,
            with_inner_jit,
        ],
        ["decode", "prefill"],
    ),
)
def test_transformations(served, run, phase):
    model, bank, _ = served
    got = run(model, bank, bank.batch(NAMES, phase=phase))
    np.testing.assert_allclose(got, right(served), atol=1e-5)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_use_around_a_compiled_function_is_refused(served, transform):
    """It would be compiled for this one batch, and go on to serve others with it."""
    model, bank, _ = served
    step = transform(functools.partial(lambda model, x: model(x), model))
    base = step(X)  # without a batch it is the base model
    with (
        pytest.raises(RuntimeError, match="use was entered outside of the function"),
        use(bank.batch(NAMES)),
    ):
        step(X)
    np.testing.assert_array_equal(step(X), base)


@pytest.mark.ci
def test_use_around_transformations_that_do_not_compile(served):
    model, bank, _ = served
    batch = bank.batch(NAMES)
    with use(batch):
        vmapped = jax.vmap(model)(X[None])[0]
        gradient = jax.grad(lambda x: model(x).sum())(X)
    np.testing.assert_allclose(vmapped, right(served), atol=1e-5)

    def loss(x):
        with use(batch):
            return model(x).sum()

    np.testing.assert_array_equal(gradient, jax.grad(loss)(X))
    assert len(batch._segments) <= 2  # not one per trace that there ever was


def test_one_sort_serves_all_layers(served, monkeypatch):
    model, bank, _ = served
    graphdef, state = nnx.split(model)
    make, sorts = routing._make, []

    def counted(*args):
        sorts.append(args)
        return make(*args)

    def step(state, x, batch):
        with use(batch):
            return nnx.merge(graphdef, state)(x)

    monkeypatch.setattr(routing, "_make", counted)
    jax.make_jaxpr(step)(state, X, bank.batch(NAMES, phase="prefill"))
    assert len(sorts) == 2  # one per bucket, in a model of two layers


def test_grad_of_a_batch_argument(served):
    """The batch's integers have no gradients; its place among the arguments costs nothing."""
    model, bank, _ = served

    def loss(x, batch):
        with use(batch):
            return (model(x) ** 2).sum()

    batch = bank.batch(NAMES)
    got = jax.jit(jax.grad(loss))(jnp.asarray(X), batch)
    step = 1e-3
    for index in ((0, 1), (1, 2), (2, 3)):
        moved = np.float64(X)
        moved[index] += step
        up = (right(served, x=moved) ** 2).sum()
        moved[index] -= 2 * step
        down = (right(served, x=moved) ** 2).sum()
        np.testing.assert_allclose(got[index], (up - down) / (2 * step), rtol=1e-3)


class TestCallPacked:
    """Projections of one input: the same outputs as one by one, by one op in a decode step."""

    widths = (6, 2, 4)

    def layers(self):
        rngs, lora = nnx.Rngs(0), {"slots": 2, "buckets": (8, 16)}
        first = LoRADense(4, self.widths[0], **lora, rngs=rngs)
        plain = nnx.Linear(4, self.widths[1], rngs=rngs)
        sliced = LoRADense(4, self.widths[2], slices=(1, 3), **lora, rngs=rngs)
        fill(first), fill(sliced, 1)
        return first, plain, sliced

    @pytest.mark.parametrize(("phase", "ops"), [("decode", 1), ("prefill", 2)])
    def test_equals_each_layer_alone(self, phase, ops, monkeypatch):
        layers, x = self.layers(), jnp.asarray(tokens(5)).reshape(5, 1, 4)
        indices = np.array([[0, -1, 1, -1, -1], [-1, 0, -1, 1, -1]], np.int32)
        with use(batch_of(indices, slots={8: 2, 16: 2}, phase=phase)):
            alone = [layer(x) for layer in layers]
            op, calls = packed_layers.add_in_step, []

            def counted(*args, **options):
                calls.append(args)
                return op(*args, **options)

            for module in (packed_layers, one_layer):
                monkeypatch.setattr(module, "add_in_step", counted)
            packed = call_packed(layers, x)
        assert len(calls) == ops
        for got, wanted, width in zip(packed, alone, self.widths):
            assert got.shape == (5, 1, width)
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
        assert not np.allclose(alone[0], layers[0](x))

    def test_without_a_batch_each_layer_is_called(self):
        layers, x = self.layers(), jnp.asarray(tokens(3))
        for got, layer in zip(call_packed(layers, x), layers):
            np.testing.assert_array_equal(got, layer(x))

    def test_layers_of_other_slots_than_the_batch(self):
        layers = [LoRADense(4, 6, slots=n, buckets=(16,), rngs=nnx.Rngs(0)) for n in (2, 4)]
        with (
            use(batch_of([[0, 1, -1]], slots={16: 2})),
            pytest.raises(ValueError, match=r"slots \{16: 4\}, but the batch is of a model with"),
        ):
            call_packed(layers, jnp.asarray(tokens(3)))

    def test_another_type_of_layer(self):
        with pytest.raises(TypeError, match=r"takes nnx\.Linear layers, got Embed"):
            call_packed([nnx.Embed(2, 2, rngs=nnx.Rngs(0))], jnp.zeros((1, 2)))


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_xla_adds_what_the_kernel_makes(packed):
    """So the kernel has no y to wait for, nor to copy."""
    rngs, half = nnx.Rngs(0), {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    layers = [LoRADense(64, n, slots=2, buckets=(16,), rngs=rngs, **half) for n in (64, 128)]
    graphdef, state = nnx.split(nnx.List(layers))

    def step(state, x, batch):
        layers = nnx.merge(graphdef, state)
        with use(batch):
            return call_packed(layers, x) if packed else [layer(x) for layer in layers]

    batch = batch_of(np.zeros((1, 3), np.int32), slots={16: 2})
    traced = jax.jit(step).trace(state, jnp.zeros((3, 64), jnp.bfloat16), batch)
    module = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("custom_call @mosaic_gpu_v2") == (1 if packed else 2)
    assert "output_operand_alias<" not in module


# ------------------------------------------------------------------------ modules of a user's own


class OwnEinsum(nnx.Module):
    """As Tunix writes it."""

    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(rngs.params.normal(shape))

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class OwnDense(nnx.Module):
    """By dot_general, with a bias; the class says which product it is."""

    einsum_str = "...d,df->...f"

    def __init__(self, rngs):
        self.kernel, self.bias = nnx.Param(rngs.params.normal((8, 6))), nnx.Param(jnp.ones(6))

    def __call__(self, x):
        axes = ((x.ndim - 1,), (0,)), ((), ())
        return jax.lax.dot_general(x, self.kernel[...], axes) + self.bias[...]


class OwnBlock(nnx.Module):
    """As MaxText's: kernels that no attribute gives sizes to."""

    def __init__(self, rngs, wide=12):
        self.up = OwnEinsum("...d,df->...f", (6, wide), rngs)
        self.gate = OwnEinsum("...d,df->...f", (6, wide), rngs)
        self.down = OwnEinsum("...f,fd->...d", (wide, 6), rngs)
        self.scale = nnx.Param(jnp.ones(6))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class OwnBlocks(nnx.Module):
    def __init__(self, axis, make=OwnBlock):
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        self.layers = nnx.vmap(make, out_axes=axes)(nnx.Rngs(0).split(3))
        self.head, self.norm = OwnDense(nnx.Rngs(0)), nnx.Param(jnp.ones(6))


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [(OwnBlock, "layers.up", [6, 3, 12]), (OwnDense, "layers", [8, 3, 6])],
)
def test_own_layers_stacked_along_the_second_axis_are_refused(make, name, shape):
    model = OwnBlocks(1, make)
    before = nnx.graphdef(model)
    found = rf"^{name}: kernel {re.escape(str(shape))} is of layers stacked along axis 1"
    with pytest.raises(ValueError, match=found):
        apply_lora(model, slots=1, buckets=(8,), target=name)
    with pytest.raises(ValueError, match=r"is of layers stacked along axis 1, .* along axis 0"):
        apply_lora(model, slots=1, buckets=(8,))
    assert nnx.graphdef(model) == before
    apply_lora(model, slots=1, buckets=(8,), target="head")  # the others may be as they are
    first = OwnBlocks(0, make)
    apply_lora(first, slots=1, buckets=(8,))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(first.layers, nnx.Param))} == {3}


class OwnModel(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = OwnEinsum("BTD,DNH->BTNH", (6, 2, 4), rngs)
        self.o_proj = OwnEinsum("BTNH,NHD->BTD", (2, 4, 8), rngs)
        self.dense = OwnDense(rngs)
        self.experts = OwnEinsum("ETD,EDF->ETF", (3, 6, 6), rngs)  # one matrix for each expert

    def __call__(self, x):
        return self.dense(self.o_proj(self.q_proj(x)))


@pytest.mark.ci
def test_modules_of_a_users_own_that_are_einsums():
    model, reference = OwnModel(nnx.Rngs(0)), OwnModel(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    np.testing.assert_array_equal(model(x), reference(x))
    apply_lora(model, slots=2, buckets=(8,))
    assert [type(m).__name__ for m in (model.q_proj, model.dense)] == [
        "LoRAOwnEinsum",
        "LoRAOwnDense",
    ]
    assert isinstance(model.q_proj, OwnEinsum) and isinstance(model.q_proj.w, nnx.Param)
    assert left_alone(model) == {"experts": "OwnEinsum"}
    bank = AdapterBank(model)
    sizes = {"q_proj": (6, 8), "o_proj": (8, 8), "dense": (8, 6)}
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = {name: LoRAWeights(normal(4, h), normal(n, 4), 0.5) for name, (h, n) in sizes.items()}
    bank.load("one", Adapter(LoRAConfig(4, alpha=2), weights))
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, x, batch):
        with use(batch):
            return nnx.merge(graphdef, state)(x)

    got = run(state, x, bank.batch([None, "one"]))
    merged = bank.merge("one")
    for name in sizes:
        leaf = "kernel" if name == "dense" else "w"
        getattr(getattr(reference, name), leaf).set_value(merged[name][leaf].get_value())
    np.testing.assert_allclose(got[1], reference(x)[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[0], OwnModel(nnx.Rngs(0))(x)[0])


class Scaled(nnx.Module):
    """With an array and a number that are in no variable."""

    def __init__(self, rngs):
        self.proj = nnx.Linear(6, 8, rngs=rngs)
        self.scale, self.shift = nnx.data(jnp.full(8, 3.0)), nnx.data(1.0)

    def __call__(self, x):
        return self.proj(x) * self.scale + self.shift


def test_models_with_arrays_in_no_variable():
    model, plain = Scaled(nnx.Rngs(0)), Scaled(nnx.Rngs(0))
    apply_lora(model, slots=1, buckets=(8,))
    bank = AdapterBank(model)
    bank.load("one", make_adapter(0, 4, features={"proj": (6, 8)}))
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    got = forward(model, x, bank.batch([None, "one"]))
    np.testing.assert_array_equal(got[0], plain(x)[0])
    nnx.update(plain, bank.merge("one"))
    np.testing.assert_allclose(got[1], plain(x)[1], rtol=1e-5, atol=1e-5)


def test_modules_that_do_not_say_their_product_are_refused_by_name():
    model = OwnModel(nnx.Rngs(0))
    del model.q_proj.einsum_str
    with pytest.raises(TypeError, match=r"q_proj is a OwnEinsum.*an attribute einsum_str"):
        apply_lora(model, target="q_proj")
    with pytest.raises(TypeError, match="experts is a OwnEinsum"):
        apply_lora(model, target="experts")
    with pytest.raises(ValueError, match=r"full_slots\['dense'\] matches dense, a OwnDense"):
        apply_lora(model, target="dense", full_slots={"dense": 1})
