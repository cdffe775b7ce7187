"""What clients may take: sizes of bodies, rows of a key, and who may ask at all."""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from starlette.requests import ClientDisconnect, Request

from jax_lora.serving.server.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may take.

    Args:
      body_bytes: of a request's body.
      body_seconds: in which it must have come.
      answers: of a request, `n` times its prompts.
      rows_per_key: requests that run or wait, for one key; without keys, for all. None: any number.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    answers: int = 64
    rows_per_key: int | None = None


class Keys:
    """The keys that clients may have, and how many rows each takes. Without any, all may ask."""

    def __init__(self, keys: Sequence[str], rows_per_key: int | None) -> None:
        # As digests: a look-up by them takes a time that tells nothing of a key.
        self._digests = {_digest(key) for key in keys}
        self._limit = rows_per_key
        self._rows: collections.Counter[bytes] = collections.Counter()

    @property
    def are_asked_for(self) -> bool:
        return bool(self._digests)

    def check(self, request: Request) -> bytes:
        """Whose request it is. Raises ApiError 401 where its key is none of these."""
        if not self._digests:
            return b""
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(key.strip())
        if kind.lower() != "bearer" or digest not in self._digests:
            raise ApiError(401, "give a key: Authorization: Bearer KEY", code="invalid_api_key")
        return digest

    @contextlib.contextmanager
    def rows(self, who: bytes, count: int) -> Iterator[None]:
        """Takes rows while it is open. Raises ApiError 429 where the key has no more."""
        if self._limit is not None and self._rows[who] + count > self._limit:
            raise ApiError(
                429,
                f"this key has {self._rows[who]} answers under way and asks for {count} more; "
                f"it may have {self._limit}",
                code="rate_limit_exceeded",
            )
        self._rows[who] += count
        try:
            yield
        finally:
            self._rows[who] -= count


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


async def body_of(request: Request, limits: Limits) -> bytes:
    """The body, whole.

    Raises:
      ApiError: 415, it is not said to be JSON; 413, it is too long; 408, it does not come in time.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    # A page of another origin can't send this without asking first.
    if kind != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise ApiError(413, f"the body exceeds {limits.body_bytes} bytes")
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come in {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before its body had come") from None
    return b"".join(parts)
