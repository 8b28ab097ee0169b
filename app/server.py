"""One server process: opens what it needs, runs the API and the worker in one event loop, stops in order.

Start: database (embedded or not), migrations, master key, engine, listening socket. An engine that is down is no
reason not to start: creates are accepted and wait, `/ready` says why. A port that is taken, a database that is not
there, or a wrong key is.

Stop (SIGTERM or SIGINT): the listener closes, requests in flight finish within `timeout_graceful_shutdown`, the worker
hands its leases back, nothing is marked failed. A second signal ends the process at once; leases then run out and
another worker, or this one after its restart, goes on from the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from enum import StrEnum
from uuid import UUID, uuid4

import uvicorn
from litestar import Litestar
from msgspec import Struct
from sqlalchemy import literal, select

from app import __version__
from app.api.app import create_app
from app.api.context import ApiContext
from app.api.listener import HttpProtocol
from app.database.embedded import EmbeddedPostgres
from app.database.engine import Database
from app.database.installation import claim_master_key
from app.database.migrate import migrate
from app.database.statement import Statement
from app.errors import RuntimeUnavailable, SettingsError, StoreUnavailable
from app.log.refusals import Refusals
from app.log.signal import Signal
from app.runtime.docker import DockerOptions, connect
from app.runtime.driver import Driver
from app.service import Service
from app.settings import Settings, check_exposure, redacted_dsn
from app.vault.keyfile import master_key
from app.vault.seal import Sealer
from app.views.listing import Listing
from app.work.policy import WorkPolicy
from app.work.worker import Worker

_LOG = logging.getLogger(__name__)
_WATCH_S = 2.0
_BANNER_S = 5.0
_PING = Statement(select(literal(1)))
Say = Callable[[str], None]
MakeDriver = Callable[[Settings, UUID], Driver]


class Role(StrEnum):
    """What a process does. Any number of each may run on one database."""

    ALL = "all"
    API = "api"
    WORKER = "worker"


class Store(Struct, frozen=True):
    """A running, migrated PostgreSQL."""

    dsn: str
    where: str
    """Which, for people; no password."""
    embedded: EmbeddedPostgres | None = None


class Opened(Struct, frozen=True):
    """The parts that every role needs."""

    settings: Settings
    database: Database
    store: Store
    installation: UUID
    sealer: Sealer
    driver: Driver
    signal: Signal
    service: Service


class _Listener(uvicorn.Server):
    """uvicorn without its signal handlers: this process has more to stop than a listener."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `run`."""
        yield


def docker_driver(settings: Settings, installation: UUID) -> Driver:
    """The driver that the settings ask for."""
    docker = settings.docker
    options = DockerOptions(
        installation=installation,
        network_mode=docker.network_mode,
        api_timeout=docker.api_timeout,
        pull_timeout=docker.pull_timeout_seconds,
        drop_capabilities=docker.drop_capabilities,
        apparmor_profile=docker.apparmor_profile,
        seccomp_profile=docker.seccomp_profile,
        no_new_privileges=docker.no_new_privileges,
        pids_limit=docker.pids_limit,
        sandbox_env=docker.sandbox_env,
        log_max_size=docker.log_max_size,
        log_max_files=docker.log_max_files,
    )
    return connect(options, docker.host)


def work_policy(settings: Settings) -> WorkPolicy:
    """The worker's numbers."""
    worker = settings.sandledger.worker
    return WorkPolicy(
        concurrency=worker.concurrency,
        lease=worker.lease_seconds,
        backoff_base=worker.backoff_base_seconds,
        backoff_max=worker.backoff_max_seconds,
        poison_attempts=worker.poison_attempts,
        poison_after=worker.poison_seconds,
        missing_grace=worker.missing_grace_seconds,
        resync_every=worker.resync_seconds,
        orphan_grace=worker.orphan_grace_seconds,
        orphan_dry_run=worker.orphan_dry_run,
        expiry_lease=worker.expiry_lease_seconds,
    )


@asynccontextmanager
async def open_database(settings: Settings, say: Say, *, upgrade: bool = True) -> AsyncGenerator[Store]:
    """Start or join the embedded one, or take the configured one; migrate it unless told to leave it as it is."""
    async with AsyncExitStack() as stack:
        dsn, embedded = settings.store.postgresql.dsn, None
        if dsn is None:
            state_dir = settings.sandledger.state_dir
            embedded = await asyncio.to_thread(EmbeddedPostgres.start, state_dir, say)
            stack.callback(embedded.stop)
            dsn, where = embedded.dsn, f"embedded PostgreSQL in {embedded.data_dir}"
        else:
            where = redacted_dsn(dsn)
        done = await migrate(dsn, apply=upgrade)
        if done.after != done.before:
            say(f"database: migrated from {done.before or 'empty'} to {done.after}")
        if upgrade and not done.known:
            say(f"database: schema {done.before} was written by a newer version; using it as it is")
        yield Store(dsn, where, embedded)


@asynccontextmanager
async def opened(settings: Settings, say: Say, make_driver: MakeDriver = docker_driver) -> AsyncGenerator[Opened]:
    """Everything below the two shells."""
    pool = settings.store.postgresql
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_database(settings, say))
        database = Database(
            store.dsn,
            min_size=pool.min_pool_size,
            max_size=pool.max_pool_size,
            connect_timeout=pool.connect_timeout_seconds,
            pool_timeout=pool.pool_timeout_seconds,
        )
        stack.push_async_callback(database.close)
        ours = settings.sandledger
        key, _ = await asyncio.to_thread(master_key, ours.master_key, ours.master_key_file, ours.state_dir)
        sealer = Sealer(key)
        installation = (await claim_master_key(database, sealer.key_id)).id
        driver = make_driver(settings, installation)
        stack.push_async_callback(driver.close)
        news = Signal(database)
        service = Service(database, news, driver.can)
        yield Opened(settings, database, store, installation, sealer, driver, news, service)


def api_app(parts: Opened, worker: Worker | None, stopping: asyncio.Event) -> Litestar:
    """The HTTP application on these parts."""
    settings = parts.settings
    return create_app(
        ApiContext(
            service=parts.service,
            listing=Listing(parts.database),
            refusals=Refusals(parts.database),
            sealer=parts.sealer,
            signal=parts.signal,
            database=parts.database,
            driver=parts.driver,
            installation=parts.installation,
            api_key=settings.server.api_key,
            max_sandbox_timeout_seconds=settings.server.max_sandbox_timeout_seconds,
            wait_seconds_max=settings.sandledger.api.wait_seconds_max,
            body_limit=settings.sandledger.api.body_limit_bytes,
            metadata_max_entries=settings.sandledger.api.metadata_max_entries,
            worker_alive=None if worker is None else lambda: worker.alive,
            stopping=stopping,
        )
    )


def listen(settings: Settings) -> socket.socket:
    """The listening socket.

    Raises:
        SettingsError: the address is taken or not ours; says what to change.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; set [server] host and port, or stop what listens there"
        ) from error
    listener.set_inheritable(False)
    return listener


def _uvicorn(settings: Settings, app: Litestar) -> _Listener:
    server = settings.server
    return _Listener(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=settings.log.file_enabled or settings.log.level == "DEBUG",
            timeout_keep_alive=server.timeout_keep_alive,
            limit_concurrency=server.limit_concurrency or None,
            backlog=server.backlog,
            timeout_graceful_shutdown=server.timeout_graceful_shutdown,
            http="h11" if server.http == "h11" else HttpProtocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,  # a local caller could otherwise forge the client address in the log
        )
    )


async def _banner(parts: Opened, address: str | None, say: Say) -> None:
    try:
        async with asyncio.timeout(_BANNER_S):
            info = await parts.driver.check()
        engine = f"{info.name} {info.version} at {info.address}"
    except TimeoutError:
        engine = f"NO ANSWER within {_BANNER_S:.0f} s, creates will wait"
    except RuntimeUnavailable as error:
        engine = f"NOT REACHABLE yet, creates will wait: {error}"
    say(f"sandledger {__version__}")
    if address is not None:
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


async def run(settings: Settings, role: Role, say: Say, make_driver: MakeDriver = docker_driver) -> None:
    """Serve until a signal.

    Raises:
        SettingsError, StoreUnavailable: the start did not work; the message says what to do.
    """
    if role is not Role.WORKER:
        check_exposure(settings)
    listener = None if role is Role.WORKER else listen(settings)
    stop = _Stop(say)
    stop.install()
    async with AsyncExitStack() as stack:
        if listener is not None:
            stack.callback(listener.close)
        parts = await stack.enter_async_context(opened(settings, say, make_driver))
        worker = None
        if role is not Role.API:
            worker = Worker(
                database=parts.database,
                service=parts.service,
                signal=parts.signal,
                driver=parts.driver,
                sealer=parts.sealer,
                policy=work_policy(settings),
                worker_id=f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}",
            )
        await _run(parts, worker, listener, stop, say)
    say("stopped")


async def _run(parts: Opened, worker: Worker | None, listener: socket.socket | None, stop: _Stop, say: Say) -> None:
    async with asyncio.TaskGroup() as tasks:
        news = tasks.create_task(parts.signal.run(), name="signal")
        watch = tasks.create_task(_keep_embedded(parts), name="embedded-postgres")
        working = None if worker is None else tasks.create_task(worker.run(), name="worker")
        http = serving = None
        address = None
        if listener is not None:
            http = _uvicorn(parts.settings, api_app(parts, worker, stop.asked))
            serving = tasks.create_task(http.serve([listener]), name="http")
            listener.listen(parts.settings.server.backlog)  # the banner's curl line works from the moment it is read
            host, port = listener.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        await _banner(parts, address, say)
        await stop.asked.wait()
        if http is not None and serving is not None:
            http.should_exit = True
            await serving
        if worker is not None and working is not None:
            await worker.stop(parts.settings.server.timeout_graceful_shutdown)
            await working
        # Last words of the worker still go out to others before the signal ends.
        for task in (news, watch):
            task.cancel()


async def _keep_embedded(parts: Opened) -> None:
    """Start the embedded postmaster again when it dies under us."""
    embedded = parts.store.embedded
    while embedded is not None:
        await asyncio.sleep(_WATCH_S)
        try:
            await parts.database.fetch(_PING)
        except StoreUnavailable as error:
            _LOG.warning("%s; starting the embedded PostgreSQL again if it has died", error)
            try:
                await asyncio.to_thread(embedded.revive)
            except (StoreUnavailable, SettingsError) as failure:
                _LOG.error("embedded PostgreSQL: %s", failure)
