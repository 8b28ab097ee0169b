"""What doctor says of the engine's live-restore: the engine's own answer, and that answer turned round or left out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiodocker
import pytest

from tests.cli.test_commands import config, home, run
from tests.drivers.proxy import EngineProxy

__all__ = ["home"]


async def engine_lines(home: Path, dsn: str, docker_host: str) -> tuple[int, list[str]]:
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    done = await asyncio.to_thread(
        run, "doctor", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=docker_host
    )
    return done.returncode, [line for line in done.stderr.splitlines() if "engine" in line and "looking at" not in line]


async def info(docker_host: str) -> dict[str, Any]:
    async with aiodocker.Docker(url=docker_host) as docker:
        return await docker.system.info()


async def test_the_engine_s_own_answer_is_shown(home: Path, dsn: str, docker_host: str) -> None:
    enabled = (await info(docker_host))["LiveRestoreEnabled"]
    code, lines = await engine_lines(home, dsn, docker_host)
    assert code == 0
    assert lines[0].startswith("ok    engine")
    assert lines[1].startswith("ok    live-restore on" if enabled else "WARN  live-restore off")


@pytest.mark.parametrize(
    ("enabled", "wanted"),
    [
        (True, ["ok    live-restore on: sandboxes outlive"]),
        (False, ["WARN  live-restore off: a restart or crash of the engine ends all sandboxes on it"]),
        (None, []),
    ],
)
async def test_an_engine_without_it_is_warned_of_and_no_reason_to_fail(
    home: Path, dsn: str, docker_host: str, enabled: bool | None, wanted: list[str]
) -> None:
    answer = await info(docker_host)
    del answer["LiveRestoreEnabled"]
    proxy = EngineProxy(docker_host)
    proxy.answers["info"] = json.dumps(answer if enabled is None else answer | {"LiveRestoreEnabled": enabled}).encode()
    await proxy.up()
    try:
        code, lines = await engine_lines(home, dsn, proxy.address)
    finally:
        await proxy.close()
    assert code == 0
    assert len(lines[1:]) == len(wanted)
    for line, start in zip(lines[1:], wanted, strict=True):
        assert line.startswith(start)
    assert all('"live-restore": true' in line for line in lines if line.startswith("WARN"))
