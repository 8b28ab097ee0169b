"""Alembic's entry point. `app.database.migrate` passes an open connection; offline mode is not offered."""

from __future__ import annotations

from alembic import context

from app.database.installation import metadata as installation
from app.log.refusals import metadata as refusals
from app.log.tables import metadata as log
from app.vault.tables import metadata as vault
from app.views.tables import metadata as views
from app.work.tables import metadata as work

connection = context.config.attributes.get("connection")
if connection is None:
    message = "run `sandledger migrate`; it opens the connection and takes the lock"
    raise SystemExit(message)


def include_object(_object: object, name: str | None, kind: str, _reflected: bool, _compare: object) -> bool:
    """Partitions come and go by themselves; only hand-written objects are left alone."""
    return not (kind == "table" and name is not None and name.startswith("events_p"))


context.configure(
    connection=connection,
    target_metadata=[installation, log, refusals, views, work, vault],
    include_object=include_object,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
