"""The agent's files on the engine, and what a sandbox needs of them.

**Protocol.** Before the first sandbox is made, `install` has the driver copy the files into a volume. What it answered
is remembered, and asked again when the engine could not be used meanwhile, or when the engine says that the volume is
gone (`forget`). Callers that come while one asks share its answer. Every worker that finds the files reports it, and
the first report of a copy becomes `engine.agent_installed`: two workers may both have had one copy made, and one that
did may have died before it could say so.

**A moved tag.** Now and then (`look_around`) the image is looked at again. When its tag leads to another image, new
sandboxes get that one's files; those of images that no sandbox uses any more are removed, which is recorded as
`engine.leftover_removed`. Any worker does it.

**How it fails.** An installation that was cut is completed by the next call, of any worker. One that could not be
recorded is used all the same, and reported again later: nothing depends on the event.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from app.agent.token import agent_token
from app.domain.engine.decide import RecordAgentInstalled, RecordLeftover
from app.domain.engine.events import ROLE_OF_AGENT
from app.domain.sandbox.address import Way
from app.domain.sandbox.state import Sandbox
from app.domain.stream import Meta
from app.errors import RuntimeFault, StoreUnavailable
from app.runtime.driver import Image, InstalledAgent
from app.runtime.faults import AttemptFailed
from app.runtime.workload import Agent
from app.service.engines import Engines
from app.work.station import Station

_LOG = logging.getLogger(__name__)


class AgentPolicy(Struct, frozen=True):
    """The agent that every sandbox gets."""

    image: str
    token_key: bytes
    """The installation's key `token`."""
    init: bool = False
    """The agent runs as process 1."""
    way: Way = Way()
    """How this worker reaches agents."""
    keep_seconds: float = 3600
    """Age below which the files of an agent are not removed: another worker may be about to use them."""

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"AgentPolicy(image={self.image!r})"


class Agents:
    """The agent on one engine, as one worker sees it."""

    def __init__(self, *, station: Station, engines: Engines, policy: AgentPolicy, meta: Meta) -> None:
        """`meta` names this worker in the log."""
        self._kept = timedelta(seconds=policy.keep_seconds)
        self.image = Image(policy.image)
        self._station = station
        self._engines = engines
        self._policy = policy
        self._meta = meta
        self._installed: InstalledAgent | None = None
        self._asking = asyncio.Lock()
        station.when_usable(self.forget)

    @property
    def is_installed(self) -> bool:
        """Whether the last answer still holds, as far as this worker knows."""
        return self._installed is not None

    def forget(self) -> None:
        """The files may be gone, or it may be another engine: ask again."""
        self._installed = None

    async def install(self) -> None:
        """Have the files there.

        Raises:
            ImageMissing: the agent's image has to be fetched first.
            RuntimeFault: as `Driver.install_agent` raises it.
        """
        async with self._asking:
            if self._installed is not None:
                return
            installed = await self._station.driver.install_agent(self.image.reference)
            await self._record(installed)
            self._installed = installed

    async def look_around(self) -> None:
        """Notice a tag that moved, and remove what nobody uses. Trouble is logged: the next time may be better."""
        if self._installed is None or self._station.open:
            return
        try:
            await self._look_around(self._installed)
        except (RuntimeFault, StoreUnavailable) as error:
            _LOG.info("agents on engine %s were not looked at: %s", self._station.name, error)

    async def _look_around(self, installed: InstalledAgent) -> None:
        driver = self._station.driver
        shown = await driver.image(self.image.reference)
        if shown is not None and shown.image_id != installed.image_id:
            _LOG.info("%s is another image now; its agent is installed for the next sandbox", self.image.reference)
            self.forget()
            return
        if not await self._station.confirm_identity():
            return
        removed = await driver.clean_agents(installed.image_id, datetime.now(UTC) - self._kept)
        for name in removed:
            _LOG.info("agent removed, no sandbox uses it: %s on engine %s", name, self._station.name)
            await self._engines.execute(self._station.name, RecordLeftover(ROLE_OF_AGENT, name), self._meta)

    def of(self, sandbox: Sandbox) -> Agent:
        """What the next object of this sandbox needs.

        Raises:
            AttemptFailed: `AGENT_INSTALLING`, it was forgotten meanwhile. A sandbox without the agent that its clients
                count on would be worse than one that comes later.
        """
        if self._installed is None:
            raise AttemptFailed("AGENT_INSTALLING", "the agent's files are looked for again")
        assert sandbox.object_id is not None, "it has been placed"
        token = agent_token(self._policy.token_key, sandbox.object_id, sandbox.generation + 1)
        return Agent(self._installed.volume, token, self._policy.init)

    async def _record(self, installed: InstalledAgent) -> None:
        if installed.made:
            _LOG.info("the agent of %s is on engine %s: %s", self.image.reference, self._station.name, installed.volume)
        told = RecordAgentInstalled(installed.image_id, installed.files, installed.size_bytes, installed.helper)
        try:
            await self._engines.execute(self._station.name, told, self._meta)
        except StoreUnavailable as error:
            _LOG.warning("that the agent was installed is not recorded: %s", error)
