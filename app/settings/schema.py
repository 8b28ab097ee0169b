"""The settings as structs: one per TOML table, and the only list of keys that are served.

Names, bounds and defaults follow the public server, so that its configuration files keep working. Where a default
differs (`server.host`, `docker.network_mode`, `store.type`), the field says so. `app.settings.keys` walks these types
to distinguish known keys from unknown ones, `app.settings.problems` to say what a key allows; nothing is listed twice.

The kinds of values, with their bounds, are in `app.settings.values`.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct
from msgspec.inspect import Field, Metadata, StructType, Type, UnionType, type_info

from app.settings.values import (
    SUBNETS,
    ApiKey,
    Count,
    CountOrNone,
    Dsn,
    EngineAddress,
    Environment,
    Grace,
    Host,
    Insecure,
    Lease,
    LogSize,
    MasterKey,
    Port,
    PreviousMasterKey,
    PublicAddress,
    Quantity,
    Seconds,
    Subnet,
    Text,
    WholeSeconds,
    WildcardDomain,
)

MASK = "***"


def marks(kind: Type) -> dict[str, object]:
    """The `Meta(extra=...)` of a field's type, looking through `| None`."""
    if isinstance(kind, UnionType):
        return {name: mark for member in kind.types for name, mark in marks(member).items()}
    if not isinstance(kind, Metadata):
        return {}
    return cast("dict[str, object]", kind.extra or {})


@cache
def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a table struct by key."""
    info = type_info(cls)
    assert isinstance(info, StructType)
    return {field.encode_name: field for field in info.fields}


@cache
def _secrets(cls: type) -> frozenset[str]:
    return frozenset(name for name, field in fields_of(cls).items() if "secret" in marks(field.type))


class Table(Struct, frozen=True):
    """One TOML table. Its repr shows that a secret is set, never which."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich has its own repr of structs, in tracebacks too: it must hide secrets too."""
        hidden = _secrets(type(self))
        values: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [(name, MASK if name in hidden and value else value) for name, value in values]

    def __repr__(self) -> str:
        """Mask secrets, at every depth: nested tables are printed by this same method."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class ServerSettings(Table, frozen=True):
    """`[server]`: the HTTP listener."""

    host: Text = "127.0.0.1"
    """Address to bind. Loopback here, secure by default; the public server defaults to 0.0.0.0."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    """TCP port; 0 = the kernel picks a free one."""
    timeout_keep_alive: WholeSeconds = 30
    """Seconds an idle connection is kept."""
    limit_concurrency: CountOrNone = 1024
    """Connections and tasks at once, beyond which requests get 503; 0 = no limit."""
    timeout_graceful_shutdown: WholeSeconds = 5
    """Seconds running requests get to finish at shutdown."""
    backlog: Count = 2048
    """Connections the kernel queues before they are accepted."""
    loop: Literal["auto", "uvloop", "asyncio"] = "auto"
    """Event loop."""
    http: Literal["auto", "httptools", "h11"] = "auto"
    """Read for compatibility. Every value means httptools, because its heads are bounded in bytes and in time."""
    api_key: ApiKey | None = None
    """The key clients send; None = requests need no key. A blank key in file or environment becomes None."""
    eip: PublicAddress = ""
    """Address at which clients reach this machine, for endpoints; empty = found by the rules of
    `app.domain.sandbox.endpoints`. A scheme is ignored. The server-proxy form uses all of it, the others its host."""
    max_sandbox_timeout_seconds: Annotated[int, Meta(ge=60, le=2**31 - 1)] | None = None
    """Longest time to live, in seconds, that a create or renewal may ask for; None = no limit."""
    insecure: Insecure = False
    """The operator accepts a listener beyond loopback without a key."""


class Level(StrEnum):
    """Log levels, read in any case."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"

    @classmethod
    def _missing_(cls, value: object) -> Level | None:
        upper = str(value).upper()
        return next((level for level in cls if level.value == upper), None)


class LogSettings(Table, frozen=True):
    """`[log]`: the process log."""

    level: Level = Level.INFO
    """Least severe level that is written."""
    file_enabled: bool = False
    """Write to files instead of standard output."""
    file_path: Path = Path("~/logs/opensandbox/server.log")
    """Where the server log goes."""
    access_file_path: Path = Path("~/logs/opensandbox/access.log")
    """Where the access log goes."""
    file_max_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] = 100 * 1024 * 1024
    """Bytes after which a log file is rotated."""
    file_backup_count: CountOrNone = 5
    """Rotated files that are kept."""


class RuntimeSettings(Table, frozen=True):
    """`[runtime]`: what runs sandboxes."""

    type: Literal["docker"] = "docker"
    """The driver. Mandatory in the public server, `docker` by default here."""
    execd_image: str = "opensandbox/execd:v1.1.0"
    """Image that holds the in-sandbox agent; empty = sandboxes without one. The public server has no default: its
    example names this image."""
    execd_run_as_init: bool = False
    """Run the agent as process 1 of the sandbox (`EXECD_INIT`)."""


class DockerSettings(Table, frozen=True):
    """`[docker]`: the engine, and what every container gets."""

    host: EngineAddress | None = None
    """Address of the engine; None = the engine's default socket. `DOCKER_HOST` wins."""
    network_mode: Text = "bridge"
    """`bridge` (a network of our own, on which sandboxes do not reach each other), `default` (the engine's own bridge),
    `host` or the name of a network. The public server defaults to `host`, where sandboxes share ports."""
    subnets: Annotated[tuple[Subnet, ...], Meta(min_length=1)] = SUBNETS
    """Subnets for the network of our own, in CIDR form; the first that the engine takes. An address is used again ten
    minutes after its sandbox was removed."""
    host_ip: Host = ""
    """Address of the engine's machine in endpoints, when this server runs in a container; empty = not known."""
    publish_host: Host = ""
    """Address of the engine's machine on which ports of sandboxes are published. Empty = the loopback, unless
    `server.host` is wider: then that address. The public server publishes on 0.0.0.0."""
    port_range_min: Port | None = None
    """First port to publish on; None = the engine picks ports. The public server defaults to 40000."""
    port_range_max: Port | None = None
    """Last port to publish on; None = the engine picks ports. The public server defaults to 60000."""
    api_timeout: WholeSeconds = 60
    """Seconds that a create, start or remove call may take; other calls get a fixed share of it, pulls their own."""
    pull_timeout_seconds: Seconds = 600
    """Seconds an image pull may take."""
    capabilities: tuple[Text, ...] | None = None
    """Linux capabilities that containers keep; all others are dropped. None = what engines give by default, without
    AUDIT_WRITE, MKNOD and NET_RAW."""
    drop_capabilities: tuple[Text, ...] = ()
    """Linux capabilities that are taken from those."""
    init: bool = False
    """Run the engine's init as process 1 of every container. Images whose own entrypoint is an init fail under it."""
    default_cpu: Quantity | None = None
    """CPU limit of a request without one."""
    default_memory: Quantity | None = None
    """Memory limit of a request without one."""
    max_cpu: Quantity | None = None
    """Highest CPU limit; a request without one gets at most this."""
    max_memory: Quantity | None = None
    """Highest memory limit; a request without one gets at most this."""
    apparmor_profile: str = ""
    """Name of an AppArmor profile; empty = the engine's default."""
    seccomp_profile: str = ""
    """A seccomp profile; empty = the engine's default."""
    no_new_privileges: bool = True
    """Forbid set-uid programs to gain privileges."""
    pids_limit: Count = 4096
    """Processes and threads per container."""
    log_max_size: LogSize = "10m"
    """Size in bytes (k, m, g) at which the engine rotates a container's log."""
    log_max_files: Annotated[int, Meta(ge=1, le=1000)] = 3
    """Log files the engine keeps per container."""
    sandbox_env: Environment = msgspec.field(default_factory=dict[str, str])
    """Environment of every sandbox; the request's own values win."""

    def __post_init__(self) -> None:
        """Check what one field cannot say."""
        low, high = self.port_range_min, self.port_range_max
        if (low is None) != (high is None):
            raise ValueError("port_range_min and port_range_max belong together: set both, or none")
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"port_range_min ({low}) must be below port_range_max ({high}): each sandbox publishes two ports"
            )
        for subnet in self.subnets:
            if not IPv4Network(subnet).is_private:  # raises ValueError for host bits
                raise ValueError(f"subnets: {subnet} is not a private network")


class ProxySettings(Table, frozen=True):
    """`[proxy]`: traffic to sandboxes through this server."""

    resolve_internal: bool = True
    """Whether this server reaches sandboxes at their own addresses; false = at their published ports."""
    auth: Literal["key", "open"] = "key"
    """`key`: proxied requests need the API key where one is configured. `open`: they need none, as on the public
    server; the agent then asks the caller for its token."""
    public_address: PublicAddress = ""
    """Address of this server in endpoints that lead through it; wins over `server.eip` and the request's own host."""
    wildcard: WildcardDomain = ""
    """Domain whose names all lead to this server, such as `*.sandboxes.example.com`; empty = none. Each port of each
    sandbox then has an origin of its own, `{port}-{id}.sandboxes.example.com`, and endpoints that lead through this
    server name it."""
    same_origin_pages: bool = False
    """Whether a page of a sandbox that is reached by path may act as a page of this server. Only for sandboxes whose
    programs are trusted like the server itself."""
    drain_seconds: WholeSeconds = 30
    """Seconds that open streams and WebSockets get to finish at shutdown. What supervises the server has to wait longer
    than that before it kills it."""


_MIN_CONNECTIONS = 5


class PostgresqlSettings(Table, frozen=True):
    """`[store.postgresql]`: the database and the connection pool of one process."""

    dsn: Dsn | None = None
    """Which server; None = the embedded one. Kept as written."""
    migrate_dsn: Dsn | None = None
    """The same database as its owner, for migrations only; None = `dsn`."""
    min_pool_size: CountOrNone = 1
    """Connections that are kept open."""
    max_pool_size: Count = 10
    """Connections at most. Three of them are kept back: two for leases and wake-ups, one to listen."""
    connect_timeout_seconds: Seconds = 5
    """Seconds to wait for a new connection."""
    pool_timeout_seconds: Seconds = 5
    """Seconds to wait for a free connection of the pool."""

    def __post_init__(self) -> None:
        """Check what one field cannot say."""
        if self.max_pool_size < _MIN_CONNECTIONS:
            raise ValueError(
                f"max_pool_size ({self.max_pool_size}) must be at least {_MIN_CONNECTIONS}: one connection listens,"
                " two keep leases, one guards a sweep, and the work needs another"
            )
        if self.min_pool_size > self.max_pool_size:
            raise ValueError(f"min_pool_size ({self.min_pool_size}) exceeds max_pool_size ({self.max_pool_size})")


class StoreSettings(Table, frozen=True):
    """`[store]`: where the log lives."""

    type: Literal["postgresql", "sqlite"] = "postgresql"
    """`sqlite`, the public server's default, is read as "no server of my own" and warned about."""
    postgresql: PostgresqlSettings = PostgresqlSettings()


class WorkerSettings(Table, frozen=True):
    """`[sandledger.worker]`: reconciling, expiry and clean-up."""

    concurrency: Annotated[int, Meta(ge=1, le=10_000)] = 16
    """Sandboxes of one tenant that one process works on at once; four more are kept for other tenants."""
    lease_seconds: Lease = 10
    """Seconds until work claimed by a silent worker is free again; renewed at a third of it."""
    sweep_seconds: Seconds = 300
    """Seconds between two full comparisons with the engine, by any one of its workers."""
    backoff_base_seconds: Seconds = 1
    """Longest wait, in seconds, before the first retry; doubles with each failure."""
    backoff_max_seconds: Seconds = 300
    """Longest wait, in seconds, before any retry."""
    orphan_grace_seconds: Grace = 120
    """Age in seconds below which an object that no sandbox owns is not removed."""
    missing_grace_seconds: Grace = 10
    """Seconds an expected object has to be missing before it counts as lost."""
    expiry_lease_seconds: Lease = 4
    """Seconds after which an expiry that was claimed and not finished fires again."""
    orphan_dry_run: bool = False
    """Report orphans and do not remove them."""

    def __post_init__(self) -> None:
        """Check what one field cannot say."""
        if self.backoff_base_seconds > self.backoff_max_seconds:
            raise ValueError(
                f"backoff_base_seconds ({self.backoff_base_seconds:g}) exceeds"
                f" backoff_max_seconds ({self.backoff_max_seconds:g})"
            )


class DeadlineSettings(Table, frozen=True):
    """`[sandledger.deadlines]`: how long a sandbox may stay in a phase that is a transition."""

    pending_seconds: Seconds = 900
    """Seconds until a sandbox that does not run yet has failed."""
    pausing_seconds: Seconds = 60
    """Seconds until a pause that does not happen is given up; the sandbox stays Running."""
    resuming_seconds: Seconds = 60
    """Seconds until a resume that does not happen is given up; the sandbox stays Paused."""
    stopping_seconds: Seconds = 60
    """Seconds until a removal that does not end is reported; each next report waits twice as long."""


class AgentSettings(Table, frozen=True):
    """`[sandledger.agent]`: the agent inside sandboxes."""

    ready_seconds: Seconds = 30
    """Seconds that a sandbox which runs waits for its agent; it is Running after that even if none answers."""


class DiagnosticsSettings(Table, frozen=True):
    """`[sandledger.diagnostics]`: what is kept of sandboxes that are gone, beside their events."""

    keep_days: Annotated[int, Meta(ge=0, le=3650)] = 7
    """Days that the end of a sandbox's log, its exit code and an inspection are kept after its removal; 0 = nothing
    is kept."""


class SnapshotSettings(Table, frozen=True):
    """`[sandledger.snapshots]`: how long snapshots may take."""

    freeze_seconds: Seconds = 180
    """Seconds that a sandbox may stand still for a snapshot; after that it goes on, and the snapshot has failed."""
    commit_seconds: Seconds = 600
    """Seconds until a snapshot that is not ready has failed."""


class ApiSettings(Table, frozen=True):
    """`[sandledger.api]`: bounds of requests."""

    wait_seconds_max: Annotated[int, Meta(ge=0, le=300)] = 300
    """Longest `Prefer: wait`, in seconds, that is honoured."""
    body_limit_bytes: Annotated[int, Meta(ge=1024, le=2**31 - 1)] = 1024 * 1024
    """Largest request body in bytes."""
    metadata_max_entries: CountOrNone = 256
    """Metadata entries a sandbox may have."""


class SandledgerSettings(Table, frozen=True):
    """`[sandledger]`: what the public server has no word for."""

    state_dir: Path = Path(".state")
    """Embedded database and generated keys. `load` (`app.settings.loading`) puts the default of this machine here."""
    master_key_file: Path | None = None
    """File of the key that seals secrets; None = one in `state_dir`. Not opened here."""
    master_key: MasterKey | None = None
    """That key itself; wins over `master_key_file`."""
    previous_master_key: PreviousMasterKey | None = None
    """The key that was in use before a rotation; it only opens what it sealed."""
    start_wait_seconds: Grace = 60
    """Seconds that a server waits at its start for a database that is not there yet; 0 = not at all."""
    worker: WorkerSettings = WorkerSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    agent: AgentSettings = AgentSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    api: ApiSettings = ApiSettings()


class Settings(Table, frozen=True):
    """All settings, in force from start to stop."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    docker: DockerSettings = DockerSettings()
    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    sandledger: SandledgerSettings = SandledgerSettings()
