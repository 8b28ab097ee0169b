"""The settings as structs: one per TOML table, and the only list of keys that are served.

Names, bounds and defaults follow the public server, so that its configuration files keep working. Where a default
differs (`server.host`, `docker.network_mode`, `store.type`), the field says so. `app.settings.keys` walks these types
to distinguish known keys from unknown ones, `app.settings.problems` to say what a key allows; nothing is listed twice.

The kinds of values, with their bounds, are in `app.settings.values`; the tables below `[sandledger]` in
`app.settings.own`.
"""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.settings.own import SandledgerSettings
from app.settings.table import Table
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
    LogSize,
    Origin,
    Port,
    PublicAddress,
    Quantity,
    Seconds,
    Subnet,
    Text,
    WholeSeconds,
    WildcardDomain,
)


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
    allowed_origins: tuple[Origin, ...] = ()
    """Origins such as `https://ide.example.com` whose pages may send requests with the cookie of a signed link; those
    of the sandbox's own address always may."""
    same_origin_pages: bool = False
    """Whether a page of a sandbox that is reached by path may act as a page of this server. Only for sandboxes whose
    programs are trusted like the server itself."""
    drain_seconds: WholeSeconds = 30
    """Seconds that open streams and WebSockets get to finish at shutdown. What supervises the server has to wait longer
    than that before it kills it."""
    drain_announce_seconds: Grace = 0
    """Seconds at shutdown in which everything is still served, but `/ready` says 503, so that a load balancer sends no
    more. They come before `drain_seconds`."""
    idle_seconds: Seconds | None = None
    """Seconds after which a stream or a WebSocket on which no byte passes is cut; None = never."""


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


class Settings(Table, frozen=True):
    """All settings, in force from start to stop."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    docker: DockerSettings = DockerSettings()
    proxy: ProxySettings = ProxySettings()
    store: StoreSettings = StoreSettings()
    sandledger: SandledgerSettings = SandledgerSettings()
