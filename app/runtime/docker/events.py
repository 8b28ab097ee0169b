"""Hints: ids of objects whose containers changed, read from the engine's event stream.

Protocol. One stream, filtered by our label. The moment of the last event read is kept, and a new stream starts there,
so what happened while no stream was open is told late rather than never, as far as the engine remembers it. For the
first stream that moment is the engine's own clock at its opening (the `Date` of the answer): the clocks need not agree.

How it fails. Any failure, end or long silence leads to a new stream after a growing pause. The engine forgets events
when it restarts, and keeps only the latest few hundred: hints are lossy by contract, the resync makes up for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from uuid import UUID

import aiohttp
import msgspec

from app.errors import RuntimeUnavailable
from app.runtime.docker import names
from app.runtime.docker.answers import Event
from app.runtime.docker.engine import Engine, Refused, lines, until_done

log = logging.getLogger(__name__)

ACTIONS = ("die", "oom", "pause", "unpause", "destroy")
"""Not `start`: each of ours would come back as a hint and cost an inspect call. A stranger's is found by the sweep."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
LONGEST_SILENCE = 300.0
"""After so long without an event the stream is opened anew: a connection may be dead without saying so."""
NANO = 1_000_000_000


async def hints(engine: Engine, installation: UUID) -> AsyncIterator[UUID | None]:
    """Ids for ever; None when a stream began anew, since the engine may have forgotten what was between."""
    filters = {"type": ["container"], "event": ACTIONS, "label": [f"{names.INSTALLATION}={installation}"]}
    params = {"filters": msgspec.json.encode(filters).decode()}
    pause = FIRST_PAUSE
    while True:
        try:
            async with engine.open(
                "GET", "events", params=params, timeout=until_done(quiet=LONGEST_SILENCE)
            ) as response:
                if "since" in params:
                    yield None
                params.setdefault("since", _opened(response))
                pause = FIRST_PAUSE
                async for line in lines(response):
                    event = _event(line)
                    if event is None:
                        continue
                    if event.time_nano:
                        params["since"] = _just_after(event.time_nano)
                    if object_id := _object(event, installation):
                        yield object_id
        except (RuntimeUnavailable, Refused) as error:
            log.info("the engine's event stream ended, opening it again in %.1f s: %s", pause, error)
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)


def _opened(response: aiohttp.ClientResponse) -> str:
    """When this stream began, by the engine's clock; whole seconds, so an event may be told twice but not missed."""
    try:
        return str(int(parsedate_to_datetime(response.headers["Date"]).timestamp()))
    except (KeyError, ValueError):
        return "0"  # everything the engine remembers


def _just_after(moment: int) -> str:
    seconds, rest = divmod(moment + 1, NANO)
    return f"{seconds}.{rest:09d}"


def _event(line: bytes) -> Event | None:
    try:
        return msgspec.json.decode(line, type=Event)
    except msgspec.DecodeError:
        log.warning("the engine sent an event that we cannot read; it is passed over")
        return None


def _object(event: Event, installation: UUID) -> UUID | None:
    attributes = event.actor.attributes
    identity = names.identify(attributes, (attributes.get("name", ""),), installation)
    return None if identity is None else identity.object_id
