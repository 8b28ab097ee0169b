"""Any address that PostgreSQL's own tools take, for asyncpg.

Two forms are read: `postgresql://user:password@host:port,host:port/database?key=value`, and `key=value key='a b'`.
asyncpg reads only the first, has no time limit for each host, and hands every key that it does not know to the server
as a setting, which then refuses the connection. So the address is parsed here and written again, one URL for each host.

Keys are of four kinds: asyncpg's own; those carried out here (`connect_timeout`, for each host, as libpq does);
settings of the session; and habits of libpq's sockets, which change nothing about whom we talk to and are left out.
A key that asks for a check which asyncpg cannot make is refused, because leaving it out would weaken the connection.

Failure: SettingsError. It names the key, never a value, since any value may be a password in the wrong place.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from urllib.parse import quote, unquote

from msgspec import Struct

from app.errors import SettingsError

_URL = re.compile(r"(?:postgres|postgresql)(?:\+asyncpg)?://(?P<rest>.*)", re.DOTALL)
_WORD = re.compile(
    r"\s*(?P<key>\w+)\s*=\s*(?:'(?P<quoted>(?:[^'\\]|\\.)*)'|(?P<bare>(?:[^\s'\\]|\\.)*))(?=\s|\Z)", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_DRIVER = frozenset(
    (
        "host",
        "port",
        "dbname",
        "user",
        "password",
        "passfile",
        "service",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "sslpassword",
        "sslnegotiation",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
    )
)
_SESSION = frozenset({"application_name", "options"})
_LEFT_OUT = frozenset(
    (
        "client_encoding",
        "fallback_application_name",
        "gssencmode",
        "gssdelegation",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "load_balance_hosts",
        "sslcompression",
        "sslsni",
        "hostaddr",
    )
)
_HARMLESS = {"channel_binding": ("disable", "prefer"), "require_auth": (), "requirepeer": (), "sslcrldir": ()}
"""Keys that ask for a check, with the values that ask for none."""
_SAME = {"database": "dbname", "ssl": "sslmode"}
_JDBC = {"true": "require", "on": "require", "false": "disable", "off": "disable"}
_ADVICE = "write postgresql://user:password@host/database, with special characters of the password in percent form"


class Address(Struct, frozen=True):
    """Where and how to connect."""

    hosts: tuple[str, ...]
    """A URL for asyncpg each, in the order to try."""
    session: dict[str, str]
    """Settings that the address itself asks for."""
    attempts: tuple[str, ...]
    """Values of `target_session_attrs`, one round over all hosts each."""
    timeout: float | None
    """Seconds for each host; None = the caller's."""
    user: str | None
    password: str | None
    tls: ssl.SSLContext | None = None
    """With the certificates of this machine, which asyncpg cannot name by itself; else it makes its own."""

    def __repr__(self) -> str:
        return f"Address({len(self.hosts)} hosts)"


def address(dsn: str) -> Address:
    """Take a DSN apart.

    Raises:
        SettingsError: it is none, or asks for what cannot be done.
    """
    given = _sorted_out(_read(dsn))
    session = {key: given.pop(key) for key in _SESSION & given.keys()}
    limit = given.pop("connect_timeout", "0")
    if not re.fullmatch(r"-?\d{1,9}", limit.strip()):
        raise SettingsError("the PostgreSQL DSN: connect_timeout must be a number of seconds")
    wanted = given.pop("target_session_attrs", "any")
    tls = _tls(given)
    return Address(
        hosts=tuple(_hosts(given)),
        session=session,
        attempts=("standby", "any") if wanted == "prefer-standby" else (wanted,),
        timeout=float(limit) if int(limit) > 0 else None,
        user=given.get("user"),
        password=given.get("password"),
        tls=tls,
    )


def _tls(given: dict[str, str]) -> ssl.SSLContext | None:
    """Look at the files that are named: what asyncpg says of a missing one could be said of a missing socket."""
    system = given.get("sslrootcert") == "system"
    for key in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if key in given and not (system and key == "sslrootcert") and not Path(given[key]).is_file():
            raise SettingsError(f"the PostgreSQL DSN: the file of {key} is not there or cannot be read")
    if not system:
        return None
    if given.pop("sslmode", "verify-full") != "verify-full":
        raise SettingsError("the PostgreSQL DSN: sslrootcert=system needs sslmode=verify-full")
    del given["sslrootcert"]
    context = ssl.create_default_context()
    if "sslcert" in given:
        context.load_cert_chain(given.pop("sslcert"), given.pop("sslkey", None), given.pop("sslpassword", None))
    return context


def _read(dsn: str) -> list[tuple[str, str]]:
    text = dsn.strip()
    url = _URL.fullmatch(text)
    if url is not None:
        return _read_url(url["rest"])
    if "://" in text.partition("=")[0]:
        raise SettingsError("the PostgreSQL DSN must begin with postgresql://, or be a list of key=value")
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        word = _WORD.match(text, at)
        if word is None:
            raise SettingsError(f"the PostgreSQL DSN does not parse; {_ADVICE}")
        value = word["bare"] if word["quoted"] is None else word["quoted"]
        found.append((word["key"], _ESCAPE.sub(r"\1", value)))
        at = word.end()
    if not found:
        raise SettingsError(f"the PostgreSQL DSN is empty; {_ADVICE}")
    return found


def _read_url(rest: str) -> list[tuple[str, str]]:
    front, _, query = rest.partition("?")
    authority, _, database = front.partition("/")
    login, at, hosts = authority.rpartition("@")
    user, colon, password = login.partition(":")
    if "/" in database or (at and "@" in login) or "#" in rest:
        raise SettingsError(f"the PostgreSQL DSN does not parse; {_ADVICE}")
    found = [("user", unquote(user)), ("password", unquote(password) if colon else ""), ("dbname", unquote(database))]
    places = [_place(place) for place in hosts.split(",") if place]
    if places:
        found.append(("host", ",".join(host for host, _ in places)))
        found.append(("port", ",".join(port for _, port in places)))
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"the PostgreSQL DSN does not parse behind the question mark; {_ADVICE}")
        found.append((unquote(key), unquote(value)))
    return found


def _place(text: str) -> tuple[str, str]:
    """Host and port, "" for none."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(\d*))?", text)
    if match is None:
        raise SettingsError(f"the PostgreSQL DSN does not parse; {_ADVICE}")
    return unquote(match[1]).strip("[]"), match[2] or ""


def _sorted_out(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The last of each key, as libpq has it; without what is left out, and refusing what cannot be done."""
    given: dict[str, str] = {}
    for written, text in pairs:
        key = _SAME.get(written, written)
        value = _JDBC.get(text, text) if written == "ssl" else text
        if key in _HARMLESS:
            if value not in _HARMLESS[key]:
                raise SettingsError(
                    f"the PostgreSQL DSN: {key} asks for a check that the driver cannot make; leave it out and use "
                    "sslmode=verify-full"
                )
        elif key == "hostaddr":
            given.setdefault("host", value)
        elif key in _DRIVER or key in _SESSION or key == "connect_timeout":
            given[key] = value
        elif key not in _LEFT_OUT:
            raise SettingsError(
                f"the PostgreSQL DSN: {key[:40]!r} is not a key of libpq; settings of the server go into "
                "options=-c name=value"
                if re.fullmatch(r"[a-z_]+", key)
                else f"the PostgreSQL DSN does not parse; {_ADVICE}"
            )
    return {key: value for key, value in given.items() if value != ""}


def _hosts(given: dict[str, str]) -> list[str]:
    """One URL a host, everything in its query, where nothing needs a second meaning."""
    hosts = given.pop("host", "").split(",")
    ports = given.pop("port", "").split(",")
    if len(ports) not in (1, len(hosts)):
        raise SettingsError("the PostgreSQL DSN must have one port, or one for each host")
    if not all(re.fullmatch(r"\d*", port) for port in ports):
        raise SettingsError("the PostgreSQL DSN: port must be a number")
    made: list[str] = []
    for number, host in enumerate(hosts):
        port = ports[number] if len(ports) > 1 else ports[0]
        shown = f"[{host}]" if ":" in host and not host.startswith("/") else host
        keys = {"host": shown, "port": port or ("5432" if host else ""), **given}
        made.append(
            "postgresql://?" + "&".join(f"{key}={quote(value, safe='')}" for key, value in keys.items() if value)
        )
    return made
