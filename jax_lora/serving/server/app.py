"""The routes."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jax_lora.messages import printable
from jax_lora.serving.server.adapters import AdapterFolder
from jax_lora.serving.server.asking import Asked, Served, no_model, read_question
from jax_lora.serving.server.errors import ApiError, Endpoint, guarded
from jax_lora.serving.server.limits import Keys, Limits, body_of
from jax_lora.serving.server.metrics import Metrics
from jax_lora.serving.server.schemas import (
    ChatBody,
    CompletionBody,
    LoadBody,
    UnloadBody,
    parsed,
)
from jax_lora.serving.server.streams import EventStream, Mailbox, watched

_PAGE = Path(__file__).with_name("page.html")


class Server:
    """The endpoints over one engine.

    Args:
      keys: those that clients may have. Without any, all may ask, and none may load adapters.
    """

    def __init__(self, served: Served, keys: Sequence[str], limits: Limits) -> None:
        self._served, self._limits = served, limits
        self._keys = Keys(keys, limits.rows_per_key)
        self._adapters = AdapterFolder(served.engine, served.adapters, served.name)
        self._metrics = Metrics(served.engine)
        self._mailbox: Mailbox | None = None
        self._created = int(time.time())
        # Two loads at once would each see the name of the other free.
        self._loading = asyncio.Lock()

    def app(self) -> Starlette:
        """For an ASGI server. At its end it closes the engine."""
        posts: dict[str, Endpoint] = {
            "/v1/completions": functools.partial(self._ask, kind=CompletionBody),
            "/v1/chat/completions": functools.partial(self._ask, kind=ChatBody),
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }
        gets: dict[str, Endpoint] = {
            "/": self._page,
            "/health": self._health,
            "/metrics": self._tell_metrics,
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
        }
        routes = [self._route(path, endpoint, "POST") for path, endpoint in posts.items()]
        routes += [self._route(path, endpoint, "GET") for path, endpoint in gets.items()]
        handlers = {HTTPException: _told}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    def _route(self, path: str, endpoint: Endpoint, method: str) -> Route:
        run = guarded(endpoint)

        async def counted(request: Request) -> Response:
            response = await run(request)
            if response.status_code >= 400:
                self._metrics.errors.labels(str(response.status_code)).inc()
            return response

        return Route(path, counted, methods=[method])

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._mailbox = Mailbox()
        yield
        await run_in_threadpool(self._served.engine.close)

    async def _ask(
        self, request: Request, *, kind: type[CompletionBody] | type[ChatBody]
    ) -> Response:
        who = self._keys.check(request)
        body = parsed(kind, await body_of(request, self._limits))
        question = await run_in_threadpool(read_question, self._served, body, self._limits.answers)
        assert self._mailbox is not None
        with contextlib.ExitStack() as lease:
            lease.enter_context(self._keys.rows(who, question.num_answers))
            asked = Asked(self._served, question, self._mailbox, self._metrics)
            if body.stream:
                return EventStream(asked.events(), asked.generations, lease.pop_all())
            async with watched(request.receive, asked.generations):
                return JSONResponse(await asked.whole())

    async def _load(self, request: Request) -> Response:
        body = parsed(LoadBody, await self._of_operator(request))
        async with self._loading:
            await run_in_threadpool(
                self._adapters.load, body.lora_name, body.lora_path, replace=body.load_inplace
            )
        return PlainTextResponse("Success: the adapter was loaded.")

    async def _unload(self, request: Request) -> Response:
        body = parsed(UnloadBody, await self._of_operator(request))
        async with self._loading:
            await run_in_threadpool(self._adapters.unload, body.lora_name)
        return PlainTextResponse("Success: the adapter was unloaded.")

    async def _of_operator(self, request: Request) -> bytes:
        self._keys.check(request)
        if not self._keys.are_asked_for:
            raise ApiError(403, "loading adapters needs a server that was started with --api-key")
        return await body_of(request, self._limits)

    async def _models(self, request: Request) -> Response:
        self._keys.check(request)
        names = [self._served.name, *self._served.engine.adapters]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        self._keys.check(request)
        name = request.path_params["name"]
        if name != self._served.name and name not in self._served.engine.adapters:
            raise no_model(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        base = self._served.name
        parent = None if name == base else base
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "jax-lora"}
        length = self._served.engine.shape.max_length
        return {**card, "root": name, "parent": parent, "max_model_len": length}

    async def _health(self, request: Request) -> Response:
        if (reason := self._served.engine.end) is not None:
            raise ApiError(503, reason)
        return JSONResponse({"status": "ok"})

    async def _tell_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _page(self, request: Request) -> Response:
        # It needs nothing from elsewhere, and no other page may frame it.
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
        )
        return FileResponse(_PAGE, headers={"Content-Security-Policy": policy})


async def _told(request: Request, error: Exception) -> Response:
    """What a client is told of a path or method that there is not."""
    assert isinstance(error, HTTPException)
    what = f"{error.detail}: {request.method} {printable(request.url.path)}"
    return ApiError(error.status_code, what).response
