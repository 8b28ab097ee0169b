"""The tables below `[sandledger]`, which the public server does not have. For the others see `app.settings.schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from app.settings.table import Table
from app.settings.values import (
    CountOrNone,
    Grace,
    Lease,
    MasterKey,
    PreviousMasterKey,
    Seconds,
)


class WorkerSettings(Table, frozen=True):
    """`[sandledger.worker]`: reconciling, expiry and clean-up."""

    concurrency: Annotated[int, Meta(ge=1, le=10_000)] = 16
    """Sandboxes of one tenant that one process works on at once; four more are kept for other tenants."""
    lease_seconds: Lease = 10
    """Seconds until work claimed by a silent worker is free again; renewed at a third of it."""
    sweep_seconds: Seconds = 300
    """Seconds between two full comparisons with the engine, by any one of its workers."""
    backoff_base_seconds: Seconds = 1
    """Longest wait, in seconds, before the first retry; doubles with each failure."""
    backoff_max_seconds: Seconds = 300
    """Longest wait, in seconds, before any retry."""
    orphan_grace_seconds: Grace = 120
    """Age in seconds below which an object that no sandbox owns is not removed."""
    missing_grace_seconds: Grace = 10
    """Seconds an expected object has to be missing before it counts as lost."""
    expiry_lease_seconds: Lease = 4
    """Seconds after which an expiry that was claimed and not finished fires again."""
    orphan_dry_run: bool = False
    """Report orphans and do not remove them."""

    def __post_init__(self) -> None:
        """Check what one field cannot say."""
        if self.backoff_base_seconds > self.backoff_max_seconds:
            raise ValueError(
                f"backoff_base_seconds ({self.backoff_base_seconds:g}) exceeds"
                f" backoff_max_seconds ({self.backoff_max_seconds:g})"
            )


class DeadlineSettings(Table, frozen=True):
    """`[sandledger.deadlines]`: how long a sandbox may stay in a phase that is a transition."""

    pending_seconds: Seconds = 900
    """Seconds until a sandbox that does not run yet has failed."""
    pausing_seconds: Seconds = 60
    """Seconds until a pause that does not happen is given up; the sandbox stays Running."""
    resuming_seconds: Seconds = 60
    """Seconds until a resume that does not happen is given up; the sandbox stays Paused."""
    stopping_seconds: Seconds = 60
    """Seconds until a removal that does not end is reported; each next report waits twice as long."""


class AgentSettings(Table, frozen=True):
    """`[sandledger.agent]`: the agent inside sandboxes."""

    ready_seconds: Seconds = 30
    """Seconds that a sandbox which runs waits for its agent; it is Running after that even if none answers."""


class DiagnosticsSettings(Table, frozen=True):
    """`[sandledger.diagnostics]`: what is kept of sandboxes that are gone, beside their events."""

    keep_days: Annotated[int, Meta(ge=0, le=3650)] = 7
    """Days that the end of a sandbox's log, its exit code and an inspection are kept after its removal; 0 = nothing
    is kept."""


class MetricsSettings(Table, frozen=True):
    """`[sandledger.metrics]`: what SDKs report about their own calls."""

    keep_days: Annotated[int, Meta(ge=1, le=3650)] = 400
    """Days that their counts are kept."""


class SnapshotSettings(Table, frozen=True):
    """`[sandledger.snapshots]`: how long snapshots may take."""

    freeze_seconds: Seconds = 180
    """Seconds that a sandbox may stand still for a snapshot; after that it goes on, and the snapshot has failed."""
    commit_seconds: Seconds = 600
    """Seconds until a snapshot that is not ready has failed."""


class ApiSettings(Table, frozen=True):
    """`[sandledger.api]`: bounds of requests."""

    wait_seconds_max: Annotated[int, Meta(ge=0, le=300)] = 300
    """Longest `Prefer: wait`, in seconds, that is honoured."""
    body_limit_bytes: Annotated[int, Meta(ge=1024, le=2**31 - 1)] = 1024 * 1024
    """Largest request body in bytes."""
    metadata_max_entries: CountOrNone = 256
    """Metadata entries a sandbox may have."""


class SandledgerSettings(Table, frozen=True):
    """`[sandledger]`: what the public server has no word for."""

    state_dir: Path = Path(".state")
    """Embedded database and generated keys. `load` (`app.settings.loading`) puts the default of this machine here."""
    master_key_file: Path | None = None
    """File of the key that seals secrets; None = one in `state_dir`. Not opened here."""
    master_key: MasterKey | None = None
    """That key itself; wins over `master_key_file`."""
    previous_master_key: PreviousMasterKey | None = None
    """The key that was in use before a rotation; it only opens what it sealed."""
    start_wait_seconds: Grace = 60
    """Seconds that a server waits at its start for a database that is not there yet; 0 = not at all."""
    worker: WorkerSettings = WorkerSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    agent: AgentSettings = AgentSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    metrics: MetricsSettings = MetricsSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    api: ApiSettings = ApiSettings()
