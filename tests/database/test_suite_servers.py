"""The servers of the suite itself: none outlives its run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support import clusters

ROOT = Path(__file__).resolve().parents[2]
DIES = """
import os, signal, sys
from pathlib import Path
from app.store.embedded.server import EmbeddedPostgres
EmbeddedPostgres.start(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_end_of_a_run_stops_the_server_of_a_worker_that_died() -> None:
    folder = clusters.make_folder()
    try:
        home = clusters.home(folder, "gw0")
        died = subprocess.run([sys.executable, "-c", DIES, home], cwd=ROOT, check=False, timeout=120)
        assert died.returncode == -9
        assert clusters.running(folder), "the server outlives who started it"
    finally:
        clusters.end(folder)
    assert not clusters.running(folder)
    assert not folder.exists()
