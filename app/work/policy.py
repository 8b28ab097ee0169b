"""The numbers of the workers, in one place. Times are seconds."""

from __future__ import annotations

from datetime import timedelta

from msgspec import Struct


class WorkPolicy(Struct, frozen=True):
    """How a worker behaves. The defaults are for production; tests make time small."""

    concurrency: int = 16
    """Sandboxes one worker works on at once."""
    tenant_slots: int | None = None
    """Slots that one tenant may hold; None = `concurrency`. `spare_slots` stay for the others in any case."""
    spare_slots: int = 4
    """Slots beyond `concurrency`, which a tenant that holds its share already does not get."""
    lease: float = 10
    """After this long without a sign of life of its holder a claim is free again. Extended at a third."""
    poll: float = 1
    """Longest wait for news; a lost notification costs no more than this."""
    claim_every: float = 0.01
    """Shortest time from one claim statement to the next; what becomes due meanwhile is claimed together."""
    claim_every_busy: float = 0.02
    """The same while there is more to do than there are slots: slots that become free are filled together."""
    backoff_base: float = 1
    backoff_max: float = 300
    removal_retry_max: float = 300
    """Longest wait between two tries to remove; removal never gives up."""
    breaker_base: float = 1
    breaker_max: float = 30
    """Longest wait between two questions to an engine that is not there."""
    missing_grace: float = 10
    """How long an engine has to say "none" before it is believed."""
    engine_check: float = 5
    """Longest wait for an engine that is asked who it is; one that hangs is noticed by this."""
    contact_every: float = 0.02
    """An engine is asked for its identity at most this often, however many removals want to know."""
    engine_beat: float = 5
    """How often an engine that works is asked for its identity."""
    engine_probe: float = 1
    """How often an engine that is away, or is not the right one, is asked. Work resumes this soon after an outage."""
    seen_throttle: float = 3
    """`engines.last_seen_at` is written when it is older than this."""
    dark_after: float = 15
    """An engine that no worker has reached for this long is dark."""
    sweep_every: float = 300
    """How often an engine is compared as a whole, by any one of its workers."""
    sweep_tick: float = 10
    """How often a worker asks whether a sweep is due."""
    sweep_page: int = 500
    """Sandboxes that a sweep reads in one statement."""
    sweep_confirm: float = 60
    """A worker that saw orphans or leftovers compares once more after this."""
    exit_settle: float = 0.5
    """An exit that is younger than this may be a restart from outside that is under way."""
    place_again: float = 5
    """How long a sandbox rests for which no engine had room, when no engine comes."""
    newer_wait: float = 30
    """How long a stream that a newer version has written to is left alone."""
    pulls: int = 8
    """Images that one worker has pulled at once."""
    tenant_pulls: int = 6
    """Pulls of them that one tenant may have."""
    commits: int = 4
    """Snapshots that one worker has the engine make at once."""
    tenant_commits: int = 3
    """Of them, those that one tenant may have."""
    progress_every: float = 1
    """How often the progress of a pull is written, and its sandboxes are kept waiting."""
    stall_after: float = 60
    """A loop that has not gone round for this long stands still, and the worker is not alive."""
    stuck_after: float = 600
    """Nor is it when one claim has been worked on for this long: each call of an engine has a limit of its own."""
    stranded_after: float = 30
    """Age at which a sandbox that wants work and has no queue row is called a bug."""
    orphan_grace: float = 120
    orphan_dry_run: bool = False
    hint_window: float = 0.05
    """Hints of this long go to the queue together."""
    create_grace: float = 10
    """How long a stop waits for creates under way, which are not cut; an engine that hangs must not hold it up."""
    keep_days: float = 7
    """How long the end of a sandbox's log is kept after its removal; 0 = nothing is kept."""
    metrics_days: int = 400
    """How long the counts of what SDKs report are kept."""
    keep_end: float = 5
    """How long a removal waits for an engine that does not show what is to be kept."""
    keep_patience: float = 20
    """For how long that is tried again, when a removal that fails is tried again."""
    answer_within: float = 6
    """How long an engine may take for a question of an API process."""
    answer_lease: float = 7
    """After this long another worker answers it."""
    expiry_lease: float = 4
    expiry_concurrency: int = 8

    @property
    def heartbeat(self) -> float:
        """How often leases are extended."""
        return self.lease / 3

    @property
    def slots(self) -> int:
        """How many sandboxes this worker works on at once."""
        return self.concurrency + self.spare_slots

    @property
    def share(self) -> int:
        """Slots that one tenant may hold."""
        return min(self.tenant_slots or self.concurrency, self.concurrency)

    @property
    def grace(self) -> timedelta:
        """For how long a missing object is not yet judged lost, as the core takes it."""
        return timedelta(seconds=self.missing_grace)
