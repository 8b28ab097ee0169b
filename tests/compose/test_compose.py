"""compose.yaml is run: two API servers, two workers and PostgreSQL on the real engine, with base images made here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import aiodocker
import pytest

from app.cli.local_image import ensure_busybox_image
from tests.agent.image import ensure_agent_image
from tests.compose.stack import PAGE, SANDBOX_IMAGE, Stack
from tests.conftest import ROOT

APIS = ("api1", "api2")
WORKERS = ("worker1", "worker2")


@pytest.fixture
def stack(docker_host: str, tmp_path: Path) -> Iterator[Stack]:
    async def images() -> str:
        """The agent's; both are there."""
        async with aiodocker.Docker(url=docker_host) as docker:
            await ensure_busybox_image(docker, SANDBOX_IMAGE)
            return await ensure_agent_image(docker)

    tmp_path.chmod(0o755)
    config = tmp_path / "server.toml"
    own = (ROOT / "app" / "container" / "server.toml").read_text()
    made = Stack(docker_host, config)
    config.write_text(f'{own}\n[runtime]\nexecd_image = "{asyncio.run(images())}"\n')
    try:
        yield made
    finally:
        made.close()


def create_through_each(stack: Stack) -> None:
    """Each one's sandbox is seen to run through the other."""
    for here, there in (APIS, reversed(APIS)):
        sandbox = stack.create(here)
        stack.until(f"{sandbox} of {here} runs", lambda there=there, sandbox=sandbox: stack.runs(there, sandbox))


def read_through_each(stack: Stack) -> None:
    """What a sandbox serves is read where each API server says, directly and through that server."""
    for api in APIS:
        for sandbox in stack.made:
            for through_server in (False, True):
                assert stack.page(api, sandbox, through_server=through_server) == PAGE


def hardening(stack: Stack, service: str) -> None:
    seen = stack.container(service)
    host = seen["HostConfig"]
    assert host["ReadonlyRootfs"] and host["Init"] and host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    sockets = [each["Destination"] for each in seen["Mounts"] if each["Destination"].endswith(".sock")]
    if service in WORKERS:
        assert sockets == ["/var/run/docker.sock"]
    else:
        assert sockets == []
        assert seen["Config"]["User"] == "65534:65534"


@pytest.mark.timeout(600)  # it builds an image, beside whatever else this machine does
@pytest.mark.proof
def test_two_of_each_serve_outlive_kills_and_leave_nothing(stack: Stack) -> None:
    stack.make_base_images()
    stack.compose("up", "--detach", "--build")
    for api in APIS:
        stack.until(f"{api} is ready", lambda api=api: stack.ready(api))
    for service in (*APIS, *WORKERS):
        hardening(stack, service)
    for worker in WORKERS:
        stack.until(
            f"{worker} is healthy",
            lambda worker=worker: stack.container(worker)["State"]["Health"]["Status"] == "healthy",
        )
    assert "Traceback" not in stack.compose("exec", "-T", "worker1", "sandledger", "doctor")
    create_through_each(stack)
    read_through_each(stack)

    killed = ("api1", "worker1", "postgres")
    before = {each: stack.container(each)["State"]["StartedAt"] for each in killed}
    stack.kill(*killed)
    for each in killed:
        stack.until(
            f"{each} runs again",
            lambda each=each: (
                (state := stack.container(each)["State"])["Running"] and state["StartedAt"] != before[each]
            ),
        )
    for api in APIS:
        stack.until(f"{api} is ready again", lambda api=api: stack.ready(api))
    for sandbox in stack.made:
        assert stack.runs("api1", sandbox)
    create_through_each(stack)
    read_through_each(stack)

    assert len(stack.sandbox_containers()) == 4
    for api, sandbox in zip(APIS * 2, stack.made, strict=True):
        with stack.api(api) as client:
            assert client.delete(f"/v1/sandboxes/{sandbox}").status_code == 204
    stack.until("their containers are removed", lambda: stack.sandbox_containers() == [])
    stack.compose("down", "--volumes")
    assert [stack.listed(path, all="1") for path in ("containers/json", "networks", "volumes")] == [[], [], []]


@pytest.mark.parametrize(
    "missing", ["POSTGRES_PASSWORD", "SERVER_PASSWORD", "OPENSANDBOX_SERVER_API_KEY", "SANDLEDGER_MASTER_KEY"]
)
def test_no_secret_has_a_default(stack: Stack, missing: str) -> None:
    with pytest.raises(AssertionError, match="set it"):
        stack.compose("config", **{missing: ""})
