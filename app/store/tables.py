"""Every table that statements name, as the migration makes it.

Partitions, triggers, functions and grants are hand-written SQL in the migration; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(schema="sandledger")

events_position = Sequence("events_position", metadata=metadata, schema="sandledger", data_type=BigInteger, cache=1)

events = Table(
    "events",
    metadata,
    Column(
        "position",
        BigInteger,
        primary_key=True,
        server_default=text("nextval('sandledger.events_position')"),
        comment="Place in the one total order. Gaps are normal.",
    ),
    Column("stream_id", Uuid, nullable=False, comment="The sandbox."),
    Column("tenant", Text, nullable=False, comment="Whose sandbox."),
    Column("version", Integer, nullable=False, comment="1..n within the stream."),
    Column("type", Text, nullable=False, comment="Stable wire name, e.g. sandbox.requested."),
    Column("schema", SmallInteger, nullable=False, comment="Schema number of data."),
    Column("data", JSONB, nullable=False, comment="What happened. Never a secret."),
    Column("meta", JSONB, nullable=False, comment="actor, request_id, cause, client, app_version."),
    Column(
        "recorded_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("clock_timestamp()"),
        comment="The database's clock at the append.",
    ),
    postgresql_partition_by="RANGE (position)",
)

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

sandbox_secrets = Table(
    "sandbox_secrets",
    metadata,
    Column("sandbox_id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False, comment="Which master key wraps the data key."),
    Column("wrapped_key", LargeBinary, nullable=False, comment="The sandbox's own data key, wrapped."),
    Column("sealed", LargeBinary, nullable=False, comment="AES-256-GCM of the values, under the data key."),
    Column("sealed_at", DateTime(timezone=True), nullable=False),
)

refusals = Table(
    "refusals",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("refused_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Column("tenant", Text, nullable=False),
    Column("sandbox_id", Uuid, comment="None: the id was not known, or there was none yet."),
    Column("command", Text, nullable=False, comment="Method and route, e.g. POST /sandboxes/{id}/pause."),
    Column("status", SmallInteger, nullable=False, comment="HTTP status of the answer."),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("meta", JSONB, nullable=False, comment="As on events."),
)

installation = Table(
    "installation",
    metadata,
    Column("only_row", Boolean, primary_key=True),
    Column("id", Uuid, nullable=False, comment="Label of every object of ours on an engine."),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("master_key_id", Text, comment="Digest of the master key that seals here."),
    Column("app_role", Text, nullable=False, comment="The role that servers work as; their logins are members of it."),
    Column("owner_role", Text, nullable=False, server_default=text("CURRENT_USER"), comment="Who made the schema."),
)
