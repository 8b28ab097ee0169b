"""What a process is made of: database, key, engine, service, and the HTTP application on them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeAlias
from uuid import UUID

import msgspec
from litestar import Litestar
from msgspec import Struct

from app.api.app import create_app
from app.api.context import ApiContext, EndpointParts
from app.api.waiters import Waiters
from app.domain.sandbox.address import own_network
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.quantity import parse_memory, parse_nano_cpus
from app.domain.sandbox.spec import Bounds
from app.errors import SettingsError
from app.runtime.docker import DockerOptions, connect
from app.runtime.docker.options import CAPABILITIES
from app.runtime.driver import Driver
from app.server.network import network_of, way_of
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import DockerSettings, Settings, is_loopback, publish_host, redacted_dsn
from app.store.database.dsn import address
from app.store.database.installation import claim_master_key, read_installation
from app.store.database.migrate import Migration, migrate
from app.store.database.pool import RESERVED_AND_LISTENER_CONNECTIONS, Database
from app.store.database.session import check_session
from app.store.database.waiting import wait_until_there
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.refusals import Refusals
from app.store.log.signal import Signal
from app.store.vault.keyfile import NoKeyFile, master_keys
from app.store.vault.keys import InstallationKeys, open_keys
from app.store.vault.seal import MasterKeys, Sealer
from app.views.listing import Listing
from app.work.agents import AgentPolicy
from app.work.policy import WorkPolicy
from app.work.worker import Worker

Say: TypeAlias = Callable[[str], None]
MakeDriver: TypeAlias = Callable[[Settings, UUID], Driver]


class Store(Struct, frozen=True):
    """A PostgreSQL that answers, with the schema as it was found or made."""

    dsn: str
    """The address with the login of servers."""
    owner_dsn: str
    """As migrations log in; the same when only one is configured."""
    where: str
    """The name of the database for messages; it has no password."""
    embedded: EmbeddedPostgres | None = None
    schema: Migration | None = None
    """The schema before and after the migration."""


class Opened(Struct, frozen=True):
    """The parts that every role needs."""

    settings: Settings
    database: Database
    store: Store
    installation: UUID
    keys: InstallationKeys
    sealer: Sealer
    driver: Driver
    signal: Signal
    service: Service
    engines: Engines


def docker_driver(settings: Settings, installation: UUID) -> Driver:
    """The driver that the settings ask for."""
    return connect(docker_options(settings, installation), settings.docker.host)


def docker_options(settings: Settings, installation: UUID) -> DockerOptions:
    """What the settings say about every container.

    Raises:
        SettingsError: names the key.
    """
    docker, bounds = settings.docker, limit_bounds(settings)
    if docker.network_mode == own_network(installation):
        # Addresses that the engine chooses there would count as leased.
        raise SettingsError(f'docker.network_mode = "{docker.network_mode}" is our own network: say "bridge"')
    return DockerOptions(
        installation=installation,
        network_mode=docker.network_mode,
        subnets=docker.subnets,
        api_timeout=docker.api_timeout,
        pull_timeout=docker.pull_timeout_seconds,
        commit_timeout=settings.sandledger.snapshots.commit_seconds,
        capabilities=CAPABILITIES if docker.capabilities is None else docker.capabilities,
        drop_capabilities=docker.drop_capabilities,
        init=docker.init,
        default_cpu_nanos=bounds.default_cpu_nanos,
        default_memory_bytes=bounds.default_memory_bytes,
        max_cpu_nanos=bounds.max_cpu_nanos,
        max_memory_bytes=bounds.max_memory_bytes,
        apparmor_profile=docker.apparmor_profile,
        seccomp_profile=docker.seccomp_profile,
        no_new_privileges=docker.no_new_privileges,
        pids_limit=docker.pids_limit,
        sandbox_env=docker.sandbox_env,
        publish_host=publish_host(settings),
        port_range=_port_range(docker),
        log_max_size=docker.log_max_size,
        log_max_files=docker.log_max_files,
    )


def _port_range(docker: DockerSettings) -> tuple[int, int] | None:
    first, last = docker.port_range_min, docker.port_range_max
    return None if first is None or last is None else (first, last)


def limit_bounds(settings: Settings) -> Bounds:
    """The operator's default and highest limits. The API applies them, so that the log has what holds; the driver does
    it again for sandboxes that were accepted under other settings.

    Raises:
        SettingsError: names the key.
    """
    docker = settings.docker
    return Bounds(
        _quantity("default_cpu", docker.default_cpu, parse_nano_cpus),
        _quantity("default_memory", docker.default_memory, parse_memory),
        _quantity("max_cpu", docker.max_cpu, parse_nano_cpus),
        _quantity("max_memory", docker.max_memory, parse_memory),
    )


def _quantity(key: str, text: str | None, parse: Callable[[str], int]) -> int | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise SettingsError(f"docker.{key} = {text!r}: {error}") from None


def work_policy(settings: Settings) -> WorkPolicy:
    """The settings of the worker."""
    worker = settings.sandledger.worker
    return WorkPolicy(
        concurrency=worker.concurrency,
        lease=worker.lease_seconds,
        backoff_base=worker.backoff_base_seconds,
        backoff_max=worker.backoff_max_seconds,
        missing_grace=worker.missing_grace_seconds,
        sweep_every=worker.sweep_seconds,
        orphan_grace=worker.orphan_grace_seconds,
        orphan_dry_run=worker.orphan_dry_run,
        expiry_lease=worker.expiry_lease_seconds,
        keep_days=settings.sandledger.diagnostics.keep_days,
        metrics_days=settings.sandledger.metrics.keep_days,
    )


def deadline_limits(settings: Settings) -> Limits:
    """How long a transition may last."""
    limits = settings.sandledger.deadlines
    return Limits(
        pending_s=limits.pending_seconds,
        pausing_s=limits.pausing_seconds,
        resuming_s=limits.resuming_seconds,
        stopping_s=limits.stopping_seconds,
        ready_s=settings.sandledger.agent.ready_seconds,
        freeze_s=settings.sandledger.snapshots.freeze_seconds,
        commit_s=settings.sandledger.snapshots.commit_seconds,
    )


def agent_policy(settings: Settings, installation: UUID, token_key: bytes) -> AgentPolicy | None:
    """The agent that sandboxes get; None = none. `token_key` is the installation's key `token`."""
    runtime = settings.runtime
    if not runtime.execd_image:
        return None
    return AgentPolicy(runtime.execd_image, token_key, runtime.execd_run_as_init, way_of(settings, installation))


@asynccontextmanager
async def open_database(
    settings: Settings, say: Say, *, upgrade: bool = True, patient: bool = False
) -> AsyncGenerator[Store]:
    """Start or join the embedded database, or connect to the configured one; migrate it unless `upgrade` is false.

    Without `upgrade` no embedded database is made either. `patient` waits for a configured database that is not there
    yet.
    """
    async with AsyncExitStack() as stack:
        store = await _store(
            settings, say, stack, seconds=settings.sandledger.start_wait_seconds if patient else 0, create=upgrade
        )
        done = await migrate(
            store.owner_dsn,
            apply=upgrade,
            admit=address(store.dsn) if store.owner_dsn != store.dsn else None,
            say=say,
        )
        if done.after != done.before:
            say(f"database: migrated from {done.before or 'empty'} to {done.after}")
        if upgrade and not done.known:
            say(f"database: schema {done.before} was written by a newer version; using it as it is")
        yield msgspec.structs.replace(store, schema=done)


def check_schema(store: Store) -> None:
    """Check that this version can use the schema. A server that does not migrate needs this.

    Raises:
        SettingsError: it is older.
    """
    found = store.schema
    if found is not None and found.known and found.after != found.head:
        raise SettingsError(
            f"the database schema is at {found.after or 'nothing'}, this version needs {found.head}: run `sandledger "
            "migrate`, or start a server without --no-migrate"
        )


async def _store(settings: Settings, say: Say, stack: AsyncExitStack, *, seconds: float, create: bool) -> Store:
    pool = settings.store.postgresql
    if pool.dsn is None:
        embedded = await asyncio.to_thread(EmbeddedPostgres.start, settings.sandledger.state_dir, say, create=create)
        stack.callback(embedded.stop)
        where = f"embedded PostgreSQL in {embedded.data_dir}"
        return Store(embedded.server_dsn, embedded.dsn, where, embedded)
    owner = pool.migrate_dsn or pool.dsn
    # Only for the owner's: the migration may yet have to make the login of the other.
    await wait_until_there(
        owner, f"PostgreSQL at {redacted_dsn(owner)}", seconds, say, limit=pool.connect_timeout_seconds
    )
    return Store(pool.dsn, owner, redacted_dsn(pool.dsn))


def database_of(settings: Settings, store: Store) -> Database:
    """The connections of this process, within `max_pool_size`."""
    pool = settings.store.postgresql
    return Database(
        store.dsn,
        min_size=pool.min_pool_size,
        max_size=pool.max_pool_size - RESERVED_AND_LISTENER_CONNECTIONS,
        connect_timeout=pool.connect_timeout_seconds,
        pool_timeout=pool.pool_timeout_seconds,
    )


@asynccontextmanager
async def opened(
    settings: Settings, say: Say, make_driver: MakeDriver = docker_driver, *, upgrade: bool = True
) -> AsyncGenerator[Opened]:
    """Everything below the two shells."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_database(settings, say, upgrade=upgrade, patient=True))
        check_schema(store)
        database = database_of(settings, store)
        stack.push_async_callback(database.close)
        await check_session(database)
        installation, keys, sealer = await _open_vault(settings, database)
        if database.login is not None and database.login.warning is not None:
            say(f"warning: {database.login.warning}")
        driver = make_driver(settings, installation)
        stack.push_async_callback(driver.close)
        news = Signal(database)
        service = Service(database, news, deadline_limits(settings))
        engines = Engines(database, news, installation, service.engines)
        yield Opened(settings, database, store, installation, keys, sealer, driver, news, service, engines)


async def _open_vault(settings: Settings, database: Database) -> tuple[UUID, InstallationKeys, Sealer]:
    """The installation's id and keys, and what seals here. The first server of a database makes the key file.

    Raises:
        SettingsError: the master key that seals this database is not here.
    """
    in_use = (await read_installation(database)).master_key_id
    try:
        keys, _ = await asyncio.to_thread(read_master_keys, settings, make=in_use is None)
    except NoKeyFile as error:
        raise error if in_use is None else error.wanted(in_use) from None
    found = await claim_master_key(database, keys.ids)
    in_use = found.master_key_id or keys.ids[0]
    own_keys = await open_keys(database, keys, in_use)
    sealer = Sealer(keys, own_keys.digest, key_id=in_use, reread=lambda: read_master_keys(settings)[0])
    return found.id, own_keys, sealer


async def link_key(settings: Settings, database: Database) -> LinkKey:
    """The installation's key of signed links, for a command.

    Raises:
        SettingsError: no server has made it yet, or the master key that wraps it is not here.
    """
    in_use = (await read_installation(database)).master_key_id
    if in_use is None:
        raise SettingsError("this installation has no keys yet; `sandledger serve` makes them at its first start")
    try:
        keys, _ = await asyncio.to_thread(read_master_keys, settings)
    except NoKeyFile as error:
        raise error.wanted(in_use) from None
    return LinkKey((await open_keys(database, keys, in_use)).link)


def read_master_keys(settings: Settings, *, make: bool = False) -> tuple[MasterKeys, str]:
    """The master keys of this machine, and where they were found. Blocking. `make` as `master_keys` takes it.

    Raises:
        NoKeyFile, SettingsError: as `master_keys` raises them.
    """
    ours = settings.sandledger
    return master_keys(ours.master_key, ours.previous_master_key, ours.master_key_file, ours.state_dir, make=make)


class Stopping(Struct, frozen=True):
    """The two moments of a stop. Made inside the event loop."""

    asked: asyncio.Event
    """The process is asked to stop. Everything is still served, for `[proxy] drain_announce_seconds`."""
    begun: asyncio.Event
    """Nothing new is accepted, and what waits is answered."""


def api_app(
    parts: Opened, worker: Worker | None, stopping: Stopping, waiters: Waiters, *, serves_api: bool = True
) -> Litestar:
    """The HTTP application on these parts. Without the lifecycle API it has the server's own paths only."""
    settings = parts.settings
    return create_app(
        ApiContext(
            service=parts.service,
            listing=Listing(parts.database, parts.service.log),
            refusals=Refusals(parts.database),
            sealer=parts.sealer,
            signal=parts.signal,
            database=parts.database,
            driver=parts.driver,
            endpoints=EndpointParts(parts.keys.token, LinkKey(parts.keys.link), network_of(settings, os.environ)),
            api_key=settings.server.api_key,
            loopback_only=is_loopback(settings.server.host),
            max_sandbox_timeout_seconds=settings.server.max_sandbox_timeout_seconds,
            wait_seconds_max=settings.sandledger.api.wait_seconds_max,
            body_limit=settings.sandledger.api.body_limit_bytes,
            metadata_max_entries=settings.sandledger.api.metadata_max_entries,
            bounds=limit_bounds(settings),
            worker_alive=None if worker is None else lambda: worker.alive,
            engine_mismatch=None if worker is None else lambda: worker.station.mismatch,
            waiters=waiters,
            stopping=stopping.begun,
            asked_to_stop=stopping.asked,
            serves_api=serves_api,
        )
    )
