"""The REST application: TensorFlow Serving's API, the Open Inference Protocol, metrics and a page, over a repository.

It runs under any ASGI server; :mod:`obmlite.serving.server` runs it under Uvicorn. It neither starts nor stops the
repository, so that a program may have it for other purposes too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("REST needs the extra `serve`: pip install 'obmlite[serve]'", name=error.name) from error

from obmlite.errors import ArgumentError, ObmliteError
from obmlite.serving import _oip_rest, _page, _tfs_rest, metrics
from obmlite.serving._requests import Answer, CallRoute, Incoming, Limits, PathRoute, Service, error_response
from obmlite.serving.repository import Repository
from obmlite.serving.status import ServingError

__all__ = ["Limits", "build_app"]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


def build_app(
    repository: Repository,
    *,
    limits: Limits | None = None,
    cors: Sequence[str] = (),
    metrics: metrics.Metrics | None = None,
    page: bool = True,
) -> Starlette:
    """The application.

    Args:
      repository: what is served.
      limits: what clients may take.
      cors: origins, such as ``"https://example.org"``, whose pages may send requests; ``"*"`` for all. What a browser
        sends for another site's page is refused.
      metrics: that observe the repository; made here if None.
      page: whether there is a page for people at ``/``.

    Raises:
      ArgumentError: something in ``cors`` is no origin.
    """
    for origin in cors:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ArgumentError(
                "What is given for an origin is none.",
                field="cors",
                expected="as browsers send it, such as https://example.org or http://localhost:3000; or *",
                found=repr(origin)[:200],
            )
    found = _metrics(repository, metrics)
    service = Service(repository, limits or Limits())
    predict, *tfs = _tfs_rest.routes(service, found)
    infer, *oip = _oip_rest.routes(service, found)
    routes = [
        predict,
        infer,
        *tfs,
        *oip,
        PathRoute("GET", r"/monitoring/prometheus/metrics|/metrics", _text_of(found)),
    ]
    if page:
        routes.append(_page.route(repository))
    sharing = Middleware(
        CORSMiddleware,
        allow_origins=cors,
        allow_methods=("POST", "GET"),
        allow_headers=("*",),
        expose_headers=(_oip_rest.HEADER,),
    )
    return _App(
        [route for route in (infer, predict) if isinstance(route, CallRoute)],
        routes=routes,
        middleware=[*([sharing] if cors else []), *([] if "*" in cors else [Middleware(_SameOrigin, also=cors)])],
        exception_handlers=_HANDLERS,
        lifespan=_closing(service),
    )


def _metrics(repository: Repository, given: metrics.Metrics | None) -> metrics.Metrics:
    if given is not None:
        return given
    found = metrics.Metrics()
    repository.observe(found)
    return found


def _closing(service: Service) -> Callable[[Any], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        service.close()

    return lifespan


def _text_of(found: metrics.Metrics) -> Callable[[Request], Any]:
    async def text(request: Request) -> Response:
        return Response(found.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return text


class _SameOrigin:
    """Refuses what a browser sends for another site's page: it does so even where that page may not see the answer."""

    def __init__(self, app: ASGIApp, also: Sequence[str]) -> None:
        self._app = app
        self._also = {origin.encode() for origin in also}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin")
            own = origin is None or origin.partition(b"://")[2] == headers.get(b"host")
            if not own and origin not in self._also:
                refused = error_response(403, "Requests from pages of other sites are not allowed.")
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _App(Starlette):
    """Starlette's application, around which calls go: to be passed on takes it as long as a small model's call."""

    def __init__(self, calls: Sequence[CallRoute], **options: Any) -> None:
        super().__init__(**options)
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            try:
                answer = await self._called(scope, receive)
            except Exception as error:
                handler = next(_HANDLERS[kind] for kind in type(error).__mro__ if kind in _HANDLERS)
                await (await handler(Request(scope), error))(scope, receive, send)
                if handler is _unexpected_error:
                    raise  # for the server's log
                return
            if answer is not None:
                await answer.send(send)
                return
        await super().__call__(scope, receive, send)

    async def _called(self, scope: Scope, receive: Receive) -> Answer | None:
        path = scope.get("raw_path") or b""
        for route in self._calls:
            parameters = route.parameters(path.decode("latin-1"))
            if parameters is not None:
                headers = dict(scope["headers"])
                if b"origin" in headers:  # which is the middleware's
                    return None
                return await route.call(Incoming(parameters, headers, receive))
        return None


# --- errors: always {"error": "…"}, never a traceback


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error.code.http, str(error))


async def _library_error(request: Request, error: Exception) -> Response:
    found = ServingError.of(error)
    return error_response(found.code.http, str(found))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and error.detail == "Not Found":
        return error_response(404, f"Not found: {request.method} {request.url.path[:500]}")
    return error_response(error.status_code, error.detail, dict(error.headers or {}))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    return error_response(500, "Internal error.")


_HANDLERS: dict[Any, Any] = {
    ServingError: _serving_error,
    ObmliteError: _library_error,
    HTTPException: _http_error,
    Exception: _unexpected_error,
}
