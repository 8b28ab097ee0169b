"""A server process whose engine client can be told where to die.

`python -m tests.chaos.entry CONFIG ROLE` with, in the environment:

* `DIE_AT=create:3`: SIGKILL after the third engine call about containers since the first `POST .../containers/create`;
  `create:0` before that call is sent. `delete:N`: the same since the first call that ends or removes a container.
* `DIE_AT=snapshot:N`: the same since the first call that pauses a container, and about images and commits too.
  `snapshot+:N`: before the call after that one is sent, so what the N calls led to is recorded.
* `DIE_AT=drop:N`: the same about images, since the first call that removes one.
* `DIE_AT=fetched:0`: SIGKILL before the first `POST .../containers/create` after one that did not find the image.

Calls are counted at the HTTP client, so the product needs no hook for this.
"""

from __future__ import annotations

import os
import signal
import sys
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import aiohttp

from app.cli import logs
from app.cli.commands import go
from app.runtime.docker import DockerDriver
from app.runtime.driver import Driver
from app.server.assembly import docker_driver
from app.server.process import Role, run
from app.settings import Settings, load


class Death:
    """Counts engine calls and ends the process at the wanted one."""

    def __init__(self, wanted: str) -> None:
        phase, _, number = wanted.partition(":")
        self._phase, self._left = phase, int(number)
        self._later = phase.endswith("+")
        """Die before the next call."""
        self._armed = False
        self._missing = False

    def _relevant(self, method: str, path: str) -> bool:
        if self._phase.startswith("snapshot"):
            self._armed = self._armed or path.endswith("/pause")
            parts = path.split("/")
            return self._armed and bool({"containers", "commit", "images"} & set(parts))
        if self._phase == "drop":
            self._armed = self._armed or (method == "DELETE" and "/images/" in path)
            return self._armed and "/images/" in path
        if "/containers/" not in path or path.endswith("/containers/json"):
            return False
        if self._phase in ("create", "fetched"):
            ready = self._phase == "create" or self._missing
            self._armed = self._armed or (ready and path.endswith("/containers/create"))
        else:
            self._armed = self._armed or method == "DELETE" or "/kill" in path
        return self._armed

    async def after(self, _session: object, _context: SimpleNamespace, params: aiohttp.TraceRequestEndParams) -> None:
        """The engine has answered; the process has not seen the answer yet."""
        if self._relevant(params.method, params.url.path):
            self._left -= 1
            if self._left == 0 and not self._later:
                os.kill(os.getpid(), signal.SIGKILL)
        if params.url.path.endswith("/containers/create") and params.response.status == HTTPStatus.NOT_FOUND:
            self._missing = True

    async def before(
        self, _session: object, _context: SimpleNamespace, params: aiohttp.TraceRequestStartParams
    ) -> None:
        """`...:0` dies before the first call is sent."""
        if self._left <= 0 and self._relevant(params.method, params.url.path):
            os.kill(os.getpid(), signal.SIGKILL)


def make_driver(settings: Settings, installation: UUID) -> Driver:
    """The real driver, with the trace on its session.

    The installation is noted beside the configuration: the test removes what it has on the engine, also when the
    database is away by then. It is noted in one step, because a kill may come at any moment.
    """
    noted = Path(sys.argv[1]).with_suffix(".installation")
    noted.with_suffix(".noting").write_text(str(installation))
    noted.with_suffix(".noting").replace(noted)
    driver = docker_driver(settings, installation)
    wanted = os.environ.get("DIE_AT")
    if wanted and isinstance(driver, DockerDriver):
        death = Death(wanted)
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(death.before)
        trace.on_request_end.append(death.after)
        trace.freeze()
        for client in (driver._docker, driver._pulling):
            client.session._trace_configs.append(trace)
    return driver


if __name__ == "__main__":
    loaded = load(Path(sys.argv[1]), os.environ).settings
    logs.configure(loaded.log)
    go(lambda: run(loaded, Role(sys.argv[2]), lambda line: print(line, flush=True), make_driver))
