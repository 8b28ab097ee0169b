"""From the head row to an address, and what stands in the way of that.

No engine is called and no socket is opened: the log has the address (`sandbox.started.address`), and
`app.domain.sandbox.address` says where the agent is, and whether the address is leased. Engines give an address away
when its container ends, so an address is used only while it is known whose it is:

* On our own network it is leased: nobody else gets it for ten minutes after the removal. A request goes to the port
  itself, without a token, when this server stands on that network. When nothing accepts the connection there, a program
  may listen on the sandbox's loopback only, which the agent reaches: then, before anything was sent, the request goes
  through the agent, and when it answered, so does what follows for a minute (`app.proxy.ports`).
* Anywhere else it goes through the agent with the sandbox's token. The token is how the next owner of the address is
  found out: its agent answers 401.

=================================== ==========================================================
state                               answer
=================================== ==========================================================
no such sandbox, or another tenant's 404 DOCKER::SANDBOX_NOT_FOUND
ended                               the same, with when and why
made for another generation         410 SANDBOX::ENDPOINT_REPLACED
Pending, Resuming                   waits, 20 s at most; then 404
                                    KUBERNETES::POD_IP_NOT_AVAILABLE, or 409
Paused, Pausing, exited, failed     409 DOCKER::SANDBOX_NOT_RUNNING; a connect would hang
Running, neither lease nor agent    502 PROXY::ADDRESS_NOT_PROVEN
=================================== ==========================================================
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.agent.token import AGENT_PORT, agent_token
from app.domain.sandbox.address import Reach, Way, agent_at, has_agent, leased_at
from app.domain.sandbox.decide import visible
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.sandbox.status import status_of
from app.domain.tenants import ANY_TENANT
from app.errors import NotFound, StoreUnavailable, UnknownEvent
from app.proxy.ports import Place, Ports
from app.proxy.refusals import (
    Refusal,
    busy,
    invalid_header,
    not_available,
    not_proven,
    not_running,
    replaced,
    store_unavailable,
)
from app.proxy.rows import MAX_ROWS, Rows
from app.store.log.signal import Signal
from app.views.current import CurrentView

GENERATION_HEADER: Final = b"sandledger-generation"
PENDING_SECONDS: Final = 20.0
_READ_AGAIN_SECONDS: Final = 1.0
_AWAY: Final = "The database is not reachable at the moment; try again."
_NEWER: Final = "A newer version of the server wrote the row of this sandbox; ask a server of that version."
_UNPROVEN_READS: Final = 4
_UNPROVEN_WAITING: Final = 256
"""Requests with links that are not proven, at once: those that read, and those that wait for them. Beyond that 503."""
_UNDER_WAY: Final = (Phase.PENDING, Phase.RESUMING)
_GENERATION: Final = re.compile(rb"[0-9]{1,9}")


class Access(Struct, frozen=True):
    """How this server gets into sandboxes."""

    token_key: bytes
    """The key `token` of the installation."""
    way: Way = Way()
    """How it reaches what the engine runs."""
    has_agents: bool = False
    """Whether sandboxes get an agent now. It counts only where no published port says it, as on the host network."""
    way_of_links: Way | None = None
    """The same for requests that a link let in; None = as `way`."""

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"Access({self.way!r})"


class Target(Struct, frozen=True):
    """Where the bytes go."""

    sandbox_id: UUID
    generation: int
    run: int
    host: str
    port: int
    path: str
    """What stands before the rest of the path: empty for the agent itself, and for a program itself."""
    token: str
    """The agent's; empty = this is the program itself, at an address that is leased."""
    port_inside: int
    """The port that was asked for."""
    through_agent: Target | None = None
    """Of a program itself: the way through the agent. None = there is no agent."""

    def __repr__(self) -> str:
        """Keep the token out of logs."""
        return f"Target({self.host}:{self.port}{self.path})"

    @property
    def leased(self) -> bool:
        """Whether this is the program itself, and nobody else's by the lease of its address."""
        return not self.token

    @property
    def place(self) -> Place:
        """What is learned of it is learned of this."""
        return Place(self.sandbox_id, self.generation, self.run, self.host, self.port_inside)

    @property
    def address(self) -> str:
        """As a URL has it."""
        return str(Reach(self.host, self.port))


def generation_of(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """The generation that the endpoint was given out for; None = the request does not say.

    Raises:
        Refusal: it is no number.
    """
    given = [value for name, value in headers if name == GENERATION_HEADER]
    if not given:
        return None
    if len(given) > 1 or not _GENERATION.fullmatch(given[0]):
        raise invalid_header("The header Sandledger-Generation must be one whole number.")
    return int(given[0])


def target_of(sandbox: Sandbox, port: int, access: Access) -> Target:
    """The target of a sandbox that is not on its way to Running.

    Raises:
        Refusal: it cannot be reached in its state.
    """
    if sandbox.phase is not Phase.RUNNING:
        status = status_of(sandbox)
        raise not_running(f"The sandbox is {status.state}: {status.message}")
    through_agent = _through_agent(sandbox, port, access)
    leased = leased_at(sandbox.address, access.way)
    if leased is not None and port != AGENT_PORT:
        return Target(sandbox.id, sandbox.generation, sandbox.run, leased, port, "", "", port, through_agent)
    if through_agent is None:
        raise not_proven(
            "The sandbox has no agent that this server reaches, and this server does not stand on the network where "
            "addresses are leased, so it is not known whose address it is. Set runtime.execd_image, and create the "
            'sandbox again; or use docker.network_mode = "bridge" with a server on the engine\'s machine.'
        )
    return through_agent


def _through_agent(sandbox: Sandbox, port: int, access: Access) -> Target | None:
    # Without an agent whatever has the address by now would get the token, and its answer would pass for the sandbox's.
    known = has_agent(sandbox.address, configured=access.has_agents)
    reach = agent_at(sandbox.address, access.way) if known else None
    if reach is None or sandbox.object_id is None:
        return None
    return Target(
        sandbox.id,
        sandbox.generation,
        sandbox.run,
        reach.host,
        reach.port,
        "" if port == AGENT_PORT else f"/proxy/{port}",
        agent_token(access.token_key, sandbox.object_id, sandbox.generation),
        port,
    )


class Resolver:
    """Reads rows, and waits."""

    def __init__(
        self,
        view: CurrentView,
        signal: Signal,
        access: Access,
        stopping: asyncio.Event,
        *,
        pending_seconds: float = PENDING_SECONDS,
    ) -> None:
        """`stopping` ends waits."""
        self.rows = Rows(view, signal)
        self._view = view
        self._signal = signal
        self._access = access
        self._stopping = stopping
        self._pending_seconds = pending_seconds
        self._by_link = access if access.way_of_links is None else replace(access, way=access.way_of_links)
        self._targets: dict[tuple[UUID, int, bool], tuple[Sandbox, Target]] = {}
        """What the same state, and not only an equal one, led to."""
        self.ports = Ports()
        self._unproven = asyncio.Semaphore(_UNPROVEN_READS)
        self._unproven_waiting = 0

    async def unproven(self, sandbox_id: UUID) -> Sandbox | None:
        """The row for a link that is not proven yet, whosever it is. None = there is none.

        Strangers can ask for that, and what is not there is not kept. So few of these reads happen at once, and the
        connections of the lifecycle API are not used up.

        Raises:
            Refusal: the row cannot be read, or too many ask.
        """
        if (fresh := self.rows.fresh(sandbox_id)) is not None:
            return fresh
        if self._unproven_waiting >= _UNPROVEN_WAITING:
            raise busy("This server")
        self._unproven_waiting += 1
        try:
            async with self._unproven:
                return await self.rows.read(sandbox_id, ANY_TENANT)
        except UnknownEvent:
            raise store_unavailable(_NEWER) from None
        except StoreUnavailable:
            raise store_unavailable(_AWAY) from None
        finally:
            self._unproven_waiting -= 1

    async def target(
        self, sandbox_id: UUID, tenant: str, port: int, generation: int | None, *, by_link: bool = False
    ) -> Target:
        """Where the request goes.

        Raises:
            Refusal: nowhere.
        """
        try:
            sandbox = await self._read(sandbox_id, tenant, generation)
            if sandbox.phase in _UNDER_WAY:
                sandbox = await self._wait(sandbox_id, tenant, generation)
            if sandbox.phase is Phase.PENDING:
                attempt = await self._view.attempt(sandbox)
                raise not_available(f"The sandbox is still Pending: {status_of(sandbox, attempt).message}")
        except NotFound as error:
            raise Refusal(404, error.code, error.message) from None
        except UnknownEvent:
            raise store_unavailable(_NEWER) from None
        except StoreUnavailable:
            raise store_unavailable(_AWAY) from None
        return self._detour(self._target(sandbox, port, by_link=by_link))

    def _detour(self, target: Target) -> Target:
        through_agent = target.through_agent
        return target if through_agent is None or target.place not in self.ports.inside else through_agent

    async def target_now(self, sandbox_id: UUID, tenant: str, port: int, generation: int | None) -> Target:
        """As `target`, for who does not wait for a sandbox that is on its way.

        Raises:
            Refusal, NotFound, StoreUnavailable, UnknownEvent: nowhere, or not yet.
        """
        return self._detour(self._target(await self._read(sandbox_id, tenant, generation), port, by_link=False))

    def _target(self, sandbox: Sandbox, port: int, *, by_link: bool) -> Target:
        """As `target_of`; once for a state that many requests meet."""
        known = self._targets.get((sandbox.id, port, by_link))
        if known is not None and known[0] is sandbox:
            return known[1]
        if len(self._targets) >= MAX_ROWS:
            self._targets.clear()
        target = target_of(sandbox, port, self._by_link if by_link else self._access)
        self._targets[sandbox.id, port, by_link] = (sandbox, target)
        return target

    async def _read(self, sandbox_id: UUID, tenant: str, generation: int | None) -> Sandbox:
        sandbox = visible(await self.rows.read(sandbox_id, tenant), sandbox_id)
        if generation is not None and generation != sandbox.generation:
            raise replaced()
        return sandbox

    async def _wait(self, sandbox_id: UUID, tenant: str, generation: int | None) -> Sandbox:
        """The state after Pending or Resuming, or the last one seen. Holds no connection between two reads."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._pending_seconds
        with self._signal.subscribe(sandbox_id) as news:
            while True:
                sandbox = await self._read(sandbox_id, tenant, generation)
                left = until - loop.time()
                if sandbox.phase not in _UNDER_WAY or left <= 0 or self._stopping.is_set():
                    return sandbox
                await news.wait(min(_READ_AGAIN_SECONDS, left))
