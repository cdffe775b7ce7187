"""Slots that are kept for a tenant: nobody else takes them, whatever they do."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_adapter, make_bank

from jax_lora import BankFullError
from jax_lora.adapters import LoRAConfig
from jax_lora.bank.slots import Entry, SlotTable
from jax_lora.batch import Lease

CONFIG = LoRAConfig(rank=4, alpha=4)


def load(bank, name, rank=4):
    bank.load(name, make_adapter(0, rank))


def test_a_slot_is_kept_free_for_its_tenant():
    _, bank = make_bank(slots=3, buckets=(8,))
    bank.reserve("acme-", {8: 1})
    assert bank.reservations == {"acme-": {8: 1}}
    for name in ("x", "y", "z"):
        load(bank, name)
    assert bank.names == ("y", "z")  # z took x's place, and not the slot that is free
    use = bank.usage()[8]
    assert (use.slots, use.free, use.reserved, use.room) == (3, 1, 1, 2)
    load(bank, "acme-fr")
    assert bank.names == ("y", "z", "acme-fr") and bank.usage()[8].reserved == 0
    bank.batch(["y", "z"])  # acme-fr is the least recently used, and stays
    for name in ("v", "w"):
        load(bank, name)
    assert bank.names == ("acme-fr", "v", "w")


def test_a_tenant_may_use_more_and_loses_no_more_than_that():
    _, bank = make_bank(slots=3, buckets=(8,))
    bank.reserve("acme-", {8: 1})
    for name in ("acme-a", "acme-b", "acme-c"):
        load(bank, name)
    assert len(bank.names) == 3
    load(bank, "x")
    load(bank, "y")
    assert bank.names == ("acme-c", "x", "y")
    load(bank, "acme-d")  # the least recently used of all that may go is its own
    assert bank.names == ("x", "y", "acme-d")


def test_a_reservation_takes_effect_as_its_tenant_comes():
    _, bank = make_bank(slots=2, buckets=(8,))
    load(bank, "x")
    load(bank, "y")
    bank.reserve("acme-", {8: 2})
    assert bank.names == ("x", "y")
    batch = bank.batch(["x"])
    load(bank, "acme-a")
    assert bank.names == ("x", "acme-a")
    bank.pin("acme-a")
    with pytest.raises(BankFullError, match=r"1 are leased by batches and 1 pinned \('acme-a'\);"):
        load(bank, "acme-b")
    del batch
    load(bank, "acme-b")
    assert bank.names == ("acme-a", "acme-b")
    with pytest.raises(BankFullError, match=r"0 are leased .*, 2 are reserved for others; drop"):
        load(bank, "x")
    bank.reserve("acme-", {})
    assert bank.reservations == {}
    load(bank, "x")
    assert bank.names == ("acme-a", "x")


def test_a_slot_that_a_batch_leases_alone_counts_for_whom_it_was():
    _, bank = make_bank(slots=3, buckets=(8,))
    bank.reserve("acme-", {8: 1})
    load(bank, "x")
    load(bank, "y")
    batch = bank.batch(["x"])
    bank.unload("x")  # its slot is leased still
    with pytest.raises(BankFullError, match="1 are reserved for others"):
        bank.pin("y")
        load(bank, "z")
    load(bank, "acme-a")
    del batch
    load(bank, "z")
    assert {*bank.names} == {"y", "acme-a", "z"}


def test_full_slots_of_a_tenant_stay_too():
    from jax_lora.adapters import FullModule

    adapter = make_adapter(0, 4)
    model, bank = make_bank(slots=2, buckets=(8,), full_slots={"down": 1})
    weight = model.down.kernel[...].T.copy()

    def whole(name):
        full = {"down": FullModule(weight, model.down.bias[...])}
        modules = {n: w for n, w in adapter.modules.items() if n != "down"}
        bank.load(name, type(adapter)(adapter.config, modules, full=full))

    bank.reserve("acme-", {8: 1})
    whole("acme-a")
    with pytest.raises(BankFullError, match="pinned or in reserved slots"):
        whole("x")
    bank.reserve("acme-", {8: 0})
    whole("x")
    assert bank.names == ("x",)


@pytest.mark.parametrize(
    "prefix, slots, error",
    [
        ("acme-b", {8: 1}, "'acme-', and a name may begin with that and with 'acme-b'"),
        ("a", {8: 1}, "take prefixes of which none begins with another"),
        ("beta-", {16: 1}, r"buckets of \[8\] and at least 0 slots of each, got 16: 1"),
        ("beta-", {8: -1}, "got 8: -1"),
        ("beta-", {8: 2}, "2 slots of bucket 8 for 'beta-' and 1 reserved for others exceed its 2"),
        ("", {8: 1}, "must be 1 to 255 characters"),
    ],
)
def test_mistakes_change_nothing(prefix, slots, error):
    _, bank = make_bank(slots=2, buckets=(8,))
    bank.reserve("acme-", {8: 1})
    with pytest.raises(ValueError, match=error):
        bank.reserve(prefix, slots)
    assert bank.reservations == {"acme-": {8: 1}}


@pytest.mark.parametrize("slots", [2, {8: True}, {8: 1.0}, {"8": 1}])
def test_slots_are_integers_by_bucket(slots):
    _, bank = make_bank(slots=2, buckets=(8,))
    with pytest.raises(TypeError, match="slots must map buckets to numbers of slots, got"):
        bank.reserve("acme-", slots)


NAMES = [f"{tenant}{n}" for tenant in ("a-", "b-", "") for n in range(4)]
KEPT = {"a-": 2, "b-": 1}


@given(st.lists(st.tuples(st.sampled_from(["load", "lease", "end", "pin"]), st.integers(0, 11))))
def test_whatever_happens_a_tenant_gets_what_is_kept_for_it(events):
    table, leases = SlotTable({8: 5}), collections.deque()
    for prefix, count in KEPT.items():
        table.reservations.put(prefix, {8: count})

    def held(prefix):
        slots = {e.slot for n, e in table.entries.items() if n.startswith(prefix)}
        return slots | {s for lease, who in leases for _, s in lease.slots if who == prefix}

    def put(name):
        slot, evicted = table.find(8, name, [lease for lease, _ in leases])
        if evicted is not None:
            table.forget(evicted, evicted_by=name)
        table.put(name, Entry(8, slot, CONFIG, frozenset()))
        return evicted

    for kind, n in events:
        name = NAMES[n]
        mine = next((prefix for prefix in KEPT if name.startswith(prefix)), None)
        if kind == "load":
            before = {prefix: len(held(prefix)) for prefix in KEPT}
            room, _ = table.room(name, 8, [lease for lease, _ in leases])
            is_new = name not in table
            try:
                put(name)
            except BankFullError:
                # Only where its own adapters are in the way of what is kept for it.
                assert room == 0
                assert mine is None or before[mine] >= KEPT[mine]
            else:
                assert room > 0 or not is_new
            for prefix in KEPT:
                if prefix != mine:
                    assert len(held(prefix)) >= min(before[prefix], KEPT[prefix])
        elif name in table and kind == "lease":
            entry = table.entries[name]
            leases.append((Lease(frozenset({(8, entry.slot)})), mine))
        elif name in table and kind == "pin":
            table.entries[name].pinned = not table.entries[name].pinned
        elif kind == "end" and leases:
            leases.popleft()
