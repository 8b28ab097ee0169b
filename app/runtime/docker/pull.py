"""Pulls: one at a time for an image, whoever asks.

Protocol. A pull is known by image, platform and credentials; pulls with different credentials never share a result.
Whoever asks while it runs waits for it. It looks first whether the image has arrived meanwhile, so that a late asker,
whose create call failed just before the pull ended, does not pull again. The outcome is a value; each waiter raises
its own error from it.

Invariants. A waiter that is cancelled leaves alone; the pull lives until the last one has left, and then is cancelled
and forgotten at once, so that nobody can join a dying one. Credentials exist here only while their pull runs.

How it fails. The engine reports most failures as a line inside a 200 answer, and a few by status; both become a typed
cause. A stream that is cut before its end is the engine's trouble, never a success.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections import defaultdict
from typing import TypeAlias

import msgspec
from msgspec import Struct

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.answers import ImageFacts, PullLine
from app.runtime.docker.engine import Engine, Refused, lines, until_done
from app.runtime.docker.verdicts import EngineCause, PullCause, pull_cause, pull_timeout
from app.runtime.driver import RegistryAuth

IMAGE_ID = re.compile(r"(sha256:)?[0-9a-f]{64}\Z")
Outcome: TypeAlias = PullCause | EngineCause | None


class Wanted(Struct, frozen=True):
    """What makes two pulls the same one."""

    image: str
    platform: str | None
    auth: RegistryAuth | None


class Credentials(Struct, frozen=True):
    """What the engine reads in the credentials header."""

    username: str
    password: str
    serveraddress: str


class Pulls:
    """The pulls of one driver."""

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._running: dict[Wanted, asyncio.Task[Outcome]] = {}
        self._waiting: defaultdict[Wanted, int] = defaultdict(int)

    async def pull(self, wanted: Wanted) -> None:
        """Return when the image is there. Raises the typed cause when it cannot be had."""
        if IMAGE_ID.match(wanted.image):
            raise RuntimeRejected("IMAGE_NOT_FOUND", f"{wanted.image} is not on the engine, and an id cannot be pulled")
        task = self._running.get(wanted)
        if task is None:
            task = self._running[wanted] = asyncio.create_task(self._fetch(wanted))
        self._waiting[wanted] += 1
        try:
            # The shield keeps one waiter's cancellation from the others.
            outcome = await asyncio.shield(task)
        finally:
            self._leave(wanted, task)
        if outcome is not None:
            raise outcome.error()

    async def close(self) -> None:
        """End what still runs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _leave(self, wanted: Wanted, task: asyncio.Task[Outcome]) -> None:
        self._waiting[wanted] -= 1
        if self._waiting[wanted] == 0:
            # No await between the count and the removal, so nobody joins in between.
            del self._waiting[wanted], self._running[wanted]
            task.cancel()  # nothing when it is done

    async def _fetch(self, wanted: Wanted) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout):
                if not await self._present(wanted):
                    return await self._transfer(wanted)
        except TimeoutError:
            return pull_timeout(wanted.image, self._timeout)
        except Refused as refused:
            return pull_cause(wanted.image, wanted.auth, refused.message)
        except RuntimeUnavailable as fault:
            return EngineCause(str(fault))
        return None

    async def _present(self, wanted: Wanted) -> bool:
        try:
            facts = await self._engine.ask(f"images/{wanted.image}/json", ImageFacts)
        except Refused:
            return False  # absent, or unreadable: the pull itself will say why
        return wanted.platform is None or wanted.platform == f"{facts.os}/{facts.architecture}"

    async def _transfer(self, wanted: Wanted) -> Outcome:
        params = {"fromImage": wanted.image}
        if not _has_tag(wanted.image):
            params["tag"] = "latest"  # without any tag the engine would pull all of them
        if wanted.platform:
            params["platform"] = wanted.platform
        headers = {"X-Registry-Auth": credentials_header(wanted.image, wanted.auth)} if wanted.auth else None
        async with self._engine.open(
            "POST", "images/create", params=params, headers=headers, timeout=until_done()
        ) as response:
            async for line in lines(response):
                if failure := _progress(line).failure:
                    return pull_cause(wanted.image, wanted.auth, failure)
        return None


def credentials_header(image: str, auth: RegistryAuth) -> str:
    """The header's value. An empty address means the engine's default registry."""
    document = msgspec.json.encode(Credentials(auth.username, auth.password, registry_of(image)))
    return base64.urlsafe_b64encode(document).decode()


def registry_of(image: str) -> str:
    """The registry's host in a reference, if its first part looks like one; else empty, the default registry."""
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else ""


def _progress(line: bytes) -> PullLine:
    try:
        return msgspec.json.decode(line, type=PullLine)
    except msgspec.DecodeError as error:
        raise RuntimeUnavailable(f"the engine's report on a pull cannot be read: {error}") from None


def _has_tag(image: str) -> bool:
    last = image.rpartition("/")[2]
    return ":" in last or "@" in last
