"""The log's table, as the migration makes it. Partitions, triggers and grants are hand-written SQL there."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, DateTime, Integer, MetaData, Sequence, SmallInteger, Table, Text, Uuid, text
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

events_position = Sequence("events_position", metadata=metadata, data_type=BigInteger, cache=1)

events = Table(
    "events",
    metadata,
    Column(
        "position",
        BigInteger,
        primary_key=True,
        server_default=text("nextval('events_position')"),
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
