"""The public server (`opensandbox-server` from PyPI) in an environment and a process of its own, on our engine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cluster import free_port
from tests.support.environments import install

START_SECONDS = 60
CONFIG = """
[server]
host = "127.0.0.1"
port = {port}
{key}
[log]
level = "WARNING"
[runtime]
type = "docker"
execd_image = "{agent}"
[docker]
network_mode = "bridge"
publish_host = "127.0.0.1"
[store]
type = "sqlite"
path = "{database}"
"""


@contextmanager
def public_server(home: Path, docker_host: str, agent: str = "unused:1", key: str = "") -> Generator[str]:
    """Its address, once it listens. Without a key every request is accepted."""
    command = install("public") / "bin" / "opensandbox-server"
    port = free_port()
    config = home / "public.toml"
    named = f'api_key = "{key}"' if key else ""
    config.write_text(CONFIG.format(port=port, database=home / "public.db", agent=agent, key=named))
    environment = os.environ | {"DOCKER_HOST": docker_host, "HOME": str(home)}
    if not key:
        environment["OPENSANDBOX_INSECURE_SERVER"] = "YES"
    with (home / "public.log").open("wb") as log:
        process = subprocess.Popen([str(command), "--config", str(config)], env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"the public server did not start: {(home / 'public.log').read_text()[-2000:]}")
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
