"""The server's process: listens at once, loads the model, serves until SIGTERM or Ctrl-C, then lets answers end.

The model is loaded on the main thread, where Ctrl-C ends it as in other commands; uvicorn serves on another one, which
says "loading" until then. On the first signal the server takes no further requests and waits for those under way,
at most `drain_s`; on a second one it ends at once.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.serve.connections import Connection
from warmfront.coordinator.serve.live import attach
from warmfront.coordinator.serve.service import Service
from warmfront.shared.errors import ResourceError, UsageError, WarmfrontError

__all__ = ["HttpServer", "bound", "keys_of", "serve"]

_LOOK_S = 0.2
_BACKLOG = 256


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UsageError if it cannot; port 0 is any that is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"there is no address {host!r} to listen on: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise ResourceError(f"cannot listen on {host} port {port}: {why}; pass another --port") from None
    return listener


class HttpServer:
    """uvicorn on a thread of its own."""

    def __init__(self, app: ASGIApp, listener: socket.socket, drain_s: float, client_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            timeout_keep_alive=math.ceil(client_s),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            ws="none",
        )
        self._server, self._listener = uvicorn.Server(config), listener
        self.error: Exception | None = None  # what has ended it without being asked to
        self._thread = threading.Thread(target=self._run, name="warmfront-http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve([self._listener]))
        except Exception as error:
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, at_once: bool) -> None:
        """Take no connections any more, and end when those under way have; returns at once."""
        self._server.should_exit = True
        self._server.force_exit = self._server.force_exit or at_once

    def join(self) -> None:
        self._thread.join()


@contextmanager
def _signals(handle: Callable[[], None]) -> Iterator[None]:
    """While the block lasts SIGTERM and Ctrl-C call `handle`."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        handle()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def serve(
    service: Service,
    app: ASGIApp,
    listener: socket.socket,
    *,
    drain_s: float,
    load: Callable[[], Engine],
    say: Callable[[str], None],
    prepare: Callable[[Engine], None] = lambda _engine: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve `app` on `listener` until a signal. `load` gives the engine, `prepare` is told of it before
    the first request, `ready` when requests are taken.

    Raises what loading raises; nothing is left running.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    server, engine = HttpServer(app, listener, drain_s, service.limits.client_s), None
    try:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            engine = AsyncEngine(load(), queue=service.limits.queue)
        finally:
            signal.signal(signal.SIGTERM, before)
        prepare(engine.engine)
        attach(service, engine)
        ready()
        _until_signal(service, server, engine, drain_s, say)
    finally:
        service.draining = True
        server.stop(at_once=True)
        if engine is not None:
            engine.close()
        server.join()
        listener.close()


def _until_signal(
    service: Service, server: HttpServer, engine: AsyncEngine, drain_s: float, say: Callable[[str], None]
) -> None:
    """Wait for the end that a signal asks for. Raises what has ended the engine before."""
    signals = 0

    def count() -> None:
        nonlocal signals
        signals += 1

    with _signals(count):
        while not signals and server.alive:
            time.sleep(_LOOK_S)
            if engine.failure is not None:
                raise engine.failure
        if not server.alive:
            raise WarmfrontError(f"the HTTP server has ended: {server.error or 'for no reason that it gave'}")
        say(f"shutting down: answers under way have {drain_s:.0f} s; once more ends them")
        service.draining = True
        server.stop(at_once=False)
        while server.alive:
            if signals > 1:
                server.stop(at_once=True)
                break
            time.sleep(_LOOK_S / 4)


def keys_of(given: Sequence[str]) -> list[str]:
    """The keys that --api-key gives, each itself or a file of them, a line each. Raises UsageError for a bad one."""
    keys: list[str] = []
    for each in given:
        try:
            # A key may be longer than any name of a file.
            lines = Path(each).read_text(encoding="utf-8").split() if os.path.isfile(each) else [each]
        except (OSError, UnicodeError) as error:
            raise UsageError(f"the keys in {each} cannot be read: {error}") from None
        if not lines or not all(line.isascii() and line.isprintable() and len(line.split()) == 1 for line in lines):
            raise UsageError("--api-key: a key is a word of ASCII letters, or the name of a file with a key a line")
        keys += lines
    return keys
