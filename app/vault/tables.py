"""Sealed values, apart from the log so that they can be erased."""

from __future__ import annotations

from sqlalchemy import Column, DateTime, LargeBinary, MetaData, Table, Text, Uuid

metadata = MetaData()

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
