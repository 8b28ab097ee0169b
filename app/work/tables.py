"""What the workers share through PostgreSQL. Rows are written by the append itself."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Integer, MetaData, SmallInteger, Table, Text, Uuid

metadata = MetaData()

reconcile_queue = Table(
    "reconcile_queue",
    metadata,
    Column("sandbox_id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("driver", Text, nullable=False),
    Column("generation", BigInteger, nullable=False, comment="Rises with every touch."),
    Column("due_at", DateTime(timezone=True), nullable=False, comment="Also the visibility timeout of a claim."),
    Column("priority", SmallInteger, nullable=False, comment="0 user, 1 background."),
    Column("attempts", Integer, nullable=False, comment="Counted failures in a row."),
    Column("first_failed_at", DateTime(timezone=True)),
    Column("lease_owner", Uuid, comment="One value a claim."),
    Column("lease_until", DateTime(timezone=True)),
    Column("last_error", Text),
    Column("last_code", Text),
    Column("cause", BigInteger, comment="Position of the event that asked for attention."),
    Column("missing_since", DateTime(timezone=True), comment="Since when the engine says there is none."),
)

expiry_jobs = Table(
    "expiry_jobs",
    metadata,
    Column("sandbox_id", Uuid, primary_key=True),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column(
        "next_run_time", DateTime(timezone=True), nullable=False, comment="Deadline, or the end of a claim's lease."
    ),
    Column("attempts", Integer, nullable=False),
    Column("cause", BigInteger, comment="Position of the event that set the deadline."),
)
