"""`sandledger demo`: the main job in one narrated run, on real parts. Exit 0 only if every step was seen.

A server process of its own on the embedded PostgreSQL, a state folder that begins empty, a port the kernel picks, and
containers on the engine that the settings name. What the demo claims it looks up: over HTTP, and on the engine.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiodocker
import aiohttp
from rich.console import Console
from rich.table import Table

from app.cli.demonstration.clients import ANSWERS, PROGRAM, has_sdk, remove_agent, run_program
from app.cli.demonstration.registry import SlowRegistry, serve
from app.cli.demonstration.relay import REFUSAL, Relay, relay
from app.cli.demonstration.server import PATIENCE_SECONDS, DemoFailed, Server, environment
from app.cli.local_image import ensure_busybox_image, root_filesystem
from app.settings import Settings

_LABEL = "sandledger.io/installation"
_ID_LABEL = "sandledger.io/object"
_KEPT_ROLES = ("mark", "agent", "network")
_CONFIG = """\
[server]
port = 0
[docker]
{host}
[runtime]
execd_image = {agent}
[sandledger]
state_dir = {state}
[sandledger.worker]
lease_seconds = 4
[sandledger.deadlines]
pausing_seconds = 4
"""
_TRICKLE_BYTES = 1_500_000


class Demo:
    """The steps."""

    def __init__(
        self, server: Server, http: aiohttp.ClientSession, docker: aiodocker.Docker, image: str, engine: Relay
    ) -> None:
        """On a started server."""
        self.engine = engine
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

    async def create(self, timeout_s: int, image: str | None = None) -> dict[str, Any]:
        """Create a sandbox that sleeps."""
        body = {
            "image": {"uri": image or self.image},
            "entrypoint": ["sleep", "3600"],
            "timeout": timeout_s,
            "resourceLimits": {"cpu": "250m", "memory": "64Mi"},
            "metadata": {"made-by": "demo"},
        }
        made = await self.call("POST", "/sandboxes", 202, json=body)
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
        return [f"{one['Names'][0].lstrip('/')} ({one['Status']})" for one in found]

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
        containers = [
            one
            for one in await self.docker.containers.list(all=True, filters=filters)
            if one["Labels"].get("sandledger.io/role") not in _KEPT_ROLES
        ]
        found = await self.docker.networks.list(filters={"label": [f"{_LABEL}={installation}"]})
        networks = [one["Name"] for one in found if one["Labels"].get("sandledger.io/role") not in _KEPT_ROLES]
        answer = await self.docker.volumes.list(filters={"label": [f"{_LABEL}={installation}"]})
        volumes = [
            volume["Name"]
            for volume in cast("list[dict[str, Any]]", answer["Volumes"] or [])
            if volume["Labels"].get("sandledger.io/role") not in _KEPT_ROLES
        ]
        return [*(f"container {one.id}" for one in containers), *networks, *volumes]


def _reason(data: dict[str, Any]) -> str:
    keys = (
        "end_cause",
        "step",
        "reason",
        "message",
        "found_by",
        "expires_at",
        "exit_code",
        "lived_ms",
        "engine",
        "took_ms",
    )
    return ", ".join(f"{key}={data[key]}" for key in keys if key in data)


def check(holds: bool, text: str) -> None:
    """DemoFailed unless it holds."""
    if not holds:
        raise DemoFailed(text)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Poll a condition with a deadline."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await condition():  # noqa: ASYNC110 - what it waits for is in another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise DemoFailed(f"waited {PATIENCE_SECONDS:.0f} s without success until {what}") from None


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


async def _sdk(demo: Demo) -> list[str]:
    """The sandbox that a program made."""
    demo.say(
        "Run a program that uses the public SDK, unmodified: commands in a sandbox, directly and through the server"
    )
    demo.console.print("\n".join(f"   [dim]{line}[/dim]" for line in PROGRAM.splitlines()), highlight=False)
    try:
        sandbox, answers = await run_program(demo.server.base, demo.image)
    except ValueError as error:
        raise DemoFailed(f"the program failed:\n{error}") from None
    for answer, wanted in zip(answers, ANSWERS, strict=True):
        check(answer.endswith(wanted), f"the program printed {answer!r}, and not {wanted!r}")
        demo.saw(f"it printed: {answer}")
    return [sandbox]


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


async def _slow_pull(demo: Demo) -> str:
    demo.say("Create a sandbox from an image that comes slowly")
    architecture = (await demo.docker.version())["Arch"]
    registry = SlowRegistry(await asyncio.to_thread(root_filesystem), architecture, _TRICKLE_BYTES)
    async with serve(registry):
        made = await demo.create(600, registry.reference)
        sandbox = cast("str", made["id"])
        shown: list[str] = []

        async def has_come() -> bool:
            status = (await demo.call("GET", f"/sandboxes/{sandbox}", 200))["status"]
            line = f"{status['state']}, {status['reason']}: {status['message']}"
            if line not in shown:
                shown.append(line)
                demo.saw(line)
            return status["state"] != "Pending"

        await until(has_come, f"the image of {sandbox} has come")
    # An engine that has the layer from another image downloads nothing, and then there are no bytes to show.
    check(any("MB" in line or " layers" in line for line in shown), f"no progress was shown: {shown}")
    check(await demo.state(sandbox) == "Running", f"it should be Running: {shown}")
    await demo.docker.images.delete(registry.reference, force=True)
    return sandbox


async def _refused_pause(demo: Demo, sandbox: str) -> None:
    demo.say("Pause a sandbox while the engine refuses to")
    demo.engine.refuses_pause = True
    await demo.call("POST", f"/sandboxes/{sandbox}/pause", 202, headers={"Prefer": "respond-async"})
    await demo.reaches(sandbox, "Pausing")
    demo.saw(f"202; the engine answers 500: {REFUSAL}")
    await demo.reaches(sandbox, "Running")
    items = (await demo.call("GET", f"/sandboxes/{sandbox}/events?limit=1000", 200))["items"]
    failed = [item for item in items if item["type"] == "sandbox.pause_failed"]
    check(len(failed) == 1, f"one sandbox.pause_failed expected: {[item['type'] for item in items]}")
    demo.saw(f"Running again, unharmed: {failed[0]['data']['message']}")
    demo.engine.refuses_pause = False


async def _operator(demo: Demo, config: Path) -> None:
    demo.say("What an operator sees: sandledger status")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", "status", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment() | {"COLUMNS": "110"},
    )
    printed, _ = await process.communicate()
    demo.console.print(printed.decode(), markup=False)
    check(process.returncode == 0, f"status found something wrong (exit code {process.returncode})")
    demo.saw("exit code 0: nothing is stuck, late or failing")


async def _endings(demo: Demo, sandboxes: list[str], installation: str) -> None:
    demo.say("Delete the rest")
    for one in sandboxes:
        if await demo.state(one) != "Terminated":
            await demo.call("DELETE", f"/sandboxes/{one}", 204)
    for one in sandboxes:
        await demo.reaches(one, "Terminated")
    demo.saw("all Terminated")

    demo.say("What happened, from the event log")
    for number, one in enumerate(sandboxes, 1):
        items = await demo.timeline(one, f"sandbox {number}: {one}")
        check(items[-1]["type"] == "sandbox.terminated", f"the history of {one} does not end in sandbox.terminated")

    demo.say("Nothing of ours is left on the engine")
    left = await demo.leftovers(installation)
    check(not left, f"left behind: {left}")
    demo.saw(
        "no container or volume bears our label, but the mark by which the engine is known, the agent, our network"
    )


async def _installation(demo: Demo, sandbox: str) -> str:
    found = await demo.docker.containers.list(all=True, filters=json.dumps({"label": [f"{_ID_LABEL}={sandbox}"]}))
    labels = cast("dict[str, str]", (await found[0].show())["Config"]["Labels"])
    return labels[_LABEL]


@asynccontextmanager
async def _stage(settings: Settings, home: Path, agent: str) -> AsyncGenerator[Demo]:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    # A socket's path holds about a hundred bytes, so the relay's is not in the state folder.
    sockets = Path(tempfile.mkdtemp(prefix="sandledger-demo-"))
    host = settings.docker.host or "unix:///var/run/docker.sock"
    try:
        async with (
            aiodocker.Docker(url=host) as docker,
            aiohttp.ClientSession() as http,
            relay(host, sockets / "engine") as engine,
        ):
            config = home / "demo.toml"
            address = json.dumps(f"unix://{sockets}/engine")
            state = json.dumps(str(home / "state"))
            config.write_text(_CONFIG.format(host=f"host = {address}", agent=json.dumps(agent), state=state))
            image = await ensure_busybox_image(docker)
            server = Server(config, home / "server.log")
            try:
                await server.start()
                yield Demo(server, http, docker, image, engine)
                code = await server.end(signal.SIGTERM)
                check(code == 0, f"the server stopped with exit code {code}")
            finally:
                await server.end(signal.SIGKILL)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


async def _remove_mark(demo: Demo, installation: str) -> None:
    """The mark and our network outlive a server; this installation ends with the demo."""
    short = installation.replace("-", "")[:8]
    volume = await demo.docker.volumes.get(f"sandledger-mark-{short}")
    await volume.delete()
    network = await demo.docker.networks.get(f"sandledger-{short}")
    await network.delete()


async def play(settings: Settings, agent: str) -> None:
    """Run every step. `agent` names an image with the agent that the engine has; with "" no program uses the SDK.

    Raises:
        DemoFailed: names the step's expectation that was not met.
    """
    home = settings.sandledger.state_dir / "demo"
    async with _stage(settings, home, agent) as demo:
        demo.console.print(f"server {demo.server.base}, its log in {home / 'server.log'}")
        one = await _first_life(demo)
        installation = await _installation(demo, one)
        made: list[str] = []
        if agent and has_sdk():
            made = await _sdk(demo)
        else:
            lacking = "the package opensandbox" if agent else "an image with the agent (--agent-image)"
            demo.console.print(f"\n[yellow]Not shown: commands in a sandbox through the SDK need {lacking}.[/yellow]")
        await _refused_pause(demo, one)
        two = await _crash(demo)
        three = await _slow_pull(demo)
        four = await _expiry(demo)
        await _operator(demo, home / "demo.toml")
        await _endings(demo, [one, *made, two, three, four], installation)
        await remove_agent(demo.docker, _LABEL, installation)
        await _remove_mark(demo, installation)
        demo.console.print("\n[bold green]Every step was observed.[/bold green]")
