"""The unmodified command line from PyPI through whole lives, direct and through the server."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import KEY
from tests.clients.cli import LATER, PROGRAM, Osb, command_line, commands
from tests.clients.conftest import Fleet
from tests.clients.life import until

pytestmark = [pytest.mark.engine, pytest.mark.proof, pytest.mark.timeout(300)]
TABLE = ("-o", "table")
JSON = ("-o", "json")
ENTRYPOINT = ("--entrypoint", "sleep", "--entrypoint", "3600")


async def sandboxes(osb: Osb, image: str) -> str:
    """Create one and look at it."""
    asked = ("--image", image, "--timeout", "10m", "--env", "COLOUR=red", "--metadata", "by=cli")
    limits = ("--resource", "cpu=250m", "--resource", "memory=128Mi")
    made = await osb("sandbox", "create", *asked, *limits, *ENTRYPOINT, *JSON)
    one: str = made.json["id"]
    assert (await osb("sandbox", "get", one, *JSON)).json["status"]["state"] == "Running"
    assert one in (await osb("sandbox", "list", "-m", "by=cli", "-s", "Running", *JSON)).out
    assert one[:8] in (await osb("sandbox", "list", *TABLE)).out
    assert "true" in (await osb("sandbox", "health", one, *JSON)).out.lower()
    assert (await osb("sandbox", "metrics", one, *JSON)).json["memory_total_in_mib"] > 0
    assert ":" in (await osb("sandbox", "endpoint", one, "--port", "3000", *JSON)).json["endpoint"]
    await osb("sandbox", "renew", one, "--timeout", "2h")
    return one


async def run_commands(osb: Osb, one: str) -> None:
    # It writes the text of each event, and an agent leaves out the ends of lines.
    assert (await osb("command", "run", one, "-w", "/tmp", "--", "sh", "-c", "echo $COLOUR")).out == "red\n"
    failed = await osb("command", "run", one, "--", "sh", "-c", "echo bad >&2; exit 3", code=1)
    assert "bad" in failed.err
    begun = await osb("command", "run", one, "--background", *JSON, "--", "sh", "-c", "echo begun; sleep 3600")
    execution: str = begun.json["execution_id"]
    assert (await osb("command", "status", one, execution, *JSON)).json["running"] is True

    async def wrote() -> bool:
        return "begun" in (await osb("command", "logs", one, execution)).out

    await until(wrote, "the command in the background has written")
    await osb("command", "interrupt", one, execution)

    async def ended() -> bool:
        return (await osb("command", "status", one, execution, *JSON)).json["running"] is False

    await until(ended, "the interrupted command has ended")
    session: str = (await osb("command", "session", "create", one, "-w", "/tmp", *JSON)).json["session_id"]
    await osb("command", "session", "run", one, session, "--", "export", "KEPT=yes")
    kept = await osb("command", "session", "run", one, session, "--", "sh", "-c", "echo $KEPT; pwd")
    assert "yes" in kept.out and "/tmp" in kept.out
    await osb("command", "session", "delete", one, session)


async def move_files(osb: Osb, one: str) -> None:
    local = osb.home / "local"
    local.write_bytes(bytes(range(256)) * 100)
    await osb("file", "mkdir", one, "/tmp/f", "--mode", "750")
    await osb("file", "write", one, "/tmp/f/note", "--content", "alpha", "--mode", "640")
    await osb("file", "write", one, "/tmp/f/piped", given="from standard input")
    assert (await osb("file", "cat", one, "/tmp/f/piped")).out.strip() == "from standard input"
    await osb("file", "replace", one, "/tmp/f/note", "--old", "alpha", "--new", "beta")
    assert (await osb("file", "cat", one, "/tmp/f/note")).out.strip() == "beta"
    await osb("file", "upload", one, str(local), "/tmp/f/bytes")
    await osb("file", "download", one, "/tmp/f/bytes", str(osb.home / "back"))
    assert (osb.home / "back").read_bytes() == local.read_bytes()
    await osb("file", "mv", one, "/tmp/f/note", "/tmp/f/moved.txt")
    await osb("file", "chmod", one, "/tmp/f/moved.txt", "--mode", "600")
    assert "600" in (await osb("file", "info", one, "/tmp/f/moved.txt", *JSON)).out
    assert "/tmp/f/moved.txt" in (await osb("file", "search", one, "/tmp/f", "--pattern", "*.txt", *JSON)).out
    await osb("file", "rm", one, "/tmp/f/bytes")
    assert "404" in str(await osb("file", "cat", one, "/tmp/f/bytes", code=1))
    await osb("file", "rmdir", one, "/tmp/f")


async def take_snapshots(osb: Osb, one: str) -> None:
    await osb("command", "run", one, "--", "sh", "-c", "echo kept > /kept")
    made = (await osb("snapshot", "create", one, "--name", "first", *JSON)).json
    taken: str = made["id"]
    assert (made["sandbox_id"], made["name"]) == (one, "first")

    async def ready() -> bool:
        state = (await osb("snapshot", "get", taken, *JSON)).json["status"]["state"]
        assert state in ("Creating", "Ready"), state
        return state == "Ready"

    await until(ready, "the snapshot is ready")
    listed = await osb("snapshot", "list", "--sandbox-id", one, "--state", "Ready", *JSON)
    assert taken in listed.out
    copy: str = (await osb("sandbox", "create", "--snapshot-id", taken, "--timeout", "10m", *ENTRYPOINT, *JSON)).json[
        "id"
    ]
    assert (await osb("command", "run", copy, "--", "cat", "/kept")).out.strip() == "kept"
    in_use = await osb("snapshot", "delete", taken, code=1)
    assert "SNAPSHOT::DELETE_CONFLICT" in in_use.out + in_use.err
    await osb("sandbox", "kill", copy)

    async def deleted() -> bool:
        return "DELETE_CONFLICT" not in str(await osb("snapshot", "delete", taken, code=None))

    await until(deleted, "the copy is gone, and the snapshot after it")
    gone = await osb("snapshot", "get", taken, code=1)
    assert "SNAPSHOT::NOT_FOUND" in gone.out + gone.err


async def diagnose(osb: Osb, one: str) -> None:
    logs = (await osb("diagnostics", "logs", one, "--scope", "container", *JSON)).json
    assert (logs["kind"], logs["scope"]) == ("logs", "container")
    assert "requested" in (await osb("diagnostics", "events", one, "--scope", "runtime", "-o", "raw")).out
    assert await osb("devops", "logs", one, "--tail", "5")
    assert "requested" in (await osb("devops", "events", one)).out
    inspected = (await osb("devops", "inspect", one)).out
    assert one in inspected and "COLOUR=" in inspected and "COLOUR=red" not in inspected
    assert "SANDBOX DIAGNOSTICS SUMMARY" in (await osb("devops", "summary", one)).out


async def stop(osb: Osb, one: str) -> None:
    await osb("sandbox", "pause", one)

    async def paused() -> bool:
        return (await osb("sandbox", "get", one, *JSON)).json["status"]["state"] == "Paused"

    await until(paused, "the sandbox is paused")
    await osb("sandbox", "resume", one)
    assert (await osb("command", "run", one, "--", "echo", "awake")).out.strip() == "awake"
    await osb("sandbox", "kill", one)
    gone = await osb("sandbox", "get", one, code=1)
    assert "DOCKER::SANDBOX_NOT_FOUND" in gone.out + gone.err


async def watch_metrics(osb: Osb, one: str) -> None:
    """The program itself, as a user starts and ends it."""
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "sandbox", "metrics", one, "--watch", *JSON), env=osb.environ, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        lines: list[Any] = [json.loads(await process.stdout.readline()) for _ in range(2)]
        assert lines[0]["timestamp"] < lines[1]["timestamp"]
        process.terminate()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_whole_lives_while_servers_die(fleet: Fleet, image: str, tmp_path: Path):
    async with (
        command_line(_home(tmp_path, "direct"), fleet.front.domain, KEY, proxied=False) as direct,
        command_line(_home(tmp_path, "proxied"), fleet.front.domain, KEY, proxied=True) as proxied,
    ):
        both = (direct, proxied)
        made = await asyncio.gather(*(sandboxes(osb, image) for osb in both))
        await asyncio.gather(*(run_commands(osb, one) for osb, one in zip(both, made, strict=True)))
        await fleet.kill_one_of_each()
        await asyncio.gather(*(move_files(osb, one) for osb, one in zip(both, made, strict=True)))
        await take_snapshots(direct, made[0])
        await asyncio.gather(*(diagnose(osb, one) for osb, one in zip(both, made, strict=True)))
        await asyncio.gather(*(watch_metrics(osb, one) for osb, one in zip(both, made, strict=True)))
        await asyncio.gather(*(stop(osb, one) for osb, one in zip(both, made, strict=True)))
        not_run = set(commands()) - direct.ran
        assert {name.split()[0] for name in not_run} == set(LATER), "every other command is part of a life"


def _home(above: Path, name: str) -> Path:
    home = above / name
    home.mkdir()
    return home
