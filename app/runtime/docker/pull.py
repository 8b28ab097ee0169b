"""Fetches: one pull at a time for an image, however many callers ask.

Protocol. A pull is known by reference, platform and credentials; pulls with different credentials never share a result.
It inspects the image first, so that a late caller, whose create call failed just before the pull ended, does not pull
again. After the transfer it inspects the image again, so a success names an id and a digest. The outcome is a value;
each caller raises its own error from it.

Invariants. Credentials exist here only while their pull runs. A stream that is cut before its end is the engine's
trouble, never a success.

How it fails. The engine reports most failures as a line inside a 200 answer, and a few by status; both become a typed
cause. A process that dies ends its connection, and then the engine ends the transfer; layers that were complete stay,
and the next fetch goes on from there.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TypeAlias

import msgspec
from msgspec import Struct

from app.domain.text import storable
from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker.answers import PullLine
from app.runtime.docker.engine import Engine, Refused, is_plugin, lines, trouble, until_done
from app.runtime.docker.images import IMAGE_ID, Images, has_platform, has_tag, is_reference, registry_of
from app.runtime.docker.progress import Meter
from app.runtime.docker.pull_verdicts import (
    EngineCause,
    PullCause,
    Weight,
    other_platform,
    pull_cause,
    pull_timeout,
    vanished,
)
from app.runtime.driver import FetchedImage, Image, Progress, RegistryAuth
from app.runtime.flights import Flights

Outcome: TypeAlias = FetchedImage | PullCause | EngineCause


class Credentials(Struct, frozen=True):
    """What the engine reads in the credentials header."""

    username: str
    password: str
    serveraddress: str


class Pulls:
    """The pulls of one driver."""

    def __init__(self, engine: Engine, images: Images, timeout: float) -> None:
        self._engine = engine
        self._images = images
        self._timeout = timeout
        self._flights: Flights[Image, Outcome] = Flights()

    async def fetch(self, image: Image, progress: Progress) -> FetchedImage:
        """Return when the image is there. Raises the typed cause when it cannot be had."""
        if not is_reference(image.reference):
            raise RuntimeRejected("IMAGE_REFERENCE_INVALID", storable(f"{image.reference} is no image reference"))
        outcome = await self._flights.join(image, lambda report: self._run(image, report), progress)
        if isinstance(outcome, FetchedImage):
            return outcome
        raise outcome.error()

    async def close(self) -> None:
        """Cancel the pulls that still run."""
        await self._flights.close()

    async def _run(self, image: Image, report: Progress) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout):
                shown = await self._images.show(image.reference)
                if shown is not None and has_platform(shown, image.platform):
                    return self._images.fetched(shown, image.reference)
                if IMAGE_ID.match(image.reference):
                    words = f"{image.reference} is not on the engine, and an id cannot be pulled"
                    return PullCause(Weight.FINAL, "IMAGE_NOT_FOUND", words)
                return await self._transfer(image, report) or await self._arrived(image)
        except TimeoutError:
            return pull_timeout(image.reference, self._timeout)
        except Refused as refused:
            return _refused(image, refused)
        except RuntimeUnavailable as fault:
            return EngineCause(str(fault), fault.retry_after)

    async def _transfer(self, image: Image, report: Progress) -> PullCause | EngineCause | None:
        params = {"fromImage": image.reference}
        if not has_tag(image.reference):
            params["tag"] = "latest"  # without any tag the engine would pull all of them
        if image.platform:
            params["platform"] = image.platform
        auth = image.auth
        headers = {"X-Registry-Auth": credentials_header(image.reference, auth)} if auth else None
        meter = Meter(report)
        try:
            async with self._engine.open(
                "POST", "images/create", params=params, headers=headers, timeout=until_done()
            ) as response:
                async for line in lines(response):
                    progress_line = _read(line)
                    if progress_line.failure:
                        return pull_cause(image, progress_line.failure)
                    meter.note(progress_line)
        finally:
            meter.close()
        return None

    async def _arrived(self, image: Image) -> Outcome:
        shown = await self._images.show(image.reference)
        if shown is None:
            return vanished(image.reference)
        if not has_platform(shown, image.platform):
            return other_platform(image, f"{shown.os}/{shown.architecture}")
        return self._images.fetched(shown, image.reference)


def credentials_header(reference: str, auth: RegistryAuth) -> str:
    """The header's value. An empty address means the engine's default registry."""
    document = msgspec.json.encode(Credentials(auth.username, auth.password, registry_of(reference)))
    return base64.urlsafe_b64encode(document).decode()


def _refused(image: Image, refused: Refused) -> PullCause | EngineCause:
    """Refused by status. A registry's "forbidden" comes in the engine's form; a proxy in front of the engine has its
    own, and what it forbids says nothing about the image.
    """
    if not refused.is_engine or is_plugin(refused):
        fault = trouble(f"pull {image.reference}", refused)
        return EngineCause(str(fault), fault.retry_after)
    return pull_cause(image, refused.message)


def _read(line: bytes) -> PullLine:
    try:
        return msgspec.json.decode(line, type=PullLine)
    except msgspec.DecodeError as error:
        raise RuntimeUnavailable(f"the engine's report on a pull cannot be read: {error}") from None
