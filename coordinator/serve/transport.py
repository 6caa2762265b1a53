"""Between ASGI and the endpoints: reading bodies, noticing clients that vanish, server-sent events.

A client that does not send its request within `client_s` is let go; so is one that has closed its connection or whose
connection was closed (`connections.py`), also while nothing is sent to it, and whatever was computed for it ends.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from warmfront.coordinator.serve.errors import ApiError, as_api_error

__all__ = ["Events", "as_event", "endpoint", "read", "while_connected"]

_log = logging.getLogger("warmfront.serve")
# A client that is still sending sees no answer: what is somewhat too large is read to its end, and forgotten.
_READ_ON = 4
_CLIENT_LEFT = 499  # as nginx calls it; nobody reads it
Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


async def read(request: Request, kind: type[Model], most: int, patience_s: float) -> Model:
    """The body of a request as a `kind`. Raises ApiError if it is too large or too slow, ValidationError if wrong."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > _READ_ON * most:
                    break
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {patience_s:.0f} s") from None
    if size > most:
        raise ApiError(413, f"the request is larger than {most:,} bytes")
    return kind.model_validate_json(bytes(body))


def endpoint(
    handle: Callable[[Request], Awaitable[Response]], count: Callable[[int], None]
) -> Callable[[Request], Awaitable[Response]]:
    """`handle`, whose errors become OpenAI's; `count` is told the status."""

    async def answer(request: Request) -> Response:
        try:
            response = await handle(request)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception as error:
            response = told(error).response()
        count(response.status_code)
        return response

    return answer


def told(error: Exception) -> ApiError:
    """What the client gets to know; the log has the rest where the fault is here."""
    api_error = as_api_error(error)
    if api_error.code == "internal_error":
        _log.error("a request failed", exc_info=error)
    return api_error


async def _left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Result], limit_s: float) -> Result:
    """What `work` returns, unless the client leaves before or the time is over: then it is cancelled.

    Raises ClientDisconnect or ApiError.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request.receive))
    try:
        done, _ = await asyncio.wait((working, leaving), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return await working
        if leaving in done:
            raise ClientDisconnect
        raise ApiError(504, f"the answer was not there within {limit_s:.0f} s", code="timeout")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def as_event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Events(Response):
    """A stream of server-sent events; `events` is closed when the client leaves or `limit_s` are over."""

    def __init__(self, events: AsyncIterator[bytes], limit_s: float | None) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events, self._limit_s = events, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Of an unknown length.
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        sending = asyncio.create_task(self._send(send, headers))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        async def give(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async with asyncio.timeout(self._limit_s):
                    async for event in events:
                        await give(event)
            except TimeoutError:
                error = ApiError(504, "the time for this answer is over", code="timeout")
                await give(as_event(error.body()))
            except Exception as error:
                await give(as_event(told(error).body()))
            await give(b"", more=False)
