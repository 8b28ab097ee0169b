"""Whom servers are: a login that may read and insert, whatever it tries, and is refused when a setting is missing."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import func, literal_column, select

from app.errors import StoreRefused
from app.service.sandboxes import Service
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.embedded.server import EmbeddedPostgres
from tests.conftest import as_server, on_database
from tests.support.sql import INSERT_EVENT, app_role, connected
from tests.support.stream import META, requested

REFUSED = asyncpg.InsufficientPrivilegeError
PATH = "pg_catalog, sandledger, pg_temp"
IN_FORCE = Statement(
    select(
        func.current_setting("search_path"),
        func.current_setting("default_transaction_isolation"),
        func.current_setting("synchronous_commit"),
        func.current_setting("TimeZone"),
        literal_column("session_user"),
    )
)
AS_SERVERS = {"search_path": PATH}


async def test_settings_of_the_database_do_not_reach_us(dsn: str):
    async with connected(dsn, owner=True) as owner:
        name = await owner.fetchval("SELECT current_database()")
        for setting in (
            "search_path = public",
            "default_transaction_isolation = serializable",
            "synchronous_commit = off",
            "TimeZone = 'Asia/Tokyo'",
        ):
            await owner.execute(f"ALTER DATABASE {name} SET {setting}")
    database = Database(as_server(dsn))
    row = await database.fetch_one(IN_FORCE)
    await database.close()
    assert row is not None
    assert tuple(row) == (PATH, "read committed", "on", "UTC", "sandledger_server")
    login = database.login
    assert login is not None
    assert (login.superuser, login.owner, login.warning) == (False, False, None)


GAINS_NOTHING = (
    "UPDATE sandledger.events SET tenant = 'x'",
    "DELETE FROM sandledger.events",
    "TRUNCATE sandledger.events",
    "TRUNCATE sandledger.refusals",
    "CREATE TEMPORARY TABLE events (x int)",
    "CREATE TABLE sandledger.mine (x int)",
    "CREATE TABLE public.mine (x int)",
    "CREATE SCHEMA mine",
    "ALTER TABLE sandledger.events DISABLE TRIGGER ALL",
    "SET session_replication_role = replica",
    "CREATE ROLE mine",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
)


@pytest.mark.parametrize("back", ["SELECT 1", "SET ROLE NONE", "RESET ROLE", "RESET SESSION AUTHORIZATION"])
async def test_no_way_back_to_more(dsn: str, back: str):
    async with connected(dsn, owner=True) as owner:
        role = await app_role(owner)
    async with connected(as_server(dsn), owner=True, role=role, **AS_SERVERS) as server:
        await server.execute(back)
        for statement in GAINS_NOTHING:
            with pytest.raises(REFUSED):
                await server.execute(statement)
        await server.execute(INSERT_EVENT.replace("INTO events", "INTO sandledger.events"), uuid4(), 1)
        await server.execute("BEGIN; ROLLBACK")
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "ALTER TABLE events DISABLE TRIGGER append_only; ALTER TABLE events_p000000 DISABLE TRIGGER append_only"
        )
        await owner.execute("DELETE FROM events")  # without a head row it would be drift


SHADOWS = """
CREATE TEMPORARY SEQUENCE events_position;
CREATE TEMPORARY TABLE phase_transitions (from_phase text, to_phase text);
INSERT INTO phase_transitions VALUES ('Pending', 'Nonsense');
CREATE TEMPORARY TABLE events (LIKE sandledger.events);
GRANT ALL ON phase_transitions, events, events_position TO PUBLIC;
"""


async def test_temporary_tables_shadow_nothing_even_where_they_can_be_made(dsn: str, service: Service):
    """In a database that others use too, temporary tables stay allowed. Unqualified names would find them first."""
    made = await service.create(uuid4(), "default", requested(), None, META)
    async with connected(dsn, owner=True, search_path="pg_temp, sandledger") as owner:
        role = await app_role(owner)
        await owner.execute(SHADOWS)
        await owner.execute(f"SET ROLE {role}")
        with pytest.raises(asyncpg.CheckViolationError):
            await owner.execute(
                "UPDATE sandledger.sandboxes SET version = version + 1, phase = 'Nonsense' WHERE id = $1",
                made.sandbox.id,
            )
        assert await owner.fetchval("SELECT sandledger.log_horizon()") >= made.position
        async with owner.transaction():
            await owner.execute(INSERT_EVENT.replace("INTO events", "INTO sandledger.events"), made.sandbox.id, 9)
            announced = await owner.fetchval("SELECT sandledger.log_horizon()")
            assert (
                made.position <= announced < await owner.fetchval("SELECT last_value FROM sandledger.events_position")
            )
            await owner.execute("SET LOCAL ROLE NONE")
            await owner.execute(
                "SET LOCAL session_replication_role = replica; ALTER TABLE sandledger.events DISABLE TRIGGER append_only;"
                "ALTER TABLE sandledger.events_p000000 DISABLE TRIGGER append_only;"
                "DELETE FROM sandledger.events WHERE version = 9"
            )


async def test_a_login_that_owns_the_tables_works_and_is_warned_about(dsn: str):
    database = Database(dsn)
    await database.fetch(IN_FORCE)
    await database.close()
    login = database.login
    assert login is not None
    assert login.warning is not None
    for part in ("superuser", "CREATE ROLE", f"GRANT {login.role}", "migrate_dsn"):
        assert part in login.warning


async def test_a_login_that_is_no_member_is_told_which_grant_is_missing(dsn: str, postgres: EmbeddedPostgres):
    name = f"stranger_{uuid4().hex[:8]}"
    async with connected(dsn, owner=True) as owner:
        await owner.execute(f"CREATE ROLE {name} LOGIN")
        try:
            database = Database(dsn.replace("postgres@", f"{name}@"))
            with pytest.raises(StoreRefused, match=f"GRANT {await app_role(owner)} TO {name}") as told:
                await database.fetch(IN_FORCE)
            await owner.execute(str(told.value).partition(": ")[2])
            assert await database.fetch_one(IN_FORCE) is not None
            await database.close()
        finally:
            await owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_migration_lets_the_configured_login_in(dsn: str):
    name = f"server_{uuid4().hex[:8]}"
    async with connected(dsn, owner=True) as owner:
        await owner.execute(f"CREATE ROLE {name} LOGIN")
        try:
            server = dsn.replace("postgres@", f"{name}@")
            await migrate(dsn, admit=address(server))
            database = Database(server)
            assert await database.fetch_one(IN_FORCE) is not None
            await database.close()
        finally:
            await owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_server_may_look_at_the_schema_and_finds_nothing_to_do(dsn: str):
    """Each server does so at its start, also where only the command line has the owner's DSN."""
    seen = await migrate(as_server(dsn))
    assert seen.before == seen.after == seen.head
    assert await migrate(as_server(dsn), apply=False) == seen


async def test_a_database_without_our_schema_says_what_to_do(postgres: EmbeddedPostgres):
    database = Database(on_database(postgres.dsn, "postgres"))
    with pytest.raises(StoreRefused, match="sandledger migrate"):
        await database.fetch(IN_FORCE)
    await database.close()


class Forgetful:
    """A pooler that ignores settings of the start packet, as pgbouncer does when it is told to."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self.forget: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        length = int.from_bytes(await reader.readexactly(4))
        packet = await reader.readexactly(length - 4)
        words = packet[4:].split(b"\0")
        pairs = [(words[i], words[i + 1]) for i in range(0, len(words) - 2, 2) if words[i]]
        kept = b"".join(key + b"\0" + value + b"\0" for key, value in pairs if key.lower() not in self.forget) + b"\0"
        back.write((len(kept) + 8).to_bytes(4) + packet[:4] + kept)
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()


@pytest.mark.parametrize(
    "forgotten",
    [
        "role",
        "search_path",
        "synchronous_commit",
        "default_transaction_isolation",
        "idle_in_transaction_session_timeout",
    ],
)
async def test_a_pooler_that_drops_a_setting_is_noticed(dsn: str, postgres: EmbeddedPostgres, forgotten: str):
    pooler = Forgetful(str(postgres.socket_dir / ".s.PGSQL.5432"))
    pooler.forget = {forgotten.encode()}
    async with connected(dsn, owner=True) as owner:
        name = await owner.fetchval("SELECT current_database()")
        for setting in ("synchronous_commit = off", "default_transaction_isolation = serializable"):
            await owner.execute(f"ALTER DATABASE {name} SET {setting}")
        server = await asyncio.start_server(pooler.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        database = Database(f"postgresql://sandledger_server@127.0.0.1:{port}/{name}?sslmode=disable")
        with pytest.raises(StoreRefused, match=rf"not in force \({forgotten}\)") as told:
            await database.fetch(IN_FORCE)
        # What it advises is what helps.
        for statement in str(told.value).partition("login's own: ")[2].split("; "):
            await owner.execute(statement.replace("DATABASE ...", f"DATABASE {name}"))
        row = await database.fetch_one(IN_FORCE)
        assert row is not None
        assert tuple(row) == (PATH, "read committed", "on", "UTC", "sandledger_server")
        await database.close()
        server.close()
