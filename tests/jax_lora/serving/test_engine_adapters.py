"""Adapters on demand: they come in the background, take turns, and fail for their own requests."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from tiny import make_adapter
from tiny_decoder import decoder_adapter, make_model, plain_answer

from jax_lora import Adapter, LoRAWeights, save_peft
from jax_lora.demo.job import counted_compilations
from jax_lora.serving import AdapterLimits, Engine, RequestError, SamplingParams, StepShape

pytestmark = pytest.mark.ci

SHAPE = StepShape(rows=4, max_length=64, chunk=8, lanes=(2,), block=8)
PROMPT = [3, 1, 4, 1, 5]
QUERIES = {"model.layers.0.self_attn.q_proj": (32, 32)}


class Served:
    """An engine whose adapters have ranks 1 to 16 and take turns in one slot of each bucket."""

    def __init__(self):
        self.model, self.bank = make_model(slots=1)
        self.adapters = {f"rank {rank}": decoder_adapter(rank, rank) for rank in range(1, 16)}
        limits = AdapterLimits(max_bytes=58_000)  # rank 16 has more
        self.engine = Engine(self.model, self.bank, shape=SHAPE, limits=limits)
        self.engine.warmup()

    def ask(self, adapter, max_tokens=6):
        params = SamplingParams(max_tokens=max_tokens, stop_tokens=())
        return self.engine.submit(PROMPT, params, adapter=adapter)

    def right(self, adapter):
        """The answer by the bank alone."""
        self.bank.load("alone", adapter, replace=True)
        tokens = plain_answer(self.model, self.bank, "alone", PROMPT, 6)
        self.bank.unload("alone")
        return tokens


def fill(adapter, value):
    """A copy whose weights are all `value`."""
    modules = {
        name: LoRAWeights(np.full_like(w.a, value), np.full_like(w.b, value), w.scale)
        for name, w in adapter.modules.items()
    }
    return Adapter(adapter.config, modules)


@pytest.fixture(scope="module")
def served():
    served = Served()
    with served.engine:
        yield served


@pytest.fixture(autouse=True)
def no_adapters_are_left(served):
    yield
    for name in served.engine.adapters:
        served.bank.unpin(name) if name in served.bank.names else None
        served.engine.remove_adapter(name)


def said(generation):
    """The tokens up to the first end token, as `plain_answer` has them."""
    tokens = list(generation.result(60).tokens)
    return tokens[: tokens.index(0) + 1] if 0 in tokens else tokens


def test_more_adapters_than_slots_take_turns(served):
    right = {name: served.right(adapter) for name, adapter in served.adapters.items()}
    for name, adapter in served.adapters.items():
        served.engine.add_adapter(name, adapter)
    with counted_compilations() as count:
        asked = [name for _ in range(3) for name in served.adapters]
        generations = [(name, served.ask(name)) for name in asked]
        for name, generation in generations:
            assert said(generation) == right[name]
    assert count() == 0
    assert len({tuple(tokens) for tokens in right.values()}) > 8


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_nobody_starves(served, monkeypatch, seconds):
    """Requests for one adapter come without end; another one gets the slot nevertheless.

    Also where uploads take so long that the first one could take its slot back.
    """
    load = served.bank.load

    def slow_load(*args, **options):
        time.sleep(seconds)
        load(*args, **options)

    monkeypatch.setattr(served.bank, "load", slow_load)
    for name in ("rank 9", "rank 10"):
        served.engine.add_adapter(name, served.adapters[name])
    for _ in range(2):
        served.ask("rank 9").result(60)
    stop = threading.Event()
    running = []

    def go_on(generation=None):
        if not stop.is_set():
            running.append(served.ask("rank 9", max_tokens=20))
            running[-1].on_done(go_on)

    for _ in range(6):
        go_on()
    for _ in range(3):
        before = len(running)
        served.ask("rank 10").result(60)
        # Those that came before run to their end, and then it is the other one's turn.
        assert len(running) - before < 20
    stop.set()
    for generation in running:
        generation.result(60)


def test_an_adapter_that_fails_gives_back_the_turn_that_it_waited_for(served, monkeypatch):
    """The one whose requests were to end for it goes on."""
    for name in ("rank 9", "rank 10"):
        served.engine.add_adapter(name, served.adapters[name])
    served.ask("rank 9").result(60)
    load = served.bank.load

    def failing_load(name, *args, **options):
        if name == "rank 10":
            raise RuntimeError("the device failed")
        load(name, *args, **options)

    monkeypatch.setattr(served.bank, "load", failing_load)
    before = [served.ask("rank 9", max_tokens=20) for _ in range(3)]
    bad = served.ask("rank 10")
    after = [served.ask("rank 9", max_tokens=20) for _ in range(3)]
    with pytest.raises(RequestError, match="adapter 'rank 10': the device failed"):
        bad.result(60)
    for generation in before + after:
        assert len(generation.result(60).tokens) == 20
    assert not served.engine._desk._draining


def test_an_adapter_that_nobody_wants_any_more_gives_back_the_turn_too(served):
    for name in ("rank 9", "rank 10"):
        served.engine.add_adapter(name, served.adapters[name])
    served.ask("rank 9").result(60)
    running = served.ask("rank 9", max_tokens=40)
    given_up = served.ask("rank 10")
    after = served.ask("rank 9", max_tokens=5)
    given_up.cancel()
    assert given_up.result(60).tokens == ()
    assert len(after.result(60).tokens) == 5 and len(running.result(60).tokens) == 40


def test_an_adapter_that_is_removed_while_it_is_loaded_is_gone(served, monkeypatch):
    served.engine.add_adapter("x", served.adapters["rank 1"])
    load = served.bank.load

    def load_and_remove(*args, **options):
        served.engine.remove_adapter("x")
        load(*args, **options)

    monkeypatch.setattr(served.bank, "load", load_and_remove)
    with pytest.raises(RequestError, match="adapter 'x' has left its slot, and the engine has no"):
        served.ask("x").result(60)
    assert served.engine.adapters == () and "x" not in served.bank.names


def test_an_adapter_waits_for_pins_and_others_go_on(served):
    served.bank.load("pinned", decoder_adapter(1, 16))
    served.bank.pin("pinned")
    served.engine.add_adapter("rank 9", served.adapters["rank 9"])
    blocked = served.ask("rank 9")
    assert said(served.ask("pinned")) == plain_answer(
        served.model, served.bank, "pinned", PROMPT, 6
    )
    served.engine.add_adapter("rank 8", served.adapters["rank 8"])
    served.ask("rank 8").result(60)  # of another bucket
    served.ask(None).result(60)
    assert not blocked.done
    served.bank.unpin("pinned")
    assert len(blocked.result(60).tokens) == 6
    assert "pinned" not in served.bank.names


@pytest.mark.parametrize("part", ["read", "upload"])
def test_a_request_runs_on_while_the_load_of_another_adapter_is_held(served, monkeypatch, part):
    bank, begun, let_go = served.bank, threading.Event(), threading.Event()
    right = {name: served.right(served.adapters[name]) for name in ("rank 8", "rank 9")}
    for name in right:
        served.engine.add_adapter(name, served.adapters[name])
    where, what = (bank, "prepare") if part == "read" else (bank._writers[16], "place")
    work = getattr(where, what)

    def held(*args, **options):
        if args[0] != "rank 8":
            begun.set()
            assert let_go.wait(60)
        return work(*args, **options)

    pieces = []
    params = SamplingParams(max_tokens=59, stop_tokens=())
    running = served.engine.submit(PROMPT, params, adapter="rank 8", on_piece=pieces.append)
    next(iter(running))
    monkeypatch.setattr(where, what, held)
    try:
        waiting = served.ask("rank 9")
        assert begun.wait(60)
        before = len(pieces)
        assert len(running.result(60).tokens) == len(pieces) == 59 > before
        assert said(served.ask("rank 8")) == right["rank 8"]  # others begin, too
        assert not waiting.done
    finally:
        let_go.set()
    assert said(waiting) == right["rank 9"]


def test_requests_under_way_keep_the_adapter_that_is_replaced(served, tmp_path):
    old, new = decoder_adapter(1, 4), decoder_adapter(2, 15)  # into another bucket
    right = {"old": served.right(old), "new": served.right(new)}
    save_peft(old, tmp_path / "old")
    save_peft(new, tmp_path / "new")
    served.engine.add_adapter("x", tmp_path / "old")
    running = served.ask("x", max_tokens=50)
    first = next(iter(running))
    served.engine.add_adapter("x", tmp_path / "new", replace=True)
    after = served.ask("x")
    assert said(after) == right["new"]
    served.engine.add_adapter("x", old, replace=True)  # from arrays, within the bucket
    assert said(served.ask("x")) == right["old"]
    whole = running.result(60)
    assert whole.tokens[0] == first.token
    tokens = list(whole.tokens[:6])
    assert (tokens[: tokens.index(0) + 1] if 0 in tokens else tokens) == right["old"]


def test_files_are_read_once(served, tmp_path):
    save_peft(served.adapters["rank 3"], tmp_path)
    served.engine.add_adapter("disk", tmp_path)
    first = said(served.ask("disk"))
    shutil.rmtree(tmp_path)
    served.bank.unload("disk")
    assert said(served.ask("disk")) == first


def broken(path, kind):
    save_peft(decoder_adapter(1, 4), path)
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif kind == "no config":
        config.unlink()
    elif kind == "other rank":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
    elif kind == "nan":
        save_peft(fill(decoder_adapter(1, 4), np.nan), path)
    elif kind == "too large":
        save_peft(decoder_adapter(1, 16), path)
    elif kind == "no bucket":
        save_peft(make_adapter(1, 17, features=QUERIES), path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "adapter 'bad': .*adapter_model.safetensors"),
        ("no config", "adapter 'bad': .*adapter_config.json"),
        ("other rank", "the config says rank 5 but lora_A is"),
        ("nan", "NaN or infinite weights in lora_A"),
        ("too large", "59392 bytes of weights; max_bytes=58000"),
        ("no bucket", "has rank 17 and needs bucket 32"),
    ],
)
def test_a_broken_adapter_fails_its_own_requests(served, tmp_path, kind, message):
    served.engine.add_adapter("bad", broken(tmp_path / "bad", kind))
    served.engine.add_adapter("rank 2", served.adapters["rank 2"])
    generations = [served.ask(name) for name in ("rank 2", "bad", None, "bad", "rank 2")]
    for generation in (generations[1], generations[3]):
        with pytest.raises(RequestError, match=message):
            generation.result(60)
        with pytest.raises(RequestError, match=message):
            list(generation)
    others = [said(generations[n]) for n in (0, 4)]
    right = served.right(served.adapters["rank 2"])
    assert others == [right, right]
    # It may be mended.
    served.engine.add_adapter("bad", served.adapters["rank 2"], replace=True)
    assert said(served.ask("bad")) == right


def test_arrays_are_checked_as_files_are(served):
    for name, adapter, message in (
        ("nan", fill(decoder_adapter(1, 4), np.inf), "has NaN or infinite weights"),
        ("large", decoder_adapter(1, 16), "it has 59392 bytes of weights; max_bytes=58000"),
        ("rank", make_adapter(1, 20, features=QUERIES), "rank 20 and needs bucket 32"),
    ):
        served.engine.add_adapter(name, adapter)
        with pytest.raises(RequestError, match=message):
            served.ask(name).result(60)


def test_names(served):
    served.engine.add_adapter("x", served.adapters["rank 1"])
    with pytest.raises(ValueError, match="there is an adapter 'x'; give replace=True"):
        served.engine.add_adapter("x", served.adapters["rank 1"])
    with pytest.raises(ValueError, match="1 to 255 characters"):
        served.engine.add_adapter("a/b", served.adapters["rank 1"])
    with pytest.raises(TypeError, match="must be a folder or an Adapter, got 3"):
        served.engine.add_adapter("y", 3)
    served.ask("x").result(60)
    served.engine.remove_adapter("x")
    assert served.engine.adapters == () and "x" not in served.bank.names
    with pytest.raises(KeyError, match="no adapter 'x'; there are none"):
        served.engine.remove_adapter("x")
    with pytest.raises(KeyError, match="no adapter 'x'; there are none"):
        served.ask("x")


def test_who_runs_it_sees_the_slots(served):
    bank = served.bank
    assert bank.usage()[16].free == 1
    bank.load("x", decoder_adapter(1, 16))
    use = bank.usage()[16]
    assert (use.slots, use.room, use.free, use.idle) == (1, 1, 0, ("x",))
    with bank.batch(["x"]):
        use = bank.usage()[16]
        assert (use.room, use.leased, use.idle) == (0, ("x",), ())
        bank.unload("x")
        use = bank.usage()[16]  # the batch has it still
        assert (use.room, use.free, use.leased) == (0, 0, ())
    bank.load("x", decoder_adapter(1, 16))
    bank.pin("x")
    use = bank.usage()[16]
    assert (use.room, use.pinned, use.idle) == (0, ("x",), ())


def test_names_that_share_an_adapter_share_what_is_read_of_it(served):
    adapter = served.adapters["rank 5"]
    right = served.right(adapter)
    for n in range(4):
        served.engine.add_adapter(f"x{n}", adapter)
    read = served.engine._desk._read
    names = []
    served.engine._desk._read = lambda name, place: names.append(name) or read(name, place)
    try:
        for n in range(4):
            assert said(served.ask(f"x{n}")) == right
    finally:
        del served.engine._desk._read
    assert len(names) <= 1  # none, where another test has read it


def test_the_host_keeps_so_many_bytes_and_no_more(served):
    cache = served.engine._desk._cache
    before, limit = cache._limit, 3 * served.bank.prepare("", served.adapters["rank 1"]).nbytes
    cache._limit = limit
    try:
        for n in range(1, 7):
            served.engine.add_adapter(f"y{n}", decoder_adapter(100 + n, n))
            served.ask(f"y{n}").result(60)
            assert cache._size <= limit
        sizes = [prepared.nbytes for _, prepared in cache._kept.values()]
        assert len(sizes) == 3 and sum(sizes) == cache._size
    finally:
        cache._limit = before
