"""From the engine's thread to the event loop, and from there to clients, as it comes."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jax_lora.serving.engine import Generation


class Inbox[T]:
    """What one task of the event loop takes of what other threads tell it."""

    def __init__(self, mailbox: "Mailbox") -> None:
        self._mailbox, self._items = mailbox, list[T]()
        self._is_filled = asyncio.Event()

    def post(self, item: T) -> None:
        """From any thread."""
        self._mailbox.post(lambda: self._put(item))

    def _put(self, item: T) -> None:
        self._items.append(item)
        self._is_filled.set()

    async def take(self) -> list[T]:
        """All that has come since the last call, at least one."""
        await self._is_filled.wait()
        self._is_filled.clear()
        items, self._items = self._items, []
        return items


class Mailbox:
    """Has callbacks run in the event loop that another thread posts.

    All that is posted while the loop is busy comes with one wake-up, which is a system call.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._is_woken = False

    def post(self, callback: Callable[[], None]) -> None:
        """From any thread."""
        self._posted.append(callback)
        if not self._is_woken:
            self._is_woken = True
            # The loop is closed where the server has ended: nobody reads any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._is_woken = False  # before: what is posted from here on wakes the loop again
        while self._posted:
            self._posted.popleft()()


async def cancel_when_gone(receive: Receive, generations: Sequence[Generation]) -> None:
    """Waits until the client has gone away, and ends its answers."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for generation in generations:
        generation.cancel()


@contextlib.asynccontextmanager
async def watched(receive: Receive, generations: Sequence[Generation]) -> AsyncIterator[None]:
    """While it is open, a client that goes away ends its answers. At the end all have ended."""
    watch = asyncio.create_task(cancel_when_gone(receive, generations))
    try:
        yield
    finally:
        watch.cancel()
        for generation in generations:
            generation.cancel()


class EventStream(Response):
    """Server-sent events. A client that goes away ends the answers.

    A client that reads slowly holds back nobody: the engine goes on, and what has come waits here,
    which is at most `max_tokens` of each answer.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        generations: Sequence[Generation],
        lease: contextlib.ExitStack,
    ) -> None:
        """`lease` is closed at the end."""
        super().__init__(media_type="text/event-stream")
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would keep events back
        self._events, self._generations, self._lease = events, generations, lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lease:
            async with watched(receive, self._generations):
                start = {"type": "http.response.start", "status": self.status_code}
                await send({**start, "headers": self.raw_headers})
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
