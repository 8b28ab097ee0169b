"""Containers of one engine: inspect one, remove one, list all of ours."""

from __future__ import annotations

from http import HTTPStatus
from uuid import UUID

import msgspec

from app.domain.sandbox.observed import Part
from app.runtime.docker import names
from app.runtime.docker.answers import Inspected, Listed, listed, made_at
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.docker.verdicts import remove_verdict
from app.runtime.driver import Leftover, Misnamed, Observed, Ref


class Containers:
    """What the engine has of ours."""

    def __init__(self, engine: Engine, installation: UUID) -> None:
        self._engine = engine
        self._installation = installation

    async def show(self, name_or_id: str) -> Inspected | None:
        """Any container. None = the engine answered that there is none."""
        try:
            return await self._engine.ask(f"containers/{name_or_id}/json", Inspected)
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise trouble("show a container", refused) from None

    async def ours(self, ref: Ref) -> tuple[Inspected, names.Identity] | None:
        """The part `main` of an object, by the id that the log knows, else by its name. None = none of ours.

        The id comes first: where a person renamed the container, another one with copied labels may have its name.
        """
        return await self.known(ref) or await self.named(ref.object_id)

    async def named(self, object_id: UUID) -> tuple[Inspected, names.Identity] | None:
        """The container that has the derived name and our labels."""
        shown = await self.show(names.container_name(object_id))
        identity = None if shown is None else shown.identity(self._installation)
        return (shown, identity) if shown is not None and identity is not None else None

    async def known(self, ref: Ref) -> tuple[Inspected, names.Identity] | None:
        """The container that bears the id that the log knows, whatever its name is now."""
        shown = None if ref.runtime_id is None else await self.show(ref.runtime_id)
        identity = None if shown is None else names.labelled(shown.labels, self._installation)
        # The engine resolves names as well as ids: a stranger's container may be called like the id.
        if shown is None or shown.id != ref.runtime_id or identity is None:
            return None
        if (identity.object_id, identity.role) != (ref.object_id, names.MAIN):
            return None
        return shown, msgspec.structs.replace(identity, name=shown.name.removeprefix("/"))

    async def delete(self, runtime_id: str, name: str) -> bool:
        """Kill and remove, anonymous volumes too. False = a removal is under way, and it is not gone yet."""
        try:
            await self._engine.command("DELETE", f"containers/{runtime_id}", params={"force": "1", "v": "1"})
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return True
            if refused.status == HTTPStatus.CONFLICT and "in progress" in refused.message.lower():
                return await self.show(runtime_id) is None
            raise remove_verdict(name, refused) from None
        return True

    async def delete_leftover(self, leftover: Leftover) -> None:
        """Remove it only if it is still what the inventory showed."""
        shown = await self.show(leftover.runtime_id)
        identity = None if shown is None else shown.identity(self._installation)
        if shown is not None and identity is not None and identity.role == leftover.role:
            await self.delete(shown.id, identity.name)

    async def list(self) -> list[Observed | Leftover | Misnamed]:
        """Everything of ours, grouped by object, from one listing that is read whole. No exits and no addresses."""
        filters = {"label": [f"{names.INSTALLATION}={self._installation}"]}
        params = {"all": "1", "filters": msgspec.json.encode(filters).decode()}
        try:
            rows = await self._engine.ask(
                "containers/json", list[Listed], params=params, limit=self._engine.times.change
            )
        except Refused as refused:
            raise trouble("list containers", refused) from None
        objects: dict[UUID, list[tuple[names.Identity, Listed]]] = {}
        misnamed: list[Misnamed] = []
        for row in rows:
            if identity := row.identity(self._installation):
                objects.setdefault(identity.object_id, []).append((identity, row))
            elif (said := names.labelled(row.labels or {}, self._installation)) and said.role == names.MAIN:
                misnamed.append(_misnamed(said, row))
        return [*(one for parts in objects.values() for one in _grouped(parts)), *misnamed]


def _grouped(parts: list[tuple[names.Identity, Listed]]) -> list[Observed | Leftover]:
    """One object, or the leftovers of one that has no part `main` any more."""
    shown = tuple(Part(identity.role, row.id, identity.name) for identity, row in parts)
    for identity, row in parts:
        if identity.role == names.MAIN:
            return [listed(row, identity, shown)]
    return [_leftover(identity, row) for identity, row in parts]


def _misnamed(identity: names.Identity, row: Listed) -> Misnamed:
    name = next(iter(row.names or ()), "").removeprefix("/")
    return Misnamed(listed(row, identity, (Part(identity.role, row.id, name),)))


def _leftover(identity: names.Identity, row: Listed) -> Leftover:
    position = names.position_in(row.labels or {})
    return Leftover(identity.role, identity.name, row.id, identity.object_id, made_at(row), position)
