"""What is compared of an answer, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
from msgspec import Struct

COMPARED = (
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "allow",
    "content-type",
    "date",
    "deprecation",
    "location",
    "retry-after",
    "server",
    "vary",
    "www-authenticate",
    "x-request-id",
)
PRESENCE = {"date", "location", "x-request-id"}
"""Headers whose values differ by nature."""
ABSENT = "absent"


class Seen(Struct, frozen=True):
    """One answer."""

    status: int
    headers: dict[str, str]
    code: str
    shape: dict[str, str]
    """Path in the JSON -> kind of value."""

    @classmethod
    def of(cls, answer: httpx.Response) -> Seen:
        headers = {name: _header(name, answer.headers[name]) for name in COMPARED if name in answer.headers}
        body: Any = None
        if headers.get("content-type") == "application/json" and answer.content:
            body = answer.json()
        elif answer.content:
            return cls(answer.status_code, headers, ABSENT, {"$": "text"})
        if isinstance(body, dict) and "openapi" in body:
            return cls(answer.status_code, headers, ABSENT, {"$": "document"})  # each has its own
        code = str(body.get("code", ABSENT)) if isinstance(body, dict) else ABSENT
        return cls(answer.status_code, headers, code, dict(_shape(body)) if answer.content else {})


class Discrepancy(Struct, frozen=True):
    """`what` is `status`, `code`, `header NAME` or `body PATH`."""

    case: str
    what: str
    theirs: str
    ours: str

    def __str__(self) -> str:
        return f"{self.case}: {self.what}: theirs {self.theirs}, ours {self.ours}"


def compare(case: str, theirs: Seen, ours: Seen) -> Iterator[Discrepancy]:
    """Where the statuses differ, code and body follow from that and are not compared."""
    pairs = [("status", str(theirs.status), str(ours.status))]
    pairs += [
        (f"header {name}", theirs.headers.get(name, ABSENT), ours.headers.get(name, ABSENT))
        for name in sorted(theirs.headers.keys() | ours.headers.keys())
        if name != "content-type" or theirs.status == ours.status
    ]
    if theirs.status == ours.status:
        pairs.append(("code", theirs.code, ours.code))
        for path in sorted(theirs.shape.keys() | ours.shape.keys()):
            pairs.append((f"body {path}", theirs.shape.get(path, ABSENT), ours.shape.get(path, ABSENT)))
    return (Discrepancy(case, what, one, other) for what, one, other in pairs if one != other)


def _header(name: str, value: str) -> str:
    if name in PRESENCE:
        return "present"
    if name == "content-type":
        return value.partition(";")[0].strip()
    return ", ".join(sorted(part.strip() for part in value.split(",")))


def _shape(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """A list has the shape of its first item."""
    if isinstance(value, dict):
        yield path, "object"
        for key, each in value.items():
            yield from _shape(each, f"{path}.{key}")
    elif isinstance(value, list):
        yield path, "list"
        for each in value[:1]:
            yield from _shape(each, f"{path}[]")
    else:
        yield path, "null" if value is None else type(value).__name__


def dumped(seen: dict[str, Seen]) -> str:
    """For people who look into a difference."""
    return json.dumps(
        {name: [each.status, each.code, each.headers, each.shape] for name, each in seen.items()}, indent=1
    )
