"""${message}"""

from __future__ import annotations

from app.store.database.migrate import run_script

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    run_script("")


def downgrade() -> None:
    """The log is append-only; going back is restoring a backup."""
    raise NotImplementedError
