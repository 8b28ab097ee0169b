"""Hints: objects whose containers changed, what happened and when, read from the engine's event stream.

Protocol. One stream, filtered by our label. The moment of the last event read is kept, and a new stream starts there,
so what happened while no stream was open is reported late rather than never, as far as the engine remembers it. For the
first stream that moment is the engine's own clock at its opening (the `Date` of the answer): the clocks need not agree.

A stream that was silent for long is opened again, because its connection may be dead. That alone is no reason to
inspect everything: most engines are silent at night. A stream that broke is a reason: an engine that restarts loses
its events.

How it fails. Any failure, end or long silence leads to a new stream after a growing pause. The engine keeps only the
latest few hundred events: hints are lossy by contract, the sweep makes up for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from uuid import UUID

import aiohttp
import msgspec

from app.errors import RuntimeUnavailable
from app.runtime.docker import names
from app.runtime.docker.answers import Event
from app.runtime.docker.engine import Engine, Refused, Silence, lines, until_done
from app.runtime.driver import Change, Hint

log = logging.getLogger(__name__)

ACTIONS = ("die", "oom", "pause", "unpause", "restart", "destroy")
"""Not `start`: each of ours would come back as a hint and cost an inspect call. A stranger's is found by the sweep."""
CHANGES = {"pause": Change.PAUSED, "unpause": Change.RESUMED, "destroy": Change.REMOVED}
MIN_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 5.0
NANOS_PER_SECOND = 1_000_000_000


async def hints(engine: Engine, installation: UUID, silence: float) -> AsyncIterator[Hint | None]:
    """Hints for ever; None when a stream broke, since the engine may have forgotten what was between."""
    filters = {"type": ["container"], "event": ACTIONS, "label": [f"{names.INSTALLATION}={installation}"]}
    params = {"filters": msgspec.json.encode(filters).decode()}
    pause, broke = MIN_PAUSE_SECONDS, False
    while True:
        opened = False
        try:
            async with engine.open("GET", "events", params=params, timeout=until_done(quiet=silence)) as response:
                if broke:
                    yield None
                opened, broke, pause = True, False, MIN_PAUSE_SECONDS
                params.setdefault("since", _opened(response))
                async for line in lines(response):
                    event = _event(line)
                    if event is None:
                        continue
                    if event.time_nano:
                        params["since"] = _just_after(event.time_nano)
                    if hint := hint_in(event, installation):
                        yield hint
        except Silence:
            if opened:
                continue
        except (RuntimeUnavailable, Refused) as error:
            log.info("the engine's event stream ended, opening it again in %.1f s: %s", pause, error)
        broke = broke or "since" in params
        await asyncio.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _opened(response: aiohttp.ClientResponse) -> str:
    """When this stream began, by the engine's clock; whole seconds, so an event may come twice and is not missed."""
    try:
        return str(int(parsedate_to_datetime(response.headers["Date"]).timestamp()))
    except (KeyError, ValueError):
        return "0"  # everything the engine remembers


def _just_after(moment: int) -> str:
    seconds, rest = divmod(moment + 1, NANOS_PER_SECOND)
    return f"{seconds}.{rest:09d}"


def _event(line: bytes) -> Event | None:
    try:
        return msgspec.json.decode(line, type=Event)
    except msgspec.DecodeError:
        log.warning("the engine sent an event that we cannot read; it is passed over")
        return None


def hint_in(event: Event, installation: UUID) -> Hint | None:
    """The hint that an event is. None: it is about a stranger."""
    # By labels alone: a renamed container counts too, and a hint about a stranger's copy costs one inspect call.
    identity = names.labelled(event.actor.attributes, installation)
    if identity is None:
        return None
    change = CHANGES.get(event.action, Change.OTHER)
    return Hint(identity.object_id, event.actor.id, change, _moment(event.time_nano))


def _moment(nanos: int) -> datetime | None:
    """Cut to microseconds, which is what an event of the log can hold. No float: it could not hold them."""
    if nanos <= 0:
        return None
    seconds, rest = divmod(nanos, NANOS_PER_SECOND)
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=rest // 1000)
