"""Which requests run, and what each step does for them. Knows no device."""

import collections
import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np

from jax_lora.models.pages import blocks_of
from jax_lora.serving.engine.adapters import AdapterDesk, Waiting
from jax_lora.serving.engine.requests import FinishReason, Request
from jax_lora.serving.engine.shape import StepShape
from jax_lora.serving.engine.step import Inputs, no_work


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
    """

    def __init__(self, shape: StepShape, vocabulary: int, desk: AdapterDesk | None) -> None:
        """`shape` is resolved. `desk` is None for a model without LoRA layers."""
        assert shape.blocks is not None
        self._shape, self._vocabulary, self._desk = shape, vocabulary, desk
        self._waiting: dict[str | None, collections.deque[Request]] = {}
        self._rows = list(range(shape.rows))[::-1]
        self._blocks = list(range(shape.blocks))[::-1]
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
        self._waiting.setdefault(request.adapter, collections.deque()).append(request)

    def end(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, whether it waits or runs; nothing where it has ended."""
        if not request.has_ended:
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
            count = blocks_of(request.size, self._shape.block)
            # Whoever lacks a place keeps all that came later waiting, so that its turn comes.
            is_full = is_full or not self._rows or count > len(self._blocks)
            if is_full:
                num_fetched += 1
                if name is not None and self._desk is not None:
                    self._desk.fetch(name, arrival)
            elif self._has_adapter(request):
                self._begin(request, count)
                if queue := self._waiting.get(name):
                    heapq.heappush(heads, (queue[0].arrival, name))
        if self._desk is not None and self._desk.has_loads:
            self._desk.advance(self._wanted())

    def plan(self) -> Plan | None:
        """The next step; None where there is nothing to do."""
        lanes = list(self._next_chunks())
        decoding = [r for r in self.running.values() if r.sent and r.remaining]
        if not lanes and not decoding:
            return None
        ends = [start + count for _, start, count in lanes]
        ends += [len(request.prompt) + request.sent for request in decoding]
        num_lanes, blocks = self._shape.form(len(lanes), max(ends))
        shape = self._shape
        inputs = no_work(shape.rows, num_lanes, shape.chunk, blocks, self._vocabulary)
        choosers: dict[int, Request] = {}
        for request in decoding:
            row, table = request.row, request.blocks[:blocks]
            inputs.rows.tables[row, : len(table)] = table
            inputs.rows.starts[row] = len(request.prompt) + request.sent - 1
            inputs.rows.counts[row] = 1
            inputs.adapters[row], inputs.sources[row] = request.slot, row
            choosers[row] = request
        for lane, (request, start, count) in enumerate(lanes):
            row, table, request.read = request.row, request.blocks[:blocks], start + count
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

    def _has_adapter(self, request: Request) -> bool:
        """Gives the request its adapter, if it is in a slot."""
        if request.adapter is None:
            return True
        assert self._desk is not None
        if (held := self._desk.take(request.adapter, request.arrival)) is None:
            return False
        request.slot, request.lease = held
        return True

    def _begin(self, request: Request, count: int) -> None:
        self._unqueue(request)
        request.row = self._rows.pop()
        request.blocks = np.array([self._blocks.pop() for _ in range(count)], np.int32)
        self.running[request.row] = request

    def _leave(self, request: Request) -> None:
        if request.row < 0:
            self._unqueue(request)
            return
        del self.running[request.row]
        self._rows.append(request.row)
        self._blocks.extend(request.blocks.tolist())

    def _unqueue(self, request: Request) -> None:
        queue = self._waiting[request.adapter]
        queue.remove(request)
        if not queue:
            del self._waiting[request.adapter]

    def _next_chunks(self) -> Iterator[tuple[Request, int, int]]:
        """Those of prompts that the next step has lanes for."""
        room, chunk = self._shape.lanes[-1], self._shape.chunk
        for request in self.running.values():
            for start in range(request.read, len(request.prompt), chunk)[:room]:
                room -= 1
                yield request, start, min(chunk, len(request.prompt) - start)

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


def _put_choice(inputs: Inputs[np.ndarray], request: Request) -> None:
    row, choice, params = request.row, inputs.choice, request.params
    choice.temperature[row] = params.temperature
    choice.top_p[row] = params.top_p
    if params.top_k is not None:
        choice.top_k[row] = min(params.top_k, choice.top_k[row])
    choice.seeds[row], choice.counts[row] = params.seed, request.sent
