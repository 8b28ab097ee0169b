"""Containers with an agent that ended before anything ran in them.

The agent's bootstrap.sh needs a `/bin/sh` of the sandbox's image. Where there is none, or one for another processor,
the engine starts the container all the same, and it ends at once with a plain exit code. The only trace is the one line
that the engine's own starter left in the log. So a short life with such a code is looked at, and if that line is all
that was ever written, the end is final: no other attempt would go better.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from msgspec.structs import replace

from app.domain.sandbox.observed import Verdict
from app.runtime.docker.engine import Engine
from app.runtime.docker.output import last
from app.runtime.docker.verdicts import ABSENT, has_any
from app.runtime.driver import Observed, Power

SHORT: Final = timedelta(seconds=2)
CODES: Final = (1, 126, 127, 255)
WRONG_FORMAT: Final = ("exec format error",)
_BOOTSTRAP: Final = "bootstrap.sh"
_MOST_BYTES: Final = 4096
_NO_SHELL: Final = Verdict(
    "IMAGE_HAS_NO_SHELL",
    "The image has no /bin/sh that runs, which the agent's bootstrap needs. Use an image with a shell, or have the "
    "operator set runtime.execd_image empty.",
)
_WRONG_PLATFORM: Final = Verdict(
    "WRONG_PLATFORM",
    "The image's /bin/sh is for another processor than the engine's. Use an image of the engine's platform.",
)


async def judged(engine: Engine, seen: Observed) -> Observed:
    """The observation, with a verdict if it is the end of a container in which nothing ran."""
    end = seen.exit
    if not seen.agent or seen.power is not Power.EXITED or seen.main is None or end is None or end.code not in CODES:
        return seen
    if end.at is None or seen.started_at is None or end.at - seen.started_at > SHORT:
        return seen
    logs = await last(engine, seen.main.runtime_id, tail=2, most=_MOST_BYTES)
    if logs is None or len(logs.lines) != 1:
        return seen
    verdict = _verdict(logs.lines[0].text)
    return seen if verdict is None else replace(seen, verdict=verdict)


def _verdict(line: str) -> Verdict | None:
    if _BOOTSTRAP not in line or "exec" not in line:
        return None
    if has_any(line, WRONG_FORMAT):
        return _WRONG_PLATFORM
    return _NO_SHELL if has_any(line, ABSENT) else None
