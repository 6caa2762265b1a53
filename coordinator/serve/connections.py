"""One connection: closed when it is the client's turn, and nothing comes of it for too long.

    a request is to come        the first one, or the next: its head must be complete by then
    the rest of one is to come  its answer went out before all of it was read
    data is to be taken         more than the transport's buffer is ready, or the last of an answer is

Of `MOST` connections at once, further ones are told that there are too many; of twice as many, they are closed.

A client that sends a byte now and then gains no time. The body of a request that is being read has a limit of its own
(`transport.read`), and what is computed for a client that takes nothing ends with the connection.
"""

import asyncio
from typing import cast

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from warmfront.coordinator.serve.errors import ApiError

__all__ = ["MOST", "Connection"]

# A process has 1,024 descriptors where nothing else is set; a page holds two connections.
MOST = 400


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(503, f"{MOST} connections are open: try again later", code="too_many_connections")
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


class Connection(H11Protocol):
    """uvicorn's connection, with that limit: the seconds are its `timeout_keep_alive`."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As in asyncio.Protocol, like all of these."""
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > MOST:
            self.app = _too_many
        if len(self.connections) > 2 * MOST:
            self.transport.abort()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The limit is over."""
        super().connection_lost(exc)
        self._stop()

    def data_received(self, data: bytes) -> None:
        """Perhaps the end of a request's head."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The last of an answer was written."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The buffer is full."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """Have the time run while it is the client's turn; what it does meanwhile does not begin it anew."""
        if not (self.flow.write_paused or self.cycle is None or self.cycle.response_complete):
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
