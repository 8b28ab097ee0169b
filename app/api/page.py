"""`/openapi.json`, and `/docs`: the same document as one static page for people.

The page needs no script, no font and no image, so it works without internet and under the strictest content policy,
and it is rendered once. Viewers that are bundled for Python are either years old and do not read OpenAPI 3.1, or need
another web framework.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from html import escape
from typing import Any, Final

import msgspec
from litestar.response.base import ASGIResponse

from app.api.call import Call

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE: Final = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { padding: .75rem; overflow-x: auto; border: 1px solid #8884; border-radius: 4px; }
details { border: 1px solid #8884; border-radius: 4px; margin: .5rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid #8883; }
"""


def endpoints(document: Mapping[str, Any]) -> Mapping[str, Callable[[Call], Awaitable[ASGIResponse]]]:
    """Path -> endpoint."""
    as_json = msgspec.json.encode(document)
    as_page = "".join(_page(document)).encode()

    async def openapi(_call: Call) -> ASGIResponse:
        return ASGIResponse(body=as_json)

    async def docs(_call: Call) -> ASGIResponse:
        headers = [("content-security-policy", _POLICY), ("x-content-type-options", "nosniff")]
        return ASGIResponse(body=as_page, media_type="text/html", headers=headers)

    async def redoc(_call: Call) -> ASGIResponse:
        return ASGIResponse(status_code=307, headers=[("location", "/docs")], media_type="text/plain")

    return {"/openapi.json": openapi, "/docs": docs, "/redoc": redoc}


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}</h1>'
    yield from (f"<p>{_text(part)}</p>" for part in info["description"].split("\n\n"))
    key = document["components"]["securitySchemes"]["key"]["name"]
    yield f"<p>The API key goes into the header <code>{escape(key)}</code>. "
    yield 'The same as <a href="/openapi.json">openapi.json</a>.</p>'
    tags: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append("".join(_operation(method, path, operation)))
    for tag, operations in tags.items():
        yield f"<h2>{escape(tag)}</h2>{''.join(operations)}"
    yield "<h2>shapes</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<details id="{escape(name)}"><summary><code>{escape(name)}</code> '
        yield f"{_text(schema.get('description', ''))}</summary>"
        yield f"<pre>{escape(json.dumps(schema, indent=2))}</pre></details>"
    yield "</body></html>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
    yield f"{escape(operation['summary'])}</summary>"
    if description := operation.get("description"):
        yield f"<p>{_text(description)}</p>"
    if parameters := operation.get("parameters"):
        yield "<h4>Parameters</h4><table>"
        for each in parameters:
            about = each.get("description") or each["schema"].get("description", "")
            yield f"<tr><td><code>{escape(each['name'])}</code><td>{each['in']}"
            yield f"<td>{_kind(each['schema'])}<td>{_text(about)}"
        yield "</table>"
    if body := operation.get("requestBody"):
        media, content = next(iter(body["content"].items()))
        yield f"<h4>Body</h4><p>{escape(media)}: {_kind(content['schema'])}</p>"
    yield "<h4>Answers</h4><table>"
    for status, answer in operation["responses"].items():
        kinds = ", ".join(_kind(content["schema"]) for content in answer.get("content", {}).values())
        yield f"<tr><td>{status}<td>{_text(answer['description'])}<td>{kinds}"
    yield "</table></details>"


def _kind(schema: Mapping[str, Any]) -> str:
    if reference := schema.get("$ref"):
        name = escape(reference.rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    bounds = [f"{word} {schema[word]}" for word in ("minimum", "maximum", "default") if word in schema]
    return escape(" ".join([str(schema.get("type", "")), *bounds]))


def _text(markdown: str) -> str:
    """Escaped, with `code`."""
    pieces = escape(markdown, quote=False).split("`")
    return "".join(f"<code>{piece}</code>" if n % 2 else piece for n, piece in enumerate(pieces))
