"""One server process: opens what it needs, runs the API and the worker in one event loop, stops in order. The role
`proxy` is an API process without the lifecycle API: what it carries takes no time of an event loop that answers it.

Start: database (embedded or not), migrations, master key, engine, listening socket. An engine that is down is no
reason not to start: creates are accepted and wait, `/ready` says why. A port that is taken, a database that is not
there, or a wrong key is.

A database or a schema that is gone later is waited for: requests are answered 503, the log says why. When it comes back
as another installation the process ends with exit code 1, see `app.store.database.installation`.

Stop (SIGTERM or SIGINT): `/ready` says 503 for `[proxy] drain_announce_seconds`. Then the listener closes, requests
whose body has not arrived are answered 503 at once, other requests in flight finish within `timeout_graceful_shutdown`,
the worker hands its leases back, nothing is marked failed. Streams and WebSockets to sandboxes go on for `[proxy]
drain_seconds` and are then cut. A second signal ends the process at once; leases then run out and another worker, or
this one after its restart, goes on from the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack
from enum import StrEnum
from uuid import uuid4

from sqlalchemy import literal, select

from app import __version__
from app.api.waiters import Waiters
from app.errors import RuntimeUnavailable, SettingsError, StoreUnavailable
from app.server.assembly import (
    MakeDriver,
    Opened,
    Say,
    Stopping,
    agent_policy,
    api_app,
    deadline_limits,
    docker_driver,
    opened,
    work_policy,
)
from app.server.front import Front, carriers
from app.server.life import life_file, show_life
from app.server.listener import listen, uvicorn_server
from app.settings import Settings, check_exposure
from app.store.database.installation import watch_installation
from app.store.database.statement import Statement
from app.store.vault.rotation import follow_master_key
from app.work.worker import Worker

_LOG = logging.getLogger(__name__)
_WATCH_SECONDS = 2.0
_BANNER_SECONDS = 5.0
_PING = Statement(select(literal(1)))


class Role(StrEnum):
    """What a process does. Any number of each may run on one database."""

    ALL = "all"
    API = "api"
    WORKER = "worker"
    PROXY = "proxy"

    @property
    def has_worker(self) -> bool:
        """Whether it reaches engines."""
        return self in (Role.ALL, Role.WORKER)

    @property
    def listens(self) -> bool:
        """Whether it serves HTTP."""
        return self is not Role.WORKER


async def _engine_line(parts: Opened, worker: Worker | None) -> str:
    if worker is None:
        return "none needed here; the workers have theirs"
    try:
        async with asyncio.timeout(_BANNER_SECONDS):
            info = await parts.driver.check()
    except TimeoutError:
        return f"NO ANSWER within {_BANNER_SECONDS:.0f} s, creates will wait"
    except RuntimeUnavailable as error:
        return f"NOT REACHABLE yet, creates will wait: {error}"
    return f"{info.kind} {info.version} at {info.address}"


async def _banner(parts: Opened, role: Role, worker: Worker | None, address: str | None, say: Say) -> None:
    engine = await _engine_line(parts, worker)
    say(f"sandledger {__version__}")
    if role is Role.PROXY:
        say(f"  proxy     {address}/v1/sandboxes/<id>/proxy/<port>/, and no lifecycle API")
    elif address is not None:
        key = "-H 'OPEN-SANDBOX-API-KEY: <your key>' " if parts.settings.server.api_key else ""
        say(f"  API       {address}/v1")
        say(f"  docs      {address}/docs")
        say(f"  try       curl -s {key}{address}/v1/sandboxes")
    say(f"  database  {parts.store.where}")
    say(f"  engine    {engine}")


class _Stop:
    """Signals: the first asks, the second does not ask."""

    def __init__(self, say: Say) -> None:
        self.asked = asyncio.Event()
        self._say = say

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._hear, number)

    def _hear(self, number: int) -> None:
        if self.asked.is_set():
            self._say("second signal: stopping at once; leases run out by themselves")
            os._exit(128 + number)
        self._say("stopping: finishing requests and handing leases back (a second signal stops at once)")
        self.asked.set()


async def run(
    settings: Settings, role: Role, say: Say, make_driver: MakeDriver = docker_driver, *, upgrade: bool = True
) -> None:
    """Serve until a signal. `upgrade` brings the schema to this version first.

    Raises:
        SettingsError, StoreUnavailable: the start did not work; the message says what to do.
    """
    if role.listens:
        check_exposure(settings)
    listener = listen(settings) if role.listens else None
    stop = _Stop(say)
    stop.install()
    async with AsyncExitStack() as stack:
        if listener is not None:
            stack.callback(listener.close)
        parts = await stack.enter_async_context(opened(settings, say, make_driver, upgrade=upgrade))
        worker = None
        if role.has_worker:
            worker = Worker(
                database=parts.database,
                service=parts.service,
                signal=parts.signal,
                engines=parts.engines,
                driver=parts.driver,
                sealer=parts.sealer,
                policy=work_policy(settings),
                limits=deadline_limits(settings),
                agent=agent_policy(settings, parts.installation, parts.keys.token),
                worker_id=f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}",
            )
        await _run(parts, (role, worker), listener, stop, say)
    say("stopped")


async def _run(
    parts: Opened, does: tuple[Role, Worker | None], listener: socket.socket | None, stop: _Stop, say: Say
) -> None:
    role, worker = does
    stopping = Stopping(stop.asked, asyncio.Event())
    async with AsyncExitStack() as closing, asyncio.TaskGroup() as tasks:
        news = tasks.create_task(parts.signal.run(), name="signal")
        watch = tasks.create_task(_keep_embedded(parts), name="embedded-postgres")
        keys = tasks.create_task(follow_master_key(parts.database, parts.sealer), name="master-key")
        identity = tasks.create_task(watch_installation(parts.database, parts.installation), name="installation")
        ends = [news, watch, keys, identity]
        working = None if worker is None else tasks.create_task(worker.run(), name="worker")
        if worker is not None:
            path = life_file(parts.settings.sandledger.state_dir)
            ends.append(tasks.create_task(show_life(lambda: worker.alive, path), name="life"))
        http = relay = serving = draining = None
        address = None
        if listener is not None:
            waiters = Waiters()
            relay, before = carriers(parts, stopping.begun)
            closing.push_async_callback(relay.close)  # also when an error of another task ends the process
            app = api_app(parts, worker, stopping, waiters, serves_api=role is not Role.PROXY)
            front = Front(app, relay, before)
            http = uvicorn_server(parts.settings, front, waiters)
            serving = tasks.create_task(http.serve([listener]), name="http")
            listener.listen(parts.settings.server.backlog)  # the banner's curl line works from the moment it is read
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        await _banner(parts, role, worker, address, say)
        await stop.asked.wait()
        if http is not None:
            await asyncio.sleep(parts.settings.proxy.drain_announce_seconds)
        stopping.begun.set()
        if http is not None and relay is not None:
            http.leave()
            draining = tasks.create_task(relay.drain(parts.settings.proxy.drain_seconds), name="drain")
            await http.is_quiet.wait()
        if worker is not None and working is not None:
            await worker.stop(parts.settings.server.timeout_graceful_shutdown)
            await working
        # Streams outlive the worker: its leases must not wait for them.
        for task in (serving, draining):
            if task is not None:
                await task
        # Last words of the worker still go out to others before the signal ends.
        for task in ends:
            task.cancel()


async def _keep_embedded(parts: Opened) -> None:
    """Start the embedded postmaster again when it dies under us."""
    embedded = parts.store.embedded
    while embedded is not None:
        await asyncio.sleep(_WATCH_SECONDS)
        try:
            await parts.database.fetch(_PING)
        except StoreUnavailable as error:
            _LOG.warning("%s; starting the embedded PostgreSQL again if it has died", error)
            try:
                await asyncio.to_thread(embedded.revive)
            except (StoreUnavailable, SettingsError) as failure:
                _LOG.error("embedded PostgreSQL: %s", failure)
