"""Which phase may follow which, as the walk over all states finds it and as the migration writes it."""

from __future__ import annotations

from app.domain.sandbox.state import Phase

PHASE_MOVES: frozenset[tuple[Phase, Phase]] = frozenset(
    {
        (Phase.PENDING, Phase.RUNNING),
        (Phase.PENDING, Phase.RESUMING),
        (Phase.PENDING, Phase.PAUSING),
        (Phase.PENDING, Phase.PAUSED),
        (Phase.PENDING, Phase.TERMINATED),
        (Phase.PENDING, Phase.FAILED),
        (Phase.PENDING, Phase.STOPPING),
        (Phase.RUNNING, Phase.PENDING),
        (Phase.PAUSING, Phase.PENDING),
        (Phase.PAUSED, Phase.PENDING),
        (Phase.RESUMING, Phase.PENDING),
        (Phase.RUNNING, Phase.PAUSING),
        (Phase.RUNNING, Phase.RESUMING),
        (Phase.RUNNING, Phase.PAUSED),
        (Phase.RUNNING, Phase.TERMINATED),
        (Phase.RUNNING, Phase.FAILED),
        (Phase.RUNNING, Phase.STOPPING),
        (Phase.PAUSING, Phase.RUNNING),
        (Phase.PAUSING, Phase.PAUSED),
        (Phase.PAUSING, Phase.TERMINATED),
        (Phase.PAUSING, Phase.FAILED),
        (Phase.PAUSING, Phase.STOPPING),
        (Phase.PAUSED, Phase.RESUMING),
        (Phase.PAUSED, Phase.PAUSING),
        (Phase.PAUSED, Phase.TERMINATED),
        (Phase.PAUSED, Phase.FAILED),
        (Phase.PAUSED, Phase.STOPPING),
        (Phase.RESUMING, Phase.RUNNING),
        (Phase.RESUMING, Phase.PAUSED),
        (Phase.RESUMING, Phase.TERMINATED),
        (Phase.RESUMING, Phase.FAILED),
        (Phase.RESUMING, Phase.STOPPING),
        (Phase.TERMINATED, Phase.STOPPING),
        (Phase.FAILED, Phase.STOPPING),
        (Phase.FAILED, Phase.TERMINATED),
        (Phase.STOPPING, Phase.TERMINATED),
    }
)
"""From -> to, across one append (which may hold several events)."""
