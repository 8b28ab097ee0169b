"""The unmodified Python SDK through whole lives: both faces, direct and through the server, while servers die."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from opensandbox import (
    AcquirePolicy,
    PoolCreationSpec,
    Sandbox,
    SandboxManager,
    SandboxPoolAsync,
    SandboxPoolManagerAsync,
)
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.sandboxes import SandboxFilter
from opensandbox.services import Commands, Filesystem

from tests.chaos.harness import KEY, ServerProcess
from tests.clients.conftest import Fleet, once_all_are_there
from tests.clients.kinds import ASYNC, SYNC, Kind
from tests.clients.life import RESOURCE, Life, texts, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


async def test_whole_lives_while_servers_die(fleet: Fleet, image: str):
    lives = [
        Life(kind, image, fleet.connection(use_server_proxy=proxied))
        for kind in (ASYNC, SYNC)
        for proxied in (False, True)
    ]
    await asyncio.gather(*(life.first_act() for life in lives))
    assert all(fleet.front.served.values()), "both servers took part"
    await fleet.kill_one_of_each()
    await asyncio.gather(*(life.second_act() for life in lives))
    # One of each face; whether the agent is reached through the server makes no difference to them.
    await asyncio.gather(*(life.snapshots() for life in lives[::2]))
    await asyncio.gather(*(life.third_act() for life in lives))


async def test_pools_while_servers_die(fleet: Fleet, image: str):
    act = once_all_are_there(2, fleet.kill_one_of_each)
    await asyncio.gather(*(pool_life(fleet, image, kind, act) for kind in (ASYNC, SYNC)))


async def pool_life(fleet: Fleet, image: str, kind: Kind, between: Callable[[], Awaitable[None]]):
    name = f"pool-{kind.name}"
    config = kind.config(**fleet.connection(use_server_proxy=True))
    spec = PoolCreationSpec(image=image, entrypoint=["sleep", "3600"], resource=RESOURCE, metadata={"pool": name})
    store = kind.store()
    pool: Any = await kind.build(
        kind.pool, pool_name=name, max_idle=2, state_store=store, connection_config=config, creation_spec=spec
    )
    manager = await kind.manager.create(kind.config(**fleet.connection()))
    try:
        await pool.start()

        async def warm() -> bool:
            return (await pool.snapshot()).idle_count == 2

        await until(warm, "two sandboxes are idle")
        idle = {each.sandbox_id for each in await pool.snapshot_idle_entries()}
        taken = await pool.acquire(sandbox_timeout=timedelta(minutes=5), policy=AcquirePolicy.FAIL_FAST)
        assert taken.id in idle
        assert texts((await taken.commands.run("echo pooled")).logs.stdout) == ["pooled"]
        other = await pool.acquire()
        await other.kill()
        await other.close()
        await between()
        await until(warm, "the pool has made two more")
        await pool.resize(0)
        await pool.release_all_idle()
        await manager.kill_sandbox(taken.id)
        await taken.close()
        await pool.shutdown()
        destroyed = await (
            await kind.build(kind.pool_manager, state_store=store, connection_config=kind.config(**fleet.connection()))
        ).destroy(name)
        assert destroyed.pool_name == name

        async def none_left() -> bool:
            page = await manager.list_sandbox_infos(SandboxFilter(metadata={"pool": name}))
            return not page.sandbox_infos

        await until(none_left, "all sandboxes of the pool are gone")
    finally:
        await manager.close()


async def test_a_sandbox_that_cannot_be_used(
    serve: Callable[..., Awaitable[ServerProcess]], agent_image: str, image: str
):
    """The error names the reason, and the SDK deletes what it made."""
    server = await serve(runtime=f'execd_image = "{agent_image}"')
    connection = {"api_key": KEY, "domain": server.base.removeprefix("http://")}
    with pytest.raises(SandboxApiException) as caught:
        await ASYNC.sandbox.create(
            image, entrypoint=["sh", "-c", "exit 3"], resource=RESOURCE, connection_config=ASYNC.config(**connection)
        )
    # The SDK expects no 409 there, so it keeps the body as text.
    assert caught.value.status_code == 409
    assert "DOCKER::SANDBOX_NOT_RUNNING" in str(caught.value) and "code 3" in str(caught.value)
    manager = await ASYNC.manager.create(ASYNC.config(**connection))

    async def gone() -> bool:
        return not (await manager.list_sandbox_infos(SandboxFilter())).sandbox_infos

    await until(gone, "what was made is deleted")
    await manager.close()


# What is called


LATER = {
    "create_from_template": "templates are 501 on a Docker runtime, on the public server too",
    "create_template": "as create_from_template",
    "delete_template": "as create_from_template",
    "get_template": "as create_from_template",
    "list_templates": "as create_from_template",
    "delete_egress_rules": "it needs the egress sidecar, which comes with network policies",
    "get_egress_policy": "it needs the egress sidecar, which comes with network policies",
    "patch_egress_rules": "it needs the egress sidecar, which comes with network policies",
    "files_with_identity": "an agent of a newer kind; the stand-in has no accounts to act for",
    "release_all_idle_parallel": "release_all_idle with threads",
}
"""Public calls of the SDK that no life makes, and why. The same holds for what `isolation` and `credential_vault` have."""


def test_every_public_call_is_part_of_a_life():
    kinds = (Sandbox, SandboxManager, SandboxPoolAsync, SandboxPoolManagerAsync, Commands, Filesystem)
    public = {
        name
        for kind in kinds
        for name, value in vars(kind).items()
        if not name.startswith("_") and not isinstance(value, property)
    }
    tree = [ast.parse(Path(file).read_text()) for file in (__file__, Path(__file__).with_name("life.py"))]
    called = {node.attr for each in tree for node in ast.walk(each) if isinstance(node, ast.Attribute)}
    assert public - called == LATER.keys()
