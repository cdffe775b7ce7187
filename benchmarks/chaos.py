"""Rude clients of a server's process: each answer is the one that it has alone, or an error."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from benchmarks.server_process import ServerProcess, demo_server

_WORDS = ("window:", "river:", "candle:", "stone:", "seven:", "orange:", "letter:", "yellow:")
_MODELS = ("demo", "upper", "reverse", "rot13")
_CHANGING = "changing"  # a name that is sort's or rot13's in turns, or nobody's
_SORT = ".later/sort"
_GROWTH = 24 << 20  # bytes of the process, from behind the first flood to the end
_SECONDS = 120.0  # in which each request has an answer or an error

Body = dict[str, object]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients do.

    Attributes:
      seconds: in which all kinds of clients come at once.
      clients: of each kind, at a time.
      connections: that a flood opens at once. One flood comes before that time, one behind it.
      streams: under way when the process is killed.
    """

    seconds: float = 60.0
    clients: int = 6
    connections: int = 500
    streams: int = 40
    seed: int = 0


@dataclasses.dataclass
class Summary:
    """What came of it.

    Attributes:
      counts: of requests and connections, by what came of them.
      wrong: what should not be, in words.
      host_bytes: memory of the process, behind the first flood and at the end.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    host_bytes: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        before, end = self.host_bytes
        return not self.wrong and end - before < _GROWTH


class _Got(NamedTuple):
    """A status, and the texts of the answers; or None for texts where the end did not come."""

    status: int
    texts: list[str] | None


def run(load: Load, progress: Callable[[str], None]) -> Summary:
    """Starts a server of the bundled model, and does all that to it."""
    progress("starting a server")
    with TemporaryDirectory() as root, demo_server(Path(root)) as server:
        return disturb(server, load, progress)


def disturb(server: ServerProcess, load: Load, progress: Callable[[str], None]) -> Summary:
    """Does it to a server that runs, which is killed and started again on the way."""
    return asyncio.run(_disturbed(server, load, progress))


async def _disturbed(server: ServerProcess, load: Load, progress: Callable[[str], None]) -> Summary:
    async with _chaos(server, load) as chaos:
        await chaos.learn()
        progress(f"{load.connections} connections at once")
        await chaos.flood()
        memory = server.resident_bytes
        progress(f"all kinds of clients for {load.seconds:.0f} s")
        await chaos.mix()
        await chaos.flood()
        await chaos.settle()
        chaos.summary.host_bytes = (memory, server.resident_bytes)
        progress("killing it, and starting it again")
        await chaos.kill()
    async with _chaos(server, load, chaos) as again:
        await again.check_all()
    return chaos.summary


@contextlib.asynccontextmanager
async def _chaos(
    server: ServerProcess, load: Load, before: "_Chaos | None" = None
) -> AsyncIterator["_Chaos"]:
    limits, headers = httpx.Limits(max_connections=None), server.HEADERS
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, limits=limits, timeout=_SECONDS
    ) as http:
        chaos = _Chaos(server, load, http)
        if before is not None:
            chaos.summary, chaos.alone = before.summary, before.alone
        yield chaos


class _Chaos:
    """The clients of one start of the process."""

    def __init__(self, server: ServerProcess, load: Load, http: httpx.AsyncClient) -> None:
        self.server, self.load, self.http = server, load, http
        self.summary = Summary()
        self.alone: dict[tuple[str, str], str] = {}
        self.random = random.Random(load.seed)
        self.num_lines = len(server.lines)

    def count(self, what: str) -> None:
        self.summary.counts[what] += 1

    def wrong(self, text: str) -> None:
        self.summary.wrong.append(text)

    # ------------------------------------------------------------------------------ what is right

    async def learn(self) -> None:
        """Each model's answer to each prompt, alone."""
        await self._load("sort", _SORT)
        for model in (*_MODELS, "sort"):
            for word in _WORDS:
                got = await self._ask(_body(model, word))
                assert got.status == 200 and got.texts, got
                self.alone[model, word] = got.texts[0]
        for word in _WORDS:
            assert len({self.alone[model, word] for model in (*_MODELS, "sort")}) == 5, word

    async def check_all(self) -> None:
        """Asks all of it once more, alone."""
        await self._load("sort", _SORT)
        for model, word in self.alone:
            await self._check(_body(model, word))
        await self._unload("sort")

    def _judge(self, body: Body, got: _Got) -> None:
        model, word = str(body["model"]), str(body["prompt"])
        sources = ("sort", "rot13") if model == _CHANGING else (model,)
        right = tuple(self.alone[source, word] for source in sources)
        if got.status == 200 and got.texts is not None:
            # A long answer goes on behind its end token.
            ends = body.get("ignore_eos") is True
            good = all(t.startswith(right) if ends else t in right for t in got.texts)
            if good and len(got.texts) == body["n"]:
                self.count("answered")
            else:
                self.wrong(f"{model} said {got.texts} to {word!r}, alone {right}")
        elif got.status == 429:
            self.count("told to try again later")
        elif got.status in (404, 422) and model == _CHANGING:
            self.count("told that there is no such model")
        else:
            self.wrong(f"{model} got status {got.status} and {got.texts} to {word!r}")

    # ------------------------------------------------------------------------------------ clients

    async def flood(self) -> None:
        """Opens all connections, then asks on all of them at once."""
        host, port = _address(self.server.url)
        peers = await asyncio.gather(
            *(asyncio.open_connection(host, port) for _ in range(self.load.connections))
        )
        async with asyncio.TaskGroup() as group:
            for peer in peers:
                group.create_task(self._flooded(peer))

    async def _flooded(self, peer: Streams) -> None:
        body = self._random_body(_MODELS)
        async with _closing(peer), asyncio.timeout(_SECONDS):
            self.count("connections of floods")
            await _send(peer, body)
            self._judge(body, _read(await peer[0].read(), body))

    async def mix(self) -> None:
        """All kinds at once, until the time is over."""
        end = time.monotonic() + self.load.seconds
        kinds = (self._asks, self._reads_slowly, self._half_closes, self._half_sends, self._leaves)
        async with asyncio.TaskGroup() as group:
            for kind in (*kinds, self._sends_garbage):
                for _ in range(self.load.clients):
                    group.create_task(self._again(kind, end))
            group.create_task(self._again(self._loads, end))

    async def _again(self, kind: Callable[[], Awaitable[None]], end: float) -> None:
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(_SECONDS):
                    await kind()
            except (TimeoutError, OSError, httpx.HTTPError, asyncio.IncompleteReadError) as error:
                self.wrong(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def _asks(self) -> None:
        await self._check(self._random_body((*_MODELS, _CHANGING)))

    async def _check(self, body: Body) -> None:
        self._judge(body, await self._ask(body))

    async def _reads_slowly(self) -> None:
        """So slowly that the server's buffers fill up, and at last to the end."""
        body = self._random_body(_MODELS, stream=True, n=4, max_tokens=50, ignore_eos=True)
        async with self._connection() as peer:
            await _send(peer, body)
            answer = b""
            for _ in range(20):
                answer += await peer[0].read(100)
                await asyncio.sleep(0.02)
            self._judge(body, _read(answer + await peer[0].read(), body))
            self.count("slow readers")

    async def _half_closes(self) -> None:
        """Asks, and closes its sending side, which counts as gone: the server closes too."""
        async with self._connection() as peer:
            await _send(peer, self._random_body(_MODELS, max_tokens=50, ignore_eos=True, n=2))
            peer[1].write_eof()
            await peer[0].read()
            self.count("half-closed")

    async def _half_sends(self) -> None:
        """Goes away in the middle of its body."""
        async with self._connection() as peer:
            await _send(peer, self._random_body(_MODELS), share=self.random.random())
            await asyncio.sleep(self.random.uniform(0, 0.05))
            self.count("gone before their body had come")

    async def _leaves(self) -> None:
        """Goes away in the middle of an answer, by a reset."""
        async with self._connection() as peer:
            await _send(peer, self._random_body(_MODELS, stream=True, max_tokens=50, n=4))
            await peer[0].read(self.random.randrange(1, 2000))
            raw = peer[1].get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.count("gone in the middle of an answer")

    async def _sends_garbage(self) -> None:
        async with self._connection() as peer:
            peer[1].write(self.random.randbytes(self.random.randrange(1, 3000)) + b"\r\n\r\n")
            peer[1].write_eof()
            answer = await peer[0].read()
            if answer and b" 400 " not in answer[:20]:
                self.wrong(f"garbage was answered by {answer[:200]!r}")
            self.count("sent garbage")

    async def _loads(self) -> None:
        """Makes a name sort's, or rot13's, or nobody's."""
        source = self.random.choice((_SORT, "rot13", None))
        if source is not None:
            await self._load(_CHANGING, source)
        else:
            await self._unload(_CHANGING)
        await asyncio.sleep(0.02)

    async def _load(self, name: str, source: str) -> None:
        body = {"lora_name": name, "lora_path": source, "load_inplace": True}
        answer = await self.http.post("/v1/load_lora_adapter", json=body)
        self.count(f"loads with status {answer.status_code}")
        if answer.status_code != 200:
            self.wrong(f"a load got {answer.status_code}: {answer.text}")

    async def _unload(self, name: str) -> None:
        answer = await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        self.count(f"unloads with status {answer.status_code}")
        if answer.status_code not in (200, 404):
            self.wrong(f"an unload got {answer.status_code}: {answer.text}")

    # ---------------------------------------------------------------------------- the end of it

    async def settle(self) -> None:
        """All rows must be free soon behind the last client, and no log may tell of any."""
        if said := self.server.lines[self.num_lines :]:
            self.wrong(f"the server printed {said!r:.999}")
        for _ in range(100):
            if not self.server.metric("jax_lora_requests_open"):
                return
            await asyncio.sleep(0.1)
        self.wrong(f"{self.server.metric('jax_lora_requests_open')} requests are still open")

    async def kill(self) -> None:
        """Kills the process under streams, each of which must know; then starts it again."""
        streams = [asyncio.create_task(self._cut_off()) for _ in range(self.load.streams)]
        while not self.server.metric("jax_lora_requests_open"):
            await asyncio.sleep(0.01)
        self.server.kill()
        await asyncio.gather(*streams)
        await asyncio.to_thread(self.server.start)

    async def _cut_off(self) -> None:
        body = self._random_body(_MODELS, stream=True, max_tokens=50, ignore_eos=True)
        try:
            got = await self._ask(body)
        except httpx.HTTPError:
            self.count("told by a broken connection")
            return
        if got.texts is not None or got.status != 200:
            self._judge(body, got)
        else:
            self.wrong("a stream ended as if it were whole")

    # ------------------------------------------------------------------------------------ requests

    def _random_body(self, models: Sequence[str], **more: object) -> Body:
        stream, n = self.random.random() < 0.5, self.random.choice((1, 1, 2))
        word = self.random.choice(_WORDS)
        return _body(self.random.choice(models), word, **{"stream": stream, "n": n, **more})

    async def _ask(self, body: Body) -> _Got:
        response = await self.http.post("/v1/completions", json=body)
        return _texts(response.status_code, response.content, body)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Streams]:
        """One whose buffers hold little."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, _address(self.server.url))
        peer = await asyncio.open_connection(sock=raw, limit=1024)
        async with _closing(peer):
            yield peer


def _body(model: str, word: str, **more: object) -> Body:
    return {"model": model, "prompt": word, "temperature": 0, "n": 1, **more}


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port


@contextlib.asynccontextmanager
async def _closing(peer: Streams) -> AsyncIterator[None]:
    try:
        yield
    finally:
        peer[1].close()
        with contextlib.suppress(OSError):
            await peer[1].wait_closed()


async def _send(peer: Streams, body: Body, share: float = 1.0) -> None:
    """Sends a request, or the first `share` of its body."""
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"Authorization: {ServerProcess.HEADERS['Authorization']}", "", ""]
    peer[1].write("\r\n".join(lines).encode() + data[: round(share * len(data))])
    await peer[1].drain()


def _read(answer: bytes, body: Body) -> _Got:
    """What a whole HTTP response says."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" in head:
        parts = []
        while rest and (size := int(rest.partition(b"\r\n")[0], 16)):
            start = rest.index(b"\r\n") + 2
            parts.append(rest[start : start + size])
            rest = rest[start + size + 2 :]
        rest = b"".join(parts)
    return _texts(int(head.split()[1]) if head else 0, rest, body)


def _texts(status: int, content: bytes, body: Body) -> _Got:
    if status != 200:
        return _Got(status, None)
    if not body.get("stream"):
        return _Got(status, [choice["text"] for choice in json.loads(content)["choices"]])
    *events, done, _ = content.split(b"\n\n") if content.endswith(b"\n\n") else (b"", b"", b"")
    texts = collections.defaultdict[int, str](str)
    for event in events:
        told = json.loads(event.removeprefix(b"data: ") or b"{}")
        if "error" in told:  # the status had been sent before it was known
            return _Got(422, None)
        for choice in told.get("choices", ()):
            texts[choice["index"]] += choice["text"]
    return _Got(status, [texts[n] for n in sorted(texts)] if done == b"data: [DONE]" else None)
