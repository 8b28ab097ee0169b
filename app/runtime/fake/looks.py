"""What the fake shows of a container: to the server, and to people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from app.domain.sandbox.diagnostics import LogLine
from app.domain.sandbox.observed import Verdict
from app.runtime.driver import Inspection, Logs, Observed, Part, Power
from app.runtime.fake.engine import FakeContainer, FakeEngine, is_stillborn

ACCESS = "EXECD_ACCESS_TOKEN"
NO_SHELL = Verdict("IMAGE_HAS_NO_SHELL", "The image has no /bin/sh.")


def observed(engine: FakeEngine, found: FakeContainer, object_id: UUID, *, adopted: bool) -> Observed:
    """As the server sees it."""
    work = found.work
    image = engine.image(work.image.reference) if work else None
    return Observed(
        object_id=object_id,
        parts=(Part("main", found.runtime_id, found.name),),
        power=found.power,
        generation=work.generation if work else 1,
        position=work.position if work else None,
        image_id=image.image_id if image else None,
        image_digest=image.image_digest if image else None,
        created_at=found.created_at,
        started_at=found.started_at,
        exit=found.exit,
        adopted=adopted,
        address=found.address,
        waiting=engine.waiting.get(object_id) if found.power is Power.CREATED else None,
        gpus=engine.gpus if work and work.limits.gpus_all else work and work.limits.gpus,
        agent=work is not None and work.agent is not None,
        verdict=NO_SHELL if is_stillborn(found) and found.power is Power.EXITED else None,
    )


def last(lines: Sequence[LogLine], tail: int, most: int, since: datetime | None) -> Logs:
    """The last lines, within so many bytes."""
    late = [line for line in lines if since is None or datetime.fromisoformat(line.at) >= since]
    shown, size = late[-tail:], 0
    kept: list[LogLine] = []
    for line in reversed(shown):
        if size >= most:
            break
        kept.insert(0, line)
        size += len(line.text.encode()) + 1
    return Logs(tuple(kept), more=len(kept) < len(late))


def inspection(found: FakeContainer) -> Inspection:
    """Its environment is what it was made with."""
    work, ended = found.work, found.exit
    token = {} if work is None or work.agent is None else {ACCESS: work.agent.token}
    return Inspection(
        runtime_id=found.runtime_id,
        name=found.name,
        image="" if work is None else work.image.reference,
        status=found.power.value,
        running=found.power in (Power.RUNNING, Power.PAUSED),
        paused=found.power is Power.PAUSED,
        oom=ended is not None and ended.oom,
        exit_code=None if ended is None else ended.code,
        error="" if ended is None else ended.message,
        started_at="" if found.started_at is None else found.started_at.isoformat(),
        finished_at="" if ended is None or ended.at is None else ended.at.isoformat(),
        networks={} if found.address is None else {found.address.network: found.address.ip},
        env=({} if work is None else work.env) | token,
        private=(ACCESS,),
    )
