"""`sandledger demo`: the main job in one narrated run, on real parts. Exit 0 only if every step was seen.

A server process of its own on the embedded PostgreSQL, a state folder that begins empty, a port the kernel picks, and
containers on the engine that the settings name. What the demo claims it looks up: over HTTP, and on the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiodocker
import aiohttp
from rich.console import Console
from rich.table import Table

from app.cli.local_image import ensure_busybox_image
from app.errors import SandledgerError
from app.settings import Settings

_PATIENCE_S = 30.0
_API_LINE = re.compile(r"API\s+(http://\S+)/v1")
_LABEL = "sandledger.io/installation"
_ID_LABEL = "opensandbox.io/id"
_CONFIG = """\
[server]
port = 0
[docker]
{host}
[sandledger]
state_dir = {state}
[sandledger.worker]
lease_seconds = 4
"""


class DemoFailed(SandledgerError):
    """A step was not seen."""


class _Server:
    """One `sandledger serve` after another on the same state folder."""

    def __init__(self, config: Path, log: Path) -> None:
        self._config = config
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self.base = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.endswith(("_DSN", "DATABASE_URL"))}
        environ.pop("OPENSANDBOX_SERVER_API_KEY", None)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app", "serve", "--config", str(self._config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environ,
        )
        self._process = process
        assert process.stdout is not None
        seen: list[str] = []
        try:
            async with asyncio.timeout(_PATIENCE_S * 2):
                while line := (await process.stdout.readline()).decode(errors="replace"):
                    seen.append(line)
                    if found := _API_LINE.search(line):
                        self.base = found[1]
                        self._drain = asyncio.create_task(self._keep_log(process.stdout, seen))
                        return
        except TimeoutError:
            pass
        raise DemoFailed("the server did not start:\n" + "".join(seen[-20:]))

    async def _keep_log(self, stream: asyncio.StreamReader, seen: list[str]) -> None:
        with self._log.open("a") as file:
            file.writelines(seen)
            while line := (await stream.readline()).decode(errors="replace"):
                file.write(line)
                file.flush()

    async def end(self, number: signal.Signals) -> int:
        process = self._process
        if process is None or process.returncode is not None:
            return 0
        process.send_signal(number)
        code = await process.wait()
        if self._drain is not None:
            await self._drain
        return code


class Demo:
    """The steps."""

    def __init__(self, server: _Server, http: aiohttp.ClientSession, docker: aiodocker.Docker, image: str) -> None:
        """On a started server."""
        self.server = server
        self.http = http
        self.docker: Any = docker  # its answers are untyped JSON
        self.image = image
        self.console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
        self._step = 0

    def say(self, text: str) -> None:
        """Begin a step."""
        self._step += 1
        self.console.print(f"\n[bold]{self._step}. {text}[/bold]")

    def saw(self, text: str) -> None:
        """Report an observation."""
        self.console.print(f"   [green]✓[/green] {text}")

    async def call(self, method: str, path: str, want: int, **kwargs: Any) -> Any:
        """One request; the status must be the wanted one."""
        async with self.http.request(method, f"{self.server.base}/v1{path}", **kwargs) as answer:
            text = await answer.text()
            if answer.status != want:
                raise DemoFailed(f"{method} {path}: expected {want}, got {answer.status} {text}")
            return json.loads(text) if text else None

    async def create(self, timeout_s: int, **headers: str) -> dict[str, Any]:
        """Create a sandbox that sleeps."""
        body = {
            "image": {"uri": self.image},
            "entrypoint": ["sleep", "3600"],
            "timeout": timeout_s,
            "resourceLimits": {"cpu": "250m", "memory": "64Mi"},
            "metadata": {"made-by": "demo"},
        }
        made = await self.call("POST", "/sandboxes", 202, json=body, headers=headers)
        check(made["status"]["state"] == "Pending", f"a new sandbox is Pending, this one {made['status']['state']}")
        return made

    async def state(self, sandbox: str) -> str:
        """Public state, also of one that has ended."""
        found = await self.call("GET", f"/sandboxes/{sandbox}?includeTerminal=true", 200)
        return cast("str", found["status"]["state"])

    async def reaches(self, sandbox: str, wanted: str) -> None:
        """Wait until the API says so."""

        async def there() -> bool:
            return await self.state(sandbox) == wanted

        await until(there, f"sandbox {sandbox} reaches {wanted}")

    async def containers(self, sandbox: str) -> list[str]:
        """`name status` of each container the engine has for a sandbox."""
        found = await self.docker.containers.list(all=True, filters=json.dumps({"label": [f"{_ID_LABEL}={sandbox}"]}))
        return [f"{box['Names'][0].lstrip('/')} ({box['Status']})" for box in found]

    async def timeline(self, sandbox: str, title: str) -> list[dict[str, Any]]:
        """Print and return the history."""
        items = (await self.call("GET", f"/sandboxes/{sandbox}/events?limit=1000", 200))["items"]
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for heading in ("position", "time (UTC)", "event", "actor", "reason"):
            table.add_column(heading, justify="right" if heading == "position" else "left", overflow="fold")
        for item in items:
            actor = f"{item['actor']['kind']} {item['actor']['name']}"
            at = datetime.fromisoformat(item["recordedAt"]).strftime("%H:%M:%S.%f")[:-3]
            table.add_row(str(item["position"]), at, item["type"], actor, _reason(item["data"]))
        self.console.print()
        self.console.print(table)
        return cast("list[dict[str, Any]]", items)

    async def leftovers(self, installation: str) -> list[str]:
        """What bears our label on the engine."""
        filters = json.dumps({"label": [f"{_LABEL}={installation}"]})
        boxes = await self.docker.containers.list(all=True, filters=filters)
        networks = await self.docker.networks.list(filters={"label": [f"{_LABEL}={installation}"]})
        answer = await self.docker.volumes.list(filters={"label": [f"{_LABEL}={installation}"]})
        volumes = cast("list[dict[str, Any]]", answer["Volumes"] or [])
        return [*(f"container {box.id}" for box in boxes), *map(str, networks), *map(str, volumes)]


def _reason(data: dict[str, Any]) -> str:
    keys = ("cause", "reason", "message", "found_by", "expires_at", "exit_code", "lived_s", "name")
    return ", ".join(f"{key}={data[key]}" for key in keys if key in data)


def check(holds: bool, text: str) -> None:
    """DemoFailed unless it holds."""
    if not holds:
        raise DemoFailed(text)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Poll a condition with a deadline."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not await condition():  # noqa: ASYNC110 - what it waits for is in another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise DemoFailed(f"waited {_PATIENCE_S:.0f} s in vain until {what}") from None


async def _first_life(demo: Demo) -> str:
    demo.say("Create a sandbox over HTTP")
    made = await demo.create(600)
    one = cast("str", made["id"])
    demo.saw(f"202 Accepted, state {made['status']['state']}, id {one}")
    await demo.reaches(one, "Running")
    names = await demo.containers(one)
    check(len(names) == 1, f"one container expected, the engine has {names}")
    demo.saw(f"Running; the engine shows {names[0]}")

    demo.say("Renew, pause, resume")
    wanted = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    renewed = await demo.call("POST", f"/sandboxes/{one}/renew-expiration", 200, json={"expiresAt": wanted})
    demo.saw(f"expires {renewed['expiresAt']} instead of {made['expiresAt']}")
    await demo.call("POST", f"/sandboxes/{one}/pause", 202)
    await demo.reaches(one, "Paused")
    names = await demo.containers(one)
    check("Paused" in names[0], f"the engine should show it paused: {names}")
    demo.saw(f"Paused; the engine shows {names[0]}")
    await demo.call("POST", f"/sandboxes/{one}/resume", 202)
    await demo.reaches(one, "Running")
    demo.saw("Running again")
    return one


async def _crash(demo: Demo) -> str:
    demo.say("Kill the server with SIGKILL while a second sandbox is being provisioned")
    two = cast("str", (await demo.create(600))["id"])
    state = await demo.state(two)
    check(state == "Pending", f"it was {state} before the kill; the demo wanted to kill in the middle")
    pid = demo.server.pid
    await demo.server.end(signal.SIGKILL)
    demo.saw(f"sandbox {two} is Pending; server process {pid} is dead")
    await demo.server.start()
    demo.saw(f"a new server process {demo.server.pid} runs at {demo.server.base}")
    await demo.reaches(two, "Running")
    names = await demo.containers(two)
    items = (await demo.call("GET", f"/sandboxes/{two}/events", 200))["items"]
    starts = [item for item in items if item["type"] == "sandbox.started"]
    check(len(names) == 1 and len(starts) == 1, f"exactly one start expected: {names}, {len(starts)} starts")
    demo.saw(f"Running exactly once: {names[0]}, one sandbox.started in its history")
    return two


async def _expiry(demo: Demo) -> str:
    demo.say("Let a third sandbox expire")
    three = cast("str", (await demo.create(60))["id"])
    await demo.reaches(three, "Running")
    soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    await demo.call("POST", f"/sandboxes/{three}/renew-expiration", 200, json={"expiresAt": soon})
    demo.saw(f"sandbox {three} is Running and its time is shortened to {soon}")
    await demo.reaches(three, "Terminated")
    gone = await demo.call("GET", f"/sandboxes/{three}", 404)
    demo.saw(f"GET now says 404: {gone['message']}")
    return three


async def _endings(demo: Demo, boxes: list[str], installation: str) -> None:
    demo.say("Delete the rest")
    for box in boxes:
        if await demo.state(box) != "Terminated":
            await demo.call("DELETE", f"/sandboxes/{box}", 204)
    for box in boxes:
        await demo.reaches(box, "Terminated")
    demo.saw("all Terminated")

    demo.say("What happened, from the event log")
    for number, box in enumerate(boxes, 1):
        items = await demo.timeline(box, f"sandbox {number}: {box}")
        check(items[-1]["type"] == "sandbox.terminated", f"the history of {box} does not end in sandbox.terminated")

    demo.say("Nothing of ours is left on the engine")
    left = await demo.leftovers(installation)
    check(not left, f"left behind: {left}")
    demo.saw("no container, network or volume bears our label")


async def _installation(demo: Demo, sandbox: str) -> str:
    found = await demo.docker.containers.list(all=True, filters=json.dumps({"label": [f"{_ID_LABEL}={sandbox}"]}))
    labels = cast("dict[str, str]", (await found[0].show())["Config"]["Labels"])
    return labels[_LABEL]


@asynccontextmanager
async def _stage(settings: Settings, home: Path) -> AsyncGenerator[Demo]:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    config = home / "demo.toml"
    host = "" if settings.docker.host is None else f"host = {json.dumps(settings.docker.host)}"
    config.write_text(_CONFIG.format(host=host, state=json.dumps(str(home / "state"))))
    async with aiodocker.Docker(url=settings.docker.host) as docker, aiohttp.ClientSession() as http:
        image = await ensure_busybox_image(docker)
        server = _Server(config, home / "server.log")
        try:
            await server.start()
            yield Demo(server, http, docker, image)
            code = await server.end(signal.SIGTERM)
            check(code == 0, f"the server stopped with exit code {code}")
        finally:
            await server.end(signal.SIGKILL)


async def play(settings: Settings) -> None:
    """Run every step.

    Raises:
        DemoFailed: names the step's expectation that was not met.
    """
    home = settings.sandledger.state_dir / "demo"
    async with _stage(settings, home) as demo:
        demo.console.print(f"server {demo.server.base}, its log in {home / 'server.log'}")
        one = await _first_life(demo)
        installation = await _installation(demo, one)
        two = await _crash(demo)
        three = await _expiry(demo)
        await _endings(demo, [one, two, three], installation)
        demo.console.print("\n[bold green]Every step was observed.[/bold green]")
