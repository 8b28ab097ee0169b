"""The requests that both servers get. A path names sandboxes by what they are: `{absent}`, `{running}`, `{paused}`.

Order counts: the last ones change or end what they are sent to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec import UNSET, Struct, field

ABSENT = "00000000-0000-4000-8000-00000000dead"
BODY: dict[str, Any] = {
    "image": {"uri": "IMAGE"},
    "entrypoint": ["sleep", "3600"],
    "timeout": 600,
    "resourceLimits": {"cpu": "250m", "memory": "64Mi"},
    "metadata": {"made-by": "differential"},
}
GET_ROUTES = (
    "/sandboxes",
    "/sandboxes/{running}",
    "/sandboxes/{running}/endpoints/44772",
    "/snapshots",
    "/snapshots/{absent}",
    "/sandboxes/{running}/diagnostics/logs?scope=container",
    "/sandboxes/{running}/diagnostics/events?scope=runtime",
    "/sandboxes/{running}/diagnostics/inspect",
    "/sandboxes/{running}/networkpolicy",
    "/pools",
    "/pools/p",
    "/templates",
    "/templates/t",
)
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("DELETE", "/sandboxes/{absent}", None),
    ("PATCH", "/sandboxes/{absent}/metadata", {"a": "b"}),
    ("POST", "/sandboxes/{absent}/pause", None),
    ("POST", "/sandboxes/{absent}/resume", None),
    ("POST", "/sandboxes/{absent}/renew-expiration", {"expiresAt": "2999-01-01T00:00:00Z"}),
    ("GET", "/sandboxes/{absent}", None),
    ("GET", "/sandboxes/{absent}/endpoints/44772", None),
    ("POST", "/sandboxes/{absent}/snapshots", {}),
    ("GET", "/sandboxes/{absent}/diagnostics/logs?scope=container", None),
    ("GET", "/sandboxes/{absent}/diagnostics/logs", None),
    ("GET", "/sandboxes/{absent}/diagnostics/events?scope=runtime", None),
    ("GET", "/sandboxes/{absent}/diagnostics/inspect", None),
    ("GET", "/sandboxes/{absent}/diagnostics/summary", None),
    ("GET", "/sandboxes/{absent}/networkpolicy", None),
    ("DELETE", "/snapshots/{absent}", None),
    ("GET", "/snapshots/{absent}", None),
    ("GET", "/sandboxes/{absent}/proxy/8080/", None),
    ("POST", "/sandboxes/{absent}/proxy/8080/x?y=1", {}),
)


class Case(Struct, frozen=True):
    """One request."""

    name: str
    method: str
    path: str
    body: Any = UNSET
    """JSON; bytes are sent as they are."""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    key: str | None = "right"
    """Which API key is sent."""

    def content(self, image: str) -> bytes | None:
        if self.body is UNSET:
            return None
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).replace("IMAGE", image).encode()


def every() -> list[Case]:
    """In the order in which they are sent; names are unique."""
    families = (keys(), absent(), mounts(), methods(), lists(), endpoints(), creates(), patches(), renewals(), others())
    return [case for family in (*families, proxied(), powers(), ends()) for case in family]


def keys() -> Iterator[Case]:
    for key in (None, "wrong"):
        for path in (*GET_ROUTES, "/sandboxes/{running}/nothing", "/nothing"):
            yield Case(f"key {key} GET {path}", "GET", f"/v1{path}", key=key)
        for method, path, body in CHANGES:
            if method != "GET" and "/proxy/" not in path:
                yield Case(f"key {key} {method} {path}", method, f"/v1{path}", UNSET if body is None else body, key=key)
        yield Case(f"key {key} POST /sandboxes", "POST", "/v1/sandboxes", {}, key=key)
        for path in ("/health", "/version"):
            yield Case(f"key {key} GET {path}", "GET", path, key=key)


def absent() -> Iterator[Case]:
    for method, path, body in CHANGES:
        yield Case(f"absent {method} {path}", method, f"/v1{path}", UNSET if body is None else body)
    for word in ("not-a-uuid", "x" * 300, "%20", "..%2F..", "0", "fsb-" + ABSENT):
        yield Case(f"odd id {word[:12]}", "GET", f"/v1/sandboxes/{word}")
        yield Case(f"odd id {word[:12]} endpoint", "GET", f"/v1/sandboxes/{word}/endpoints/8080")


def mounts() -> Iterator[Case]:
    """Without a prefix too."""
    for path in ("/sandboxes", "/sandboxes/{running}", "/sandboxes/{absent}", "/pools", "/templates", "/snapshots"):
        yield Case(f"bare GET {path}", "GET", path)
    for path in ("/health", "/version", "/openapi.json", "/docs", "/v1/health", "/v1/version", "/v2/sandboxes", "/"):
        yield Case(f"other GET {path}", "GET", path)
    yield Case("slash at the end", "GET", "/v1/sandboxes/")
    yield Case("bare metrics", "POST", "/metrics/events", {"eventType": "sandbox.create"})


def methods() -> Iterator[Case]:
    for path, wrong in (
        ("/sandboxes", ("PUT", "PATCH", "DELETE")),
        ("/sandboxes/{running}", ("PUT", "PATCH", "POST")),
        ("/sandboxes/{running}/pause", ("GET", "PUT", "DELETE")),
        ("/sandboxes/{running}/metadata", ("GET", "PUT", "POST")),
        ("/sandboxes/{running}/renew-expiration", ("GET", "PUT")),
        ("/sandboxes/{running}/endpoints/8080", ("POST", "DELETE")),
        ("/metrics/events", ("GET",)),
        ("/snapshots", ("POST", "DELETE")),
    ):
        for method in wrong:
            yield Case(f"method {method} {path}", method, f"/v1{path}")
    yield Case(
        "preflight",
        "OPTIONS",
        "/v1/sandboxes",
        headers={"Origin": "http://a.example", "Access-Control-Request-Method": "POST"},
        key=None,
    )
    yield Case("an origin", "GET", "/v1/sandboxes", headers={"Origin": "http://a.example"})
    yield Case("a request id", "GET", "/v1/sandboxes/{absent}", headers={"X-Request-ID": "of-the-client"})


def lists() -> Iterator[Case]:
    for query in (
        "page=1", "page=2", "page=0", "page=-1", "page=x", "page=1.5", "page=", "page=999999",
        "pageSize=1", "pageSize=200", "pageSize=201", "pageSize=0", "pageSize=x", "page=1&pageSize=1&page=2",
        "state=Running", "state=running", "state=RUNNING", "state=", "state=Nonsense", "state=Running&state=Paused",
        "metadata=made-by%3Ddifferential", "metadata=made-by%3Dother", "metadata=", "metadata=nonsense",
        "metadata=%26", "metadata=a%3D1%26a%3D2", "metadata=%3Dx", "metadata=a%3D", "metadata=a%253Db%3Dc", "unknown=1",
    ):  # fmt: skip
        yield Case(f"list {query}", "GET", f"/v1/sandboxes?{query}")


def endpoints() -> Iterator[Case]:
    one = "/v1/sandboxes/{running}/endpoints"
    for port in (
        "1",
        "8080",
        "3000",
        "18080",
        "44772",
        "65535",
        "0",
        "-1",
        "65536",
        "99999999999",
        "x",
        "1.5",
        "%20",
        "8080x",
    ):
        yield Case(f"port {port}", "GET", f"{one}/{port}")
        yield Case(f"port {port} proxied", "GET", f"{one}/{port}?use_server_proxy=true")
    for value in (
        "true",
        "false",
        "1",
        "0",
        "yes",
        "NO",
        "on",
        "Off",
        "t",
        "F",
        "y",
        "n",
        "TRUE",
        "",
        "maybe",
        "2",
        "%20true",
    ):
        yield Case(f"use_server_proxy={value}", "GET", f"{one}/8080?use_server_proxy={value}")
    for value in ("0", "1", "9999999999", "-1", "x", "", "99999999999999999999999"):
        yield Case(f"expires={value}", "GET", f"{one}/8080?expires={value}")
        yield Case(f"expires={value} proxied", "GET", f"{one}/8080?expires={value}&use_server_proxy=true")
    yield Case("endpoint bare", "GET", "/sandboxes/{running}/endpoints/8080?use_server_proxy=true")


def _with(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (BODY | changes).items() if value is not ...}


def creates() -> Iterator[Case]:
    """Only those that nobody accepts."""
    values: dict[str, tuple[Any, ...]] = {
        "image": (..., None, "busybox", {}, {"uri": ""}, {"uri": " "}, {"uri": 1}, {"uri": None}, {"uri": "IMAGE", "auth": {}},
                  {"uri": "IMAGE", "auth": {"username": "u"}}, {"uri": "IMAGE", "auth": "x"}, []),
        "entrypoint": (..., None, [], "sleep", [1], [None], {"a": 1}),
        "timeout": (0, 59, -1, "x", 1.5, "600x", [], 10**30),
        "resourceLimits": (..., None, [], "x", {"cpu": 1}, {"cpu": "x"}, {"cpu": "0"}, {"cpu": "-1"}, {"memory": "x"}, {"memory": "0"},
                           {"memory": "-1Mi"}, {"memory": "1Mi2"}, {"gpu": "x"}, {"gpu": "0"}),
        "env": ([], "x", {"A": 1}, {"A": ["x"]}, {"OPENSANDBOX_LIFECYCLE": "x"}),
        "metadata": ([], "x", {"a": 1}, {"a": None}, {"opensandbox.io/x": "1"}, {"a b": "c"}, {"a": "b c"}, {"": "x"}, {"a": "x" * 64},
                     {"x" * 64: "a"}, {"-a": "b"}, {"UPPER.example/x/y": "b"}),
        "platform": ("x", {}, {"os": "linux"}, {"os": "linux", "arch": "x"}, {"os": "beos", "arch": "amd64"}),
        "snapshotId": ("x", ABSENT),
        "templateId": ("", "t"),
        "secureAccess": (True, "x", 7),
        "networkPolicy": ("x", {"egress": "x"}, {"egress": [{"action": "allow"}]}, {"egress": [{"action": "allow", "target": ""}]}),
        "credentialProxy": ("x", {"enabled": "x"}, {"enabled": True}),
        "lifecycle": ("x", {"preStart": {}}, {"preStart": {"command": [""]}}, {"unknown": 1}, {"preStart": {"command": ["x"]}}),
        "volumes": ("x", [{}], [{"name": "a"}], [{"name": "a", "mountPath": "x", "host": {"path": "/x"}}], [{"name": "A", "mountPath": "/x", "host": {"path": "/x"}}],
                    [{"name": "a", "mountPath": "/x"}], [{"name": "a", "mountPath": "/x", "host": {"path": "/etc"}}],
                    [{"name": "a", "mountPath": "/x", "host": {"path": "/etc"}, "pvc": {"claimName": "c"}}],
                    [{"name": "a", "mountPath": "/x", "pvc": {"claimName": "No"}}]),
        "extensions": ([], "x", {"a": 1}, {"access.renew.extend.seconds": "x"}, {"access.renew.extend.seconds": "1"}, {"poolRef": "p"}),
    }  # fmt: skip
    for name, tried in values.items():
        for number, value in enumerate(tried):
            yield Case(f"create {name} {number}: {str(value)[:60]}", "POST", "/v1/sandboxes", _with(**{name: value}))
    yield Case("create both sources", "POST", "/v1/sandboxes", _with(snapshotId=ABSENT, entrypoint=...))
    as_json = {"Content-Type": "application/json"}
    for number, raw in enumerate((b"", b"{", b"null", b"[]", b'"x"', b"1", b"\xff", b'{"a":}', b"{} {}")):
        yield Case(f"create raw {number}: {raw!r}", "POST", "/v1/sandboxes", raw, as_json)
    yield Case("create as text", "POST", "/v1/sandboxes", json.dumps(BODY).encode(), {"Content-Type": "text/plain"})
    yield Case(
        "create as form", "POST", "/v1/sandboxes", b"image=x", {"Content-Type": "application/x-www-form-urlencoded"}
    )


def patches() -> Iterator[Case]:
    path = "/v1/sandboxes/{running}/metadata"
    for number, body in enumerate(
        ({}, {"a": "b"}, {"a": None}, {"absent": None}, {"a": 1}, {"a": []}, [], "x", None, {"opensandbox.io/x": "1"},
         {"opensandbox.io/x": None}, {"a b": "c"}, {"a": "b c"}, {"": "x"}, {"a": "x" * 64}, {"a.example/b": "c"}, {"a": ""})
    ):  # fmt: skip
        yield Case(f"patch {number}: {str(body)[:40]}", "PATCH", path, body)
    for raw in (b"", b"{", b"\xff"):
        yield Case(f"patch raw {raw!r}", "PATCH", path, raw, {"Content-Type": "application/json"})


def renewals() -> Iterator[Case]:
    path = "/v1/sandboxes/{running}/renew-expiration"
    for number, body in enumerate(
        ({"expiresAt": "2030-01-01T00:00:00Z"}, {"expiresAt": "2030-01-01T00:00:00"}, {"expiresAt": "2030-01-01T00:00:00+02:00"},
         {"expiresAt": "2030-01-01 00:00:00Z"}, {"expiresAt": "2030-01-01"}, {"expiresAt": "2020-01-01T00:00:00Z"}, {"expiresAt": "x"},
         {"expiresAt": ""}, {"expiresAt": None}, {"expiresAt": []}, {"expiresAt": True}, {}, [], None, {"expires_at": "2030-01-01T00:00:00Z"},
         {"expiresAt": "2030-13-01T00:00:00Z"}, {"expiresAt": "2030-01-01T00:00:00.123456789Z"}, {"expiresAt": "2030-01-01T00:00:00Z", "more": 1})
    ):  # fmt: skip
        yield Case(f"renew {number}: {str(body)[:50]}", "POST", path, body)


def others() -> Iterator[Case]:
    path = "/v1/metrics/events"
    event = {"eventType": "sandbox.create", "createDurationMs": 5, "success": True}
    for number, body in enumerate(
        (event, event | {"sandboxId": "x", "image": "y"}, event | {"eventType": "other"}, event | {"createDurationMs": -1},
         event | {"success": "maybe"}, {}, [], event | {"more": 1})
    ):  # fmt: skip
        yield Case(f"metrics {number}", "POST", path, body)
    for method, there, body in (
        ("POST", "/pools", {}), ("PUT", "/pools/p", {}), ("DELETE", "/pools/p", UNSET), ("GET", "/pools/p", UNSET),
        ("POST", "/templates", {}), ("DELETE", "/templates/t", UNSET), ("GET", "/templates/t", UNSET),
    ):  # fmt: skip
        yield Case(f"unserved {method} {there}", method, f"/v1{there}", body)
    for query in (
        "",
        "?scope=container",
        "?scope=all",
        "?scope=nonsense",
        "?scope=",
        "?tail=0",
        "?tail=5",
        "?since=1m",
    ):
        yield Case(f"logs {query}", "GET", "/v1/sandboxes/{running}/diagnostics/logs" + query)
    for query in ("", "?scope=runtime", "?scope=all", "?scope=nonsense", "?limit=0", "?limit=5"):
        yield Case(f"events {query}", "GET", "/v1/sandboxes/{running}/diagnostics/events" + query)
    for kind in ("inspect", "summary"):
        yield Case(f"diagnostics {kind}", "GET", "/v1/sandboxes/{running}/diagnostics/" + kind)


def proxied() -> Iterator[Case]:
    one = "/v1/sandboxes/{running}/proxy"
    yield Case("proxy ping", "GET", f"{one}/44772/ping")
    yield Case("proxy bare ping", "GET", "/sandboxes/{running}/proxy/44772/ping")
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        yield Case(f"proxy {method} nothing listens", method, f"{one}/3999/x")
        yield Case(f"proxy {method} not there", method, f"{one}/44772/nothing")
    for port in ("0", "65536", "x", "-1"):
        yield Case(f"proxy port {port}", "GET", f"{one}/{port}/")
    yield Case("proxy files info", "GET", f"{one}/44772/files/info?path=/etc/passwd")
    yield Case("proxy missing file", "GET", f"{one}/44772/files/info?path=/absent")
    yield Case("proxy command", "POST", f"{one}/44772/command", {"command": "echo x"})
    yield Case("proxy without a slash", "GET", f"{one}/44772")


def powers() -> Iterator[Case]:
    yield Case("pause a paused one", "POST", "/v1/sandboxes/{paused}/pause")
    yield Case("get a paused one", "GET", "/v1/sandboxes/{paused}")
    yield Case("endpoint of a paused one", "GET", "/v1/sandboxes/{paused}/endpoints/8080")
    yield Case(
        "renew a paused one", "POST", "/v1/sandboxes/{paused}/renew-expiration", {"expiresAt": "2030-01-01T00:00:00Z"}
    )
    yield Case("resume it", "POST", "/v1/sandboxes/{paused}/resume")
    yield Case("resume it again", "POST", "/v1/sandboxes/{paused}/resume")
    yield Case("pause it", "POST", "/v1/sandboxes/{paused}/pause")
    yield Case(
        "renew one without an end",
        "POST",
        "/v1/sandboxes/{endless}/renew-expiration",
        {"expiresAt": "2030-01-01T00:00:00Z"},
    )
    yield Case("get one without an end", "GET", "/v1/sandboxes/{endless}")
    yield Case("get an exited one", "GET", "/v1/sandboxes/{exited}")
    yield Case("pause an exited one", "POST", "/v1/sandboxes/{exited}/pause")
    yield Case("resume an exited one", "POST", "/v1/sandboxes/{exited}/resume")
    yield Case("endpoint of an exited one", "GET", "/v1/sandboxes/{exited}/endpoints/8080")


def ends() -> Iterator[Case]:
    for name in ("running", "paused", "exited", "endless"):
        yield Case(f"delete {name}", "DELETE", f"/v1/sandboxes/{{{name}}}")
        yield Case(f"delete {name} again", "DELETE", f"/v1/sandboxes/{{{name}}}")
        yield Case(f"get {name} after that", "GET", f"/v1/sandboxes/{{{name}}}")
    yield Case("pause a deleted one", "POST", "/v1/sandboxes/{running}/pause")
    yield Case(
        "renew a deleted one", "POST", "/v1/sandboxes/{running}/renew-expiration", {"expiresAt": "2030-01-01T00:00:00Z"}
    )
    yield Case("endpoint of a deleted one", "GET", "/v1/sandboxes/{running}/endpoints/8080")
    yield Case("proxy to a deleted one", "GET", "/v1/sandboxes/{running}/proxy/44772/ping")
    yield Case("patch a deleted one", "PATCH", "/v1/sandboxes/{running}/metadata", {"a": "b"})
