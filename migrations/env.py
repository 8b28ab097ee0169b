"""Alembic's entry point. `app.store.database.migrate` passes an open connection; offline mode is not offered."""

from __future__ import annotations

from alembic import context

from app.store.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    message = "run `sandledger migrate`; it opens the connection and takes the lock"
    raise SystemExit(message)


def include_object(_object: object, name: str | None, kind: str, _reflected: bool, _compare: object) -> bool:
    """Partitions come and go by themselves; only hand-written objects are left alone."""
    return not (kind == "table" and name is not None and name.startswith("events_p"))


context.configure(
    connection=connection,
    target_metadata=metadata,
    include_object=include_object,
    include_schemas=True,
    version_table_schema="sandledger",
    transactional_ddl=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
