"""`create_app`: the router from the tables, Litestar around it, the edge around that. No globals, nothing at import."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeAlias

from litestar import Litestar, Request, Response, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.response.base import ASGIResponse
from msgspec import Struct

from app.api import document, page
from app.api.call import Call
from app.api.context import ApiContext
from app.api.edge import Edge, call_of
from app.api.errors import allowed, problem_of
from app.api.health import ServerState
from app.api.operations import BOTH_MOUNTS, CONTRACT, SERVER, Operation
from app.api.sandboxes import Sandboxes
from app.api.unserved import UNSERVED, Refusing

Endpoint: TypeAlias = Callable[[Call], Awaitable[ASGIResponse]]
AnyRequest: TypeAlias = Request[Any, Any, Any]


class Route(Struct, frozen=True):
    """One method on one path, mounted."""

    method: str
    path: str
    endpoint: Endpoint
    command: str | None = None
    open: bool = False


def create_app(context: ApiContext) -> Litestar:
    """The ASGI application. Opens nothing and starts nothing; the context's owner does."""
    routes = list(_routes(context))
    app = Litestar(
        list(_handlers(routes)),
        openapi_config=None,
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
        exception_handlers={Exception: _refuse},
    )
    open_paths = frozenset(each.path for each in routes if each.open)
    app.asgi_handler = Edge(app.asgi_handler, context, open_paths)
    return app


def _endpoints(context: ApiContext) -> Mapping[str, Endpoint]:
    sandboxes, server = Sandboxes(context), ServerState(context)
    return {
        "createSandbox": sandboxes.create,
        "listSandboxes": sandboxes.list,
        "getSandbox": sandboxes.get,
        "deleteSandbox": sandboxes.delete,
        "patchSandboxMetadata": sandboxes.patch_metadata,
        "pauseSandbox": sandboxes.pause,
        "resumeSandbox": sandboxes.resume,
        "renewSandboxExpiration": sandboxes.renew,
        "listSandboxEvents": sandboxes.events,
        "reportMetricsEvent": sandboxes.report_metrics,
        "health": server.health,
        "ready": server.ready,
        "version": server.version,
    }


def _routes(context: ApiContext) -> Iterator[Route]:
    endpoints = _endpoints(context)
    for operation in (*CONTRACT, *SERVER):
        for mount in operation.mounts:
            yield _mounted(operation, mount, endpoints[operation.name])
    for part in UNSERVED:
        for path, methods in part.routes.items():
            for method in methods:
                refused = Operation(name="", method=method, path=path, summary=part.what, answers={})
                for mount in BOTH_MOUNTS:
                    yield _mounted(refused, mount, Refusing(part))
    described = document.build()
    for path, endpoint in page.endpoints(described).items():
        yield Route("GET", path, endpoint, open=True)


def _mounted(operation: Operation, mount: str, endpoint: Endpoint) -> Route:
    return Route(operation.method, f"{mount}{operation.path}", endpoint, operation.command, operation.open)


def _handlers(routes: list[Route]) -> Iterator[HTTPRouteHandler]:
    methods: dict[str, list[str]] = {}
    for each in routes:
        methods.setdefault(each.path, []).append(each.method)
    for path, taken in methods.items():
        # First, or Litestar has already made one of its own, which does not know of HEAD.
        yield _handler(Route("OPTIONS", path, _Options(allowed(taken))))
    for each in routes:
        yield _handler(each)


def _handler(mounted: Route) -> HTTPRouteHandler:
    async def handle(request: AnyRequest) -> ASGIResponse:
        call = call_of(request.scope)
        call.find_sandbox(request.scope["path_params"])
        call.command = mounted.command
        await call.check_length()
        return await mounted.endpoint(call)

    path = mounted.path.replace("*}", ":path}")
    typed = "/".join(part.replace("}", ":str}") if ":" not in part else part for part in path.split("/"))
    return route(typed, http_method=[HttpMethod(mounted.method)], status_code=200)(handle)


class _Options:
    def __init__(self, allow: str) -> None:
        self._allow = allow

    async def __call__(self, _call: Call) -> ASGIResponse:
        return ASGIResponse(status_code=204, headers=[("allow", self._allow)], media_type="text/plain")


def _refuse(request: AnyRequest, error: Exception) -> Response[bytes]:
    call = call_of(request.scope)
    problem = call.problem = problem_of(error, call.request_id)
    return Response(
        problem.body, status_code=problem.status, headers=dict(problem.headers), media_type="application/json"
    )
