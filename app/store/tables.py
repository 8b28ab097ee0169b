"""Every table that statements name, as the migration makes it.

Partitions, triggers, functions and grants are hand-written SQL in the migration; a test compares the two. A column
whose comment begins with "Not folded:" is not the fold of events, and no law says that it equals one.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
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
from sqlalchemy.dialects.postgresql import INET, JSONB

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
    Column(
        "stream_id",
        Uuid,
        nullable=False,
        comment="The aggregate: a sandbox, a snapshot, an engine, or the installation.",
    ),
    Column("kind", Text, nullable=False, comment="Which aggregate: sandbox, snapshot, engine, operations."),
    Column("tenant", Text, nullable=False, comment="Whose stream."),
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


def _head_part() -> tuple[Column[int], Column[int], Column[int]]:
    return (
        Column("version", Integer, nullable=False, comment="Version of the last event; the append's guard."),
        Column("position", BigInteger, nullable=False, comment="Position of the last event."),
        Column("schema", SmallInteger, nullable=False, comment="Highest schema number in the stream."),
    )


sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    *_head_part(),
    Column("phase", Text, nullable=False, comment="Public state, derived."),
    Column("desired", Text, nullable=False, comment="What its owner wants: running, paused, terminated."),
    Column(
        "observed",
        Text,
        nullable=False,
        comment="What the log knows of the object: none, created, running, paused, exited, lost, removed.",
    ),
    Column("spec", JSONB, nullable=False, comment="As accepted; env is names with keyed digests."),
    Column("metadata", JSONB, nullable=False),
    Column("engine", Text, comment="Name of the engine; none = no engine had room yet."),
    Column("epoch", Integer, nullable=False, comment="Of the engine when it was placed."),
    Column("place", Text, nullable=False, comment="Namespace on the engine; empty on Docker."),
    Column("object_id", Uuid, comment="The engine's object belongs to this id; names derive from it."),
    Column("generation", Integer, nullable=False, comment="Objects made for it so far."),
    Column("run", Integer, nullable=False, comment="Starts so far."),
    Column("runtime", JSONB, comment="The engine's object: parts, image, start, exit."),
    Column("address", JSONB, comment="Network, address and published ports."),
    Column("waiting", JSONB, comment="Step and reason that a Pending sandbox waits for."),
    Column("failure", JSONB, comment="Step, reason and message when it could not be provided."),
    Column("frozen_by", JSONB, comment="The snapshot for which it stands still."),
    Column("freeze_at", DateTime(timezone=True), comment="When it was asked to stand still, then since when it does."),
    Column(
        "link_number",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Signed links that carry another number do not hold.",
    ),
    Column("cpu_nanos", BigInteger, comment="CPU limit in billionths of a CPU."),
    Column("memory_bytes", BigInteger, comment="Memory limit in bytes."),
    Column("gpus", Integer, comment="Number of GPUs."),
    Column("key_id", Text, nullable=False, comment="Id of the key that asked for it."),
    Column("key_name", Text, nullable=False, comment="Name of the key that asked for it."),
    Column("fingerprint", Text, nullable=False, comment="Keyed digest of the request."),
    Column("created_at", DateTime(timezone=True), nullable=False, comment="When it was accepted."),
    Column("changed_at", DateTime(timezone=True), nullable=False, comment="When the phase last changed."),
    Column("begun_at", DateTime(timezone=True), comment="When the start of its present run was recorded."),
    Column("ready_at", DateTime(timezone=True), comment="Since when its present run can be used."),
    Column("expires_at", DateTime(timezone=True), comment="When it expires; none = never by itself."),
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

engines = Table(
    "engines",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, comment="Always _platform."),
    *_head_part(),
    Column("name", Text, nullable=False, unique=True, comment="As settings name it."),
    Column("kind", Text, nullable=False, comment="docker, fake."),
    Column("engine_id", Text, nullable=False, comment="What the engine calls itself."),
    Column("mark", Text, nullable=False, comment="Random word that we left on the engine."),
    Column("epoch", Integer, nullable=False, comment="Rises when the engine is replaced."),
    Column("state", Text, nullable=False, comment="up, dark, mismatch."),
    Column("state_since", DateTime(timezone=True), nullable=False),
    Column("trouble", Text, nullable=False, comment="Why it is dark or mismatched."),
    Column(
        "trusted_position",
        BigInteger,
        nullable=False,
        comment="Objects up to this position are no sign that the log went back.",
    ),
    Column("labels", JSONB, nullable=False),
    Column("capabilities", JSONB, nullable=False),
    Column("capacity", JSONB, nullable=False),
    Column("agents", JSONB, nullable=False, comment="Image id -> id of the container that copied the agent's files."),
    Column("network", JSONB, comment="Our own network there; none = there was none yet."),
    Column("server_version", Text, nullable=False),
    Column("api_version", Text, nullable=False),
    Column("last_seen_at", DateTime(timezone=True), comment="Not folded: when a worker last reached it."),
    Column("swept_at", DateTime(timezone=True), comment="Not folded: when a worker last compared all of it."),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    *_head_part(),
    Column("sandbox_id", Uuid, nullable=False, comment="Whose files it has."),
    Column("name", Text, comment="As its owner calls it; need not be unique."),
    Column("engine", Text, nullable=False, comment="Where its image is."),
    Column("generation", Integer, nullable=False, comment="Of the source, when it was asked for."),
    Column("run", Integer, nullable=False, comment="Of the source, when it was asked for."),
    Column("state", Text, nullable=False, comment="Creating, Ready, Failed, Deleting, Removed."),
    Column("reason", Text, nullable=False, comment="Why it is in this state, in the contract's words."),
    Column("message", Text, nullable=False),
    Column("raw_id", Text, comment="Image of the commit; none = there is no whole one yet."),
    Column("image_id", Text, comment="Image that sandboxes are made from."),
    Column("size_bytes", BigInteger, comment="Of that image, with the layers that it shares."),
    Column("frozen_ms", BigInteger, comment="How long the source stood still for it."),
    Column("created_at", DateTime(timezone=True), nullable=False, comment="When it was accepted."),
    Column("changed_at", DateTime(timezone=True), nullable=False, comment="When the state last changed."),
    Column("removed_at", DateTime(timezone=True), comment="When nothing of it was left on the engine."),
    Column("since_position", BigInteger, nullable=False, comment="No event of it lies below."),
)

operations = Table(
    "operations",
    metadata,
    Column("id", Uuid, primary_key=True, comment="The installation's id."),
    Column("tenant", Text, nullable=False, comment="Always _platform."),
    *_head_part(),
)

reconcile_queue = Table(
    "reconcile_queue",
    metadata,
    Column("stream_id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("engine", Text, nullable=False, comment="Whose workers take it; empty = not placed, any worker."),
    Column("revision", BigInteger, nullable=False, comment="Rises with every touch and every hint."),
    Column("due_at", DateTime(timezone=True), nullable=False, comment="Also the visibility timeout of a claim."),
    Column("priority", SmallInteger, nullable=False, comment="0 user, 1 background."),
    Column("attempts", Integer, nullable=False, comment="Counted failures in a row."),
    Column("first_failed_at", DateTime(timezone=True)),
    Column("lease_owner", Uuid, comment="A new value for each claim."),
    Column("lease_until", DateTime(timezone=True)),
    Column("last_reason", Text),
    Column("last_error", Text),
    Column("progress", Text, comment="How far the attempt under way is, for people."),
    Column("cause", BigInteger, comment="Position of the event that asked for attention."),
    Column("missing_since", DateTime(timezone=True), comment="Since when the engine says there is none."),
    Column("trace", Text, comment="Reserved: trace of the request."),
)

deadlines = Table(
    "deadlines",
    metadata,
    Column("stream_id", Uuid, primary_key=True),
    Column("name", Text, primary_key=True, comment="expiry, transition, ready, freeze, commit."),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("fires_at", DateTime(timezone=True), nullable=False),
    Column(
        "next_run_time", DateTime(timezone=True), nullable=False, comment="fires_at, or the end of a claim's lease."
    ),
    Column("attempts", Integer, nullable=False),
    Column("cause", BigInteger, comment="Position of the event that set it."),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("digest", Text, primary_key=True, comment="SHA-256 of the Idempotency-Key."),
    Column("kind", Text, nullable=False),
    Column("stream_id", Uuid, nullable=False, comment="What the first request with this key made."),
    Column("fingerprint", Text, nullable=False, comment="Keyed digest of that request."),
    Column("made_at", DateTime(timezone=True), nullable=False),
)

sealed_values = Table(
    "sealed_values",
    metadata,
    Column("stream_id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False, comment="Which master key wraps the data key."),
    Column("wrapped_key", LargeBinary, nullable=False, comment="The stream's own data key, wrapped."),
    Column("sealed", LargeBinary, nullable=False, comment="AES-256-GCM of the values, under the data key."),
    Column("sealed_at", DateTime(timezone=True), nullable=False),
)

refusals = Table(
    "refusals",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("refused_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Column("tenant", Text, nullable=False),
    Column("kind", Text, comment="Of the stream; none when there was none."),
    Column("stream_id", Uuid, comment="None: the id was not known, or there was none yet."),
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
    Column("epoch", Integer, nullable=False, comment="Of the log; rises when an operator restores it."),
    Column("app_role", Text, nullable=False, comment="The role that servers work as; their logins are members of it."),
    Column("owner_role", Text, nullable=False, comment="Who made the schema."),
)

installation_keys = Table(
    "installation_keys",
    metadata,
    Column("name", Text, primary_key=True, comment="digest, token, link, audit."),
    Column("key_id", Text, nullable=False, comment="Which master key wraps it."),
    Column("wrapped", LargeBinary, nullable=False, comment="A random key, wrapped by the master key."),
)

kept_ends = Table(
    "kept_ends",
    metadata,
    Column("stream_id", Uuid, primary_key=True),
    Column("generation", Integer, primary_key=True, comment="Of the object that ended."),
    Column("run", Integer, primary_key=True, comment="Which of its starts."),
    Column("tenant", Text, nullable=False),
    Column("taken_at", DateTime(timezone=True), nullable=False),
    Column("logs", Text, comment="The end of the log, without sealed values; none = it could not be read."),
    Column("more", Boolean, nullable=False, comment="There were older lines."),
    Column("inspect", JSONB, comment="What the engine said of it, without sealed values."),
    Column("error", Text, comment="Why something is missing."),
    Column("keep_until", DateTime(timezone=True), nullable=False),
)

addresses = Table(
    "addresses",
    metadata,
    Column("engine", Text, primary_key=True, comment="On whose network of ours."),
    Column("ip", INET, primary_key=True),
    Column("tenant", Text, comment="Of the sandbox that has it, or had it last; none = nobody yet."),
    Column("stream_id", Uuid, comment="The sandbox that has it, or had it last."),
    Column("object_id", Uuid, comment="Its object on the engine."),
    Column("generation", Integer, comment="Of the object that the address was last leased for."),
    Column("leased_at", DateTime(timezone=True)),
    Column(
        "freed_at",
        DateTime(timezone=True),
        comment="When the removal of its sandbox was recorded; none = leased, -infinity = never leased.",
    ),
)

engine_requests = Table(
    "engine_requests",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("engine", Text, nullable=False, comment="Whose workers answer."),
    Column("stream_id", Uuid, nullable=False),
    Column("what", Text, nullable=False, comment="logs, inspect."),
    Column("arguments", JSONB, nullable=False),
    Column("asked_at", DateTime(timezone=True), nullable=False),
    Column("lease_until", DateTime(timezone=True), comment="Until then a worker is at it."),
    Column("answered_at", DateTime(timezone=True)),
    Column("answer", Text, comment="JSON, without sealed values."),
    Column("error", Text, comment="Why there is no answer."),
)

client_metrics = Table(
    "client_metrics",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("day", Date, primary_key=True, comment="UTC, by the database's clock."),
    Column("event", Text, primary_key=True, comment="sandbox.create."),
    Column("sdk", Text, primary_key=True, comment="Language and version, e.g. python/1.1.1."),
    Column("success", Boolean, primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("duration_ms_sum", BigInteger, nullable=False, comment="A report counts with one day at most."),
)

stations = Table(
    "stations",
    metadata,
    Column("worker_id", Text, primary_key=True),
    Column("engine", Text, primary_key=True, comment="As the worker's settings name it; it may never have answered."),
    Column("name", Text, nullable=False, comment="Of the worker, for people: its host."),
    Column("trouble", Text, nullable=False, comment="Why it cannot use the engine."),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("said_at", DateTime(timezone=True), nullable=False, comment="Rows that are not written again are deleted."),
)

activity = Table(
    "activity",
    metadata,
    Column("sandbox_id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False, comment="Whose sandbox."),
    Column("last_at", DateTime(timezone=True), nullable=False, comment="Not folded: when bytes moved last."),
    Column("requests", BigInteger, nullable=False, comment="Not folded: requests and WebSockets that reached it."),
    Column("bytes_in", BigInteger, nullable=False, comment="Not folded: bytes to it, without heads."),
    Column("bytes_out", BigInteger, nullable=False, comment="Not folded: bytes from it, without heads."),
)
