"""Agents of images that are not in use any more: their volumes, and the helpers that filled them.

A volume is removed when no container but its helper mounts it, and when it has been there for a while: another worker
may already know a newer image than this one, and must not lose its files before the first sandbox mounts them. A
sandbox that is made in between finds an empty volume, which the engine makes for it; then its start fails, and the
worker has the files copied again (`AgentMissing`).

The helper goes first, because the engine removes no volume that a container uses. A volume whose helper has gone and
which could not be removed itself is found again by its label.
"""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from uuid import UUID

import msgspec
from msgspec import Struct

from app.runtime.docker import names
from app.runtime.docker.agent_archive import SUFFIX
from app.runtime.docker.answers import Listed
from app.runtime.docker.containers import Containers
from app.runtime.docker.engine import Engine, Refused, trouble

_RUNNING = "running"


class Volume(Struct, frozen=True, rename="pascal"):
    """One row of a listing of volumes."""

    name: str
    created_at: datetime | None = None
    labels: dict[str, str] | None = None


class Volumes(Struct, frozen=True, rename="pascal"):
    """Answer of a listing."""

    volumes: list[Volume] | None = None


async def clean(
    engine: Engine, containers: Containers, installation: UUID, keep: str, before: datetime
) -> tuple[str, ...]:
    """The names of what was removed."""
    kept = names.agent_name(installation, keep)
    removed: list[str] = []
    for volume in await _ours(engine, installation):
        young = volume.created_at is None or volume.created_at.astimezone(UTC) >= before
        if volume.name != kept and not young and await _remove(engine, containers, volume.name):
            removed.append(volume.name)
    return tuple(removed)


async def _ours(engine: Engine, installation: UUID) -> list[Volume]:
    filters = {"label": [f"{name}={value}" for name, value in names.agent_labels(installation).items()]}
    params = {"filters": msgspec.json.encode(filters).decode()}
    try:
        found = await engine.ask("volumes", Volumes, params=params, limit=engine.times.volume)
    except Refused as refused:
        raise trouble("list volumes", refused) from None
    return [each for each in found.volumes or () if names.is_agent(each.labels or {}, installation)]


async def _remove(engine: Engine, containers: Containers, name: str) -> bool:
    users = await _users(engine, name)
    helpers = [each for each in users if {f"/{name}", f"/{name}{SUFFIX}"} & set(each.names or ())]
    if len(users) > len(helpers) or any(each.state == _RUNNING for each in helpers):
        return False
    for helper in helpers:
        await containers.delete(helper.id, name)
    try:
        await engine.command("DELETE", f"volumes/{name}", limit=engine.times.volume)
    except Refused as refused:
        if refused.status in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            return False  # another worker was first, or somebody mounts it now
        raise trouble(f"remove the volume {name}", refused) from None
    return True


async def _users(engine: Engine, volume: str) -> list[Listed]:
    """Every container that mounts it, running or not, whosever it is."""
    params = {"all": "1", "filters": msgspec.json.encode({"volume": [volume]}).decode()}
    try:
        return await engine.ask("containers/json", list[Listed], params=params, limit=engine.times.change)
    except Refused as refused:
        raise trouble("list containers", refused) from None
