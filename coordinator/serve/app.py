"""The ASGI application: routes, and what stands before all of them: keys, origins, hosts.

GET   /health                             no key needed
GET   /v1/models  /v1/models/{id}
POST  /v1/chat/completions  /v1/completions  /v1/embeddings
POST  /tokenize  /detokenize  /apply-template
GET   /metrics  /front, and the page       the page needs no key
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from warmfront.coordinator.serve.api.chat import chat_completions
from warmfront.coordinator.serve.api.completions import completions
from warmfront.coordinator.serve.api.embeddings import embeddings
from warmfront.coordinator.serve.api.texts import apply_template, detokenize, tokenize
from warmfront.coordinator.serve.errors import ApiError
from warmfront.coordinator.serve.live import PAGE, front_events, page_file
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.transport import endpoint

__all__ = ["make_app"]

# Paths that need no key: what tells nothing of the model's texts.
_OPEN = {"/health", *PAGE}
Handler = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service, *, keys: Sequence[str] = (), origins: Sequence[str] = (), local: bool = True) -> ASGIApp:
    """The application. `keys`: one of them is needed, if there are any; `origins`: web pages that may ask, "*" for
    all; `local`: the server is for this machine, so that another name for it is a page's trick."""
    routes = [
        _route("/health", _health, "GET"),
        _route("/v1/models", _models, "GET"),
        _route("/v1/models/{name:path}", _model, "GET"),
        _route("/v1/chat/completions", chat_completions, "POST"),
        _route("/v1/completions", completions, "POST"),
        _route("/v1/embeddings", embeddings, "POST"),
        _route("/tokenize", tokenize, "POST"),
        _route("/detokenize", detokenize, "POST"),
        _route("/apply-template", apply_template, "POST"),
        _route("/metrics", _metrics, "GET"),
        _route("/front", front_events, "GET"),
        *(_route(path, page_file, "GET") for path in PAGE),
    ]
    guards = [Middleware(_Guard, keys=keys, origins=origins, local=local)]
    if origins:
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        guards.insert(0, cors)
    return Starlette(
        routes=[
            Route(
                path,
                endpoint(partial(handler, service), partial(service.metrics.request, path)),
                methods=[method],
            )
            for path, handler, method in routes
        ],
        middleware=guards,
        exception_handlers={HTTPException: _http_error},
    )


def _route(path: str, handler: Handler, method: str) -> tuple[str, Handler, str]:
    return path, handler, method


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    messages = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    return ApiError(status, messages.get(status, str(error))).response()


class _Guard:
    """Sends away who has no key, and pages of other sites that use a visitor's browser."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], origins: Sequence[str], local: bool) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]
        self._origins, self._local = origins, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no web sockets
            await self._app(scope, receive, send)
            return
        error = self._fault(scope["path"], Headers(scope=scope))
        await (self._app if error is None else error.response())(scope, receive, send)

    def _fault(self, path: str, headers: Headers) -> ApiError | None:
        """What speaks against a request."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and not self._keys and not _is_local(host):
            return ApiError(403, f"this server is for this machine, and {host[:100]!r} is not a name of it")
        if origin is not None and "*" not in self._origins and origin not in self._origins and not _same(origin, host):
            return ApiError(403, f"pages of {origin[:100]} may not use this server: see --cors")
        if not self._keys or path in _OPEN:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = (key if scheme.lower() == "bearer" else "").strip().encode()
        # All are compared, whichever fits, so that the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            return ApiError(401, "this server wants a key: Authorization: Bearer KEY", code="invalid_api_key")
        return None


def _same(origin: str, host: str) -> bool:
    """Whether a page comes from this server."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _health(service: Service, _request: Request) -> Response:
    return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)


def _described(service: Service) -> dict[str, object]:
    context = service.loaded.engine.plan.context if service.loaded is not None else None
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "warmfront",
        "max_model_len": context,
    }


async def _metrics(service: Service, _request: Request) -> Response:
    return Response(await service.aside(service.metrics.text), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _models(service: Service, _request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def _model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return JSONResponse(_described(service))
