"""From file and environment to one frozen `Settings`.

**File.** One that `--config` or `SANDBOX_CONFIG_PATH` names has to exist; `~/.sandbox.toml` is read if it is there.

**Environment.** Variables are laid over the file before anything is checked, so that one set of rules judges both. A
variable wins over the file. Empty means unset, except for the API key, where an empty variable takes the file's key
away as in the public server. `DATABASE_URL` is shared with other programs and therefore only fills a gap.

**Paths.** Relative and `~` paths become absolute, so that a later change of directory moves nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.errors import SettingsError
from app.settings import problems, unserved
from app.settings.keys import Toml, is_table, judge, lookup
from app.settings.schema import Settings

CONFIG_VARIABLE = "SANDBOX_CONFIG_PATH"
CHECKOUT = Path(__file__).resolve().parents[2]
"""The directory above `app`: a checkout, or the site-packages of an installation."""
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


class Loaded(NamedTuple):
    """What `load` found: the settings, and what the operator should be told about them."""

    settings: Settings
    source: Path | None
    """The file that was read; None = defaults and environment only."""
    warnings: tuple[str, ...]
    """One line each, for the operator; they hold no values."""


def load(config: Path | None, environ: Mapping[str, str]) -> Loaded:
    """Read the settings once. `config` is the `--config` argument. SettingsError when a start would be wrong."""
    source = find_file(config, environ)
    raw: Toml = read_file(source) if source else {}
    where = str(source) if source else "built-in defaults"
    warnings = [*judge(raw, where), *remarks(environ)]
    origins = overlay(raw, environ)
    if lookup(raw, "sandledger.state_dir") is None:
        put(raw, "sandledger.state_dir", str(default_state_dir(environ)))
    try:
        settings = msgspec.convert(raw, Settings, dec_hook=_path)
    except msgspec.ValidationError as error:
        # Without its cause: nothing of the raw input may reach a traceback.
        raise problems.explain(error, raw, where, origins) from None
    if settings.store.type == "sqlite":
        instead = "the server of the dsn" if settings.store.postgresql.dsn else "the embedded PostgreSQL"
        warnings.append(f'{where}: store.type = "sqlite" is not served, {instead} is used instead')
    return Loaded(_settle(settings, environ), source, tuple(warnings))


def _path(kind: type, value: object) -> Path:
    """Convert paths, which msgspec does not know."""
    if kind is not Path or not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("not a path")
    return Path(value)


def _settle(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Make every path absolute, so that a later change of directory moves nothing."""
    log, own = settings.log, settings.sandledger
    key_file = own.master_key_file
    return msgspec.structs.replace(
        settings,
        log=msgspec.structs.replace(
            log,
            file_path=absolute(log.file_path, environ),
            access_file_path=absolute(log.access_file_path, environ),
        ),
        sandledger=msgspec.structs.replace(
            own,
            state_dir=absolute(own.state_dir, environ),
            master_key_file=absolute(key_file, environ) if key_file else None,
        ),
    )


def find_file(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: argument, then variable, then the home directory; None = defaults only."""
    named = environ.get(CONFIG_VARIABLE, "").strip()
    if config is not None or named:
        path = absolute(config or Path(named), environ)
        if not path.exists():
            source = "--config" if config is not None else CONFIG_VARIABLE
            raise SettingsError(f"{path}: no such file, named by {source}; correct the path or create the file")
        return path
    path = home(environ) / ".sandbox.toml"
    return path if path.exists() else None


def read_file(path: Path) -> Toml:
    """Parse a file. SettingsError with file and line where that fails."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text, as TOML has to be (byte {error.start})") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+).*|end of document)\)$", str(error))
        line = place[1] if place and place[1] else str(text.count("\n") + 1)
        raise SettingsError(f"{path}: line {line}: not valid TOML: {error}") from None


def home(environ: Mapping[str, str]) -> Path:
    """The home directory, by `HOME` or the account."""
    try:
        return Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError:
        raise SettingsError("this account has no home directory; set the environment variable HOME") from None


def absolute(path: Path, environ: Mapping[str, str]) -> Path:
    """Expand a leading `~`, and fix a relative path to the working directory of the start."""
    if path.parts[:1] == ("~",):
        path = home(environ).joinpath(*path.parts[1:])
    return Path.cwd() / path


def default_state_dir(environ: Mapping[str, str], root: Path = CHECKOUT) -> Path:
    """`.state` of the checkout this code runs from, else the user's state directory by the XDG rules."""
    if (root / "pyproject.toml").is_file() and (root / "migrations").is_dir():
        return root / ".state"
    state = Path(environ.get("XDG_STATE_HOME", ""))
    # The XDG rules ignore a relative path.
    return (state if state.is_absolute() else home(environ) / ".local" / "state") / "sandledger"


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
