"""Who may take blocks of the cache: whatever comes, all end, and no two rows share a block."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import CONFIG

from jax_lora.serving import FinishReason, Generation, SamplingParams, StepShape
from jax_lora.serving.engine.blocks import Grants, is_safe, most_blocks
from jax_lora.serving.engine.requests import Request
from jax_lora.serving.engine.schedule import Scheduler

LONG = dataclasses.replace(CONFIG, max_position_embeddings=1024)
CLAIMS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=5)


def can_all_end(claims, free):
    """Whether there is any order in which each row finds what it needs."""

    def ends(order):
        left = free
        for need, held in order:
            if need > left:
                return False
            left += held
        return True

    return any(ends(order) for order in itertools.permutations(claims))


@given(CLAIMS, st.integers(0, 10))
def test_it_is_safe_if_there_is_an_order_in_which_all_end(claims, free):
    assert is_safe(claims, free) == can_all_end(claims, free)


@given(CLAIMS, st.integers(0, 10), st.integers(0, 20))
def test_a_row_that_begins_leaves_it_safe(claims, free, need):
    if is_safe(claims, free) and need <= free + sum(held for _, held in claims):
        assert is_safe([*claims, (need, 0)], free)


@given(CLAIMS, st.integers(0, 10), st.data())
@settings(deadline=None)
def test_rows_take_blocks_from_a_safe_state_to_a_safe_state(claims, free, data):
    if not is_safe(claims, free):
        return
    grants, refused = Grants(claims, free), []
    for row, (need, held) in enumerate(claims):
        count = data.draw(st.integers(0, need))
        wanted = [*claims[:row], (need - count, held + count), *claims[row + 1 :]]
        if grants.take(row, count):
            assert all(need < other for other in refused)  # those that wait come first
            claims, free = wanted, free - count
            assert free >= 0 and is_safe(claims, free)
        else:
            assert row > 0 or need > min(claims)[0]  # the least one goes on
            assert not is_safe(wanted, free - count) or any(need >= other for other in refused)
            refused.append(need)
        assert grants.has_refused == bool(refused)


ROWS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=5
)


@given(ROWS, st.integers(1, 4))
def test_the_most_blocks_are_those_of_the_worst_step(rows, block):
    tokens, steps, sizes = np.array(rows).T
    worst = max(
        sum(-(-min(n + step, size) // block) for n, end, size in rows if step <= end)
        for step in range(1, max(steps) + 1)
    )
    assert most_blocks(tokens, steps, sizes, block) == worst


class Cache:
    """Plays the device and the loop: who wrote what where, and how far each answer gets."""

    def __init__(self, shape, ends, cancelled):
        self.shape = shape.resolved(LONG)
        self.loop = Scheduler(self.shape, CONFIG.vocab_size, None)
        self.ends, self.cancelled = ends, cancelled
        self.requests, self.written = [], {}
        self.steps = self.waits = 0

    def ask(self, length, max_tokens):
        generation = Generation(lambda: None)
        params = SamplingParams(max_tokens=max_tokens)
        prompt = np.ones(length, np.int32)
        arrival = len(self.requests)
        self.requests.append(
            Request(arrival, prompt, None, params, max_tokens, frozenset(), None, generation)
        )
        self.loop.add(self.requests[-1])

    def run(self):
        before = None
        while True:
            for arrival in self.cancelled.get(self.steps, ()):
                self.loop.end(self.requests[arrival], FinishReason.cancelled)
            running, is_short = {*self.loop.running}, self.loop._is_short
            self.loop.admit()
            if is_short and running:  # nobody gets past those that wait, unless all find room
                promised = sum(len(own.table) for own in self.loop.running.values())
                assert promised <= self.shape.blocks or {*self.loop.running} <= running
            plan = self.loop.plan()
            self.check_blocks()
            if plan is None and before is None:
                return
            if plan is not None:
                self.launch(plan)
            if before is not None:
                self.deliver(before)
            before = plan
            self.steps += 1

    def check_blocks(self):
        rows = [own.table[: own.held].tolist() for own in self.loop.running.values()]
        assert sorted([*itertools.chain(*rows), *self.loop._blocks]) == [*range(self.shape.blocks)]
        claims = [(len(own.table) - own.held, own.held) for own in self.loop.running.values()]
        assert is_safe(claims, len(self.loop._blocks))
        self.waits += self.loop._is_short

    def launch(self, plan):
        """Writes a step's tokens, and reads all that each row should find."""
        spans = [(own, start, start + count) for own, start, count in plan.lanes]
        for row, own in plan.choosers.items():
            if plan.inputs.rows.counts[row]:
                start = plan.inputs.rows.starts[row]
                spans.append((own, start, start + 1))
        for own, start, end in spans:
            for position in range(start, end):
                self.written[self.place(own, position)] = own.arrival, position
        for own, _, end in spans:
            for position in range(end):
                assert self.written[self.place(own, position)] == (own.arrival, position)

    def place(self, own, position):
        assert position < own.held * self.shape.block
        return own.table[position // self.shape.block], position % self.shape.block

    def deliver(self, plan):
        for own in plan.choosers.values():
            if not own.has_ended:
                own.tokens.append(1)
                if len(own.tokens) == min(self.ends[own.arrival], own.max_tokens):
                    self.loop.end(own, FinishReason.stop)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)


def shapes(data):
    block = data.draw(st.integers(1, 4))
    return StepShape(
        rows=data.draw(st.integers(1, 6)),
        max_length=24,
        chunk=data.draw(st.integers(1, 6)),
        lanes=(data.draw(st.integers(1, 3)),),
        block=block,
        blocks=-(-24 // block) + data.draw(st.integers(0, 12)),
    )


@given(SIZES, st.data())
@settings(max_examples=200, deadline=None)
def test_all_requests_end_and_all_blocks_come_back(sizes, data):
    """Whatever they expect of each other, wherever they end, and whoever is cancelled."""
    number = st.integers(0, len(sizes) - 1)
    ends = [data.draw(st.integers(1, 12)) for _ in sizes]
    cancelled = data.draw(st.dictionaries(st.integers(0, 30), st.lists(number, max_size=2)))
    cache = Cache(shapes(data), ends, cancelled)
    if data.draw(st.booleans()):
        cache.loop._shares.extend([0.0] * 64)  # so that many begin
    for size in sizes:
        cache.ask(*size)
    cache.run()
    assert all(own.has_ended for own in cache.requests)
    for own, end in zip(cache.requests, ends):
        is_cancelled = own.generation.result().finish_reason is FinishReason.cancelled
        assert is_cancelled or len(own.tokens) == min(end, own.max_tokens)
    assert sorted(cache.loop._blocks) == [*range(cache.shape.blocks)]
    assert cache.steps <= sum(sum(size) + 1 for size in sizes) + 1  # somebody goes on in each


@given(SIZES, st.data())
@settings(deadline=None)
def test_nobody_waits_where_answers_get_as_long_as_they_may(sizes, data):
    cache = Cache(shapes(data), [12] * len(sizes), {})
    for size in sizes:
        cache.ask(*size)
    cache.run()
    assert cache.waits == 0


def rows_at_once(share):
    """Requests of 8 blocks at most that run beside each other, where there are 24."""
    cache = Cache(StepShape(rows=12, max_length=32, chunk=4, block=4, blocks=24), [1] * 12, {})
    cache.loop._shares.extend([share] * 64)
    for _ in range(12):
        cache.ask(1, 32)
    cache.loop.admit()
    return len(cache.loop.running)


def test_more_begin_where_answers_were_short():
    """At a half, 17 positions are expected of each; at a quarter, which is the least, 9."""
    assert [rows_at_once(share) for share in (1.0, 0.5, 0.25, 0.0)] == [3, 4, 8, 8]


def test_whoever_cancels_or_asks_for_a_word_does_not_tell_how_long_answers_get():
    cache = Cache(StepShape(rows=4, max_length=32, chunk=4, block=4, blocks=32), [2] * 4, {1: [0]})
    for max_tokens in (20, 20, 20, 1):
        cache.ask(1, max_tokens)
    cache.run()
    assert sorted(share for share in cache.loop._shares if share < 1) == [0.1, 0.1]


def test_nobody_begins_while_a_row_waits():
    """Two rows grow until there is but room for one of them to end. The third would be short."""
    cache = Cache(StepShape(rows=3, max_length=24, chunk=4, block=1, blocks=24), [20] * 3, {})
    cache.loop._shares.extend([0.0] * 64)
    cache.ask(2, 20)
    cache.ask(2, 20)
    held = []
    while not cache.loop._is_short:
        cache.loop.admit()
        cache.loop.plan()
        held.append([own.held for own in cache.requests])
    assert held == [[2, 2], [3, 3], [4, 3]]
    cache.ask(1, 1)
    for _ in range(8):
        cache.loop.admit()
        assert len(cache.loop.running) == 2
        assert {*cache.loop.plan().choosers} == {cache.requests[0].row}  # the other keeps its place
    assert cache.requests[1].sent == 2
    cache.loop.end(cache.requests[0], FinishReason.stop)
    cache.loop.admit()
    assert len(cache.loop.running) == 2
    assert {*cache.loop.plan().choosers} == {own.row for own in cache.requests[1:]}


class Quick(Cache):
    """The same, unchecked."""

    def check_blocks(self):
        pass

    def launch(self, plan):
        pass


def short(rng):
    return rng.randint(1, 90)


ANSWERS = {
    "short": lambda rng, n: 1 + int(rng.expovariate(1 / 60)),
    "all lengths": lambda rng, n: rng.randint(1, 896),
    "5 % long": lambda rng, n: 896 if rng.random() < 0.05 else short(rng),
    "10 % long": lambda rng, n: 896 if rng.random() < 0.1 else short(rng),
    "long all at once": lambda rng, n: 896 if n >= 200 else short(rng),
}


def steps_of(answers, *, by_length):
    """Steps until 400 requests are answered; `by_length`: all blocks are taken from the start."""
    rng = random.Random(1)
    sizes = [(rng.randint(32, 128), ANSWERS[answers](rng, n)) for n in range(400)]
    shape = StepShape(max_length=1024, blocks=512)
    cache = Quick(shape, [end for _, end in sizes], {})
    if by_length:
        running = cache.loop.running
        cache.loop._has_room = lambda own: (
            sum(len(other.table) for other in [*running.values(), own]) <= 512
        )
    for length, _ in sizes:
        cache.ask(length, 896)
    cache.run()
    return cache.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "by_length", "now"),
    [
        ("short", 1799, 843),
        ("all lengths", 11946, 7677),
        ("5 % long", 3086, 1567),
        ("10 % long", 3438, 2759),
        ("long all at once", 12197, 19181),
    ],
)
def test_steps_of_the_guide(answers, by_length, now):
    """The table of docs/guides/serving.md."""
    assert steps_of(answers, by_length=False) == now
    assert steps_of(answers, by_length=True) == by_length
