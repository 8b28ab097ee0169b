"""Sealed values come with the append that makes the sandbox, and go with the one after which it can never run again."""

from __future__ import annotations

from sqlalchemy import CTE, LargeBinary, Text, bindparam, delete, insert, literal, literal_column, select

from app.store.log.append import Parts
from app.store.tables import sealed_values


def seal(parts: Parts) -> CTE:
    """Store. Parameters: key_id, wrapped_key, sealed; nothing is stored when `sealed` is NULL."""
    sealed = bindparam("sealed", type_=LargeBinary)
    guard, clock = parts.guard, parts.clock
    source = (
        select(
            guard.c.id,
            literal(parts.kind),
            guard.c.tenant,
            bindparam("key_id_sealing", type_=Text),
            bindparam("wrapped_key", type_=LargeBinary),
            sealed,
            clock.c.now,
        )
        .select_from(guard.join(clock, literal_column("true")))
        .where(sealed.is_not(None))
    )
    names = ["stream_id", "kind", "tenant", "key_id", "wrapped_key", "sealed", "sealed_at"]
    return insert(sealed_values).from_select(names, source).returning(sealed_values.c.stream_id).cte("sealed_now")


def erase(parts: Parts) -> CTE:
    """Delete: what is left of the values elsewhere is ciphertext without its key."""
    return (
        delete(sealed_values)
        .where(sealed_values.c.stream_id == select(parts.guard.c.id).scalar_subquery())
        .returning(sealed_values.c.stream_id)
        .cte("erased")
    )
