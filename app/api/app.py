"""`create_app`: the controllers, Litestar around them, and the two layers around that. Nothing happens at import.

A new endpoint is one handler in one file; a new resource is one line below.
"""

from __future__ import annotations

from typing import Any, Final, cast

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import NotFoundException
from litestar.middleware import AbstractMiddleware
from litestar.router import Router
from litestar.routes import HTTPRoute

from app.api import docs, openapi
from app.api.answers import Answer
from app.api.auth import built_in
from app.api.bodies import StrictBody
from app.api.context import ApiContext
from app.api.controller import ApiController, bound
from app.api.diagnostics import Diagnostics
from app.api.edge import Edge, Gate
from app.api.endpoints import Endpoints
from app.api.errors import NOT_FOUND, Problem, allowed, problem_of
from app.api.health import Server
from app.api.history import History
from app.api.lifecycle import Lifecycle
from app.api.links import Links
from app.api.metrics import Metrics
from app.api.policies import NetworkPolicies
from app.api.request import ApiRequest, check, principal
from app.api.sandboxes import Sandboxes
from app.api.snapshots import Snapshots
from app.api.unserved import refusing

BOTH_MOUNTS: Final[tuple[type[ApiController], ...]] = (
    Sandboxes,
    Lifecycle,
    Endpoints,
    Links,
    Diagnostics,
    NetworkPolicies,
    History,
    Snapshots,
)
"""Served below `/v1` and at the root, as in the contract."""
V1_ONLY: Final[tuple[type[ApiController], ...]] = (Metrics,)
ROOT_ONLY: Final[tuple[type[ApiController], ...]] = (Server, docs.Docs)
_ELSEWHERE: Final = (
    "This server has the role proxy: it carries requests to sandboxes, and answers /health, /ready and /version. "
    "Send this request to a server with the role api or all."
)
_CORS: Final = CORSConfig(
    allow_methods=["DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"],
    expose_headers=[
        "Deprecation",
        "ETag",
        "Idempotency-Replayed",
        "Location",
        "Preference-Applied",
        "Retry-After",
        "Sandledger-Epoch",
        "X-Request-ID",
    ],
)


def create_app(context: ApiContext) -> Litestar:
    """The ASGI application. Opens nothing and starts nothing; the context's owner does."""
    authenticate = context.authenticate or built_in(context.api_key, context.sealer)
    app = Litestar(
        _handlers(context) if context.serves_api else [bound(Server, context)],
        request_class=ApiRequest,
        before_request=cast("Any", check),
        dependencies={"principal": Provide(cast("Any", principal), sync_to_thread=False)},
        dto=StrictBody,
        return_dto=None,
        exception_handlers={Exception: cast("Any", _refuse if context.serves_api else _refuse_elsewhere)},
        cors_config=None if authenticate is None else _CORS,
        openapi_config=(
            openapi.config(docs.router(), docs.LocalSwagger(), docs.Document()) if context.serves_api else None
        ),
        request_max_body_size=None,
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
    )
    router = app.asgi_handler
    cors = router if isinstance(router, AbstractMiddleware) else None
    gate = Gate(
        router if cors is None else cors.app, authenticate, _open_paths(app), loopback_only=context.loopback_only
    )
    if cors is not None:
        cors.app = gate
    app.asgi_handler = Edge(cors or gate, context, _methods(app))
    return app


def _handlers(context: ApiContext) -> list[Any]:
    both = [bound(each, context) for each in BOTH_MOUNTS]
    return [
        Router("/v1", route_handlers=[*both, *(bound(each, context) for each in V1_ONLY), *refusing()]),
        Router("/", route_handlers=[*both, *refusing()], include_in_schema=False),
        *(bound(each, context) for each in ROOT_ONLY),
    ]


def _methods(app: Litestar) -> dict[str, str]:
    """Path -> value of `Allow`. Litestar's own answer to OPTIONS names the methods that were there when it was made."""
    return {each.path_format: allowed(list(each.methods)) for each in app.routes if isinstance(each, HTTPRoute)}


def _open_paths(app: Litestar) -> frozenset[str]:
    routes = [each for each in app.routes if isinstance(each, HTTPRoute) and not each.path_parameters]
    return frozenset(each.path for each in routes if any(handler.opt.get("open") for handler in each.route_handlers))


def _refuse(request: ApiRequest, error: Exception) -> Answer[bytes]:
    handler = cast("dict[str, Any]", cast("object", request.scope)).get("route_handler")
    fields = None if handler is None else handler.parsed_fn_signature.parameters
    problem = request.call.problem = problem_of(error, request.call.request_id, fields)
    return Answer(problem.body, *problem.headers, status=problem.status)


def _refuse_elsewhere(request: ApiRequest, error: Exception) -> Answer[bytes]:
    """As `_refuse`, in a process that has no lifecycle API."""
    return _refuse(request, Problem(404, NOT_FOUND, _ELSEWHERE) if isinstance(error, NotFoundException) else error)
