"""When the engine said that objects were paused, resumed or removed: the times of its hints, kept for observations.

An inspect call does not tell since when an object has been paused, and nothing about one that is gone. The engine's
events do. So the last hint of each part is kept, and an observation that it explains takes its time from here.

**Invariants.** A wrong time is worse than none. The time of a pause or a resume is used only if it comes from the last
hint about this part and fits the power that was observed. Parts are compared by the engine's own id. When the event
stream breaks, hints may be missed, so all times of pauses and resumes are forgotten. When this worker pauses or resumes
a part itself, the older time of that part is forgotten. The core compares the rest with the present run and phase
(`app.domain.sandbox.observe`). The time of a removal is always true, because an engine removes a part once.

**How it fails.** A hint that comes after the observation, a worker that was restarted and more than `MAX_PARTS` changes
leave the time out.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import datetime

import msgspec

from app.domain.sandbox.observed import Observed, Power
from app.runtime.driver import Change, Hint

MAX_PARTS = 10_000
_LEADS_TO = {Change.PAUSED: Power.PAUSED, Change.RESUMED: Power.RUNNING}


class Moments:
    """The last hint of each part of one engine."""

    def __init__(self) -> None:
        """None heard."""
        self._last: OrderedDict[str, Hint] = OrderedDict()

    def note(self, hint: Hint) -> None:
        """Remember it. One that is older than what is known comes for the second time and says nothing."""
        known = self._last.pop(hint.runtime_id, hint)
        stale = known.at is not None and hint.at is not None and hint.at < known.at
        self._last[hint.runtime_id] = known if stale else hint
        if len(self._last) > MAX_PARTS:
            self._last.popitem(last=False)

    def missed(self) -> None:
        """Hints may be missing."""
        for runtime_id in [each for each, hint in self._last.items() if hint.change is not Change.REMOVED]:
            del self._last[runtime_id]

    def acted(self, observed: Observed) -> None:
        """This worker did something to the object; what was heard before is no explanation any more."""
        if observed.main is not None:
            self._last.pop(observed.main.runtime_id, None)

    def annotate(self, observed: Observed) -> Observed:
        """The observation, with the time since when it has its power, if that was heard."""
        hint = None if observed.main is None else self._last.get(observed.main.runtime_id)
        if hint is None or _LEADS_TO.get(hint.change) is not observed.power:
            return observed
        return msgspec.structs.replace(observed, power_since=hint.at)

    def removed_at(self, runtime_id: str) -> datetime | None:
        """When this part was removed, if that was heard."""
        hint = self._last.get(runtime_id)
        return hint.at if hint is not None and hint.change is Change.REMOVED else None
