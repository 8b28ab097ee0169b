"""The Docker driver: `app.runtime.driver` over a Docker engine (API 1.41 or later, Docker 20.10).

Protocol of `ensure`. Create is tried at once, without looking first: three calls (create, start, inspect) when all
goes well. 404 about the image: pull, then create again. 409: somebody holds the name; an inspect tells whether it is
ours (adopt) or a stranger's (reject). Create, start and the look after it run to their end even when cancelled.

Invariants.

* Verbs act on the container id that a look has shown to be ours, never on a name.
* Only an object in the state `created` is started. One that has ended is reported, never run again.
* A start that the engine refuses for good takes the container away before the rejection is raised.
* A look that says "none" has been answered by the engine; anything less raises `RuntimeUnavailable`.

How it fails. A process that dies between create and start leaves a `created` container; the next `ensure` adopts and
starts it. A reply that is lost is the same case. Two processes that start one fresh container at the same moment are
safe as long as its entrypoint outlives the slower call; the engine has no conditional start, so the lease of the
work queue is what keeps a stalled process from starting an entrypoint that has meanwhile ended.

What the engine itself may miss: on cgroup v1 it watches the memory limit only from just after the start. Of programs
that run into it within their first milliseconds, about one in ten is reported with exit code 137 and nothing more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from uuid import UUID

import aiodocker
import aiohttp
import msgspec

from app.errors import RuntimeRejected, RuntimeUnavailable, SettingsError
from app.runtime.completion import to_completion
from app.runtime.docker import events
from app.runtime.docker.answers import REMOVING, Created, Info, Inspected, Listed, Version, listed, observed
from app.runtime.docker.engine import Engine, Refused
from app.runtime.docker.options import DockerOptions, with_seccomp_document
from app.runtime.docker.pull import Pulls, Wanted
from app.runtime.docker.spec import LABEL_INSTALLATION, ContainerConfig, container_config, container_name
from app.runtime.docker.verdicts import clean, create_verdict, is_image_missing, start_verdict, still_missing
from app.runtime.driver import Capabilities, EngineInfo, Observed, Power, Workload

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"
OLDEST_API = (1, 41)
SETTLE_TIME = 30.0
"""Seconds to wait for the engine to finish with a name: a removal under way, or another create not yet visible."""
POLL_FIRST, POLL_LONGEST = 0.02, 0.5


class ImageMissing(Exception):
    """The create call needs a pull first."""

    def __init__(self, refused: Refused) -> None:
        super().__init__()
        self.refused = refused


class DockerDriver:
    """One Docker engine."""

    name = "docker"

    def __init__(self, docker: aiodocker.Docker, options: DockerOptions) -> None:
        self.can = Capabilities(pause=True)
        self._docker = docker
        self._options = with_seccomp_document(options)
        self._engine = Engine(docker, options.api_timeout)
        self._pulls = Pulls(self._engine, options.pull_timeout)

    async def ensure(self, work: Workload) -> Observed:
        """Pull if absent, create or adopt, start."""
        config = container_config(work, self._options)
        try:
            return await to_completion(self._place(work, config))
        except ImageMissing:
            pass
        await self._pulls.pull(Wanted(work.image, work.platform, work.auth))
        try:
            return await to_completion(self._place(work, config))
        except ImageMissing as missing:
            raise still_missing(work, missing.refused) from None

    async def observe(self, sandbox_id: UUID) -> Observed | None:
        """Look at one object."""
        seen = await self._ours(sandbox_id)
        return None if seen is None else observed(seen, sandbox_id)

    async def set_power(self, sandbox_id: UUID, power: Power) -> Observed | None:
        """Pause or unpause what runs; everything else is returned as it is."""
        verb, needed = {Power.PAUSED: ("pause", Power.RUNNING), Power.RUNNING: ("unpause", Power.PAUSED)}[power]
        before = await self.observe(sandbox_id)
        if before is None or before.power is not needed:
            return before
        refused: Refused | None = None
        try:
            await self._engine.tell("POST", f"containers/{before.runtime_id}/{verb}")
        except Refused as error:
            refused = error
        after = await self.observe(sandbox_id)
        # The engine refuses what is already so, or has ended or gone meanwhile: then the second look shows it.
        if refused is not None and after is not None and after.power is needed:
            raise RuntimeUnavailable(f"the engine did not {verb} {before.name}: {refused.message}")
        return after

    async def remove(self, sandbox_id: UUID) -> None:
        """Kill and remove, anonymous volumes too."""
        seen = await self._ours(sandbox_id)
        if seen is not None:
            await self._delete(seen.id)

    async def inventory(self) -> AsyncIterator[Observed]:
        """Everything of ours, from one listing that is read whole before the first is handed out. No exit codes."""
        filters = {"label": [f"{LABEL_INSTALLATION}={self._options.installation}"]}
        params = {"all": "1", "filters": msgspec.json.encode(filters).decode()}
        try:
            rows = await self._engine.ask("containers/json", list[Listed], params=params)
        except Refused as refused:
            raise _trouble("list containers", refused) from None
        for row in rows:
            if found := listed(row, self._options.installation):
                yield found

    async def hints(self) -> AsyncIterator[UUID | None]:
        """Ids that may have changed."""
        async for sandbox_id in events.hints(self._engine, self._options.installation):
            yield sandbox_id

    async def check(self) -> EngineInfo:
        """Ask the engine who it is."""
        try:
            version = await self._engine.ask("version", Version, versioned=False)
            info = await self._engine.ask("info", Info)
        except Refused as refused:
            raise _trouble("say who it is", refused) from None
        if tuple(int(part) for part in version.api_version.split(".") if part.isdecimal()) < OLDEST_API:
            raise RuntimeUnavailable(
                f"the Docker engine at {self._engine.address} is too old ({version.version}): use 20.10 or later"
            )
        return EngineInfo(self.name, version.version, info.id, self._engine.address, info.live_restore)

    async def close(self) -> None:
        """Release connections."""
        await self._pulls.close()
        await self._docker.close()

    async def _place(self, work: Workload, config: ContainerConfig) -> Observed:
        """Create or adopt, start, look. The section that a cancellation does not cut."""
        wait = Patience()
        params = {"name": container_name(work.sandbox_id)} | ({"platform": work.platform} if work.platform else {})
        while True:
            try:
                created = await self._engine.create("containers/create", config, Created, params=params)
            except Refused as refused:
                if is_image_missing(refused):
                    raise ImageMissing(refused) from None
                if refused.status != HTTPStatus.CONFLICT:
                    raise create_verdict(work, refused) from None
                conflict = clean(refused.message, work)
            else:
                return await self._start(work, created.id, adopted=False)
            holder = await self._look(container_name(work.sandbox_id))
            if holder is not None and holder.sandbox(self._options.installation) != work.sandbox_id:
                raise RuntimeRejected("NAME_TAKEN", f"{container_name(work.sandbox_id)} is somebody else's: {conflict}")
            if holder is not None and holder.state.status != REMOVING:
                seen = observed(holder, work.sandbox_id, adopted=True)
                return await self._start(work, holder.id, adopted=True) if seen.power is Power.CREATED else seen
            # Nobody holds the name any more, or a removal is about to free it, or a create is not visible yet.
            await wait.a_little(f"the engine keeps the name of a container that it does not show: {conflict}")

    async def _start(self, work: Workload, runtime_id: str, *, adopted: bool) -> Observed:
        conflict = ""
        try:
            await self._engine.tell("POST", f"containers/{runtime_id}/start")
        except Refused as refused:
            conflict = await self._start_refused(work, runtime_id, refused)
        seen = await self._look(runtime_id)
        if seen is None:
            raise RuntimeUnavailable(f"{container_name(work.sandbox_id)} vanished while it was started; try again")
        result = observed(seen, work.sandbox_id, adopted=adopted)
        if conflict and result.power is Power.CREATED:
            raise RuntimeUnavailable(f"the engine would not start {result.name} now: {conflict}")
        return result

    async def _start_refused(self, work: Workload, runtime_id: str, refused: Refused) -> str:
        """Raise the verdict; return only when the object's state, which the next look shows, is the whole story."""
        gone = refused.status == HTTPStatus.NOT_FOUND and "no such container" in refused.message.lower()
        if refused.status == HTTPStatus.CONFLICT or gone:
            return clean(refused.message, work)
        verdict = start_verdict(work, refused)
        if not isinstance(verdict, RuntimeUnavailable):
            await self._delete(runtime_id)
        raise verdict from None

    async def _delete(self, runtime_id: str) -> None:
        path, wait = f"containers/{runtime_id}", Patience()
        try:
            await self._engine.tell("DELETE", path, params={"force": "1", "v": "1"})
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return
            if refused.status != HTTPStatus.CONFLICT:
                raise _trouble("remove a container", refused) from None
            message = refused.message  # somebody else's removal is under way: gone is when the name is free
            while await self._look(runtime_id) is not None:
                await wait.a_little(f"the engine does not finish the removal of a container: {message}")

    async def _ours(self, sandbox_id: UUID) -> Inspected | None:
        seen = await self._look(container_name(sandbox_id))
        return seen if seen is not None and seen.sandbox(self._options.installation) == sandbox_id else None

    async def _look(self, name_or_id: str) -> Inspected | None:
        try:
            return await self._engine.ask(f"containers/{name_or_id}/json", Inspected)
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise _trouble("show a container", refused) from None


class Patience:
    """Waiting in growing steps for something that the engine does by itself, within a bound."""

    def __init__(self) -> None:
        self._until = asyncio.get_running_loop().time() + SETTLE_TIME
        self._step = POLL_FIRST

    async def a_little(self, complaint: str) -> None:
        """Wait one step; RuntimeUnavailable with `complaint` when the bound is reached."""
        if asyncio.get_running_loop().time() > self._until:
            raise RuntimeUnavailable(complaint)
        await asyncio.sleep(self._step)
        self._step = min(self._step * 2, POLL_LONGEST)


def connect(options: DockerOptions, docker_host: str | None) -> DockerDriver:
    """A driver for the engine at `docker_host`; None = DOCKER_HOST, the chosen Docker context, or the usual socket.

    Does not talk to the engine, so it succeeds while the engine is still down. Needs a running event loop.
    """
    options = with_seccomp_document(options)  # before there is a client that would have to be closed
    timeout = aiohttp.ClientTimeout(total=options.api_timeout)
    try:
        docker = aiodocker.Docker(url=docker_host, timeout=timeout)
    except AssertionError:
        # The library asserts that some socket exists at this moment; the engine may come up later.
        docker = aiodocker.Docker(url=DEFAULT_ADDRESS, timeout=timeout)
    except (ValueError, OSError, ImportError, aiodocker.DockerError) as error:
        raise SettingsError(
            f"docker.host (or DOCKER_HOST): cannot be used ({error}); give a URL such as {DEFAULT_ADDRESS}"
        ) from None
    return DockerDriver(docker, options)


def _trouble(what: str, refused: Refused) -> RuntimeUnavailable:
    return RuntimeUnavailable(f"the engine would not {what} ({refused.status}): {refused.message}")
