"""The page's own sources: its files, and the front as server-sent events, ten a second while a page looks at it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.serve.errors import ApiError
from warmfront.coordinator.serve.front import Live
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.transport import Events, as_event

__all__ = ["PAGE", "attach", "front_events", "page_file"]

# Paths and files of the page; nothing else of the folder is served.
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/front.js": "front.js"}
_FOLDER = Path(__file__).parent / "page"
_PERIOD_S = 0.1
_MAX_PAGES = 32
# Nothing from elsewhere, and no frame around it.
_POLICY = "default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"


def attach(service: Service, engine: AsyncEngine) -> None:
    """From now on `service` has this engine."""
    service.metrics.follow(engine)
    service.live = live = Live(engine)

    def after_pass(tokens: int) -> None:
        service.metrics.a_pass(tokens)
        live.note(tokens)

    engine.after_pass = after_pass
    service.loaded = engine


async def page_file(_service: Service, request: Request) -> Response:
    """A file of the page."""
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return FileResponse(_FOLDER / PAGE[request.url.path], headers=headers)


async def front_events(service: Service, _request: Request) -> Response:
    """The front, until the page is closed."""
    live = service.live
    if live is None:
        raise ApiError(503, "the model is loading: try again later", code="loading")
    if live.pages >= _MAX_PAGES:
        raise ApiError(429, f"{live.pages} pages look at the front already")
    return Events(_events(service, live), None)


async def _events(service: Service, live: Live) -> AsyncIterator[bytes]:
    live.pages += 1
    try:
        while not service.draining:
            figures = await live.figures()
            yield as_event(figures | {"model": service.model, "cached": service.metrics.cached_share})
            await asyncio.sleep(_PERIOD_S)
    finally:
        live.pages -= 1
