"""From file and environment to one frozen `Settings`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.settings import environment, files, keys, problems
from app.settings.schema import Settings


class Loaded(NamedTuple):
    """What `load` found."""

    settings: Settings
    source: Path | None
    """The file that was read; None = defaults and environment only."""
    warnings: tuple[str, ...]
    """One line each, for the operator; they hold no values."""


def load(config: Path | None, environ: Mapping[str, str]) -> Loaded:
    """Read the settings once. `config` is the `--config` argument. SettingsError when a start would be wrong."""
    source = files.find(config, environ)
    raw: keys.Toml = files.read(source) if source else {}
    where = str(source) if source else "built-in defaults"
    warnings = [*keys.judge(raw, where), *environment.remarks(environ)]
    origins = environment.overlay(raw, environ)
    if keys.lookup(raw, "sandledger.state_dir") is None:
        environment.put(raw, "sandledger.state_dir", str(files.default_state_dir(environ)))
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
            file_path=files.absolute(log.file_path, environ),
            access_file_path=files.absolute(log.access_file_path, environ),
        ),
        sandledger=msgspec.structs.replace(
            own,
            state_dir=files.absolute(own.state_dir, environ),
            master_key_file=files.absolute(key_file, environ) if key_file else None,
        ),
    )
