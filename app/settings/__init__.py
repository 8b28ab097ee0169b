"""Settings: one TOML file and a few environment variables, read once, checked whole, then frozen.

Protocol: `load` (in `loading`) finds the file, judges its keys, lays the environment over it, converts to the structs
of `schema`, and returns `Loaded`; the caller prints the warnings. A process that is about to listen calls
`check_exposure`.

Two modules are the room: `schema` has the keys, `loading` reads them. What they need stands apart, because it has
another reason to change: `unserved` lists the public server's keys that have no effect yet, `keys` compares a file with
both lists, `problems` puts the decoder's complaints into words, `dsn` hides passwords, `exposure` asks the resolver.

Invariants: the struct types are the only list of served keys; nothing is read from the process environment except
through the mapping `load` is given; no secret appears in a repr, a warning or an error.

Failure: `SettingsError`, which names file (or variable), key, value and what is allowed. Unknown keys and keys that
this version does not serve are warnings; those whose silent loss would weaken isolation are errors.
"""

from app.settings.dsn import redacted_dsn
from app.settings.exposure import check_exposure, is_loopback, publish_host
from app.settings.loading import Loaded, load
from app.settings.own import AgentSettings, ApiSettings, SandledgerSettings, WorkerSettings
from app.settings.schema import (
    DockerSettings,
    Level,
    LogSettings,
    PostgresqlSettings,
    ProxySettings,
    RuntimeSettings,
    ServerSettings,
    Settings,
    StoreSettings,
)

__all__ = [
    "AgentSettings",
    "ApiSettings",
    "DockerSettings",
    "Level",
    "Loaded",
    "LogSettings",
    "PostgresqlSettings",
    "ProxySettings",
    "RuntimeSettings",
    "SandledgerSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "WorkerSettings",
    "check_exposure",
    "is_loopback",
    "load",
    "publish_host",
    "redacted_dsn",
]
