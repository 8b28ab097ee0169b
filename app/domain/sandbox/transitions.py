"""The declared transition table: which event may be appended in which phase.

`check` runs before every append. Which phase may follow which stands in PostgreSQL's `phase_transitions`, where a
trigger on the head row refuses any other move; tests compare it with the moves that this table makes possible. A
refusal here is a bug of ours, never a client's mistake: `decide` has already answered those.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase, Sandbox
from app.errors import IllegalTransition

_PENDING, _STOPPING = frozenset({Phase.PENDING}), frozenset({Phase.STOPPING})
_ALIVE = frozenset({Phase.PENDING, Phase.RUNNING, Phase.PAUSING, Phase.PAUSED, Phase.RESUMING})
_USED = _ALIVE - _PENDING
_VISIBLE = _ALIVE | {Phase.TERMINATED, Phase.FAILED}
_OPEN = _VISIBLE | {Phase.STOPPING}

ALLOWED: Mapping[type[ev.Event], frozenset[Phase]] = {
    ev.Placed: _PENDING,
    ev.Renewed: _VISIBLE,
    ev.MetadataPatched: _VISIBLE,
    ev.PauseRequested: frozenset({Phase.RUNNING}),
    ev.ResumeRequested: frozenset({Phase.PAUSED}),
    ev.Waited: _PENDING,
    ev.Fetched: _PENDING | _STOPPING,
    ev.RuntimeCreated: _ALIVE | _STOPPING,
    ev.RuntimeAdopted: _ALIVE | _STOPPING,
    ev.Started: _PENDING | _STOPPING,
    ev.Restarted: _ALIVE | _STOPPING,
    ev.Ready: _PENDING | _STOPPING | {Phase.RUNNING},
    ev.AgentUnreachable: _PENDING,
    ev.AddressChanged: _ALIVE,
    # From outside, while the agent has not answered yet, too.
    ev.Paused: frozenset({Phase.PENDING, Phase.RUNNING, Phase.PAUSING, Phase.STOPPING}),
    ev.Resumed: frozenset({Phase.PENDING, Phase.PAUSED, Phase.RESUMING, Phase.STOPPING}),
    ev.PauseFailed: frozenset({Phase.PAUSING, Phase.PENDING}),
    ev.ResumeFailed: frozenset({Phase.RESUMING}),
    ev.FreezeRequested: _USED,
    ev.Frozen: _USED - {Phase.PAUSING},  # what is paused for its owner, too, is recorded as paused first
    ev.ThawRequested: _USED | _STOPPING,
    ev.Thawed: _USED - {Phase.RESUMING},
    ev.LinkCreated: _USED,
    ev.LinksRevoked: _VISIBLE,
    ev.ReconcileFailed: _OPEN,
    ev.Overdue: _STOPPING,
    ev.RuntimeExited: _ALIVE | _STOPPING,
    ev.RuntimeLost: _ALIVE | _STOPPING,
    ev.Failed: _ALIVE,
    ev.TerminationRequested: _VISIBLE,
    ev.Expired: _VISIBLE,
    ev.RuntimeRemoved: frozenset({Phase.TERMINATED, Phase.FAILED, Phase.STOPPING}),
    ev.Terminated: _STOPPING,
}
"""Event -> phases in which it may be appended. `sandbox.requested` begins a stream and stands nowhere else."""


def check(sandbox: Sandbox, event: ev.Event) -> None:
    """Refuse an event that the table does not allow from here.

    Raises:
        IllegalTransition: names the event and the phase.
    """
    allowed = ALLOWED.get(type(event), frozenset())
    if sandbox.closed_at is not None or sandbox.phase not in allowed:
        raise IllegalTransition(
            f"{ev.REGISTRY.name_of(event)} cannot follow in phase {sandbox.phase} of sandbox {sandbox.id}"
        )
