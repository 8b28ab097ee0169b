"""Every state of the core that can be reached.

The core is small enough to be walked completely: from a fresh sandbox, every command in every combination, until no new
state appears. States are told apart by what decisions look at; times, names and texts belong to the property tests.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from functools import cache
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Address, Exit, Power, Verdict, Waiting
from app.domain.sandbox.state import PROBE, Phase, evolve
from app.errors import Rejected
from tests.support.stream import BEGIN, ID, LIMITS, SECOND, Stream, requested, seen

SNAPSHOT = UUID(int=7)
OBSERVATIONS = [
    *(
        seen(power, runtime_id, started_at=started_at, end=end, adopted=adopted)
        for runtime_id in ("r1", "r2")
        for power, ends in (
            (Power.CREATED, [None]),
            (Power.RUNNING, [None]),
            (Power.PAUSED, [None]),
            (Power.EXITED, [None, Exit(0), Exit(137, oom=True)]),
        )
        for end in ends
        for started_at in (None, BEGIN)
        for adopted in (False, True)
    ),
    seen(Power.RUNNING, started_at=BEGIN + SECOND),
    seen(Power.PAUSED, started_at=BEGIN + SECOND),
    seen(Power.EXITED, started_at=BEGIN + SECOND, end=Exit(0)),
    seen(Power.RUNNING, image_id="sha256:1"),
    seen(Power.CREATED, waiting=Waiting("ensure", "POD_UNSCHEDULABLE")),
    seen(Power.CREATED, verdict=Verdict("START_REJECTED", "no")),
    *(
        seen(power, runtime_id, started_at=started_at, agent=True)
        for power in (Power.RUNNING, Power.PAUSED)
        for runtime_id in ("r1", "r2")
        for started_at in (BEGIN, BEGIN + SECOND)
    ),
    *(
        seen(power, runtime_id, started_at=BEGIN, address=Address("bridge", "172.17.0.2"))
        for power in (Power.RUNNING, Power.PAUSED)
        for runtime_id in ("r1", "r2")
    ),
]
COMMANDS: list[cmd.Command] = [
    cmd.Renew(BEGIN + timedelta(hours=2)),
    cmd.PatchMetadata({"a": "b"}),
    cmd.Pause(),
    cmd.Resume(),
    cmd.Terminate(),
    cmd.Expire(),
    cmd.EndTransition(),
    cmd.EndProbe(),
    *(cmd.RecordSeen(shown, found_by) for shown in OBSERVATIONS for found_by in ("ensure", "sweep")),
    cmd.RecordSeen(seen(Power.RUNNING, object_id=UUID(int=1))),
    cmd.RecordPlaced("default", 1, ID),
    cmd.RecordWaiting("fetch", "IMAGE_PULLING"),
    cmd.RecordWaiting("probe", "AGENT_SILENT"),
    cmd.RecordFetched("sha256:1"),
    cmd.RecordLost(BEGIN),
    cmd.RecordRemoved(),
    cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no such image"),
    cmd.RecordFailure("set_power", "REFUSED", "no"),
    *(cmd.RecordPowerRefused("REFUSED", "no", power) for power in (None, Power.RUNNING, Power.PAUSED)),
    cmd.RecordRetry("ensure", "E", "again", 1),
    cmd.Freeze(SNAPSHOT),
    cmd.Thaw(SNAPSHOT, "DONE"),
    cmd.EndFreeze(),
    cmd.CreateLink(3000, 60),
    cmd.RevokeLinks(),
]
LONGEST = max(LIMITS.of(phase) or 0 for phase in Phase)


def _abstract(stream: Stream) -> tuple[object, ...]:
    sandbox = stream.sandbox
    runtime = sandbox.runtime
    main = None if runtime is None else runtime.main
    return (
        sandbox.object_id is not None,
        sandbox.desired,
        sandbox.observed,
        sandbox.run > 0,
        main and main.runtime_id,
        runtime and (runtime.exit_code, runtime.started_at),
        None if sandbox.waiting is None else sandbox.waiting.step == PROBE,
        sandbox.ready_at is not None,
        sandbox.failure is not None,
        None if sandbox.ending is None else sandbox.ending.cause,
        sandbox.closed_at is not None,
        sandbox.expires_at is not None and sandbox.expires_at <= stream.now,
        (stream.now - sandbox.changed_at).total_seconds() >= LONGEST,
        sandbox.frozen_by and (sandbox.frozen_by.run is None, sandbox.frozen_by.thaw is None),
        sandbox.begun_at is not None and (stream.now - sandbox.begun_at).total_seconds() >= LIMITS.ready_s,
    )


@cache
def walk() -> tuple[list[Stream], set[tuple[Phase, Phase]], set[tuple[type[ev.Event], Phase]]]:
    """Every reachable state (one stream each), the phase moves seen, and (event, phase it was appended in)."""
    found: dict[tuple[object, ...], Stream] = {}
    moves: set[tuple[Phase, Phase]] = set()
    appended: set[tuple[type[ev.Event], Phase]] = set()
    todo = deque([Stream(placed=False), Stream(), Stream().pass_time(601), Stream(requested(timeout_s=None))])
    while todo:
        here = todo.popleft()
        if found.setdefault(_abstract(here), here) is not here:
            continue
        for command in (*COMMANDS, cmd.RecordReady(here.sandbox.run)):
            there = here.fork()
            try:
                if not there.do(command):
                    continue
            except Rejected:
                continue
            if there.sandbox.phase is not here.sandbox.phase:
                moves.add((here.sandbox.phase, there.sandbox.phase))
            sandbox = here.sandbox
            for recorded in there.history[len(here.history) :]:
                appended.add((type(recorded.event), sandbox.phase))
                sandbox = evolve(sandbox, recorded)
            todo.append(there)
        if here.sandbox.expires_at is not None and here.now < here.sandbox.expires_at:
            late = here.fork()
            late.now = here.sandbox.expires_at + SECOND
            todo.append(late)
        todo.append(here.fork().pass_time(LONGEST))
    return list(found.values()), moves, appended
