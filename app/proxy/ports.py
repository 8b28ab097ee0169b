"""What this process has learned of leased addresses, each for a minute.

* **Whose an address is.** The lease says so, but a restored database may have the leases of another day. So the agent
  at the address is asked for its token before the program there is used. 401 = it is another sandbox's.
* **What a port accepts.** A program may listen on the sandbox's loopback only, which the agent alone reaches. It counts
  as such when an answer came that way. A port that accepted a connection is one that nginx may be sent to.

An entry names the object, its start, and the address. So what was learned of an earlier one says nothing of the next.
"""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.proxy.rows import MAX_ROWS

KEPT_SECONDS: Final = 60.0


class Place(Struct, frozen=True):
    """A port at an address, while one object of the sandbox runs there. Port 0 = the address."""

    sandbox_id: UUID
    generation: int
    run: int
    host: str
    port: int = 0

    @property
    def whole(self) -> Place:
        """The address."""
        return replace(self, port=0)


class Known:
    """Places of which something holds."""

    def __init__(self) -> None:
        self._until: dict[Place, float] = {}

    def add(self, place: Place) -> None:
        """It holds from now on, for a minute."""
        if len(self._until) >= MAX_ROWS:
            self._until.clear()
        self._until[place] = asyncio.get_running_loop().time() + KEPT_SECONDS

    def discard(self, place: Place) -> None:
        """It holds no more."""
        self._until.pop(place, None)

    def __contains__(self, place: Place) -> bool:
        return asyncio.get_running_loop().time() < self._until.get(place, 0)


class Ports:
    """Of one process."""

    def __init__(self) -> None:
        self.owned = Known()
        """Addresses whose agent does not disown the sandbox."""
        self.accepting = Known()
        """Ports at which the program itself accepted a connection."""
        self.inside = Known()
        """Ports at which it did not, and at which the agent reached one."""
