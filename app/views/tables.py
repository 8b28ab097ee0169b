"""`sandboxes`: stream head, current view and snapshot in one row."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Integer, MetaData, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("version", Integer, nullable=False, comment="Version of the last event; the append's guard."),
    Column("phase", Text, nullable=False, comment="Public state, derived."),
    Column("driver", Text, nullable=False),
    Column("desired", Text, nullable=False, comment="What its owner wants: running, paused, terminated."),
    Column(
        "observed",
        Text,
        nullable=False,
        comment="What the log knows of the runtime: none, created, running, paused, exited, lost, removed.",
    ),
    Column("spec", JSONB, nullable=False, comment="As accepted; env is names with keyed digests."),
    Column("metadata", JSONB, nullable=False),
    Column("runtime", JSONB, comment="The engine's object: id, name, image_digest, started_at, exit."),
    Column("failure_reason", Text, comment="Why it could not be provided."),
    Column("failure_message", Text),
    Column("fingerprint", Text, nullable=False, comment="Keyed digest of the request."),
    Column("created_at", DateTime(timezone=True), nullable=False, comment="When it was accepted."),
    Column("changed_at", DateTime(timezone=True), nullable=False, comment="When the phase last changed."),
    Column("expires_at", DateTime(timezone=True), comment="Its deadline; none = no end by itself."),
    Column("ended_at", DateTime(timezone=True), comment="Since when clients get 404."),
    Column("end_cause", Text, comment="user_delete, expired, expired_while_pending."),
    Column("ended_by", Text, comment="Kind and name of the actor."),
    Column("closed_at", DateTime(timezone=True), comment="When nothing of it was left on the engine."),
    Column(
        "since_position",
        BigInteger,
        nullable=False,
        comment="No event of it lies below; lets history prune partitions.",
    ),
)
