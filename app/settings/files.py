"""Which file is read, how, and where relative and `~` paths point.

A file named by `--config` or `SANDBOX_CONFIG_PATH` has to exist; `~/.sandbox.toml` is read if it is there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from app.errors import SettingsError
from app.settings.keys import Toml

CONFIG_VARIABLE = "SANDBOX_CONFIG_PATH"
CHECKOUT = Path(__file__).resolve().parents[2]
"""The directory above `app`: a checkout, or the site-packages of an installation."""


def find(config: Path | None, environ: Mapping[str, str]) -> Path | None:
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


def read(path: Path) -> Toml:
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
