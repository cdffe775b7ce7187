"""The engine's adapters without a model that says anything: who has a slot, and for how long."""

import queue
import threading

import numpy as np
import pytest
from tiny import make_adapter, make_bank

from jax_lora import Adapter, FullModule
from jax_lora.serving import AdapterLimits
from jax_lora.serving.engine.adapters import AdapterDesk, Waiting


class Desk:
    """A desk over one slot of each bucket, or another bank, and what its loop would do."""

    def __init__(self, bank=None):
        self.bank = bank or make_bank(slots=1)[1]
        self.messages, self.failed = queue.SimpleQueue(), []
        fail = lambda name, reason: self.failed.append((name, reason))  # noqa: E731
        self.desk = AdapterDesk(self.bank, AdapterLimits(), self.messages.put, fail)
        for n, name in enumerate("abc"):
            self.desk.add(name, make_adapter(n, 4), replace=False)

    def pump(self, wanted, messages=1):
        for _ in range(messages):
            self.messages.get(timeout=30)()
        self.desk.drop_idle(wanted)
        self.desk.advance(wanted)

    def bring(self, name, arrival):
        """The adapter for a request, once it is there."""
        assert self.desk.take(name, arrival) is None
        wanted = {name: Waiting(arrival, None)}
        self.pump(wanted)  # read
        self.pump(wanted)  # uploaded
        return self.desk.take(name, arrival)

    def leased(self):
        return self.bank.usage()[8].leased


@pytest.fixture
def desk():
    desk = Desk()
    yield desk
    desk.desk.close()


def test_an_adapter_keeps_its_slot_until_the_last_request_has_ended(desk):
    first = desk.bring("a", 0)
    second = desk.desk.take("a", 1)
    assert first.slot == second.slot == 0 and desk.leased() == ("a",)
    first.lease.close()
    assert desk.leased() == ("a",)
    second.lease.close()
    assert desk.leased() == () and desk.bank.usage()[8].idle == ("a",)


def test_the_host_keeps_nothing_of_what_was_replaced_or_removed(desk):
    cache = desk.desk._cache
    desk.bring("a", 0).lease.close()
    size = cache._size
    assert size > 0
    adapter = make_adapter(7, 4)
    for name in ("a", "b"):  # two names for one
        desk.desk.add(name, adapter, replace=True)
        desk.pump({})
    assert cache._size == 0
    desk.bring("a", 1).lease.close()
    desk.desk.remove("a")
    desk.pump({})
    assert cache._size == size
    assert desk.desk.take("b", 2) is None  # it is on the host
    desk.desk.remove("b")
    desk.pump({})
    assert cache._size == 0 and not cache._kept
    # One that was removed while it was read.
    assert desk.desk.take("c", 3) is None
    desk.desk.remove("c")
    desk.pump({}, messages=2)
    assert cache._size == 0


def test_those_that_came_before_may_begin_and_those_after_wait(desk):
    running = desk.bring("a", 0)
    wanted = {"a": Waiting(5, 10), "b": Waiting(3, None)}
    assert desk.desk.take("b", 3) is None
    desk.pump(wanted)  # read, and no slot
    assert desk.desk.is_blocked
    early = desk.desk.take("a", 2)
    assert early is not None and desk.desk.take("a", 5) is None
    for held in (running, early):
        assert desk.leased() == ("a",)
        held.lease.close()
    desk.desk.advance(wanted)  # uploads
    assert desk.desk.take("a", 5) is None  # not before the other one is there
    desk.pump(wanted)
    assert desk.desk.take("b", 3) is not None and desk.leased() == ("b",)
    assert desk.desk.take("a", 5) is None and desk.bank.names == ("b",)
    assert desk.failed == []


def test_the_oldest_request_gets_the_slot_first(desk):
    running = desk.bring("a", 0)
    wanted = {"a": Waiting(None, 10), "b": Waiting(9, None), "c": Waiting(4, None)}
    assert desk.desk.take("b", 9) is None and desk.desk.take("c", 4) is None
    desk.pump(wanted, messages=2)
    running.lease.close()
    wanted["a"] = Waiting(None, None)
    desk.desk.advance(wanted)
    desk.pump(wanted)
    assert desk.desk.take("b", 9) is None
    assert desk.desk.take("c", 4) is not None and desk.leased() == ("c",)


def test_what_nobody_wants_any_more_gives_back_its_slot(desk):
    assert desk.desk.take("a", 0) is None
    wanted = {"a": Waiting(0, None)}
    desk.pump(wanted)
    desk.messages.get(timeout=30)()
    assert desk.leased() == ("a",)  # kept for the request
    desk.desk.drop_idle({})
    assert desk.leased() == ()


def test_a_closed_desk_leases_nothing(desk):
    assert desk.desk.take("a", 0) is None
    desk.pump({"a": Waiting(0, None)})
    desk.desk.close()
    desk.messages.get_nowait()()  # the upload was waited for
    assert desk.leased() == ("a",)
    desk.desk.drop_all()
    assert desk.leased() == ()


def test_a_close_before_all_is_read_ends_what_had_not_begun(desk):
    go, read = threading.Event(), desk.desk._read

    def slow(*args):
        go.wait(30)
        return read(*args)

    desk.desk._read = slow
    for n, name in enumerate("abc"):  # of two threads that read
        assert desk.desk.take(name, n) is None
    threading.Timer(0.1, go.set).start()
    desk.desk.close()
    for _ in range(2):
        desk.messages.get_nowait()()
    assert desk.messages.empty() and not desk.failed
    desk.desk.drop_all()
    assert not desk.desk.has_loads


def test_a_slot_that_is_reserved_is_no_room_for_others(desk):
    desk.bank.reserve("b", {8: 1})
    wanted = {"a": Waiting(0, None), "b": Waiting(1, None)}
    assert desk.desk.take("a", 0) is None and desk.desk.take("b", 1) is None
    desk.pump(wanted, messages=2)  # read: b is uploaded, though a came first
    desk.pump(wanted)
    held = desk.desk.take("b", 1)
    assert held is not None and desk.leased() == ("b",)
    wanted = {"a": Waiting(0, None), "b": Waiting(None, 5)}
    desk.desk.advance(wanted)
    later = desk.desk.take("b", 2)  # gives way to nobody
    assert later is not None and desk.desk.is_blocked
    desk.bank.reserve("b", {})
    desk.desk.advance(wanted)
    assert desk.desk.take("b", 3) is None
    held.lease.close()
    later.lease.close()
    wanted["b"] = Waiting(3, None)
    desk.desk.advance(wanted)
    desk.pump(wanted)
    assert desk.desk.take("a", 0) is not None


def test_whole_weights_take_turns_in_their_full_slot():
    """Else the upload would be tried again and again, while others begin with the one in it."""
    model, bank = make_bank(slots=2, buckets=(8,), full_slots={"down": 1})
    desk, weight = Desk(bank), np.array(model.down.kernel[...].T)
    full = {"down": FullModule(weight, np.array(model.down.bias[...]))}
    for name in "ab":
        lora = make_adapter(0, 4)
        modules = {module: w for module, w in lora.modules.items() if module != "down"}
        desk.desk.add(name, Adapter(lora.config, modules, full=full), replace=True)
        desk.pump({})
    held = desk.bring("a", 0)
    assert desk.desk.take("b", 1) is None
    wanted = {"a": Waiting(2, 5), "b": Waiting(1, None)}
    desk.pump(wanted)  # read
    assert desk.messages.empty() and desk.desk.is_blocked
    assert desk.desk.take("a", 2) is None
    held.lease.close()
    desk.desk.advance(wanted)
    desk.pump(wanted)
    assert desk.desk.take("b", 1) is not None and not desk.failed
    desk.desk.close()
