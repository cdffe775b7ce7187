"""The client of `benchmarks.endpoint`, a process of its own: so it takes none of the server's time.

It reads a port, a number of streams and the questions from stdin, as JSON, and writes what it saw.
"""

import asyncio
import json
import statistics
import sys
import time

import httpx


class _Client:
    def __init__(
        self, http: httpx.AsyncClient, questions: list[tuple[str, list[int], int]]
    ) -> None:
        self._http, self._left = http, iter(questions)
        self.tokens, self.first = 0, list[float]()

    async def stream(self) -> None:
        """Asks one question behind the other, until there are no more."""
        for adapter, prompt, max_tokens in self._left:
            body = {"model": adapter, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
            options = {"stream": True, "stream_options": {"include_usage": True}}
            await self._ask({**body, **options, "ignore_eos": True}, max_tokens)

    async def _ask(self, body: dict[str, object], max_tokens: int) -> None:
        start, parts = time.perf_counter(), list[bytes]()
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            async for part in response.aiter_bytes():
                if not parts:
                    self.first.append(time.perf_counter() - start)
                parts.append(part)
        *_, last, done, _ = b"".join(parts).split(b"\n\n")
        if done != b"data: [DONE]":
            raise RuntimeError(f"an answer was cut off: {done!r:.999}")
        tokens = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
        if tokens != max_tokens:
            raise RuntimeError(f"{max_tokens} tokens were asked for, and {tokens} came")
        self.tokens += tokens


async def main() -> None:
    asked = json.load(sys.stdin)
    limits = httpx.Limits(max_connections=None)
    base = f"http://127.0.0.1:{asked['port']}"
    async with httpx.AsyncClient(base_url=base, timeout=None, limits=limits) as http:
        client = _Client(http, asked["questions"])
        start = time.perf_counter()
        await asyncio.gather(*(client.stream() for _ in range(asked["streams"])))
        seconds = time.perf_counter() - start
    first = statistics.median(client.first)
    print(json.dumps({"seconds": seconds, "tokens": client.tokens, "first_s": first}))


if __name__ == "__main__":
    asyncio.run(main())
