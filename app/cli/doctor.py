"""`sandledger doctor`: what a server would need to start here, one line each, with what to do about it."""

from __future__ import annotations

import asyncio
import errno
import http.client
import time
from collections.abc import Callable
from uuid import UUID

import msgspec
from msgspec import Struct
from sqlalchemy import func, select

from app.api.health import Health
from app.cli.reporting import Say
from app.errors import SandledgerError, SettingsError
from app.runtime.driver import EngineInfo
from app.server.assembly import database_of, docker_driver, open_database, read_master_keys
from app.server.listener import listen
from app.server.process import Role
from app.settings import Settings, check_exposure
from app.store.database.installation import read_installation
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog
from app.store.vault.keyfile import NoKeyFile

_SKEW_S = 2.0
_ANSWER_WITHIN_S = 2.0
_MAX_ANSWER_BYTES = 1000
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked here, not listened on
"""Where a server that listens on all addresses is asked."""
_CLOCK = Statement(select(func.extract("epoch", func.clock_timestamp()).label("epoch")))


class Finding(Struct, frozen=True):
    """What was found about one subject, printed as one line."""

    subject: str
    fine: bool
    text: str
    warning: bool = False
    """A server starts and works, and yet somebody should know."""

    @property
    def mark(self) -> str:
        """The word at the start of the line."""
        if not self.fine:
            return "FAIL"
        return "WARN" if self.warning else "ok  "


async def examine(settings: Settings, say: Say, role: Role = Role.ALL) -> bool:
    """Look at everything that a server of this role needs, print it, and say whether it could start and work.

    Makes no database and changes no schema.
    """
    say("looking at port, database, migrations, clock, master key and engine ...")
    findings = [*await _listening(settings, role), *await _store(settings, say)]
    if role.has_worker:
        findings += await _engine(settings)
    else:
        findings.append(Finding("engine", fine=True, text=f"the role {role} needs none"))
    for finding in findings:
        say(f"{finding.mark}  {finding.subject:<12} {finding.text}")
    return all(finding.fine for finding in findings)


async def _listening(settings: Settings, role: Role) -> list[Finding]:
    if not role.listens:
        return [Finding("port", fine=True, text=f"the role {role} listens on none")]
    return [
        await asyncio.to_thread(_port, settings),
        _attempt("exposure", lambda: check_exposure(settings) or "not open to the world without a key"),
    ]


async def _store(settings: Settings, say: Say) -> list[Finding]:
    found: list[Finding] = []
    try:
        async with open_database(settings, say, upgrade=False) as store:
            found.append(Finding("database", fine=True, text=store.where))
            done = await migrate(store.owner_dsn, apply=False)
            ready = done.before == done.head or not done.known
            newer = "" if done.known else ", written by a newer version"
            advice = "" if ready else "; run `sandledger migrate`, or start a server, which does it"
            text = f"at {done.before or 'nothing'}, this version wants {done.head}{newer}{advice}"
            found.append(Finding("migrations", ready, text))
            if ready:
                database = database_of(settings, store)
                try:
                    found.extend(await _inside(settings, database))
                finally:
                    await database.close()
    except SandledgerError as error:
        found.append(Finding("database", fine=False, text=str(error)))
    return found


async def _inside(settings: Settings, database: Database) -> list[Finding]:
    row = await database.fetch_one(_CLOCK)
    skew = 0.0 if row is None else abs(float(row["epoch"]) - time.time())
    found = [
        Finding("clock", skew < _SKEW_S, f"{skew:.3f} s between this machine and the database, whose clock counts")
    ]
    if database.login is not None and database.login.warning is not None:
        found.append(Finding("login", fine=True, text=database.login.warning, warning=True))
    installation = await read_installation(database)
    found.append(await asyncio.to_thread(_master_key, settings, installation.master_key_id))
    horizon = await EventLog(database).horizon()
    found.append(Finding("log", fine=True, text=f"installation {installation.id}, settled up to position {horizon}"))
    return found


def _master_key(settings: Settings, in_use: str | None) -> Finding:
    """`in_use` is the master key that seals the database. None = none does yet."""
    try:
        keys, source = read_master_keys(settings)
    except NoKeyFile as error:
        if in_use is not None:
            return Finding("master key", fine=False, text=str(error.wanted(in_use)))
        if settings.sandledger.master_key_file is None:
            text = (
                f"{error.path} is not there yet; nothing is sealed, and `sandledger serve` makes it at its first start"
            )
            return Finding("master key", fine=True, text=text)
        return Finding("master key", fine=False, text=f"{error}. Make it with `openssl rand -base64 32`")
    except SandledgerError as error:
        return Finding("master key", fine=False, text=str(error))
    matches = in_use in (None, *keys.ids)
    text = source if matches else f"{source} is not the key that seals this database ({in_use})"
    return Finding("master key", matches, text)


async def _engine(settings: Settings) -> list[Finding]:
    """Also when there is no database to ask who we are: the engine's answer does not depend on it."""
    try:
        driver = docker_driver(settings, UUID(int=0))
        try:
            info = await driver.check()
        finally:
            await driver.close()
    except SandledgerError as error:
        return [Finding("engine", fine=False, text=str(error))]
    engine = Finding("engine", fine=True, text=f"{info.kind} {info.version} at {info.address}")
    return [engine, *_live_restore(info), *_network(settings)]


def _network(settings: Settings) -> list[Finding]:
    mode = settings.docker.network_mode
    if mode == "bridge":
        return [Finding("network", fine=True, text="our own: sandboxes do not reach each other, addresses are leased")]
    text = (
        f"{mode}: sandboxes may reach each other, and none has an address that is known to be its own, so the proxy "
        'goes through the agent; docker.network_mode = "bridge" is a network of our own'
    )
    return [Finding("network", fine=True, text=text, warning=True)]


def _live_restore(info: EngineInfo) -> list[Finding]:
    if info.live_restore is None:
        return []
    if info.live_restore:
        return [Finding("live-restore", fine=True, text="on: sandboxes outlive a restart of the engine")]
    text = (
        "off: a restart or crash of the engine ends all sandboxes on it; "
        'set "live-restore": true in its daemon.json and reload it (`systemctl reload docker`)'
    )
    return [Finding("live-restore", fine=True, text=text, warning=True)]


def _port(settings: Settings) -> Finding:
    try:
        with listen(settings) as listener:
            host, port = listener.getsockname()[:2]
            return Finding("port", fine=True, text=f"{host}:{port} is free")
    except SettingsError as error:
        host, port = settings.server.host, settings.server.port
        # Only a taken port is ours for sure: an address that is not this machine's may lead to another one's server.
        taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
        if taken and _is_a_server(ANYWHERE.get(host, host), port):
            return Finding("port", fine=True, text=f"{host}:{port}: a server answers there already", warning=True)
        return Finding("port", fine=False, text=str(error))


def _is_a_server(host: str, port: int) -> bool:
    """Whether what listens there answers as a server of ours."""
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_WITHIN_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        health = msgspec.json.decode(answer.read(_MAX_ANSWER_BYTES), type=Health)
        return answer.status == http.HTTPStatus.OK and health == Health() and "x-request-id" in answer.headers
    except (OSError, http.client.HTTPException, msgspec.MsgspecError):
        return False
    finally:
        connection.close()


def _attempt(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, fine=True, text=look())
    except SandledgerError as error:
        return Finding(subject, fine=False, text=str(error))
