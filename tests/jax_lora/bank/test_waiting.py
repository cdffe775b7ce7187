"""`wait=` of `load`, `create` and `publish`: a slot in the time given, in turn, or an error."""

import signal
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import expected, forward, make_adapter, make_bank, tokens

from jax_lora import BankFullError, LoRAConfig
from jax_lora.bank.waiting import SlotQueue

ADAPTER = make_adapter(1, 4)


def load(bank, name, wait):
    bank.load(name, ADAPTER, wait=wait)


def create(bank, name, wait):
    bank.create(name, LoRAConfig(4, 4), rngs=nnx.Rngs(0), wait=wait)


def publish(bank, name, wait):
    _, training = make_bank(slots=1, buckets=(8,))
    training.load("training", ADAPTER)
    bank.publish(name, "training", bank=training, wait=wait)


def while_waiting(bank, work):
    """A thread that does `work` when somebody waits for a slot of the bank."""

    def run():
        while not bank._queue._places:
            time.sleep(0.001)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("fill", [create, publish])
def test_all_that_fills_a_slot_waits_for_one(fill):
    model, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    batch = [bank.batch(["a"])]
    thread = while_waiting(bank, batch.clear)
    fill(bank, "b", 60)
    thread.join()
    assert bank.names == ("b",)
    x = tokens(1)
    right = expected(model, x, [ADAPTER if fill is publish else None])
    assert abs(forward(model, x, bank.batch(["b"])) - right).max() < 1e-5


@pytest.mark.parametrize("fill", [load, create, publish])
def test_the_error_comes_after_the_time_and_nothing_is_changed(fill):
    _, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    bank.pin("a")
    before, usage = [np.array(leaf) for leaf in jax.tree.leaves(bank.state)], bank.usage()
    start = time.monotonic()
    message = r"no slot for 'b': of the 1 .* pinned \('a'\); .*; the load has waited 0.05 s"
    with pytest.raises(BankFullError, match=message):
        fill(bank, "b", 0.05)
    assert time.monotonic() - start >= 0.05
    assert bank.usage() == usage and not bank._queue._places
    for old, new in zip(before, jax.tree.leaves(bank.state), strict=True):
        np.testing.assert_array_equal(old, new)
    for wait, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="wait must be"):
            fill(bank, "b", wait)


def test_a_copy_waits_for_the_end_of_its_old_version():
    """It is of the source as it was at the call, and the source's slot is free again behind it."""
    model, serving = make_bank(slots=1, buckets=(8,))
    _, training = make_bank(slots=1, buckets=(8,))
    training.load("policy", ADAPTER)
    serving.publish("policy", "policy", bank=training)
    newer, newest = make_adapter(2, 4), make_adapter(3, 4)
    training.load("policy", newer, replace=True)
    under_way = [serving.batch(["policy"])]

    def go_on():
        with pytest.raises(BankFullError, match="1 are leased"):
            training.load("policy", newest, replace=True)
        under_way.clear()

    thread = while_waiting(serving, go_on)
    serving.publish("policy", "policy", bank=training, wait=60)
    thread.join()
    training.load("policy", newest, replace=True)
    x = tokens(1)
    right = expected(model, x, [newer])
    assert abs(forward(model, x, serving.batch(["policy"])) - right).max() < 1e-5


def test_a_copy_that_found_no_slot_gives_its_source_back():
    _, bank = make_bank(slots=2, buckets=(8,))
    bank.load("training", ADAPTER)
    bank.load("policy", ADAPTER)
    batch = bank.batch(["policy"])
    with pytest.raises(BankFullError) as error:
        bank.publish("policy", "training", wait=0.02)
    assert bank.usage()[8].leased == ("policy",), error  # while somebody holds the error, too
    del batch


def test_a_load_waits_until_a_batch_ends():
    model, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    batch = [bank.batch(["a"])]
    threading.Timer(0.1, batch.clear).start()
    start = time.monotonic()
    adapter = make_adapter(1, 4)
    bank.load("b", adapter, wait=60)
    assert 0.09 < time.monotonic() - start < 30
    assert bank.names == ("b",)
    x = tokens(1)
    right = expected(model, x, [adapter])
    assert abs(forward(model, x, bank.batch(["b"])) - right).max() < 1e-5


def test_a_load_into_its_own_slot_waits_behind_nobody():
    _, bank = make_bank(slots=2, buckets=(8,))
    bank.load("policy", make_adapter(0, 4))
    bank.load("a", make_adapter(1, 4))
    bank.pin("policy")
    batch = [bank.batch(["a"])]
    thread = threading.Thread(target=load, args=(bank, "b", 60))
    thread.start()
    while not bank._queue._places:
        time.sleep(0.001)
    start = time.monotonic()
    bank.load("policy", ADAPTER, replace=True, wait=60)
    assert time.monotonic() - start < 30 and bank._queue._places
    batch.clear()
    thread.join()
    assert bank.names == ("policy", "b")


def test_nobody_waits_for_what_is_wrong():
    _, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    bank.pin("a")
    start = time.monotonic()
    with pytest.raises(ValueError, match="is loaded; unload it first"):
        bank.load("a", make_adapter(1, 4), wait=60)
    with bank.stepping, pytest.raises(RuntimeError, match="this thread holds"):
        bank.load("b", make_adapter(1, 4), wait=60)
    assert time.monotonic() - start < 30


def test_many_threads_get_a_slot_each_in_turn():
    _, bank = make_bank(slots=1, buckets=(8, 16))
    bank.load("thread -1", make_adapter(0, 4))
    held, errors = [bank.batch(["thread -1"])], []

    def work(n):
        try:
            bank.load(f"thread {n}", make_adapter(n, 4), wait=60)
        except Exception as error:
            errors.append(error)

    threads = []
    for n in range(6):
        threads.append(threading.Thread(target=work, args=(n,)))
        threads[-1].start()
        while len(bank._queue._places) <= n:
            time.sleep(0.001)
    bank.load("other", make_adapter(9, 16), wait=60)  # of another bucket: at once
    assert bank.names == ("thread -1", "other")
    held.clear()
    for thread in threads:
        thread.join(60)
    assert not errors and {*bank.names} == {"thread 5", "other"}
    for n in range(-1, 5):
        with pytest.raises(KeyError, match=f"evicted by the load of 'thread {n + 1}'"):
            bank.batch([f"thread {n}"])


def test_an_interrupted_wait_leaves_no_place_in_the_queue():
    queue = SlotQueue()

    def load():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.run("kind", 60, load)
    assert not queue._places
    queue.run("kind", 60, lambda: None)


def test_a_signal_at_any_point_leaves_no_place_in_the_queue():
    """Else all who come later would wait for one who is gone."""
    queue, random, interrupts = SlotQueue(), np.random.default_rng(0), 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in random.uniform(1e-5, 5e-4, 200):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                while True:
                    queue.run("kind", 60, lambda: None)
            except KeyboardInterrupt:
                interrupts += 1
            assert not queue._places
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 200
