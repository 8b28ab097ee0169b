"""In whose name events are recorded."""

from __future__ import annotations

from msgspec import Struct

from app.domain.stream import Actor, Meta


class Actors(Struct, frozen=True):
    """The two that a reconciler speaks for."""

    app_version: str
    worker: Actor
    """What follows from our own act."""
    runtime: Actor
    """What the engine did by itself."""

    def meta(self, actor: Actor, cause: int | None) -> Meta:
        """Of an event that follows from the one at `cause`."""
        return Meta(actor, self.app_version, cause=cause)
