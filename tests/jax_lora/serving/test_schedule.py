"""What each step does for whom: rows, lanes, positions and blocks, without a device."""

import numpy as np
import pytest
from tiny_decoder import CONFIG

from jax_lora.serving import FinishReason, Generation, SamplingParams, StepShape
from jax_lora.serving.engine.requests import Request
from jax_lora.serving.engine.schedule import Scheduler

SHAPE = StepShape(
    rows=3, max_length=32, chunk=4, lanes=(0, 1, 3), contexts=(8, 32), block=4, blocks=12
)


def scheduler(**options):
    shape = StepShape(**{**vars(SHAPE), **options}).resolved(CONFIG)
    return Scheduler(shape, CONFIG.vocab_size, None)


def request(arrival, length, max_tokens=4):
    tokens = np.arange(1, length + 1, dtype=np.int32)
    params = SamplingParams(max_tokens=max_tokens)
    generation = Generation(lambda: None)
    return Request(arrival, tokens, None, params, max_tokens, frozenset(), None, generation)


def step(scheduler):
    scheduler.admit()
    return scheduler.plan()


def test_a_prompt_is_read_in_chunks_and_then_decodes():
    loop = scheduler()
    loop.add(own := request(0, 6, 3))
    first = step(loop).inputs
    assert first.prompt.shape == (3, 4) and first.lanes.counts.tolist() == [4, 2, 0]
    assert first.prompt[:2].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert first.targets[:2].tolist() == [[2, 3, 4, 5], [6, 0, 0, 0]]
    assert first.lanes.starts.tolist() == [0, 4, 0] and first.owners[:2].tolist() == [own.row] * 2
    # The token behind the prompt's last one, which is the second of lane 1.
    assert first.sources[own.row] == 3 + 4 + 1 and first.rows.counts.tolist() == [0, 0, 0]
    assert first.rows.tables.shape == (3, 2)  # eight positions are enough
    for number in (0, 1):
        plan = step(loop)
        assert plan.inputs.prompt.shape == (0, 4) and plan.choosers == {own.row: own}
        assert plan.inputs.rows.starts[own.row] == 6 + number
        assert plan.inputs.sources[own.row] == own.row
        assert plan.inputs.choice.counts[own.row] == 1 + number
    assert plan.inputs.rows.tables.shape == (3, 2)
    assert loop.plan() is None  # all that it may say has been asked for


def test_steps_grow_with_their_requests():
    loop = scheduler()
    loop.add(request(0, 7, 20))
    shapes = [step(loop).inputs for _ in range(4)]
    assert [inputs.prompt.shape[0] for inputs in shapes] == [3, 0, 0, 0]
    assert [inputs.rows.tables.shape[1] for inputs in shapes] == [2, 2, 8, 8]
    loop.add(request(1, 3, 2))
    assert step(loop).inputs.prompt.shape[0] == 1


def test_rows_and_blocks_are_given_back():
    loop = scheduler()
    asked = [request(n, 9, 4) for n in range(5)]  # three blocks each
    for own in asked:
        loop.add(own)
    plan = step(loop)
    assert sorted(loop.running) == [0, 1, 2] and loop.num_waiting == 2
    assert [lane[0] for lane in plan.lanes] == [asked[0]] * 3  # the first one's prompt first
    assert [own.held for own in asked] == [3, 0, 0, 0, 0]  # nothing for what has no lane yet
    step(loop)
    step(loop)
    blocks = np.concatenate([own.table for own in asked[:3]])
    assert len({*blocks.tolist()}) == 9 and blocks.max() < 12
    loop.end(asked[1], FinishReason.cancelled)
    loop.end(asked[1], FinishReason.cancelled)  # once is enough
    loop.end(asked[3], FinishReason.cancelled)  # it waited
    step(loop)
    assert asked[4].row == asked[1].row and loop.num_waiting == 0
    for own in asked:
        loop.end(own, FinishReason.length)
    assert sorted(loop._rows) == [0, 1, 2] and sorted(loop._blocks) == list(range(12))
    assert [own.generation.result().finish_reason for own in asked] == [
        FinishReason.length,
        FinishReason.cancelled,
        FinishReason.length,
        FinishReason.cancelled,
        FinishReason.length,
    ]


def test_a_large_request_is_not_overtaken():
    loop = scheduler()
    small, large, later = request(0, 20, 5), request(1, 28, 4), request(2, 2, 2)
    for own in (small, large, later):
        loop.add(own)
    for _ in range(9):
        step(loop)
        assert [*loop.running.values()] == [
            small
        ]  # six of twelve blocks; the large one takes eight
    loop.end(small, FinishReason.length)
    step(loop)
    assert [*loop.running.values()] == [large, later]


def test_a_request_begins_when_those_before_it_will_have_ended_by_its_growth():
    """They take 13 blocks of 11, but the second takes its last ones when the first has ended."""
    loop = scheduler(blocks=11)
    first, second = request(0, 20, 13), request(1, 1, 20)
    loop.add(first)
    loop.add(second)
    running = []
    for _ in range(9):
        step(loop)
        running.append([*loop.running.values()])
    assert running[0] == [first] and running[-1] == [first, second]


def test_a_request_begins_in_the_step_after_others_end():
    """Six blocks each at most, and four are expected. There are eleven."""
    loop = scheduler(blocks=11)
    loop._shares.extend([0.0] * 64)
    asked = [request(n, 12, 13) for n in range(3)]
    for own in asked:
        loop.add(own)
    step(loop)
    assert [*loop.running.values()] == asked[:2]
    loop.end(asked[0], FinishReason.cancelled)
    step(loop)
    assert [*loop.running.values()] == asked[1:]


def test_an_answer_that_is_longer_than_expected_may_take_all():
    loop = scheduler(max_length=16, contexts=(16,), blocks=6)
    loop._shares.extend([0.5] * 64)
    loop.add(request(0, 8, 8))
    for _ in range(5):
        step(loop)
    loop.add(own := request(1, 8, 8))  # takes 3 blocks until the first one has 4
    loop.admit()
    assert own.row < 0


def test_a_row_takes_a_block_when_its_tokens_need_it():
    loop = scheduler()
    loop.add(own := request(0, 5, 8))
    held = []
    while step(loop) is not None:
        held.append(own.held)
    assert held == [2, 2, 2, 2, 3, 3, 3, 3] and len(loop._blocks) == 9


@pytest.mark.parametrize(("length", "max_tokens", "blocks"), [(1, 1, 1), (4, 1, 1), (4, 2, 2)])
def test_the_last_token_takes_no_room(length, max_tokens, blocks):
    loop = scheduler()
    loop.add(own := request(0, length, max_tokens))
    while step(loop) is not None:
        pass
    assert own.held == len(own.table) == blocks
