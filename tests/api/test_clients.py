"""The unmodified public clients, `opensandbox` and `opensandbox-cli` 1.1.1 from PyPI, over a socket."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from opensandbox import SandboxManager
from opensandbox.adapters.sandboxes_adapter import SandboxesAdapter
from opensandbox.config import ConnectionConfig
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.sandboxes import SandboxFilter, SandboxImageSpec

from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase
from app.domain.tenants import ANY_TENANT
from tests.api.conftest import KEY, observe
from tests.api.live import Live, serving


@pytest.fixture
def live(dsn: str) -> Iterator[Live]:
    with serving(dsn, api_key=KEY) as server:
        yield server


@pytest.fixture
async def manager(live: Live) -> AsyncIterator[SandboxManager]:
    async with await SandboxManager.create(config(live)) as made:
        yield made


def config(live: Live, key: str = KEY, **headers: str) -> ConnectionConfig:
    return ConnectionConfig(api_key=key, domain=f"127.0.0.1:{live.port}", headers=headers)


async def create(live: Live, **changes: Any) -> str:
    """Through the SDK's own lifecycle client; `Sandbox.create` would go on to look for the agent."""
    asked: dict[str, Any] = {
        "spec": SandboxImageSpec("busybox:1"),
        "entrypoint": ["tail", "-f", "/dev/null"],
        "env": {},
        "metadata": {},
        "timeout": timedelta(minutes=10),
        "resource": {"cpu": "1", "memory": "2Gi"},
        "network_policy": None,
        "extensions": {},
        "volumes": None,
    }
    made = await SandboxesAdapter(config(live)).create_sandbox(**(asked | changes))
    return made.id


async def test_create_and_get(live: Live, manager: SandboxManager):
    one = await create(live, env={"A": "1"}, metadata={"team": "a"}, timeout=None)
    info = await manager.get_sandbox_info(one)
    assert (info.id, info.status.state) == (one, "Pending")
    assert info.image is not None
    assert info.image.image == "busybox:1"
    assert info.entrypoint == ["tail", "-f", "/dev/null"]
    assert info.metadata == {"team": "a"}
    assert info.expires_at is None
    assert abs(info.created_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_list(live: Live, manager: SandboxManager):
    made = [await create(live, metadata={"n": str(n), "sp/ace": "a.b"}) for n in range(3)]
    live.run(observe(live.context.service, made[0]))
    every = await manager.list_sandbox_infos(SandboxFilter())
    assert [info.id for info in every.sandbox_infos] == made[::-1]
    assert (every.pagination.total_items, every.pagination.has_next_page) == (3, False)
    page = await manager.list_sandbox_infos(SandboxFilter(page=2, page_size=2))
    assert [info.id for info in page.sandbox_infos] == [made[0]]
    running = await manager.list_sandbox_infos(SandboxFilter(states=["Running", "Paused"]))
    assert [info.id for info in running.sandbox_infos] == [made[0]]
    labelled = await manager.list_sandbox_infos(SandboxFilter(metadata={"n": "1", "sp/ace": "a.b"}))
    assert [info.id for info in labelled.sandbox_infos] == [made[1]]


async def test_change(live: Live, manager: SandboxManager):
    one = await create(live, metadata={"a": "1", "b": "2"})
    patched = await manager.patch_sandbox_metadata(one, {"a": None, "c": "3"})
    assert patched.metadata == {"b": "2", "c": "3"}
    renewed = await manager.renew_sandbox(one, timedelta(hours=2))
    assert abs(renewed.expires_at - datetime.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
    assert (await manager.get_sandbox_info(one)).expires_at == renewed.expires_at
    await manager.kill_sandbox(one)
    with pytest.raises(SandboxApiException) as gone:
        await manager.get_sandbox_info(one)
    assert (gone.value.status_code, gone.value.error.code) == (404, "DOCKER::SANDBOX_NOT_FOUND")
    with pytest.raises(SandboxApiException):
        await manager.kill_sandbox(one)


async def test_pause_and_resume(live: Live, manager: SandboxManager):
    one = await create(live)
    with pytest.raises(SandboxApiException) as early:
        await manager.pause_sandbox(one)
    assert (early.value.status_code, early.value.error.code) == (409, "DOCKER::SANDBOX_NOT_RUNNING")
    service = live.context.service
    live.run(observe(service, one))

    async def play_engine(phase: Phase, power: Power) -> None:
        while True:
            loaded = await service.view.load(UUID(one), ANY_TENANT)
            assert loaded is not None
            if loaded[0].phase is phase:
                break
            await asyncio.sleep(0.01)
        await observe(service, one, power)

    for verb, under_way, power, final in (
        (manager.pause_sandbox, Phase.PAUSING, Power.PAUSED, "Paused"),
        (manager.resume_sandbox, Phase.RESUMING, Power.RUNNING, "Running"),
    ):
        engine = asyncio.get_running_loop().run_in_executor(None, live.run, play_engine(under_way, power))
        await verb(one)
        assert (await manager.get_sandbox_info(one)).status.state == final
        await engine


async def test_errors_are_what_the_sdk_expects(live: Live, manager: SandboxManager):
    with pytest.raises(SandboxApiException) as stranger:
        await SandboxesAdapter(config(live, "wrong")).get_sandbox_info(str(uuid4()))
    assert (stranger.value.status_code, stranger.value.error.code) == (401, "INVALID_API_KEY")
    named = SandboxesAdapter(config(live, **{"X-Request-ID": "from-the-client"}))
    with pytest.raises(SandboxApiException) as missing:
        await named.get_sandbox_info(str(uuid4()))
    assert missing.value.request_id == "from-the-client"
    with pytest.raises(SandboxApiException) as invalid:
        await create(live, metadata={"a": "not a label"})
    assert (invalid.value.status_code, invalid.value.error.code) == (400, "SANDBOX::INVALID_METADATA_LABEL")
    with pytest.raises(SandboxApiException) as short:
        await create(live, timeout=timedelta(seconds=1))
    assert short.value.status_code == 422
    with pytest.raises(SandboxApiException) as gone:
        await manager.get_diagnostic_logs(str(uuid4()), "all")
    assert (gone.value.status_code, gone.value.error.code) == (404, "DOCKER::SANDBOX_NOT_FOUND")


def osb(live: Live, home: Path, *words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """The command line, with a home of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPEN_SANDBOX")}
    environ |= {"HOME": str(home), "OPEN_SANDBOX_DOMAIN": f"127.0.0.1:{live.port}", "OPEN_SANDBOX_API_KEY": key}
    command = [sys.executable, "-m", "opensandbox_cli", "--no-color", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_line(live: Live, tmp_path: Path):
    one = asyncio.run(create(live, metadata={"team": "a"}))
    live.run(observe(live.context.service, one))

    listed = osb(live, tmp_path, "sandbox", "list", "-o", "json", "-s", "Running", "-m", "team=a")
    assert listed.returncode == 0, listed.stderr
    assert one in listed.stdout
    got = osb(live, tmp_path, "sandbox", "get", one, "-o", "json")
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout)["status"]["state"] == "Running"
    renewed = osb(live, tmp_path, "sandbox", "renew", one, "--timeout", "2h")
    assert renewed.returncode == 0, renewed.stderr + renewed.stdout
    killed = osb(live, tmp_path, "sandbox", "kill", one)
    assert killed.returncode == 0, killed.stderr
    gone = osb(live, tmp_path, "sandbox", "get", one)
    assert gone.returncode != 0
    assert "no longer exists" in gone.stdout + gone.stderr
    assert osb(live, tmp_path, "sandbox", "list", key="wrong").returncode != 0


# The same wire, without a client library in between


def test_over_a_socket(live: Live):
    with httpx.Client(base_url=live.base, headers={"OPEN-SANDBOX-API-KEY": KEY}) as http:
        health = http.get("/health")
        assert health.json() == {"status": "healthy"}
        assert {"date", "server", "x-request-id"} <= health.headers.keys()
        as_json = {"Content-Type": "application/json"}
        for extra in (1, 1024 * 1024, 4 * 1024 * 1024):
            big = b"x" * (1024 * 1024 + extra)
            assert http.post("/v1/sandboxes", content=big, headers=as_json).status_code == 413
            assert http.post("/v1/sandboxes", content=iter([big]), headers=as_json).status_code == 413
        assert http.head("/v1/sandboxes").status_code == 200
        assert http.get("/v1/sandboxes").status_code == 200
