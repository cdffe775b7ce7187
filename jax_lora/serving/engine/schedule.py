"""Which requests run, and what each step does for them. Knows no device."""

import collections
import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jax_lora.models.pages import blocks_of
from jax_lora.serving.engine.adapters import AdapterDesk, Waiting
from jax_lora.serving.engine.blocks import Grants, most_blocks
from jax_lora.serving.engine.requests import FinishReason, Request
from jax_lora.serving.engine.shape import StepShape
from jax_lora.serving.engine.step import Inputs, no_work

# So many answers that ended tell how long others get. The least share of `max_tokens` that is
# expected of one: if all at once get longer than that, most rows wait for a while.
_ANSWERS, _LEAST_SHARE = 64, 0.25
# Steps until it is tried again whether a request has room, if no row ends before: counting takes
# some 50 us beside a step of 64 rows.
_PAUSE = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step to launch, and whom its results are for.

    Attributes:
      choosers: the request of each row that chooses a token.
      lanes: each lane's request, where its tokens start in the prompt, and how many there are.
    """

    inputs: Inputs[np.ndarray]
    choosers: dict[int, Request]
    lanes: list[tuple[Request, int, int]]


class Scheduler:
    """Requests that wait and that run, their rows and blocks.

    Requests begin in the order of their arrival, but for those whose adapter is not there yet.

    A row has the blocks of its tokens, and takes the next one when a step needs it. `Grants` says
    who may; others skip the step. A request begins if the blocks of all rows, as they grow and end,
    are expected to fit. It would be safe without that, but where all answers get as long as they
    may, most rows would wait.

    An answer is expected to take the largest share of its `max_tokens` that one of the last
    answers took, and all until there are enough of these. If it has more tokens already, it may
    take all.
    """

    def __init__(self, shape: StepShape, vocabulary: int, desk: AdapterDesk | None) -> None:
        """`shape` is resolved. `desk` is None for a model without LoRA layers."""
        assert shape.blocks is not None
        self._shape, self._vocabulary, self._desk = shape, vocabulary, desk
        self._waiting: dict[str | None, collections.deque[Request]] = {}
        self._rows = list(range(shape.rows))[::-1]
        self._num_blocks = shape.blocks
        self._blocks = list(range(shape.blocks))[::-1]
        self._is_short = False  # whether a row waits for blocks
        self._pause = 0  # steps until blocks are counted again for who waits
        self._shares = collections.deque([1.0] * _ANSWERS, _ANSWERS)
        self.running: dict[int, Request] = {}  # by row, in the order of their begin

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def is_blocked(self) -> bool:
        """Whether nothing but the bank's other users can give an adapter its slot."""
        return self._desk is not None and self._desk.is_blocked

    def requests(self) -> Iterator[Request]:
        """All that have not ended."""
        for queue in self._waiting.values():
            yield from queue
        yield from self.running.values()

    def add(self, request: Request) -> None:
        request.table = np.zeros(blocks_of(request.size, self._shape.block), np.int32)
        self._waiting.setdefault(request.adapter, collections.deque()).append(request)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, whether it waits or runs; nothing where it has ended."""
        if not request.has_ended:
            # Whoever cancels, or asks for a word, does not tell how long answers get.
            is_whole = reason is not FinishReason.cancelled
            if is_whole and request.max_tokens > self._shape.block:
                self._shares.append(len(request.tokens) / request.max_tokens)
            self._leave(request)
            request.end(reason)

    def fail(self, request: Request, reason: str) -> None:
        """The same, without an answer."""
        if not request.has_ended:
            self._leave(request)
            request.fail(reason)

    def fail_waiting(self, adapter: str, reason: str) -> None:
        """Those that wait for an adapter which can't be had."""
        for request in self._waiting.pop(adapter, ()):
            request.fail(reason)

    def admit(self) -> None:
        """Begins what can begin, and has adapters brought for the others."""
        if self._desk is not None and self._desk.has_loads:
            self._desk.drop_idle(self._wanted())
        heads = [(queue[0].arrival, name) for name, queue in self._waiting.items()]
        heapq.heapify(heads)
        is_full, num_fetched = False, 0
        while heads and num_fetched < self._shape.rows:
            arrival, name = heapq.heappop(heads)
            request = self._waiting[name][0]
            is_full = is_full or not self._rows
            if not is_full and self._is_coming(name):
                continue  # hundreds of adapters may be, and it takes long to count blocks
            # Whoever lacks a place keeps all that came later waiting, so that its turn comes.
            is_full = is_full or not self._has_room(request)
            if is_full:
                num_fetched += 1
                if name is not None and self._desk is not None:
                    self._desk.fetch(name, arrival)
            elif self._has_adapter(request):
                self._begin(request)
                if queue := self._waiting.get(name):
                    heapq.heappush(heads, (queue[0].arrival, name))
        if self._desk is not None and self._desk.has_loads:
            self._desk.advance(self._wanted())

    def plan(self) -> Plan | None:
        """The next step; None where there is nothing to do."""
        self._pause = max(self._pause - 1, 0)
        decoding, lanes = self._next_tokens()
        if not lanes and not decoding:
            return None
        ends = [start + count for _, start, count in lanes]
        ends += [len(request.prompt) + request.sent for request in decoding]
        num_lanes, blocks = self._shape.form(len(lanes), max(ends))
        shape = self._shape
        inputs = no_work(shape.rows, num_lanes, shape.chunk, blocks, self._vocabulary)
        choosers: dict[int, Request] = {}
        for request in decoding:
            row, table = request.row, request.table[:blocks]
            inputs.rows.tables[row, : len(table)] = table
            inputs.rows.starts[row] = len(request.prompt) + request.sent - 1
            inputs.rows.counts[row] = 1
            inputs.adapters[row], inputs.sources[row] = request.slot, row
            choosers[row] = request
        for lane, (request, start, count) in enumerate(lanes):
            row, table, request.read = request.row, request.table[:blocks], start + count
            inputs.lanes.tables[lane, : len(table)] = table
            inputs.lanes.starts[lane], inputs.lanes.counts[lane] = start, count
            inputs.adapters[row], inputs.owners[lane] = request.slot, row
            inputs.prompt[lane, :count] = request.prompt[start : request.read]
            following = request.prompt[start + 1 : request.read + 1]
            inputs.targets[lane, : len(following)] = following
            if request.read == len(request.prompt):
                inputs.sources[row] = shape.rows + lane * shape.chunk + count - 1
                choosers[row] = request
        for request in choosers.values():
            _put_choice(inputs, request)
            request.sent += 1
        return Plan(inputs, choosers, lanes)

    # ------------------------------------------------------------------------------------- private

    def _is_coming(self, adapter: str | None) -> bool:
        return adapter is not None and self._desk is not None and self._desk.is_coming(adapter)

    def _has_adapter(self, request: Request) -> bool:
        """Gives the request its adapter, if it is in a slot."""
        if request.adapter is None:
            return True
        assert self._desk is not None
        if (held := self._desk.take(request.adapter, request.arrival)) is None:
            return False
        request.slot, request.lease = held
        return True

    def _has_room(self, request: Request) -> bool:
        """Whether there are blocks for one more."""
        rows = [*self.running.values(), request]
        if sum(len(row.table) for row in rows) <= self._num_blocks:
            return True
        if self._is_short or self._pause:
            return False
        share = max(_LEAST_SHARE, *self._shares)
        if _expected_blocks(rows, share, self._shape) <= self._num_blocks:
            return True
        self._pause = _PAUSE
        return False

    def _begin(self, request: Request) -> None:
        self._unqueue(request)
        request.row = self._rows.pop()
        self.running[request.row] = request

    def _leave(self, request: Request) -> None:
        if request.row < 0:
            self._unqueue(request)
            return
        del self.running[request.row]
        self._rows.append(request.row)
        self._blocks.extend(request.table[: request.held].tolist())
        self._pause = 0

    def _unqueue(self, request: Request) -> None:
        queue = self._waiting[request.adapter]
        queue.remove(request)
        if not queue:
            del self._waiting[request.adapter]

    def _next_tokens(self) -> tuple[list[Request], list[tuple[Request, int, int]]]:
        """Rows that decode in the next step, and chunks of prompts; both have their blocks then."""
        shape, decoding, lanes = self._shape, list[Request](), list[tuple[Request, int, int]]()
        claims = [(len(row.table) - row.held, row.held) for row in self.running.values()]
        grants = Grants(claims, len(self._blocks))
        for order, request in enumerate(self.running.values()):
            size = len(request.prompt)
            if request.sent:
                end = size + request.sent
                if request.remaining and self._grow(request, end, order, grants):
                    decoding.append(request)
                continue
            room = shape.lanes[-1] - len(lanes)
            for start in range(request.read, size, shape.chunk)[:room]:
                end = min(start + shape.chunk, size)
                if not self._grow(request, end, order, grants):
                    break
                lanes.append((request, start, end - start))
        self._is_short = grants.has_refused
        return decoding, lanes

    def _grow(self, request: Request, tokens: int, order: int, grants: Grants) -> bool:
        """Gives a row the blocks of so many tokens, if it may have them."""
        if tokens <= request.held * self._shape.block:
            return True
        count = blocks_of(tokens, self._shape.block) - request.held
        if not grants.take(order, count):
            return False
        for _ in range(count):
            request.table[request.held] = self._blocks.pop()
            request.held += 1
        return True

    def _wanted(self) -> dict[str, Waiting]:
        found = {
            name: Waiting(queue[0].arrival, None)
            for name, queue in self._waiting.items()
            if name is not None
        }
        for request in self.running.values():
            if (name := request.adapter) is not None:
                first, remaining = found.get(name, Waiting(None, None))
                found[name] = Waiting(first, max(remaining or 0, request.remaining))
        return found


def _expected_blocks(rows: Sequence[Request], share: float, shape: StepShape) -> int:
    """The most blocks that rows have at a time, if answers take this share of their `max_tokens`.

    One that has as many tokens already may take them all.
    """
    unread, steps = 0, list[int]()  # chunks of prompts, which are read one after the other
    for request in rows:
        likely = math.ceil(share * request.max_tokens) - request.sent
        # It gives its blocks back when its last token is known, which is a step later.
        steps.append((likely if likely > 0 else request.remaining) + 1)
        if not request.sent:
            unread += -(-(len(request.prompt) - request.read) // shape.chunk)
            steps[-1] += (unread - 1) // shape.lanes[-1]
    tokens = np.array([len(request.prompt) + request.sent - 1 for request in rows])
    sizes = np.array([request.size for request in rows])
    return most_blocks(tokens, np.array(steps), sizes, shape.block)


def _put_choice(inputs: Inputs[np.ndarray], request: Request) -> None:
    row, choice, params = request.row, inputs.choice, request.params
    choice.temperature[row] = params.temperature
    choice.top_p[row] = params.top_p
    if params.top_k is not None:
        choice.top_k[row] = min(params.top_k, choice.top_k[row])
    choice.seeds[row], choice.counts[row] = params.seed, request.sent
