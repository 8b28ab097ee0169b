"""A history that a newer version wrote: what needs it is refused honestly, everything else goes on."""

from __future__ import annotations

from uuid import UUID

import httpx

from app.store.database.pool import Database
from tests.api.conftest import create
from tests.support.sql import META, connected


async def written_by_a_newer_version(dsn: str, sandbox_id: UUID) -> None:
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
            f"VALUES ($1, 'sandbox', 'default', 3, 'sandbox.newfangled', 1, '{{}}', '{META}')",
            sandbox_id,
        )


async def unwrite(dsn: str) -> None:
    """The check for drift at the end could not read it either."""
    async with connected(dsn, owner=True) as owner:
        await owner.execute("ALTER TABLE events DISABLE TRIGGER ALL")
        await owner.execute("ALTER TABLE events_p000000 DISABLE TRIGGER ALL")
        await owner.execute("DELETE FROM events WHERE type = 'sandbox.newfangled'")


async def test_only_what_needs_the_history_is_refused(dsn: str, database: Database, http: httpx.AsyncClient):
    made = await create(http)
    other = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    await written_by_a_newer_version(dsn, UUID(made["id"]))
    try:
        as_of = await http.get(path, params={"asOf": "2100-01-01T00:00:00Z"})
        assert as_of.status_code == 503
        assert as_of.json()["code"] == "SANDLEDGER::NEWER_HISTORY"
        assert "upgrade" in as_of.json()["message"]
        assert (await http.get(path)).status_code == 200
        shown = (await http.get(f"{path}/events")).json()["items"]
        assert [event["type"] for event in shown] == ["sandbox.requested", "sandbox.placed", "sandbox.newfangled"]
        listed = (await http.get("/v1/sandboxes")).json()["items"]
        assert {each["id"] for each in listed} == {made["id"], other["id"]}
    finally:
        await unwrite(dsn)


async def test_a_state_in_words_of_a_newer_version_is_said_to_be_that(dsn: str, http: httpx.AsyncClient):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    async with connected(dsn, owner=True) as owner:
        await owner.execute("UPDATE sandboxes SET observed = 'hibernating', version = 3")
        for asked in (path, "/v1/sandboxes"):
            answer = await http.get(asked)
            assert (answer.status_code, answer.json()["code"]) == (503, "SANDLEDGER::NEWER_HISTORY")
        assert (await http.get(f"{path}/events")).status_code == 200
        await owner.execute("ALTER TABLE sandboxes DISABLE TRIGGER check_phase")
        await owner.execute("UPDATE sandboxes SET observed = 'none', version = 2")
