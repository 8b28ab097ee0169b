"""Environment variables laid over the file, before anything is checked, so that one set of rules judges both.

A variable wins over the file. Empty means unset, except for the API key, where an empty variable takes the file's key
away as in the public server. `DATABASE_URL` is shared with other programs and therefore only fills a gap.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.errors import SettingsError
from app.settings import unserved
from app.settings.keys import Toml, is_table, lookup

API_KEY = "OPENSANDBOX_SERVER_API_KEY"
DSN = "OPENSANDBOX_STORE_POSTGRESQL_DSN"
SHARED_DSN = "DATABASE_URL"
MIGRATE_DSN = "SANDLEDGER_MIGRATE_DSN"
INSECURE = "OPENSANDBOX_INSECURE_SERVER"
MASTER_KEY = "SANDLEDGER_MASTER_KEY"
MASTER_KEY_FILE = "SANDLEDGER_MASTER_KEY_FILE"

_OVERRIDES = {
    DSN: "store.postgresql.dsn",
    MIGRATE_DSN: "store.postgresql.migrate_dsn",
    "DOCKER_HOST": "docker.host",
    MASTER_KEY: "sandledger.master_key",
    MASTER_KEY_FILE: "sandledger.master_key_file",
    "SANDLEDGER_PREVIOUS_MASTER_KEY": "sandledger.previous_master_key",
    "SANDLEDGER_STATE_DIR": "sandledger.state_dir",
}
_BLANK_IS_UNSET = ("server.api_key", "store.postgresql.dsn", "store.postgresql.migrate_dsn")


def overlay(raw: Toml, environ: Mapping[str, str]) -> dict[str, str]:
    """Write the variables into `raw`. Returns which variable set which key."""
    if environ.get(MASTER_KEY) and environ.get(MASTER_KEY_FILE):
        raise SettingsError(f"{MASTER_KEY} and {MASTER_KEY_FILE} are both set: which key is meant? Unset one of them")
    origins: dict[str, str] = {}
    for variable, path in _OVERRIDES.items():
        value = environ.get(variable, "").strip()
        if value:
            put(raw, path, value)
            origins[path] = variable
    if API_KEY in environ:
        put(raw, "server.api_key", environ[API_KEY])
        origins["server.api_key"] = API_KEY
    if environ.get(INSECURE) == "YES":
        put(raw, "server.insecure", value=True)
    for path in _BLANK_IS_UNSET:
        value = lookup(raw, path)
        if isinstance(value, str):
            # A header value never has outer blanks: a key with a stray newline could not match.
            put(raw, path, value.strip() or None)
    shared = environ.get(SHARED_DSN, "").strip()
    if shared and lookup(raw, "store.postgresql.dsn") is None:
        put(raw, "store.postgresql.dsn", shared)
        origins["store.postgresql.dsn"] = SHARED_DSN
    return origins


def remarks(environ: Mapping[str, str]) -> list[str]:
    """Warnings about variables that do not do what they seem to."""
    found = [
        f"environment variable {variable} has no effect in this version"
        for variable in unserved.VARIABLES
        if environ.get(variable)
    ]
    if environ.get(INSECURE, "YES") not in {"", "YES"}:
        found.append(f"environment variable {INSECURE} has no effect: only the exact value YES counts")
    return found


def put(raw: Toml, path: str, value: object) -> None:
    """Set one key, making tables on the way. Where the file has no table there, leave that to the type check."""
    *tables, name = path.split(".")
    for table in tables:
        below: object = raw.setdefault(table, {})
        if not is_table(below):
            return
        raw = below
    raw[name] = value
