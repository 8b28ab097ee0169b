"""Environments of their own for public programs whose dependencies are not ours, installed from the lock file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.support.needs import refuse_or_skip

UV = ROOT / ".state" / "uv" / "bin" / "uv"


def install(group: str) -> Path:
    """The environment of a dependency group: `.state/<group>`. Several processes may ask at once; uv has a lock.

    Raises:
        CalledProcessError, OSError: it cannot be fetched, or there is no uv (`make setup`).
    """
    folder = ROOT / ".state" / group
    environ = os.environ | {"UV_PROJECT_ENVIRONMENT": str(folder), "UV_PYTHON_DOWNLOADS": "never"}
    environ.pop("VIRTUAL_ENV", None)
    subprocess.run([str(UV), "sync", "--quiet", "--locked", "--only-group", group], env=environ, cwd=ROOT, check=True)
    return folder


def fetched(group: str) -> Path:
    """The environment, for a test that cannot do without."""
    try:
        return install(group)
    except (subprocess.CalledProcessError, OSError) as error:
        refuse_or_skip(f"the group {group} of the lock file cannot be installed: {error}; run make setup")
