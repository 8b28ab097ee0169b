"""Sealed values come and go in the append that makes and ends the sandbox."""

from __future__ import annotations

from sqlalchemy import CTE, LargeBinary, Text, bindparam, delete, insert, literal_column, select

from app.store.tables import sandbox_secrets


def seal(clock: CTE, head: CTE, _written: CTE) -> CTE:
    """Store. Parameters: key_id, wrapped_key, sealed; nothing is stored when `sealed` is NULL."""
    sealed = bindparam("sealed", type_=LargeBinary)
    source = (
        select(
            head.c.id,
            head.c.tenant,
            bindparam("key_id", type_=Text),
            bindparam("wrapped_key", type_=LargeBinary),
            sealed,
            clock.c.now,
        )
        .select_from(head.join(clock, literal_column("true")))
        .where(sealed.is_not(None))
    )
    names = ["sandbox_id", "tenant", "key_id", "wrapped_key", "sealed", "sealed_at"]
    return insert(sandbox_secrets).from_select(names, source).returning(sandbox_secrets.c.sandbox_id).cte("sealed_now")


def erase(_clock: CTE, head: CTE, _written: CTE) -> CTE:
    """Delete: what is left of the values elsewhere is ciphertext without its key."""
    return (
        delete(sandbox_secrets)
        .where(sandbox_secrets.c.sandbox_id == select(head.c.id).scalar_subquery())
        .returning(sandbox_secrets.c.sandbox_id)
        .cte("erased")
    )
