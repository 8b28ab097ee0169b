"""The configuration of an nginx in front: it asks for each request to a sandbox (`app.proxy.decide`), and carries the
bytes of those that it may carry. Pure: from a plan to text.

It is for the `http` block of nginx 1.18 or newer, with the module `auth_request`, which distributions build in.

* The path is taken as it was sent (`$request_uri`). nginx decodes and joins only what it chooses a `location` by, and
  that is one place for all of these requests. `merge_slashes off` keeps it from refusing what it would join.
* **401** of the question, and 401 of the program in the sandbox where the request may be repeated, go to our server
  with the same request. The second is because the agent of another sandbox says 401, see `app.proxy.http`. A request
  that may act in the sandbox is never sent twice.
* `X-Accel-*` of a sandbox would steer nginx, to its internal places too, so it is ignored and removed.
* The secret stands in a file of its own that only nginx's master process has to read.
* No access log: nginx's own format writes queries, and they may hold what opens a sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from app.proxy.decide import (
    ANSWERED,
    ASKED,
    BY_HOST,
    BY_PATH,
    CLIENT,
    FORM,
    HOST,
    LENGTH,
    METHOD,
    OURS,
    PATH,
    PROTOCOL,
    REMOVED,
    REMOVED_BY_PATH,
    SCHEME,
    SECRET,
    SET,
    UPGRADE,
    URI,
    set_by,
)
from app.proxy.heads import OF_AN_ORIGIN

AWAY_CODE: Final = "PROXY::SERVER_AWAY"
"""Nobody answers whom nginx could ask."""
_AWAY: Final = (
    "The server behind nginx does not answer, or ended before it did; it may be starting. If the request may have "
    "changed something, look before you send it again."
)
_NO_ANSWER: Final = (
    "nginx got no answer from the sandbox: the connection ended, or nothing came for an hour. The program there may "
    "have acted all the same."
)
_NOT_CONNECTED: Final = "nginx got no connection to the sandbox; the program there, or its agent, may have ended."
_HIDDEN: Final = ("Sandledger-Error", "Sandledger-Epoch", "Sandledger-Generation", "X-Sendfile")
_FAILED: Final = "400 403 404 405 408 413 414 429 431 500 501 502 503 504 508"
"""Whatever else than a decision the question brings."""
_SAID: Final = {
    CLIENT: "$remote_addr",
    SCHEME: "$scheme",
    METHOD: "$request_method",
    URI: "$request_uri",
    HOST: "$http_host",
    UPGRADE: "$http_upgrade",
    LENGTH: "$http_content_length$http_transfer_encoding",
    PROTOCOL: "$server_protocol",
}


class Plan(Struct, frozen=True):
    """What the operator has chosen. The values are checked before (`app.cli.nginx`): here they are only written."""

    version: str
    listen: str
    proxy: str
    """`host:port` of a server with the role `proxy`, `api` or `all`: decisions, and what nginx may not carry."""
    api: str
    """The same of one that has the lifecycle API."""
    secret_file: str
    domain: str = ""
    """Of the form with the host; empty = there is none."""
    tls: tuple[str, str] | None = None
    """Files of the certificate and of its key."""
    keep_seconds: int = 15
    """How long a connection for questions is kept. Shorter than the server keeps it."""


def secret_text(secret: str) -> str:
    """The file with the secret."""
    return f"# Written by `sandledger nginx`. Keep it readable for its owner only.\n{_set(SECRET, secret)}\n"


def configuration(plan: Plan) -> str:
    """The file."""
    servers = [_server(plan, by_host=False), *([_server(plan, by_host=True)] if plan.domain else [])]
    head = _HEAD.replace("@version@", plan.version).replace("@proxy@", plan.proxy).replace("@api@", plan.api)
    return head.replace("@keep@", str(plan.keep_seconds)) + "".join(f"\n{each}" for each in servers)


def _server(plan: Plan, *, by_host: bool) -> str:
    ssl = "" if plan.tls is None else " ssl"
    default = "" if by_host else " default_server"
    names = f"server_name *.{plan.domain};" if by_host else "server_name _;"
    tls = [] if plan.tls is None else [f'ssl_certificate "{plan.tls[0]}";', f'ssl_certificate_key "{plan.tls[1]}";']
    lines = {
        "@listen@": [f"listen {plan.listen}{ssl}{default};", names, *tls],
        "@choose@": list(_ALL if by_host else _PROXIED),
        "@asked@": _asked(BY_HOST if by_host else BY_PATH),
        "@passed@": [f'include "{plan.secret_file}";', *(_set(name, _SAID[name]) for name in (CLIENT, SCHEME))],
        "@answer@": [
            f"auth_request_set {_variable(name)} $upstream_http_{_snake(name)};"
            for name in (*ANSWERED, *map(set_by, SET))
        ],
        "@headers@": _headers(by_host=by_host),
        "@hidden@": [f"proxy_hide_header {name};" for name in _hidden(by_host=by_host)],
        "@secret@": [f'include "{plan.secret_file}";'],
        "@path@": [PATH],
    }
    text = _SERVER
    for mark, made in lines.items():
        text = _fill(text, mark, made)
    for mark, code, message in (
        ("@away@", AWAY_CODE, _AWAY),
        ("@unreachable@", "$sandledger_fault", "$sandledger_fault_text"),
    ):
        text = text.replace(mark, f'{{"code":"{code}","message":"{message}"}}')
    return text


def _asked(form: bytes) -> list[str]:
    values = {**_SAID, FORM: form.decode()}
    return [_set(name, values[name]) for name in ASKED]


def _headers(*, by_host: bool) -> list[str]:
    """For the request to the sandbox. What a client writes under one of our own names never passes."""
    removed = (*REMOVED, *(() if by_host else REMOVED_BY_PATH), SECRET, *dict.fromkeys((*ASKED, *ANSWERED)))
    return [
        *(_set(name, _variable(set_by(name))) for name in SET),
        *(_set(name, "") for name in (*removed, *map(set_by, SET))),
        "proxy_set_header Upgrade $sandledger_upgrade;",
        "proxy_set_header Connection $sandledger_connection;",
    ]


def _hidden(*, by_host: bool) -> list[str]:
    answered = [_named(name) for name in (SECRET, *dict.fromkeys((*ASKED, *ANSWERED)))]
    return [*_HIDDEN, *answered, *([] if by_host else [_named(name) for name in sorted(OF_AN_ORIGIN)])]


def _fill(text: str, mark: str, lines: list[str]) -> str:
    """Put these lines where the mark is, as far in as it is."""
    done: list[str] = []
    for line in text.split("\n"):
        indent, found, rest = line.partition(mark)
        if found and not indent.strip() and not rest:
            done += [f"{indent}{each}" for each in lines]
        else:
            done.append(line.replace(mark, lines[0]))
    return "\n".join(done)


def _set(name: bytes, value: str) -> str:
    written = value or '""'
    return f"proxy_set_header {_named(name)} {written};"


def _named(name: bytes) -> str:
    return "-".join(part.capitalize() for part in name.decode().split("-"))


def _snake(name: bytes) -> str:
    return name.decode().replace("-", "_")


def _variable(name: bytes) -> str:
    return f"$sandledger_{_snake(name.removeprefix(OURS))}"


# Questions pass here too: a server's rules hold for subrequests, whose $request_uri is that of the request.
_PROXIED: Final[Sequence[str]] = (
    "set $sandledger_asks $request_uri;",
    'if ($uri = /.sandledger/decide) { set $sandledger_asks ""; }',
    'if ($sandledger_asks ~ "^(?:/v1)?/sandboxes/[0-9A-Fa-f-]+/proxy/") {',
    "    rewrite ^ /.sandledger/$sandledger_way last;",
    "}",
)
_ALL: Final[Sequence[str]] = ("if ($uri != /.sandledger/decide) { rewrite ^ /.sandledger/$sandledger_way last; }",)
_HEAD: Final = r"""# Printed by `sandledger nginx`, version @version@. It belongs into the block `http` of nginx.

# A request without a body that changes nothing may be sent twice.
map "$request_method|$http_content_length|$http_transfer_encoding" $sandledger_way {
    default act;
    "~^(?:GET|HEAD|OPTIONS)\|0?\|$" read;
}
map $http_upgrade $sandledger_hop_upgrade {
    default "";
    "~*^websocket$" websocket;
}
map $sandledger_hop_upgrade $sandledger_hop_connection {
    default close;
    websocket Upgrade;
}
map $sandledger_upgrade $sandledger_connection {
    default close;
    websocket Upgrade;
}
map $upstream_http_x_request_id $sandledger_answer_id {
    default "";
    "" $sandledger_set_x_request_id;
}
map $upstream_connect_time $sandledger_fault {
    default BACKEND_RESPONSE_FAILED;
    "~^-?$" BACKEND_CONNECTION_FAILED;
}
map $sandledger_fault $sandledger_fault_text {
    default "@no answer@";
    BACKEND_CONNECTION_FAILED "@not connected@";
}

upstream sandledger_decide {
    server @proxy@;
    keepalive 64;
    keepalive_timeout @keep@s;
}
upstream sandledger_proxy {
    server @proxy@;
}
upstream sandledger_api {
    server @api@;
}
""".replace("@no answer@", _NO_ANSWER).replace("@not connected@", _NOT_CONNECTED)
_SERVER: Final = r"""server {
    @listen@
    server_tokens off;
    access_log off;
    merge_slashes off;
    absolute_redirect off;
    client_max_body_size 0;
    client_header_buffer_size 4k;
    large_client_header_buffers 4 64k;
    client_body_timeout 180s;
    send_timeout 1h;
    recursive_error_pages on;

    proxy_http_version 1.1;
    proxy_buffering off;
    proxy_request_buffering off;
    proxy_connect_timeout 5s;
    proxy_read_timeout 1h;
    proxy_send_timeout 1h;
    proxy_buffer_size 64k;
    proxy_buffers 4 64k;
    proxy_next_upstream off;
    proxy_socket_keepalive on;
    proxy_redirect off;

    @choose@

    location / {
        @passed@
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $sandledger_hop_upgrade;
        proxy_set_header Connection $sandledger_hop_connection;
        proxy_pass http://sandledger_api$request_uri;
        error_page 502 504 = @away;
    }

    # Only nginx asks. A client's own question would be answered with the secret of nginx.
    location = @path@ {
        return 404;
    }

    location /.sandledger/ {
        internal;
        auth_request /.sandledger/decide;
        @answer@
        @headers@
        @hidden@
        proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering X-Accel-Charset;
        proxy_pass_header Date;
        proxy_cookie_domain ~.* "";
        proxy_cookie_path ~^(/.*)$ $sandledger_prefix$1;
        proxy_cookie_path ~^ $sandledger_prefix/;
        proxy_redirect $sandledger_prefix/ $sandledger_prefix/;
        proxy_redirect $scheme://$http_host$sandledger_prefix/ $scheme://$http_host$sandledger_prefix/;
        proxy_redirect $scheme://$http_host/ $scheme://$http_host$sandledger_prefix/;
        proxy_redirect http://127.0.0.1:$sandledger_port/ $scheme://$http_host$sandledger_prefix/;
        proxy_redirect http://localhost:$sandledger_port/ $scheme://$http_host$sandledger_prefix/;
        proxy_redirect ~^(/(?!/).*)$ $sandledger_prefix$1;
        add_header Content-Security-Policy $sandledger_policy always;
        add_header X-Request-Id $sandledger_answer_id always;
        error_page 401 = @sandledger;

        location = /.sandledger/read {
            internal;
            proxy_intercept_errors on;
            error_page 401 502 504 = @sandledger;
            proxy_pass http://$sandledger_target$sandledger_path;
        }
        location = /.sandledger/act {
            internal;
            error_page 401 = @sandledger;
            error_page 502 504 = @unreachable;
            proxy_pass http://$sandledger_target$sandledger_path;
        }
    }

    location = /.sandledger/decide {
        internal;
        @secret@
        @asked@
        proxy_set_header Host localhost;
        proxy_set_header Connection "";
        proxy_set_header Content-Length "";
        proxy_pass_request_body off;
        proxy_buffer_size 8k;
        proxy_read_timeout 10s;
        proxy_next_upstream error;
        proxy_intercept_errors on;
        error_page @failed@ = @undecided;
        proxy_pass http://sandledger_decide@path@;
    }
    location @undecided {
        return 401;
    }

    # Whatever nginx may not carry: the same request goes to our server, which carries it or says why not.
    location @sandledger {
        @passed@
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $sandledger_hop_upgrade;
        proxy_set_header Connection $sandledger_hop_connection;
        proxy_pass http://sandledger_proxy$request_uri;
        error_page 502 504 = @away;
    }
    location @away {
        default_type application/json;
        add_header Sandledger-Error @away code@ always;
        add_header Retry-After 1 always;
        return 502 '@away@';
    }
    location @unreachable {
        default_type application/json;
        add_header Sandledger-Error $sandledger_fault always;
        return 502 '@unreachable@';
    }
}
""".replace("@failed@", _FAILED).replace("@away code@", AWAY_CODE)
