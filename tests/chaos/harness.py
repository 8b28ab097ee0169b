"""Server processes to kill, and what the tests ask of them over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import aiodocker
import httpx
import msgspec

from tests.conftest import ROOT
from tests.support.marks import remove_mark
from tests.support.warm import WarmProcess

API_LINE = re.compile(r"(?:API|proxy)\s+(http://[^/\s]+)/v1")
ID_LABEL = "sandledger.io/object"
LABEL = "sandledger.io/installation"
KEY = "test-key-0123456789"
Json: TypeAlias = dict[str, Any]


class ServerProcess:
    """One `serve` in a process of its own."""

    def __init__(self, config: Path, role: str = "all", tree: Path = ROOT, **environ: str) -> None:
        """`tree` is the checkout that the server runs from."""
        self.config, self._role, self._tree, self._environ = config, role, tree, environ
        self.log = config.with_suffix(f".{role}.log")
        self.base = ""
        self._process: subprocess.Popen[bytes] | WarmProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> ServerProcess:
        """Until the banner is out."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        # Without DOCKER_HOST: it would win over the configured engine, which may be a proxy that plays a part.
        environ = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"} | self._environ
        module, arguments = "tests.chaos.entry", (str(self.config), self._role)
        if self._tree == ROOT:
            self._process = WarmProcess(module, arguments, environ, self.log, self.log)
        else:
            argv = [sys.executable, "-m", module, *arguments]
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    argv, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=self._tree
                )
        deadline = time.monotonic() + 60
        wanted = "database  " if self._role == "worker" else "engine    "
        while time.monotonic() < deadline:
            text = self.log.read_bytes()[offset:].decode(errors="replace") if self.log.exists() else ""
            if wanted in text:
                found = API_LINE.search(text)
                self.base = found[1] if found else ""
                return self
            if self._process.poll() is not None:
                break
            time.sleep(0.02)  # a poll with a deadline: the process can only tell us through its log
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    @property
    def installation(self) -> UUID | None:
        """None until the server has read it from its database."""
        noted = self.config.with_suffix(".installation")
        return UUID(noted.read_text()) if noted.exists() else None

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """Exit code; negative = the signal that ended it."""
        assert self._process is not None
        return self._process.wait(timeout)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(30)

    def client(self, **kwargs: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"{self.base}/v1", headers={"OPEN-SANDBOX-API-KEY": KEY}, timeout=60, **kwargs
        )


def write_config(
    home: Path,
    dsn: str,
    docker_host: str | None,
    name: str = "server",
    owner_dsn: str | None = None,
    **tables: str,
) -> Path:
    """A TOML file; `tables` adds lines to a table, e.g. worker='lease_seconds = 2'."""
    lines = [
        "[server]",
        "port = 0",
        f"api_key = {json.dumps(KEY)}",
        tables.get("server", ""),
        "[store.postgresql]",
        f"dsn = {json.dumps(dsn)}",
        f"migrate_dsn = {json.dumps(owner_dsn)}" if owner_dsn else "",
        "[docker]",
        f"host = {json.dumps(docker_host)}" if docker_host else "",
        tables.get("docker", ""),
        "[runtime]",
        tables.get("runtime", 'execd_image = ""'),
        "[sandledger]",
        f"state_dir = {json.dumps(str(home / 'state'))}",
        tables.get("sandledger", ""),
        "[sandledger.worker]",
        tables.get("worker", "lease_seconds = 2\nmissing_grace_seconds = 1"),
        "[sandledger.deadlines]",
        tables.get("deadlines", ""),
        tables.get("more", ""),
    ]
    path = home / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def body(image: str, timeout: int | None = 600, **more: Any) -> dict[str, Any]:
    """A create request that sleeps."""
    made: dict[str, Any] = {
        "image": {"uri": image},
        "entrypoint": ["sleep", "3600"],
        "resourceLimits": {"cpu": "100m", "memory": "32Mi"},
        **more,
    }
    if timeout is not None:
        made["timeout"] = timeout
    return made


async def running(client: httpx.AsyncClient, image: str, **more: Any) -> str:
    """Create a sandbox that runs; its id."""
    answer = await client.post("/sandboxes", json=body(image, **more), headers={"Prefer": "wait=60"})
    assert answer.json()["status"]["state"] == "Running", answer.text
    return answer.json()["id"]


async def until(condition: Any, what: str, deadline_s: float = 45) -> Any:
    """Poll an async condition; its first true answer."""
    try:
        async with asyncio.timeout(deadline_s):
            while not (answer := await condition()):
                await asyncio.sleep(0.05)
            return answer
    except TimeoutError:
        raise AssertionError(f"waited {deadline_s:.0f} s in vain: {what}") from None


async def state(client: httpx.AsyncClient, sandbox: str) -> str:
    answer = await client.get(f"/sandboxes/{sandbox}", params={"includeTerminal": "true"})
    assert answer.status_code == 200, answer.text
    return answer.json()["status"]["state"]


async def reaches(client: httpx.AsyncClient, sandbox: str, wanted: str, deadline_s: float = 45) -> None:
    async def there() -> bool:
        return await state(client, sandbox) == wanted

    await until(there, f"{sandbox} reaches {wanted}", deadline_s)


async def history(client: httpx.AsyncClient, sandbox: str) -> list[str]:
    answer = await client.get(f"/sandboxes/{sandbox}/events", params={"limit": 1000})
    return [item["type"] for item in answer.json()["items"]]


async def events(client: httpx.AsyncClient, sandbox: str, kind: str) -> list[dict[str, Any]]:
    """The events of one type, oldest first."""
    answer = await client.get(f"/sandboxes/{sandbox}/events", params={"limit": 1000})
    return [item for item in answer.json()["items"] if item["type"] == kind]


async def command(server: ServerProcess, *words: str) -> tuple[int, Any]:
    """What a `sandledger` command prints with --json, and its exit code."""
    argv = [sys.executable, "-m", "app", *words, "--config", str(server.config)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    printed, complaint = await process.communicate()
    assert process.returncode in (0, 1), complaint.decode()
    return process.returncode, msgspec.json.decode(printed) if printed else complaint.decode()


class Engine:
    """The engine seen with its own client."""

    def __init__(self, docker: aiodocker.Docker) -> None:
        self._docker = docker

    async def containers(self, *, sandbox: str | None = None, installation: UUID | None = None) -> list[dict[str, Any]]:
        label = f"{ID_LABEL}={sandbox}" if sandbox else f"{LABEL}={installation}"
        return [
            c._container for c in await self._docker.containers.list(all=True, filters=json.dumps({"label": [label]}))
        ]

    async def images(self, installation: UUID) -> list[dict[str, Any]]:
        """Images of snapshots, those without a name too."""
        rows: list[dict[str, Any]] = await self._docker.images.list()
        return [row for row in rows if (row["Labels"] or {}).get(LABEL) == str(installation)]

    async def is_paused(self, sandbox: str) -> bool:
        """Whether its container stands still."""
        (container,) = await self.containers(sandbox=sandbox)
        return container["State"] == "paused"

    async def said(self, sandbox: str, *command: str) -> str:
        """What a command in its container writes."""
        (container,) = await self.containers(sandbox=sandbox)
        run = await self._docker.containers.container(container["Id"]).exec(list(command))
        parts: list[bytes] = []
        async with run.start() as stream:
            while (message := await stream.read_out()) is not None:
                parts.append(message.data)
        return b"".join(parts).decode()

    async def saved(self, name: str) -> bytes:
        """All that an image consists of."""
        async with self._docker.images.export_image(name) as content:
            return await content.read()

    async def clear(self, installation: UUID) -> None:
        for container in await self.containers(installation=installation):
            try:
                await self._docker.containers.container(container["Id"]).delete(force=True, v=True)
            except aiodocker.DockerError as error:
                if error.status not in (404, 409):  # gone, or going
                    raise

    async def forget(self, installation: UUID) -> None:
        """Remove all that this installation has on the engine, its mark and its images too.

        Under load the engine may still be removing a container, or making one that a killed server asked for.
        """

        async def gone() -> bool:
            await self.clear(installation)
            for image in await self.images(installation):
                await self._docker.images.delete(image["Id"], force=True)
            try:
                await remove_mark(self._docker, installation)
            except aiodocker.DockerError as error:
                if error.status != 409:  # a container that goes has the volume
                    raise
                return False
            return not await self.containers(installation=installation)

        await until(gone, "nothing of the installation is left on the engine")


async def end(docker: aiodocker.Docker, servers: Sequence[ServerProcess]) -> None:
    """Kill the servers, and remove all that their installations have on the engine."""
    for server in servers:
        server.kill()
    for installation in {server.installation for server in servers} - {None}:
        await Engine(docker).forget(installation)
