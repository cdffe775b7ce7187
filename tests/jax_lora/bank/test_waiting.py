"""`bank.load(wait=)`: a slot in the time given, in the order of the calls, or an error."""

import threading
import time

import pytest
from tiny import expected, forward, make_adapter, make_bank, tokens

from jax_lora import BankFullError
from jax_lora.bank.waiting import SlotQueue


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


def test_the_error_comes_after_the_time_and_says_it():
    _, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    bank.pin("a")
    start = time.monotonic()
    message = (
        r"of the 1 of bucket 8, 0 are leased .* pinned \('a'\); .*; the load has waited 0.05 s"
    )
    with pytest.raises(BankFullError, match=message):
        bank.load("b", make_adapter(1, 4), wait=0.05)
    assert time.monotonic() - start >= 0.05
    assert bank.names == ("a",) and not bank._queue._queues


def test_nobody_waits_for_what_is_wrong():
    _, bank = make_bank(slots=1, buckets=(8,))
    bank.load("a", make_adapter(0, 4))
    bank.pin("a")
    for wait, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="wait must be"):
            bank.load("b", make_adapter(1, 4), wait=wait)
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
        while sum(map(len, bank._queue._queues.values())) <= n:
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
    assert not queue._queues
    queue.run("kind", 60, lambda: None)
