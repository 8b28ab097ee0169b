"""`/docs`, the page for people, and `/openapi.json`, which it shows.

Litestar's Swagger plugin expects its script and its style at a content network. Here both come from a wheel
(`swagger-ui-bundle-v2` holds the files and nothing else), so the page works without internet. The page has no inline
script, so the policy that it is sent with allows this server's own files and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, Final

import swagger_ui_bundle
from litestar import Request, get
from litestar.datastructures import ResponseHeader
from litestar.enums import MediaType
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.router import Router

from app.api.answers import Answer, encode
from app.api.controller import OPEN, ApiController
from app.api.openapi import described

_ASSETS: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (("content-security-policy", _POLICY), ("x-content-type-options", "nosniff"))
_START: Final = b"""\
window.onload = function () {
  SwaggerUIBundle({
    spec: JSON.parse(document.getElementById("document").textContent),
    dom_id: "#page", deepLinking: true, docExpansion: "list", validatorUrl: null,
  });
};
"""
_PAGE: Final = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<link rel="stylesheet" href="/docs/swagger-ui.css"></head><body><div id="page"></div>
<script type="application/json" id="document">{document}</script>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></body></html>
"""


class LocalSwagger(OpenAPIRenderPlugin):
    """Swagger UI from this server's own files."""

    def __init__(self) -> None:
        """At the root of the documentation's router."""
        super().__init__(path="/", favicon="", style="")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002 - theirs
        """The page with the document in it."""
        title = escape(f"{openapi_schema['info']['title']} {openapi_schema['info']['version']}")
        document = encode(described(openapi_schema)).decode().replace("<", "\\u003c")
        return _PAGE.format(title=title, document=document).encode()

    def receive_router(self, router: Router) -> None:
        """Litestar's hook for what a page needs beside itself."""
        for name, kind in _ASSETS.items():
            router.register(_asset(name, kind, (swagger_ui_bundle.swagger_ui_path / name).read_bytes))
        router.register(_asset("start.js", "text/javascript", lambda: _START))


class Document(OpenAPIRenderPlugin):
    """The document itself."""

    def __init__(self) -> None:
        """Beside the page."""
        super().__init__(path="/openapi.json", media_type=MediaType.JSON)

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002 - theirs
        """As JSON."""
        return encode(described(openapi_schema))


def _asset(name: str, kind: str, read: Callable[[], bytes]) -> Any:
    """A handler that reads the file for each request: the script has 1.5 MB, which would stay in memory otherwise."""

    @get(f"/{name}", sync_to_thread=False, include_in_schema=False, opt=OPEN)
    def asset() -> Answer[bytes]:
        return Answer(read(), ("content-type", kind), ("cache-control", "max-age=3600"), *_HEADERS)

    return asset


def router() -> Router:
    """The router of the page, which Litestar fills."""
    return Router(
        "/docs",
        route_handlers=[],
        include_in_schema=False,
        opt=OPEN,
        dto=None,
        return_dto=None,
        response_headers=[ResponseHeader(name=name, value=value) for name, value in _HEADERS],
    )


class Docs(ApiController):
    """Beside the page."""

    include_in_schema = False
    opt = OPEN

    @get("/openapi.json", sync_to_thread=False)
    def document(self, request: Request[Any, Any, Any]) -> Answer[bytes]:
        """The OpenAPI document."""
        return Answer(encode(described(request.app.openapi_schema.to_schema())))

    @get("/redoc", sync_to_thread=False)
    def redoc(self) -> Answer[None]:
        """Where the public server has its page."""
        return Answer(None, ("location", "/docs"), status=307)
