"""Errors in OpenAI's form."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jax_lora.messages import printable

Endpoint = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("jax_lora.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer: a status, a sentence, and the field at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, object]:
        """As OpenAI's API writes it."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": printable(str(self), 1000),
            "type": _TYPES.get(self.status, other),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def response(self) -> Response:
        """With `Retry-After` where the client may try again."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def without_places(error: Exception, *folders: Path | None) -> str:
    """An error's text, where files are named from their folder on: clients need not know where the
    server keeps it."""
    text = str(error)
    for folder in filter(None, folders):
        for place in {str(folder), str(folder.resolve())}:
            text = text.replace(f"{place}/", "").replace(place, folder.name)
    return text


def guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with all that it raises told in OpenAI's form.

    What nobody expected goes to the log, escaped: its text may hold what a client sent.
    """

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            return error.response
        except Exception as error:
            log.error("%s", printable(f"{type(error).__name__}: {error}", 1000))
            return ApiError(500, "the server has failed at this request").response

    return run
