"""`sandledger nginx`: the configuration of an nginx that carries bytes to sandboxes itself.

The configuration is printed, and has no secret. The secret stands in a file of its own that the printed one includes;
the command writes it, readable for its owner only. nginx's master process reads it, and that is started by root.

Every value of an option is written into the configuration of another program, where a quote or a semicolon would begin
a directive. So each is checked against what it may be, and nothing is escaped.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from app import __version__
from app.cli.doctor import ANYWHERE
from app.cli.reporting import Say
from app.cli.session import database
from app.errors import SettingsError
from app.proxy.decide import secret_of
from app.proxy.nginx import Plan, configuration, secret_text
from app.server.assembly import read_master_keys
from app.server.listener import domain_of
from app.settings import Settings, check_exposure
from app.store.database.installation import read_installation
from app.store.vault.keyfile import NoKeyFile
from app.store.vault.keys import open_keys

_ADDRESS: Final = re.compile(r"(?:(\*|[0-9.]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]{1,5})")
_PATH: Final = re.compile(r"/[A-Za-z0-9/._@+=, -]*")
"""No quote, no backslash, no `$`, `;` or brace, no control character: it stands in quotes."""
_MAX_PORT: Final = 65535


class Wanted(Struct, frozen=True):
    """The options as they were given."""

    domain: str | None = None
    listen: str = "127.0.0.1:8088"
    tls: tuple[str, str] | None = None
    proxy: str | None = None
    secret_file: Path | None = None


async def show(settings: Settings, wanted: Wanted, say: Say) -> str:
    """Write the file of the secret, and return the configuration.

    Raises:
        SettingsError, StoreUnavailable: the message says what to do; nothing was written.
    """
    state = settings.sandledger.state_dir
    path = wanted.secret_file or state / "nginx-secret.conf"
    plan = plan_of(settings, wanted, str(path.absolute()))
    secret = secret_text(await secret_here(settings, say))
    _write(path, secret)
    say(f"the secret is in {path}; nginx's master process has to read it, and nobody else")
    return configuration(plan)


def plan_of(settings: Settings, wanted: Wanted, secret_file: str) -> Plan:
    """The checked plan.

    Raises:
        SettingsError: names the option, and what it may be.
    """
    listen = _address("--listen", wanted.listen)
    server = settings.server
    # Whoever reaches nginx reaches the server.
    exposed = "0.0.0.0" if listen[0] in ("", "*") else listen[0].strip("[]")  # noqa: S104 - checked only
    check_exposure(msgspec.structs.replace(settings, server=msgspec.structs.replace(server, host=exposed)))
    if server.port == 0:
        raise SettingsError("server.port = 0 is another port after each start; set one that nginx can be told")
    host = ANYWHERE.get(server.host, server.host)
    api = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
    return Plan(
        version=__version__,
        listen=_written(listen),
        proxy=api if wanted.proxy is None else _server("--proxy", wanted.proxy),
        api=api,
        secret_file=_path("--secret-file", secret_file),
        domain=_domain(settings, wanted.domain),
        tls=None if wanted.tls is None else (_path("--tls", wanted.tls[0]), _path("--tls", wanted.tls[1])),
        keep_seconds=max(1, server.timeout_keep_alive // 2),
    )


def _address(option: str, text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    if found is not None and 0 < int(found[2]) <= _MAX_PORT and _is_host(found[1]):
        return found[1] or "", int(found[2])
    raise SettingsError(f"{option} must be a port, or an IP address with a port, such as 0.0.0.0:80 or [::1]:8088")


def _server(option: str, text: str) -> str:
    host, port = _address(option, text)
    if host in ("", "*"):
        raise SettingsError(f"{option} must be the IP address of a server with its port, such as 127.0.0.1:8081")
    return _written((host, port))


def _is_host(text: str | None) -> bool:
    if text is None or text == "*":
        return True
    try:
        ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _written(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}" if address[0] else str(address[1])


def _path(option: str, text: str) -> str:
    if _PATH.fullmatch(text):
        return text
    raise SettingsError(
        f"{option} must be an absolute path of letters, digits, blanks and the characters / . _ @ + = , - only"
    )


def _domain(settings: Settings, given: str | None) -> str:
    known = domain_of(settings.proxy.wildcard)
    if given is None or given.removeprefix("*.").lower() == known:
        return known
    # A server that does not know the domain would take such requests for its own API.
    raise SettingsError(
        f"--domain must be the domain of [proxy] wildcard, which is {settings.proxy.wildcard or 'not set'}; "
        "set it for the servers, and this option is not needed"
    )


async def secret_here(settings: Settings, say: Say) -> str:
    """The secret of this installation.

    Raises:
        SettingsError, StoreUnavailable: it cannot be known here; the message says what to do.
    """
    async with database(settings, say) as opened:
        in_use = (await read_installation(opened)).master_key_id
        if in_use is None:
            raise SettingsError("this installation has no keys yet: start a server once, then run this again")
        try:
            keys, _ = read_master_keys(settings)
        except NoKeyFile as error:
            raise error.wanted(in_use) from None
        return secret_of((await open_keys(opened, keys, in_use)).token)


def _write(path: Path, text: str) -> None:
    """In one step, so that an nginx that is reloaded meanwhile reads a whole file."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            file.write(text)
        new.replace(path)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be written: {error.strerror}; name another file by --secret-file"
        ) from error
