"""Every state of the core that can be reached.

The core is small enough to be walked completely: from a fresh sandbox, every command in every combination, until no new
state appears. States are told apart by what decisions look at; times, names and texts belong to the property tests.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from functools import cache

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.state import Phase, evolve
from app.errors import Rejected
from tests.support.stream import BEGIN, SECOND, Stream, requested, seen

LOOKS = [
    seen(power, runtime_id, started_at=started_at, end=end, adopted=adopted)
    for runtime_id in ("r1", "r2")
    for power, ends in ((Power.CREATED, [None]), (Power.RUNNING, [None]), (Power.PAUSED, [None]),
                         (Power.EXITED, [None, Exit(0), Exit(137, oom=True)]))
    for end in ends
    for started_at in (None, BEGIN)
    for adopted in (False, True)
]  # fmt: skip
COMMANDS: list[cmd.Command] = [
    cmd.Renew(BEGIN + timedelta(hours=2)),
    cmd.PatchMetadata({"a": "b"}),
    cmd.Pause(),
    cmd.Resume(),
    cmd.Terminate(),
    cmd.Expire(),
    *(cmd.RecordSeen(look, found_by) for look in LOOKS for found_by in ("ensure", "resync")),
    cmd.RecordLost(BEGIN),
    cmd.RecordRemoved(),
    cmd.RecordFailure("IMAGE_NOT_FOUND", "no such image"),
    cmd.RecordRetry("ensure", "E", "again", 1),
]


def _abstract(stream: Stream) -> tuple[object, ...]:
    box = stream.box
    runtime = box.runtime
    return (
        box.desired,
        box.observed,
        None if runtime is None else (runtime.id, runtime.exit_code),
        box.failure is not None,
        None if box.ending is None else box.ending.cause,
        box.closed_at is not None,
        box.expires_at is not None and box.expires_at <= stream.now,
    )


@cache
def walk() -> tuple[list[Stream], set[tuple[Phase, Phase]], set[tuple[type[ev.Event], Phase]]]:
    """Every reachable state (one stream each), the phase moves seen, and (event, phase it was appended in)."""
    found: dict[tuple[object, ...], Stream] = {}
    moves: set[tuple[Phase, Phase]] = set()
    appended: set[tuple[type[ev.Event], Phase]] = set()
    todo = deque([Stream(), Stream().pass_time(601), Stream(requested(timeout_s=None))])
    while todo:
        here = todo.popleft()
        if found.setdefault(_abstract(here), here) is not here:
            continue
        for command in COMMANDS:
            there = here.fork()
            try:
                there.do(command)
            except Rejected:
                continue
            if there.box.phase is not here.box.phase:
                moves.add((here.box.phase, there.box.phase))
            box = here.box
            for fact in there.facts[len(here.facts) :]:
                appended.add((type(fact.event), box.phase))
                box = evolve(box, fact)
            todo.append(there)
            if there.box.expires_at is not None and there.now < there.box.expires_at:
                late = there.fork()
                late.now = there.box.expires_at + SECOND
                todo.append(late)
    return list(found.values()), moves, appended
