"""The engine's answers: what they are, that they come token by token, and that nothing compiles."""

import concurrent.futures
import contextlib
import queue
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_decoder import (
    CONFIG,
    decoder_adapter,
    letters,
    make_model,
    plain_answer,
    plain_logprobs,
)

from jax_lora import Adapter, AdapterBank, LoRAConfig, LoRAWeights, apply_lora, save_peft
from jax_lora.demo.job import counted_compilations
from jax_lora.llama import Llama, generate
from jax_lora.models.parallel import placing
from jax_lora.serving import (
    Engine,
    EngineBusyError,
    FinishReason,
    RequestError,
    SamplingParams,
    StepShape,
)

# One shape, so that a test compiles one step.
SHAPE = StepShape(
    rows=4, max_length=64, chunk=4, lanes=(2,), block=4, blocks=40, prompt_logprobs=True
)
ADAPTERS = {"a": decoder_adapter(1, 4), "b": decoder_adapter(2, 8), "c": decoder_adapter(3, 13)}
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [*range(1, 24)]]
GREEDY = SamplingParams(max_tokens=12)


def prompts_with_adapters():
    return [(prompt, name) for prompt in PROMPTS for name in (None, *ADAPTERS)]


@pytest.fixture(scope="module")
def served():
    """A model, its bank with all adapters, and an engine."""
    model, bank = make_model(slots=3)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    with Engine(model, bank, letters(), shape=SHAPE) as engine:
        engine.warmup()
        yield model, bank, engine


def ask(engine, prompt, adapter=None, **params):
    return engine.submit(prompt, SamplingParams(**params), adapter=adapter).result(60)


@pytest.mark.ci
def test_answers_are_those_of_the_model_without_an_engine(served):
    model, bank, engine = served
    asked = prompts_with_adapters()
    generations = [engine.submit(prompt, GREEDY, adapter=name) for prompt, name in asked]
    said = set()
    for (prompt, name), generation in zip(asked, generations):
        answer = generation.result(60)
        expected = plain_answer(model, bank, name, prompt, 12)
        assert list(answer.tokens) == expected
        ended = expected[-1] == 0
        assert answer.finish_reason == (FinishReason.stop if ended else FinishReason.length)
        right = plain_logprobs(model, bank, name, [*prompt, *expected])[-len(expected) :]
        np.testing.assert_allclose(answer.logprobs, right, atol=1e-5)
        said.add(answer.tokens)
    assert len(said) > len(PROMPTS) * 2  # the adapters say different things


@pytest.mark.ci
def test_two_devices_answer_what_one_does():
    """Heads, MLP, stacks and blocks are divided; nothing compiles behind the warmup."""
    shape = StepShape(rows=4, max_length=64, chunk=4, lanes=(2,), block=4, blocks=40)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    said = []
    for devices in (None, mesh):
        model = Llama(CONFIG, rngs=nnx.Rngs(0))
        if devices is not None:
            with jax.set_mesh(devices):
                place = placing(CONFIG)
            for path, variable in nnx.to_flat_state(nnx.state(model)):
                variable.set_value(place(path, variable.get_value()))
        apply_lora(model, slots=3, buckets=(8, 16))
        bank = AdapterBank(model)
        for name, adapter in ADAPTERS.items():
            bank.load(name, adapter)
        with Engine(model, bank, letters(), shape=shape) as engine:
            engine.warmup()
            with counted_compilations() as compiled:
                asked = [engine.submit(p, GREEDY, adapter=n) for p, n in prompts_with_adapters()]
                said.append([generation.result(60).tokens for generation in asked])
                assert compiled() == 0
    assert said[0] == said[1] and len(set(said[0])) > len(PROMPTS) * 2


@pytest.mark.ci
def test_a_request_is_the_same_to_the_bit_whatever_its_neighbours(served):
    _, _, engine = served
    asked = [
        (prompt, name, SamplingParams(max_tokens=9, temperature=t, top_k=k, seed=3, stop_tokens=()))
        for prompt, name in prompts_with_adapters()
        for t, k in ((0.0, None), (1.3, 20))
    ]
    alone = [engine.submit(p, params, adapter=n).result(60) for p, n, params in asked]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(asked))
        generations = {
            i: engine.submit(asked[i][0], asked[i][2], adapter=asked[i][1]) for i in order
        }
        for i, generation in generations.items():
            assert generation.result(60) == alone[i]  # log-probabilities too


@pytest.mark.ci
def test_steps_without_prompts_where_their_log_probabilities_are_computed(served):
    model, bank, _ = served
    shape = StepShape(rows=2, max_length=16, chunk=4, lanes=(0, 1), block=4, prompt_logprobs=True)
    with Engine(model, bank, shape=shape) as engine:
        found = ask(engine, PROMPTS[0], max_tokens=4, prompt_logprobs=True)
    assert len(found.tokens) == 4 and len(found.prompt_logprobs) == len(PROMPTS[0]) - 1


@pytest.mark.ci
def test_log_probabilities_of_a_prompt(served):
    model, bank, engine = served
    params = SamplingParams(max_tokens=2, prompt_logprobs=True)
    asked = prompts_with_adapters()
    generations = [engine.submit(prompt, params, adapter=name) for prompt, name in asked]
    for (prompt, name), generation in zip(asked, generations):
        right = plain_logprobs(model, bank, name, prompt)
        np.testing.assert_allclose(generation.result(60).prompt_logprobs, right, atol=1e-5)
    assert ask(engine, PROMPTS[0]).prompt_logprobs is None


@pytest.mark.ci
def test_a_seed_draws_the_same_and_another_one_does_not(served):
    _, _, engine = served
    draws = [
        ask(engine, [7], "b", max_tokens=16, temperature=2.0, seed=seed, stop_tokens=()).tokens
        for seed in (0, 1, 0)
    ]
    assert draws[0] == draws[2] != draws[1]
    assert len({*draws[0]}) > 4


@pytest.mark.ci
def test_text_comes_in_pieces_and_stops(served):
    _, _, engine = served
    whole = ask(engine, "GOOD", "a", max_tokens=10, stop_tokens=())
    assert whole.text == "".join(chr(ord("@") + token) for token in whole.tokens)
    assert len(whole.text) == 10
    generation = engine.submit("GOOD", SamplingParams(max_tokens=10, stop_tokens=()), adapter="a")
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.token for piece in pieces) == whole.tokens
    assert tuple(piece.logprob for piece in pieces) == whole.logprobs

    stop = whole.text[4:6]
    end = whole.text.index(stop)
    answer = ask(engine, "GOOD", "a", max_tokens=10, stop=("xx", stop), stop_tokens=())
    assert answer.text == whole.text[:end]
    assert answer.tokens == whole.tokens[: end + 2]
    assert answer.finish_reason == FinishReason.stop

    first = whole.tokens.index(whole.tokens[5])
    answer = ask(engine, "GOOD", "a", max_tokens=10, stop_tokens=(whole.tokens[5],))
    assert answer.tokens == whole.tokens[: first + 1]
    assert answer.text == whole.text[:first]
    assert answer.finish_reason == FinishReason.stop
    # What may begin a stop text is kept back, and told at the end.
    answer = ask(engine, "GOOD", "a", max_tokens=6, stop=(whole.text[5] + "~",), stop_tokens=())
    assert answer.text == whole.text[:6] and answer.finish_reason == FinishReason.length


@pytest.mark.ci
def test_cancelling(served):
    _, _, engine = served
    params = SamplingParams(max_tokens=60, stop_tokens=())
    running = [engine.submit([n + 1], params, adapter="c") for n in range(8)]
    next(iter(running[0]))
    for generation in running[::2]:
        generation.cancel()
    for n, generation in enumerate(running):
        answer = generation.result(60)
        if n % 2 == 0 and len(answer.tokens) < 60:  # it may have ended before
            assert answer.finish_reason == FinishReason.cancelled
        else:
            assert answer.finish_reason == FinishReason.length and len(answer.tokens) == 60
    running[1].cancel()
    assert len(running[1].result().tokens) == 60


def on_device(adapter):
    modules = {
        name: LoRAWeights(jnp.asarray(w.a), jnp.asarray(w.b), w.scale)
        for name, w in adapter.modules.items()
    }
    return Adapter(adapter.config, modules)


def part(adapter):
    """The adapter in its first module alone."""
    return Adapter(adapter.config, dict(list(adapter.modules.items())[:1]))


def use_engine(engine, monkeypatch):
    """What whoever asks may do."""
    for prompt, name in prompts_with_adapters():
        ask(engine, prompt, name, max_tokens=3)
    ask(engine, [1], "a", max_tokens=3, temperature=1.0, top_k=3, top_p=0.5)
    ask(engine, [1], max_tokens=3, prompt_logprobs=True)
    ask(engine, "GOOD", "a", max_tokens=9, stop=("xx", "A", "B"))
    engine.submit([1]).cancel()
    with monkeypatch.context() as patch, pytest.raises(EngineBusyError):
        patch.setattr(engine, "max_waiting", 0)
        for _ in range(50):
            engine.submit([1], SamplingParams(max_tokens=50, stop_tokens=()))


def use_adapters(bank, engine, arrays, folder):
    """What comes and goes while it serves, from the host, the disk and the device."""
    save_peft(decoder_adapter(9, 5), folder / "files")
    sources = [decoder_adapter(9, 2), decoder_adapter(9, 16), folder / "files", *arrays]
    for source in sources:
        engine.add_adapter("new", source, replace=True)
        ask(engine, [1], "new")
    bank.unload("new")
    ask(engine, [1], "new")
    engine.add_adapter("bad", decoder_adapter(9, 17))
    with pytest.raises(RequestError):
        ask(engine, [1], "bad")
    for name in ("new", "bad"):
        engine.remove_adapter(name)
    for n, adapter in enumerate(arrays):
        bank.load("beside", adapter, replace=n > 0)
        ask(engine, [1], "beside")
    bank.unload("beside")


def use_bank(bank, engine, rngs, folder):
    """What whoever runs it may do."""
    for n, rank in enumerate((3, 12)):
        bank.create("trained", LoRAConfig(rank, rank), rngs=rngs, replace=n > 0)
        bank.publish("published", "trained")
        ask(engine, [1], "published")
        bank.save("published", folder / f"saved {rank}")
        bank.unload("published")
    bank.unload("trained")
    for name in ("a", "b"):  # of which one may have been evicted
        bank.load(name, ADAPTERS[name], replace=True)
    bank.reserve("acme-", {8: 1})
    bank.load("acme-one", decoder_adapter(9, 3))
    for name in ("a", "b", "acme-one"):
        bank.pin(name)
    assert bank.usage()[8].idle == () and bank.usage()[8].free == 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(bank.load, "late", decoder_adapter(9, 6), wait=60)
        time.sleep(0.05)
        assert not waiting.done()
        bank.unpin("b")
        bank.unload("b")
        waiting.result(60)
    bank.unload("late")
    bank.load("b", ADAPTERS["b"])
    bank.save_checkpoint(folder / "checkpoint")
    for name in bank.names:
        bank.unload(name)
    bank.restore_checkpoint(folder / "checkpoint")
    assert bank.usage()[8].pinned == ("a", "acme-one")
    ask(engine, [1], "acme-one")
    bank.unload("acme-one")
    bank.reserve("acme-", {})


@pytest.mark.ci
def test_a_request_ends_by_the_version_with_which_it_began(served):
    """A trainer's bank publishes the next one meanwhile, under the name that requests use."""
    _, bank, engine = served
    _, trainer = make_model(slots=1)
    versions = [decoder_adapter(seed, 12) for seed in (4, 5)]
    asked = {"max_tokens": 60, "stop_tokens": ()}
    right = []
    for version in versions:
        bank.load("alone", version)
        right.append(ask(engine, [7], "alone", **asked).tokens)
        bank.unload("alone")
    trainer.load("training", versions[0])
    bank.publish("policy", "training", bank=trainer)
    running = engine.submit([7], SamplingParams(**asked), adapter="policy")
    assert next(iter(running)).token == right[0][0]
    trainer.load("training", versions[1], replace=True)
    bank.publish("policy", "training", bank=trainer)
    assert ask(engine, [7], "policy", **asked).tokens == right[1]
    assert running.result(60).tokens == right[0]
    assert right[0][1:] != right[1][1:] and {*ADAPTERS} < {*bank.names}
    bank.unload("policy")


@pytest.mark.ci
def test_nothing_compiles_after_the_warmup(served, monkeypatch, tmp_path):
    _, bank, engine = served
    ranks = 1, 7, 8, 11, 16  # of arrays on the device; two are a bucket's own
    arrays = [on_device(decoder_adapter(9, rank)) for rank in ranks]
    arrays += [on_device(part(decoder_adapter(9, rank))) for rank in (6, 8)]
    rngs = nnx.Rngs(7)
    with counted_compilations() as count:
        use_engine(engine, monkeypatch)
        assert count() == 0
        use_adapters(bank, engine, arrays, tmp_path)
        assert count() == 0
        use_bank(bank, engine, rngs, tmp_path)
        assert count() == 0


@pytest.mark.ci
@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least 1 token"),
        ([61], {}, ValueError, r"tokens must lie in \[0, 61\), got 61 to 61"),
        ([1.5], {}, TypeError, r"text or a list of tokens, got \[1.5\]"),
        ([[1]], {}, TypeError, r"text or a list of tokens, got \[\[1\]\]"),
        ([1], {"max_tokens": 64}, ValueError, "1 tokens and max_tokens=64 exceed max_length=64"),
        ([1] * 64, {}, ValueError, "64 tokens and max_tokens=1 exceed max_length=64"),
        ([1], {"adapter": "nobody"}, KeyError, "no adapter 'nobody'; there are 'a', 'b', 'c'"),
        ([1], {"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ([1], {"max_tokens": 1.0}, TypeError, "max_tokens must be an integer, got 1.0"),
        ([1], {"temperature": -1}, ValueError, "temperature must be at least 0, got -1"),
        ([1], {"temperature": float("nan")}, ValueError, "temperature must be at least 0"),
        ([1], {"top_p": 0}, ValueError, r"top_p must lie in \(0, 1\], got 0"),
        ([1], {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ([1], {"seed": 1 << 32}, ValueError, r"seed must be in \[0, 4294967296\)"),
        ([1], {"stop": ("",)}, ValueError, "stop must hold texts that are not empty"),
    ],
)
def test_bad_requests_are_refused(served, prompt, options, error, message):
    adapter = options.pop("adapter", None)
    with pytest.raises(error, match=message):
        served[2].submit(prompt, SamplingParams(**options), adapter=adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"max_length": 257}, "max_length=257 exceeds the model's 256 positions"),
        ({"lanes": (0,)}, r"lanes must have a number above 0, for prompts; got \(0,\)"),
        ({"contexts": (8, 16)}, r"the last of contexts=\(8, 16\) must be max_length=256"),
        ({"blocks": 3}, "blocks=3 of 32 tokens hold no request of max_length=256"),
    ],
)
def test_bad_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepShape(**options).resolved(CONFIG)


def plain_model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def test_an_engine_without_adapters():
    model = plain_model()
    with Engine(model, shape=StepShape(rows=2, max_length=32, lanes=(1,), chunk=8)) as engine:
        generations = [engine.submit([n], SamplingParams(max_tokens=5)) for n in range(1, 4)]
        said = [generation.result(60).tokens for generation in generations]
        with pytest.raises(KeyError, match="no adapter 'a'; there are none"):
            engine.submit([1], adapter="a")
        with pytest.raises(ValueError, match="has no bank, so it takes no adapters"):
            engine.add_adapter("a", ADAPTERS["a"])
        with pytest.raises(ValueError, match="prompt of text needs an engine with a tokenizer"):
            engine.submit("A")
    expected = generate(model, [[1], [2], [3]], [1, 1, 1], max_new_tokens=5, eos_id=())
    for tokens, row in zip(said, expected.tolist()):
        assert list(tokens) == row[: len(tokens)]
        assert len(tokens) == 5 or tokens[-1] == 0


@pytest.mark.ci
def test_answers_do_not_depend_on_the_shapes_of_steps():
    """Nor do those of adapters of mixed ranks, nor does anything compile when shapes take turns."""
    model, bank = make_model(slots=3)
    for name, adapter in ADAPTERS.items():
        bank.load(name, adapter)
    bank.warmup()  # so that the engines compile their steps alone
    said, asked = [], prompts_with_adapters()
    for options in (
        {"lanes": (2,), "contexts": (64,), "chunk": 4, "rows": 3},
        {"lanes": (0, 3), "contexts": (16, 64), "chunk": 8, "rows": 5, "block": 4},
    ):
        shape = StepShape(max_length=64, **options)
        with Engine(model, bank, shape=shape) as engine:
            with counted_compilations() as count:
                engine.warmup()
            assert count() == len(options["lanes"]) * len(options["contexts"])
            with counted_compilations() as count:
                params = SamplingParams(max_tokens=20, stop_tokens=())
                generations = [engine.submit(p, params, adapter=name) for p, name in asked * 2]
                said.append([generation.result(60).tokens for generation in generations])
            assert count() == 0
    assert said[0] == said[1]
    assert said[0][: len(asked)] == said[0][len(asked) :]
    assert len({*said[0]}) > 2 * len(PROMPTS)  # the adapters say different things


@pytest.mark.ci
def test_a_callback_that_fails_ends_its_own_request(served):
    _, _, engine = served

    def fail(piece):
        raise LookupError("gone")

    beside = engine.submit([1, 2], GREEDY)
    with pytest.raises(RequestError, match="taking a token failed: LookupError: gone"):
        engine.submit([1, 2], GREEDY, on_piece=fail).result(60)
    pieces = []
    assert engine.submit([1, 2], GREEDY, on_piece=pieces.append).result(60) == beside.result(60)
    assert tuple(piece.token for piece in pieces) == beside.result().tokens


def test_a_full_queue_is_busy_and_a_closed_engine_says_so():
    engine = Engine(plain_model(), shape=StepShape(rows=1, max_length=32), max_waiting=2)
    engine._run = lambda: None  # nobody works
    generations = [engine.submit([1]) for _ in range(3)]
    with pytest.raises(EngineBusyError, match="3 requests run or wait"):
        engine.submit([1])
    assert not any(generation.done for generation in generations)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit([1])


def test_a_warm_up_ends_where_the_engine_is_closed_meanwhile():
    engine = Engine(plain_model(), shape=StepShape(rows=1, max_length=32))
    closing, ended = threading.Thread(target=engine.close), []

    class Inbox(queue.SimpleQueue):
        def put(self, message):
            if closing.ident is None:
                closing.start()
                closing.join(0.2)  # as far as it comes
            super().put(message)

    def warm_up():
        with contextlib.suppress(RuntimeError):
            engine.warmup()
        ended.append(True)

    engine._inbox, engine._stepper.warm_up = Inbox(), lambda: None
    warming = threading.Thread(target=warm_up, daemon=True)
    warming.start()
    warming.join(10)
    closing.join(10)
    assert ended and not closing.is_alive()


def test_a_warm_up_that_waits_when_the_engine_is_closed_compiles_nothing():
    engine = Engine(plain_model(), shape=StepShape(rows=1, max_length=32))
    closing, compiled = threading.Thread(target=engine.close), []
    engine._stepper.warm_up = lambda: compiled.append(True)

    def close():  # while the loop takes a message
        closing.start()
        while engine.end is None:
            time.sleep(0.001)

    engine._inbox.put(close)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.warmup()
    closing.join(10)
    assert not compiled and not closing.is_alive()


def test_a_device_that_fails_ends_all_requests():
    engine = Engine(plain_model(), shape=StepShape(rows=1, max_length=32))
    reason = "out of memory"

    def fail(inputs):
        raise ValueError(reason)

    engine._stepper.run = fail
    with pytest.raises(RequestError, match="the engine has failed: ValueError: out of memory"):
        engine.submit([1]).result(60)
    engine._thread.join()
    with pytest.raises(RuntimeError, match="the engine has failed") as caught:
        engine.submit([1])
    assert isinstance(caught.value.__cause__, ValueError)
    engine.close()


@pytest.mark.ci
def test_blocks_that_held_nan_harm_nobody():
    """A request that fails by NaN leaves them in its blocks, which another one gets."""
    model, bank = make_model()
    poison = decoder_adapter(1, 4)
    for weights in poison.modules.values():
        weights.b[:] = 3e38
    shape = StepShape(rows=2, max_length=32, chunk=4, lanes=(1,), block=8, blocks=4)
    bank.load("poison", poison)
    with Engine(model, bank, shape=shape) as engine:
        right = ask(engine, [*range(1, 9)], max_tokens=8, stop_tokens=())
        beside = engine.submit([*range(1, 9)], SamplingParams(max_tokens=8, stop_tokens=()))
        with pytest.raises(RequestError, match="adapter 'poison' gives logits that are NaN"):
            ask(engine, [*range(1, 17)], "poison", max_tokens=8)
        assert beside.result(60) == right
        assert np.isnan(np.asarray(engine._stepper._pages.values, jnp.float32)).any()
        for _ in range(3):
            assert ask(engine, [*range(1, 9)], max_tokens=8, stop_tokens=()) == right


@pytest.mark.ci
def test_more_run_at_once_where_answers_end_early_and_all_are_as_alone(served):
    """There are blocks for two of whole length. Those that get long wait for each other."""
    model, bank, _ = served
    shape = StepShape(rows=8, max_length=64, chunk=4, lanes=(2,), block=4, blocks=32)
    rng, asked = np.random.default_rng(0), []
    for n in range(72):
        params = SamplingParams(
            max_tokens=60,
            temperature=1.0,
            seed=n,
            stop=(chr(ord("@") + n),) if n % 5 == 4 and n < 60 else (),
            stop_tokens=() if n < 4 else tuple(range(0, 61, 4)),  # four get as long as they may
        )
        asked.append((rng.integers(1, 61, 4).tolist(), params, ("a", "b", None)[n % 3]))
    with Engine(model, bank, letters(), shape=shape) as engine:
        engine.warmup()
        alone = [engine.submit(p, own, adapter=name).result(60) for p, own, name in asked]
        scheduler, seen = engine._scheduler, []

        def look(_):
            seen.append((len(scheduler.running), scheduler._is_short))

        with counted_compilations() as compiled:
            asked = [engine.submit(p, own, adapter=n, on_piece=look) for p, own, n in asked]
            for generation in asked[8::7]:
                generation.cancel()
            answers = [generation.result(60) for generation in asked]
            assert compiled() == 0
        assert max(seen)[0] > 4 and any(is_short for _, is_short in seen)
        for answer, right in zip(answers, alone):
            size = len(answer.tokens)
            assert (answer.tokens, answer.logprobs) == (right.tokens[:size], right.logprobs[:size])
            assert answer == right or answer.finish_reason is FinishReason.cancelled
        assert sorted(scheduler._blocks) == [*range(32)]
