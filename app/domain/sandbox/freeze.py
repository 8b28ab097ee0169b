"""A freeze: a sandbox stands still while a snapshot copies its files, and counts as Running all the same.

`freeze_requested` → `frozen` → `thaw_requested` → `thawed`, each once. A thaw may be requested at any time. What is
started again, or runs no more, ends a freeze without a thaw.
"""

from __future__ import annotations

from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox import events as ev

Event: TypeAlias = ev.FreezeRequested | ev.Frozen | ev.ThawRequested | ev.Thawed


class Freeze(Struct, frozen=True, omit_defaults=True):
    """The snapshot for which it stands still."""

    snapshot_id: UUID
    run: int | None = None
    """The run that stands still. None = it is about to."""
    thaw: str | None = None
    """Why it is to go on. None = nothing has asked for that."""


def after(freeze: Freeze | None, event: Event) -> Freeze | None:
    """The freeze from then on. None = it is over."""
    match event:
        case ev.FreezeRequested(snapshot_id=snapshot_id):
            return Freeze(snapshot_id)
        case ev.Frozen(snapshot_id=snapshot_id, run=run):
            return Freeze(snapshot_id, run)
        case ev.ThawRequested(snapshot_id=snapshot_id, reason=reason):
            return Freeze(snapshot_id, None if freeze is None else freeze.run, reason)
        case ev.Thawed():
            return None
